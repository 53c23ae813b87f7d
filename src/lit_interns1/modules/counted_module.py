"""What LightningModules here share: a network that is built late, so that a strategy can divide it before it has
memory, an optimizer chosen from outside, and the callbacks that count tokens and make losses exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import Optimizer

from lit_interns1.callbacks import OptimizerChecks, TokenClock, TokenExactLoss, TokenLearningRate
from lit_interns1.optim import TokenSchedule, build_optimizer


class CountedModule(LightningModule):
    """A module with `model`, whose loss is a `SummedLoss`.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        schedule: Factor on the rate as a function of consumed tokens; None = constant.
        decay_embeddings: Also apply weight decay to embeddings.
        seed: Seed of the initial weights.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: TokenSchedule | None,
        decay_embeddings: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.schedule = optimizer, schedule
        self.decay_embeddings, self.seed = decay_embeddings, seed

    def build_model(self) -> nn.Module:
        """The network that the config describes; on the meta device, if that is the default."""
        raise NotImplementedError

    def build_beside(self) -> None:
        """Builds further networks, if the module has some; on the meta device, if that is the default."""

    def materialize(self, device: torch.device | str) -> None:
        """Fills in the initial weights; they do not depend on how the model is divided."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Builds the network on the meta device, and fills it unless the strategy divides it first."""
        if not hasattr(self, "model"):
            with torch.device("meta"):
                self.model: Any = self.build_model()
                self.build_beside()
            if self._trainer is None or not getattr(self._trainer.strategy, "shards_modules", False):
                self.materialize("cpu")

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over parameter groups with and without decay; for Muon and Mousse, of matrices and the rest."""
        return build_optimizer(self.make_optimizer, self.model, decay_embeddings=self.decay_embeddings)

    def wanted_callbacks(self) -> list[Callback]:
        """Callbacks that training needs: the clock, exact losses, the schedule, and checks of the optimizer."""
        schedule = [] if self.schedule is None else [TokenLearningRate(self.schedule)]
        return [TokenClock(), TokenExactLoss(), *schedule, OptimizerChecks()]

    def configure_callbacks(self) -> list[Callback]:
        """Those of `wanted_callbacks` that the Trainer has none of."""
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback for callback in self.wanted_callbacks() if type(callback) not in present]
