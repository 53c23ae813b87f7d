"""docs/metrics.md is the table of keys: what a run with all callbacks logs is in it, and what it promises is logged."""

import re
from pathlib import Path

import numpy as np
import pytest

from documented_keys import documented_keys, undocumented
from lit_interns1.callbacks import (
    BatchSizeScheduler,
    CapabilitySalienceValidation,
    GradientNoiseScale,
    LearningRateSearch,
    SkipBadSteps,
    StabilityDiagnostics,
)
from lit_interns1.commands.trainer import run as run_command
from lit_interns1.data import TextDataModule, TextSource
from lit_interns1.optim.batch_schedules import TabulatedBatch
from lit_interns1.reports import RunDirectory, write_report
from lit_interns1.reports.layout import arrange, key_regex
from wandb_history import history

ROOT = Path(__file__).parents[2]
OF_WANDB = {"_step", "_runtime", "_timestamp"}
SOURCES = [{"path": "bundled:molecules", "name": name} for name in ("molecules", "others")]
DATA = {
    "row_length": 48, "global_batch_size": 4, "micro_batch_size": 2, "validation_rows": 8, "seed": 1,
    "validation_fraction": 0.02, "cache_dir": str(ROOT / ".cache" / "tests"),
}  # fmt: skip
OPTIONS = [
    "--model.config.hidden_size=32", "--model.config.num_layers=2", "--model.config.num_heads=2",
    "--model.config.num_kv_heads=1", "--model.config.head_dim=16", "--model.config.moe.num_experts=8",
    "--model.config.moe.intermediate_size=16", "--trainer.val_check_interval=8", "--trainer.log_every_n_steps=1",
    "--throughput.peak_flops=1e12", "--router_monitor.every_n_steps=2", "--router_monitor.heatmap_every=2",
    "--router_monitor.validation=true", "--router_monitor.drift_every=1", "--router_monitor.capacity_factor=1.5",
    "--router_monitor.layer_metrics=[max_violation, entropy]", f"--data.sources={SOURCES}",
    *(f"--data.{name}={value}" for name, value in DATA.items()),
]  # fmt: skip
ROLLOUT_KEYS = (
    r"(policy|rollout|mismatch|rollout_is)/|val/(reward|correct)(_standard_error)?$|val/response_length$"
    r"|throughput/(generate_seconds|wait_seconds|judge_seconds|prepare_seconds|rollout_tokens_per_second)$"
)
NOT_OF_THIS_RUN = {
    "val/accuracy": "a whole model",
    "train/temperature": "pairs of images and captions",
    "train/logit_bias": "pairs of images and captions",
    "train/alignment": "pairs of images and captions",
    "val/image_to_text/recall_at_1": "pairs of images and captions",
    "val/image_to_text/recall_at_5": "pairs of images and captions",
    "val/text_to_image/recall_at_1": "pairs of images and captions",
    "val/text_to_image/recall_at_5": "pairs of images and captions",
    "val/retrieval_chance": "pairs of images and captions",
    **dict.fromkeys(
        (
            *(f"{prefix}reward/{name}" for prefix in ("", "val/") for name in ("accuracy", "margin", "score")),
            "val/reward/accuracy_standard_error",
        ),
        "a reward model",
    ),
    **{key: "rollouts" for key in documented_keys() if re.match(ROLLOUT_KEYS, key)},
    **{key: "preferences" for key in documented_keys() if key.removeprefix("val/").startswith("preference/")},
    "stability/logit_mean": "a head that returns logits",
    "stability/logit_max": "a head that returns logits",
}
"""Documented keys that need something that this run has not."""


def salience_file(folder):
    """Weights for the validation tokens of the run."""
    from lit_interns1.data.tokenizer import load_tokenizer
    from lit_interns1.data.validation_tokens import data_hash, seen_tokens, tokenizer_hash
    from lit_interns1.laws import CapabilitySalience, SalienceFile, ScoreMetrics

    data = TextDataModule([TextSource(**source) for source in SOURCES], **DATA)
    data.prepare_data()
    data.setup()
    seen = seen_tokens(list(data.val_dataloader()))
    ids, metrics = np.sort(seen.token_id_N), ScoreMetrics(0.9, 0.01, 0.05, 0.9)
    entry = CapabilitySalience(
        np.full(ids.size, 1 / ids.size), 3.0, 2.0, 0.1, 0.9, 1.0, np.diag([1e-4, 1e-4]), 0.2, metrics, metrics
    )
    file = folder / "weights.safetensors"
    SalienceFile(tokenizer_hash(load_tokenizer()), data_hash(seen.lanes), ids, {"chemistry": entry}).save(file)
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    callbacks = [
        BatchSizeScheduler(TabulatedBatch([(0, 4), (5 * 4 * 48, 8)]), unit="rows"),
        CapabilitySalienceValidation(salience_file(folder)),
        GradientNoiseScale(every_n_steps=1),
        LearningRateSearch(rates=[1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0], steps=2, max_extensions=0),
        SkipBadSteps(threshold=1e6),
        StabilityDiagnostics(every_n_steps=2),
    ]
    config, directory = ROOT / "configs" / "pretrain" / "tiny.yaml", folder / "run"
    tokens = 16 * 4 * 48
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        arguments = ["fit", f"--config={config}", f"--run_dir={directory}", f"--clock.max_tokens={tokens}", *OPTIONS]
        run_command(arguments, callbacks)
        import wandb

        wandb.finish()
    return directory


def wandb_rows(run):
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return history(file)


def test_what_wandb_gets_is_documented(run):
    keys = {key for row in wandb_rows(run) for key in row} - OF_WANDB
    assert {"train/loss", "train/tokens", "val/loss", "trainer/global_step"} <= keys
    assert undocumented(keys) == []


def test_the_csv_log_has_the_same_numbers(run):
    of_wandb = {key for row in wandb_rows(run) for key, value in row.items() if isinstance(value, float | int)}
    assert set(RunDirectory(run).metrics()) == of_wandb - OF_WANDB - {"trainer/global_step"}


def test_what_is_documented_is_logged(run):
    logged = {key for row in wandb_rows(run) for key in row}
    for key in documented_keys():
        if key not in NOT_OF_THIS_RUN:
            assert any(re.match(key_regex(key), name) for name in logged), f"{key} was not logged"
    assert set(NOT_OF_THIS_RUN) <= set(documented_keys())


def test_every_number_is_on_the_page(run):
    metrics = RunDirectory(run).metrics()
    sections = dict(arrange(metrics))
    drawn = {key for charts in sections.values() for curves in charts for key in curves.keys.values()}
    elsewhere = {"epoch", "train/tokens", "batch/switch", "lr_search/rate", "lr_search/loss", "lr_search/diverged"}
    assert drawn == set(metrics) - elsewhere
    assert {"Loss", "Capability salience", "Batch size", "Router", "Stability", "Throughput"} <= set(sections)
    text = write_report(run).read_text()
    for title, charts in sections.items():
        assert f"<h2>{title}</h2>" in text
        for curves in charts:
            assert curves.title in text or all(key in text for key in curves.keys.values()), curves
    assert len(text) < 3_000_000
