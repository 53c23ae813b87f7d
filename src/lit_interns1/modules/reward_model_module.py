"""Training of reward models: one value per token, read at the end of a response or on all of its tokens.

    pairs     r = v at the last token of a document        loss = objective(r_chosen, r_rejected)
    tokens    w_t = v at the position that predicts y_t     loss = BCE(σ(mean_t w_t), 1[right])

Which of the two follows from the objective: `BradleyTerry` and POLAR's losses take pairs, as `PreferenceDataModule` and
`PolarDataModule` give them; `TokenRewardLoss` (OREAL, arXiv 2502.06781, Eq. 12) takes right and wrong responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_interns1.checkpoints import REWARD_KEY, read_checkpoint
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models import LanguageModelConfig, RewardModel, RewardModelOutput
from lit_interns1.models.reward_model import at_ends
from lit_interns1.modules.decoder_module import DecoderModule
from lit_interns1.modules.frozen_reference import packed_inputs
from lit_interns1.modules.initial_weights import config_of_weights, is_checkpoint, load_weights
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives.metrics import Metrics
from lit_interns1.objectives.policy import PolicyInputs, TokenRewardLoss
from lit_interns1.objectives.preference import PreferenceInputs
from lit_interns1.objectives.preference_accuracy import PreferenceAccuracy
from lit_interns1.objectives.reward import BradleyTerry
from lit_interns1.optim import TokenSchedule
from lit_interns1.training import SummedLoss, WindowMeans


class RewardModelModule(DecoderModule):
    """Trains a `RewardModel` on packed responses.

    Args:
        config: As for `LanguageModelModule`; what it says about the head does not matter.
        changes: As for `LanguageModelModule`.
        objective: `BradleyTerry` (the default), `PolarPretrainLoss` or `PolarRankingLoss` for pairs; `TokenRewardLoss`
            for responses with a label, from the token field `rewards` (above 0 = right), or else `is_chosen`.
        head_std: Standard deviation of the head's initial weights; 0 = they are zero, and all values 0 at first.
        optimizer: As for `LanguageModelModule`; default AdamW, rate 1e-5, β (0.9, 0.95), no decay (what POLAR's
            fine-tuning took for 1.8B parameters).
        schedule: As for `LanguageModelModule`.
        balance: As for `LanguageModelModule`.
        seed: As for `LanguageModelModule`.
        decay_embeddings: As for `LanguageModelModule`.
        init_weights: As for `LanguageModelModule`, a language model whose head is passed over; or a reward model, with
            its head: a checkpoint of this module, or a folder that holds `score.weight`, as transformers writes it.

    Logs `train/loss` (per pair, or per response), `train/balance`, `train/router_z`, and `reward/{name}` for every
    metric of the objective: `accuracy`, `score`, and for pairs `margin`; in validation `val/loss`, `val/reward/{name}`,
    and for pairs `val/reward/accuracy_standard_error`.
    """

    model: RewardModel
    """The network; it exists once Lightning (or you) called `configure_model`."""

    def __init__(
        self,
        config: LanguageModelConfig | str | None = None,
        changes: dict[str, Any] | None = None,
        objective: BradleyTerry | TokenRewardLoss | None = None,
        head_std: float = 0.0,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
        ),
        schedule: TokenSchedule | None = None,
        balance: BalanceLoss | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
        init_weights: str | None = None,
    ) -> None:
        super().__init__(config, changes, optimizer, schedule, balance, seed, decay_embeddings, init_weights)
        if not head_std >= 0:
            raise ValueError(f"head_std = {head_std} must be at least 0")
        self.objective, self.head_std = objective or BradleyTerry(), float(head_std)
        self._metric_means, self._validation_means = WindowMeans(), WindowMeans()
        self.validation_accuracy = PreferenceAccuracy()

    def build_model(self) -> nn.Module:
        """The network that the config describes; on the meta device, if that is the default."""
        return RewardModel(self.config, self.head_std)

    # -- steps -------------------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, **options: Any) -> RewardModelOutput:
        """Values of all tokens of a packed batch; options as for `RewardModel.forward`.

        Raises:
            ValueError: If the batch has media.
        """
        if batch.media:
            raise ValueError(f"the batch holds {', '.join(batch.media)}, which a reward model cannot see")
        routed = batch.token_fields.get("routed_experts")
        return self.model(routed_experts_TLK=routed, **packed_inputs(batch), **options)

    def reward_loss(
        self, values_T: Tensor, batch: PackedBatch, accuracy: PreferenceAccuracy | None = None
    ) -> tuple[SummedLoss, Metrics]:
        """The objective on the values of a batch, with metrics.

        Args:
            values_T: (T,) of its tokens.
            batch: The batch.
            accuracy: Is given the pairs, too.

        Raises:
            ValueError: If the batch lacks what the objective reads.
        """
        if isinstance(self.objective, TokenRewardLoss):
            return self.objective.over_responses(values_T, labelled(batch))
        inputs = PreferenceInputs.from_fields(batch.token_fields, batch.sample_id_T, batch.labels)
        pairs, ends_S = inputs.pairs, at_ends(values_T, sample_id_T=batch.sample_id_T)
        padding = len(inputs.sample_numbers) - len(ends_S)  # padding is a sample id, too, the lowest
        chosen_P, rejected_P = ends_S[pairs.chosen_P - padding], ends_S[pairs.rejected_P - padding]
        margins_T = batch.token_fields.get("margins")
        margin_P = None if margins_T is None else inputs.first_values(margins_T)[pairs.chosen_P]
        if accuracy is not None:
            accuracy.update(chosen_P, rejected_P, pairs.weight_P)
        return self.objective(chosen_P, rejected_P, margin_P, None if inputs.weights is None else pairs.weight_P)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss:  # type: ignore[override]
        """The objective plus the routers' auxiliary losses."""
        output = self(batch)
        loss, metrics = self.reward_loss(output.values_T, batch)
        for name, value in metrics.items():
            if name != "loss":
                self._metric_means.add({f"reward/{name}": value.mean}, value.count)
        return self.finished_loss(loss, {}, output.router_stats)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the means over the optimizer step."""
        super().on_before_optimizer_step(optimizer)
        for name, value in self._metric_means.reduce().items():
            self.log(name, value, prog_bar=name == "reward/accuracy")

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds the batch to the validation metrics."""
        _, metrics = self.reward_loss(self(batch).values_T, batch, self.validation_accuracy)
        for name, value in metrics.items():
            key = "val/loss" if name == "loss" else f"val/reward/{name}"
            self._validation_means.add({key: value.mean}, value.count)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all validation pairs, or responses, of all ranks."""
        values = self._validation_means.reduce()
        if not isinstance(self.objective, TokenRewardLoss):
            values["val/reward/accuracy"] = self.validation_accuracy.compute().float()
            values["val/reward/accuracy_standard_error"] = self.validation_accuracy.standard_error.float()
            self.validation_accuracy.reset()
        for name, value in values.items():
            shown = name in ("val/loss", "val/reward/accuracy")
            self.log(name, value, prog_bar=shown, sync_dist=True)  # these are means over all ranks already

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Values of all tokens (T,), and the rewards of the documents (S,)."""
        values_T = self(batch).values_T
        return {"values": values_T, "rewards": at_ends(values_T, sample_id_T=batch.sample_id_T)}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also says that it is a reward model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[REWARD_KEY] = {"objective": type(self.objective).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint of a language model."""
        super().on_load_checkpoint(checkpoint)
        if REWARD_KEY not in checkpoint:
            raise ValueError(
                "the checkpoint was not written by RewardModelModule, so it is no state to continue from: to start "
                "from its weights, name it as init_weights"
            )


def labelled(batch: PackedBatch) -> PolicyInputs:
    """Responses of a batch with their labels as rewards.

    Raises:
        ValueError: If there are none.
    """
    fields = dict(batch.token_fields)
    if "rewards" not in fields:
        if "is_chosen" not in fields:
            raise ValueError(
                "TokenRewardLoss learns from responses with a label, the token field `rewards` or `is_chosen`; the "
                f"batch has {', '.join(sorted(fields)) or 'no token fields'}"
            )
        fields["rewards"] = fields["is_chosen"].float() * 2 - 1
    return PolicyInputs.from_fields(fields, batch.sample_id_T, batch.labels)


def load_reward_model(path: str | Path, device: torch.device | str = "cpu") -> RewardModel:
    """The reward model of a checkpoint of `RewardModelModule` (one file or sharded), or of a Hugging Face folder with
    `score.weight`, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is no checkpoint, or holds a language model without a value head.
        WeightsError: If it is a folder that cannot be read.
    """
    with torch.device("meta"):
        model = RewardModel(config_of_weights(path))
    if is_checkpoint(path) and REWARD_KEY not in read_checkpoint(path):
        raise ValueError(f"checkpoint {path} holds a language model: RewardModelModule did not write it")
    loaded = load_weights(model, path, device, check_config=False)
    if loaded is not None and loaded.fresh:
        raise ValueError(f"{path} holds a language model: there is no score.weight for {', '.join(loaded.fresh)}")
    return model.eval()
