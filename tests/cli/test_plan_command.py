"""`lit-interns1 plan` from the outside."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs/pretrain/tiny.yaml")]
PRO = ["--config", str(ROOT / "configs/pretrain/intern-s1-pro-1t.yaml")]


SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.fused", "false"]


def plan(*options):
    from lit_interns1.cli import main

    main(["plan", *map(str, options)])


def refused(capsys, *options):
    with pytest.raises(SystemExit) as exit_:
        plan(*options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("lit-interns1: error: ")
    return error[-1]


def test_report_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fragment = ROOT / "configs/strategy/ep2.yaml"
    plan(*TINY, "--config", fragment, "--world-size", 2, "--json", "plan.json", *SGD)
    printed = capsys.readouterr().out
    for part in ("optimizer state", "token dispatch", "At most", "a bound, not an estimate", "This plan took"):
        assert part in printed
    result = json.loads(Path("plan.json").read_text())
    assert result["memory_bytes"]["optimizer state"] == 0, "SGD without momentum keeps nothing"
    assert result["memory_bytes"]["parameters"] == 4 * result["parameters"]["per_rank"]
    assert os.listdir() == ["plan.json"], "no run directory, no cache, no log"


@pytest.mark.slow
def test_search_prints_a_layout_that_can_be_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--model.config.num_layers", 2, "--data.global_batch_size", 8, "--data.micro_batch_size", 1]
    plan(*TINY, *small, "--world-size", 4, "--search", "--json", "found.json")
    printed = capsys.readouterr().out
    assert "layouts fit" in printed
    assert "expert_parallel_size:" in printed
    result = json.loads(Path("found.json").read_text())
    steps = [layout["bound_seconds"]["step"] for layout in result["layouts"]]
    assert steps == sorted(steps)
    assert result["best"]["fits"]


def test_complaints_are_one_line(tmp_path, capsys):
    assert "'h900' is neither" in refused(capsys, *TINY, "--world-size", 1, "--hardware", "h900")
    assert "8 rows is not divisible by micro-batch × ranks = 8 × 2" in refused(capsys, *TINY, "--world-size", 2)
    taken = tmp_path / "plan.json"
    taken.touch()
    assert "exists already" in refused(capsys, *TINY, "--world-size", 1, "--json", taken)
    sizes = ["--config", ROOT / "configs/strategy/ep2.yaml", "--world-size", 3]
    assert "expert_parallel_size = 2 must divide shard_size = 3" in refused(capsys, *TINY, *sizes)
    precision = refused(capsys, *TINY, "--world-size", 1, "--trainer.precision", "bf16-mixed")
    assert "compute_dtype" in precision
    assert "did you mean 'num_layers'" in refused(capsys, *TINY, "--world-size", 1, "--model.config.num_layer", 3)
    fused = refused(capsys, *TINY, *SGD[:2], "--world-size", 1)  # which torch cannot do on divided parameters
    assert "_fused_sgd_" in fused


@pytest.mark.slow
def test_the_largest_model_on_4096_ranks(capsys, tmp_path):
    """Prints its times; nothing is asserted of them."""
    plan(*PRO, "--world-size", 4096, "--json", tmp_path / "plan.json")
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["parameters"]["total"] == pytest.approx(917e9, rel=0.002)
    plan(*PRO, "--config", ROOT / "configs/strategy/ep8-hsdp.yaml", "--world-size", 4096)
    plan(*PRO, "--world-size", 4096, "--search", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["best"]["fits"]
    with capsys.disabled():
        print(capsys.readouterr().out)
