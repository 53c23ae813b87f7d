"""Log-probabilities of given tokens under a linear head, without the (tokens × vocabulary) matrix.

    y_tv = h_t · W_v / τ          logsumexp_t = log Σ_v exp(y_tv)          logp_t = y_t,target − logsumexp_t
    p_tv = exp(y_tv − logsumexp_t)          entropy_t = −Σ_v p_tv log p_tv
    dL/dy_tv = p_tv · (g_lse − g_logp − g_entropy · (log p_tv + entropy_t)) + g_logp · [v = target_t]

Tokens go through in chunks whose logits fit a fixed budget; backward computes them again (four matrix products in all).
If the caller says beforehand what the loss will be, Σ_t w_t (−logp_t + z · logsumexp_t²) up to a scalar, the gradients
are made in forward while the chunk is there (three products); backward checks the promise and only scales. The idea is
that of Liger Kernel (arXiv 2410.10989, §3.2) and of `torch.nn.functional.linear_cross_entropy`. The latter is as fast,
but not used: it gives neither logsumexp, entropy nor rank per token, makes gradients in forward only for a plain sum
(no weights per token, no z-loss), and a second backward through it is an error. On a GPU with Triton, kernels
(`device.linear_token_scores`) do what lies between the matrix products, and logits stay in the dtype of their operands.

Letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_interns1_kernels.backends import triton_target

Scores = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""logp_T, logsumexp_T, entropy_T or None, rank_T or None."""

_WEIGHT_TILE_BYTES = 8 << 20


def _default_chunk_tokens(device_type: str, bytes_per_token: int) -> int:
    """How many tokens have logits at the same time."""
    if device_type == "cpu":
        # Larger chunks read and write the weight gradient less often. Beyond 128 rows MKL packs its operands into
        # some 20 MiB of its own, so that many rows are worth it only where they are short.
        size = max(min((56 << 20) // bytes_per_token, 128), (32 << 20) // bytes_per_token)
    else:
        size = (512 << 20) // bytes_per_token  # an accelerator wants larger products; not tuned
    return max(size - size % 16 if size > 16 else size, 1)


class _Plan(NamedTuple):
    temperature: float
    entropy: bool
    rank: bool
    z_loss: float
    chunk_tokens: int | None


def linear_token_scores(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    rank: bool = False,
    loss_weight_T: Tensor | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Scores:
    """Scores of the target tokens, differentiable with respect to `hidden_TD` and `weight_VD`.

    Args:
        hidden_TD: (T, D) floating point. Under autocast it and the weight are cast like the operands of a linear layer.
        weight_VD: (V, D), same dtype.
        targets_T: (T,) integer token ids; a negative one has logp 0, rank 0 and no gradient through logp.
        temperature: τ > 0, divides the logits.
        entropy: Also give the entropy of the tempered distribution, in nats.
        rank: Also give the number of tokens with a strictly larger logit than the target.
        loss_weight_T: (T,) w of the promised loss Σ w·(−logp) + z_loss·Σ w·logsumexp² (up to one scalar factor).
            Moves the work of backward into forward, at the price of holding both gradients in between. Any other
            loss is still differentiated exactly, only more slowly.
        z_loss: z of the promised loss.
        chunk_tokens: Tokens per chunk; default: as many as fit the budget of the device.

    Returns:
        logp_T, logsumexp_T and entropy_T in nats, float32 (float64 for float64 inputs), and rank_T int64.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or an option is out of its range.
    """
    _check(hidden_TD, weight_VD, targets_T, temperature, loss_weight_T, chunk_tokens)
    device = hidden_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_TD, weight_VD = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden_TD, weight_VD))
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden_TD has dtype {hidden_TD.dtype}, weight_VD has {weight_VD.dtype}: they must be equal")
    if loss_weight_T is not None:
        # float16: gradients without the loss scale would underflow, so they wait until it has arrived.
        usable = torch.is_grad_enabled() and hidden_TD.dtype != torch.float16
        loss_weight_T = loss_weight_T.detach() if usable else None
    plan = _Plan(float(temperature), entropy, rank, float(z_loss), chunk_tokens)
    with _no_autocast(hidden_TD):
        return _LinearTokenScores.apply(hidden_TD, weight_VD, targets_T.long(), loss_weight_T, plan)


def linear_token_scores_plain(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *,
    temperature: float = 1.0, entropy: bool = False, rank: bool = False,
) -> Scores:  # fmt: skip
    """The same scores from the whole (T, V) matrix of logits, written plainly: the form that must be equalled."""
    y_TV = F.linear(hidden_TD, weight_VD)
    y_TV = (y_TV if y_TV.dtype == torch.float64 else y_TV.float()) / temperature
    valid_T, target_T1 = targets_T >= 0, targets_T.clamp(min=0).long()[:, None]
    logp_TV = y_TV.log_softmax(-1)
    logp_T = torch.where(valid_T, logp_TV.gather(1, target_T1).squeeze(1), 0.0)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1) if entropy else None
    rank_T = (y_TV > y_TV.gather(1, target_T1)).sum(-1) * valid_T if rank else None
    return logp_T, y_TV.logsumexp(-1), entropy_T, rank_T


