"""docs/metrics.md is the table of keys: what a run logs is in it, and what it promises for such a run is logged."""

import re
from pathlib import Path

import pytest

from documented_keys import documented_keys, undocumented
from lit_interns1.cli import main
from lit_interns1.reports import RunDirectory
from lit_interns1.reports.layout import key_regex
from wandb_history import history

ROOT = Path(__file__).parents[2]
OF_WANDB = {"_step", "_runtime", "_timestamp"}
OPTIONS = [
    "--model.config.hidden_size=32", "--model.config.num_layers=2", "--model.config.num_heads=2",
    "--model.config.num_kv_heads=1", "--model.config.head_dim=16", "--model.config.moe.num_experts=8",
    "--model.config.moe.intermediate_size=16", "--data.row_length=48", "--data.global_batch_size=4",
    "--data.micro_batch_size=2", "--data.validation_rows=8", "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=1", "--throughput.peak_flops=1e12",
    "--data.sources=[{path: 'bundled:molecules', name: molecules}, {path: 'bundled:shakespeare', name: english}]",
    f"--data.cache_dir={ROOT / '.cache' / 'tests'}", f"--clock.max_tokens={10 * 4 * 48}",
]  # fmt: skip
CALLBACKS: list[str] = []
"""Options that add the callbacks that are not always on."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        main(["fit", f"--config={ROOT / 'configs/pretrain/tiny.yaml'}", f"--run_dir={directory}", *OPTIONS, *CALLBACKS])
        import wandb

        wandb.finish()
    return directory


def test_what_wandb_gets_is_documented(run):
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = history(file)
    keys = {key for row in rows for key in row} - OF_WANDB
    assert {"train/loss", "train/tokens", "val/loss", "trainer/global_step"} <= keys
    assert undocumented(keys) == []


def test_the_csv_log_has_the_same_keys(run):
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    of_wandb = {key for row in history(file) for key, value in row.items() if isinstance(value, float | int)}
    assert set(RunDirectory(run).metrics()) == of_wandb - OF_WANDB - {"trainer/global_step"}


def test_what_the_table_promises_is_logged(run):
    """Keys of sections that this run has every reason to write; the others need a callback that it does not use."""
    logged = set(RunDirectory(run).metrics())
    elsewhere = ("optim/grad_norm",)  # of the expert-parallel strategy
    for key in documented_keys():
        if key.startswith(("train/", "val/loss", "throughput/", "optim/")) and key not in elsewhere:
            assert any(re.match(key_regex(key), name) for name in logged), f"{key} was not logged"
