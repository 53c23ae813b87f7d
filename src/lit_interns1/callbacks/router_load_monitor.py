"""Watches the load balance of routers: metrics, heat map, alerts, and how much the choices still change.

    max violation of a layer = (max_e c_e − mean c) / mean c   over a micro-batch, a step, a window    arXiv 2408.15664
    grouped router with whole groups: every group gets T · K / G slots, exactly                  arXiv 2603.25040 §2.1
    routing drift = 1 − |A ∩ B| / |A ∪ B|   of a probe token's experts now and at the last time

Counts stay on the device. Only where a window ends they are added up, the ranks talk (one all-reduce) and the host
reads; statistics of the logits are those of the window's last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_interns1.callbacks.load_history import LoadHistory
from lit_interns1.callbacks.probe_batch import ProbeBatch, ProbeSource
from lit_interns1.callbacks.router_alerts import AlertState, RouterAlerts, send_alert
from lit_interns1.callbacks.router_listener import RouterListener
from lit_interns1.callbacks.token_clock import TokenClock, log_now
from lit_interns1.nn.moe.gate_adapter import GateAdapter
from lit_interns1.nn.moe.load_metrics import routing_drift
from lit_interns1.nn.moe.router_load import (
    PARTIAL_METRICS,
    ROUTER_METRICS,
    LoadSums,
    RouterEvent,
    RouterLoad,
    StepLoad,
)

STATE_KEY = "router_load"
"""Where a checkpoint holds an unfinished window."""

_MOST_EVENTS = 2048


def attention_mask(batch: Any) -> Tensor | None:
    """The tokens of a batch that are no padding, if it has an `attention_mask` of one entry per token."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)
    return found if isinstance(found, Tensor) and found.ndim <= 2 else None


