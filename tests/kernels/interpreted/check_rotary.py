from unittest.mock import Mock

import pytest
import torch

from lit_interns1_kernels import rotary as operation
from lit_interns1_kernels.device import rotary as device

# tokens, heads, tables, width: ragged token blocks, more heads than a block, widths between powers of two
CASES = [(1, 1, 1, 2), (5, 6, 2, 16), (9, 20, 1, 96), (6, 22, 2, 80), (3, 4, 4, 128), (4, 8, 1, 64)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def between_nans(x):
    """A copy with NaN in the memory before and behind it, and between the tokens."""
    tokens, heads, width = x.shape
    room = torch.full((tokens + 2, heads, width + 16), float("nan"), dtype=x.dtype)
    inside = room[1:-1, :, :width]
    inside.copy_(x)
    return inside


def arguments(tokens, heads, tables, width, dtype, table_dtype):
    """The two halves of a table differ, and they are no rotation."""
    torch.manual_seed(tokens * heads + width)
    x, grad = (between_nans(torch.randn(tokens, heads, width).to(dtype)) for _ in range(2))
    cos, sin = (torch.randn(tokens, tables, width).to(table_dtype) for _ in range(2))
    return x, cos, sin, grad


def plain(x, cos, sin):
    group = x.shape[1] // cos.shape[1]
    first, second = x.chunk(2, -1)
    return x * cos.repeat_interleave(group, 1) + torch.cat((-second, first), -1) * sin.repeat_interleave(group, 1)


@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "tables", "width"), CASES)
def test_forward_and_every_gradient(tokens, heads, tables, width, dtype, table_dtype):
    x, cos, sin, grad = arguments(tokens, heads, tables, width, dtype, table_dtype)
    wide = [t.to(dtype).double().requires_grad_() for t in (x, cos, sin)]
    expected = plain(*wide)
    expected_x, expected_cos, expected_sin = torch.autograd.grad(expected, wide, grad.double())

    step = torch.finfo(dtype).eps
    # of the two products, which may be larger than their sum; the interpreter truncates to bfloat16
    close = {"rtol": step, "atol": 4 * step * max(1.0, expected.abs().max().item())}
    y, dx = device.rotate(x, cos, sin, False), device.rotate(grad, cos, sin, True)
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(dx.double(), expected_x, **close)
    d_cos, d_sin = device.table_gradients(grad, x, cos)
    assert d_cos.dtype == d_sin.dtype == table_dtype
    step = torch.finfo(table_dtype).eps
    torch.testing.assert_close(d_cos.double(), expected_cos, rtol=step, atol=2e-5)
    torch.testing.assert_close(d_sin.double(), expected_sin, rtol=step, atol=2e-5)


def test_low_precision_rounds_both_products():
    x, cos, sin, _ = arguments(7, 6, 3, 32, torch.float16, torch.float32)  # which the interpreter rounds as a GPU does
    y = device.rotate(x, cos, sin, False)
    assert torch.equal(y, plain(x, cos.half(), sin.half()))
    assert not torch.equal(y, plain(x.float(), cos, sin).half())


def test_strides_and_no_tokens():
    x = torch.randn(4, 7, 32).transpose(0, 1)
    cos, sin = torch.randn(2, 7, 32).transpose(0, 1), torch.randn(7, 2, 64)[..., ::2]
    torch.testing.assert_close(device.rotate(x, cos, sin, False), plain(x, cos, sin))
    inner = torch.randn(7, 32, 4).transpose(1, 2)
    torch.testing.assert_close(device.rotate(inner, cos, sin, False), plain(inner, cos, sin))
    none = torch.randn(0, 4, 32)
    assert device.rotate(none, none[:, :2], none[:, :2], False).shape == none.shape
    assert device.table_gradients(none, none, none[:, :2])[0].shape == (0, 2, 32)


def test_what_is_registered_for_cuda(monkeypatch):
    x, cos, sin, grad = arguments(5, 6, 2, 16, torch.float32, torch.float32)
    monkeypatch.setattr(operation, "triton_target", lambda device: "sm90")
    launched = []
    for name in ("rotate", "table_gradients"):
        launch = Mock(wraps=getattr(device, name))
        monkeypatch.setattr(device, name, launch)
        launched.append(launch)
    rotate, gradients = (op._backend_fns["cuda"] for op in (operation._rotary, operation._rotary_table_gradients))
    for transposed in (False, True):
        expected = operation._rotate(x, cos, sin, transposed)
        torch.testing.assert_close(rotate(x, cos, sin, transposed), expected)
    torch.testing.assert_close(gradients(grad, x, cos), operation._table_gradients(grad, x, cos))
    assert sum(launch.call_count for launch in launched) == 3
    assert rotate(x.double(), cos, sin, False).dtype == torch.float64  # float64 stays with torch
    assert sum(launch.call_count for launch in launched) == 3
