"""The configs of reinforcement learning: a few steps of each, what is logged, and the samples that are kept."""

import json
from pathlib import Path

import pytest

from documented_keys import undocumented
from lit_interns1.commands.trainer import run
from lit_interns1.reports import RunDirectory
from wandb_history import history

CONFIGS = Path(__file__).parents[2] / "configs" / "rl"
TINY = [
    "--model.config.hidden_size=32", "--model.config.num_layers=2", "--model.config.num_heads=2",
    "--model.config.num_kv_heads=1", "--model.config.head_dim=16", "--model.config.moe.intermediate_size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A checkpoint of a few steps of the warm-up, smaller than the config's."""
    folder = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        run([
            "fit", f"--config={CONFIGS / 'chain-sum-warm-up.yaml'}", f"--run_dir={folder / 'run'}", *TINY,
            f"--data.cache_dir={folder}", "--data.row_length=64", "--data.validation_rows=4", "--clock.max_tokens=6000",
            "--trainer.val_check_interval=4", "--checkpoint.every_n_train_steps=4",
        ])  # fmt: skip
    return folder / "run" / "checkpoints" / "last.ckpt"


def arguments(warm, directory, *more):
    return [
        "fit", f"--config={CONFIGS / 'chain-sum.yaml'}", f"--run_dir={directory}", f"--model.init_weights={warm}",
        "--data.prompts_per_rollout=4", "--data.num_generations=4", "--data.samples_per_micro_batch=8",
        "--data.validation_prompts.size=8", "--data.validation_generations=2", "--data.validation_batch=4",
        "--trainer.max_steps=3", "--trainer.val_check_interval=4", "--checkpoint.every_n_train_steps=2",
        "--trainer.callbacks.init_args.every_n_rollouts=2", *more,
    ]  # fmt: skip


def test_the_config_runs_and_its_keys_are_documented(warm, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = tmp_path / "run"
    run(arguments(warm, directory))
    import wandb

    wandb.finish()
    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    assert "rollout/samples" in {key for row in history(file) for key in row}  # the table
    metrics = RunDirectory(directory).metrics()
    assert {"rollout/reward", "mismatch/k3", "policy/entropy", "val/reward", "train/loss"} <= set(metrics)
    assert undocumented(metrics) == []
    assert metrics["mismatch/k3"].values.max() < 1e-6  # engine and trainer are one network in float32
    lines = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    assert {line["rollout"] for line in lines} == {0, 2}
    assert all(set(line) == {
        "rollout", "source", "prompt", "response", "reward", "correct", "judges", "length", "finish_reason",
    } for line in lines)  # fmt: skip
    assert {line["reward"] for line in lines} <= {1.0, -1.0}
    # a rollout batch is in the checkpoint only where a run stops inside it
    run(["fit", *arguments(warm, directory)[1:], "--ckpt_path=last", "--trainer.max_steps=4"])


@pytest.mark.parametrize("objective", ["InternS1Pro", "OREAL"])
def test_objectives_are_chosen_by_name(warm, tmp_path, monkeypatch, objective):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(arguments(
        warm, tmp_path / "run", f"--model.objective={objective}", "--trainer.max_steps=1", "--trainer.logger=false",
    ))  # fmt: skip
