"""How ranks are divided: replication, sharding, and expert parallelism, which borrows ranks from sharding.

    world = R · S        R replicas of S ranks that share the parameters          (dense parameters: 1/S each)
    S = X · P            P ranks share a layer's experts, X ranks share each part  (expert parameters: 1/(X·P) each)

    axis            size   what it is for
    replicate       R      gradients are summed over it
    expert_shard    X      FSDP axis of routed experts
    expert          P      all-to-all of tokens; innermost, so that its ranks are neighbours
    shard           S      expert_shard × expert: FSDP axis of everything else
    data_parallel   R·S    every rank reads data of its own

One root mesh (replicate, expert_shard, expert); the others are flattened views of it, as FSDP wants axes of one mesh.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

REPLICATE, EXPERT_SHARD, EXPERT, SHARD, DATA_PARALLEL = (
    "replicate",
    "expert_shard",
    "expert",
    "shard",
    "data_parallel",
)


@dataclass(frozen=True)
class Meshes:
    """Views of one root mesh.

    Attributes:
        root: (replicate, expert_shard, expert).
        dense: What everything but routed experts is sharded, and if R > 1 replicated, over.
        expert_part: The same for one rank's part of the routed experts.
        expert: The ranks that share experts.
        data_parallel: All ranks.
    """

    root: DeviceMesh
    dense: DeviceMesh
    expert_part: DeviceMesh
    expert: DeviceMesh
    data_parallel: DeviceMesh


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes, checked.

    Args:
        world_size: Number of ranks.
        shard_size: S. "auto": all ranks of a replica, `world_size / replicate_size`.
        replicate_size: R.
        expert_parallel_size: P.

    Raises:
        ValueError: If a size is not positive, R·S is not the world size, or P does not divide S.
    """

    world_size: int
    shard_size: int | Literal["auto"] = "auto"
    replicate_size: int = 1
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "replicate_size", "expert_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.shard_size == "auto":
            if self.world_size % self.replicate_size:
                raise ValueError(
                    f"replicate_size = {self.replicate_size} must divide the number of ranks, {self.world_size}"
                )
            object.__setattr__(self, "shard_size", self.world_size // self.replicate_size)
        if self.shards < 1:
            raise ValueError(f'shard_size = {self.shard_size} must be at least 1, or "auto"')
        if self.shards * self.replicate_size != self.world_size:
            raise ValueError(
                f"shard_size × replicate_size = {self.shards} × {self.replicate_size} must be the number of ranks, "
                f"{self.world_size}"
            )
        if self.shards % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size = {self.expert_parallel_size} must divide shard_size = {self.shards}"
            )

    @property
    def shards(self) -> int:
        """S as a number."""
        assert self.shard_size != "auto"
        return self.shard_size

    @property
    def expert_shard_size(self) -> int:
        """X."""
        return self.shards // self.expert_parallel_size

    def check_experts(self, num_experts: int, layer: str) -> None:
        """Whether every rank of the expert axis can own as many experts as the others.

        Raises:
            ValueError: If not.
        """
        if num_experts % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size = {self.expert_parallel_size} must divide the {num_experts} experts of {layer}"
            )

    def build_meshes(self, device_type: str) -> Meshes:
        """The root mesh and its views; the default process group must exist.

        Args:
            device_type: "cpu" or "cuda".
        """
        sizes = (self.replicate_size, self.expert_shard_size, self.expert_parallel_size)
        root = init_device_mesh(device_type, sizes, mesh_dim_names=(REPLICATE, EXPERT_SHARD, EXPERT))
        shard = root[EXPERT_SHARD, EXPERT]._flatten(SHARD)
        data_parallel = root._flatten(DATA_PARALLEL)
        if self.replicate_size == 1:
            return Meshes(root, shard, root[EXPERT_SHARD], root[EXPERT], data_parallel)
        with warnings.catch_warnings():
            # torch discourages slices with flattened axes, but has no other way to a mesh of two axes with one root
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            dense = root[REPLICATE, SHARD]
        return Meshes(root, dense, root[REPLICATE, EXPERT_SHARD], root[EXPERT], data_parallel)
