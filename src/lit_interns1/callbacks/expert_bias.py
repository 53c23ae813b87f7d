"""Load balance without a loss: the bias of sigmoid routers moves against the load (arXiv 2408.15664 §2.2).

b_e ← b_e + rate · sign(mean_e' c_e' − c_e),   c = tokens per expert over the whole optimizer step
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_interns1.callbacks.router_counter import RouterCounter
from lit_interns1.callbacks.skip_bad_steps import SkipBadSteps
from lit_interns1.models import Decoder
from lit_interns1.models.trained_parts import parts_of_type
from lit_interns1.nn.moe import SigmoidRouter, update_expert_bias


class ExpertBiasUpdate(Callback):
    """Moves the bias of every `SigmoidRouter` once per optimizer step, with the counts of all micro-batches and ranks.

    Args:
        rate: Step of the bias; 1e-3 in the paper.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        if rate <= 0:
            raise ValueError(f"ExpertBiasUpdate.rate must be positive, got {rate}")
        self.rate = rate
        self._counter = RouterCounter()
        self._routers: list[SigmoidRouter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the routers and starts counting."""
        models = parts_of_type(pl_module, Decoder)
        if len(models) != 1:
            raise ValueError(
                f"ExpertBiasUpdate needs exactly one language or reward model in the module, found {len(models)}"
            )
        self._routers = [m.router for m in models[0].moe_layers if isinstance(m.router, SigmoidRouter)]
        self._counter.listen(models[0])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Moves the biases; frozen routers keep theirs, and a step that is skipped moves none."""
        counts_LE = self._counter.take()
        if counts_LE is not None and not SkipBadSteps.skips(trainer, optimizer):
            for router, counts_E in zip(self._routers, counts_LE, strict=True):
                if router.weight.requires_grad:
                    update_expert_bias(router.expert_bias, counts_E, self.rate)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops counting."""
        self._counter.stop()
