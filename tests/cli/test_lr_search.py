"""`lit-interns1 lr-search`: searches from a config, and the law of several results."""

import json
import math

import numpy as np
import pytest

from lit_interns1.cli import main
from lit_interns1.reports.learning_rate_search import RateSearchResult, next_rate

CONFIG = """
seed_everything: 1
model:
  class_path: LanguageModelModule
  init_args:
    config:
      vocab_size: 4096
      hidden_size: 16
      num_layers: 1
      num_heads: 2
      num_kv_heads: 1
      head_dim: 8
      intermediate_size: 32
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.006}}
data:
  class_path: TextDataModule
  init_args:
    sources: [FILE]
    row_length: 32
    global_batch_size: 2
    micro_batch_size: 2
trainer: {max_epochs: -1, accelerator: cpu, devices: 1, enable_progress_bar: false}
"""


def test_search_writes_its_result_and_nothing_of_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "text.txt").write_text("salt and water and a field of stars " * 300)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FILE", str(tmp_path / "text.txt")))
    options = ["--config", "config.yaml", "--run_dir", "run", "--max_extensions", "0"]
    main(
        ["lr-search", *options, "--lr_min", "1e-3", "--lr_max", "1e-1", "--num_rates", "3", "--tokens", "[128,256,512]"]
    )
    assert "run/lr_search.json" in capsys.readouterr().out
    run = tmp_path / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {"config.yaml", "tokenizer.json", "lr_search.json", "pictures/lr_search.png", "metrics/metrics.csv"}
    result = RateSearchResult.load("run/lr_search.json")
    assert all(0 <= tokens - horizon < 64 for tokens, horizon in zip(result.tokens, (128, 256, 512), strict=True))
    assert result.measure == "train/loss"
    assert np.isfinite(result.losses).all()
    best = json.loads((tmp_path / "run/lr_search.json").read_text())["best"]
    assert best[-1]["rate"] == pytest.approx(result.best_rate())
    header = (tmp_path / "run/metrics/metrics.csv").read_text().splitlines()[0]
    assert {"lr_search/rate", "lr_search/loss", "lr_search/diverged"} <= set(header.split(","))
    with pytest.raises(SystemExit):  # the run directory exists
        main(["lr-search", *options, "--rates", "[0.001,0.01,0.1]", "--tokens", "128"])
    assert "exists already" in capsys.readouterr().err


def planted(path, parameters, tokens, constant=30.0, size=-0.2, data=-0.3):
    """A search whose optima follow K N^a D^b, with C = 0.05."""
    rates = np.geomspace(1e-4, 1.0, 9)
    losses = [[2 + 0.05 * math.log(r / (constant * parameters**size * d**data)) ** 2 for d in tokens] for r in rates]
    result = RateSearchResult(
        parameters=parameters, active_parameters=parameters // 2, first_tokens=0, tokens=tuple(tokens),
        rates=tuple(rates), losses=tuple(map(tuple, losses)), stopped=(None,) * 9, stopped_tokens=(None,) * 9,
        measure="loss",
    )  # fmt: skip
    result.save(path)
    return result


def test_law_of_several_searches(tmp_path, capsys):
    planted(tmp_path / "a.json", 300_000, [10**5, 2 * 10**5, 4 * 10**5])
    planted(tmp_path / "b.json", 1_200_000, [10**5, 2 * 10**5, 4 * 10**5])
    planted(tmp_path / "c.json", 5_000_000, [2 * 10**6])
    expected = 30.0 * 5e6**-0.2 * 2e6**-0.3
    law = ["lr-search", "--law", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    main([*law, "--target", str(tmp_path / "c.json")])
    text = capsys.readouterr().out
    assert "K 30, a -0.2000" in text
    assert "b -0.3000" in text
    assert text.count(f"{expected:.4g}") >= 2  # by the law, and by ratios
    assert f"best rate {expected:.3g}" in text  # found
    assert f"a factor of 2 off costs about {0.05 * math.log(2) ** 2:.4f}" in text
    main([*law, "--target_parameters", "5e6", "--target_tokens", "2e6"])
    assert f"{expected:.4g}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*law, "--target_tokens", "2e6"])
    assert "both parts of the target" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lr-search", "--law", str(tmp_path / "a.json")])
    assert "sizes" in capsys.readouterr().err


def search_result(rates, losses):
    stopped = tuple(None if math.isfinite(loss) else "cut off" for loss in losses)
    return RateSearchResult(
        parameters=1, active_parameters=1, first_tokens=0, tokens=(1,), rates=tuple(rates),
        losses=tuple((loss,) for loss in losses), stopped=stopped, stopped_tokens=(None,) * len(rates), measure="loss",
    )  # fmt: skip


def test_next_rate():
    nan = math.nan
    assert next_rate(search_result([1, 2, 4], [3, 2, 3]), 2.0) is None
    assert next_rate(search_result([1, 2, 4], [4, 3, 2]), 2.0) == 8
    assert next_rate(search_result([1, 2, 4], [2, 3, 4]), 2.0) == 0.5
    assert next_rate(search_result([1, 2, 4], [3, nan, nan]), 2.0) == 0.5  # too few: lower
    assert next_rate(search_result([1, 2, 4, 16], [4, 3, 2, nan]), 2.0) == pytest.approx(8)  # between good and diverged
    assert next_rate(search_result([1, 2, 4, 4.2], [4, 3, 2, nan]), 2.0) is None


def test_extrapolation_needs_three_horizons():
    with pytest.raises(ValueError, match="three horizons"):
        search_result([1, 2, 4], [3, 2, 3]).extrapolate(10)
