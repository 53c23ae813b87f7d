"""Token dispatch: bring each token to the experts it chose, and the results back. Dropless: every choice is computed.

The local dispatcher sorts (token, choice) pairs by expert and moves no data: experts read the tokens through an index.
A remote one sends each token once per rank that owns any of its experts, and one partial sum comes back.

Letters: T tokens, K choices per token, S source rows at the experts, R routed rows, E local experts, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lit_interns1_kernels.permute import group_by_expert


@dataclass
class RoutedRows:
    """What experts compute on.

    Attributes:
        x_SD: (S, D) source rows.
        row_index_R: (R,) int64, source row of each routed row, grouped by expert.
        offsets_E: (E,) int32, end of each expert's routed rows.
        row_weight_R: (R,) weight of each routed row, with gradient.
        has_tail: Routed rows behind the last offset exist and do not count.
        context: What `combine` needs.
    """

    x_SD: Tensor
    row_index_R: Tensor
    offsets_E: Tensor
    row_weight_R: Tensor
    has_tail: bool = False
    context: Any = None


class TokenDispatcher(Protocol):
    """Moves tokens to experts and back. Plain objects, no parameters."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutedRows:
        """(T, D) tokens, (T, K) experts and weights → rows grouped by expert."""
        ...

    def combine(self, y_SD: Tensor, context: Any) -> Tensor:
        """(S, D) rows that the experts have weighted and summed per source row → (T, D)."""
        ...


@runtime_checkable
class StartsEarly(Protocol):
    """A dispatcher that can begin before the router has decided."""

    def start(self, x_TD: Tensor, num_groups: int) -> Any:
        """Begins with (T, D) tokens; what it returns is handed to `dispatch`.

        Args:
            x_TD: The tokens.
            num_groups: G > 1: the ids will come group after group, K/G from each of G groups of consecutive experts,
                because a router chooses them so. 1: nothing is known, e.g. of replayed ids.
        """
        ...

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, started: Any = None) -> RoutedRows:
        """As in `TokenDispatcher`, going on with what was started."""
        ...


class LocalDispatcher:
    """All experts are here: the source rows are the tokens themselves.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutedRows:
        """See `TokenDispatcher`; x is not copied."""
        order_R, row_index_R, offsets_E = group_by_expert(ids_TK, self.num_experts)
        return RoutedRows(x_TD, row_index_R, offsets_E, weights_TK.flatten().index_select(0, order_R))

    def combine(self, y_SD: Tensor, context: Any) -> Tensor:
        """The rows are the tokens."""
        return y_SD
