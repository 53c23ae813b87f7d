"""Dispatch between ranks against all experts on one rank: values, gradients, row traffic, empty and skewed ranks."""

import pytest
import torch
import torch.distributed as dist

from distributed_harness import run_ranks
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
from lit_interns1.nn.moe.dispatch import LocalDispatcher
from lit_interns1_kernels.routed_swiglu import routed_swiglu

EXPERTS, CHOICES, HIDDEN, INNER = 8, 3, 16, 8


def ids_of(case, tokens, generator):
    if case == "one expert gets everything":
        return torch.tensor([[5, 4, 6]]).expand(tokens, -1).contiguous()
    if case == "others only":  # no expert of the last rank
        return torch.rand(tokens, EXPERTS // 2, generator=generator).topk(CHOICES).indices
    return torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES).indices


def problem(case, rank, dtype):
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = {"a rank without tokens": 0 if rank == 1 else 9}.get(case, 7 + 4 * rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(tokens, CHOICES, generator=generator).to(dtype).requires_grad_()
    return x, ids_of(case, tokens, generator), weights, torch.randn(tokens, HIDDEN, generator=generator).to(dtype)


def stacks(dtype):
    generator = torch.Generator().manual_seed(7)
    gate_up = (torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / 4).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / 3).to(dtype)
    return gate_up, down


def layer(dispatcher, x, ids, weights, gate_up, down):
    rows = dispatcher.dispatch(x, ids, weights)
    y = routed_swiglu(rows.x_SD, gate_up, down, rows.row_index_R, rows.offsets_E, rows.row_weight_R)
    return dispatcher.combine(y, rows.context), rows


def compare(rank, world):
    for case in ("random", "one expert gets everything", "others only", "a rank without tokens"):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 4e-2)):
            x, ids, weights, direction = problem(case, rank, dtype)
            whole = [w.requires_grad_() for w in stacks(dtype)]
            y, _ = layer(LocalDispatcher(EXPERTS), x, ids, weights, *whole)
            expected = torch.autograd.grad(y, [x, weights, *whole], direction)
            for gradient in expected[2:]:
                dist.all_reduce(gradient)

            mine = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
            local = [w.detach()[mine].clone().requires_grad_() for w in whole]
            y_again, rows = layer(AllToAllDispatcher(EXPERTS, dist.group.WORLD), x, ids, weights, *local)
            actual = torch.autograd.grad(y_again, [x, weights, *local], direction)
            wanted = [y.detach(), *expected[:2], *(gradient[mine] for gradient in expected[2:])]
            for ours, theirs in zip([y_again.detach(), *actual], wanted, strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=f"{case} {dtype}")

            # a token's row goes once to each rank that has any of its experts, and comes back once
            owner = ids.div(EXPERTS // world, rounding_mode="floor")
            wants = [int((owner == peer).any(1).sum()) for peer in range(world)]
            assert rows.context.rows_out == wants
            everyone = [None] * world
            dist.all_gather_object(everyone, wants)
            assert rows.context.rows_in == [sent[rank] for sent in everyone]
            assert rows.x_SD.shape[0] == sum(rows.context.rows_in)
    alone = [dist.new_group([peer]) for peer in range(world)][rank]  # a group of one rank sends nothing
    x, ids, weights, _ = problem("random", rank, torch.float64)
    expected, _ = layer(LocalDispatcher(EXPERTS), x, ids, weights, *stacks(torch.float64))
    y, _ = layer(AllToAllDispatcher(EXPERTS, alone), x, ids, weights, *stacks(torch.float64))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=f"the 9 experts must be divisible by the {world} ranks"):
        AllToAllDispatcher(9, dist.group.WORLD)


@pytest.mark.parametrize("world", [2, 4])
def test_dispatch_between_ranks_equals_one_rank(world):
    run_ranks(compare, world)
