import random

import pytest
import torch

from lit_interns1_kernels import fp8_grouped_gemm as public
from lit_interns1_kernels.device import fp8_grouped_gemm, fp8_quantize

E4M3 = torch.float8_e4m3fn
KERNELS = pytest.mark.parametrize(
    "kernel", [fp8_grouped_gemm.clipped, fp8_grouped_gemm.ragged], ids=lambda k: k.__name__
)


def operands(sizes, columns, depth, tail=0, seed=0):
    """Random e4m3 values of all magnitudes and scales around 1; rows of the tail are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(sizes) + tail, len(sizes)
    a = (torch.randn(rows, depth, generator=generator) * 100).clamp(-448, 448).to(E4M3)
    b = (torch.randn(groups, columns, depth, generator=generator) * 100).clamp(-448, 448).to(E4M3)
    a_scale = torch.rand(rows, depth // 128, generator=generator) + 0.5
    b_scale = torch.rand(groups, -(-columns // 128), depth // 128, generator=generator) + 0.5
    offsets = torch.tensor(sizes).cumsum(0).int()
    a[sum(sizes) :], a_scale[sum(sizes) :] = float("nan"), float("nan")
    return a, a_scale, b, b_scale, offsets


def expected(a, a_scale, b, b_scale, offsets):
    """What is defined, in float64: dequantise, multiply group by group; zeros in the tail."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    wide_a = a.double() * a_scale.double().repeat_interleave(128, 1)
    wide_b_scale = b_scale.double().repeat_interleave(128, 1)[:, : b.shape[1]].repeat_interleave(128, 2)
    wide_b = b.double() * wide_b_scale
    start = 0
    for group, end in enumerate(offsets.tolist()):
        out[start:end] = wide_a[start:end] @ wide_b[group].T
        start = end
    return out


def run(kernel, a, a_scale, b, b_scale, offsets):
    """The kernel between margins of NaN, which must stay."""
    rows, columns = a.shape[0], b.shape[1]
    whole = torch.full((rows + 8, columns), float("nan"), dtype=torch.bfloat16)
    kernel(a, a_scale, b, b_scale, offsets, whole[4 : 4 + rows])
    assert whole[:4].isnan().all()
    assert whole[4 + rows :].isnan().all()
    return whole[4 : 4 + rows]


def assert_right(out, operands_):
    reference = expected(*operands_)
    # the interpreter cuts float32 off to bfloat16 (less than one unit in the last place); sums of float32 add a little
    limit = reference.abs() * 2.0**-7 + reference.abs().mean() * 1e-4
    assert not out.isnan().any()
    assert ((out.double() - reference).abs() <= limit).all()


@KERNELS
@pytest.mark.parametrize(
    ("sizes", "columns", "depth", "tail"),
    [
        ([5, 0, 33, 17], 128, 256, 0),
        ([1], 8, 128, 0),
        ([129], 136, 128, 0),
        ([0, 0, 130, 0], 128, 128, 0),
        ([0, 0, 0], 128, 128, 5),
        ([128, 1, 127], 200, 256, 131),
        ([256, 128], 128, 128, 0),
    ],
)
def test_every_row_against_its_group(kernel, sizes, columns, depth, tail):
    tensors = operands(sizes, columns, depth, tail)
    out = run(kernel, *tensors)
    assert_right(out, tensors)
    assert (out[sum(sizes) :] == 0).all()


@KERNELS
def test_no_rows(kernel):
    run(kernel, *operands([0, 0], 128, 128))


