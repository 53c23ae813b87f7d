"""How fast a run is: tokens per second, seconds per optimizer step, and the share of the device's peak that it reaches.

MFU = (model FLOPs per token · tokens per second per rank) / peak FLOP/s of the device
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_interns1.callbacks.token_clock import TokenClock, data_parallel_size, logs_now
from lit_interns1.models import Decoder, flops_per_token
from lit_interns1.models.trained_parts import parts_of_type
from lit_interns1.training.peak_flops import PEAK_BF16_FLOPS


def device_peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device, None if it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


class ThroughputMonitor(Callback):
    """Logs `throughput/tokens_per_second`, `throughput/step_seconds` and, where the peak is known, `throughput/mfu`.

    Times lie between the ends of optimizer steps and are averaged over the logging interval; validation and
    checkpoints are left out.

    Args:
        peak_flops: Peak FLOP/s of one device; default: looked up by the device's name.
        model_flops_per_token: FLOPs of forward and backward per token; default: counted if the module holds a
            `Decoder` (a language or reward model).
        context_length: Mean number of tokens that a token attends to, for the count.
    """

    def __init__(
        self,
        peak_flops: float | None = None,
        model_flops_per_token: float | None = None,
        context_length: float = 0.0,
    ) -> None:
        self.peak_flops, self.model_flops_per_token = peak_flops, model_flops_per_token
        self.context_length = context_length
        self._started: float | None = None
        self._tokens_before = 0
        self._seconds = 0.0
        self._steps = self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the peak and the model's FLOPs."""
        self.peak_flops = self.peak_flops or device_peak_flops(pl_module.device)
        models = parts_of_type(pl_module, Decoder)
        if self.model_flops_per_token is None and models:
            self.model_flops_per_token = flops_per_token(models[0], self.context_length)
        self._tokens_before = TokenClock.of(trainer).tokens
        self._started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the watch again after a pause."""
        if self._started is None:
            self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the watch."""
        self._started = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the watch."""
        self._started = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs at the ends of optimizer steps."""
        clock = TokenClock.of(trainer)
        tokens = clock.tokens - self._tokens_before
        if tokens == 0:
            return
        self._tokens_before = clock.tokens
        if self._started is not None:
            now = time.perf_counter()
            self._seconds += now - self._started
            self._started = now
            self._tokens += tokens
            self._steps += 1
        if self._steps and logs_now(trainer):
            rate = self._tokens / self._seconds
            pl_module.log("throughput/tokens_per_second", rate, prog_bar=True)
            pl_module.log("throughput/step_seconds", self._seconds / self._steps)
            if self.peak_flops and self.model_flops_per_token:
                utilization = self.model_flops_per_token * rate / data_parallel_size(trainer) / self.peak_flops
                pl_module.log("throughput/mfu", utilization, prog_bar=True)
            self._seconds, self._steps, self._tokens = 0.0, 0, 0
