from unittest.mock import Mock

import pytest
import torch

from lit_interns1_kernels import rms_norm as operation
from lit_interns1_kernels.device import rms_norm as device

# several blocks for a program, a ragged last one, widths between powers of two
CASES = [(1, 64), (37, 96), (300, 64), (2000, 32), (5, 1544), (70, 512), (3, 4096), (2, 7000)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


def between_nans(x):
    """A copy with NaN in the memory before and behind it."""
    room = torch.full((x.numel() + 128,), float("nan"), dtype=x.dtype)
    inside = room[64:-64].view(x.shape)
    inside.copy_(x)
    return inside


def arguments(rows, width, dtype, weight_dtype):
    torch.manual_seed(rows + width)
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, width)
    weight = (1 + 0.3 * torch.randn(width)).to(weight_dtype)
    grad = grad.to(torch.promote_types(dtype, weight_dtype))
    return between_nans(x), between_nans(weight), between_nans(grad)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "width"), CASES)
def test_forward_and_backward(rows, width, dtype, weight_dtype):
    x, weight, grad = arguments(rows, width, dtype, weight_dtype)
    eps = 1e-2
    wide_x, wide_weight = (t.double().requires_grad_() for t in (x, weight))
    normalised = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    expected = normalised * wide_weight
    expected_x, expected_weight = torch.autograd.grad(expected, [wide_x, wide_weight], grad.double())

    y, rstd = device.forward(x, weight, eps)
    dx, d_weight = device.backward(grad, x, weight, rstd)
    assert (y.dtype, dx.dtype, d_weight.dtype) == (grad.dtype, dtype, weight_dtype)
    step = torch.finfo(dtype).eps  # the interpreter truncates to bfloat16, so that a cast may cost a whole step
    torch.testing.assert_close(y.double(), expected, rtol=2 * step, atol=1e-6)
    torch.testing.assert_close(dx.double(), expected_x, rtol=2 * step, atol=1e-5)
    torch.testing.assert_close(
        d_weight.double(), expected_weight, rtol=torch.finfo(weight_dtype).eps, atol=1e-5 * rows**0.5
    )


def test_the_cast_comes_before_the_weight():
    x, weight, _ = arguments(40, 96, torch.float16, torch.float16)  # which the interpreter rounds as a GPU does
    y, rstd = device.forward(x, weight, 1e-6)
    assert torch.equal(y, (x.float() * rstd).half() * weight)
    assert not torch.equal(y, (x.float() * rstd * weight.float()).half())


def test_leading_dimensions_and_strides():
    x = torch.randn(6, 5, 3, 48).transpose(1, 2)
    weight = torch.randn(96)[::2]
    y, rstd = device.forward(x, weight, 1e-6)
    assert rstd.shape == (6, 3, 5, 1)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (48,), weight, 1e-6))
    grad = torch.randn(6, 48, 3, 5).permute(0, 2, 3, 1)
    dx, d_weight = device.backward(grad, x, weight, rstd)
    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.nn.functional.rms_norm(leaf_x, (48,), leaf_weight, 1e-6).backward(grad)
    torch.testing.assert_close(dx, leaf_x.grad)
    torch.testing.assert_close(d_weight, leaf_weight.grad, rtol=1e-5, atol=1e-5)


def test_no_rows():
    x, weight = torch.randn(0, 7, 48), torch.randn(48)
    y, rstd = device.forward(x, weight, 1e-6)
    dx, d_weight = device.backward(y, x, weight, rstd)
    assert y.shape == dx.shape == x.shape
    assert torch.equal(d_weight, torch.zeros(48))


def test_the_gradient_of_the_weight_is_reproducible_and_summed_in_float32():
    x, weight, grad = arguments(3000, 32, torch.bfloat16, torch.bfloat16)
    grad.fill_(1.0)
    x.fill_(1.0)
    _, rstd = device.forward(x, weight, 0.0)
    first, second = (device.backward(grad, x, weight, rstd)[1] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.float(), torch.full((32,), 3000.0), rtol=2**-7, atol=0.0)  # bf16 ends at 256


def test_what_is_registered_for_cuda(monkeypatch):
    x, weight, grad = arguments(5, 96, torch.float32, torch.float32)
    monkeypatch.setattr(operation, "triton_target", lambda device: "sm90")
    launched = []
    for name in ("forward", "backward"):
        launch = Mock(wraps=getattr(device, name))
        monkeypatch.setattr(device, name, launch)
        launched.append(launch)
    forward, backward = (op._backend_fns["cuda"] for op in (operation._rms_norm, operation._rms_norm_backward))
    y, rstd = forward(x, weight, 1e-6)
    torch.testing.assert_close((y, rstd), operation._forward(x, weight, 1e-6))
    expected = operation._backward(grad, x, weight, rstd)
    torch.testing.assert_close(backward(grad, x, weight, rstd), expected, rtol=1e-5, atol=1e-5)
    assert sum(launch.call_count for launch in launched) == 2
    y, rstd = forward(x.double(), weight, 1e-6)  # float64 and long rows stay with torch
    forward(torch.randn(1, device.MAX_WIDTH + 1), torch.randn(device.MAX_WIDTH + 1), 1e-6)
    assert rstd.dtype == torch.float64
    assert sum(launch.call_count for launch in launched) == 2
