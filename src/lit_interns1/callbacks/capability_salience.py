"""Predicts benchmark scores during validation from weighted token losses (arXiv 2506.13216).

    c_j = Σ_t w_jt ℓ_t          score_j = y_lo + (y_hi − y_lo) · sigmoid(−k (c_j − c_0))

The weights come from a file that `lit-interns1 salience fit` wrote. They belong to validation tokens by their stable
number, so batches may be shuffled and packed; a file that was fitted on other tokens or with another tokenizer is
refused before training. The paper gives the weighted loss and the sigmoid; this way of using them in training, and the
uncertainty of the score, are reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import ArrayLike
from torch import Tensor

from lit_interns1.data.loader import EvaluationLoader
from lit_interns1.data.tokenizer import TextTokenizer
from lit_interns1.data.validation_tokens import (
    batch_field,
    bytes_per_token,
    data_hash,
    loss_positions,
    seen_tokens,
    tokenizer_hash,
)
from lit_interns1.laws.salience_file import load_salience
from lit_interns1.objectives.salience_metric import SalienceMetric, check_visits
from lit_interns1.training import all_reduce_sum

TokenLosses = Callable[[LightningModule, Any], Tensor]
"""(module, batch) → (T,) or (rows, length) losses in nats, one for each position of the batch."""
OUTPUT = "token_loss_T"
"""Where a validation step's output may hold the losses of the batch, so that they are not computed again."""