def _check(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float,
    loss_weight_T: Tensor | None, chunk_tokens: int | None,
) -> None:  # fmt: skip
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)} must be (tokens, hidden size) "
            "and (vocabulary, hidden size)"
        )
    for name, per_token in (("targets_T", targets_T), ("loss_weight_T", loss_weight_T)):
        if per_token is not None and per_token.shape != hidden_TD.shape[:1]:
            raise ValueError(f"{name} {tuple(per_token.shape)} must have one entry for each of {len(hidden_TD)} tokens")
    if targets_T.is_floating_point():
        raise ValueError(f"targets_T must hold integer token ids, got {targets_T.dtype}")
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature} must be finite and greater than 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1")


def _no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(like.device.type, enabled=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax and sums over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_kernels(like: Tensor) -> ModuleType | None:
    """The kernels that work on a chunk of logits, where they run."""
    if like.dtype == torch.float64 or triton_target(like.device) is None:
        return None
    from lit_interns1_kernels.device import linear_token_scores as kernels

    return kernels


class _Buffers:
    """Memory for the logits of one chunk, used again for every chunk. Kernels need neither width nor scratch."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, plan: _Plan, with_scratch: bool, for_kernels: bool = False
    ) -> None:
        vocabulary, dtype = weight_VD.shape[0], hidden_TD.dtype if for_kernels else _wide(hidden_TD.dtype)
        with_scratch = with_scratch and not for_kernels
        element_bytes = dtype.itemsize * (2 if with_scratch else 1)
        if hidden_TD.dtype != dtype:
            element_bytes += hidden_TD.dtype.itemsize  # the chunk once more, in low precision
        size = plan.chunk_tokens
        if size is None:
            size = _default_chunk_tokens(hidden_TD.device.type, vocabulary * element_bytes)
        self.chunk_tokens = max(min(size, hidden_TD.shape[0]), 1)
        self.logits_CV = torch.empty((self.chunk_tokens, vocabulary), dtype=dtype, device=hidden_TD.device)
        self.scratch_CV = torch.empty_like(self.logits_CV) if with_scratch else None

    def chunks(self, rows: Tensor | None, num_tokens: int) -> Iterator[slice | Tensor]:
        """`rows` (None = all tokens) in pieces that fit."""
        if rows is not None:
            yield from rows.split(self.chunk_tokens) if rows.numel() else ()
            return
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))

    def tempered_logits(self, hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
        """(C, V), in the buffer."""
        y_CV = self.logits_CV[: hidden_CD.shape[0]]
        if hidden_CD.dtype == y_CV.dtype:
            torch.mm(hidden_CD, weight_VD.t(), out=y_CV)
        else:
            y_CV.copy_(hidden_CD @ weight_VD.t())
        return y_CV if temperature == 1.0 else y_CV.div_(temperature)

    def scratch(self, num_tokens: int) -> Tensor:
        """(C, V), contents undefined."""
        assert self.scratch_CV is not None
        return self.scratch_CV[:num_tokens]


class _GradientSums:
    """Gradients of the hidden states and of the weight, added up chunk by chunk."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        self.operand_VD = weight_VD
        self.hidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype)) if needs_weight else None

    def add(self, rows: slice | Tensor, hidden_CD: Tensor, gradient_CV: Tensor) -> None:
        """Takes the gradient of the (untempered) logits of one chunk."""
        gradient_CV = gradient_CV.to(hidden_CD.dtype)
        if self.hidden_TD is not None:
            self.hidden_TD[rows] = gradient_CV @ self.operand_VD
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == hidden_CD.dtype:
            self.weight_VD.addmm_(gradient_CV.t(), hidden_CD)
            return
        tile = max(_WEIGHT_TILE_BYTES // (hidden_CD.shape[1] * hidden_CD.dtype.itemsize), 1)
        for start in range(0, self.weight_VD.shape[0], tile):
            self.weight_VD[start : start + tile].add_(gradient_CV[:, start : start + tile].t() @ hidden_CD)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients in the dtype of what they belong to; empties this object."""
        hidden_TD, weight_VD = self.hidden_TD, self.weight_VD
        self.hidden_TD = self.weight_VD = None
        return hidden_TD, None if weight_VD is None else weight_VD.to(self.operand_VD.dtype)


def _logit_gradient_(p_CV: Tensor, scale_C: Tensor, target_C: Tensor, at_target_C: Tensor) -> Tensor:
    """scale · p + at_target · [v = target], in the memory of `p_CV`."""
    return p_CV.mul_(scale_C[:, None]).scatter_add_(1, target_C[:, None], at_target_C[:, None])


def _promise_factor(received: list[tuple[Tensor | None, Tensor]]) -> float | None:
    """The f for which every received gradient is f times the promised one, within rounding; None if there is none."""
    got = torch.cat([torch.zeros_like(promised) if g is None else g.to(promised.dtype) for g, promised in received])
    promised = torch.cat([promised for _, promised in received])
    wide = promised.double()
    norm = wide.square().sum()
    factor = torch.where(norm > 0, (got.double() * wide).sum() / norm, 0.0)
    expected = factor * wide
    tolerance = 16 * torch.finfo(promised.dtype).eps
    kept = ((got.double() - expected).abs() <= tolerance * expected.abs()).all()  # False where something is not finite
    value, is_kept = torch.stack([factor, kept.double()]).tolist()
    return value if is_kept else None


class _LinearTokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weight_T: Tensor | None, plan: _Plan
    ) -> Scores:
        tokens, dtype = hidden_TD.shape[0], _wide(hidden_TD.dtype)
        valid_T, index_T = targets_T >= 0, targets_T.clamp(min=0)
        logp_T, logsumexp_T = (hidden_TD.new_empty(tokens, dtype=dtype) for _ in range(2))
        entropy_T = torch.empty_like(logp_T) if plan.entropy else None
        rank_T = torch.empty_like(targets_T) if plan.rank else None

        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        sums: _GradientSums | None = None
        active: Tensor | None = None
        weight_T = at_target_T = logp_T  # only read where there is a promise
        if loss_weight_T is not None and (needs_hidden or needs_weight):
            sums = _GradientSums(hidden_TD, weight_VD, needs_hidden, needs_weight)
            weight_T = loss_weight_T.to(dtype)
            at_target_T = torch.where(valid_T, -weight_T, 0.0)
            active = weight_T.nonzero().squeeze(1)  # the others need scores, but no gradient
        kernels = _row_kernels(hidden_TD)
        with_scratch = plan.entropy or plan.rank
        buffers = _Buffers(hidden_TD, weight_VD, plan, with_scratch, for_kernels=kernels is not None)

        def score_by(kernels: ModuleType, rows: slice | Tensor, sums: _GradientSums | None) -> None:
            hidden_CD, target_C = hidden_TD[rows], targets_T[rows]
            y_CV = buffers.tempered_logits(hidden_CD, weight_VD, 1.0)  # the kernels divide by the temperature
            scores = kernels.score_rows(y_CV, target_C, plan.temperature, plan.entropy, plan.rank)
            for score_T, score_C in zip((logp_T, logsumexp_T, entropy_T, rank_T), scores, strict=True):
                if score_T is not None:
                    score_T[rows] = score_C
            if sums is not None:
                slope_C = 2.0 * plan.z_loss * weight_T[rows] * scores[1] - at_target_T[rows]
                slope_C, at_target_C = slope_C / plan.temperature, at_target_T[rows] / plan.temperature
                kernels.logit_gradient_(y_CV, target_C, scores[1], slope_C, at_target_C, plan.temperature)
                sums.add(rows, hidden_CD, y_CV)

        def score(rows: slice | Tensor, sums: _GradientSums | None) -> None:
            if kernels is not None:
                return score_by(kernels, rows, sums)
            hidden_CD, target_C = hidden_TD[rows], index_T[rows]
            y_CV = buffers.tempered_logits(hidden_CD, weight_VD, plan.temperature)
            y_target_C1 = y_CV.gather(1, target_C[:, None])
            if rank_T is not None:
                # Compared into floats: a sum of bools would make an int64 copy. Exact below 2^24 entries.
                larger_CV = torch.gt(y_CV, y_target_C1, out=buffers.scratch(target_C.numel()))
                rank_T[rows] = larger_CV.sum(1).long() * valid_T[rows]
            maximum_C1 = y_CV.amax(1, keepdim=True)
            y_CV.sub_(maximum_C1)
            if entropy_T is None:
                e_CV = y_CV.exp_()
                total_C = e_CV.sum(1)
            else:
                e_CV = torch.exp(y_CV, out=buffers.scratch(target_C.numel()))
                total_C = e_CV.sum(1)
                entropy_T[rows] = total_C.log() - y_CV.mul_(e_CV).sum(1) / total_C
            log_total_C = total_C.log()
            logsumexp_C = maximum_C1.squeeze(1) + log_total_C
            logsumexp_T[rows] = logsumexp_C
            logp_T[rows] = torch.where(valid_T[rows], (y_target_C1 - maximum_C1).squeeze(1) - log_total_C, 0.0)
            if sums is not None:
                slope_C = 2.0 * plan.z_loss * weight_T[rows] * logsumexp_C - at_target_T[rows]
                scale_C = slope_C / (total_C * plan.temperature)
                _logit_gradient_(e_CV, scale_C, target_C, at_target_T[rows] / plan.temperature)
                sums.add(rows, hidden_CD, e_CV)

        if sums is None or active is None or active.numel() == tokens:
            for rows in buffers.chunks(None, tokens):
                score(rows, sums)
        else:
            for rows in buffers.chunks(active, tokens):
                score(rows, sums)
            for rows in buffers.chunks((weight_T == 0).nonzero().squeeze(1), tokens):
                score(rows, None)

        ctx.plan = plan
        # Not save_for_backward: backward takes these out, so that no second reference forces autograd to copy them.
        ctx.promised = None if sums is None else sums.result()
        ctx.save_for_backward(
            hidden_TD, weight_VD, targets_T, logsumexp_T, entropy_T, None if sums is None else loss_weight_T
        )
        ctx.set_materialize_grads(False)
        if rank_T is not None:
            ctx.mark_non_differentiable(rank_T)
        return logp_T, logsumexp_T, entropy_T, rank_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp_T: Tensor | None, grad_logsumexp_T: Tensor | None, grad_entropy_T: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_TD, weight_VD, targets_T, logsumexp_T, entropy_T, loss_weight_T = ctx.saved_tensors
        plan: _Plan = ctx.plan
        valid_T, index_T = targets_T >= 0, targets_T.clamp(min=0)
        if grad_logp_T is not None:
            grad_logp_T = torch.where(valid_T, grad_logp_T, 0.0)

        promised, ctx.promised = ctx.promised, None  # a second backward recomputes
        if promised is not None:
            weight_T = loss_weight_T.to(logsumexp_T.dtype)
            received = [
                (grad_logp_T, torch.where(valid_T, -weight_T, 0.0)),
                (grad_logsumexp_T, 2.0 * plan.z_loss * weight_T * logsumexp_T),
            ]
            if grad_entropy_T is not None:
                received.append((grad_entropy_T, torch.zeros_like(logsumexp_T)))
            factor = _promise_factor(received)
            if factor is not None:
                for gradient in promised:
                    if gradient is not None and factor != 1.0:
                        gradient.mul_(factor)
                return promised[0], promised[1], None, None, None
            del promised

        zero_T = torch.zeros_like(logsumexp_T)
        at_target_T = (zero_T if grad_logp_T is None else grad_logp_T) / plan.temperature
        slope_T = (zero_T if grad_logsumexp_T is None else grad_logsumexp_T) / plan.temperature - at_target_T
        curve_T = None if grad_entropy_T is None else grad_entropy_T / plan.temperature
        needed_T = (at_target_T != 0) | (slope_T != 0)
        if curve_T is not None:
            needed_T |= curve_T != 0
        active: Tensor | None = needed_T.nonzero().squeeze(1)
        if active is not None and active.numel() == targets_T.numel():
            active = None

        with _no_autocast(hidden_TD):
            kernels = _row_kernels(hidden_TD)
            buffers = _Buffers(hidden_TD, weight_VD, plan, curve_T is not None, for_kernels=kernels is not None)
            sums = _GradientSums(hidden_TD, weight_VD, *ctx.needs_input_grad[:2])
            for rows in buffers.chunks(active, targets_T.numel()):
                hidden_CD, target_C = hidden_TD[rows], index_T[rows]
                if kernels is not None:
                    y_CV = buffers.tempered_logits(hidden_CD, weight_VD, 1.0)
                    per_row = (None if x is None else x[rows] for x in (curve_T, entropy_T))
                    kernels.logit_gradient_(
                        y_CV, target_C, logsumexp_T[rows], slope_T[rows], at_target_T[rows], plan.temperature, *per_row
                    )
                    sums.add(rows, hidden_CD, y_CV)
                    continue
                y_CV = buffers.tempered_logits(hidden_CD, weight_VD, plan.temperature)
                log_p_CV = y_CV.sub_(logsumexp_T[rows][:, None])
                if curve_T is None:
                    gradient_CV = _logit_gradient_(log_p_CV.exp_(), slope_T[rows], target_C, at_target_T[rows])
                else:
                    p_CV = torch.exp(log_p_CV, out=buffers.scratch(target_C.numel()))
                    row_C1 = (slope_T[rows] - curve_T[rows] * entropy_T[rows])[:, None]
                    gradient_CV = log_p_CV.mul_(-curve_T[rows][:, None]).add_(row_C1).mul_(p_CV)
                    gradient_CV.scatter_add_(1, target_C[:, None], at_target_T[rows][:, None])
                sums.add(rows, hidden_CD, gradient_CV)
        return (*sums.result(), None, None, None)
