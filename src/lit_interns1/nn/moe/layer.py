"""The sparse feed-forward network: router, dispatch, experts, combine.

y = Σ_{i∈S(x)} w_i(x) · E_i(x)
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_interns1.nn.moe.dispatch import LocalDispatcher, TokenDispatcher
from lit_interns1.nn.moe.experts import RoutedExperts
from lit_interns1.nn.moe.router import Router, Routing


class MoEFeedForward(nn.Module):
    """A router and its experts. `dispatcher` may be replaced (expert parallelism does).

    Args:
        router: Chooses experts.
        experts: Computes them.
    """

    def __init__(self, router: Router, experts: RoutedExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.dispatcher: TokenDispatcher = LocalDispatcher(router.num_experts)

    def forward(
        self,
        x_TD: Tensor,
        replay_TK: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        recomputing: bool = False,
    ) -> tuple[Tensor, Routing]:
        """(T, D) → (T, D) and the routing. `replay_TK`, `token_mask_T` and `recomputing` as in `Router.forward`."""
        dispatcher, started = self.dispatcher, {}
        if hasattr(dispatcher, "start"):  # `StartsEarly`; asking the protocol takes as long as the router does
            chooses = replay_TK is None or recomputing
            started = {"started": dispatcher.start(x_TD, self.router.num_groups if chooses else 1)}
        routing = self.router(x_TD, replay_TK, token_mask_T, recomputing)
        rows = dispatcher.dispatch(x_TD, routing.ids_TK, routing.weights_TK, **started)
        return dispatcher.combine(self.experts(rows), rows.context).to(x_TD.dtype), routing