@KERNELS
def test_bit_equal_to_padded_groups_beside_rows_of_nan(kernel):
    sizes = [3, 0, 129, 40]
    a, a_scale, b, b_scale, offsets = operands(sizes, 128, 256)
    padded_a, padded_scale = torch.zeros(512, 256).to(E4M3), torch.zeros(512, 2)
    places = []
    for start, size, place in zip([0, 3, 3, 132], sizes, [0, 128, 128, 384], strict=True):
        padded_a[place : place + size], padded_scale[place : place + size] = a[start:][:size], a_scale[start:][:size]
        places += range(place, place + size)
    padded = run(kernel, padded_a, padded_scale, b, b_scale, torch.tensor([128, 128, 384, 512], dtype=torch.int32))
    for group in range(len(sizes)):  # one group at a time among neighbours of NaN
        start, end = sum(sizes[:group]), sum(sizes[: group + 1])
        lonely, lonely_scale = torch.full(a.shape, float("nan")).to(E4M3), torch.full_like(a_scale, float("nan"))
        lonely[start:end], lonely_scale[start:end] = a[start:end], a_scale[start:end]
        out = run(kernel, lonely, lonely_scale, b, b_scale, offsets)
        assert torch.equal(out[start:end], padded[places][start:end])


@KERNELS
def test_the_two_quantisers_and_the_product_come_within_four_percent(kernel):
    torch.manual_seed(0)
    sizes = [20, 0, 7]
    x, w = torch.randn(27, 256), torch.randn(3, 128, 256)
    a, a_scale, b, b_scale, offsets = operands(sizes, 128, 256)
    fp8_quantize.quantize_1x128(x, False, a, a_scale)
    fp8_quantize.quantize_128x128(w, False, b, b_scale)
    out = run(kernel, a, a_scale, b, b_scale, offsets)
    exact = torch.cat([x[:20] @ w[0].T, x[20:] @ w[2].T])
    assert 0.02 < (out.float() - exact).norm() / exact.norm() < 0.04


def random_case(seed):
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, draw.randrange(130), draw.randrange(20)]) for _ in range(draw.randrange(1, 7))]
    return sizes, draw.choice([8, 128, 152, 256]), draw.choice([128, 256]), draw.choice([0, 3])


@KERNELS
@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 25))])
def test_random_sizes(kernel, seed):
    tensors = operands(*random_case(seed), seed=seed)
    assert_right(run(kernel, *tensors), tensors)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, marks=[pytest.mark.slow] * (i > 1))
        for i in range(1, len(fp8_grouped_gemm._CLIPPED_CONFIGURATIONS))
    ],
)
def test_other_tiles(index):
    def kernel(a, a_scale, b, b_scale, offsets, out):
        groups, columns, depth = b.shape
        fp8_grouped_gemm._clipped[(3,)](
            a, a_scale, b, b_scale, offsets, out, a.shape[0], columns, depth, groups, GROUPS=4, BLOCK_K=128,
            **fp8_grouped_gemm._CLIPPED_CONFIGURATIONS[index].kwargs,
        )  # fmt: skip

    tensors = operands([65, 0, 128], 200, 256, 70)
    assert_right(run(kernel, *tensors), tensors)


@pytest.mark.parametrize("backend", ["auto", "clipped", "ragged", "padded", "reference"])
def test_what_a_gpu_runs(backend):
    tensors = operands([5, 0, 130], 200, 256, 3)
    out = public._gemm_on_gpu(*tensors, backend)
    assert_right(out, tensors)
    assert (out[135:] == 0).all()
    if backend != "reference":
        assert torch.equal(out, public._gemm_on_gpu(*tensors, "clipped"))


def test_what_a_gpu_runs_takes_any_strides():
    a, a_scale, b, b_scale, offsets = operands([5, 0, 30], 128, 128)
    out = public._gemm_on_gpu(a, a_scale, b, b_scale, offsets, "auto")
    b_transposed = b.transpose(1, 2).contiguous().transpose(1, 2)
    a_wide, a_scale_wide = torch.cat([a, a], 1)[:, :128], torch.cat([a_scale, a_scale], 1)[:, :1]
    assert torch.equal(public._gemm_on_gpu(a_wide, a_scale_wide, b_transposed, b_scale, offsets, "auto"), out)


def test_a_gpu_without_the_format_is_refused(monkeypatch):
    def refuse(device):
        raise ValueError("no format")

    monkeypatch.setattr(public, "check_e4m3_device", refuse)
    with pytest.raises(ValueError, match="no format"):
        public._gemm_on_gpu(*operands([5], 128, 128), "auto")
