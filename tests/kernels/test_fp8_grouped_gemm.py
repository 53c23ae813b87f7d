import random
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels import fp8_grouped_gemm as fp8_grouped_gemm_module
from lit_interns1_kernels.fp8_grouped_gemm import (
    fp8_grouped_gemm,
    fp8_grouped_linear,
    pad_groups,
    padding_saving,
    plan_stores,
)
from lit_interns1_kernels.fp8_quantize import dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128

E4M3 = torch.float8_e4m3fn
SIZES = [[5, 0, 33, 17], [1], [129], [0, 0, 64, 0], [0, 0], [128, 1, 127]]


def offsets_of(sizes):
    return torch.tensor(sizes).cumsum(0).int()


def data(sizes, columns=128, depth=256, tail=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes) + tail, depth, generator=generator)
    return x, torch.randn(len(sizes), columns, depth, generator=generator), offsets_of(sizes)


def exact(x, w, sizes):
    """Group by group with torch's own product, rows of the tail zero."""
    parts = [rows @ matrix.T for rows, matrix in zip(x[: sum(sizes)].split(sizes), w, strict=True)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - sum(sizes), w.shape[1])])


def relative_error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("rows", [*range(129), 129, 192, 255, 256, 300, 1000])
def test_stores_cover_exactly_the_rows_that_are_left(rows):
    stores = plan_stores(rows)
    covered = set()
    for offset, box in stores:
        assert box in {1, 2, 4, 8, 16, 32, 64, 128}
        covered |= set(range(offset, offset + box))
    assert covered == set(range(rows))
    assert len(stores) <= rows // 128 + 2


def test_planned_stores_of_a_remainder_overlap():
    # 125 rows: boxes of 64 from the start and up to the end, 3 rows twice; a power of two needs one box
    assert plan_stores(125) == [(0, 64), (61, 64)]
    assert plan_stores(253) == [(0, 128), (128, 64), (189, 64)]
    assert plan_stores(64) == [(0, 64)]
    with pytest.raises(ValueError, match="rows_left = -1"):
        plan_stores(-1)


def test_padding_saving():
    assert padding_saving([128, 256]) == 0.0
    assert padding_saving([1]) == 1 - 1 / 128
    assert padding_saving([64, 0, 192]) == pytest.approx(1 - 256 / 384)
    assert padding_saving([5, 3], block=4) == pytest.approx(1 - 8 / 12)
    assert padding_saving([0, 0]) == padding_saving([]) == 0.0
    with pytest.raises(ValueError, match=r"group_sizes \[3, -1\]"):
        padding_saving([3, -1])
    with pytest.raises(ValueError, match="block = 0"):
        padding_saving([3], block=0)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sum(sizes)], ids=str)
def test_gaussian_data_within_four_percent_of_float32(sizes, power_of_two):
    x, w, offsets = data(sizes, columns=200, depth=512)
    product = fp8_grouped_gemm(*quantize_1x128(x, power_of_two), *quantize_128x128(w, power_of_two), offsets)
    assert product.dtype == torch.bfloat16
    assert relative_error(product, exact(x, w, sizes)) < 0.04


@pytest.mark.parametrize("tail", [0, 7])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_product_of_what_the_operands_stand_for(sizes, tail):
    x, w, offsets = data(sizes, columns=200, tail=tail)
    a, a_scale = quantize_1x128(x)
    b, b_scale = quantize_128x128(w)
    a[sum(sizes) :], a_scale[sum(sizes) :] = float("nan"), float("nan")
    product = fp8_grouped_gemm(a, a_scale, b, b_scale, offsets)
    theirs = exact(dequantize_1x128(a, a_scale).double(), dequantize_128x128(b, b_scale).double(), sizes)
    # rounded once to bfloat16 (2^-9 of a value), after sums of float32
    torch.testing.assert_close(product.double(), theirs, rtol=2.0**-8, atol=1e-4)
    assert (product[sum(sizes) :] == 0).all()


def test_the_sum_over_a_block_is_rounded_once():
    # 448² + 127 · 2^-9 is 200704.248…; its neighbours in float32 are 2^-6 apart, so that the small terms would vanish
    # if they were added to the large one by one. The second block takes 448² away again
    a, b = torch.full((9, 256), 2.0**-5), torch.full((1, 8, 256), 2.0**-4)
    a[:, 0], a[:, 128], a[:, 129:] = 448.0, -448.0, 0.0
    b[..., 0], b[..., 128] = 448.0, 448.0
    scales = torch.ones(9, 2), torch.ones(1, 1, 2)
    product = fp8_grouped_gemm(a.to(E4M3), scales[0], b.to(E4M3), scales[1], offsets_of([9]))
    assert (product == 0.25).all()


