"""The routed experts of one layer: SwiGLU networks stored as two stacks.

    E_e(x) = W_down[e] ( silu(W_gate[e] x) ⊙ W_up[e] x )

Stacks have the experts in front, so expert parallelism shards dimension 0. Their products can be those of FP8 tensor
cores (Intern-S1-Pro: arXiv 2603.25040 §4.1); parameters stay what they are.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_interns1.nn.initialization import Distribution, Normal
from lit_interns1.nn.moe.dispatch import RoutedRows
from lit_interns1_kernels.fp8_routed_swiglu import fp8_routed_swiglu
from lit_interns1_kernels.routed_swiglu import ExpertBackend, check_grouped_mm_sizes, routed_swiglu

ExpertPrecision = Literal["native", "fp8", "fp8_power_of_two"]
"""What experts multiply: numbers of the model's type (or of autocast's); E4M3 numbers with a float32 scale per block of
128; the same with scales that are powers of two."""


class RoutedExperts(nn.Module):
    """E SwiGLU experts.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: I of one expert.
        backend: "auto" (the fastest that runs on the device), "fused", "grouped_mm" or "loop" (one expert after the
            other, the reference); see `lit_interns1_kernels.routed_swiglu`. For the precision "native" only.
        initializer_std: Standard deviation of the initial weights.
        precision: See `ExpertPrecision`; may be changed at any time between two steps (`nn.precision` does).

    Raises:
        ValueError: If a size does not suit the back-end, or an option is unknown.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int,
        backend: ExpertBackend = "auto", initializer_std: float = 0.02, precision: ExpertPrecision = "native",
    ) -> None:  # fmt: skip
        super().__init__()
        if backend not in get_args(ExpertBackend):
            raise ValueError(
                f"expert backend {backend!r} is unknown: choose one of {', '.join(get_args(ExpertBackend))}"
            )
        if precision not in get_args(ExpertPrecision):
            raise ValueError(
                f"expert precision {precision!r} is unknown: choose one of {', '.join(get_args(ExpertPrecision))}"
            )
        if backend == "grouped_mm" and (problem := check_grouped_mm_sizes(hidden_size, intermediate_size)):
            raise ValueError(f"expert backend 'grouped_mm': {problem}; change the size or choose backend 'auto'")
        self.num_experts, self.backend, self.initializer_std = num_experts, backend, initializer_std
        self.precision: ExpertPrecision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def parameter_distribution(self, name: str) -> Distribution:
        """Normal."""
        return Normal(self.initializer_std)

    def forward(self, rows: RoutedRows) -> Tensor:
        """Rows grouped by expert → (S, D), weighted and summed per source row."""
        # with expert parallelism a parameter is this rank's part of a DTensor over the expert axis
        gate_up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.gate_up_proj, self.down_proj))
        if torch.is_autocast_enabled(rows.x_SD.device.type):
            dtype = torch.get_autocast_dtype(rows.x_SD.device.type)
            rows.x_SD, gate_up, down = rows.x_SD.to(dtype), gate_up.to(dtype), down.to(dtype)
        if self.precision != "native":
            return fp8_routed_swiglu(
                rows.x_SD, gate_up, down, rows.row_index_R, rows.offsets_E, rows.row_weight_R,
                has_tail=rows.has_tail, power_of_two_scales=self.precision == "fp8_power_of_two",
            )  # fmt: skip
        return routed_swiglu(
            rows.x_SD, gate_up, down, rows.row_index_R, rows.offsets_E, rows.row_weight_R,
            has_tail=rows.has_tail, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shown by print()."""
        experts, hidden, intermediate = self.down_proj.shape
        form = f"backend={self.backend}" if self.precision == "native" else f"precision={self.precision}"
        return f"experts={experts}, hidden={hidden}, intermediate={intermediate}, {form}"
