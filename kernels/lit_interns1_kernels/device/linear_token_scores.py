"""Kernels for a chunk of logits between its two matrix products: see `lit_interns1_kernels.linear_token_scores`.

Scores take one pass: maximum m, Σ e^(y−m) and Σ (y−m)·e^(y−m) are carried from block to block and rescaled when m
grows. The gradient takes the logits' place, so that a chunk exists once, in the dtype of the hidden states.

Letters as there: C tokens of the chunk, V vocabulary size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import tuned

_PASSES = [
    triton.Config({"BLOCK": 4096}, num_warps=8),
    triton.Config({"BLOCK": 8192}, num_warps=16),
    triton.Config({"BLOCK": 2048}, num_warps=4),
]
_GRADIENT_BLOCK = 2048
"""Not tuned: tuning would run the kernel several times on the same logits, which it overwrites."""


@tuned(_PASSES, key=["num_columns", "WITH_ENTROPY", "WITH_RANK"])
@triton.jit
def _score_kernel(
    logits_ptr, targets_ptr, logp_ptr, logsumexp_ptr, entropy_ptr, rank_ptr, num_columns, temperature,
    WITH_ENTROPY: tl.constexpr, WITH_RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_columns
    target = tl.load(targets_ptr + row)
    valid = target >= 0
    target_logit = tl.load(logits_ptr + target, mask=valid, other=float("inf")).to(tl.float32)
    maximum = tl.full((), float("-inf"), tl.float32)
    total, moment = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    larger = tl.zeros((), tl.int32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
        if WITH_RANK:
            larger += tl.sum((raw > target_logit).to(tl.int32), 0)
        y = raw / temperature
        grown = tl.maximum(maximum, tl.max(y, 0))
        base = tl.where(grown == float("-inf"), 0.0, grown)  # nothing but −inf so far
        e = tl.exp(y - base)
        shrink = tl.exp(maximum - base)
        if WITH_ENTROPY:
            carried = tl.where(total > 0, shrink * (moment + total * (maximum - base)), 0.0)
            moment = carried + tl.sum(tl.where(e == 0, 0.0, (y - base) * e), 0)
        total = shrink * total + tl.sum(e, 0)
        maximum = grown
    log_total = tl.log(total)
    tl.store(logsumexp_ptr + row, maximum + log_total)
    tl.store(logp_ptr + row, tl.where(valid, target_logit / temperature - maximum - log_total, 0.0))
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_total - moment / total)
    if WITH_RANK:
        tl.store(rank_ptr + row, larger.to(tl.int64))


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, logsumexp_ptr, slope_ptr, at_target_ptr, curve_ptr, entropy_ptr, num_columns, temperature,
    HAS_CURVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + row * num_columns + column
    mask = column < num_columns
    log_p = tl.load(place, mask=mask, other=0.0).to(tl.float32) / temperature - tl.load(logsumexp_ptr + row)
    p = tl.exp(log_p)
    slope = tl.load(slope_ptr + row)
    if HAS_CURVE:
        slope -= tl.load(curve_ptr + row) * (tl.where(p == 0, 0.0, log_p) + tl.load(entropy_ptr + row))
    at_target = tl.where(column == tl.load(targets_ptr + row), tl.load(at_target_ptr + row), 0.0)
    tl.store(place, (slope * p + at_target).to(logits_ptr.dtype.element_ty), mask=mask)


def score_rows(
    logits_CV: Tensor, targets_C: Tensor, temperature: float, entropy: bool, rank: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, logsumexp and, if asked for, entropy (float32) and rank (int64) of each row of untempered logits.

    Args:
        logits_CV: (C, V), contiguous.
        targets_C: (C,) int64; a negative one has logp 0 and rank 0.
        temperature: Divides the logits.
        entropy: Whether to give the entropy.
        rank: Whether to give the number of strictly larger logits.
    """
    rows, columns = logits_CV.shape
    logp_C, logsumexp_C = torch.empty((2, rows), dtype=torch.float32, device=logits_CV.device)
    entropy_C = torch.empty_like(logp_C) if entropy else None
    rank_C = torch.empty_like(logp_C, dtype=torch.int64) if rank else None
    if rows:
        _score_kernel[(rows,)](
            logits_CV, targets_C.contiguous(), logp_C, logsumexp_C, logp_C if entropy_C is None else entropy_C,
            targets_C if rank_C is None else rank_C, columns, temperature, WITH_ENTROPY=entropy, WITH_RANK=rank,
        )  # fmt: skip
    return logp_C, logsumexp_C, entropy_C, rank_C


def logit_gradient_(
    logits_CV: Tensor, targets_C: Tensor, logsumexp_C: Tensor, slope_C: Tensor, at_target_C: Tensor,
    temperature: float, curve_C: Tensor | None = None, entropy_C: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """p · (slope − curve · (log p + entropy)) + at_target · [v = target], in the memory of the untempered logits."""
    rows, columns = logits_CV.shape
    per_row = [
        slope_C if x is None else x.contiguous()  # a pointer is always passed; a missing one is not read
        for x in (targets_C, logsumexp_C, slope_C.contiguous(), at_target_C, curve_C, entropy_C)
    ]
    if rows:
        _gradient_kernel[(rows, triton.cdiv(columns, _GRADIENT_BLOCK))](
            logits_CV, *per_row, columns, temperature, HAS_CURVE=curve_C is not None, BLOCK=_GRADIENT_BLOCK
        )
    return logits_CV


def _builds() -> tuple[KernelBuild, ...]:
    builds = []
    rest = {"num_columns": "i32", "temperature": "fp32"}
    for dtype in ("bf16", "fp32"):
        for number, tile in enumerate(_PASSES):
            outputs = {"logp_ptr": "*fp32", "logsumexp_ptr": "*fp32", "entropy_ptr": "*fp32", "rank_ptr": "*i64"}
            builds.append(
                KernelBuild(
                    f"token_scores/{dtype}/{tile.kwargs['BLOCK']}",
                    _score_kernel.fn,
                    {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", **outputs, **rest},
                    {"WITH_ENTROPY": True, "WITH_RANK": True, **tile.kwargs},
                    undivided=("targets_ptr", "logp_ptr", "logsumexp_ptr", "entropy_ptr", "rank_ptr"),
                    options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                    extended=number > 0 or dtype != "bf16",
                )
            )
        names = ("logsumexp_ptr", "slope_ptr", "at_target_ptr", "curve_ptr", "entropy_ptr")
        builds.append(
            KernelBuild(
                f"logit_gradient/{dtype}/{_GRADIENT_BLOCK}",
                _gradient_kernel,
                {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", **dict.fromkeys(names, "*fp32"), **rest},
                {"HAS_CURVE": True, "BLOCK": _GRADIENT_BLOCK},
                undivided=("targets_ptr", *names),
                extended=dtype != "bf16",
            )
        )
    return tuple(builds)


BUILDS = _builds()
