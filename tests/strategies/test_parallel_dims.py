"""Sizes that fit, and what is said of those that do not."""

import pytest

from lit_interns1.strategies import ParallelDims


@pytest.mark.parametrize(
    ("sizes", "shards", "expert_shards"),
    [
        ((1,), 1, 1),
        ((8,), 8, 8),
        ((8, "auto", 2, 2), 4, 2),
        ((8, 8, 1, 8), 8, 1),
        ((8, 2, 4, 2), 2, 1),
    ],
)
def test_sizes_that_fit(sizes, shards, expert_shards):
    dims = ParallelDims(*sizes)
    assert (dims.shards, dims.expert_shard_size) == (shards, expert_shards)
    assert dims.shards * dims.replicate_size == dims.world_size


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 3, 2), r"shard_size × replicate_size = 3 × 2 must be the number of ranks, 8"),
        ((8, "auto", 3), r"replicate_size = 3 must divide the number of ranks, 8"),
        ((8, "auto", 2, 3), r"expert_parallel_size = 3 must divide shard_size = 4"),
        ((8, "auto", 1, 0), r"expert_parallel_size = 0 must be at least 1"),
        ((8, 0), r"shard_size = 0 must be at least 1"),
        ((0,), r"world_size = 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelDims(*sizes)


def test_experts_must_divide():
    ParallelDims(4, expert_parallel_size=2).check_experts(6, "layers.0.mlp")
    with pytest.raises(ValueError, match=r"expert_parallel_size = 4 must divide the 6 experts of layers\.0\.mlp"):
        ParallelDims(4, expert_parallel_size=4).check_experts(6, "layers.0.mlp")
