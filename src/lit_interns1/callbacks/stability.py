"""How parameters, gradients and features of each class of modules develop: signs of instability, and of learning.

With w the weights of a class, Δw what an optimizer step added, h the output of a module on a probe batch that stays the
same, x_rms = (mean x²)^{1/2}:
    weight_rms = w_rms     update_ratio = Δw_rms / w_rms     grad_norm = ‖g‖ of the class
    activation_rms = h_rms     feature_change = ‖h_t − h_0‖ / ‖h_0‖
    spike: ‖g‖ > μ + k σ of the last n measured steps

Under µP (arXiv 2203.03466) activation and update sizes after a few steps do not depend on the width.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lit_interns1.callbacks.probe_batch import ProbeBatch, ProbeSource
from lit_interns1.callbacks.skip_bad_steps import refuse_flat_parameters
from lit_interns1.callbacks.token_clock import TokenClock, log_now
from lit_interns1.nn.head import TokenScores
from lit_interns1.nn.moe import Routing
from lit_interns1.training import all_reduce_sum

PARAMETER_CLASSES: dict[str, str] = {
    r"norm": "norm",
    r"(embed_tokens|wte|word_embeddings)\.": "embedding",
    r"(lm_head|output_head)\.": "head",
    r"q_proj\.": "attention_q",
    r"k_proj\.": "attention_k",
    r"v_proj\.": "attention_v",
    r"o_proj\.": "attention_o",
    r"(router|mlp\.gate|mlp\.router)\.": "router",
    r"experts\.(.*\.)?(gate_up_proj|gate_proj|up_proj|w1|w3)": "expert_gate_up",
    r"experts\.(.*\.)?(down_proj|w2)": "expert_down",
    r"(gate_up_proj|gate_proj|up_proj|down_proj)\.": "feed_forward",
}
"""Class of a parameter by a regular expression that its name contains; the first that fits counts, else "other"."""

FEATURE_CLASSES: dict[str, str] = {
    r"(embed_tokens|wte|word_embeddings)$": "embedding",
    r"q_proj$": "attention_q",
    r"k_proj$": "attention_k",
    r"v_proj$": "attention_v",
    r"o_proj$": "attention_o",
    r"(router|mlp\.gate)$": "router",
    r"\.mlp$": "feed_forward",
    r"\.layers\.\d+$": "block",
    r"lm_head$": "head",
}
"""Class of a module whose output is looked at, as for parameters."""

_KEPT_ROWS = 1024


def class_of(name: str, patterns: Mapping[str, str]) -> str | None:
    """The class of the first pattern that the name contains."""
    return next((label for pattern, label in patterns.items() if re.search(pattern, name)), None)


def ranks_with_the_same(tensor: Tensor) -> int:
    """How many ranks hold the same part of a parameter: their sums must count once."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    parts = math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate))
    return world // parts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Σ over this rank's entries of x², float64."""
    norms = torch._foreach_norm([_local(t).detach().float() for t in tensors])
    return torch.stack([norm.double() for norm in norms]).square().sum()


def _share(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """This rank's share of Σ x² over all ranks."""
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(ranks_with_the_same(tensor), []).append(tensor)
    sums = [_square_sum(members) / ranks for ranks, members in groups.items()]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=device)


