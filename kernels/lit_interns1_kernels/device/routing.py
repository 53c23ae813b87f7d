"""Kernels of the softmax router, forward and backward: see `lit_interns1_kernels.routing`.

A program holds the whole rows of a block of tokens; a choice is K times the largest of what is left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild

_ENTRIES = 2048
"""Logits of a program: 16 per thread, so that the handful of arrays of that size stay in registers."""


@triton.jit
def _load_rows(ptr, token, expert, here, E: tl.constexpr):
    mask = here[:, None] & (expert < E)[None, :]
    return tl.load(ptr + token[:, None] * E + expert[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softmax(z, member):
    z = tl.where(member, z, float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _route_kernel(
    logits_ptr, replay_ptr, weights_ptr, ids_ptr, p_ptr, num_tokens, scaling,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, GROUPS: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_REPLAY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert, choice = tl.arange(0, E_PADDED), tl.arange(0, K_PADDED)
    here, exists = token < num_tokens, (expert < E)[None, :]
    p = _softmax(_load_rows(logits_ptr, token, expert, here, E), exists)
    place_TE = token[:, None] * E + expert[None, :]
    tl.store(p_ptr + place_TE, p, mask=here[:, None] & exists)

    place_TK, mask_TK = token[:, None] * K + choice[None, :], here[:, None] & (choice < K)[None, :]
    ids, chosen = tl.zeros((TOKENS, K_PADDED), tl.int32), tl.zeros((TOKENS, K_PADDED), tl.float32)
    if HAS_REPLAY:
        ids = tl.load(replay_ptr + place_TK, mask=mask_TK, other=0).to(tl.int32)
        live = tl.min(ids, 1) < 0
    # A candidate has 0 … 1 (2 if NaN: ids stay distinct and in range); what is taken, of another group, or no expert
    # has −1. There is always a candidate: K ≤ E, also inside a group.
    left = tl.where(exists, tl.where(p == p, p, 2.0), -1.0)
    for i in range(K):
        ranked = left
        if GROUPS > 1:
            ranked = tl.where((expert // (E // GROUPS) == i // (K // GROUPS))[None, :], left, -1.0)
        best = tl.argmax(ranked, 1, tie_break_left=True)
        at_i = (choice == i)[None, :]
        if HAS_REPLAY:
            best = tl.where(live, best, tl.sum(tl.where(at_i, ids, 0), 1))
        taken = expert[None, :] == best[:, None]
        ids = tl.where(at_i, best[:, None], ids)
        chosen = tl.where(at_i, tl.sum(tl.where(taken, p, 0.0), 1)[:, None], chosen)
        left = tl.where(taken, -1.0, left)

    if NORMALIZE:
        total = tl.sum(chosen, 1)
        if GROUPS > 1:
            total += 1e-20
        chosen = chosen / total[:, None]
    tl.store(weights_ptr + place_TK, chosen * scaling, mask=mask_TK)
    tl.store(ids_ptr + place_TK, ids.to(tl.int64), mask=mask_TK)


@triton.jit
def _route_backward_kernel(
    grad_weights_ptr, grad_p_ptr, logits_ptr, ids_ptr, p_ptr, out_ptr, num_tokens, scaling, temperature,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr,
    DENSE: tl.constexpr, HAS_GRAD_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E_PADDED)
    here, exists = token < num_tokens, (expert < E)[None, :]
    u = tl.zeros((TOKENS, E_PADDED), tl.float32)
    chosen = tl.zeros((TOKENS, E_PADDED), tl.int1)
    for k in range(K):
        at = expert[None, :] == tl.load(ids_ptr + token * K + k, mask=here, other=0).to(tl.int32)[:, None]
        grad = tl.load(grad_weights_ptr + token * K + k, mask=here, other=0.0).to(tl.float32)
        u += tl.where(at, (grad * scaling)[:, None], 0.0)
        chosen = chosen | at
    z = _load_rows(logits_ptr, token, expert, here, E) / temperature
    if DENSE:
        d = _softmax(z, exists)
    else:
        d = _softmax(z, chosen)
    out = d * (u - tl.sum(u * d, 1)[:, None]) / temperature
    if HAS_GRAD_P:
        p, v = _load_rows(p_ptr, token, expert, here, E), _load_rows(grad_p_ptr, token, expert, here, E)
        out += p * (v - tl.sum(v * p, 1)[:, None])
    place = out_ptr + token[:, None] * E + expert[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=here[:, None] & exists)


def _tile(experts: int) -> dict[str, int]:
    padded = triton.next_power_of_2(experts)
    return {"E": experts, "E_PADDED": padded, "TOKENS": max(min(_ENTRIES // padded, 64), 1)}


def route(
    logits_TE: Tensor, k: int, num_groups: int, normalize: bool, scaling: float, replay_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (T, K), ids (T, K) and probabilities (T, E): see `lit_interns1_kernels.routing.route`."""
    tokens, experts = logits_TE.shape
    tile = _tile(experts)
    weights_TK = torch.empty((tokens, k), dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    p_TE = torch.empty((tokens, experts), dtype=torch.float32, device=logits_TE.device)
    if tokens:
        _route_kernel[(triton.cdiv(tokens, tile["TOKENS"]),)](
            logits_TE.contiguous(), ids_TK if replay_TK is None else replay_TK.contiguous(), weights_TK, ids_TK, p_TE,
            tokens, scaling, K=k, K_PADDED=triton.next_power_of_2(k), GROUPS=num_groups, NORMALIZE=normalize,
            HAS_REPLAY=replay_TK is not None, **tile,
        )  # fmt: skip
    return weights_TK, ids_TK, p_TE


def route_backward(
    grad_weights_TK: Tensor, grad_p_TE: Tensor | None, logits_TE: Tensor, ids_TK: Tensor, p_TE: Tensor,
    scaling: float, dense: bool, temperature: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits (T, E), in their dtype; `dense`: softmax over all experts, not over the chosen ones."""
    tokens, experts = logits_TE.shape
    tile = _tile(experts)
    out_TE = torch.empty((tokens, experts), dtype=logits_TE.dtype, device=logits_TE.device)
    if tokens:
        _route_backward_kernel[(triton.cdiv(tokens, tile["TOKENS"]),)](
            grad_weights_TK.contiguous(), p_TE if grad_p_TE is None else grad_p_TE.contiguous(),
            logits_TE.contiguous(), ids_TK, p_TE, out_TE, tokens, scaling, temperature,
            K=ids_TK.shape[1], DENSE=dense, HAS_GRAD_P=grad_p_TE is not None, **tile,
        )  # fmt: skip
    return out_TE


def _builds() -> tuple[KernelBuild, ...]:
    builds = []
    for experts, groups, choices, dtype, extended in (
        (128, 1, 8, "fp32", False),
        (512, 8, 8, "fp32", True),
        (1024, 1, 16, "fp32", True),
        (128, 1, 8, "bf16", True),
    ):
        name, tile = f"{experts}/{groups}x{choices // groups}/{dtype}", _tile(experts)
        options = {"num_warps": 4, "num_stages": 2}
        signature = {
            "logits_ptr": f"*{dtype}", "replay_ptr": "*i16", "weights_ptr": "*fp32", "ids_ptr": "*i64",
            "p_ptr": "*fp32", "num_tokens": "i32", "scaling": "fp32",
        }  # fmt: skip
        constants = {"K": choices, "K_PADDED": choices, "GROUPS": groups, "NORMALIZE": True, "HAS_REPLAY": True}
        builds.append(
            KernelBuild(
                f"route/{name}",
                _route_kernel,
                signature,
                {**constants, **tile},
                ("num_tokens",),
                options,
                extended=extended,
            )
        )
        signature = {
            "grad_weights_ptr": "*fp32", "grad_p_ptr": "*fp32", "logits_ptr": f"*{dtype}", "ids_ptr": "*i64",
            "p_ptr": "*fp32", "out_ptr": f"*{dtype}", "num_tokens": "i32", "scaling": "fp32", "temperature": "fp32",
        }  # fmt: skip
        for dense in (True, False):
            builds.append(
                KernelBuild(
                    f"route_backward/{name}/{'dense' if dense else 'chosen'}",
                    _route_backward_kernel,
                    signature,
                    {"K": choices, "DENSE": dense, "HAS_GRAD_P": True, **tile},
                    ("num_tokens",),
                    options,
                    extended=extended or not dense,
                )
            )
    return tuple(builds)


BUILDS = _builds()
