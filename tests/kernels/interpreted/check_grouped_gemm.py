import pytest
import torch

from lit_interns1_kernels import grouped_gemm as public
from lit_interns1_kernels.device.grouped_gemm import (
    grouped_product,
    grouped_product_summed,
    grouped_swiglu,
    sum_rows,
    weight_gradient,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GROUPS = {
    "ragged": [3, 0, 70, 0, 1, 33],
    "first takes all": [97, 0, 0],
    "last takes all": [0, 0, 97],
    "one row": [0, 1],
    "no rows": [0, 0],
}
NOWHERE = 1 << 40
"""An index whose use would be noticed."""


def fenced(x, fence=64):
    """The same values with NaN, or a number that is no row, before and behind them in memory."""
    memory = torch.full((x.numel() + 2 * fence,), torch.nan if x.is_floating_point() else 1 << 20, dtype=x.dtype)
    view = memory[fence : fence + x.numel()].view(x.shape)
    return view.copy_(x)


class Case:
    """Operands of random numbers; rows behind the groups' are NaN and come from nowhere."""

    def __init__(self, groups, N, K, dtype, *, tail=0, sources=None, transposed=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.groups, self.dtype, self.end = groups, dtype, sum(groups)
        self.rows = self.end + tail
        self.offsets = fenced(torch.tensor(groups).cumsum(0).int())
        self.sources = sources or max(self.rows, 1)
        index = torch.randint(self.sources, (self.end,), generator=generator)
        self.index = fenced(torch.cat([index, torch.full((tail,), NOWHERE)]))

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        nothing = torch.full((tail, 1), torch.nan, dtype=dtype)
        self.a = fenced(torch.cat([random(self.end, K), nothing.expand(-1, K)]))
        self.g = fenced(torch.cat([random(self.end, N), nothing.expand(-1, N)]))
        self.source_a, self.source_g = fenced(random(self.sources, K)), fenced(random(self.sources, N))
        self.row_weight = fenced(torch.cat([torch.rand(self.end, generator=generator), torch.full((tail,), torch.nan)]))
        shape = (len(groups), K, N) if transposed else (len(groups), N, K)
        self.weight = fenced(random(*shape) / K**0.5)
        if transposed:
            self.weight = self.weight.transpose(1, 2)

    def by_group(self):
        start = 0
        for group, size in enumerate(self.groups):
            yield group, slice(start, start + size)
            start += size

    def product(self, rows):
        """Each row of `rows` times its group's weight, in float64; 0 behind the end."""
        out = torch.zeros(self.rows, self.weight.shape[1], dtype=torch.float64)
        for group, part in self.by_group():
            out[part] = rows[part].double() @ self.weight[group].double().T
        return out

    def gathered(self, source):
        return source[self.index[: self.end]]

    def summed(self, rows):
        out = torch.zeros(self.sources, rows.shape[1], dtype=torch.float64)
        return out.index_add(0, self.index[: self.end], rows[: self.end].double())

    def close(self, actual, expected, scale=1.0):
        assert actual.dtype == self.dtype
        tolerance = TOLERANCE[self.dtype] * scale
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
LOADS = [
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    pytest.param(torch.float16, False, marks=pytest.mark.slow),
    pytest.param(torch.float16, True, marks=pytest.mark.slow),
]
"""Dtypes, and whether operands come through descriptors; float32 always comes through pointers."""


@pytest.mark.parametrize(("dtype", "descriptors"), LOADS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
def test_product(dtype, descriptors, transposed, gather):
    case = Case(GROUPS["ragged"], 136, 72, dtype, tail=5, sources=40, transposed=transposed)
    a = case.source_a if gather else case.a
    c = grouped_product(a, case.weight, case.offsets, case.index if gather else None, None, descriptors)
    case.close(c, case.product(case.gathered(a) if gather else a))
    assert torch.equal(c[case.end :], torch.zeros(5, 136, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("tail", [0, 70])
def test_product_of_any_groups_and_sizes(groups, dtype, tail):
    case = Case(GROUPS[groups], 13, 37, dtype, tail=tail)
    c = grouped_product(case.a, case.weight, case.offsets)
    case.close(c, case.product(case.a))


@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
def test_many_row_tiles_go_in_bands(transposed):
    case = Case([600, 0, 9], 200, 8, torch.bfloat16, transposed=transposed)
    c = grouped_product(case.a, case.weight, case.offsets)
    case.close(c, case.product(case.a))


def test_product_weights_its_rows():
    case = Case(GROUPS["ragged"], 24, 16, torch.float32, tail=3)
    c = grouped_product(case.a, case.weight, case.offsets, None, case.row_weight)
    expected = case.product(case.a)
    expected[: case.end] *= case.row_weight[: case.end, None].double()
    case.close(c, expected)


@pytest.mark.parametrize(("dtype", "descriptors"), LOADS, ids=str)
@pytest.mark.parametrize("options", ["gathered weighted kept", "gathered", "weighted", "kept"])
def test_swiglu(dtype, descriptors, options):
    case = Case(GROUPS["ragged"], 2 * 72, 72, dtype, tail=5, sources=40)
    gather, keep = "gathered" in options, "kept" in options
    a = case.source_a if gather else case.a
    weight = case.row_weight if "weighted" in options else None
    hidden, gate_up = grouped_swiglu(
        a, case.weight, case.offsets, case.index if gather else None, weight, keep, descriptors
    )
    product = case.product(case.gathered(a) if gather else a)[: case.end]
    if keep:
        case.close(gate_up[: case.end], product, 2)
    assert gate_up.shape == (case.rows if keep else 0, 144)
    gate, up = product.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    if weight is not None:
        expected *= weight[: case.end, None].double()
    case.close(hidden[: case.end], expected, 2)


def test_swiglu_of_odd_sizes():
    case = Case(GROUPS["ragged"], 2 * 67, 5, torch.bfloat16)
    hidden, _ = grouped_swiglu(case.a, case.weight, case.offsets, None, None, False)
    gate, up = case.product(case.a).chunk(2, dim=1)
    case.close(hidden, torch.nn.functional.silu(gate) * up, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False], ids=["in order", "atomic"])
@pytest.mark.parametrize("weighted", [False, True])
def test_summed_product(dtype, deterministic, weighted):
    case = Case(GROUPS["ragged"], 72, 40, dtype, tail=5, sources=50)
    weight = case.row_weight if weighted else None
    y = grouped_product_summed(case.a, case.weight, case.offsets, case.index, 50, weight, deterministic)
    rows = case.product(case.a)
    if weighted:
        rows[: case.end] *= case.row_weight[: case.end, None].double()
    case.close(y, case.summed(rows), 4)
    assert (y[~torch.isin(torch.arange(50), case.index)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", ["left", "right", "neither"])
def test_weight_gradient(dtype, gather):
    case = Case(GROUPS["ragged"], 136, 72, dtype, tail=5, sources=40)
    left, right = case.source_g if gather == "left" else case.g, case.source_a if gather == "right" else case.a
    out = weight_gradient(
        left, right, case.offsets,
        case.index if gather == "left" else None, case.index if gather == "right" else None,
    )  # fmt: skip
    left = case.gathered(left) if gather == "left" else left
    right = case.gathered(right) if gather == "right" else right
    expected = torch.stack([left[part].double().T @ right[part].double() for _, part in case.by_group()])
    case.close(out, expected, 4)
    assert torch.equal(out[1], torch.zeros_like(out[1]))  # an empty group


@pytest.mark.parametrize("gather", [False, True])
def test_operations_of_a_gpu_run_these_kernels(gather, monkeypatch):
    case = Case(GROUPS["ragged"], 24, 16, torch.float32, tail=5, sources=40)
    a, index = (case.source_a, case.index) if gather else (case.a, None)
    operations = [
        (public._product, (a, case.weight, case.offsets, index)),
        (public._weight_gradient, (case.g, a, case.offsets, index)),
        (public._sum_rows, (case.g, case.index, case.offsets, 40)),
    ]
    expected = [operation(*arguments) for operation, arguments in operations]
    monkeypatch.setattr(public, "_has_kernels", lambda like: True)
    monkeypatch.setattr(public, "_parts", None)  # the forms for a CPU fail
    monkeypatch.setattr(public, "_sum_rows_reference", None)
    for (operation, arguments), right in zip(operations, expected, strict=True):
        case.close(operation._backend_fns["cuda"](*arguments), right.double())


@pytest.mark.parametrize("groups", list(GROUPS))
def test_weight_gradient_of_any_groups(groups):
    case = Case(GROUPS[groups], 13, 37, torch.float32)
    out = weight_gradient(case.g, case.a, case.offsets)
    expected = torch.stack([case.g[part].double().T @ case.a[part].double() for _, part in case.by_group()])
    case.close(out, expected, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_rows(dtype):
    case = Case([30, 0, 9], 300, 8, dtype, tail=4, sources=19)
    case.index[:39] = torch.where(case.index[:39] == 7, 8, case.index[:39])
    y = sum_rows(case.g, case.index, case.offsets, 19)
    case.close(y, case.summed(case.g))
    assert (y[7] == 0).all()


def test_sum_rows_adds_in_the_order_of_the_rows():
    rows = torch.tensor([[1e8], [-1e8], [1.0], [1.0], [1e8], [-1e8]])
    sums = sum_rows(rows, torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([6]).int(), 2)
    assert sums.tolist() == [[1.0], [0.0]]  # 1e8 + 1 = 1e8 in float32


def test_no_rows_at_all():
    case = Case([0, 0], 24, 16, torch.float32, sources=3)
    assert grouped_product(case.a, case.weight, case.offsets).shape == (0, 24)
    assert torch.equal(sum_rows(case.g, case.index, case.offsets, 3), torch.zeros(3, 24))
    assert torch.equal(weight_gradient(case.g, case.a, case.offsets), torch.zeros(2, 24, 16))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        grouped_product(torch.ones(2, 8).double(), torch.ones(1, 8, 8).double(), torch.tensor([2]).int())
