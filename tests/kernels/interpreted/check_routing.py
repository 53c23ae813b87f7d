import pytest
import torch

from lit_interns1_kernels.device import routing

SHAPES = [  # tokens, experts, K, groups
    (0, 8, 2, 1),
    (1, 1, 1, 1),
    (37, 8, 8, 1),
    (37, 12, 4, 2),
    (33, 100, 6, 1),
    (17, 128, 8, 1),
    (5, 512, 8, 8),
    (3, 1000, 5, 5),
]


def logits(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(experts)
    memory = torch.full((tokens * experts + 4096,), torch.nan, dtype=dtype)
    memory[: tokens * experts] = 2 * torch.randn(tokens * experts, generator=generator).to(dtype)
    return memory[: tokens * experts].view(tokens, experts)


def lowest_first(p_TE: torch.Tensor, k: int, groups: int) -> torch.Tensor:
    """Best first, group after group; of equal ones the lower id first."""
    size = p_TE.shape[1] // groups
    picks = [part.sort(descending=True, stable=True).indices[:, : k // groups] for part in p_TE.split(size, 1)]
    return torch.cat([pick + size * group for group, pick in enumerate(picks)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k", "groups"), SHAPES)
def test_forward(tokens, experts, k, groups, normalize, dtype):
    z_TE = logits(tokens, experts, dtype)
    weights_TK, ids_TK, p_TE = routing.route(z_TE, k, groups, normalize, 2.5, None)
    exact_TE = z_TE.double().softmax(-1)
    torch.testing.assert_close(p_TE.double(), exact_TE, rtol=1e-6, atol=1e-9)
    expected_ids = lowest_first(p_TE if dtype == torch.bfloat16 else exact_TE, k, groups)  # bfloat16 has ties
    assert torch.equal(ids_TK, expected_ids)
    expected_TK = exact_TE.gather(1, ids_TK)
    if normalize:
        expected_TK = expected_TK / expected_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weights_TK.double(), 2.5 * expected_TK, rtol=2e-6, atol=1e-9)
    assert (weights_TK.dtype, p_TE.dtype, ids_TK.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize("groups", [1, 2])
def test_ties_go_to_the_lower_id(groups):
    z_TE = torch.tensor([[1, 2, 2, 2, 0, 0, 3, 0], [0] * 8, [-200, 0, -300, -400, -1, -300, -300, -300]]).float()
    _, ids_TK, p_TE = routing.route(z_TE, 4, groups, True, 1.0, None)
    assert torch.equal(ids_TK, lowest_first(p_TE, 4, groups))
    assert ids_TK[1].tolist() == ([0, 1, 2, 3] if groups == 1 else [0, 1, 4, 5])


def test_ids_of_a_broken_row_exist_and_differ():
    z_TE = logits(3, 12).clone()
    z_TE[1, 5] = torch.nan
    weights_TK, ids_TK, _ = routing.route(z_TE, 4, 2, True, 1.0, None)
    assert ids_TK[1].tolist() == [0, 1, 6, 7]
    assert weights_TK[1].isnan().all()
    assert weights_TK[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
@pytest.mark.parametrize("groups", [1, 2])
def test_replay(groups, dtype):
    z_TE = logits(21, 12)
    _, live_TK, p_TE = routing.route(z_TE, 4, groups, True, 1.0, None)
    replay_TK = torch.stack([torch.randperm(12)[:4] for _ in range(21)]).to(dtype)
    replay_TK[::3, 2] = -1
    weights_TK, ids_TK, _ = routing.route(z_TE, 4, groups, True, 1.0, replay_TK)
    expected_TK = replay_TK.long()
    expected_TK[::3] = live_TK[::3]
    assert torch.equal(ids_TK, expected_TK)
    chosen_TK = p_TE.gather(1, expected_TK)
    torch.testing.assert_close(weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True), rtol=1e-6, atol=0)


def surrogate(z_TE: torch.Tensor, ids_TK: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """What the gradient of the weights is taken of, in float64."""
    if kind == "chosen":
        return z_TE.gather(1, ids_TK).softmax(1)
    return (z_TE / temperature).softmax(1).gather(1, ids_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_p", [True, False])
@pytest.mark.parametrize(("kind", "temperature"), [("chosen", 1.0), ("dense", 1.0), ("dense", 0.4)])
@pytest.mark.parametrize(("tokens", "experts", "k", "groups"), SHAPES)
def test_backward(tokens, experts, k, groups, kind, temperature, through_p, dtype):
    z_TE = logits(tokens, experts, dtype)
    _, ids_TK, p_TE = routing.route(z_TE, k, groups, True, 1.0, None)
    generator = torch.Generator().manual_seed(1)
    grad_TK, grad_TE = (torch.randn(tokens, size, generator=generator) for size in (k, experts))

    wide = z_TE.double().requires_grad_()
    loss = 2.5 * (surrogate(wide, ids_TK, kind, temperature) * grad_TK).sum()
    if through_p:
        loss = loss + (wide.softmax(1) * grad_TE).sum()
    (expected_TE,) = torch.autograd.grad(loss, wide)

    given = grad_TE if through_p else None
    actual_TE = routing.route_backward(grad_TK, given, z_TE, ids_TK, p_TE, 2.5, kind == "dense", temperature)
    assert actual_TE.dtype == dtype
    tolerance = 3e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual_TE.double(), expected_TE, rtol=tolerance, atol=2e-6)
    if kind == "chosen" and not through_p:
        assert not actual_TE.scatter(1, ids_TK, 0.0).any(), "experts that were not chosen get exactly nothing"
