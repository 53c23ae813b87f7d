import pytest
import torch
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels.permute import (
    group_by_expert,
    group_by_expert_reference,
    inverse_order,
    permute_rows,
    unpermute_rows,
    unpermute_rows_reference,
)

OPS = torch.ops.lit_interns1


def routed(tokens=13, choices=3, experts=7, columns=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    ids_TK = torch.randint(0, experts, (tokens, choices), generator=generator)
    x_TD = torch.randn(tokens, columns, generator=generator, dtype=dtype)
    weights_TK = torch.rand(tokens, choices, generator=generator, dtype=dtype)
    return ids_TK, x_TD, weights_TK


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(0, 2, 3), (1, 1, 1), (50, 4, 256), (700, 8, 257)])
def test_grouping_is_stable(tokens, choices, experts, dtype):
    ids_TK, _, _ = routed(tokens, choices, experts)
    order_R, row_index_R, offsets_E = group_by_expert(ids_TK.to(dtype), experts)
    pairs = sorted((int(e), place) for place, e in enumerate(ids_TK.flatten()))
    assert order_R.tolist() == [place for _, place in pairs]
    assert row_index_R.tolist() == [place // choices for _, place in pairs]
    assert offsets_E.tolist() == [sum(e <= last for e, _ in pairs) for last in range(experts)]
    assert (order_R.dtype, row_index_R.dtype, offsets_E.dtype) == (torch.int64, torch.int64, torch.int32)
    for actual, expected in zip((order_R, row_index_R, offsets_E), group_by_expert_reference(ids_TK, experts)):
        assert torch.equal(actual, expected)
    inverse_TK = inverse_order(order_R, choices)
    assert torch.equal(order_R[inverse_TK], torch.arange(tokens * choices).view(tokens, choices))


def test_permute_then_unpermute_multiplies_by_the_sum_of_weights():
    ids_TK, x_TD, weights_TK = routed()
    order_R, row_index_R, offsets_E = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, 3)
    rows_RD = permute_rows(x_TD, row_index_R)
    assert torch.equal(rows_RD, x_TD[row_index_R])
    for end in (None, offsets_E):
        y_TD = unpermute_rows(rows_RD, inverse_TK, weights_TK, end)
        torch.testing.assert_close(y_TD, x_TD * weights_TK.sum(1, keepdim=True))
        torch.testing.assert_close(unpermute_rows(rows_RD, inverse_TK, None, end), 3.0 * x_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rows_are_summed_wide_with_wide_weights(dtype):
    ids_TK, x_TD, weights_TK = routed(dtype=torch.float32, columns=33)
    order_R, row_index_R, _ = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, 3)
    y_RD = x_TD[row_index_R].to(dtype)
    actual = unpermute_rows(y_RD, inverse_TK, weights_TK)
    exact = torch.einsum("tk,tkd->td", weights_TK.double(), y_RD.double()[inverse_TK])
    assert actual.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=0.51 * step + 1e-7, atol=4e-7)
    reference = unpermute_rows_reference(y_RD, inverse_TK, weights_TK)
    torch.testing.assert_close(actual, reference, rtol=2 * step, atol=4e-7)


@pytest.mark.parametrize("counted", [None, 0, 20])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(weighted, counted):
    ids_TK, x_TD, weights_TK = routed()
    order_R, row_index_R, _ = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, 3)
    offsets_E = None if counted is None else torch.tensor([3, counted], dtype=torch.int32)
    y_RD = torch.randn(len(order_R) + 2, 5, dtype=torch.float64, requires_grad=True)
    inputs = (y_RD, weights_TK.requires_grad_()) if weighted else (y_RD,)

    def unpermute(y_RD, weights_TK=None):
        return unpermute_rows(y_RD, inverse_TK, weights_TK, offsets_E)

    assert torch.autograd.gradcheck(unpermute, inputs)
    x_TD.requires_grad_()
    for inverse in (inverse_TK, None):
        assert torch.autograd.gradcheck(permute_rows, (x_TD, row_index_R, inverse))


def test_rows_behind_the_last_offset_may_hold_anything():
    ids_TK, x_TD, weights_TK = routed(dtype=torch.float32)
    order_R, row_index_R, _ = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, 3)
    end = torch.tensor([4, 25], dtype=torch.int32)
    y_RD = torch.randn(39, 5)
    y_RD[25:] = torch.nan
    y_RD.requires_grad_()
    weights_TK.requires_grad_()
    y_TD = unpermute_rows(y_RD, inverse_TK, weights_TK, end)
    assert y_TD.isfinite().all()
    y_TD.square().sum().backward()
    assert y_RD.grad.isfinite().all()
    assert not y_RD.grad[25:].any()
    assert weights_TK.grad.isfinite().all()
    assert not weights_TK.grad[inverse_TK >= 25].any()

    upstream_RD = torch.ones(39, 5)
    upstream_RD[25:] = torch.nan
    expected_T1 = (inverse_TK < 25).sum(1, keepdim=True).float()
    for inverse in (inverse_TK, None):
        x = x_TD.clone().requires_grad_()
        permute_rows(x, row_index_R, inverse, end).backward(upstream_RD)
        assert torch.equal(x.grad, expected_T1.expand(-1, 5))


