import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lit_interns1_kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(7, 32), (5, 6, 48), (2, 3, 4, 96), (33,), (300, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_torch_and_its_gradients(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    y, expected = rms_norm(x, weight, 1e-2), F.rms_norm(x, shape[-1:], weight, 1e-2)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y, [x, weight], grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, weight], grad))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x[..., :8], weight[:8]))


def test_float32_with_large_mean():
    """The kernel behind backward subtracts the mean of the gradient, which is put back."""
    torch.manual_seed(0)
    x = (torch.randn(64, 512) + 5).requires_grad_()
    weight = (torch.randn(512) + 3).requires_grad_()
    grad = torch.randn(64, 512) + 10
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(F.rms_norm(wide[0], (512,), wide[1], 1e-6), wide, grad.double())
    for gradient, exact in zip(torch.autograd.grad(rms_norm(x, weight), [x, weight], grad), expected, strict=True):
        assert (gradient - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_low_precision_forward_is_bit_equal_to_the_formula(dtype, weight_dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(50, 7, 64)).to(dtype)
    weight = torch.randn(64).to(weight_dtype or dtype)
    y = rms_norm(x, weight)
    assert y.dtype == (weight_dtype or dtype)
    assert torch.equal(y, rms_norm_reference(x, weight))
    late = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(dtype)
    assert weight_dtype or not torch.equal(y, late)  # so the place of the cast shows


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_gradients(weight_dtype):
    torch.manual_seed(0)
    x = torch.randn(2000, 64).bfloat16().requires_grad_()
    weight = torch.randn(64).to(weight_dtype).requires_grad_()
    grad = (torch.randn(2000, 64) + 1).to(weight_dtype)
    dx, d_weight = torch.autograd.grad(rms_norm(x, weight), [x, weight], grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(F.rms_norm(wide[0], (64,), wide[1], 1e-6), wide, grad.double())
    assert (dx.dtype, d_weight.dtype) == (torch.bfloat16, weight_dtype)
    torch.testing.assert_close(dx.double(), exact[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(d_weight.double(), exact[1], rtol=torch.finfo(weight_dtype).eps, atol=1e-3)


def test_weight_gradient_is_summed_in_float32():
    x, weight = torch.ones(3000, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    (d_weight,) = torch.autograd.grad(rms_norm(x, weight, 0.0).sum(), weight)
    assert torch.equal(d_weight, torch.full((32,), 3000.0).bfloat16())  # sums of ones in bfloat16 end at 256


def test_float32_forward_and_mixed_weight():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))
    assert rms_norm(x, weight.bfloat16()).dtype == torch.float32
    assert rms_norm(x, weight.double()).dtype == torch.float64
    expected = rms_norm_reference(x, weight.double())
    torch.testing.assert_close(rms_norm(x, weight.double()), expected, rtol=1e-6, atol=1e-6)


def test_strides_rows_of_zeros_and_no_rows():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 32, 5).transpose(1, 2).requires_grad_(), torch.randn(32, requires_grad=True)
    y = rms_norm(x, weight)
    torch.testing.assert_close(y, rms_norm_reference(x, weight))
    grad = torch.randn(5, 6, 32).transpose(0, 1)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, weight], grad),
        torch.autograd.grad(rms_norm_reference(x, weight), [x, weight], grad),
        rtol=1e-5,
        atol=1e-5,
    )
    zeros = torch.zeros(3, 32, requires_grad=True)
    (d_zeros,) = torch.autograd.grad(rms_norm(zeros, weight), zeros, torch.ones(3, 32))
    torch.testing.assert_close(d_zeros, (1e3 * weight.detach()).expand(3, 32), rtol=1e-6, atol=1e-3)
    empty = torch.zeros(0, 4, 32, requires_grad=True)
    dx, d_weight = torch.autograd.grad(rms_norm(empty, weight).sum(), [empty, weight])
    assert dx.shape == empty.shape
    assert torch.equal(d_weight, torch.zeros(32))


def test_only_x_and_one_number_a_row_are_kept():
    x, weight = torch.randn(50, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    assert sorted(t.numel() for t in kept) == [50, 64, 50 * 64]
    assert {x.data_ptr(), weight.data_ptr()} <= {t.data_ptr() for t in kept}


def test_registrations():
    for dtype, weight_dtype in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]:
        x = torch.randn(5, 3, 16).to(dtype).requires_grad_()
        weight = torch.randn(16, dtype=weight_dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.lit_interns1.rms_norm.default, (x, weight, 1e-6))
        y, rstd = torch.ops.lit_interns1.rms_norm(x.detach(), weight.detach(), 1e-6)
        inputs = (torch.randn_like(y), x.detach(), weight.detach(), rstd)
        torch.library.opcheck(torch.ops.lit_interns1.rms_norm_backward.default, inputs)


def test_fake_tensors_and_compile():
    with FakeTensorMode():
        x, weight = torch.empty(5, 3, 16, requires_grad=True), torch.empty(16, requires_grad=True)
        dx, d_weight = torch.autograd.grad(rms_norm(x, weight).sum(), [x, weight])
        assert (dx.shape, d_weight.shape) == (x.shape, weight.shape)
    x, weight = torch.randn(5, 3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x, weight), rms_norm(x, weight)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), [x, weight]), torch.autograd.grad(expected.square().sum(), [x, weight])
    )


def test_second_derivatives_are_refused():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(3, 16), torch.zeros(8), r"weight \(8,\) must be .* \(3, 16\)"),
        (torch.zeros(3, 16), torch.zeros(1, 16), r"weight \(1, 16\)"),
        (torch.zeros(()), torch.zeros(1), r"x \(\)"),
        (torch.zeros(3, 16, dtype=torch.int64), torch.zeros(16), r"x has dtype torch.int64"),
    ],
)
def test_bad_arguments(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight)


def test_kernels_are_not_imported():
    code = "import sys, lit_interns1_kernels.rms_norm, lit_interns1_kernels.rotary; "
    code += "assert 'lit_interns1_kernels.device' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
