"""The one way in which callbacks hear what routers do.

Language and reward models return the statistics of their routers; routers of other libraries are read by an adapter
when they return. What runs again in backward (activation checkpointing) is not heard a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_interns1.models import Decoder
from lit_interns1.models.trained_parts import trained_parts
from lit_interns1.nn.moe import Router, RouterStats, SigmoidRouter
from lit_interns1.nn.moe.gate_adapter import GateAdapter, TransformersGateAdapter
from lit_interns1.nn.moe.router_load import RouterEvent


class RouterPlace(NamedTuple):
    """A router in a model.

    Attributes:
        name: Where it is.
        module: The router.
        num_experts: E.
        num_groups: G of a grouped router of this package, else 1.
    """

    name: str
    module: nn.Module
    num_experts: int
    num_groups: int


def in_backward() -> bool:
    """Whether this is called from inside autograd's backward, where a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class RouterListener:
    """Finds the routers below a module and passes on what they do.

    Args:
        module: Where to look: language and reward models, and elsewhere what the adapter knows; not in a frozen
            reference.
        receive: Called with the events of a forward pass: all layers of a language model, or one foreign router.
        adapter: Knows foreign routers.

    Attributes:
        routers: In order; the index is the layer of an event.
        token_mask_T: Tokens of the present micro-batch that count in foreign routers; None = all. (A language model is
            told by its caller.)
        measures_logits: Whether events hold `RouterStats.logits` from the next forward pass on.
    """

    def __init__(
        self, module: nn.Module, receive: Callable[[list[RouterEvent]], None], adapter: GateAdapter | None = None
    ) -> None:
        self.receive, self.adapter = receive, adapter or TransformersGateAdapter()
        self.routers: list[RouterPlace] = []
        self.token_mask_T: Tensor | None = None
        self._hooks: list[Any] = []
        self._measures_logits = False
        inside: set[nn.Module] = set()
        for name, part in trained_parts(module):
            if isinstance(part, Decoder):
                self._hear_model(name, part)
                inside.update(part.modules())
            elif part not in inside and not isinstance(part, Router) and self.adapter.matches(name, part):
                self._hear_gate(name, part)

    def stop(self) -> None:
        """Stops listening."""
        self.measures_logits = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def measures_logits(self) -> bool:
        """See the class."""
        return self._measures_logits

    @measures_logits.setter
    def measures_logits(self, value: bool) -> None:
        if value != self._measures_logits:
            self._measures_logits = value
            for place in self.routers:
                if isinstance(place.module, Router):
                    place.module.measures_logits = value

    def bias(self, layer: int) -> Tensor | None:
        """(E,) bias that steers the choice of a router, if it has one."""
        router = self.routers[layer].module
        if isinstance(router, Router):
            return router.expert_bias if isinstance(router, SigmoidRouter) else None
        return self.adapter.bias(router)

    def _hear_model(self, name: str, model: Decoder) -> None:
        first = len(self.routers)
        for number, layer in enumerate(model.moe_layers):
            router = layer.router
            where = f"{name}.moe_layers[{number}]".lstrip(".")
            self.routers.append(RouterPlace(where, router, router.num_experts, router.num_groups))

        def heard(module: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
            if output.router_stats and not in_backward():
                replayed = options.get("routed_experts_TLK") is not None
                self.receive(
                    [
                        RouterEvent(first + i, stats.detached(), replayed, module.training)
                        for i, stats in enumerate(output.router_stats)
                    ]
                )

        self._hooks.append(model.register_forward_hook(heard, with_kwargs=True))

    def _hear_gate(self, name: str, gate: nn.Module) -> None:
        layer = len(self.routers)
        self.routers.append(RouterPlace(name, gate, self.adapter.num_experts(gate), 1))

        def heard(module: nn.Module, arguments: Any, output: Any) -> None:
            if in_backward():
                return
            with torch.no_grad():
                logits_TE, probabilities_TE, ids_TK = self.adapter.read(module, arguments, output)
                mask_T = self._mask(name, len(logits_TE))
                stats = RouterStats.measure(logits_TE, probabilities_TE, ids_TK, mask_T, self.measures_logits)
            self.receive([RouterEvent(layer, stats, False, module.training)])

        self._hooks.append(gate.register_forward_hook(heard))

    def _mask(self, name: str, tokens: int) -> Tensor | None:
        if self.token_mask_T is not None and self.token_mask_T.numel() != tokens:
            raise ValueError(
                f"the token mask has {self.token_mask_T.numel()} entries, but the router {name} saw {tokens} tokens: "
                "pass RouterLoadMonitor(token_mask=...), a function from the batch to the mask of its routed tokens"
            )
        return None if self.token_mask_T is None else self.token_mask_T.flatten().bool()

    @contextmanager
    def recorded_choices(self) -> Iterator[dict[int, tuple[Tensor, Tensor | None]]]:
        """Inside, nothing is received; the ids (T, K) that each layer's router used, and the mask of the tokens that
        count, are kept in the dict."""
        kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        receive, self.receive = self.receive, lambda events: None
        hooks = []
        for layer, place in enumerate(self.routers):

            def heard(module: nn.Module, arguments: Any, options: Any, output: Any, layer: int = layer) -> None:
                if isinstance(module, Router):
                    mask_T = options.get("token_mask_T", arguments[2] if len(arguments) > 2 else None)
                    kept[layer] = (output.ids_TK, mask_T)
                else:
                    ids_TK = self.adapter.read(module, arguments, output).ids_TK
                    kept[layer] = (ids_TK, self._mask(self.routers[layer].name, len(ids_TK)))

            hooks.append(place.module.register_forward_hook(heard, with_kwargs=True))
        try:
            yield kept
        finally:
            self.receive = receive
            for hook in hooks:
                hook.remove()
