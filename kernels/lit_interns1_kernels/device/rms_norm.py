"""RMSNorm on a GPU: whole rows in registers. `lit_interns1_kernels.rms_norm` has the formulas.

Rows are short (a head) or long (the hidden size): a program takes as many rows as make a tile of a fixed size, with as
many warps as leave a thread 8 of its elements, 16 warps at most. So the launch follows from the width alone, and
nothing is tuned.
The gradient of the weight is summed per program, and over the programs in a fixed order: it is reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import persistent_programs

MAX_WIDTH = 8192
"""Longest row. Backward holds four tiles, and a longer row would not fit into the registers of one block."""

_TILE = 2048
_WARPS_PER_MULTIPROCESSOR = 32


@triton.jit
def _forward(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, num_rows, width, eps, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    normalised = (x * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + offsets, (normalised * weight[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, num_rows, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        normalised = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d_weight += grad * normalised
        grad *= weight[None, :]
        slope = tl.sum(grad * normalised, axis=1)[:, None] / width
        tl.store(dx_ptr + offsets, ((grad - normalised * slope) * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.sum(d_weight, axis=0)
    tl.store(partial_ptr + tl.program_id(0) * width + columns, partial, mask=columns < width)


def _shape(width: int) -> dict[str, Any]:
    """Tile and warps for rows of this width, and as many registers as the most warps may have.

    Without the last the assembler spills some, so that one more block fits on a multiprocessor.
    """
    block_width = triton.next_power_of_2(width)
    block_rows = max(_TILE // block_width, 1)
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": block_width,
        "num_warps": min(block_rows * block_width // 256, 16),
        **({"maxnreg": 128} if torch.version.hip is None else {}),
    }


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and ρ (..., 1) in float32. Width at most `MAX_WIDTH`."""
    width = x.shape[-1]
    x_RN = x.reshape(-1, width).contiguous()
    y_RN = torch.empty_like(x_RN, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows, shape = x_RN.shape[0], _shape(width)
    if rows:
        _forward[(triton.cdiv(rows, shape["BLOCK_ROWS"]),)](
            x_RN, weight.contiguous(), y_RN, rstd, rows, width, eps, **shape
        )
    return y_RN.view(x.shape), rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight, each in its dtype."""
    width = x.shape[-1]
    grad_RN, x_RN = (t.reshape(-1, width).contiguous() for t in (grad_y, x))
    dx_RN = torch.empty_like(x_RN)
    rows, shape = x_RN.shape[0], _shape(width)
    programs = persistent_programs(x.device) * (_WARPS_PER_MULTIPROCESSOR // shape["num_warps"])
    programs = min(programs, triton.cdiv(rows, shape["BLOCK_ROWS"]))
    partial_PN = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if rows:
        _backward[(programs,)](
            grad_RN, x_RN, weight.contiguous(), rstd.contiguous(), dx_RN, partial_PN, rows, width, **shape
        )
    return dx_RN.view(x.shape), partial_PN.sum(0).to(weight.dtype)


def _builds(name: str, x: str, weight: str, y: str, width: int, extended: bool) -> tuple[KernelBuild, KernelBuild]:
    shape = _shape(width)
    rest: dict[str, Any] = {
        "constants": {key: value for key, value in shape.items() if key.startswith("BLOCK")},
        "options": {key: value for key, value in shape.items() if not key.startswith("BLOCK")},
        "undivided": ("num_rows",),
        "extended": extended,
    }
    sizes = {"num_rows": "i32", "width": "i32"}
    forward = {"x_ptr": x, "weight_ptr": weight, "y_ptr": y, "rstd_ptr": "*fp32", **sizes, "eps": "fp32"}
    backward = {"grad_ptr": y, "x_ptr": x, "weight_ptr": weight, "rstd_ptr": "*fp32", "dx_ptr": x}
    return (
        KernelBuild(f"rms_norm/forward/{name}/{width}", _forward, forward, **rest),
        KernelBuild(
            f"rms_norm/backward/{name}/{width}", _backward, backward | {"partial_ptr": "*fp32"} | sizes, **rest
        ),
    )


_WIDTHS = tuple(1 << exponent for exponent in range(5, MAX_WIDTH.bit_length()))
BUILDS: tuple[KernelBuild, ...] = (
    *_builds("bf16", "*bf16", "*bf16", "*bf16", 4096, False),
    *(b for width in _WIDTHS if width != 4096 for b in _builds("bf16", "*bf16", "*bf16", "*bf16", width, True)),
    *(b for width in (64, 512, MAX_WIDTH) for b in _builds("fp32", "*fp32", "*fp32", "*fp32", width, True)),
    *(b for width in (128, MAX_WIDTH) for b in _builds("bf16-fp32", "*bf16", "*fp32", "*fp32", width, True)),
    *_builds("fp16", "*fp16", "*fp16", "*fp16", 2048, True),
)
