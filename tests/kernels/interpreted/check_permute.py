import pytest
import torch

from lit_interns1_kernels import permute as public
from lit_interns1_kernels.device import permute

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}  # the interpreter cuts bfloat16 off


def choices(kind: str, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "none":
        return torch.empty(0, 3, dtype=torch.int64)
    if kind == "one expert":
        return torch.full((401, 1), experts - 1)
    if kind == "empty experts":
        return 2 * torch.randint(0, (experts + 1) // 2, (257, 3), generator=generator)
    if kind == "one choice":
        return torch.tensor([[0]])
    ids_TK = torch.randint(0, experts, (150, 5), generator=generator)
    if kind == "out of range":
        ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.3] = -1
        ids_TK[::7, 2] = experts
        ids_TK[3, 3] = 2**40
    return ids_TK


@pytest.mark.parametrize("experts", [1, 5, 128])
@pytest.mark.parametrize("kind", ["none", "one expert", "empty experts", "one choice", "ragged", "out of range"])
def test_groups_like_a_stable_sort(kind, experts):
    ids_TK = choices(kind, experts)
    order_R, row_index_R, offsets_E = permute.group_by_expert(ids_TK, experts)
    flat = ids_TK.flatten()
    inside = (flat >= 0) & (flat < experts)
    expected = torch.argsort(torch.where(inside, flat, experts), stable=True)
    assert torch.equal(order_R, expected)
    assert torch.equal(row_index_R, expected // ids_TK.shape[1])
    counts = torch.bincount(flat[inside], minlength=experts)
    assert torch.equal(offsets_E, counts.cumsum(0).to(torch.int32))


def test_groups_narrow_ids_of_a_transposed_matrix():
    ids_TK = choices("ragged", 6).to(torch.int32).t().contiguous().t()
    for actual, expected in zip(permute.group_by_expert(ids_TK, 6), public.group_by_expert_reference(ids_TK, 6)):
        assert torch.equal(actual, expected)


def with_unused_memory(x: torch.Tensor) -> torch.Tensor:
    """The same rows, in front of NaN."""
    memory = torch.full((x.numel() + 4096,), torch.nan, dtype=x.dtype)
    memory[: x.numel()] = x.flatten()
    return memory[: x.numel()].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (1, 1), (9, 300), (37, 64)])
def test_gathers(rows, columns, dtype):
    x_TD = with_unused_memory(torch.randn(11, columns).to(dtype))
    row_index_R = torch.randint(0, 11, (rows,))
    assert torch.equal(permute.gather_rows(x_TD, row_index_R), x_TD[row_index_R])


def routed(tokens: int, per_token: int, columns: int, dtype: torch.dtype, spare_rows: int):
    generator = torch.Generator().manual_seed(tokens + columns)
    rows = tokens * per_token
    y_RD = with_unused_memory(torch.randn(rows + spare_rows, columns, generator=generator).to(dtype))
    inverse_TK = torch.randperm(rows, generator=generator).view(tokens, per_token)
    weights_TK = torch.rand(tokens, per_token, generator=generator)
    return y_RD, inverse_TK, weights_TK


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tail", [None, 0, 5, 1000])
@pytest.mark.parametrize(("tokens", "per_token", "columns"), [(7, 3, 300), (1, 1, 5)])
def test_combines_forward_and_backward(tokens, per_token, columns, tail, weighted, dtype):
    y_RD, inverse_TK, weights_TK = routed(tokens, per_token, columns, dtype, spare_rows=2)
    counted = tokens * per_token if tail is None else max(tokens * per_token - tail, 0)
    offsets_E = None if tail is None else torch.tensor([0, counted // 2, counted], dtype=torch.int32)
    y_RD[counted:] = torch.nan
    grad_TD = torch.randn(tokens, columns).to(dtype)
    given = weights_TK if weighted else None

    wide_y = y_RD.double().nan_to_num().requires_grad_()
    wide_w = weights_TK.double().requires_grad_()
    kept = (inverse_TK < counted).double() * (wide_w if weighted else 1.0)
    expected_TD = torch.stack([kept[t] @ wide_y[inverse_TK[t]] for t in range(tokens)])
    expected_y, expected_w = torch.autograd.grad(expected_TD, (wide_y, wide_w), grad_TD.double(), allow_unused=True)

    tolerance = ROUNDING[dtype]
    close(permute.combine_rows(y_RD, inverse_TK, given, offsets_E), expected_TD.detach(), tolerance * 4)
    grad_y_RD, grad_weights_TK = permute.combine_rows_backward(grad_TD, y_RD, inverse_TK, given, offsets_E)
    close(grad_y_RD, expected_y, tolerance)
    assert grad_y_RD.dtype == dtype
    if weighted:
        assert grad_weights_TK.dtype == torch.float32
        close(grad_weights_TK, expected_w, 1e-5)
    else:
        assert grad_weights_TK.numel() == 0


def test_no_tokens():
    y_RD, inverse_TK = torch.randn(4, 8), torch.empty(0, 2, dtype=torch.int64)
    assert permute.combine_rows(y_RD, inverse_TK, None, None).shape == (0, 8)
    grad_y_RD, grad_weights_TK = permute.combine_rows_backward(
        torch.empty(0, 8), y_RD, inverse_TK, torch.empty(0, 2), None
    )
    assert torch.equal(grad_y_RD, torch.zeros(4, 8))
    assert grad_weights_TK.shape == (0, 2)
