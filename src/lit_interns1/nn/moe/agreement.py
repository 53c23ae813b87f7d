"""What ranks must agree on before they exchange rows without saying how many: equal row counts, and who replays.

    one exchange of host integers per forward pass of the model:   min T, max T, min (ids are chosen now)
    later layers of the pass reuse the verdict; outside a pass (recomputation in backward) each layer exchanges its own

The integers travel on the host where the process group can (gloo, or "cpu:gloo,cuda:nccl"), so no device is waited for.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What holds on the ranks of the group.

    Attributes:
        fewest: The smallest number of rows.
        most: The largest.
        all_choose: Every rank's router chooses its experts in this pass; no rank replays.
    """

    fewest: int
    most: int
    all_choose: bool

    @property
    def equal_rows(self) -> bool:
        """Every rank has as many rows."""
        return self.fewest == self.most


class RowAgreement:
    """Shared by all layers whose experts live on the same ranks. Every rank must make the same calls in the same order.

    Args:
        group: The ranks that share the experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
        self._device = torch.device("cpu" if "cpu" in devices else devices[0])
        self._inside = False
        self._pass: tuple[int, Verdict] | None = None
        self._told: set[str] = set()

    def watch(self, model: nn.Module) -> None:
        """A call of `model` is one pass from now on."""
        model.register_forward_pre_hook(self._open)
        model.register_forward_hook(self._close, always_call=True)  # also where forward raises

    def _open(self, *_: Any) -> None:
        self._inside, self._pass = True, None

    def _close(self, *_: Any) -> None:
        self._inside, self._pass = False, None

    def _smallest(self, *values: int) -> list[int]:
        smallest = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        result: list[int] = smallest.tolist()
        return result

    def on_rows(self, rows: int, chooses: bool) -> Verdict:
        """The verdict of this pass.

        Args:
            rows: T of this rank.
            chooses: Whether this rank's router chooses now, rather than replays.

        Raises:
            RuntimeError: If an earlier layer of this pass had another number of rows.
        """
        if self._pass is not None:
            agreed, verdict = self._pass
            if rows != agreed:
                raise RuntimeError(
                    f"sparse layers of one forward pass must have the same number of tokens: there were {agreed}, now "
                    f'{rows}; set dispatcher = "exact" for such a model'
                )
            return verdict
        fewest, negative_most, all_choose = self._smallest(rows, -rows, int(chooses))
        verdict = Verdict(fewest, -negative_most, bool(all_choose))
        if self._inside:
            self._pass = rows, verdict
        return verdict

    def everywhere(self, condition: bool) -> bool:
        """Whether it holds on every rank; exchanged at each call."""
        return bool(self._smallest(int(condition))[0])

    def tell_once(self, reason: str, detail: str = "") -> None:
        """One log line for each reason, from the group's first rank."""
        if reason not in self._told and dist.get_rank(self.group) == 0:
            _log.warning("tokens are dispatched with exact sizes where %s%s", reason, detail)
        self._told.add(reason)
