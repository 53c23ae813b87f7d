from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from distributed_harness import RankError, run_ranks
from lit_interns1.nn.head import LanguageModelHead
from lit_interns1.objectives import NextTokenCrossEntropy
from lit_interns1_kernels import linear_token_scores as kernel

WORLD, ROWS, TOKENS, HIDDEN, VOCABULARY = 2, 4, 20, 12, 53  # an odd vocabulary: shards of unequal size


class TinyModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.middle = nn.Linear(HIDDEN, HIDDEN)
        self.head = LanguageModelHead(HIDDEN, VOCABULARY, chunk_tokens=6, initializer_std=0.4)
        if tied:
            self.head.tie(self.embedding.weight)

    def forward(self, inputs: Tensor, labels: Tensor, hint) -> Tensor:
        return self.head(self.middle(self.embedding(inputs)).tanh(), labels, gradient_hint=hint)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    inputs, labels = torch.randint(0, VOCABULARY, (2, ROWS, TOKENS))
    labels[:, ::7] = -100
    labels[1] = -100  # with two ranks: one row of the first rank has nothing to learn from
    return inputs, labels


def losses_and_gradients(model: nn.Module, rows: slice, hinted: bool, z_loss: float) -> list[float]:
    """Two micro-batches of one row each, accumulated."""
    objective, losses = NextTokenCrossEntropy(z_loss), []
    inputs, labels = batch()
    for row in range(ROWS)[rows]:
        hint = objective.gradient_hint(labels[row]) if hinted else None
        loss, _ = objective(model(inputs[row], labels[row], hint), labels[row])
        loss.sum.backward()
        losses.append(loss.sum.item())
    return losses


def expected_in_one_process(model: TinyModel, z_loss: float) -> list[float]:
    """The same rows in one process, from whole logits."""
    losses = []
    for inputs, labels in zip(*batch()):
        logits = F.linear(model.middle(model.embedding(inputs)).tanh(), model.head.weight)
        z = (logits.logsumexp(-1) ** 2)[labels != -100].sum()
        loss = F.cross_entropy(logits, labels, reduction="sum") + z_loss * z
        loss.backward()
        losses.append(loss.item())
    return losses


def check_promises() -> list[bool]:
    """Records from now on whether each promise was kept."""
    kept: list[bool] = []
    original = kernel._promise_factor
    kernel._promise_factor = lambda *a: (f := original(*a), kept.append(f is not None))[0]
    return kept


def on_a_rank(rank: int, world_size: int, tied: bool, hinted: bool, z_loss: float):
    mesh = init_device_mesh("cpu", (world_size,))
    model = TinyModel(tied)
    fully_shard(model.middle, mesh=mesh)
    if tied:
        fully_shard([model.embedding, model.head], mesh=mesh)
    else:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = check_promises()
    half = ROWS // world_size
    losses = losses_and_gradients(model, slice(rank * half, (rank + 1) * half), hinted, z_loss)
    gradients = {name: p.grad.full_tensor() * world_size for name, p in model.named_parameters()}
    return losses, gradients, kept


@pytest.mark.parametrize("hinted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_head_equals_one_process(tied: bool, hinted: bool) -> None:
    model = TinyModel(tied)
    expected_losses = expected_in_one_process(model, z_loss=0.02)
    results = run_ranks(on_a_rank, WORLD, tied, hinted, 0.02)
    assert [loss for losses, _, _ in results for loss in losses] == pytest.approx(expected_losses, rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters()}
    for _, gradients, kept in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert kept == ([True] * (ROWS // WORLD) if hinted else [])


def in_mixed_precision(rank: int, world_size: int):
    mesh = init_device_mesh("cpu", (world_size,))
    model = TinyModel(tied=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.middle, model.head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    kept = check_promises()
    inputs, labels = batch()
    sample_id = torch.tensor([0] * 7 + [1] * (TOKENS - 7))
    objective = NextTokenCrossEntropy(0.01, "square_root")  # weights that bfloat16 would round
    hint = objective.gradient_hint(labels[0], sample_id)
    scores = model(inputs[0], labels[0], hint)
    objective(scores, labels[0], sample_id)[0].sum.backward()
    return scores.logp_T.dtype, kept


def test_mixed_precision_keeps_scores_and_hint_in_float32() -> None:
    assert run_ranks(in_mixed_precision, WORLD) == [(torch.float32, [True])] * WORLD


def fails_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ArithmeticError("as arranged")
    dist.barrier()


def returns_sum(rank: int, world_size: int, start: int) -> int:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return int(total)


def never_ends(rank: int, world_size: int) -> None:
    while True:
        dist.barrier() if rank == 2 else torch.ones(2).sum()


def test_harness_returns_results_by_rank() -> None:
    torch.ones(300, 300) @ torch.ones(300, 300)
    assert run_ranks(returns_sum, 3, 10) == [33, 33, 33]


def test_harness_raises_with_the_traceback_of_the_failing_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed(.|\n)*fails_on_rank_1(.|\n)*ArithmeticError: as arranged"):
        run_ranks(fails_on_rank_1, 2)


def test_harness_stops_ranks_that_hang() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not finish within 3 s"):
        run_ranks(never_ends, 2, timeout=3.0)
