"""Dispatch with sizes known beforehand against all experts on one rank: values, gradients, fallbacks, what is read."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint

from distributed_harness import run_ranks
from expert_dispatch import CHOICES, EXPERTS, HIDDEN, INNER, check, grouped_ids, random
from lit_interns1.nn.moe import MoEFeedForward, RoutedExperts, TopKRouter
from lit_interns1.nn.moe.agreement import RowAgreement
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
from lit_interns1.nn.moe.static_split import StaticSplitDispatcher


class Calls:
    """Counts collectives by name."""

    def __init__(self):
        self.count = {}

    def __enter__(self):
        self.saved = [(m, n, getattr(m, n)) for m, n in self.places]
        for module, name, function in self.saved:
            setattr(module, name, self.counting(name, function))
        return self.count

    places = ((collectives, "all_to_all_single"), (collectives, "all_gather_single"), (dist, "all_reduce"))

    def counting(self, name, function):
        def counted(*args, **kwargs):
            self.count[name] = self.count.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    def __exit__(self, *_):
        for module, name, function in self.saved:
            setattr(module, name, function)


class Lines(logging.Handler):
    """Keeps messages of the package."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logger = logging.getLogger("lit_interns1")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())


def make(agreement=True):
    group = dist.group.WORLD
    return StaticSplitDispatcher(EXPERTS, group, RowAgreement(group) if agreement else None)


