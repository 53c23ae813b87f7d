"""The adapter to DeepEP against all experts on one rank, over a buffer of its interface that talks through gloo."""

import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from distributed_harness import run_ranks
from expert_dispatch import CHOICES, EXPERTS, HIDDEN, check, grouped_ids, random
from lit_interns1.nn.moe.deep_ep import DeepEPDispatcher, SharedBuffer, load_buffer_type


class Config(NamedTuple):
    """Sizes as DeepEP hints at them."""

    scale: int

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return self.scale * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0


class GlooBuffer:
    """`deep_ep.Buffer` as its documentation describes it: arguments, types, order of rows, and results."""

    made = 0

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        assert num_nvl_bytes > 0
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        GlooBuffer.made += 1

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config(3)

    @staticmethod
    def get_combine_config(num_ranks):
        return Config(5)

    def exchange(self, parts):
        everything = [None] * self.ranks
        dist.all_gather_object(everything, parts, self.group)
        return [sent[self.rank] for sent in everything]

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False):
        assert topk_idx.dtype == torch.int64
        self.experts = num_experts // self.ranks
        is_token_in_rank = torch.stack([(topk_idx // self.experts == r).any(1) for r in range(self.ranks)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).to(torch.int32)
        return is_token_in_rank.sum(0).to(torch.int32), None, per_expert, is_token_in_rank, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
    ):  # fmt: skip
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            received = self.exchange([x[column] for column in handle[0].unbind(1)])
            return torch.cat(received), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        assert num_tokens_per_rank.tolist() == is_token_in_rank.sum(0).tolist()
        parts = []
        for rank, column in enumerate(is_token_in_rank.unbind(1)):
            ids = topk_idx[column] - rank * self.experts
            here = (ids >= 0) & (ids < self.experts)
            parts.append((x[column], torch.where(here, ids, -1), torch.where(here, topk_weights[column], 0.0)))
        rows, ids, weights = zip(*self.exchange(parts), strict=True)
        ids = torch.cat(ids)
        counts = [int((ids == expert).sum()) for expert in range(self.experts)]
        handle = is_token_in_rank, [len(part) for part in rows]
        return torch.cat(rows), ids, torch.cat(weights), counts, handle, None

    def combine(self, x, handle, topk_weights=None, bias=None):
        assert x.dtype == torch.bfloat16
        is_token_in_rank, received = handle

        def summed(rows):
            total = torch.zeros(len(is_token_in_rank), rows.shape[1])
            parts = self.exchange(list(rows.split(received)))
            for column, part in zip(is_token_in_rank.unbind(1), parts, strict=True):
                total[column] += part.float()
            return total

        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
        weights = None if topk_weights is None else summed(topk_weights)
        return summed(x).to(torch.bfloat16), weights, None


def through_the_adapter(rank, world):
    buffer = SharedBuffer(dist.group.WORLD, GlooBuffer)
    dispatcher = DeepEPDispatcher(EXPERTS, buffer)
    ids = random(9 + 4 * rank, EXPERTS, seed=rank).topk(CHOICES).indices  # no groups, unequal rows
    check(rank, world, dispatcher, ids, torch.bfloat16, tolerance=4e-2)
    check(rank, world, dispatcher, ids[:, :1], torch.bfloat16, tolerance=4e-2)
    check(rank, world, dispatcher, ids[: 0 if rank == 1 else 9] * 0 + torch.arange(CHOICES), torch.bfloat16,
          tolerance=4e-2)  # fmt: skip
    check(rank, world, DeepEPDispatcher(EXPERTS, buffer), grouped_ids(5, 4, rank), torch.bfloat16, tolerance=4e-2)
    assert GlooBuffer.made == 1, "layers share a buffer"
    buffer.get(row_bytes=4 * HIDDEN)
    assert GlooBuffer.made == 2, "and it grows"
    assert buffer.get(row_bytes=HIDDEN).num_nvl_bytes == 5 * 4 * HIDDEN * world
    with pytest.raises(ValueError, match=r'moves bfloat16 rows, got torch\.float32: set compute_dtype = "bfloat16"'):
        dispatcher.dispatch(torch.zeros(9, HIDDEN), ids[:9], torch.ones(9, CHOICES))
    with pytest.raises(ValueError, match=f"the 9 experts must be divisible by the {world} ranks"):
        DeepEPDispatcher(9, buffer)


def test_the_adapter_equals_one_rank():
    run_ranks(through_the_adapter, 2)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match='dispatcher = "deepep" needs CUDA devices, and there is none'):
        load_buffer_type()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ImportError, match="needs the package deep_ep, which is built from"):
        load_buffer_type()
