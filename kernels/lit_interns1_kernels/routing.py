"""Softmax router in one operation: probabilities, choice, weights, and the gradient of all three.

    p = softmax(z)          S = ∪ over G groups of the top K/G by p          w_i = s · p_i / Σ_{j∈S} p_j   (i ∈ S)
    topk, normalised:  ∂L/∂z = q ⊙ (u − ⟨u, q⟩)               q = softmax of z over S alone, 0 elsewhere
    topk, else:        ∂L/∂z = p ⊙ (u − ⟨u, p⟩)
    straight-through:  ∂L/∂z = (1/τ) p^τ ⊙ (u − ⟨u, p^τ⟩)     p^τ = softmax(z/τ)         arXiv 2603.25040 §2.2
    probabilities:     ∂L/∂z = p ⊙ (v − ⟨v, p⟩)               v = ∂L/∂p, added to one of the above

with u = s · ∂L/∂w on S, 0 elsewhere. Groups (arXiv 2603.25040 §2.1) are consecutive experts; with them the
sum has 1e-20 added.

Letters: T tokens, E experts, K choices per token, G groups.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_interns1_kernels.backends import runs_plainly, triton_target


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _choose(p_TE: Tensor, k: int, num_groups: int) -> Tensor:
    if num_groups == 1:
        return p_TE.topk(k, dim=-1).indices
    tokens, experts = p_TE.shape
    inside_TGK = p_TE.view(tokens, num_groups, experts // num_groups).topk(k // num_groups, dim=-1).indices
    first_G1 = torch.arange(0, experts, experts // num_groups, device=p_TE.device)[:, None]
    return (inside_TGK + first_G1).view(tokens, k)


def _route_torch(
    logits_TE: Tensor, k: int, num_groups: int, normalize: bool, scaling: float, replay_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p_TE = _wide(logits_TE).softmax(-1)
    if replay_TK is None:
        ids_TK = _choose(p_TE.detach(), k, num_groups)
    else:
        live_T1 = (replay_TK < 0).any(-1, keepdim=True)
        ids_TK = torch.where(live_T1, _choose(p_TE.detach(), k, num_groups), replay_TK.long())
    weights_TK = p_TE.gather(-1, ids_TK)
    if normalize:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + 1e-20 if num_groups > 1 else total_T1)
    return weights_TK * scaling, ids_TK, p_TE


def route_reference(
    logits_TE: Tensor, k: int, num_groups: int = 1, normalize: bool = True, scaling: float = 1.0,
    gradient: Literal["topk", "ste"] = "topk", temperature: float = 1.0, replay_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The form that must be equalled: plain operations, differentiated by autograd. Arguments as in `route`."""
    weights_TK, ids_TK, p_TE = _route_torch(logits_TE, k, num_groups, normalize, scaling, replay_TK)
    if gradient == "ste":
        surrogate_TK = (_wide(logits_TE) / temperature).softmax(-1).gather(-1, ids_TK) * scaling
        weights_TK = weights_TK.detach() + (surrogate_TK - surrogate_TK.detach())
    return weights_TK, ids_TK, p_TE


