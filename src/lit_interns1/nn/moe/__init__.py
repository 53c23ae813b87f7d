"""Mixture of experts: routers, experts, dispatch, balance losses, statistics and recorded routing."""

from lit_interns1.nn.moe.balance import BalanceLoss, huggingface_balance_loss, layer_balance_loss, router_z_loss
from lit_interns1.nn.moe.dispatch import LocalDispatcher, RoutedRows, TokenDispatcher
from lit_interns1.nn.moe.experts import RoutedExperts
from lit_interns1.nn.moe.layer import MoEFeedForward
from lit_interns1.nn.moe.router import ROUTERS, Router, Routing, SigmoidRouter, TopKRouter, update_expert_bias
from lit_interns1.nn.moe.routing_record import RoutingRecord
from lit_interns1.nn.moe.statistics import RouterStats

__all__ = [
    "ROUTERS", "BalanceLoss", "LocalDispatcher", "MoEFeedForward", "RoutedExperts", "RoutedRows", "Router",
    "RouterStats", "Routing", "RoutingRecord", "SigmoidRouter", "TokenDispatcher", "TopKRouter",
    "huggingface_balance_loss", "layer_balance_loss", "router_z_loss", "update_expert_bias",
]  # fmt: skip
