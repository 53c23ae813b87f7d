"""A policy that is divided over ranks (FSDP2, expert parallelism): every forward pass is a collective of all of them.

    step:  agree whether anyone still goes on  →  all run one forward pass; who has nothing to do, one of a single token

So ranks with requests of different number and length, or with none, issue the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_interns1.nn.moe import MoEFeedForward
from lit_interns1.nn.moe.agreement import RowAgreement
from lit_interns1.rollout.engine import EngineError


class DividedPolicy:
    """Finds out which ranks share a network, and keeps them in step. A whole network is the case of one rank.

    Args:
        policy: The network.

    Raises:
        EngineError: If it is divided in a way that no group of ranks covers.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        self.give_back()  # so that all parameters show how they are divided
        self._agreement: RowAgreement | None = None
        groups = _groups(policy)
        if groups:
            widest = max(groups, key=dist.get_world_size)
            ranks = set(dist.get_process_group_ranks(widest))
            for group in groups:
                if not ranks.issuperset(dist.get_process_group_ranks(group)):
                    raise EngineError(
                        f"EmbeddedEngine: parameters are divided over ranks {sorted(ranks)} and over "
                        f"{dist.get_process_group_ranks(group)}: one group must hold the other"
                    )
            if len(ranks) > 1:
                self._agreement = RowAgreement(widest)

    @property
    def gathers(self) -> bool:
        """Whether the network gathers its parameters when it runs."""
        return bool(self._units)

    def anyone(self, going: bool) -> bool:
        """Whether any rank goes on; all must ask."""
        return going if self._agreement is None else not self._agreement.everywhere(not going)

    def give_back(self) -> None:
        """Frees gathered parameters: kept, they would be used again after the optimizer has changed their shards."""
        for unit in self._units:
            unit.reshard()

    @contextmanager
    def gathered(self, keep: bool) -> Iterator[None]:
        """Inside, parameters that were gathered stay until the end, if `keep`; afterwards all are given back."""
        before: list[tuple[Any, str, Any]] = []
        if keep:
            for unit in self._units:  # torch has a setter and no getter
                state = unit._get_fsdp_state()
                before.append((state, "_auto_reshard_after_forward", state._auto_reshard_after_forward))
                before += [(g, "post_forward_mesh_info", g.post_forward_mesh_info) for g in state._fsdp_param_groups]
                unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
            self.give_back()


def _groups(policy: nn.Module) -> list[dist.ProcessGroup]:
    """Groups of ranks over which parameters are sharded, or tokens travel."""
    groups: list[dist.ProcessGroup] = []
    for parameter in policy.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            placed = enumerate(parameter.placements)
            groups += [mesh.get_group(axis) for axis, place in placed if not place.is_replicate()]
    for module in policy.modules():
        if isinstance(module, MoEFeedForward):
            group = getattr(module.dispatcher, "group", None)
            groups += [] if group is None else [group]
    return list({id(group): group for group in groups}.values())
