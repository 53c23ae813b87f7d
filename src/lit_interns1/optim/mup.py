"""Learning rate and weight decay by module, so that a rate found on a small model holds for a wide or deep one.

    m = width / base width,  ℓ = depth / base depth,  1/2 ≤ α ≤ 1

    embedding, head, router, final norm      η               λ
    matrices inside layers, each expert      η / m · ℓ^(α−1)    λ · m
    norms and biases inside layers           η · ℓ^(α−1)        0

A reconstruction: the rows of dense models are µP with CompleteP's depth rule (arXiv 2505.01618, α = 1); experts are
taken as dense matrices and the router as an output layer. arXiv 2601.05049 extends µTransfer to MoE, but its table of
rules was not available. It reports that one rate for all, predicted by the fitted law, does better at scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lit_interns1.nn.head import LanguageModelHead

ModuleClass = Literal["embedding", "hidden", "hidden_vector", "final_norm", "head", "router"]


@dataclass(frozen=True)
class MupRule:
    """Multipliers of one module class.

    Attributes:
        learning_rate: On η.
        weight_decay: On λ.
        init_std: On the standard deviation of initial weights.
        forward: On the module's output: logits of head and router.
    """

    learning_rate: float
    weight_decay: float
    init_std: float = 1.0
    forward: float = 1.0


def mup_rules(width: float, depth: float = 1.0, alpha: float = 1.0) -> dict[ModuleClass, MupRule]:
    """The rules for width multiplier m and depth multiplier ℓ.

    `mup_groups` applies learning rate and weight decay; `init_std` and `forward` are the model's to apply, as are the
    branch factor ℓ^−α (`residual_multiplier`) and AdamW's ε / (m ℓ^α) (`epsilon_multiplier`).

    Args:
        width: m.
        depth: ℓ.
        alpha: α, the exponent of depth: 1 (CompleteP) or 0.5 (depth-µP).

    Raises:
        ValueError: If a multiplier is not positive or α lies outside [0.5, 1].
    """
    if width <= 0 or depth <= 0:
        raise ValueError(f"width and depth multipliers must be positive, got {width} and {depth}")
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0.5, 1], got {alpha}")
    deep = depth ** (alpha - 1)
    return {
        "embedding": MupRule(1.0, 1.0),
        "hidden": MupRule(deep / width, width, init_std=width**-0.5),
        "hidden_vector": MupRule(deep, 0.0),
        "final_norm": MupRule(1.0, 0.0),
        "head": MupRule(1.0, 1.0, forward=1 / width),
        "router": MupRule(1.0, 1.0, forward=1 / width),
    }


def residual_multiplier(depth: float, alpha: float = 1.0) -> float:
    """ℓ^−α, the factor of every residual branch."""
    return depth**-alpha


def epsilon_multiplier(width: float, depth: float = 1.0, alpha: float = 1.0) -> float:
    """1 / (m ℓ^α), the factor on AdamW's ε."""
    return 1 / (width * depth**alpha)


def module_classes(model: nn.Module) -> dict[str, ModuleClass]:
    """The class of every parameter by name, from the module that holds it.

    Layers are the entries of `nn.ModuleList`s. A router is a module whose class or name says so ("router", or a
    matrix named "gate"); a head is a `LanguageModelHead`, or a matrix outside layers that is no embedding. Tied
    weights count as embedding.
    """
    modules = dict(model.named_modules())
    layers = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    tables = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    classes: dict[str, ModuleClass] = {}
    for name, parameter in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        inside = any(name.startswith(prefix) for prefix in layers)
        if id(parameter) in tables:
            classes[name] = "embedding"
        elif isinstance(owner, LanguageModelHead):
            classes[name] = "head"
        elif parameter.ndim < 2:
            classes[name] = "hidden_vector" if inside else "final_norm"
        elif "router" in type(owner).__name__.lower() or owner_name.rpartition(".")[2] in ("router", "gate"):
            classes[name] = "router"
        else:
            classes[name] = "hidden" if inside else "head"
    return classes


def mup_groups(
    model: nn.Module,
    lr: float,
    width: float,
    depth: float = 1.0,
    weight_decay: float = 0.0,
    alpha: float = 1.0,
    rules: Mapping[ModuleClass, MupRule] | None = None,
    classify: Callable[[nn.Module], Mapping[str, ModuleClass]] = module_classes,
) -> list[dict[str, Any]]:
    """Parameter groups, one per module class, with `lr` and `weight_decay` by the rules.

    Every group also holds `lr_multiplier` (which `LearningRateSearch` divides by, so that it searches η itself) and
    `mup_class`.

    Args:
        model: Parameters that do not require a gradient are left out.
        lr: η, the rate of the base model.
        width: m = hidden size / that of the base model.
        depth: ℓ = layers / those of the base model.
        weight_decay: λ of the base model.
        alpha: See `mup_rules`.
        rules: Instead of `mup_rules`.
        classify: Instead of `module_classes`, for modules that it does not understand.

    Raises:
        ValueError: If `lr` is not positive, or as `mup_rules`.
    """
    if lr <= 0 or weight_decay < 0:
        raise ValueError(f"lr must be positive and weight_decay not negative, got {lr} and {weight_decay}")
    rules = mup_rules(width, depth, alpha) if rules is None else rules
    classes = classify(model)
    groups: dict[ModuleClass, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = rules[classes[name]]
        group = groups.setdefault(
            classes[name],
            {
                "params": [], "lr": lr * rule.learning_rate, "weight_decay": weight_decay * rule.weight_decay,
                "lr_multiplier": rule.learning_rate, "mup_class": classes[name],
            },
        )  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())