@pytest.mark.parametrize("tail", [0, 7])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bit_equal_to_padded_groups(sizes, tail):
    x, w, offsets = data(sizes, tail=tail)
    x[sum(sizes) :] = float("nan")
    operands = (*quantize_1x128(x), *quantize_128x128(w), offsets)
    ours = fp8_grouped_gemm(*operands)
    assert not ours.isnan().any()
    assert torch.equal(ours, fp8_grouped_gemm(*operands, backend="padded"))


def test_neighbours_of_nan_and_other_groups_do_not_change_a_bit():
    sizes = [3, 0, 129, 40]
    x, w, offsets = data(sizes)
    a, a_scale = quantize_1x128(x)
    b, b_scale = quantize_128x128(w)
    whole = fp8_grouped_gemm(a, a_scale, b, b_scale, offsets)
    for group, end in enumerate(offsets.tolist()):
        start = end - sizes[group]
        other_a, other_a_scale = torch.full_like(a.float(), float("nan")).to(E4M3), torch.full_like(a_scale, 7.0)
        other_b, other_b_scale = torch.full_like(b.float(), float("nan")).to(E4M3), torch.full_like(b_scale, 7.0)
        other_a[start:end], other_a_scale[start:end] = a[start:end], a_scale[start:end]
        other_b[group], other_b_scale[group] = b[group], b_scale[group]
        for backend in ("reference", "padded"):
            part = fp8_grouped_gemm(other_a, other_a_scale, other_b, other_b_scale, offsets, backend=backend)
            assert torch.equal(part[start:end], whole[start:end])


def test_rows_of_a_group_may_change_places():
    sizes = [20, 30]
    x, w, offsets = data(sizes)
    order = torch.cat([torch.randperm(20), 20 + torch.randperm(30)])
    weights = quantize_128x128(w)
    straight = fp8_grouped_gemm(*quantize_1x128(x), *weights, offsets)
    assert torch.equal(fp8_grouped_gemm(*quantize_1x128(x[order]), *weights, offsets), straight[order])


def test_no_rows():
    x, w, offsets = data([0, 0])
    for backend in ("reference", "padded"):
        product = fp8_grouped_gemm(*quantize_1x128(x), *quantize_128x128(w), offsets, backend=backend)
        assert product.shape == (0, 128)


