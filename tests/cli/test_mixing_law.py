"""`mixing-law` on made-up runs whose law is known, as run directories and as files."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lit_interns1.cli import main
from lit_interns1.commands.mixing_law import repeat_std
from lit_interns1.commands.mixing_runs import MixtureRun, group_runs, read_runs
from lit_interns1.laws import MixingLaw
from lit_interns1.reports.mixing_figures import mixture_figure, predicted_figure, weighted_loss

DOMAINS, TARGETS = ("english", "molecules", "code"), ("plays", "smiles")
FLOOR_V = np.array([2.5, 1.2])
SLOPE_VK = np.array([[-2.0, 0.9, 0.2], [0.8, -3.0, 0.4]])
SEVENTHS = [(a, b, 7 - a - b) for a in range(1, 6) for b in range(1, 7 - a)]
WEIGHTS = {"plays": 0.25, "smiles": 0.75}


def losses_of(weights):
    place_K = np.array(weights, dtype=float) / sum(weights)
    return dict(zip(TARGETS, (FLOOR_V + np.exp(SLOPE_VK @ place_K)).tolist(), strict=True))


def write_run(folder, weights, losses=None, tokens=600_000, seed=1, width=64, last=(60, 60), sources=None, data=None):
    """A run directory; `last` are the steps of the last validation and of the last training step."""
    losses = losses_of(weights) if losses is None else losses
    listed = [{"path": f"{name}.txt", "weight": float(w)} for name, w in zip(DOMAINS, weights)]
    (folder / "metrics").mkdir(parents=True)
    config = {
        "model": {"class_path": "LanguageModelModule", "init_args": {"config": {"hidden_size": width}, "seed": seed}},
        "data": {"init_args": {"sources": listed if sources is None else sources, "seed": 1, **(data or {})}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    names = [f"val/loss/{name}" for name in losses]
    lines = [",".join(["step", "train/tokens", "train/loss", "val/loss", *names])]
    lines += [f"{step},{tokens * step / last[1]},{5 - step / 100}," + "," * len(names) for step in (1, last[1])]
    for step, excess in ((last[0] // 2, 1.0), (last[0], 0.0)):  # an earlier validation does not count
        lines.append(",".join([f"{step},,,9.9", *(repr(loss + excess) for loss in losses.values())]))
    (folder / "metrics" / "metrics.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"mix-{a}{b}{c}", (a, b, c), seed=a + 10 * b) for a, b, c in SEVENTHS]


def best_by_brute_force(low_K=(0, 0, 0), high_K=(1, 1, 1)):
    """Over all mixtures in steps of 1/400."""
    grid = np.array([(i, j, 400 - i - j) for i in range(401) for j in range(401 - i)]) / 400
    grid = grid[((grid >= np.array(low_K) - 1e-9) & (grid <= np.array(high_K) + 1e-9)).all(1)]
    total = (FLOOR_V + np.exp(grid @ SLOPE_VK.T)) @ list(WEIGHTS.values())
    return grid[total.argmin()], total.min()


def test_the_law_the_prediction_and_the_best_mixture_are_those_of_the_losses(tmp_path, runs, capsys):
    out = tmp_path / "law"
    reversed_sources = [{"path": f"{name}.txt", "weight": w} for name, w in zip(DOMAINS[::-1], (0.3, 0.25, 0.45))]
    held_out = write_run(tmp_path / "other", (1, 1, 1), {"smiles": 3.0, "plays": 4.0}, sources=reversed_sources)
    shares = ["english=0.45", "molecules=0.25", "code=0.30"]
    main([
        "mixing-law", *runs, "--out", str(out), "--held_out", held_out, "--weights", "plays=1", "smiles=3",
        "--floors", "code=0.125", "--reference", *shares, "--bootstrap", "20",
    ])  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"mixing_law.json", "mixing_law.md", "predicted.png", "mixture.png"}
    result = json.loads((out / "mixing_law.json").read_text())
    law = MixingLaw.from_json(json.dumps(result["law"]))
    assert (law.domains, law.targets) == (DOMAINS, TARGETS)
    np.testing.assert_allclose(law.floor_V, FLOOR_V, atol=1e-4)
    np.testing.assert_allclose(law.slope_VK, SLOPE_VK, atol=1e-3)
    place_K, total = best_by_brute_force((0, 0, 0.125))
    np.testing.assert_allclose(list(result["best"]["proportions"].values()), place_K, atol=4e-3)
    assert result["best"]["total"] == pytest.approx(total, abs=1e-4)
    assert result["best"]["at_bound"] == ["code"]
    at_reference = losses_of((0.45, 0.25, 0.3))
    assert result["reference"]["losses"] == pytest.approx(at_reference, abs=1e-4)
    mean = sum(WEIGHTS[name] * loss for name, loss in at_reference.items())
    assert result["reference"]["total"] == pytest.approx(mean, abs=1e-4)
    assert result["reference"]["gain"] == pytest.approx(mean - total, abs=1e-4)
    low, high = result["reference"]["gain_interval"]
    assert low == pytest.approx(high, abs=1e-3) == pytest.approx(mean - total, abs=1e-3)
    assert [run["name"] for run in result["runs"]] == [Path(run).name for run in runs]
    assert result["held_out"][0]["losses"] == {"plays": 4.0, "smiles": 3.0}
    printed = capsys.readouterr().out
    assert printed.startswith((out / "mixing_law.md").read_text())
    cells = f"4.0000, {at_reference['plays']:.4f} | 3.0000, {at_reference['smiles']:.4f} | 3.2500, {mean:.4f}"
    assert f"| other | 0.450 | 0.250 | 0.300 | {cells} |" in printed
    assert f"{mean - total:.4f} nats per token [" in printed
    assert "15 runs, 600 k tokens each" in printed


def test_runs_of_files_give_the_same_law_and_tokens_cap_the_mixture(tmp_path, runs, capsys):
    table = tmp_path / "runs.csv"
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["name", *(f"proportion/{d}" for d in DOMAINS), *(f"loss/{t}" for t in TARGETS)])
        for weights in SEVENTHS[:8]:
            rows.writerow(["", *(w / 7 for w in weights), *losses_of(weights).values()])
    listed = [{"proportions": dict(zip(DOMAINS, np.array(w) / 7)), "losses": losses_of(w)} for w in SEVENTHS[8:]]
    (tmp_path / "runs.json").write_text(json.dumps(listed))
    bounds = ["--available", "molecules=2e5", "code=1e6", "english=1e6", "--total_tokens", "1e6", "--epochs", "2"]
    main([
        "mixing-law", str(table), str(tmp_path / "runs.json"), "--out", str(tmp_path / "a"), "--bootstrap", "0",
        *bounds, "--weights", "plays=1", "smiles=3", "--caps", "english=0.3",
    ])  # fmt: skip
    result = json.loads((tmp_path / "a" / "mixing_law.json").read_text())
    np.testing.assert_allclose(result["law"]["slope_VK"], SLOPE_VK, atol=1e-3)
    place_K, _ = best_by_brute_force((0, 0, 0), (0.3, 0.4, 1))
    np.testing.assert_allclose(list(result["best"]["proportions"].values()), place_K, atol=4e-3)
    assert result["best"]["interval"] == [None, None]
    # what was written can be read again
    again = read_runs([tmp_path / "a" / "mixing_law.json"])
    assert again == read_runs([table, tmp_path / "runs.json"])
    assert "15 runs:" in capsys.readouterr().out


def test_runs_are_grouped_by_all_but_mixture_and_seed(tmp_path, runs, capsys):
    wide = [write_run(tmp_path / f"w{i}", w, width=96, data={"num_workers": i}) for i, w in enumerate(SEVENTHS[:7])]
    longer = write_run(tmp_path / "longer", SEVENTHS[0], tokens=1_200_000)
    other_text = write_run(tmp_path / "seed", SEVENTHS[0], data={"seed": 2})
    groups = group_runs(read_runs([*runs, *wide, longer, other_text]), read_runs([wide[0]]))
    assert [len(group.runs) for group in groups] == [15, 7, 1, 1]
    assert [len(group.held_out) for group in groups] == [0, 1, 0, 0]
    assert "config.hidden_size 96" in groups[1].label
    assert "600 k tokens" in groups[1].label
    assert "1.2 M tokens" in groups[2].label
    main(["mixing-law", *runs, *wide, "--out", str(tmp_path / "law"), "--bootstrap", "0"])
    assert {path.name for path in (tmp_path / "law").iterdir()} == {"group-1", "group-2"}
    assert "hidden_size 96" in (tmp_path / "law" / "group-2" / "mixing_law.md").read_text()
    with pytest.raises(SystemExit):
        main(["mixing-law", *runs, longer, "--out", str(tmp_path / "b")])
    assert re.search(r"1 different mixtures of 3 .*\(the group longer; 1.2 M tokens\)", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"the held-out run longer is like none .* has another tokens"):
        group_runs(read_runs(runs), read_runs([longer]))
    # with validation sources of its own, the seed of the data only orders rows
    own = {"validation_sources": ["v.txt"]}
    same = [write_run(tmp_path / f"v{i}", SEVENTHS[i], data=own | {"seed": i}) for i in range(2)]
    assert len(group_runs(read_runs(same))) == 1


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"losses": {"plays": 4.0}}, [], "bad has the validation sets plays, and mix-115 has plays, smiles"),
        ({"losses": {}}, [], "bad logged no val/loss/{source}: it takes several validation sources"),
        ({"sources": ["english.txt", "code.txt"]}, [], "bad gives the source 'english' the weight None:"),
        ({"sources": "english.txt"}, [], "bad/config.yaml has no list data.init_args.sources"),
        ({}, ["--weights", "poems=1"], "names 'poems', but the law predicts plays, smiles"),
        ({}, ["--weights", "plays"], "--weights plays: expected NAME=NUMBER"),
        ({}, ["--floors", "code=0.1", "code=0.2"], "--floors names 'code' twice"),
        ({}, ["--floors", "code=0.7", "english=0.6"], "floors sum to 1.3"),
        ({}, ["--available", "code=1e6"], "--available and --total_tokens go together"),
        ({}, ["--reference", "code=1"], "--reference must give a share to each of english, molecules, code"),
        ({}, ["--out", "."], "--out . exists already"),
    ],
)  # fmt: skip
def test_unsuitable_input_is_named_before_anything_is_written(
    tmp_path, runs, capsys, monkeypatch, change, options, words
):
    monkeypatch.chdir(tmp_path)
    bad = write_run(tmp_path / "bad", (3, 2, 2), **change)
    with pytest.raises(SystemExit) as end:
        main(["mixing-law", *runs[:8], bad, "--bootstrap", "0", *options])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert words in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,proportion/a,proportion/b,loss/x,note\nr,0.5,0.5,3,hm\n", "unknown column 'note'"),
        ("name,proportion/a,proportion/b,loss/x\nr,0.5,0.6,3\n", "line 2: proportions must not be negative and sum to"),
        ("name,proportion/a,proportion/b,loss/x\nr,0.5,,3\n", "line 2: proportions of 'b' must be a finite number"),
        ("name,proportion/a,proportion/b\nr,0.5,0.5\n", "line 2: losses must give a number to every name"),
        ('[{"proportions": {"a": 1}, "losses": {"x": null}}]', "run 1: losses of 'x' must be a finite number"),
        ("{}", "must hold a list of runs"),
        ("{", "is no JSON"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path, text, words):
    file = tmp_path / ("runs.json" if text[0] in "[{" else "runs.csv")
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_runs([file])
    assert str(file) in str(error.value)


def test_a_validation_before_the_end_is_said(tmp_path, capsys):
    early = [write_run(tmp_path / f"e{i}", w, last=(40, 60)) for i, w in enumerate(SEVENTHS)]
    assert [run.tokens for run in read_runs(early)] == pytest.approx([400_000] * 15, rel=0.01)
    main(["mixing-law", *early, "--out", str(tmp_path / "law"), "--bootstrap", "0"])
    assert "warning: the last validation of e0 was 20 steps before its end" in capsys.readouterr().out


def test_noise_is_that_of_repeated_mixtures():
    def one(share, loss):
        return MixtureRun("r", {"a": share, "b": 1 - share}, {"x": loss})

    assert repeat_std([one(0.1, 3.0), one(0.2, 2.0)]) is None
    values = [one(0.1, 3.0), one(0.1, 3.2), one(0.2, 9.0), one(0.3, 1.0), one(0.3, 1.0), one(0.3, 1.6)]
    squares = 2 * 0.1**2 + 2 * 0.2**2 + 0.4**2  # over (2 − 1) + (3 − 1) degrees of freedom
    assert repeat_std(values) == {"x": pytest.approx((squares / 3) ** 0.5)}


def law_of(num_domains):
    """A law over so many domains, two bootstrap samples of it, and mixtures."""
    rng = np.random.default_rng(num_domains)
    domains, slope_VK = tuple("abcde"[:num_domains]), rng.normal(size=(2, num_domains))
    mixtures_MK = rng.dirichlet(np.full(num_domains, 4.0), 12)
    zero_V, names = np.zeros(2), ("lowest_K", "highest_K")
    law = MixingLaw(
        domains=domains, targets=TARGETS, floor_V=FLOOR_V, slope_VK=slope_VK, r_squared_V=zero_V, max_error_V=zero_V,
        leave_one_out_V=zero_V, floor_samples_RV=np.stack([FLOOR_V, FLOOR_V + 0.1]),
        slope_samples_RVK=np.stack([slope_VK, slope_VK]), num_runs=12, warnings=(),
        **dict(zip(names, (mixtures_MK.min(0), mixtures_MK.max(0)), strict=True)),
    )  # fmt: skip
    return law, mixtures_MK


@pytest.mark.parametrize("num_domains", [2, 3, 4])
def test_pictures_show_runs_and_the_best_mixture(num_domains):
    law, mixtures_MK = law_of(num_domains)
    best = law.optimise(WEIGHTS)
    total_M, samples_RM = weighted_loss(law, mixtures_MK, WEIGHTS)
    np.testing.assert_allclose(total_M, law.predict(mixtures_MK) @ [0.25, 0.75])
    np.testing.assert_allclose(samples_RM, [total_M, total_M + 0.1])
    figure = mixture_figure(law, best, mixtures_MK, WEIGHTS, mixtures_MK[0])
    panels = [axes for axes in figure.axes if axes.get_legend() or axes.get_xlabel()]
    assert len(panels) == (1 if num_domains == 3 else num_domains)
    stars = {line.get_label(): np.array(line.get_data())[:, 0] for line in panels[0].lines}
    if num_domains == 3:  # barycentric: the first domain lies left, the second right, the third above
        for name, (_, right, above) in (("best mixture", best.proportions.values()), ("reference", mixtures_MK[0])):
            np.testing.assert_allclose(stars[name], [right + above / 2, above * 0.75**0.5], atol=1e-12)
    else:
        np.testing.assert_allclose(stars["best mixture"], [best.proportions["a"], best.total], atol=1e-12)
        np.testing.assert_allclose(stars["reference"], [mixtures_MK[0, 0], total_M[0]])
    losses_MV = law.predict(mixtures_MK) + 0.01
    figure = predicted_figure(law, mixtures_MK[:9], losses_MV[:9], (mixtures_MK[9:], losses_MV[9:]))
    assert [axes.get_title(loc="left").split(",")[0] for axes in figure.axes] == list(TARGETS)
    measured, predicted = figure.axes[1].containers[1][0].get_data()  # held out
    np.testing.assert_allclose(measured, losses_MV[9:, 1])
    np.testing.assert_allclose(predicted, losses_MV[9:, 1] - 0.01)


def test_runs_of_fit_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = Path(__file__).parents[2]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} line {n}, and what follows it" for n in range(300)))
    sources = [f"{{path: {tmp_path}/{name}.txt, lines: true, weight: {w}}}" for name, w in (("a", 3), ("b", 1))]
    main([
        "fit", f"--config={root}/configs/studies/mixing/base.yaml", f"--run_dir={tmp_path / 'run'}",
        f"--data.sources=[{', '.join(sources)}]", f"--data.cache_dir={tmp_path / 'cache'}", "--data.row_length=32",
        "--data.global_batch_size=4", "--data.micro_batch_size=4", "--trainer.val_check_interval=4",
        "--data.validation_fraction=0.2", "--data.validation_rows=12", "--clock.max_tokens=512",
        "--trainer.log_every_n_steps=2",
    ])  # fmt: skip
    (run,) = read_runs([tmp_path / "run"])
    assert run.proportions == {"a": 0.75, "b": 0.25}
    assert run.losses.keys() == {"a", "b"}
    assert (run.tokens, run.steps_after) == (512, 0)
    assert run.settings["model.init_args.config.hidden_size"] == 48
    assert not any("weight" in source for source in run.settings["data.init_args.sources"])
