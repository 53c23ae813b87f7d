"""Preference training of a language model: one response is to become more likely than another, held to a reference.

    loss = objective(log π_θ, log π_ref) + α_SFT · cross-entropy of chosen responses + losses of the routers

Both responses of a pair go through the network in one pass, packed side by side; so do they through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models import LanguageModelConfig
from lit_interns1.modules.frozen_reference import FrozenReference, add_reference, copy_weights
from lit_interns1.modules.language_model_module import LanguageModelModule
from lit_interns1.nn.head import TokenScores
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives.preference import DPO, PairObjective, PreferenceInputs, PreferenceObjective
from lit_interns1.objectives.preference.chosen_likelihood import chosen_cross_entropy
from lit_interns1.objectives.preference_accuracy import PreferenceAccuracy
from lit_interns1.optim import TokenSchedule
from lit_interns1.training import SummedLoss, WindowMeans

Reference = Literal["copy", "precomputed"]
REFERENCE_KEY = "reference"
"""Where a checkpoint says what its reference is; the weights of a copy are in it."""


class PreferenceModule(LanguageModelModule):
    """Trains a `LanguageModel` on packed preferences (`PreferenceDataModule`).

    Args:
        config: As for `LanguageModelModule`.
        changes: As for `LanguageModelModule`.
        optimizer: As for `LanguageModelModule`; default AdamW, rate 1e-6, β (0.9, 0.95), no decay.
        schedule: As for `LanguageModelModule`.
        objective: Any `PreferenceObjective`; default `DPO(beta=0.1)`.
        reference: Where log π_ref comes from: "copy", a frozen second network with the initial weights; "precomputed",
            from the data (token field `ref_logprobs`); None if the objective needs none.
        reference_weights: What the copy starts from instead of the initial weights; as `init_weights`.
        offload_reference: Keep the copy in the memory of the host between uses.
        sft_coefficient: α_SFT ≥ 0 of the cross-entropy on chosen responses, per token and then per pair (RPO).
        balance: As for `LanguageModelModule`. Its usual coefficients suit preference training, too; freeze the routers
            by `changes: {moe: {freeze_router: true}}`.
        seed: As for `LanguageModelModule`.
        decay_embeddings: As for `LanguageModelModule`.
        init_weights: As for `LanguageModelModule`: a folder, a GGUF file, or a checkpoint of an earlier run.

    Logs `train/loss` (objective and SFT term), `train/balance`, `train/router_z`, `preference/{name}` for every metric
    of the objective (`accuracy`, `margin`, `chosen_rewards`, `rejected_rewards`, …) and `preference/sft_loss`; in
    validation `val/loss`, `val/preference/{name}`, and for pairs `val/preference/accuracy` (exact over ranks) with
    `val/preference/accuracy_standard_error`, and `val/preference/likelihood_accuracy`: how often the chosen response is
    the more likely one, whatever the reference says.

    Raises:
        ValueError: If objective and reference do not fit together, or an option is out of its range.
    """

    reference: FrozenReference
    """The copy, if there is one, when `configure_model` has been called."""

    def __init__(
        self,
        config: LanguageModelConfig | str | None = None,
        changes: dict[str, Any] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0
        ),
        schedule: TokenSchedule | None = None,
        objective: PreferenceObjective | None = None,
        reference: Reference | None = "copy",
        reference_weights: str | None = None,
        offload_reference: bool = False,
        sft_coefficient: float = 0.0,
        balance: BalanceLoss | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
        init_weights: str | None = None,
    ) -> None:
        super().__init__(
            config=config, changes=changes, optimizer=optimizer, schedule=schedule, balance=balance, seed=seed,
            decay_embeddings=decay_embeddings, init_weights=init_weights,
        )  # fmt: skip
        self.preference_objective = objective or DPO(beta=0.1)
        name = type(self.preference_objective).__name__
        needed = "ref_logprobs" in self.preference_objective.requires
        if reference is not None and reference not in get_args(Reference):
            raise ValueError(f"reference = {reference!r} is unknown; choose 'copy', 'precomputed' or null")
        if needed and reference is None:
            raise ValueError(f"reference = null, but {name} compares with one: choose 'copy' or 'precomputed'")
        if not needed and reference is not None:
            raise ValueError(f"reference = {reference!r}, but {name} as configured needs none: set reference to null")
        if reference != "copy" and (reference_weights is not None or offload_reference):
            raise ValueError(
                f"reference_weights and offload_reference are for reference = 'copy', which is {reference!r}"
            )
        if not 0 <= sft_coefficient < float("inf"):
            raise ValueError(f"sft_coefficient = {sft_coefficient} must be finite and at least 0")
        if sft_coefficient and not isinstance(self.preference_objective, PairObjective):
            raise ValueError(f"sft_coefficient = {sft_coefficient} needs an objective of pairs; {name} is none")
        self.reference_kind, self.reference_weights = reference, reference_weights
        self.offload_reference, self.sft_coefficient = offload_reference, float(sft_coefficient)
        self._metric_means, self._validation_means = WindowMeans(), WindowMeans()
        self.validation_accuracy, self.likelihood_accuracy = PreferenceAccuracy(), PreferenceAccuracy()

    # -- building ----------------------------------------------------------------------------------------------------

    def build_beside(self) -> None:
        """Builds the copy that is the reference."""
        if self.reference_kind == "copy":
            add_reference(self, self.build_model(), self.offload_reference)

    def materialize(self, device: torch.device | str) -> None:
        """Also gives the reference its weights."""
        super().materialize(device)
        if self.reference_kind != "copy":
            return
        if self.reference_weights is None:
            copy_weights(self.reference, self.model, device)
            return
        try:
            self.fill(self.reference.network, device, self.reference_weights)
        except ValueError:
            del self.model, self.reference  # as if they had never been built; see `DecoderModule.materialize`
            raise

    # -- steps -------------------------------------------------------------------------------------------------------

    def preference_inputs(self, batch: PackedBatch) -> PreferenceInputs:
        """What the objective reads beside the scores, with log π_ref.

        Raises:
            ValueError: If the data lack something.
        """
        fields = dict(batch.token_fields)
        if self.reference_kind == "copy":
            fields["ref_logprobs"] = self.reference.reference_scores(batch).logp_T
        elif self.reference_kind == "precomputed" and "ref_logprobs" not in fields:
            raise ValueError(
                "reference = 'precomputed' needs log-probabilities of a reference in the data (ref_chosen_logps and "
                "ref_rejected_logps in JSONL, the token field ref_logprobs in batches); there are none"
            )
        return PreferenceInputs.from_fields(fields, batch.sample_id_T, batch.labels)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss:  # type: ignore[override]
        """The preference loss, the SFT term, and the routers' auxiliary losses."""
        inputs = self.preference_inputs(batch)
        output = self(batch, targets=batch.labels)
        loss, metrics = self.preference_loss(output.scores, inputs)
        for name, value in metrics.items():
            self._metric_means.add({f"preference/{name}": value.mean}, value.count)
        return self.finished_loss(loss, {}, output.router_stats)

    def preference_loss(
        self, scores: TokenScores, inputs: PreferenceInputs
    ) -> tuple[SummedLoss, dict[str, SummedLoss]]:
        """Objective and SFT term of one micro-batch, with metrics."""
        loss, metrics = self.preference_objective(scores, inputs)
        if self.sft_coefficient:
            term = chosen_cross_entropy(self.preference_objective.response_logprobs(scores, inputs), inputs)
            loss = SummedLoss(loss.sum + self.sft_coefficient * term.sum, loss.count)
            metrics["sft_loss"] = SummedLoss(term.sum.detach(), term.count)
        return loss, metrics

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the means over the optimizer step."""
        super().on_before_optimizer_step(optimizer)
        for name, value in self._metric_means.reduce().items():
            self.log(name, value, prog_bar=name == "preference/accuracy")

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Adds the batch to the validation metrics; returns what `LanguageModelModule.validation_step` returns."""
        inputs, scores = self.preference_inputs(batch), self.token_scores(batch)
        loss, metrics = self.preference_loss(scores, inputs)
        self._validation_means.add({"val/loss": loss.mean}, loss.count)
        for name, value in metrics.items():
            self._validation_means.add({f"val/preference/{name}": value.mean}, value.count)
        if isinstance(self.preference_objective, PairObjective):
            pairs = inputs.pairs
            logp_S = inputs.sample_sums(scores.logp_T)
            reference_S = inputs.sample_sums(inputs.value("ref_logprobs"))
            for metric, score_S in (
                (self.validation_accuracy, logp_S - reference_S),
                (self.likelihood_accuracy, logp_S),
            ):
                metric.update(score_S[pairs.chosen_P], score_S[pairs.rejected_P], pairs.weight_P)
        return {"token_loss_T": -scores.logp_T}

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all validation pairs (or responses) of all ranks."""
        values = self._validation_means.reduce()
        if isinstance(self.preference_objective, PairObjective):
            accuracy, likelihood = self.validation_accuracy.compute(), self.likelihood_accuracy.compute()
            values["val/preference/accuracy"] = accuracy.float()
            values["val/preference/accuracy_standard_error"] = self.validation_accuracy.standard_error.float()
            values["val/preference/likelihood_accuracy"] = likelihood.float()
        self.validation_accuracy.reset()
        self.likelihood_accuracy.reset()
        for name, value in values.items():
            shown = name in ("val/loss", "val/preference/accuracy")
            self.log(name, value, prog_bar=shown, sync_dist=True)  # these are means over all ranks already

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also says what the reference is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[REFERENCE_KEY] = self.reference_kind

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint with another kind of reference."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(REFERENCE_KEY, "missing")
        if saved == "missing":
            raise ValueError(
                "the checkpoint was not written by PreferenceModule, so it is no state to continue from: to start from "
                "its weights, name it as init_weights"
            )
        if saved != self.reference_kind:
            raise ValueError(f"the checkpoint has reference = {saved!r}, this run has {self.reference_kind!r}")
