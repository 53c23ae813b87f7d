"""LOMO and AdaLomo: stochastic gradient descent, and Adafactor's moments, fused into backward.

LOMO (arXiv 2306.09782)       θ ← θ − η (clip(g, ±c) + λ θ)
AdaLomo (arXiv 2310.10195)    r_t = β_t r_{t−1} + (1 − β_t) rowmean(g²),   c_t so of columns,   β_t = 1 − t^{−0.8}
                              u = g / √(r cᵀ / mean(r)),   u ← u / max(1, RMS(u) / d)
                              θ ← θ − η max(ε₂, RMS(θ)) (u + λ θ)

A matrix keeps one number per row and per column, a vector its whole v = mean of g². The last two dimensions of a larger
tensor are a matrix, those before count matrices: each expert of a stack has moments and RMS of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lit_interns1.optim.elementwise import local
from lit_interns1.optim.fused_backward import FusedBackwardOptimizer


def _check(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < 0:
            raise ValueError(f"{owner}.{name} must not be negative, got {value}")


class LOMO(FusedBackwardOptimizer):
    """Stochastic gradient descent without momentum, and without memory for gradients.

    Args:
        params: Parameters or groups of them.
        lr: η.
        weight_decay: λ.
        clip_value: c, the largest absolute value of an entry of the gradient (arXiv 2306.09782 §3.3.1); None: no limit.

    Raises:
        ValueError: If an option is out of range; and as `FusedBackwardOptimizer`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, clip_value: float | None = None
    ) -> None:
        _check("LOMO", lr=lr, weight_decay=weight_decay)
        if clip_value is not None and clip_value <= 0:
            raise ValueError(f"LOMO.clip_value must be positive or None, got {clip_value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip_value": clip_value})

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of gradient descent."""
        own = local(parameter)
        if group["clip_value"] is not None:
            gradient.clamp_(-group["clip_value"], group["clip_value"])
        if group["weight_decay"]:
            gradient.add_(own, alpha=group["weight_decay"])
        if own.dtype == gradient.dtype:
            own.add_(gradient, alpha=-group["lr"])
        else:
            own.copy_(own.to(gradient.dtype).add_(gradient, alpha=-group["lr"]))


class AdaLomo(FusedBackwardOptimizer):
    """Adaptive rates for the memory of two vectors per matrix.

    Rates are relative to the size of weights, so they are larger than AdamW's.

    Args:
        params: Parameters or groups of them.
        lr: η.
        weight_decay: λ.
        decay_rate: Exponent of β_t = 1 − t^decay_rate.
        clip_threshold: d, the largest RMS of u.
        eps: ε₁, added to g², and ε₂, the least RMS(θ) that counts.

    Raises:
        ValueError: If an option is out of range; and as `FusedBackwardOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
    ) -> None:
        _check("AdaLomo", lr=lr, weight_decay=weight_decay)
        if not -1.0 <= decay_rate < 0.0:
            raise ValueError(f"AdaLomo.decay_rate must lie in [-1, 0), got {decay_rate}")
        if clip_threshold <= 0 or min(eps) <= 0:
            raise ValueError(f"AdaLomo.clip_threshold = {clip_threshold} and eps = {tuple(eps)} must be positive")
        defaults = {"lr": lr, "weight_decay": weight_decay, "decay_rate": decay_rate}
        super().__init__(params, {**defaults, "clip_threshold": clip_threshold, "eps": tuple(eps)})

    def init_state(self, parameter: Tensor) -> None:
        """Zeros, divided as the parameter is; float32 at least."""
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        if parameter.ndim < 2:
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        else:
            state["exp_avg_sq_row"] = _zeros_without(parameter, parameter.ndim - 1)
            state["exp_avg_sq_column"] = _zeros_without(parameter, parameter.ndim - 2)

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step; ranks that share a matrix add up two small vectors."""
        state, own = self.state[parameter], local(parameter)
        state["step"] += 1
        weight = float(state["step"]) ** group["decay_rate"]  # 1 − β_t
        squares = gradient.square().add_(group["eps"][0])
        if parameter.ndim < 2:
            matrix = tuple(range(parameter.ndim))
            moment = local(state["exp_avg_sq"]).lerp_(squares, weight)
            update = gradient.mul_(moment.rsqrt())
        else:
            row_axis, column_axis = matrix = (parameter.ndim - 2, parameter.ndim - 1)
            rows, columns = (local(state[f"exp_avg_sq_{name}"]) for name in ("row", "column"))
            rows.lerp_(_mean(squares, parameter, (column_axis,)), weight)
            columns.lerp_(_mean(squares, parameter, (row_axis,)), weight)
            # the mean of rows is that of columns, and columns are more often whole on a rank
            over_columns = _sum_over_ranks(columns.sum(-1, keepdim=True), parameter, (column_axis,))
            mean = over_columns / parameter.shape[column_axis]
            update = gradient.mul_((rows / mean).rsqrt_().unsqueeze(-1)).mul_(columns.rsqrt().unsqueeze(-2))
        del squares
        weights = own.to(gradient.dtype)
        sizes = torch.stack([update.square().sum(matrix, keepdim=True), weights.square().sum(matrix, keepdim=True)])
        count = torch.Size(parameter.shape[axis] for axis in matrix).numel()
        update_rms, weight_rms = (_sum_over_ranks(sizes, parameter, matrix) / count).sqrt_()
        rate = group["lr"] * weight_rms.clamp_(min=group["eps"][1])
        update.mul_(rate / (update_rms / group["clip_threshold"]).clamp_(min=1.0))
        if group["weight_decay"]:
            update.add_(weights * (rate * group["weight_decay"]))
        weights.sub_(update)
        if weights is not own:
            own.copy_(weights)


def _divisions(parameter: Tensor) -> list[tuple[int, Placement]]:
    """Axes of the mesh that divide a parameter, and how."""
    if not isinstance(parameter, DTensor):
        return []
    return [
        (axis, placement)
        for axis, placement in enumerate(parameter.placements)
        if isinstance(placement, (Shard, _StridedShard))
    ]


def _sum_over_ranks(values: Tensor, parameter: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Adds up, in place, what ranks have summed over their parts of these dimensions of the parameter."""
    for axis, placement in _divisions(parameter):
        assert isinstance(parameter, DTensor)
        if placement.dim in dims and parameter.device_mesh.size(axis) > 1:  # type: ignore[attr-defined]
            dist.all_reduce(values, group=parameter.device_mesh.get_group(axis))
    return values


def _mean(squares: Tensor, parameter: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over one or more dimensions of the whole tensor, from this rank's part."""
    count = torch.Size(parameter.shape[dim] for dim in dims).numel()
    return _sum_over_ranks(squares.sum(dims), parameter, dims).div_(count)


def _zeros_without(parameter: Tensor, dim: int) -> Tensor:
    """Zeros of the parameter's shape without a dimension, divided as the others are."""

    def without(shape: torch.Size) -> torch.Size:
        return shape[:dim] + shape[dim + 1 :]

    own = local(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    zeros = torch.zeros(without(own.shape), dtype=dtype, device=own.device)
    if not isinstance(parameter, DTensor):
        return zeros
    placements: list[Placement] = [Replicate()] * parameter.device_mesh.ndim
    for axis, placement in _divisions(parameter):
        divided: int = placement.dim  # type: ignore[attr-defined]
        if divided > dim and isinstance(placement, _StridedShard):
            placement = _StridedShard(divided - 1, split_factor=placement.split_factor)
        elif divided > dim:
            placement = Shard(divided - 1)
        if divided != dim:
            placements[axis] = placement
    shape = without(parameter.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride)