def test_operations_are_registered_completely():
    ids_TK, x_TD, weights_TK = routed(dtype=torch.float32)
    torch.library.opcheck(OPS.group_by_expert.default, (ids_TK, 7))
    order_R, row_index_R, offsets_E = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, 3)
    y_RD = x_TD[row_index_R].requires_grad_()
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    torch.library.opcheck(OPS.permute_rows.default, (x_TD, row_index_R, inverse_TK, offsets_E))
    torch.library.opcheck(OPS.permute_rows.default, (x_TD, row_index_R, None, None))
    torch.library.opcheck(OPS.unpermute_rows.default, (y_RD, inverse_TK, weights_TK, offsets_E))
    torch.library.opcheck(OPS.unpermute_rows.default, (y_RD, inverse_TK, None, None))
    for weights in (weights_TK.detach(), None):
        arguments = (x_TD.detach(), y_RD.detach(), inverse_TK, weights, None)
        torch.library.opcheck(OPS.unpermute_rows_backward.default, arguments)


def layer(ids_TK, x_TD, weights_TK):
    order_R, row_index_R, offsets_E = group_by_expert(ids_TK, 7)
    inverse_TK = inverse_order(order_R, ids_TK.shape[1])
    rows_RD = permute_rows(x_TD, row_index_R, inverse_TK, offsets_E)
    return unpermute_rows(rows_RD.square(), inverse_TK, weights_TK, offsets_E)


def test_runs_on_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=False):
        ids_TK = torch.zeros(13, 3, dtype=torch.int64)
        x_TD = torch.zeros(13, 5, requires_grad=True)
        weights_TK = torch.zeros(13, 3, requires_grad=True)
        y_TD = layer(ids_TK, x_TD, weights_TK)
        y_TD.sum().backward()
        assert y_TD.shape == x_TD.grad.shape == (13, 5)
        assert weights_TK.grad.shape == (13, 3)


def test_fake_tensors_of_a_gpu_stay_there():
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        x_TD, weights_TK = torch.zeros(13, 5, device="cuda"), torch.zeros(13, 3, device="cuda")
        y_TD = layer(weights_TK.long(), x_TD, weights_TK)
        assert y_TD.device.type == "cuda"
        assert y_TD.shape == (13, 5)


def test_compiles_into_one_graph():
    ids_TK, x_TD, weights_TK = routed(dtype=torch.float32)
    inputs = (x_TD.requires_grad_(), weights_TK.requires_grad_())
    expected = layer(ids_TK, *inputs)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(ids_TK, *inputs)
    assert torch.equal(actual, expected)
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected))
    for a, e in zip(*gradients):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_by_expert(torch.tensor([[0, -1]]), 4), r"ids_TK has values from -1 to 0.*\[0, 4\)"),
        (lambda: group_by_expert(torch.tensor([[2, 4]]), 4), r"ids_TK has values from 2 to 4.*\[0, 4\)"),
        (lambda: group_by_expert(torch.tensor([2, 4]), 4), r"ids_TK \(2,\).*matrix of integers"),
        (lambda: group_by_expert(torch.zeros(2, 2), 4), r"ids_TK \(2, 2\), torch.float32.*integers"),
        (lambda: group_by_expert(torch.zeros(2, 2, dtype=torch.int64), 0), "num_experts = 0 must be at least 1"),
        (lambda: permute_rows(torch.zeros(3), torch.arange(3)), r"x_TD \(3,\)"),
        (
            lambda: permute_rows(torch.zeros(3, 2), torch.arange(3), torch.zeros(2, 1)),
            "inverse_TK.* 3 tokens",
        ),
        (lambda: unpermute_rows(torch.zeros(3, 2), torch.arange(3)), r"inverse_TK \(3,\)"),
        (lambda: unpermute_rows(torch.zeros(3, 2), torch.arange(3)[:, None], torch.ones(3)), r"weights_TK \(3,\)"),
        (lambda: unpermute_rows(torch.zeros(3, 2), torch.arange(4)[:, None]), "y_RD has 3 rows, inverse_TK names 4"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
