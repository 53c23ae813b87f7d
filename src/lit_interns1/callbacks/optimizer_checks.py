"""What may not be asked of some optimizers.

Those that update in backward cannot do anything that needs all gradients at once:
    backward: θ_1 ← …, θ_2 ← …, …, θ_n ← …        each gradient is gone before the next one comes
Others need what the loop of Lightning does not give them.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.tensor import DTensor

from lit_interns1.optim import fused_optimizers

_SECOND_DERIVATIVES = (
    "needs second derivatives (backward with create_graph=True), which neither FSDP2 nor the kit's kernels have"
)
UNUSABLE: dict[str, str] = {
    "SophiaH": _SECOND_DERIVATIVES,
    "AdaHessian": _SECOND_DERIVATIVES,
    "CPUOffloadOptimizer": "copies gradients away while backward runs, before they are scaled by the count of the step "
    "and clipped; for less memory on the device use torchao.optim.AdamW8bit, or AdaLomo",
}
"""Why optimizers of other packages cannot be used, by the name of their class."""
LOW_BIT = ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit", "AdamFp8", "AdamWFp8")
"""torchao's optimizers that are refused where parameters are divided over ranks."""


class OptimizerChecks(Callback):
    """Refuses, before the first step, optimizers that would train wrongly here; leaves others alone.

    Modules of the kit bring it; add it to the callbacks for modules of your own. A callback or module that looks at
    gradients between backward and step says so with an attribute `reads_gradients`.

    Raises:
        ValueError: For an optimizer in `UNUSABLE`, unless the module has a `backward` of its own; for one of `LOW_BIT`
            over ranks; and for one that updates in backward, with accumulation, `gradient_clip_val`, a loss scaler, a
            strategy that does not hand over summed gradients, or a callback that reads them.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the trainer, once it has its optimizers."""
        for optimizer in trainer.optimizers:
            name = type(optimizer).__name__
            if name in UNUSABLE and type(pl_module).backward is LightningModule.backward:
                raise ValueError(f"optimizer {name} {UNUSABLE[name]}")
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            if name in LOW_BIT and any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in parameters):
                raise ValueError(
                    f"optimizer {name} is for one device: over {trainer.world_size} ranks its steps were not those of "
                    "one process; use AdamW, or AdaLomo for less memory"
                )
        for optimizer in fused_optimizers(trainer.optimizers):
            for problem in _problems(trainer, pl_module):
                raise ValueError(f"{type(optimizer).__name__} updates in backward: {problem}")


def _problems(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    accumulation = trainer.accumulate_grad_batches
    if accumulation != 1 or any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        yield (
            f"Trainer.accumulate_grad_batches = {accumulation} must be 1, without a GradientAccumulationScheduler: "
            "there are no gradients to add to; use larger micro-batches or more ranks"
        )
    if trainer.gradient_clip_val is not None:
        yield (
            f"Trainer.gradient_clip_val = {trainer.gradient_clip_val} must be null: a norm over all gradients would "
            "take a second backward; LOMO has clip_value, AdaLomo limits the size of every update by itself"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield (
            f"Trainer.precision = {trainer.precision!r} scales the loss, and steps that overflow could not be left "
            'out; use "bf16-mixed" or "32-true"'
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, ModelParallelStrategy)):
        yield (
            f"Trainer.strategy = {type(trainer.strategy).__name__} sums gradients over ranks later, or in pieces; use "
            "MoEParallelStrategy, ModelParallelStrategy, or one device"
        )
    for part in (module, *callbacks):
        if getattr(part, "reads_gradients", False):
            yield f"{type(part).__name__} needs the gradients between backward and step; leave it out"