class StabilityDiagnostics(Callback):
    """Logs, every n optimizer steps, `stability/{metric}/{class}`; see the module's docstring for the metrics.

    Classes are embedding, head, norm, router, attention_q/k/v/o, expert_gate_up, expert_down, feed_forward and other;
    features also have block. At the end of the step that is measured the update needs a copy of the parameters of this
    rank; it is given back at once.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        classes: Regular expression → class, looked at before `PARAMETER_CLASSES`.
        features: Also run the probe batch: activation_rms, feature_change, and logits.
        feature_classes: Regular expression of module names → class, looked at before `FEATURE_CLASSES`.
        modules_per_class: At most so many modules of a class are looked at, evenly chosen. The first 1024 rows of their
            outputs at the start (of the process) are kept.
        probe: The batch: "train", "validation" (the first of each), or a function that makes one.
        probe_forward: Runs the module on it; default: `token_scores` of the module, else its `forward`.
        spike_sigma: k.
        spike_window: n.

    Logs besides: `stability/grad_spikes` (since the start of the run); on the probe batch, where a module shows them,
    `stability/logit_mean`, `logit_max` and `log_z` of the language-model head, and `stability/router_logit_mean` and
    `router_logit_max`.

    Raises:
        ValueError: If an option is out of range, or the strategy hides parameters.
    """

    reads_gradients = True

    def __init__(
        self,
        every_n_steps: int = 100,
        classes: dict[str, str] | None = None,
        features: bool = True,
        feature_classes: dict[str, str] | None = None,
        modules_per_class: int = 2,
        probe: ProbeSource = "train",
        probe_forward: Callable[[LightningModule, Any], Any] | None = None,
        spike_sigma: float = 4.0,
        spike_window: int = 1000,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps), ("modules_per_class", modules_per_class), ("spike_window", spike_window),
            ("spike_sigma", spike_sigma),
        ):  # fmt: skip
            if value <= 0:
                raise ValueError(f"StabilityDiagnostics.{name} must be positive, got {value}")
        self.every_n_steps, self.features, self.modules_per_class = every_n_steps, features, modules_per_class
        self.classes = {**(classes or {}), **PARAMETER_CLASSES}
        self.feature_classes = {**(feature_classes or {}), **FEATURE_CLASSES}
        self.spike_sigma, self.spike_window = spike_sigma, spike_window
        self._probe = ProbeBatch("StabilityDiagnostics", probe, probe_forward)
        self._norms: list[float] = []
        self._spikes = 0
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self._sums: dict[str, Tensor] = {}
        self._skipped = False
        self._initial: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks at the strategy."""
        refuse_flat_parameters("StabilityDiagnostics", trainer)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measures weights and gradients, and copies what the step will change."""
        if TokenClock.of(trainer).commit(trainer).steps % self.every_n_steps:
            return
        self._before, self._sums, self._skipped = {}, {}, True
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                label = class_of(name, self.classes) or "other"
                self._before.setdefault(label, []).append((parameter, _local(parameter).detach().clone()))
        for label, members in self._before.items():
            gradients = [parameter.grad for parameter, _ in members if parameter.grad is not None]
            self._skipped &= not gradients
            self._sums[label] = torch.stack(
                [_share([parameter for parameter, _ in members], pl_module.device), _share(gradients, pl_module.device)]
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures the update, and the features after it, and logs."""
        if not self._before:
            return
        rows, sizes = [], []
        for label, members in self._before.items():
            changes = [(p, _local(p).detach() - before) for p, before in members]
            update = torch.stack([_square_sum([change]) / ranks_with_the_same(p) for p, change in changes]).sum()
            rows.append(torch.cat([self._sums[label], update[None]]))
            sizes.append(sum(parameter.numel() for parameter, _ in members))
        labels, self._before, self._sums = list(self._before), {}, {}
        values: dict[str, float] = {}
        norms = []
        for label, size, (weight, gradient, update) in zip(
            labels, sizes, all_reduce_sum(torch.stack(rows)).sqrt().tolist(), strict=True
        ):
            values[f"stability/weight_rms/{label}"] = weight / math.sqrt(size)
            values[f"stability/update_ratio/{label}"] = update / weight if weight else 0.0
            values[f"stability/grad_norm/{label}"] = gradient
            norms.append(gradient)
        if not self._skipped:
            self._count_spike(math.hypot(*norms))
        values["stability/grad_spikes"] = float(self._spikes)
        if self.features:
            values |= self._measure_features(trainer, pl_module)
        log_now(trainer, values)

    def _count_spike(self, norm: float) -> None:
        history = self._norms
        if len(history) >= 10:
            limit = statistics.fmean(history) + self.spike_sigma * statistics.pstdev(history)
            self._spikes += not norm <= limit
        if math.isfinite(norm):
            self._norms = [*history, norm][-self.spike_window :]

    # -- features ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the probe batch, and the features before anything is learned."""
        if self.features and not self._initial:
            self._probe.make(trainer)
            self._probe.offer(batch, "train")
            if self._probe.batch is not None:
                self._measure_features(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the probe batch."""
        if self.features:
            self._probe.offer(batch, "validation")

    def _chosen_modules(self, pl_module: LightningModule) -> dict[str, list[tuple[str, nn.Module]]]:
        found: dict[str, list[tuple[str, nn.Module]]] = {}
        for name, module in pl_module.named_modules():
            if (label := class_of(name, self.feature_classes)) is not None:
                found.setdefault(label, []).append((name, module))
        return {label: _evenly(members, self.modules_per_class) for label, members in found.items()}

    def _measure_features(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        if self._probe.batch is None:
            return {}
        means: dict[str, list[Tensor]] = {}
        maxima: dict[str, Tensor] = {}

        def heard(label: str, name: str, output: Any) -> None:
            tensor = _first_tensor(output)
            if label == "head":
                _note_head(output, tensor, means, maxima)
                return
            if label == "router" and tensor is not None:
                means.setdefault("stability/router_logit_mean", []).append(tensor.double().mean())
                highest = tensor.double().amax()
                known = maxima.get("stability/router_logit_max", highest)
                maxima["stability/router_logit_max"] = torch.maximum(known, highest)
            if tensor is None or not tensor.is_floating_point():
                return
            means.setdefault(f"stability/activation_rms/{label}", []).append(tensor.double().square().mean().sqrt())
            rows = tensor.detach().flatten(0, -2)[:_KEPT_ROWS].float()
            if name not in self._initial:
                self._initial[name] = rows.clone()
            change = (rows - self._initial[name]).norm() / self._initial[name].norm().clamp(min=1e-30)
            means.setdefault(f"stability/feature_change/{label}", []).append(change.double())

        hooks = [
            module.register_forward_hook(
                lambda _module, _arguments, output, label=label, name=name: heard(label, name, output)
            )
            for label, members in self._chosen_modules(pl_module).items()
            for name, module in members
        ]
        try:
            self._probe.run(trainer, pl_module)
        finally:
            for hook in hooks:
                hook.remove()
        return _over_ranks(means, maxima, pl_module.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The norms that spikes are measured against, and the number of spikes."""
        return {"norms": self._norms, "spikes": self._spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self._norms, self._spikes = list(state_dict["norms"]), int(state_dict["spikes"])


def _evenly(members: list[Any], most: int) -> list[Any]:
    if len(members) <= most:
        return members
    return [members[round(i * (len(members) - 1) / max(1, most - 1))] for i in range(most)]


def _first_tensor(output: Any) -> Tensor | None:
    """What a module's output is looked at by: the logits of a router, else the first tensor."""
    if isinstance(output, Routing):
        return output.logits_TE
    if isinstance(output, (tuple, list)):
        return next((part for part in output if isinstance(part, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def _note_head(output: Any, logits: Tensor | None, means: dict[str, list[Tensor]], maxima: dict[str, Tensor]) -> None:
    """Logits of a head that returns them; of one that returns token scores, log Z."""
    if isinstance(output, TokenScores):
        means["stability/log_z"] = [output.logsumexp_T.double().mean()]
    elif logits is not None:
        means["stability/log_z"] = [torch.logsumexp(logits.float(), -1).double().mean()]
        means["stability/logit_mean"] = [logits.double().mean()]
        maxima["stability/logit_max"] = logits.double().amax()


def _over_ranks(
    means: Mapping[str, list[Tensor]], maxima: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """Means over ranks and modules, maxima over ranks; one all-reduce each."""
    values: dict[str, float] = {}
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if means:
        own = torch.stack([torch.stack(parts).mean() for parts in means.values()]).to(device)
        values |= dict(zip(means, (all_reduce_sum(own) / world).tolist(), strict=True))
    if maxima:
        highest = torch.stack(list(maxima.values())).to(device)
        if world > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        values |= dict(zip(maxima, highest.tolist(), strict=True))
    return values
