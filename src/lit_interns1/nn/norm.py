"""Root-mean-square normalisation.

    y = w · cast(x₃₂ · rsqrt(mean(x₃₂²) + ε), dtype of x)

The statistics are float32 and the cast comes before the multiplication by w, as in Qwen3 (the order matters in bf16).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_interns1.nn.initialization import Constant, Distribution
from lit_interns1_kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned weight and no bias.

    Args:
        size: Length of the last dimension.
        eps: ε, added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def parameter_distribution(self, name: str) -> Distribution:
        """Ones."""
        return Constant(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) → (..., size), in the dtype to which those of `x` and the weight promote."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Shown by print()."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
