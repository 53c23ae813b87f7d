"""Next-token training of a language model.

loss = cross-entropy over tokens + α · balance + α_z · router z, as a `SummedLoss`: exact over the optimizer step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_interns1.checkpoints import CONFIG_KEY, MULTIMODAL_KEY, REWARD_KEY, load_sharded, read_checkpoint
from lit_interns1.checkpoints.huggingface import is_pretrained_folder, load_pretrained_model
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models import LanguageModel, LanguageModelConfig
from lit_interns1.models.config import config_from_dict
from lit_interns1.models.language_model import LanguageModelOutput
from lit_interns1.modules.decoder_module import DecoderModule
from lit_interns1.modules.frozen_reference import packed_inputs
from lit_interns1.nn.head import TokenScores
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives import NextTokenCrossEntropy
from lit_interns1.objectives.token_loss_metric import GroupedTokenLoss
from lit_interns1.optim import TokenSchedule
from lit_interns1.training import SummedLoss


class LanguageModelModule(DecoderModule):
    """Trains a `LanguageModel` on packed batches.

    Args:
        config: The model's shape, or the name of a preset; default: that of `init_weights`, else "tiny-s1-pro".
        changes: Fields of the preset, or of the folder's config, to change, as in `{moe: {freeze_router: true}}`.
        optimizer: Makes the optimizer from parameter groups. In YAML a `class_path` with `init_args`; default AdamW,
            rate 3e-4, β (0.9, 0.95), decay 0.1.
        schedule: Factor on the rate as a function of consumed tokens; None = constant.
        objective: The loss over token scores.
        balance: Balance and z losses of the routers.
        seed: Seed of the initial weights.
        decay_embeddings: Also apply weight decay to the embedding.
        init_weights: What to start from instead of random weights: a Hugging Face folder (config.json and safetensors
            files), a GGUF file, or a checkpoint of an earlier run, of which only the weights are taken. A `config` that
            is given as well must describe the same network. A checkpoint that is loaded (`ckpt_path`) goes over it.

    Logs `train/loss` (the objective per token over the optimizer step, without the routers' losses), `train/balance`,
    `train/router_z`, `train/tokens`, `optim/lr`, `val/loss`, and `val/loss/{source}` if validation batches carry
    `source_id`.
    """

    model: LanguageModel
    """The network; it exists once Lightning (or you) called `configure_model`."""

    def __init__(
        self,
        config: LanguageModelConfig | str | None = None,
        changes: dict[str, Any] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1
        ),
        schedule: TokenSchedule | None = None,
        objective: NextTokenCrossEntropy | None = None,
        balance: BalanceLoss | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
        init_weights: str | None = None,
    ) -> None:
        super().__init__(config, changes, optimizer, schedule, balance, seed, decay_embeddings, init_weights)
        self.objective = objective or NextTokenCrossEntropy()
        self.validation_loss = GroupedTokenLoss()
        self.source_names: list[str] = []

    # -- building ----------------------------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The network that the config describes; on the meta device, if that is the default."""
        return LanguageModel(self.config)

    def setup(self, stage: str) -> None:
        """Checks the vocabulary of the data against the model's, and takes the names of its validation sources."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        # a data module may validate on other sources than it trains on: `source_id` of its batches numbers those
        self.source_names = list(getattr(data, "validation_source_names", None) or getattr(data, "source_names", []))
        self.validation_loss = GroupedTokenLoss(max(1, len(self.source_names)))

    # -- steps -------------------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, targets: Tensor | None = None, **options: Any) -> LanguageModelOutput:
        """Runs the model on a packed batch; see `LanguageModel.forward` for targets and options."""
        return self.model(
            targets=targets, routed_experts_TLK=batch.token_fields.get("routed_experts"),
            **packed_inputs(batch), **self.media_inputs(batch), **options,
        )  # fmt: skip

    def media_inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """What the network takes beside tokens: nothing.

        Raises:
            ValueError: If the batch has more.
        """
        if batch.media:
            raise ValueError(f"the batch holds {', '.join(batch.media)}, which LanguageModelModule cannot see: train "
                             "MultimodalModule")  # fmt: skip
        return {}

    def token_scores(self, batch: PackedBatch, **options: Any) -> TokenScores:
        """Scores of the batch's labels, (T,) each: what per-domain losses, salience and diagnostics read."""
        scores = self(batch, targets=batch.labels, **options).scores
        assert scores is not None
        return scores

    def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss:  # type: ignore[override]
        """Cross-entropy plus the routers' auxiliary losses."""
        hint = self.objective.gradient_hint(batch.labels, batch.sample_id_T)
        output = self(batch, targets=batch.labels, gradient_hint=hint)
        loss, _ = self.objective(output.scores, batch.labels, batch.sample_id_T)
        return self.finished_loss(loss, {}, output.router_stats)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Adds the batch to the validation loss; returns `token_loss_T` (T,), nats, for callbacks that weigh tokens."""
        return self.add_validation_scores(batch, self.token_scores(batch))

    def add_validation_scores(self, batch: PackedBatch, scores: TokenScores) -> dict[str, Tensor]:
        """Adds scores to the validation loss; returns what `validation_step` returns."""
        loss_T = -scores.logp_T
        self.validation_loss.update(loss_T, batch.labels >= 0, batch.token_fields.get("source_id"))
        return {"token_loss_T": loss_T}

    def on_validation_epoch_end(self) -> None:
        """Logs the validation loss, over all sources and by source."""
        result = self.validation_loss.compute()
        self.validation_loss.reset()
        # the metric has summed over ranks already; sync_dist only says so to Lightning
        self.log("val/loss", result["mean"].float(), prog_bar=True, sync_dist=True)
        if len(self.source_names) > 1:
            for name, mean, tokens in zip(
                self.source_names, result["group_means"], result["group_tokens"], strict=True
            ):
                if tokens > 0:
                    self.log(f"val/loss/{name}", mean.float(), sync_dist=True)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Log-probabilities of the labels and where they belong: (T,) each."""
        return {"log_probs": self.token_scores(batch).logp_T, "labels": batch.labels, **batch.token_fields}


def load_language_model(path: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The language model of a checkpoint (one file or sharded), a Hugging Face folder or a GGUF file, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: As `read_checkpoint`, or if the checkpoint was not written by `LanguageModelModule`, or holds a
            reward model.
        WeightsError: If it is a Hugging Face folder or a GGUF file that cannot be read.
    """
    if is_pretrained_folder(path):
        return load_pretrained_model(path, device).eval()
    checkpoint = read_checkpoint(path, device)
    if CONFIG_KEY not in checkpoint:
        raise ValueError(f"checkpoint {path} has no {CONFIG_KEY!r}: it was not written by LanguageModelModule")
    if REWARD_KEY in checkpoint:
        raise ValueError(f"checkpoint {path} holds a reward model: see modules.reward_model_module.load_reward_model")
    with torch.device("meta"):
        model = LanguageModel(config_from_dict(checkpoint[CONFIG_KEY]))
    prefix = "model.language_model." if MULTIMODAL_KEY in checkpoint else "model."
    fill_from_checkpoint(model, path, checkpoint, prefix, device)
    return model.eval()


def fill_from_checkpoint(
    model: nn.Module, path: str | Path, checkpoint: dict[str, Any], prefix: str, device: torch.device | str = "cpu"
) -> None:
    """Fills a model on the meta device with the weights of a checkpoint (one file or sharded).

    Args:
        model: What to fill.
        path: The checkpoint.
        checkpoint: What `read_checkpoint` gave for it.
        prefix: What stands before the model's names there.
        device: Where the model goes.
    """
    materialize(model, device=device)
    if Path(path).is_dir():
        load_sharded({"state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()}}, path)
        return
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    model.load_state_dict(weights)
