"""Pictures of predicted capabilities."""

import numpy as np
import pytest

from lit_interns1.reports import RunDirectory, draw_pictures
from lit_interns1.reports.salience_figures import capability_figure, prediction_figure


def test_scores_of_a_run_are_drawn_over_tokens_with_their_errors(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.csv").write_text(
        "step,train/tokens,salience/chess/loss,salience/chess/predicted_score,salience/chess/predicted_std\n"
        "9,1000,2.0,0.3,0.1\n19,2000,1.5,0.5,0.1\n"
    )
    drawn = draw_pictures(RunDirectory(tmp_path))
    assert set(drawn) == {"capabilities"}
    assert drawn["capabilities"].read_bytes().startswith(b"\x89PNG")
    axes = capability_figure({"chess": ([1000, 2000], [0.3, 0.5], [0.1, 0.1])}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1000, 0.3], [2000, 0.5]]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.6))
    with pytest.raises(ValueError, match="no capability"):
        capability_figure({})


def test_predictions_are_drawn_by_predictor_and_recipe():
    figure = prediction_figure([0.1, 0.2, 0.3], {"weights": [0.1, 0.2, 0.3], "mean": [0.2] * 3}, ["a", "b", "a"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["weights", "mean"]
    points = [np.asarray(dots.get_offsets()).tolist() for dots in figure.axes[1].collections]
    assert points == [[[0.1, 0.2], [0.3, 0.2]], [[0.2, 0.2]]]
    with pytest.raises(ValueError, match="do not belong together"):
        prediction_figure([0.1], {"weights": [0.1, 0.2]}, ["a"])
