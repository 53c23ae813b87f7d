import pytest
import torch
from torch.nn import functional as F

from lit_interns1.nn.initialization import initialize_parameters
from lit_interns1.nn.moe import LocalDispatcher, MoEFeedForward, RoutedExperts, TopKRouter
from lit_interns1_kernels.routed_swiglu import routed_swiglu


def dense_oracle(x, gate_up, down, ids, weights):
    """Every expert on every token, in float64, then the chosen ones."""
    x, gate_up, down, weights = (t.double() for t in (x, gate_up, down, weights))
    gate, up = torch.einsum("td,eid->tei", x, gate_up).chunk(2, dim=-1)
    y = torch.einsum("tei,edi->ted", F.silu(gate) * up, down)
    mixture = torch.zeros(len(x), len(down), dtype=torch.float64).scatter_add(-1, ids, weights)
    return torch.einsum("ted,te->td", y, mixture)


def routing_case(name, tokens=37, experts=8, per_token=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "one expert gets everything":
        ids = torch.stack([torch.full((tokens,), 5), torch.full((tokens,), 2)], dim=1)
    elif name == "most experts empty":
        ids = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 7)], dim=1)
    elif name == "no tokens":
        ids = torch.zeros(0, per_token, dtype=torch.long)
    else:
        ids = torch.rand(tokens, experts, generator=generator).topk(per_token).indices
    return ids, torch.rand(len(ids), per_token, generator=generator)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "fused"])
@pytest.mark.parametrize("case", ["random", "one expert gets everything", "most experts empty", "no tokens"])
def test_values_and_gradients_equal_the_dense_computation(backend, case):
    ids, weights = routing_case(case)
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(len(ids), 16, generator=generator), torch.randn(8, 48, 16, generator=generator) / 4,
        torch.randn(8, 16, 24, generator=generator) / 4, weights,
    ]  # fmt: skip
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    oracle = [leaf.clone().requires_grad_() for leaf in leaves]
    x, gate_up, down, row_weights = ours
    rows = LocalDispatcher(8).dispatch(x, ids, row_weights)
    y = routed_swiglu(rows.x_SD, gate_up, down, rows.row_index_R, rows.offsets_E, rows.row_weight_R, backend=backend)
    expected = dense_oracle(oracle[0], oracle[1], oracle[2], ids, oracle[3])
    upstream = torch.randn(y.shape, generator=generator)
    y.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    for left, right in zip(ours, oracle, strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-5, rtol=1e-4)


class NaNBehindTheEnd(torch.autograd.Function):
    """What uninitialised memory may hold at its worst, in the output and in the gradient."""

    @staticmethod
    def forward(ctx, x, end):
        ctx.end = end
        return torch.cat([x[:end], torch.full_like(x[end:], torch.nan)])

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat([gradient[: ctx.end], torch.full_like(gradient[ctx.end :], torch.nan)]), None


def test_rows_behind_the_last_offset_neither_count_nor_poison(monkeypatch):
    ids, weights = routing_case("random")
    x = torch.randn(37, 16)
    experts = RoutedExperts(8, 16, 24, initializer_std=0.3)
    initialize_parameters(experts)

    def run(tail):
        experts.zero_grad()
        source, row_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        rows = LocalDispatcher(8).dispatch(source, ids, row_weights)
        rows.row_index_R = torch.cat([rows.row_index_R, torch.zeros(tail, dtype=torch.long)])
        tail_weights = torch.full((tail,), torch.nan, requires_grad=True)
        rows.row_weight_R = torch.cat([rows.row_weight_R, tail_weights])
        rows.has_tail = tail > 0
        y = experts(rows)
        y.square().sum().backward()
        assert torch.equal(tail_weights.grad, torch.zeros(tail))
        return [y.detach(), source.grad, row_weights.grad, *(p.grad.clone() for p in experts.parameters())]

    exact = run(0)
    grouped_mm = F.grouped_mm

    def uninitialised(rows, weight, offs):
        end = int(offs[-1])
        return NaNBehindTheEnd.apply(grouped_mm(NaNBehindTheEnd.apply(rows, end), weight, offs=offs), end)

    monkeypatch.setattr(F, "grouped_mm", uninitialised)
    for ours, expected in zip(run(50), exact, strict=True):
        torch.testing.assert_close(ours, expected)


def test_dispatch_groups_rows_by_expert_and_keeps_every_choice():
    ids, weights = routing_case("random", tokens=100)
    rows = LocalDispatcher(8).dispatch(torch.randn(100, 4), ids, weights)
    start = 0
    seen = []
    for expert, stop in enumerate(rows.offsets_E.tolist()):
        members = rows.row_index_R[start:stop].tolist()
        assert members == sorted(members)
        assert members == [t for t in range(100) if expert in ids[t].tolist()]
        seen += [(t, expert) for t in members]
        for t, w in zip(members, rows.row_weight_R[start:stop], strict=True):
            assert w == weights[t, ids[t].tolist().index(expert)]
        start = stop
    assert len(seen) == 200


def test_layer_is_router_dispatch_experts_and_combine():
    router = TopKRouter(16, 8, 2, initializer_std=0.5)
    layer = MoEFeedForward(router, RoutedExperts(8, 16, 24, initializer_std=0.3))
    initialize_parameters(layer)
    x = torch.randn(21, 16)
    y, routing = layer(x)
    expected = dense_oracle(x, layer.experts.gate_up_proj, layer.experts.down_proj, routing.ids_TK, routing.weights_TK)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_sizes_that_grouped_mm_cannot_take_are_refused_at_construction():
    with pytest.raises(ValueError, match="intermediate_size = 12 must be a multiple of 8"):
        RoutedExperts(8, 16, 12, backend="grouped_mm")
    RoutedExperts(8, 16, 12)