class CapabilitySalienceValidation(Callback):
    """Logs the weighted loss and the predicted score of every capability at each validation.

    Batches are `PackedBatch`es or mappings and carry `validation_token_id`. The losses of a batch are those that the
    module's `validation_step` returns as `{"token_loss_T": …}`; a module that does not return them is run a second
    time, by `token_losses` or `module.token_scores(batch)`.

    Args:
        salience: A file that `lit-interns1 salience fit` wrote.
        capabilities: Which of its capabilities to log; default: all.
        token_losses: Computes the losses of a batch, for modules without `token_scores`.
        tokenizer_hash: Hash of the tokenizer of the data; default: that of the DataModule's `tokenizer`.
        token_bytes: (V,) bytes of each token, for `val/bits_per_byte`; default: known for a byte-level tokenizer of
            the DataModule.

    Logs `salience/{capability}/loss`, `salience/{capability}/predicted_score`, `salience/{capability}/predicted_std`
    and, where bytes are known, `val/bits_per_byte`.

    Raises:
        ValueError: Before training, if the file was fitted with another tokenizer or on other validation tokens, or
            the module has no per-token losses; at any validation, if a weighted token does not come exactly once.
    """

    def __init__(
        self,
        salience: str | PathLike[str],
        capabilities: Sequence[str] | None = None,
        token_losses: TokenLosses | None = None,
        tokenizer_hash: str | None = None,
        token_bytes: ArrayLike | None = None,
    ) -> None:
        self.path, self.salience = Path(salience), load_salience(Path(salience))
        known = list(self.salience.capabilities)
        unknown = sorted(set(capabilities or ()) - set(known))
        if unknown:
            raise ValueError(f"capabilities: {salience} knows no {unknown}; it has {known}")
        self.capabilities = list(capabilities or known)
        self.token_losses, self._tokenizer_hash = token_losses, tokenizer_hash
        self._token_bytes_V = None if token_bytes is None else torch.as_tensor(np.asarray(token_bytes))
        weights_JW = np.stack([self.salience.capabilities[name].weights_T for name in self.capabilities])
        self.metric = SalienceMetric(self.salience.token_ids_T, weights_JW)
        self.values: dict[str, float] = {}
        """What the last validation logged, in float64."""
        self._checked = self._active = False

    # -- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares tokenizer and, of the kit's DataModule, the validation tokens with those of the file."""
        if stage not in ("fit", "validate"):
            return
        if self.token_losses is None and not hasattr(pl_module, "token_scores"):
            raise ValueError(
                f"CapabilitySalienceValidation: {type(pl_module).__name__} has no token_scores(batch); give "
                "token_losses, a function of (module, batch) that returns the loss of every position"
            )
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if isinstance(tokenizer, TextTokenizer):
            self._tokenizer_hash = self._tokenizer_hash or tokenizer_hash(tokenizer)
            if self._token_bytes_V is None and (bytes_V := bytes_per_token(tokenizer)) is not None:
                self._token_bytes_V = torch.from_numpy(bytes_V)
        if self._tokenizer_hash is None:
            raise ValueError(
                "CapabilitySalienceValidation: the data name no tokenizer of the kit; give tokenizer_hash, the hash of "
                f"the one that made the tokens ({self.path} belongs to {self.salience.tokenizer_hash})"
            )
        self.salience.check(self._tokenizer_hash, self.salience.data_hash)
        self._checked = False
        if trainer.datamodule is not None and not self._limited(trainer, None):  # type: ignore[attr-defined]
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            if isinstance(loader, EvaluationLoader):
                self._check_tokens([loader], trainer.strategy.root_device)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the validation tokens with those of the file."""
        self._check_loaders(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the validation tokens with those of the file."""
        self._check_loaders(trainer)

    def _check_loaders(self, trainer: Trainer) -> None:
        loaders = _listed(trainer.val_dataloaders)
        if loaders and not self._checked and not self._limited(trainer, loaders):
            self._check_tokens(loaders, trainer.strategy.root_device)

    def _check_tokens(self, loaders: Iterable[Any], device: torch.device) -> None:
        """Reads the validation data once, without a forward pass."""
        with torch.random.fork_rng(devices=[]):  # loaders may draw random numbers
            seen = seen_tokens(batch for loader in loaders for batch in loader)
        token_ids_W = self.salience.token_ids_T
        place_N = np.searchsorted(token_ids_W, seen.token_id_N).clip(max=len(token_ids_W) - 1)
        place_N = place_N[token_ids_W[place_N] == seen.token_id_N]
        visits_W = np.bincount(place_N, minlength=len(token_ids_W))
        # int64 sums wrap around as those of the hash do
        sums = torch.from_numpy(np.concatenate([visits_W, seen.lanes.view(np.int64)])).to(device)
        sums_N = all_reduce_sum(sums).cpu().numpy()
        check_visits(sums_N[:-2], token_ids_W)
        self.salience.check(self.salience.tokenizer_hash, data_hash(sums_N[-2:].view(np.uint64)))
        self._checked = True

    # -- validation --------------------------------------------------------------------------------------------------

    @staticmethod
    def _limited(trainer: Trainer, loaders: Sequence[Any] | None) -> bool:
        """Whether the Trainer leaves validation batches out."""
        limit = trainer.limit_val_batches
        if limit == 1.0 and isinstance(limit, float):
            return False
        return loaders is None or any(not hasattr(loader, "__len__") or limit < len(loader) for loader in loaders)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts at zero; a validation of some batches only is left out."""
        loaders = _listed(trainer.val_dataloaders)
        limited = self._limited(trainer, loaders)
        self._active = not trainer.sanity_checking and not limited
        if trainer.sanity_checking:
            rank_zero_info("capability salience: left out of the sanity check, which sees some batches only")
        elif limited:
            rank_zero_warn(
                f"capability salience is left out: limit_val_batches={trainer.limit_val_batches} hides validation "
                "tokens that its weights need"
            )
        if self._active:
            if not self._checked:
                self._check_tokens(loaders, trainer.strategy.root_device)
            self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the losses of the batch."""
        if not self._active:
            return
        positions = loss_positions(batch)
        loss_T = self._losses(pl_module, outputs, batch)
        size = positions.num_positions
        if loss_T.numel() != size:
            raise ValueError(
                f"{loss_T.numel()} token losses for a batch of {size} positions; there must be one for each"
            )
        bytes_N = None
        if self._token_bytes_V is not None and (labels_T := batch_field(batch, "labels")) is not None:
            self._token_bytes_V = self._token_bytes_V.to(labels_T.device)
            bytes_N = self._token_bytes_V[labels_T[positions.index_N]]
        self.metric.update(loss_T.flatten()[positions.index_N], positions.token_id_N, bytes_N)

    def _losses(self, module: LightningModule, outputs: Any, batch: Any) -> Tensor:
        if self.token_losses is not None:
            return self.token_losses(module, batch)
        if isinstance(outputs, dict) and OUTPUT in outputs:
            return outputs[OUTPUT]
        with torch.no_grad():
            return -module.token_scores(batch).logp_T  # type: ignore[operator]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up over ranks and logs."""
        if not self._active:
            return
        sums = self.metric.compute()
        self.values = {}
        for name, loss in zip(self.capabilities, sums.capability_losses, strict=True):
            score, std = self.salience.capabilities[name].predict(loss)
            self.values |= {
                f"salience/{name}/loss": loss,
                f"salience/{name}/predicted_score": float(score),
                f"salience/{name}/predicted_std": float(std),
            }
        if math.isfinite(sums.bits_per_byte):
            self.values["val/bits_per_byte"] = sums.bits_per_byte
        # the sums are those of all ranks already; sync_dist only says so to Lightning
        pl_module.log_dict(self.values, sync_dist=True)


def _listed(loaders: Any) -> list[Any]:
    """The validation loaders of a Trainer as a list."""
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
