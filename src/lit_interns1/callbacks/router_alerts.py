"""When routers need somebody's attention: conditions on the metrics of a window, each reported now and then only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


@dataclass
class RouterAlerts:
    """Limits; None switches one off.

    Attributes:
        dead_experts: Report experts that got no token in `after_logs` windows in a row.
        max_violation: Limit of a layer's violation in `after_logs` windows in a row; 1 = twice the mean load.
        z: Limit of a layer's mean (logsumexp of the logits)².
        logit: Limit of a layer's largest logit.
        bias: Limit of a layer's largest |bias|.
        not_finite: Report sums of logits or probabilities that are not finite.
        after_logs: Windows in a row for the two conditions above.
        repeat_after_logs: Windows until the same condition is reported again.
    """

    dead_experts: bool = True
    max_violation: float | None = 1.0
    z: float | None = 200.0
    logit: float | None = 100.0
    bias: float | None = 0.5
    not_finite: bool = True
    after_logs: int = 10
    repeat_after_logs: int = 100

    def __post_init__(self) -> None:
        for name in ("max_violation", "z", "logit", "bias"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"RouterAlerts.{name} must be positive or null, got {value}")
        for name in ("after_logs", "repeat_after_logs"):
            if getattr(self, name) < 1:
                raise ValueError(f"RouterAlerts.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class AlertState:
    """How long conditions have held.

    Attributes:
        logs: Windows seen.
        dead_LE: Windows in a row without a token, per layer and expert.
        uneven_L: Windows in a row with too large a violation, per layer.
        reported: The window in which each condition was reported last.
    """

    logs: int = 0
    dead_LE: np.ndarray | None = None
    uneven_L: np.ndarray | None = None
    reported: dict[str, int] = field(default_factory=dict)

    def check(
        self, limits: RouterAlerts, counts_LE: Tensor, metrics: Mapping[str, Tensor], finite_L: Tensor
    ) -> dict[str, str]:
        """Messages by condition that are due after one more window."""
        self.logs += 1
        dead_LE = (counts_LE == 0).numpy().astype(np.int64)
        self.dead_LE = dead_LE if self.dead_LE is None else (self.dead_LE + 1) * dead_LE
        uneven_L = (metrics["max_violation"] > (limits.max_violation or np.inf)).numpy().astype(np.int64)
        self.uneven_L = uneven_L if self.uneven_L is None else (self.uneven_L + 1) * uneven_L

        found: dict[str, str] = {}
        dead = np.argwhere(self.dead_LE >= limits.after_logs)
        if limits.dead_experts and len(dead):
            names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in dead[:8])
            found["dead experts"] = (
                f"{len(dead)} of {counts_LE.numel()} experts got no token in {limits.after_logs} windows: {names}"
                + (", ..." if len(dead) > 8 else "")
            )
        layers = np.flatnonzero(self.uneven_L >= limits.after_logs)
        if len(layers):
            worst = int(metrics["max_violation"].argmax())
            found["load violation"] = (
                f"{len(layers)} layers had a load violation above {limits.max_violation:g} in {limits.after_logs} "
                f"windows; layer {worst} has {float(metrics['max_violation'][worst]):.3g}"
            )
        for name, metric, limit in (
            ("router z", "z", limits.z),
            ("router logits", "logit_max", limits.logit),
            ("router bias", "bias_max", limits.bias),
        ):
            values_L = metrics.get(metric)
            if limit is not None and values_L is not None and bool((values_L > limit).any()):
                worst = int(values_L.nan_to_num(-torch.inf).argmax())
                found[name] = f"{metric} of layer {worst} is {float(values_L[worst]):.4g}, above {limit:g}"
        if limits.not_finite and not bool(finite_L.all()):
            found["router not finite"] = f"logits of layers {(~finite_L).nonzero().flatten().tolist()} are not finite"

        due = {
            name: text
            for name, text in found.items()
            if self.logs - self.reported.get(name, -limits.repeat_after_logs) >= limits.repeat_after_logs
        }
        self.reported |= dict.fromkeys(due, self.logs)
        return due


def send_alert(trainer: Trainer, title: str, text: str) -> None:
    """A warning of rank 0, and an alert of its W&B runs."""
    if not trainer.is_global_zero:
        return
    rank_zero_warn(f"{title}: {text}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.alert(title=title, text=text)
