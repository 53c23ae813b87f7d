import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels import fp8_quantize
from lit_interns1_kernels.fp8_quantize import (
    check_e4m3_device,
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x128,
)

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_of_rows_stays_within_half_a_step(dtype, power_of_two):
    torch.manual_seed(0)
    x = (torch.randn(37, 384) * torch.exp2(torch.randint(-6, 6, (37, 1)).float())).to(dtype)
    q, scale = quantize_1x128(x, power_of_two)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (37, 3))
    wide = scale.repeat_interleave(128, 1)
    error = (dequantize_1x128(q, scale) - x.float()).abs()
    # e4m3 has 3 bits behind the point, its smallest step is 2^-9; one more rounding of float32 in the product
    assert (error <= 1.0001 * torch.maximum(x.float().abs() * 2.0**-4, wide * 2.0**-10)).all()


def test_scale_is_that_of_the_largest_value_of_the_block():
    x = torch.zeros(2, 256)
    x[0, 5], x[0, 130], x[1, 255] = -896.0, 1e-6, 3.5
    q, scale = quantize_1x128(x)
    # blocks of zeros and of tiny values have the floor of 1e-4
    torch.testing.assert_close(scale, torch.tensor([[2.0, 1e-4 / 448], [1e-4 / 448, 3.5 / 448]]), rtol=1e-7, atol=0)
    assert (q[0, 5].item(), q[1, 255].item()) == (-448.0, 448.0)
    assert q.float().count_nonzero() == 3


