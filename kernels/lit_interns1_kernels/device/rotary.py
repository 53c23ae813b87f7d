"""Rotary positions on a GPU: one pass over the heads. `lit_interns1_kernels.rotary` has the formulas.

A program loads the table entries of a few tokens once, and goes over heads that share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import tuned


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_tokens, x_token_stride, x_head_stride,
    TABLES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    table = tl.program_id(1)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (tokens < num_tokens) & (columns < HALF)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    entries = (tokens * TABLES + table) * (2 * HALF) + columns
    cos_1 = tl.load(cos_ptr + entries, mask=mask, other=0.0).to(dtype).to(tl.float32)
    cos_2 = tl.load(cos_ptr + entries + HALF, mask=mask, other=0.0).to(dtype).to(tl.float32)
    sin_1 = tl.load(sin_ptr + entries, mask=mask, other=0.0).to(dtype).to(tl.float32)
    sin_2 = tl.load(sin_ptr + entries + HALF, mask=mask, other=0.0).to(dtype).to(tl.float32)
    first = tl.program_id(2) * BLOCK_HEADS
    for head in range(table * GROUP + first, table * GROUP + tl.minimum(first + BLOCK_HEADS, GROUP)):
        x_offsets = tokens * x_token_stride + head * x_head_stride + columns
        x_1 = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x_ptr + x_offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        # every product is rounded to the dtype of x before the sum
        if TRANSPOSED:
            turned_1, turned_2 = x_2 * sin_2, -x_1 * sin_1
        else:
            turned_1, turned_2 = -x_2 * sin_1, x_1 * sin_2
        y_1 = (x_1 * cos_1).to(dtype).to(tl.float32) + turned_1.to(dtype).to(tl.float32)
        y_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + turned_2.to(dtype).to(tl.float32)
        y_offsets = (tokens * (TABLES * GROUP) + head) * (2 * HALF) + columns
        tl.store(y_ptr + y_offsets, y_1.to(dtype), mask=mask)
        tl.store(y_ptr + y_offsets + HALF, y_2.to(dtype), mask=mask)


@triton.jit
def _table_gradients(
    grad_ptr, x_ptr, d_cos_ptr, d_sin_ptr, num_tokens, grad_token_stride, grad_head_stride, x_token_stride,
    x_head_stride, TABLES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    table = tl.program_id(1)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (tokens < num_tokens) & (columns < HALF)
    d_cos_1 = tl.zeros((BLOCK_TOKENS, BLOCK_HALF), tl.float32)
    d_cos_2 = tl.zeros((BLOCK_TOKENS, BLOCK_HALF), tl.float32)
    d_sin_1 = tl.zeros((BLOCK_TOKENS, BLOCK_HALF), tl.float32)
    d_sin_2 = tl.zeros((BLOCK_TOKENS, BLOCK_HALF), tl.float32)
    for head in range(table * GROUP, (table + 1) * GROUP):
        x_offsets = tokens * x_token_stride + head * x_head_stride + columns
        grad_offsets = tokens * grad_token_stride + head * grad_head_stride + columns
        x_1 = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x_ptr + x_offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        grad_1 = tl.load(grad_ptr + grad_offsets, mask=mask, other=0.0).to(tl.float32)
        grad_2 = tl.load(grad_ptr + grad_offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        d_cos_1 += grad_1 * x_1
        d_cos_2 += grad_2 * x_2
        d_sin_1 -= grad_1 * x_2
        d_sin_2 += grad_2 * x_1
    entries = (tokens * TABLES + table) * (2 * HALF) + columns
    dtype: tl.constexpr = d_cos_ptr.dtype.element_ty
    tl.store(d_cos_ptr + entries, d_cos_1.to(dtype), mask=mask)
    tl.store(d_cos_ptr + entries + HALF, d_cos_2.to(dtype), mask=mask)
    tl.store(d_sin_ptr + entries, d_sin_1.to(dtype), mask=mask)
    tl.store(d_sin_ptr + entries + HALF, d_sin_2.to(dtype), mask=mask)


_ROTATE = (
    triton.Config({"BLOCK_TOKENS": 4, "BLOCK_HEADS": 8}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_TOKENS": 8, "BLOCK_HEADS": 4}, num_warps=4, num_stages=2),
)
_GRADIENTS = (triton.Config({"BLOCK_TOKENS": 8}, num_warps=4, num_stages=2),)
_tuned_rotate = tuned(_ROTATE, ["TABLES", "GROUP", "HALF"])(_rotate)
_tuned_table_gradients = tuned(_GRADIENTS, ["TABLES", "GROUP", "HALF"])(_table_gradients)


def _sizes(x_THd: Tensor, table_TGd: Tensor) -> dict[str, int]:
    tables, half = table_TGd.shape[1], x_THd.shape[2] // 2
    return {
        "TABLES": tables,
        "GROUP": x_THd.shape[1] // tables,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
    }


def _with_contiguous_heads(x_THd: Tensor) -> Tensor:
    return x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()


def rotate(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor, transposed: bool) -> Tensor:
    """Heads rotated by their table, or the adjoint of that."""
    x_THd, cos_TGd, sin_TGd = _with_contiguous_heads(x_THd), cos_TGd.contiguous(), sin_TGd.contiguous()
    y_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    sizes = _sizes(x_THd, cos_TGd)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        blocks = triton.cdiv(x_THd.shape[0], meta["BLOCK_TOKENS"])
        return blocks, meta["TABLES"], triton.cdiv(meta["GROUP"], meta["BLOCK_HEADS"])

    if y_THd.numel():
        _tuned_rotate[grid](
            x_THd, cos_TGd, sin_TGd, y_THd, x_THd.shape[0], x_THd.stride(0), x_THd.stride(1), TRANSPOSED=transposed,
            **sizes,
        )  # fmt: skip
    return y_THd


def table_gradients(grad_THd: Tensor, x_THd: Tensor, cos_TGd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the cosine and the sine table, in the dtype of the table."""
    grad_THd, x_THd = _with_contiguous_heads(grad_THd), _with_contiguous_heads(x_THd)
    d_cos, d_sin = (torch.empty(cos_TGd.shape, dtype=cos_TGd.dtype, device=x_THd.device) for _ in range(2))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(x_THd.shape[0], meta["BLOCK_TOKENS"]), meta["TABLES"]

    if d_cos.numel():
        _tuned_table_gradients[grid](
            grad_THd, x_THd, d_cos, d_sin, x_THd.shape[0], *grad_THd.stride()[:2], *x_THd.stride()[:2],
            **_sizes(x_THd, cos_TGd),
        )  # fmt: skip
    return d_cos, d_sin


