"""How parameters are cut into matrices on this rank, and their state between its two forms.

    in a step            (owned, blocks, rows, ...)            on the matrix's owner
    in a state dict      (stack, blocks · rows, ...)           divided as the parameter is

A second arrangement, `shared`, has no owners: each rank keeps its own rows of what has the matrix's rows, and all ranks
keep everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_interns1.optim.elementwise import local
from lit_interns1.optim.row_exchange import RowExchange, divided


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut into matrices on this rank.

    Attributes:
        parameter: It.
        blocks: Blocks of rows, each a matrix.
        rows: Of one block.
        columns: Of it.
        stack: Matrices in front that this rank holds, or holds rows of: experts, or 1.
        group: The ranks over which rows are divided; None where matrices are whole.
        owners: The rank within the group that owns each entry of the stack.
        first: A number of the first matrix that no other parameter's matrices have, the same for any division.
        shared: Nobody owns a matrix; see the top of this file.
    """

    parameter: Tensor
    blocks: int
    rows: int
    columns: int
    stack: int
    group: dist.ProcessGroup | None
    owners: tuple[int, ...]
    first: int
    shared: bool = False

    @property
    def _entries(self) -> list[int]:
        """Of the stack, those whose state is on this rank."""
        if self.group is None or self.shared:
            return list(range(self.stack))
        return [entry for entry, owner in enumerate(self.owners) if owner == dist.get_rank(self.group)]

    @property
    def owned(self) -> int:
        """Entries of the stack whose state is on this rank."""
        return len(self._entries)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(owned, blocks, rows, columns) of the momentum."""
        rows = local(self.parameter).shape[-2] if self.shared else self.rows
        return (self.owned, self.blocks, rows, self.columns)

    @property
    def numbers(self) -> list[int]:
        """Of the owned entries."""
        return [self.first + entry for entry in self._entries]

    def parts(self, tensor: Tensor) -> Tensor:
        """(stack, own rows, columns) of the parameter, its gradient or its update."""
        own = local(tensor)
        return own.reshape(self.stack, own.shape[-2], self.columns)

    def weights(self) -> Tensor:
        """The same of the parameter, to be written to."""
        own = local(self.parameter.detach())
        return own.view(self.stack, own.shape[-2], self.columns)

    # -- state -------------------------------------------------------------------------------------------------------

    def to_rows(self, tensor: Tensor, with_rows: bool) -> Tensor:
        """From the form of a step to that of a state dict. All ranks that share rows must call it together.

        Args:
            tensor: (owned, blocks, rows of this tensor, ...).
            with_rows: Whether its rows are those of the matrix; then a `shared` layout holds a part of them.
        """
        parameter, rest = self.parameter, tensor.shape[3:]
        rows = self.blocks * (self.rows if with_rows else tensor.shape[2])
        if self.shared:
            flat = tensor.flatten(1, 2)
            part = flat if with_rows else flat[:, self._own(rows)]
        elif self.group is not None:
            flat = tensor.reshape(self.owned, rows, _numel(rest))
            part = torch.stack(RowExchange(self.group, self.owners).scatter(flat))
            part = part.view(*part.shape[:2], *rest)
        else:
            part = tensor.flatten(1, 2)
        part = (part if parameter.ndim == 3 else part[0]).clone()
        if not isinstance(parameter, DTensor):
            return part
        whole = torch.Size([*parameter.shape[:-2], rows, *rest])
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=whole,
            stride=torch.empty(whole, device="meta").stride(),
        )  # fmt: skip

    def take_rows(self, target: Tensor, given: Tensor, with_rows: bool) -> None:
        """The inverse of `to_rows`, into `target`.

        Args:
            target: As `to_rows` takes it.
            given: As it returns it, or whole on every rank.
            with_rows: As there.
        """
        parameter, rest = self.parameter, target.shape[3:]
        rows = self.blocks * (self.rows if with_rows else target.shape[2])
        if isinstance(parameter, DTensor) and not isinstance(given, DTensor):
            whole = given if parameter.ndim == 3 else given[None]
            start = first_entry(parameter)
            part = whole[[start + entry for entry in self._entries]]
            target.copy_((part[:, self._own(rows)] if self.shared and with_rows else part).reshape(target.shape))
            return
        if self.shared and not with_rows and isinstance(given, DTensor):
            axes = [Replicate() if p.is_shard(parameter.ndim - 2) else p for p in given.placements]
            given = given.redistribute(placements=axes)
        part = (local(given) if parameter.ndim == 3 else local(given)[None]).to(target)
        if self.group is not None and not self.shared:
            flat = part.reshape(self.stack, part.shape[1], _numel(rest))
            part = RowExchange(self.group, self.owners).gather(list(flat), rows)
        target.copy_(part.reshape(target.shape))

    def _own(self, rows: int) -> slice:
        """Which of `rows` are this rank's."""
        assert self.group is not None
        counts, rank = divided(rows, dist.get_world_size(self.group)), dist.get_rank(self.group)
        return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def ranks_that_share_rows(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which a parameter's rows are divided; None where they are not.

    Raises:
        ValueError: If it is divided otherwise than by entries of a stack and by rows along one axis of the mesh.
    """
    if not isinstance(parameter, DTensor):
        return None
    found = None
    for axis, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is a sum over ranks: {placement}")
        dimension = getattr(placement, "dim", None)  # of Shard, and of the kind that FSDP2 uses over another Shard
        if dimension is None or parameter.device_mesh.size(axis) == 1 or dimension < parameter.ndim - 2:
            continue
        if dimension == parameter.ndim - 1 or found is not None:
            raise ValueError(
                f"a matrix parameter may be divided over ranks by rows, along one axis of the mesh, got "
                f"{parameter.placements} for shape {tuple(parameter.shape)}"
            )
        found = parameter.device_mesh.get_group(axis)
    return found


def first_entry(parameter: Tensor) -> int:
    """Which entry of a stack is the first on this rank."""
    if not isinstance(parameter, DTensor) or parameter.ndim == 2:
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0]


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