@pytest.mark.parametrize("amax", [448.0, 448.0001, 447.9, 896.0, 1e-4, 3.0, 5e30])
def test_power_of_two_scales_round_up_and_nothing_overflows(amax):
    x = torch.zeros(1, 128)
    x[0, 3], x[0, 4] = amax, -amax
    q, scale = quantize_1x128(x, power_of_two_scales=True)
    mantissa, _ = torch.frexp(scale)
    assert mantissa.item() == 0.5
    assert 1.0 <= scale.item() * 448 / x[0, 3].item() < 2.0
    assert q.float().abs().max() <= 448.0
    assert not q.float().isnan().any()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_squares_equal_rows_quantised_with_the_scale_of_their_square(rows, power_of_two):
    torch.manual_seed(1)
    w = torch.randn(2, rows, 256) * torch.exp2(torch.randint(-4, 4, (2, rows, 1)).float())
    q, scale = quantize_128x128(w, power_of_two)
    assert (q.shape, scale.shape) == (w.shape, (2, -(-rows // 128), 2))
    for group in range(2):
        for i, start in enumerate(range(0, rows, 128)):
            for j in range(2):
                block = w[group, start : start + 128, j * 128 : (j + 1) * 128]
                flat = torch.zeros(1, 128)
                flat[0, 0] = block.abs().max()
                assert scale[group, i, j] == quantize_1x128(flat, power_of_two)[1]
                inverse = 1 / scale[group, i, j] if power_of_two else torch.tensor(448.0) / flat[0, 0]
                assert torch.equal(
                    q[group, start : start + 128, j * 128 : (j + 1) * 128].float(), (block * inverse).to(E4M3).float()
                )
    error = dequantize_128x128(q, scale) - w
    assert error.norm() / w.norm() < 0.04


def test_squares_of_the_transpose_are_the_transposed_squares():
    torch.manual_seed(2)
    w = torch.randn(3, 256, 384).bfloat16()
    q, scale = quantize_128x128(w)
    q_t, scale_t = quantize_128x128(w.transpose(1, 2))
    assert torch.equal(q_t.float(), q.transpose(1, 2).float())
    assert torch.equal(scale_t, scale.transpose(1, 2))


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(3)
    x = torch.randn(6, 256)
    q, scale = quantize_1x128(x)
    x[1::2] = float("nan")
    q_beside, scale_beside = quantize_1x128(x)
    assert torch.equal(q_beside[::2].float(), q[::2].float())
    assert torch.equal(scale_beside[::2], scale[::2])


def test_one_matrix_and_deeper_stacks():
    w = torch.randn(2, 3, 130, 128)
    q, scale = quantize_128x128(w)
    assert (q.shape, scale.shape) == (w.shape, (2, 3, 2, 1))
    q_one, scale_one = quantize_128x128(w[1, 2])
    assert torch.equal(q_one.float(), q[1, 2].float())
    assert torch.equal(scale_one, scale[1, 2])
    assert torch.equal(dequantize_128x128(q, scale)[1, 2], dequantize_128x128(q_one, scale_one))


def test_no_rows():
    q, scale = quantize_1x128(torch.empty(0, 256))
    assert (q.shape, scale.shape) == ((0, 256), (0, 2))
    q, scale = quantize_128x128(torch.empty(0, 128, 256))
    assert (q.shape, scale.shape) == ((0, 128, 256), (0, 1, 2))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_registered_operations(power_of_two):
    torch.library.opcheck(torch.ops.lit_interns1.quantize_1x128.default, (torch.randn(5, 256), power_of_two))
    weights = torch.randn(2, 130, 256).bfloat16()
    torch.library.opcheck(torch.ops.lit_interns1.quantize_128x128.default, (weights, power_of_two))
    torch.library.opcheck(torch.ops.lit_interns1.quantize_128x128.default, (weights.mT[:, :, :128], power_of_two))


def test_under_fake_tensors():
    with FakeTensorMode():
        q, scale = quantize_1x128(torch.empty(5, 256))
        assert (q.shape, q.dtype, scale.shape) == ((5, 256), E4M3, (5, 2))
        q, scale = quantize_128x128(torch.empty(2, 130, 256))
        assert (q.shape, q.dtype, scale.shape) == ((2, 130, 256), E4M3, (2, 2, 2))


def test_compiles_whole():
    x = torch.randn(5, 256)
    compiled = torch.compile(lambda x: dequantize_1x128(*quantize_1x128(x)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), dequantize_1x128(*quantize_1x128(x)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x_MK \(4, 130\): the last dimension must be a positive multiple of 128"):
        quantize_1x128(torch.zeros(4, 130))
    with pytest.raises(ValueError, match=r"w_NK \(4, 0\): .*positive multiple of 128"):
        quantize_128x128(torch.zeros(4, 0))
    with pytest.raises(ValueError, match=r"x_MK has dtype torch.int32: it must be float32"):
        quantize_1x128(torch.zeros(4, 128, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x_MK \(1, 4, 128\) must be \(rows, columns\)"):
        quantize_1x128(torch.zeros(1, 4, 128))
    with pytest.raises(ValueError, match=r"w_NK \(128,\) must be \(\.\.\., rows, columns\)"):
        quantize_128x128(torch.zeros(128))
    q, scale = quantize_1x128(torch.zeros(4, 256))
    with pytest.raises(ValueError, match=r"scale of q_MK \(4, 256\) has shape \(4, 1\): must be \(4, 2\)"):
        dequantize_1x128(q, scale[:, :1])
    with pytest.raises(ValueError, match=r"q_NK has dtype torch.float32: it must be torch.float8_e4m3fn"):
        dequantize_128x128(q.float(), scale)
    with pytest.raises(ValueError, match=r"scale of q_MK has dtype torch.float64"):
        dequantize_1x128(q, scale.double())


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm120", "hip", None])
def test_devices_without_the_format_are_refused(monkeypatch, target):
    monkeypatch.setattr(fp8_quantize, "triton_target", lambda device: target)
    with pytest.raises(ValueError, match=f"9.x or 10.x .*: {target or 'cuda'} has no tensor-core products in e4m3fn"):
        check_e4m3_device(torch.device("cuda"))


@pytest.mark.parametrize("target", ["sm90", "sm100", "sm103"])
def test_devices_with_the_format_are_taken(monkeypatch, target):
    monkeypatch.setattr(fp8_quantize, "triton_target", lambda device: target)
    check_e4m3_device(torch.device("cuda"))
    check_e4m3_device(torch.device("cpu"))


def test_the_device_module_is_not_imported():
    code = "import lit_interns1_kernels.fp8_quantize, sys; print('lit_interns1_kernels.device' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