def _builds(x: str, tables: int, group: int, half: int, extended: bool) -> Iterator[KernelBuild]:
    sizes = {"TABLES": tables, "GROUP": group, "HALF": half, "BLOCK_HALF": triton.next_power_of_2(half)}
    integers = {"num_tokens": "i32", "x_token_stride": "i32", "x_head_stride": "i32"}
    pointers = {"x_ptr": x, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "y_ptr": x}
    name = f"{x[1:]}/{tables}x{group}x{2 * half}"

    def build(
        kind: str, kernel: Any, configuration: triton.Config, signature: dict[str, str], **more: bool
    ) -> KernelBuild:
        options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
        blocks = "x".join(str(size) for size in configuration.kwargs.values())
        constants = sizes | configuration.kwargs | more
        return KernelBuild(
            f"rotary/{kind}/{name}/{blocks}", kernel, signature, constants, ("num_tokens",), options,
            extended=extended or configuration not in (_ROTATE[0], _GRADIENTS[0]),
        )  # fmt: skip

    for configuration in _ROTATE:
        for transposed in (False, True):
            kind = "transposed" if transposed else "rotate"
            yield build(kind, _rotate, configuration, pointers | integers, TRANSPOSED=transposed)
    pointers = {"grad_ptr": x, "x_ptr": x, "d_cos_ptr": "*fp32", "d_sin_ptr": "*fp32"}
    integers |= {"grad_token_stride": "i32", "grad_head_stride": "i32"}
    for configuration in _GRADIENTS:
        yield build("table_gradients", _table_gradients, configuration, pointers | integers)


BUILDS: tuple[KernelBuild, ...] = (
    *_builds("*bf16", 8, 8, 64, False),
    *_builds("*fp32", 8, 8, 64, True),
    *_builds("*bf16", 1, 32, 48, True),
    *_builds("*fp32", 1, 32, 48, True),
)
