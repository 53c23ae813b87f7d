import pytest
import torch
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels.rotary import rotary, rotary_reference


def arguments(tokens, heads, tables, width, dtype=torch.float64, table_dtype=None):
    """The two halves of a table differ, and they are no rotation."""
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, width).to(dtype)
    cos, sin = (torch.randn(tokens, tables, width).to(table_dtype or dtype) for _ in range(2))
    return x, cos, sin


def by_entries(x, cos, sin):
    """The formula, one entry after the other."""
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    half, group = width // 2, heads // cos.shape[1]
    for t in range(tokens):
        for h in range(heads):
            for j in range(half):
                c, s, v = cos[t, h // group], sin[t, h // group], x[t, h]
                y[t, h, j] = v[j] * c[j] - v[j + half] * s[j]
                y[t, h, j + half] = v[j + half] * c[j + half] + v[j] * s[j + half]
    return y


@pytest.mark.parametrize(("heads", "tables"), [(1, 1), (4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("form", [rotary, rotary_reference])
def test_every_entry(heads, tables, form):
    inputs = arguments(3, heads, tables, 6)
    torch.testing.assert_close(form(*inputs), by_entries(*inputs))


def test_a_rotation_is_a_complex_product():
    angle = torch.randn(9, 1, 8, dtype=torch.float64)
    x = torch.randn(9, 4, 16, dtype=torch.float64)
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotary(x, angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)), expected)


@pytest.mark.parametrize(("heads", "tables"), [(4, 1), (6, 2), (3, 3)])
def test_gradients_of_x_and_both_tables(heads, tables):
    inputs = [t.requires_grad_() for t in arguments(5, heads, tables, 8)]
    assert torch.autograd.gradcheck(rotary, inputs)
    grad = torch.randn(5, heads, 8, dtype=torch.float64)
    ours, plain = (torch.autograd.grad(form(*inputs), inputs, grad) for form in (rotary, rotary_reference))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_gradient_of_one_argument_alone(trained):
    inputs = list(arguments(5, 4, 2, 8))
    inputs[trained].requires_grad_()
    assert torch.autograd.gradcheck(rotary, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_forward_is_bit_equal_to_the_formula(dtype):
    for tables in (1, 3):
        inputs = arguments(50, 6, tables, 32, dtype, torch.float32)
        y = rotary(*inputs)
        assert y.dtype == dtype
        assert torch.equal(y, rotary_reference(*inputs))
        assert not torch.equal(y, rotary_reference(*(t.float() for t in inputs)).to(dtype))  # so the casts show


def test_low_precision_gradients():
    x, cos, sin = (t.requires_grad_() for t in arguments(30, 64, 1, 16, torch.bfloat16, torch.float32))
    grad = torch.randn(30, 64, 16).bfloat16()
    gradients = torch.autograd.grad(rotary(x, cos, sin), [x, cos, sin], grad)
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, cos, sin)]
    exact = torch.autograd.grad(rotary_reference(*wide), wide, grad.double())
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(gradients[0].double(), exact[0], rtol=2**-7, atol=2**-5)
    for gradient, wanted in zip(gradients[1:], exact[1:], strict=True):  # summed in float32
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-4)


def test_float32_strides_and_no_tokens():
    x, cos, sin = arguments(6, 4, 2, 16, torch.float32)
    expected = rotary_reference(x, cos, sin)
    torch.testing.assert_close(rotary(x, cos, sin), expected)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        y = rotary(strided, cos, sin)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
    x, cos, sin = (t.requires_grad_() for t in arguments(0, 4, 2, 16))
    gradients = torch.autograd.grad(rotary(x, cos, sin).sum(), [x, cos, sin])
    assert [g.shape for g in gradients] == [x.shape, cos.shape, sin.shape]


def test_x_is_kept_only_for_tables_that_are_trained():
    def kept(cos_trained):
        x, cos, sin = arguments(6, 4, 2, 16, torch.bfloat16, torch.float32)
        x.requires_grad_()
        cos.requires_grad_(cos_trained)
        pointers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pointers.append(t.data_ptr()) or t, lambda t: t):
            rotary(x, cos, sin)
        return sorted(pointers), sorted([cos.data_ptr(), sin.data_ptr()]), x.data_ptr()

    pointers, tables, _ = kept(False)
    assert pointers == tables
    pointers, tables, x = kept(True)
    assert pointers == sorted([*tables, x])


def test_registrations():
    for tables, dtype in [(1, torch.float32), (2, torch.bfloat16)]:
        x, cos, sin = arguments(5, 4, tables, 8, dtype, torch.float32)
        grad = torch.randn_like(x)
        torch.library.opcheck(torch.ops.lit_interns1.rotary_table_gradients.default, (grad, x, cos))
        for transposed in (False, True):
            inputs = (x.requires_grad_(), cos.requires_grad_(), sin.requires_grad_(), transposed)
            torch.library.opcheck(torch.ops.lit_interns1.rotary.default, inputs)


def test_fake_tensors_and_compile():
    with FakeTensorMode():
        inputs = [torch.empty(5, n, 8, requires_grad=True) for n in (4, 2, 2)]
        gradients = torch.autograd.grad(rotary(*inputs).sum(), inputs)
        assert [g.shape for g in gradients] == [t.shape for t in inputs]
    inputs = [t.requires_grad_() for t in arguments(5, 4, 2, 8, torch.float32)]
    torch._dynamo.reset()
    y, expected = torch.compile(rotary, backend="aot_eager", fullgraph=True)(*inputs), rotary(*inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


def test_second_derivatives_of_trained_tables_are_refused():
    x, cos, sin = (t.requires_grad_() for t in arguments(5, 4, 2, 8))
    (d_cos,) = torch.autograd.grad(rotary(x, cos, sin).square().sum(), cos, create_graph=True)
    with pytest.raises(RuntimeError, match="rotary_table_gradients"):
        d_cos.sum().backward()


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((5, 4), (5, 1, 8), (5, 1, 8), r"x_THd \(5, 4\)"),
        ((5, 4, 7), (5, 1, 7), (5, 1, 7), r"x_THd \(5, 4, 7\).*even width"),
        ((5, 4, 8), (5, 1, 4), (5, 1, 4), r"cos_TGd \(5, 1, 4\).*\(5, 4, 8\)"),
        ((5, 4, 8), (1, 1, 8), (1, 1, 8), r"cos_TGd \(1, 1, 8\)"),
        ((5, 4, 8), (5, 8), (5, 8), r"cos_TGd \(5, 8\)"),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8), r"cos_TGd \(5, 3, 8\).*multiple"),
        ((5, 4, 8), (5, 0, 8), (5, 0, 8), r"cos_TGd \(5, 0, 8\)"),
        ((5, 4, 8), (5, 2, 8), (5, 1, 8), r"sin_TGd \(5, 1, 8\)"),
    ],
)
def test_bad_shapes(x, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))


def test_bad_dtypes():
    x, cos, sin = arguments(5, 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"sin_TGd .*float64.*float32"):
        rotary(x, cos, sin.double())
    with pytest.raises(ValueError, match=r"x_THd .*int64"):
        rotary(x.long(), cos, sin)
