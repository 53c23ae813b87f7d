import pytest
import torch

from lit_interns1_kernels import fp8_quantize
from lit_interns1_kernels.device.fp8_quantize import quantize_1x128, quantize_128x128

E4M3 = torch.float8_e4m3fn


def with_margin(shape, dtype, like=None):
    """Memory of this shape with NaN in front and behind (filled with `like`); gives it and the check of the margins."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 512,), float("nan"), dtype=torch.float32).to(dtype)
    inner = whole[256 : 256 + size].view(shape)
    if like is not None:
        inner.copy_(like)

    def untouched():
        return bool(whole[:256].float().isnan().all() and whole[256 + size :].float().isnan().all())

    return inner, untouched


def blockwise(x, rows, power_of_two):
    """The definition, block by block in a plain loop: q before it is rounded, and scale."""
    scaled, scale = torch.empty(x.shape), torch.empty(-(-x.shape[0] // rows), x.shape[1] // 128)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = x[i * rows : (i + 1) * rows, j * 128 : (j + 1) * 128].float()
            amax = block.abs().max().clamp(min=1e-4)
            scale[i, j] = 2.0 ** torch.log2(amax.double() / 448).ceil() if power_of_two else amax / 448
            inverse = 1 / scale[i, j] if power_of_two else torch.tensor(448.0) / amax
            scaled[i * rows : (i + 1) * rows, j * 128 : (j + 1) * 128] = block * inverse
    return scaled, scale


def assert_quantised(q, scale, x, rows, power_of_two):
    scaled, expected_scale = blockwise(x, rows, power_of_two)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), scaled.to(E4M3).float())


def sample(*shape, dtype):
    x = torch.randn(*shape) * torch.exp2(torch.randint(-8, 8, (*shape[:-1], 1)).float())
    x[..., 0, :128] = 0.0  # below the floor of amax
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 128), (33, 384), (64, 128), (0, 256)])
def test_rows_of_128(shape, dtype, power_of_two):
    torch.manual_seed(0)
    source = sample(*shape, dtype=dtype) if shape[0] else torch.empty(shape, dtype=dtype)
    x, _ = with_margin(shape, dtype, source)
    q, q_untouched = with_margin(shape, E4M3)
    scale, scale_untouched = with_margin((shape[0], shape[1] // 128), torch.float32)
    quantize_1x128(x, power_of_two, q, scale)
    assert q_untouched()
    assert scale_untouched()
    if shape[0]:
        assert_quantised(q, scale, source, 1, power_of_two)


def test_rows_of_128_with_strides():
    torch.manual_seed(1)
    x = sample(256, 40, dtype=torch.bfloat16).T[:, :128]
    q, scale = torch.empty(40, 128, dtype=E4M3), torch.empty(40, 1)
    quantize_1x128(x, False, q, scale)
    assert_quantised(q, scale, x, 1, False)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 129, 256), (2, 128, 128), (0, 128, 128)])
def test_squares_of_128(shape, dtype, power_of_two):
    torch.manual_seed(2)
    source = sample(*shape, dtype=dtype) if shape[0] else torch.empty(shape, dtype=dtype)
    w, _ = with_margin(shape, dtype, source)
    q, q_untouched = with_margin(shape, E4M3)
    scale, scale_untouched = with_margin((shape[0], -(-shape[1] // 128), shape[2] // 128), torch.float32)
    quantize_128x128(w, power_of_two, q, scale)
    assert q_untouched()
    assert scale_untouched()
    for group in range(shape[0]):
        assert_quantised(q[group], scale[group], source[group], 128, power_of_two)


def test_squares_of_a_transposed_stack():
    torch.manual_seed(3)
    w = sample(2, 128, 200, dtype=torch.bfloat16).transpose(1, 2)
    q, scale = torch.empty(2, 200, 128, dtype=E4M3), torch.empty(2, 2, 1)
    quantize_128x128(w, False, q, scale)
    for group in range(2):
        assert_quantised(q[group], scale[group], w[group], 128, False)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_a_gpu_runs_equals_the_plain_form(power_of_two):
    torch.manual_seed(4)
    x, w = sample(33, 256, dtype=torch.bfloat16), sample(2, 130, 256, dtype=torch.bfloat16)
    for ours, theirs in (
        (fp8_quantize._quantize_1x128_on_gpu(x, power_of_two), fp8_quantize.quantize_1x128(x, power_of_two)),
        (fp8_quantize._quantize_128x128_on_gpu(w, power_of_two), fp8_quantize.quantize_128x128(w, power_of_two)),
    ):
        assert torch.equal(ours[0].float(), theirs[0].float())
        assert torch.equal(ours[1], theirs[1])