@torch.library.custom_op("lit_interns1::route", mutates_args=(), device_types="cpu")
def _route(
    logits_TE: Tensor, k: int, num_groups: int, normalize: bool, scaling: float, dense: bool, temperature: float,
    replay_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _route_torch(logits_TE, k, num_groups, normalize, scaling, replay_TK)


@_route.register_fake
def _(logits_TE, k, num_groups, normalize, scaling, dense, temperature, replay_TK):
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    weights_TK = logits_TE.new_empty((logits_TE.shape[0], k), dtype=dtype)
    return (
        weights_TK,
        torch.empty_like(weights_TK, dtype=torch.int64),
        logits_TE.new_empty(logits_TE.shape, dtype=dtype),
    )


@_route.register_kernel("cuda")
def _(logits_TE, k, num_groups, normalize, scaling, dense, temperature, replay_TK):
    if triton_target(logits_TE.device) is None or logits_TE.dtype == torch.float64:
        return _route_torch(logits_TE, k, num_groups, normalize, scaling, replay_TK)
    from lit_interns1_kernels.device import routing

    return routing.route(logits_TE, k, num_groups, normalize, scaling, replay_TK)


def _route_backward_torch(
    grad_weights_TK: Tensor, grad_p_TE: Tensor | None, logits_TE: Tensor, ids_TK: Tensor, p_TE: Tensor,
    scaling: float, dense: bool, temperature: float,
) -> Tensor:  # fmt: skip
    u_TK = grad_weights_TK * (scaling / temperature)
    if dense:
        d_TE = p_TE if temperature == 1.0 else (_wide(logits_TE) / temperature).softmax(-1)
        d_TK = d_TE.gather(-1, ids_TK) * u_TK
        grad_TE = (d_TE * -d_TK.sum(-1, keepdim=True)).scatter_add_(-1, ids_TK, d_TK)
    else:
        q_TK = _wide(logits_TE).gather(-1, ids_TK).softmax(-1)
        slope_TK = q_TK * (u_TK - (u_TK * q_TK).sum(-1, keepdim=True))
        grad_TE = torch.zeros_like(p_TE).scatter_add_(-1, ids_TK, slope_TK)
    if grad_p_TE is not None:
        grad_TE.add_(p_TE * (grad_p_TE - (grad_p_TE * p_TE).sum(-1, keepdim=True)))
    return grad_TE.to(logits_TE.dtype)


@torch.library.custom_op("lit_interns1::route_backward", mutates_args=(), device_types="cpu")
def _route_backward(
    grad_weights_TK: Tensor, grad_p_TE: Tensor | None, logits_TE: Tensor, ids_TK: Tensor, p_TE: Tensor,
    scaling: float, dense: bool, temperature: float,
) -> Tensor:  # fmt: skip
    return _route_backward_torch(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, scaling, dense, temperature)


@_route_backward.register_fake
def _(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, scaling, dense, temperature):
    return torch.empty_like(p_TE, dtype=logits_TE.dtype)


@_route_backward.register_kernel("cuda")
def _(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, scaling, dense, temperature):
    if triton_target(logits_TE.device) is None or logits_TE.dtype == torch.float64:
        return _route_backward_torch(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, scaling, dense, temperature)
    from lit_interns1_kernels.device import routing

    return routing.route_backward(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, scaling, dense, temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_TE, _, _, _, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, *output[1:])
    ctx.mark_non_differentiable(output[1])


def _differentiate(
    ctx: Any, grad_weights_TK: Tensor | None, _: Tensor | None, grad_p_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits_TE, ids_TK, p_TE = ctx.saved_tensors
    if grad_weights_TK is None and grad_p_TE is None:
        return (None,) * 8
    if grad_weights_TK is None:
        grad_weights_TK = p_TE.new_zeros(ids_TK.shape)
    grad_TE = _route_backward(grad_weights_TK, grad_p_TE, logits_TE, ids_TK, p_TE, *ctx.options)
    return grad_TE, *(None,) * 7


_route.register_autograd(_differentiate, setup_context=_save)


def route(
    logits_TE: Tensor,
    k: int,
    num_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
    gradient: Literal["topk", "ste"] = "topk",
    temperature: float = 1.0,
    replay_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses K of E experts for each token. Differentiable in the logits, through weights and probabilities.

    The order of a token's choices: group after group, best first inside a group. Equal probabilities: Triton kernels
    take the lower id first; elsewhere it is the order of `torch.topk`, which promises none.

    Args:
        logits_TE: (T, E) floating point. Everything is computed in float32 (float64 for float64).
        k: K.
        num_groups: G; K/G experts are chosen in each group of E/G consecutive experts.
        normalize: Divide the weights of a token by their sum.
        scaling: Multiplies the weights.
        gradient: "topk": through the chosen weights; "ste": straight-through, dense over all experts.
        temperature: τ of the straight-through gradient.
        replay_TK: (T, K) integer, distinct ids in [0, E) to use instead of choosing; a token with a negative one
            chooses live. Not checked against E.

    Returns:
        weights_TK: (T, K) float32 (float64 for float64).
        ids_TK: (T, K) int64.
        probabilities_TE: (T, E) as the weights.

    Raises:
        ValueError: If shapes do not fit together, or an option is out of its range.
    """
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE {tuple(logits_TE.shape)}, {logits_TE.dtype}: must be a floating-point matrix")
    experts = logits_TE.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k} must lie between 1 and the number of experts {experts}")
    if num_groups < 1 or k % num_groups or experts % num_groups:
        raise ValueError(f"num_groups = {num_groups} must divide k = {k} and the number of experts {experts}")
    if gradient not in ("topk", "ste"):
        raise ValueError(f"gradient = {gradient!r} must be 'topk' or 'ste'")
    if not temperature > 0.0:
        raise ValueError(f"temperature = {temperature} must be greater than 0")
    if replay_TK is not None and replay_TK.shape != (logits_TE.shape[0], k):
        raise ValueError(f"replay_TK {tuple(replay_TK.shape)} must be {(logits_TE.shape[0], k)}: tokens, choices")
    if runs_plainly(logits_TE, replay_TK):
        return _route_torch(logits_TE, k, num_groups, normalize, float(scaling), replay_TK)
    straight_through = gradient == "ste"
    dense, tau = straight_through or not normalize, float(temperature) if straight_through else 1.0
    return _route(logits_TE, k, num_groups, normalize, float(scaling), dense, tau, replay_TK)
