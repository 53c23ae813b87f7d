"""All four callbacks at once on a transformers model in a LightningModule that knows nothing of this kit."""

import csv

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_interns1.callbacks import (
    BatchSizeScheduler,
    CapabilitySalienceValidation,
    LearningRateSearch,
    RouterLoadMonitor,
    TokenClock,
)
from lit_interns1.data.validation_tokens import data_hash, seen_tokens
from lit_interns1.laws import CapabilitySalience, SalienceFile, ScoreMetrics
from lit_interns1.optim import TabulatedBatch

LAYERS, EXPERTS, CHOICES, ROWS, LENGTH = 2, 8, 2, 2, 12


class Foreign(L.LightningModule):
    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, num_experts=EXPERTS, num_experts_per_tok=CHOICES, moe_intermediate_size=16,
            intermediate_size=32, output_router_logits=True,
        )  # fmt: skip
        self.model = transformers.Qwen3MoeForCausalLM(config)
        self.choices = []

    def training_step(self, batch, batch_idx):
        output = self.model(**batch, labels=batch["input_ids"])
        self.choices.append(torch.stack([logits.topk(CHOICES).indices for logits in output.router_logits]))
        self.log("train/loss", output.loss)
        return output.loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", token_losses(self, batch).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def token_losses(module, batch):
    logits = module.model(batch["input_ids"]).logits
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")


def validation_batches():
    ids = torch.randint(0, 64, (2, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    numbers = torch.arange(2 * ROWS * LENGTH).view(2, ROWS, LENGTH)
    return [
        {"input_ids": x[:, :-1], "labels": x[:, 1:], "validation_token_id": n}
        for x, n in zip(ids, numbers, strict=True)
    ]


@pytest.fixture
def salience(tmp_path):
    """A file of uniform weights for the validation tokens."""
    seen = seen_tokens(validation_batches())
    ids = np.sort(seen.token_id_N)
    metrics = ScoreMetrics(0.9, 0.01, 0.05, 0.9)
    uniform = CapabilitySalience(
        np.full(ids.size, 1 / ids.size), 3.0, 4.0, 0.1, 0.9, 1.0, np.diag([1e-4, 1e-4]), 0.2, metrics, metrics
    )
    SalienceFile("words", data_hash(seen.lanes), ids, {"uniform": uniform}).save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_all_four_at_once(tmp_path, salience):
    ids = torch.randint(0, 64, (24, ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    tokens = ROWS * LENGTH
    search = LearningRateSearch(rates=[3e-4, 1e-3, 3e-3], steps=3, monitor="train/loss", max_extensions=0)
    scheduler = BatchSizeScheduler(
        TabulatedBatch([(0, ROWS), (8 * tokens, 2 * ROWS)]), unit="rows", micro_batch_rows=ROWS
    )
    monitor = RouterLoadMonitor(every_n_steps=4, alerts=None)
    prediction = CapabilitySalienceValidation(salience, token_losses=token_losses, tokenizer_hash="words")
    module = Foreign()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, log_every_n_steps=1,
        logger=CSVLogger(tmp_path, name="log", version=""), callbacks=[
            TokenClock(), search, scheduler, monitor, prediction,
        ], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(validation_batches(), batch_size=None))

    assert search.result.rates == (3e-4, 1e-3, 3e-3)
    assert trainer.global_step == 8 + 8  # 8 steps of one micro-batch, 8 of two
    assert scheduler.state.switches == [(8 * tokens, 2 * ROWS)]
    assert prediction.values["salience/uniform/loss"] == pytest.approx(
        float(trainer.callback_metrics["val/loss"]), rel=1e-5
    )
    trained = module.choices[-len(data) :]  # what came before belongs to the trials
    windows = [trained[0:4], trained[4:8], trained[8:16], trained[16:24]]  # four steps each
    with np.load(tmp_path / "metrics" / "expert_load.npz") as saved:
        assert len(saved["load"]) == len(windows)
        for load, window in zip(saved["load"], windows, strict=True):
            counts = torch.stack(
                [torch.bincount(torch.cat([c[n].flatten() for c in window]), minlength=EXPERTS) for n in range(LAYERS)]
            )
            np.testing.assert_allclose(load, counts / counts.sum(-1, keepdim=True), rtol=1e-6)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        keys = set(csv.DictReader(file).fieldnames)
    assert {"lr_search/best_rate", "batch/rows_per_step", "router/all/max_violation_mean"} <= keys
    assert "salience/uniform/predicted_score" in keys