class RouterLoadMonitor(Callback):
    """Logs `router/all/{metric}_mean` and `_max` over layers, and `router/layer_{i}/{metric}` of some layers.

    Hears the routers of every `LanguageModel` in the module, and those of transformers' models or whatever `adapter`
    knows. A module without routers is left alone. Needs a `TokenClock` beside it.

    Args:
        every_n_steps: Optimizer steps per window; metrics are logged where one ends.
        layer_metrics: Metrics that are logged for single layers, of `ROUTER_METRICS`.
        max_layers: At most so many layers, evenly chosen among the MoE layers.
        submodule: Listen below this submodule only ("policy"); "" = the whole module.
        expert_parallel_size: Ranks that share the experts, for `rank_max_violation`. None: the strategy's.
        capacity_factor: Also log the `drop_rate` that this capacity would have; nothing is dropped.
        group_imbalance: What a grouped router that fills its groups unevenly is: "error", "alert" or "ignore".
        alerts: Limits; None = no alerts.
        heatmap_every: Windows between two heat maps in W&B, image and table; 0 = none.
        path: File of the shares over the run, relative to `default_root_dir`; None = no file.
        max_points: At most so many points in the file.
        validation: Also log `router/val/{metric}_mean` and `_max`, one window per validation.
        drift_every: Windows between two measurements of the routing drift; 0 = none.
        probe: The batch for it: "train", "validation" (the first of each), or a function that makes one.
        probe_forward: Runs the module on it; default: `token_scores` of the module, else its `forward`.
        adapter: Knows foreign routers; default: those of transformers.
        token_mask: From a batch to the mask of its tokens, for foreign routers; default: its `attention_mask`.

    Raises:
        ValueError: If an option is out of range; and when training starts, if layers have different numbers of experts.
        RuntimeError: If groups are filled unevenly and `group_imbalance` is "error".
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        layer_metrics: Sequence[str] = ("max_violation",),
        max_layers: int = 8,
        submodule: str = "",
        expert_parallel_size: int | None = None,
        capacity_factor: float | None = None,
        group_imbalance: Literal["error", "alert", "ignore"] = "error",
        alerts: RouterAlerts | None = RouterAlerts(),  # noqa: B008 - never changed
        heatmap_every: int = 100,
        path: str | None = "metrics/expert_load.npz",
        max_points: int = 256,
        validation: bool = False,
        drift_every: int = 0,
        probe: ProbeSource = "validation",
        probe_forward: Callable[[LightningModule, Any], Any] | None = None,
        adapter: GateAdapter | None = None,
        token_mask: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1), ("max_layers", max_layers, 0), ("heatmap_every", heatmap_every, 0),
            ("drift_every", drift_every, 0), ("expert_parallel_size", expert_parallel_size, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"RouterLoadMonitor.{name} must be at least {least}, got {value}")
        if unknown := set(layer_metrics) - set(ROUTER_METRICS):
            raise ValueError(
                f"RouterLoadMonitor.layer_metrics: {sorted(unknown)} are unknown; choose of {', '.join(ROUTER_METRICS)}"
            )
        if group_imbalance not in ("error", "alert", "ignore"):
            raise ValueError(f"RouterLoadMonitor.group_imbalance = {group_imbalance!r} must be error, alert or ignore")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"RouterLoadMonitor.capacity_factor must be positive, got {capacity_factor}")
        self.every_n_steps, self.layer_metrics, self.max_layers = every_n_steps, tuple(layer_metrics), max_layers
        self.submodule, self.expert_parallel_size, self.capacity_factor = (
            submodule, expert_parallel_size, capacity_factor,
        )  # fmt: skip
        self.group_imbalance, self.alerts, self.heatmap_every = group_imbalance, alerts, heatmap_every
        self.path, self.validation, self.drift_every = path, validation, drift_every
        self.adapter, self.token_mask = adapter, token_mask or attention_mask
        self.history = LoadHistory(max_points)
        self.load: RouterLoad | None = None
        """The window in progress."""
        self._validation_load: RouterLoad | None = None
        self._step: StepLoad | None = None
        self._validating = False
        self._probe = ProbeBatch("RouterLoadMonitor", probe, probe_forward)
        self._listener: RouterListener | None = None
        self._events: list[RouterEvent] = []  # of the optimizer step in progress
        self._finished: list[RouterEvent] = []  # of finished steps, not yet added to the window
        self._validation_events: list[RouterEvent] = []
        self._alert_state = AlertState()
        self._seen_steps = self._windows = 0
        self._last_choices: dict[int, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None

    # -- listening -----------------------------------------------------------------------------------------------------

    def _start(self, pl_module: LightningModule) -> None:
        if self._listener is not None:
            return
        try:
            root = pl_module.get_submodule(self.submodule)
        except AttributeError as error:
            raise ValueError(f"RouterLoadMonitor.submodule = {self.submodule!r}: {error}") from None
        self._listener = listener = RouterListener(root, self._receive, self.adapter)
        experts = {place.num_experts for place in listener.routers}
        if not experts:
            rank_zero_info(f"RouterLoadMonitor: no router in {type(root).__name__}, nothing is logged")
            return
        if len(experts) > 1:
            raise ValueError(
                f"RouterLoadMonitor: layers have {sorted(experts)} experts; choose those of one kind by "
                "`submodule` or `adapter`"
            )
        size = len(listener.routers), experts.pop()
        self.load, self._validation_load = (RouterLoad(*size).to(pl_module.device) for _ in range(2))
        self._step = StepLoad(*size, pl_module.device)

    def _stop(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener, self._validating = None, False

    @property
    def _groups_L(self) -> list[int]:
        assert self._listener is not None
        return [place.num_groups for place in self._listener.routers]

    def _receive(self, events: list[RouterEvent]) -> None:
        if self._validating:
            self._validation_events += events
        elif events[0].training:
            self._events += events

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts listening; continues the window and the file of a resumed run."""
        self._start(pl_module)
        clock = TokenClock.of(trainer)
        self._seen_steps = clock.state.steps
        if self.load is None:
            return
        if self._restored is not None and trainer.is_global_zero:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.load.state_dict().items()}
            if shapes == {name: tuple(tensor.shape) for name, tensor in self._restored.items()}:
                self.load.load_state_dict({name: t.to(pl_module.device) for name, t in self._restored.items()})
        self._restored = None
        file = self._file(trainer)
        if clock.tokens and file is not None and file.exists():
            self.history.read(file, clock.tokens)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prepares for a micro-batch; the last step of a window is looked at more closely."""
        if self.load is None or self._listener is None:
            return
        self._listener.token_mask_T = self.token_mask(batch)
        self._listener.measures_logits = (self._seen_steps + 1) % self.every_n_steps == 0
        if self.drift_every:
            self._probe.offer(batch, "train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the step with its last micro-batch, and the window with its last step."""
        if self.load is None:
            return
        clock = TokenClock.of(trainer)
        if clock.state.steps == self._seen_steps:
            return
        self._seen_steps = clock.state.steps
        events, self._events = self._events, []
        if self._seen_steps % self.every_n_steps == 0:
            self._add_finished()
            self._add(self.load, events)
            self._end_window(trainer, pl_module, clock.tokens)
            return
        self._finished += events
        if len(self._finished) >= _MOST_EVENTS:
            self._add_finished()

    def _add(self, load: RouterLoad, events: list[RouterEvent]) -> None:
        assert self._step is not None
        self._step.add(events)
        load.update(self._step)
        self._step.clear()
        events.clear()

    def _add_finished(self) -> None:
        """Adds the steps of the window that were only noted so far: many small sums at once are cheaper."""
        assert self.load is not None
        self._add(self.load, self._finished)

    def _end_window(self, trainer: Trainer, pl_module: LightningModule, tokens: int) -> None:
        assert self.load is not None
        assert self._listener is not None
        self._windows += 1
        if self.drift_every and self._windows % self.drift_every == 0:
            self._measure_drift(trainer, pl_module)
        self._note_biases(self.load)
        sums = self.load.totals()
        self.load.reset()
        if not sums.scalars["passes"].any():
            return
        metrics = self._metrics(trainer, sums)
        values = summarize(metrics, "router/all")
        for layer in self._chosen_layers():
            for name in self.layer_metrics:
                if name in metrics:
                    values[f"router/layer_{layer}/{name}"] = float(metrics[name][layer])
        log_now(trainer, values)
        self._check_groups(trainer, sums)
        if self.alerts is not None:
            finite_L = torch.isfinite(sums.scalars["z_square"]) & torch.isfinite(sums.probability_sum_LE).all(-1)
            for title, text in self._alert_state.check(self.alerts, sums.counts_LE, metrics, finite_L).items():
                send_alert(trainer, title, text)
        self._keep(trainer, sums, tokens)

    def _metrics(self, trainer: Trainer, sums: LoadSums) -> dict[str, Tensor]:
        dims = getattr(trainer.strategy, "dims", None)
        size = self.expert_parallel_size or int(getattr(dims, "expert_parallel_size", 1))
        return sums.metrics(self._groups_L, size, self.capacity_factor)

    def _note_biases(self, load: RouterLoad) -> None:
        assert self._listener is not None
        for layer in range(len(self._listener.routers)):
            if (bias_E := self._listener.bias(layer)) is not None:
                load.set_bias(layer, bias_E)

    def _chosen_layers(self) -> list[int]:
        assert self._listener is not None
        layers = len(self._listener.routers)
        return np.unique(np.linspace(0, layers - 1, min(layers, self.max_layers)).round().astype(int)).tolist()

    def _check_groups(self, trainer: Trainer, sums: LoadSums) -> None:
        uneven = sums.uneven_groups(self._groups_L) if self.group_imbalance != "ignore" else {}
        if uneven:
            layer, counts_G = next(iter(uneven.items()))
            text = (
                f"the grouped router of layer {layer} gave its groups {counts_G.long().tolist()} tokens; "
                f"all must get the same ({len(uneven)} layers differ)"
            )
            if self.group_imbalance == "error":
                raise RuntimeError(f"{text}; RouterLoadMonitor(group_imbalance='alert') only reports it")
            send_alert(trainer, "router groups", text)

    # -- drift ---------------------------------------------------------------------------------------------------------

    def _measure_drift(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.load is not None
        assert self._listener is not None
        self._probe.make(trainer)
        if self._probe.batch is None:
            return
        self._listener.token_mask_T = self.token_mask(self._probe.batch)
        with self._listener.recorded_choices() as choices:
            self._probe.run(trainer, pl_module)
        sums = torch.zeros(2, len(self._listener.routers), dtype=torch.float64, device=pl_module.device)
        for layer, (ids_TK, mask_T) in choices.items():
            if layer in self._last_choices:
                drift_T = routing_drift(self._last_choices[layer], ids_TK)
                weight_T = torch.ones_like(drift_T) if mask_T is None else mask_T.to(drift_T.dtype)
                sums[0, layer], sums[1, layer] = (drift_T * weight_T).sum(), weight_T.sum()
            self._last_choices[layer] = ids_TK
        self.load.add_drift(*sums)

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the window of a validation."""
        if self.validation:
            self._start(pl_module)
            if self._validation_load is not None:
                self._validation_load.reset()
                self._validating = True
                assert self._listener is not None
                self._listener.measures_logits = True

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the first batch for the drift; prepares for the others."""
        if self.drift_every:
            self._probe.offer(batch, "validation")
        if self.validation and self._listener is not None:
            self._listener.token_mask_T = self.token_mask(batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Adds the batch."""
        if self._validating and self._validation_load is not None:
            self._add(self._validation_load, self._validation_events)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the window of the validation."""
        if not self._validating or self._validation_load is None:
            return
        self._validating = False
        if trainer.sanity_checking:
            return
        sums = self._validation_load.totals()
        if sums.scalars["passes"].any():
            metrics = self._metrics(trainer, sums)
            del metrics["max_violation_step"]
            for name, value in summarize(metrics, "router/val").items():
                pl_module.log(name, value, sync_dist=True)  # summed over ranks already: sync_dist only says so

    # -- pictures, file, checkpoint ------------------------------------------------------------------------------------

    def _file(self, trainer: Trainer) -> Path | None:
        return Path(trainer.default_root_dir) / self.path if self.path is not None else None

    def _keep(self, trainer: Trainer, sums: LoadSums, tokens: int) -> None:
        routed_L1 = sums.counts_LE.sum(-1, keepdim=True)
        if not trainer.is_global_zero or not bool((routed_L1 > 0).all()):
            return
        load_LE = (sums.counts_LE / routed_L1).numpy()
        self.history.add(tokens, load_LE)
        if self.heatmap_every and self._windows % self.heatmap_every == 0:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._log_heatmap(logger, load_LE, tokens, trainer.global_step)

    def _log_heatmap(self, logger: WandbLogger, load_LE: np.ndarray, tokens: int, step: int) -> None:
        import wandb

        from lit_interns1.reports.router_heatmap import router_heatmap

        columns: list[str | int] = ["tokens", "layer", *(f"expert_{e}" for e in range(load_LE.shape[1]))]
        rows = [[tokens, layer, *shares] for layer, shares in enumerate(load_LE.tolist())]
        picture = wandb.Image(router_heatmap(load_LE, f"Expert load after {tokens:,} tokens"))
        logger.log_metrics(
            {
                "router/heatmap": picture,  # type: ignore[dict-item]
                "router/expert_load": wandb.Table(columns=columns, data=rows),  # type: ignore[dict-item]
                "train/tokens": float(tokens),
            },
            step=step,
        )

    def _write(self, trainer: Trainer) -> None:
        file = self._file(trainer)
        if trainer.is_global_zero and file is not None:
            self.history.write(file)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the unfinished window of all ranks, without the step in progress, and writes the file."""
        self._write(trainer)
        if self.load is not None:
            self._add_finished()
            with self.load.sync_context():
                checkpoint[STATE_KEY] = {name: t.cpu().clone() for name, t in self.load.state_dict().items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the unfinished window; one rank holds it from now on."""
        self._restored = checkpoint.get(STATE_KEY)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file and stops listening."""
        self._write(trainer)
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops listening."""
        self._stop()


def summarize(metrics: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    """Mean and maximum over layers of every metric."""
    values = {}
    for name, values_L in metrics.items():
        known = values_L[~values_L.isnan()] if name in PARTIAL_METRICS else values_L
        if len(known):
            values[f"{prefix}/{name}_mean"] = float(known.mean())
            values[f"{prefix}/{name}_max"] = float(known.max())
    return values