@pytest.mark.parametrize("exact_size", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padded_groups_hold_the_rows_at_multiples_of_128(sizes, exact_size):
    x, _, offsets = data(sizes, tail=3)
    a, a_scale = quantize_1x128(x)
    padded_sizes = [-(-size // 128) * 128 for size in sizes]
    padded = pad_groups(a, a_scale, offsets, sum(padded_sizes) if exact_size else None)
    assert padded.offsets_G.tolist() == torch.tensor(padded_sizes).cumsum(0).tolist()
    start = place = 0
    expected_a, expected_scale = torch.zeros(padded.a_PK.shape), torch.zeros(padded.a_scale.shape)
    for size, padded_size in zip(sizes, padded_sizes, strict=True):
        expected_a[place : place + size] = a[start : start + size].float()
        expected_scale[place : place + size] = a_scale[start : start + size]
        assert padded.row_M[start : start + size].tolist() == list(range(place, place + size))
        start, place = start + size, place + padded_size
    assert torch.equal(padded.a_PK.float(), expected_a)
    assert torch.equal(padded.a_scale, expected_scale)


def test_the_default_padding_holds_the_worst_case():
    for seed in range(20):
        draw = random.Random(seed)
        sizes = [draw.choice([0, 1, 128, draw.randrange(300)]) for _ in range(draw.randrange(1, 9))]
        a, a_scale = torch.zeros(sum(sizes), 128).to(E4M3), torch.zeros(sum(sizes), 1)
        padded = pad_groups(a, a_scale, offsets_of(sizes))
        assert padded.offsets_G[-1] <= padded.a_PK.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_its_gradients_against_float32(dtype):
    sizes = [40, 0, 129, 1]
    x, w, offsets = data(sizes, columns=384, depth=256)
    x, w = x.to(dtype), w.to(dtype)
    grad = torch.randn(sum(sizes), 384).to(dtype)
    ours = [t.clone().requires_grad_() for t in (x, w)]
    theirs = [t.float().requires_grad_() for t in (x, w)]
    product = fp8_grouped_linear(*ours, offsets)
    product.backward(grad)
    wanted = exact(*theirs, sizes)
    wanted.backward(grad.float())
    assert product.dtype == dtype
    # two quantised operands: 4 %; the gradient of the weight is not quantised
    assert 0.02 < relative_error(product, wanted) < 0.04
    assert 0.02 < relative_error(ours[0].grad, theirs[0].grad) < 0.04
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(ours[1].grad, theirs[1].grad) < limit
    assert (ours[1].grad[1] == 0).all()
    assert (ours[0].grad.dtype, ours[1].grad.dtype) == (dtype, dtype)


def test_linear_is_the_product_of_what_is_quantised():
    sizes = [40, 0, 129]
    x, w, offsets = data(sizes, columns=256)
    x.requires_grad_()
    product = fp8_grouped_linear(x, w, offsets, power_of_two_scales=True)
    a, b = quantize_1x128(x, True), quantize_128x128(w, True)
    assert torch.equal(product, fp8_grouped_gemm(*a, *b, offsets).float())
    grad = torch.randn_like(product)
    product.backward(grad)
    transposed = quantize_128x128(w.transpose(1, 2), True)
    assert torch.equal(x.grad, fp8_grouped_gemm(*quantize_1x128(grad, True), *transposed, offsets).float())


def test_rows_behind_the_groups_have_no_gradient_and_give_none():
    sizes = [40, 3]
    x, w, offsets = data(sizes, tail=5)
    x[43:] = float("nan")
    x.requires_grad_()
    w.requires_grad_()
    product = fp8_grouped_linear(x, w, offsets)
    grad = torch.randn_like(product)
    grad[43:] = float("nan")
    product.backward(grad)
    assert (product[43:] == 0).all()
    assert (x.grad[43:] == 0).all()
    torch.testing.assert_close(w.grad[1], grad[40:43].T @ x[40:43].detach())


def test_the_weight_gradient_of_a_gpu_is_that_of_bfloat16():
    sizes = [40, 0, 129, 1]
    x, _, offsets = data(sizes, tail=9)
    grad = torch.randn(x.shape[0], 384)
    x[170:], grad[170:] = float("nan"), float("nan")
    ours = fp8_grouped_gemm_module._weight_gradient_on_gpu(grad, x, offsets)
    parts = zip(grad[:170].split(sizes), x[:170].split(sizes), strict=True)
    theirs = torch.stack([g.bfloat16().float().T @ part.bfloat16().float() for g, part in parts])
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, rtol=2.0**-7, atol=1e-2)
    assert (ours[1] == 0).all()


@pytest.mark.parametrize(("need_x", "need_weight"), [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(need_x, need_weight):
    x, w, offsets = data([4, 6])
    x.requires_grad_(need_x)
    w.requires_grad_(need_weight)
    fp8_grouped_linear(x, w, offsets).sum().backward()
    assert (x.grad is not None, w.grad is not None) == (need_x, need_weight)


@pytest.mark.parametrize("backend", ["auto", "padded"])
def test_registered_operations(backend):
    x, w, offsets = data([4, 0, 6], depth=128, tail=2)
    operations = torch.ops.lit_interns1
    operands = (*quantize_1x128(x), *quantize_128x128(w), offsets)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    before = [operand.view(torch.uint8).clone() for operand in operands]
    torch.library.opcheck(operations.fp8_grouped_gemm.default, (*operands, backend), test_utils=checks)
    # that inputs are not written to cannot be left to opcheck: it does arithmetic that float8 does not have
    assert all(torch.equal(operand.view(torch.uint8), old) for operand, old in zip(operands, before, strict=True))
    arguments = (x.requires_grad_(), w.requires_grad_(), offsets, False, backend)
    torch.library.opcheck(operations.fp8_grouped_linear.default, arguments)
    backward = operations.fp8_grouped_linear_backward.default
    for need in ((True, True), (False, True), (True, False)):
        inputs = (torch.randn(12, 128), x.detach(), w.detach(), offsets, False, backend, *need)
        torch.library.opcheck(backward, inputs)


@pytest.mark.parametrize("backend", ["auto", "clipped", "ragged", "padded"])
def test_under_fake_tensors(backend):
    with FakeTensorMode():
        x, w = torch.empty(9, 256, requires_grad=True), torch.empty(2, 128, 256, requires_grad=True)
        offsets = torch.empty(2, dtype=torch.int32)
        product = fp8_grouped_gemm(*quantize_1x128(x), *quantize_128x128(w), offsets, backend=backend)
        assert (product.shape, product.dtype) == ((9, 128), torch.bfloat16)
        fp8_grouped_linear(x, w, offsets, backend=backend).sum().backward()
        assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)


def test_padding_reads_no_value():
    with FakeTensorMode():
        offsets = torch.empty(3, dtype=torch.int32)
        padded = pad_groups(torch.empty(300, 256, dtype=E4M3), torch.empty(300, 2), offsets)
        assert padded.a_PK.shape == (640, 256)


def test_compiles_whole():
    x, w, offsets = data([4, 0, 6])
    x.requires_grad_()
    compiled = torch.compile(fp8_grouped_linear, backend="aot_eager", fullgraph=True)
    product = compiled(x, w, offsets)
    assert torch.equal(product, fp8_grouped_linear(x, w, offsets))
    grad = torch.randn_like(product)
    (ours,) = torch.autograd.grad(product, x, grad)
    (theirs,) = torch.autograd.grad(fp8_grouped_linear(x, w, offsets), x, grad)
    assert torch.equal(ours, theirs)


def test_bad_input_is_named():
    x, w, offsets = data([4, 6])
    a, a_scale = quantize_1x128(x)
    b, b_scale = quantize_128x128(w)

    def refused(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            fp8_grouped_gemm(*operands, **options)

    refused("back-end 'tma' is unknown: choose one of auto, clipped", a, a_scale, b, b_scale, offsets, backend="tma")
    refused("'clipped' needs a GPU", a, a_scale, b, b_scale, offsets, backend="clipped")
    refused("'ragged' needs a GPU", a, a_scale, b, b_scale, offsets, backend="ragged")
    refused("a_MK has dtype torch.float32", x, a_scale, b, b_scale, offsets)
    refused(r"scale of a_MK \(10, 256\) has shape \(2, 10\)", a, a_scale.T.contiguous(), b, b_scale, offsets)
    refused(r"scale of b_GNK \(2, 128, 256\) has shape", a, a_scale, b, b_scale[:1], offsets)
    refused(r"b_GNK \(2, 128, 128\) must be \(groups, N, 256\)", a, a_scale, b[..., :128], b_scale[..., :1], offsets)
    refused("N = 100 must be a multiple of 8", a, a_scale, b[:, :100], b_scale, offsets)
    refused(r"offsets_G \(2,\) of torch.int64 must be", a, a_scale, b, b_scale, offsets.long())
    refused(r"offsets_G \(1,\) of torch.int32", a, a_scale, b, b_scale, offsets[:1])
    beyond = offsets + offsets.new_tensor([0, 1])
    refused(r"offsets_G \[4, 11\] must not .* beyond the 10 rows", a, a_scale, b, b_scale, beyond)
    refused(r"offsets_G \[10, 4\] must not decrease", a, a_scale, b, b_scale, offsets.flip(0))

    with pytest.raises(ValueError, match=r"weight_GNK \(2, 96, 256\): N = 96 must be a positive multiple of 128"):
        fp8_grouped_linear(x, w[:, :96], offsets)
    with pytest.raises(ValueError, match=r"weight_GNK \(2, 128, 130\): K = 130 must be"):
        fp8_grouped_linear(x[:, :130], w[..., :130], offsets)
    with pytest.raises(ValueError, match=r"x_MK \(10, 256\) and weight_GNK \(2, 128, 128\) must be"):
        fp8_grouped_linear(x, w[..., :128], offsets)
    with pytest.raises(ValueError, match=r"x_MK has dtype torch\.float64"):
        fp8_grouped_linear(x.double(), w, offsets)
    with pytest.raises(ValueError, match="'ragged' needs a GPU"):
        fp8_grouped_linear(x, w, offsets, backend="ragged")


def test_the_device_module_is_not_imported():
    code = "import lit_interns1_kernels.fp8_grouped_gemm, sys; print('lit_interns1_kernels.device' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