def dispatch_between_ranks(rank, world):
    lines = Lines().lines
    exact = AllToAllDispatcher(EXPERTS, dist.group.WORLD)
    for groups in {world, 4, 8}:
        for tokens in (9, 0):
            ids = grouped_ids(tokens, groups, seed=rank)
            ours = check(rank, world, make(), ids, groups=groups)
            theirs = check(rank, world, exact, ids)
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True)), "the exact one's bits"
            check(rank, world, make(agreement=False), ids, groups=groups)
        check(rank, world, make(), grouped_ids(9, groups, rank), torch.bfloat16, groups, tolerance=4e-2)
    ids = grouped_ids(9, world, seed=rank)
    with Calls() as calls:
        check(rank, world, make(), ids, groups=world)
    # all_reduce: one of the agreement, two of the test
    assert calls == {"all_gather_single": 2, "all_to_all_single": 4, "all_reduce": 3}
    with Calls() as calls:
        check(rank, world, exact, ids)
    assert calls == {"all_to_all_single": 8, "all_reduce": 2}
    assert lines == []

    # replayed ids that keep the rule, in any order and whoever replays
    shuffled = ids.gather(1, random(*ids.shape, seed=8).argsort(-1))
    with Calls() as calls:
        check(rank, world, make(), shuffled if rank == 1 else ids, groups=1 if rank == 1 else world)
        check(rank, world, make(), shuffled)
    assert calls["all_gather_single"] == 4
    # and that break it on one rank
    broken = ids.clone()
    if rank == 1:
        broken[2, 0] = (broken[2, 0] + EXPERTS // world) % EXPERTS
        broken[2] = torch.arange(CHOICES) if broken[2].unique().numel() < CHOICES else broken[2]
    dispatcher = make()
    with Calls() as calls:
        check(rank, world, dispatcher, broken, groups=1 if rank == 1 else world)
        check(rank, world, dispatcher, broken, groups=1 if rank == 1 else world)
    assert "all_gather_single" not in calls
    with Calls() as calls:
        check(rank, world, dispatcher, grouped_ids(5 + rank, world, seed=rank), groups=world)
        check(rank, world, dispatcher, grouped_ids(0 if rank == 1 else 5, world, seed=rank), groups=world)
    assert "all_gather_single" not in calls
    assert len(lines) == (2 if rank == 0 else 0)
    return lines


@pytest.mark.parametrize("world", [2, 4])
def test_dispatch_between_ranks_equals_one_rank(world):
    first, *_ = run_ranks(dispatch_between_ranks, world)
    assert "replayed experts" in first[0]
    assert f"unequal numbers of tokens (first from 5 to {4 + world})" in first[1]


class Network(nn.Module):
    """Two sparse layers with grouped routers."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(
            MoEFeedForward(TopKRouter(HIDDEN, EXPERTS, CHOICES, num_groups=4), RoutedExperts(EXPERTS, HIDDEN, INNER))
            for _ in range(2)
        ).double()
        for number, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=number) / 3
        self.checkpointed = checkpointed

    def forward(self, x, mask=None, replay=(None, None), shorten=0):
        stats = []
        for layer, ids in zip(self.layers, replay, strict=True):
            if self.checkpointed:
                y, routing = checkpoint(layer, x, ids, mask, use_reentrant=False)
            else:
                y, routing = layer(x, ids, mask)
            x = (x + y)[shorten:]
            stats.append(routing)
        return x, stats


def divide(network, agreement, rank, world):
    for layer in network.layers:
        layer.dispatcher = StaticSplitDispatcher(EXPERTS, dist.group.WORLD, agreement)
        for name, parameter in list(layer.experts.named_parameters()):
            part = parameter.detach().chunk(world)[rank].clone()
            layer.experts.register_parameter(name, nn.Parameter(part))
    agreement.watch(network)
    return network


def passes(rank, world):
    agreement, tokens = RowAgreement(dist.group.WORLD), 7
    x, direction = random(tokens, HIDDEN, seed=rank), random(tokens, HIDDEN, seed=50 + rank)
    mask = torch.arange(tokens) < tokens - rank
    whole = Network()
    y, routing = whole(x, mask)
    (y * direction * mask[:, None]).sum().backward()
    for checkpointed in (False, True):
        ours = divide(Network(checkpointed), agreement, rank, world)
        with Calls() as calls:
            y_again, routing_again = ours(x, mask)
            (y_again * direction * mask[:, None]).sum().backward()
        # one agreement for the pass, and one for each layer that is recomputed after it
        assert calls["all_reduce"] == (3 if checkpointed else 1)
        torch.testing.assert_close(y_again, y, rtol=1e-12, atol=1e-12)
        for a, b in zip(routing, routing_again, strict=True):
            assert torch.equal(a.stats.counts_E, b.stats.counts_E)
            assert a.stats.num_tokens == tokens - rank
        for (name, theirs), own in zip(whole.named_parameters(), ours.parameters(), strict=True):
            expected = theirs.grad.clone()
            if "router" in name:
                torch.testing.assert_close(own.grad, expected, rtol=1e-9, atol=1e-12, msg=name)
            else:
                dist.all_reduce(expected)
                torch.testing.assert_close(own.grad, expected.chunk(world)[rank], rtol=1e-9, atol=1e-12, msg=name)

    # recomputation of what was chosen, with the ids of the first time
    layer = ours.layers[0]
    chosen = layer(x)[1].ids_TK
    with Calls() as calls:
        layer(x, chosen, None, recomputing=True)
        assert calls == {"all_reduce": 1, "all_gather_single": 1, "all_to_all_single": 2}

    # one rank replays its first layer only
    with Calls() as calls:
        y_again, _ = ours(x, mask, (routing[0].ids_TK if rank == 1 else None, None))
    torch.testing.assert_close(y_again, y, rtol=1e-12, atol=1e-12)
    assert calls["all_reduce"] == 3
    assert calls["all_gather_single"] == 2
    # ... its second only: ids that keep the rule go, others cannot
    y_again, _ = ours(x, mask, (None, routing[1].ids_TK if rank == 1 else None))
    torch.testing.assert_close(y_again, y, rtol=1e-12, atol=1e-12)
    agreement.on_rows(tokens, chooses=True)
    agreement._open()
    agreement.on_rows(tokens, chooses=True)
    with pytest.raises(RuntimeError, match='replay them in every sparse layer, or set dispatcher = "exact"'):
        layer(x, torch.arange(CHOICES).expand(tokens, -1))
    with pytest.raises(RuntimeError, match="there were 7, now 6; set dispatcher"):
        layer(x[1:])
    agreement._close()
    with pytest.raises(RuntimeError, match="there were 7, now 4"):
        ours(x, shorten=3)
    layer(x[:4])  # a pass that failed is over
    y_again, _ = ours(x, mask)
    torch.testing.assert_close(y_again, y, rtol=1e-12, atol=1e-12)

    class Careless(TopKRouter):
        def decide(self, logits_TE, replay_TK):
            weights, ids, probabilities = super().decide(logits_TE, replay_TK)
            return weights, ids * 0, probabilities

    layer.router.__class__ = Careless
    with pytest.raises(RuntimeError, match="same number of experts of every rank"):
        layer(x)


def test_a_forward_pass_agrees_once_and_recomputation_is_exact():
    run_ranks(passes, 2)


def without_data(rank, world):
    """Rank 3 of eight that do not exist, with tensors that hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    with FakeTensorMode():
        router = TopKRouter(HIDDEN, EXPERTS, CHOICES, num_groups=8)
        layer = MoEFeedForward(router, RoutedExperts(EXPERTS, HIDDEN, INNER))
        layer.experts = RoutedExperts(EXPERTS // 8, HIDDEN, INNER)
        layer.dispatcher = StaticSplitDispatcher(EXPERTS, dist.group.WORLD)
        x = torch.randn(6, HIDDEN, requires_grad=True)
        y, routing = layer(x)
        again, _ = layer(x, routing.ids_TK.to(torch.int16), None, recomputing=True)
        (y.sum() + again.square().sum()).backward()
        assert y.shape == x.grad.shape == (6, HIDDEN)
        assert layer.experts.down_proj.grad.shape == (2, HIDDEN, INNER)
        assert router.weight.grad.shape == (EXPERTS, HIDDEN)


def test_nothing_of_the_device_is_read():
    run_ranks(without_data, 1)
