"""Number formats of a whole network, switched on and back: experts in FP8, the rest in bfloat16, the head in float32.

    experts   products of E4M3 numbers: x scaled per 1 × 128, weights per 128 × 128, sums float32, results bfloat16
    dense     all other matrix products in bfloat16 (autocast); norms, softmax and routers as the config says
    head      logits in float32

So Intern-S1-Pro computes in reinforcement learning, in the trainer and in the rollout engine alike (arXiv 2603.25040
§4.1). A recipe on one side only makes the mismatch that importance weights have to correct. Parameters, gradients and
checkpoints keep their types: weights are quantised anew in every forward pass.

    with computing_in(model, INTERN_S1_PRO): ...         # in here
    applied = apply_precision(model, INTERN_S1_PRO)      # until applied.restore()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from lit_interns1.nn.head import LanguageModelHead
from lit_interns1.nn.moe.experts import ExpertPrecision, RoutedExperts
from lit_interns1_kernels.fp8_quantize import e4m3_problem

DensePrecision = Literal["native", "bfloat16"]
HeadPrecision = Literal["native", "float32"]


@dataclass(frozen=True)
class PrecisionRecipe:
    """Formats by part of the network. None leaves a part as it is.

    Attributes:
        experts: "native" = the model's type, "fp8" = E4M3 with float32 scales, "fp8_power_of_two" = E4M3 with scales
            that are powers of two.
        dense: All other matrix products: "native" = the type of the weights, "bfloat16".
        head: Logits: "native" = as the products before it, "float32".

    Raises:
        ValueError: If a format is unknown.
    """

    experts: ExpertPrecision | None = None
    dense: DensePrecision | None = None
    head: HeadPrecision | None = None

    def __post_init__(self) -> None:
        for name, formats in (("experts", ExpertPrecision), ("dense", DensePrecision), ("head", HeadPrecision)):
            value = getattr(self, name)
            if value is not None and value not in get_args(formats):
                choices = ", ".join(get_args(formats))
                raise ValueError(f"PrecisionRecipe.{name} = {value!r} is unknown: choose one of {choices}, or None")


INTERN_S1_PRO = PrecisionRecipe("fp8", "bfloat16", "float32")
"""What Intern-S1-Pro computes in during reinforcement learning (arXiv 2603.25040 §4.1)."""


class AppliedPrecision:
    """What `apply_precision` did to a network.

    Attributes:
        changed: Names of the modules that compute otherwise than before; "" is the network itself, whose forward runs
            under another autocast.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._undo: list[Callable[[], object]] = []

    def restore(self) -> None:
        """Brings back what was there before. Of several recipes on a network the last one goes first."""
        while self._undo:
            self._undo.pop()()

    def _set(self, name: str, module: nn.Module, attribute: str, value: object) -> None:
        before = getattr(module, attribute)
        if before != value:
            setattr(module, attribute, value)
            self._undo.append(partial(setattr, module, attribute, before))
            self.changed.append(name)

    def _wrap_forward(self, model: nn.Module, dense: DensePrecision) -> None:
        forward = model.forward
        own = "forward" in model.__dict__  # another recipe's, or of whoever recomputes this module in backward
        self._undo.append(partial(setattr, model, "forward", forward) if own else partial(delattr, model, "forward"))
        if isinstance(forward, partial) and forward.func is _forward_under_autocast:
            forward = forward.args[1]  # autocast of the innermost context counts, and the latest recipe must
        model.forward = partial(_forward_under_autocast, model, forward, dense == "bfloat16")
        self.changed.append("")


def _forward_under_autocast(
    model: nn.Module, forward: Callable[..., Any], enabled: bool, *arguments: Any, **options: Any
) -> Any:
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        return forward(*arguments, **options)


def apply_precision(model: nn.Module, recipe: PrecisionRecipe) -> AppliedPrecision:
    """Lets a network compute by a recipe from now on; no parameter changes.

    The network may be divided by FSDP2 and over experts. With activation checkpointing the recipe must stay until
    backward is over, because backward computes forward again.

    Args:
        model: The network whose forward a step calls: for `dense` it must be called as a module.
        recipe: The formats.

    Returns:
        What changed, and the way back.

    Raises:
        ValueError: If the network has no part that the recipe names, or its device has no E4M3 products; nothing has
            been changed then.
    """
    kind = type(model).__name__
    experts = [(name, part) for name, part in model.named_modules() if isinstance(part, RoutedExperts)]
    heads = [(name, part) for name, part in model.named_modules() if isinstance(part, LanguageModelHead)]
    for name, parts, wanted in (("experts", experts, "RoutedExperts"), ("head", heads, "LanguageModelHead")):
        value = getattr(recipe, name)
        if value not in (None, "native") and not parts:
            raise ValueError(f"PrecisionRecipe.{name} = {value!r}: {kind} has no {wanted}; leave it None")
    if recipe.dense is not None and hasattr(model, "training_step"):
        raise ValueError(
            f"PrecisionRecipe.dense = {recipe.dense!r} acts on calls of a network, and nobody calls {kind}: apply "
            "it to the network inside"
        )
    if recipe.experts not in (None, "native") and (problem := e4m3_problem(next(experts[0][1].parameters()).device)):
        raise ValueError(f"PrecisionRecipe.experts = {recipe.experts!r}: {problem}")
    applied = AppliedPrecision()
    if recipe.experts is not None:
        for name, part in experts:
            applied._set(name, part, "precision", recipe.experts)
    if recipe.head is not None:
        for name, head in heads:
            applied._set(name, head, "logits_dtype", torch.float32 if recipe.head == "float32" else None)
    if recipe.dense is not None:
        applied._wrap_forward(model, recipe.dense)
    return applied


@contextmanager
def computing_in(model: nn.Module, recipe: PrecisionRecipe | None) -> Iterator[AppliedPrecision]:
    """A network computes by a recipe inside, and as before afterwards, whatever happens; see `apply_precision`.

    Args:
        model: The network.
        recipe: The formats; None changes nothing.
    """
    applied = apply_precision(model, recipe or PrecisionRecipe())
    try:
        yield applied
    finally:
        applied.restore()
