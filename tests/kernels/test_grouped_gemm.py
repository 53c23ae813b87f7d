import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lit_interns1_kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference

GROUPS = {"ragged": [3, 0, 11, 1], "one takes all": [0, 15, 0], "no rows": [0, 0]}


def case(groups, *, tail=0, gather=False, dtype=torch.float64, sources=6, columns=5, depth=7):
    generator = torch.Generator().manual_seed(0)
    end = sum(groups)
    rows = sources if gather else end + tail
    a = torch.randn(rows, depth, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(groups), columns, depth, generator=generator, dtype=torch.float64)
    index = torch.cat([torch.randint(sources, (end,), generator=generator), torch.full((tail,), 1 << 40)])
    offsets = torch.tensor(groups).cumsum(0).int()
    return (
        a.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), offsets, index if gather else None,
    )  # fmt: skip


def oracle(a, weight, groups, tail, index):
    """Every row times every weight, and of these the right one."""
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    rows = a[: len(group)] if index is None else a[index[: len(group)]]
    every = torch.einsum("rk,enk->ren", rows, weight)
    return F.pad(every[torch.arange(len(group)), group], (0, 0, 0, tail))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("gather", [False, True])
def test_values_and_gradients(dtype, groups, tail, gather):
    groups = GROUPS[groups]
    a, weight, offsets, index = case(groups, tail=tail, gather=gather, dtype=dtype)
    c = grouped_gemm(a, weight, offsets, row_index=index)
    upstream = torch.randn(c.shape, dtype=torch.float64)
    wide_a, wide_weight = (x.detach().double().requires_grad_() for x in (a, weight))
    expected = oracle(wide_a, wide_weight, groups, tail, index)
    expected.backward(upstream.to(dtype).double())
    c.backward(upstream.to(dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    assert c.dtype == dtype
    for ours, right in ((c, expected), (a.grad, wide_a.grad), (weight.grad, wide_weight.grad)):
        torch.testing.assert_close(ours.double(), right, atol=tolerance, rtol=tolerance)
    reference = grouped_gemm_reference(a, weight, offsets, index)
    torch.testing.assert_close(c, reference, atol=tolerance, rtol=tolerance)


def test_rows_behind_the_end_may_hold_anything():
    groups = GROUPS["ragged"]
    a, weight, offsets, _ = case(groups, tail=4)
    poisoned = torch.where(torch.arange(len(a))[:, None] < sum(groups), a.detach(), torch.nan).requires_grad_()
    c = grouped_gemm(poisoned, weight, offsets)
    expected = grouped_gemm(a, weight, offsets)
    assert torch.equal(c, expected)
    upstream = torch.ones_like(c)
    upstream[sum(groups) :] = torch.nan
    c.backward(upstream)
    ours, weight.grad = weight.grad, None
    expected.backward(torch.ones_like(c))
    assert torch.equal(ours, weight.grad)
    assert torch.equal(poisoned.grad, a.grad)


@pytest.mark.parametrize("gather", [False, True])
def test_gradcheck(gather):
    a, weight, offsets, index = case(GROUPS["ragged"], tail=2, gather=gather)
    assert torch.autograd.gradcheck(lambda a, weight: grouped_gemm(a, weight, offsets, row_index=index), (a, weight))


@pytest.mark.parametrize("frozen", ["a", "weight"])
def test_only_the_gradients_that_are_wanted(frozen):
    a, weight, offsets, index = case(GROUPS["ragged"], gather=True)
    (a if frozen == "a" else weight).requires_grad_(False)
    c = grouped_gemm(a, weight, offsets, row_index=index)
    assert [saved is None for saved in c.grad_fn.saved_tensors[:2]] == [frozen == "weight", frozen == "a"]
    c.sum().backward()
    assert (a.grad is None, weight.grad is None) == (frozen == "a", frozen == "weight")


def test_transposed_weight():
    a, weight, offsets, _ = case(GROUPS["ragged"])
    stored = weight.detach().transpose(1, 2).contiguous()
    torch.testing.assert_close(grouped_gemm(a, stored.transpose(1, 2), offsets), grouped_gemm(a, weight, offsets))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("groups", ["ragged", "no rows"])
def test_operators_are_registered_well(gather, groups):
    a, weight, offsets, index = case(GROUPS[groups], tail=2, gather=gather, dtype=torch.float32)
    ops = torch.ops.lit_interns1
    torch.library.opcheck(ops.grouped_gemm.default, (a, weight, offsets, index))
    c = ops.grouped_gemm(a, weight, offsets, index).detach()
    torch.library.opcheck(ops.grouped_gemm_weight_gradient.default, (c, a.detach(), offsets, index))
    if gather:
        torch.library.opcheck(ops.sum_routed_rows.default, (c, index, offsets, len(a)))


@pytest.mark.parametrize("gather", [False, True])
def test_traces_without_data(gather):
    a, weight, offsets, index = case(GROUPS["ragged"], tail=2, gather=gather, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        a, weight, offsets = (mode.from_tensor(x) for x in (a, weight, offsets))
        index = mode.from_tensor(index) if gather else None
        c = grouped_gemm(a, weight, offsets, row_index=index)
        assert (c.shape, c.dtype) == ((17, 5), torch.bfloat16)
        c.sum().backward()
        assert (a.grad.shape, weight.grad.shape) == (a.shape, weight.shape)


def test_traces_without_a_gpu():
    ops = torch.ops.lit_interns1
    with FakeTensorMode():
        a, weight = torch.empty(6, 7, device="cuda"), torch.empty(4, 5, 7, device="cuda")
        offsets, index = (torch.empty(n, dtype=d, device="cuda") for n, d in ((4, torch.int32), (17, torch.int64)))
        c = grouped_gemm(a, weight, offsets, row_index=index)
        gradient = ops.grouped_gemm_weight_gradient(c, a, offsets, index)
        summed = ops.sum_routed_rows(c, index, offsets, 6)
        assert [tuple(x.shape) for x in (c, gradient, summed)] == [(17, 5), (4, 5, 7), (6, 5)]
        assert {x.device.type for x in (c, gradient, summed)} == {"cuda"}


def test_compiles_without_a_break():
    a, weight, offsets, index = case(GROUPS["ragged"], gather=True, dtype=torch.float32)
    expected = torch.autograd.grad(grouped_gemm(a, weight, offsets, row_index=index).square().sum(), (a, weight))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(a, weight):
        return grouped_gemm(a, weight, offsets, row_index=index).square().sum()

    for ours, right in zip(torch.autograd.grad(loss(a, weight), (a, weight)), expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_MK": torch.ones(15)}, r"a_MK \(15,\).*\(rows, depth\)"),
        ({"a_MK": torch.ones(15, 8)}, r"a_MK \(15, 8\) and weight_ENK \(4, 5, 7\)"),
        ({"a_MK": torch.ones(15, 7).half()}, "a_MK has dtype torch.float16, weight_ENK has torch.float32"),
        ({"offsets_E": torch.tensor([3, 3, 14, 15])}, "offsets_E.*int64.*int32"),
        ({"offsets_E": torch.tensor([3, 15]).int()}, r"offsets_E \(2,\).*4 groups"),
        ({"row_index": torch.zeros(15).int()}, "row_index.*int32.*int64"),
        ({"row_index": torch.zeros(15, 1).long()}, r"row_index \(15, 1\).*vector"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "a_MK": torch.ones(15, 7),
        "weight_ENK": torch.ones(4, 5, 7),
        "offsets_E": torch.tensor([3, 3, 14, 15]).int(),
    }
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**{**arguments, **change})
