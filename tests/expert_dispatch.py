"""What tests of token dispatch share: experts divided over ranks against all experts on one rank."""

import torch
import torch.distributed as dist

from lit_interns1.nn.moe import LocalDispatcher
from lit_interns1_kernels.routed_swiglu import routed_swiglu

EXPERTS, CHOICES, HIDDEN, INNER = 16, 8, 16, 8


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grouped_ids(tokens, groups, seed):
    """A grouped router's choice: group after group."""
    size = EXPERTS // groups
    scores = random(tokens, groups, size, seed=seed)
    return (scores.topk(CHOICES // groups).indices + torch.arange(groups)[:, None] * size).flatten(1)


def stacks(dtype=torch.float64):
    """Gate and up, and down projections of all experts."""
    gate_up, down = random(EXPERTS, 2 * INNER, HIDDEN, seed=1) / 4, random(EXPERTS, HIDDEN, INNER, seed=2) / 3
    return gate_up.to(dtype), down.to(dtype)


def differentiate(dispatcher, x, ids, weights, parts, direction, groups=1):
    """Output and the gradients of tokens, weights and experts."""
    x, weights, *parts = (t.detach().clone().requires_grad_() for t in (x, weights, *parts))
    started = {"started": dispatcher.start(x, groups)} if groups > 1 else {}
    rows = dispatcher.dispatch(x, ids, weights, **started)
    y = routed_swiglu(rows.x_SD, *parts, rows.row_index_R, rows.offsets_E, rows.row_weight_R)
    y = dispatcher.combine(y, rows.context)
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *parts], direction)]


def check(rank, world, dispatcher, ids, dtype=torch.float64, groups=1, tolerance=1e-12):
    """Against one rank with all experts; returns what the dispatcher gave."""
    tokens, choices = ids.shape
    x, direction = (random(tokens, HIDDEN, seed=10 * rank + i, dtype=dtype) for i in (3, 4))
    weights = random(tokens, choices, seed=10 * rank + 5, dtype=dtype).abs()
    whole = stacks(dtype)
    expected = differentiate(LocalDispatcher(EXPERTS), x, ids, weights, whole, direction)
    for gradient in expected[3:]:
        dist.all_reduce(gradient)
    mine = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    expected[3:] = [gradient[mine] for gradient in expected[3:]]
    actual = differentiate(dispatcher, x, ids, weights, [w[mine] for w in whole], direction, groups)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    return actual
