from itertools import product

import pytest
import torch
from torch.nn import functional as F

from lit_interns1_kernels import routed_swiglu as public
from lit_interns1_kernels.device import routed_swiglu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GROUPS = {
    "ragged": [3, 0, 70, 1, 0, 33],
    "one takes all": [0, 75, 0],
    "no rows": [0, 0],
}


def oracle(x, gate_up, down, index, groups, weight):
    """One expert after the other; differentiable, float64."""
    y, start = torch.zeros_like(x), 0
    for expert, size in enumerate(groups):
        part = slice(start, start + size)
        gate, up = (x[index[part]] @ gate_up[expert].T).chunk(2, dim=1)
        y = y.index_add(0, index[part], (F.silu(gate) * up) @ down[expert].T * weight[part, None])
        start += size
    return y


def case(groups, hidden, inner, dtype, tail, sources=41):
    generator = torch.Generator().manual_seed(0)
    end = sum(groups)

    def random(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x, gate_up = random(sources, hidden), random(len(groups), 2 * inner, hidden, scale=hidden**-0.5)
    down, weight = random(len(groups), hidden, inner, scale=inner**-0.5), random(end, dtype=torch.float32).abs()
    index = torch.randint(1, sources, (end,), generator=generator)  # source 0 has no rows
    weight = torch.cat([weight, torch.full((tail,), torch.nan)])
    index = torch.cat([index, torch.full((tail,), 1 << 40)])
    return x, gate_up, down, index, torch.tensor(groups).cumsum(0).int(), weight, random(sources, hidden)


FAST = [
    (torch.float32, "ragged", (40, 24), 9, True),
    (torch.float32, "one takes all", (37, 13), 0, True),
    (torch.float32, "no rows", (16, 8), 5, True),
    (torch.float32, "ragged", (37, 13), 9, False),
    (torch.bfloat16, "ragged", (72, 136), 9, True),
    (torch.bfloat16, "ragged", (37, 13), 0, True),
    (torch.bfloat16, "one takes all", (72, 136), 9, False),
    (torch.bfloat16, "no rows", (16, 8), 0, False),
    (torch.float16, "ragged", (72, 136), 0, True),
]
SLOW = [
    combination
    for combination in product(TOLERANCE, GROUPS, [(72, 136), (37, 13)], [0, 9], [True, False])
    if combination not in FAST
]


@pytest.mark.parametrize(
    ("dtype", "groups", "sizes", "tail", "deterministic"),
    FAST + [pytest.param(*combination, marks=pytest.mark.slow) for combination in SLOW],
    ids=str,
)
def test_forward_and_backward(dtype, groups, sizes, tail, deterministic):
    groups, (hidden, inner) = GROUPS[groups], sizes
    x, gate_up, down, index, offsets, weight, grad_y = case(groups, hidden, inner, dtype, tail)
    y, kept = routed_swiglu.forward(x, gate_up, down, index, offsets, weight, True, deterministic)
    end = sum(groups)
    leaves = [t.double().requires_grad_() for t in (x, gate_up, down, weight[:end])]
    expected = oracle(*leaves[:3], index[:end], groups, leaves[3])
    expected.backward(grad_y.double())

    def close(actual, expected):
        scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0.0)

    close(y, expected.detach())
    assert kept.shape == (len(index), 2 * inner)
    kept[end:] = torch.nan
    gradients = routed_swiglu.backward(grad_y, x, gate_up, down, index, offsets, weight, kept, deterministic)
    for ours, like, leaf in zip(gradients, (x, gate_up, down, weight), leaves, strict=True):
        assert (ours.dtype, ours.shape) == (like.dtype, like.shape)
        close(ours[:end] if like is weight else ours, leaf.grad)
    assert torch.equal(gradients[3][end:], torch.zeros(tail))
    assert (y[0] == 0).all()
    assert (gradients[0][0] == 0).all()


def test_projections_are_kept_on_demand_only():
    x, gate_up, down, index, offsets, weight, _ = case([5, 2], 16, 24, torch.float32, 0)
    y, kept = routed_swiglu.forward(x, gate_up, down, index, offsets, weight, True)
    same, nothing = routed_swiglu.forward(x, gate_up, down, index, offsets, weight, False)
    assert torch.equal(y, same)
    assert (kept.shape, nothing.shape) == ((7, 48), (0, 48))
    expected = torch.cat([x[index[:5]] @ gate_up[0].T, x[index[5:]] @ gate_up[1].T])
    torch.testing.assert_close(kept, expected)


def strided(x):
    return torch.stack([x, -x], dim=-1)[..., 0]


def test_strided_operands():
    x, gate_up, down, index, offsets, weight, _ = case([5, 2], 16, 24, torch.float32, 0)
    y, kept = routed_swiglu.forward(x, gate_up, down, index, offsets, weight, True)
    ones = torch.ones(len(x), 16)
    operands = [strided(operand) for operand in (x, gate_up, down, index, offsets, weight)]
    for deterministic in (True, False):
        torch.testing.assert_close(routed_swiglu.forward(*operands, True, deterministic), (y, kept))
    expected = routed_swiglu.backward(ones, x, gate_up, down, index, offsets, weight, kept)
    ours = routed_swiglu.backward(torch.ones(1, 1).expand(len(x), 16), *operands, kept)
    for left, right in zip(ours, expected, strict=True):
        assert torch.equal(left, right)


def test_operations_of_a_gpu_equal_those_of_a_cpu():
    *operands, grad_y = case([5, 0, 20, 2], 16, 24, torch.float32, 0)
    y, kept = public._fused(*operands, True)
    gradients = public._fused_backward(grad_y, *operands, kept)
    ours = public._fused._backend_fns["cuda"](*operands, True)
    torch.testing.assert_close(ours, (y, kept))
    torch.testing.assert_close(public._fused_backward._backend_fns["cuda"](grad_y, *operands, ours[1]), gradients)
