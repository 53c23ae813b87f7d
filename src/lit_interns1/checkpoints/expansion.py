"""Larger sparse models from smaller ones: which old expert a new one copies, and the config that results.

With E₀ old and E = r E₀ new experts in G groups of E/G:
    grouped:  r replicas of G/r groups each; in a replica one random order of all E₀ experts is cut into its groups
    ranked:   one random order is cut into G parts; group γ holds r copies of part γ
With old probabilities p, K = G and no noise, group γ picks its best old expert b_γ, and the new layer computes
    y = Σ_γ p_{b_γ} E_{b_γ}(x) / Σ_γ p_{b_γ}            (the softmax over r copies divides every p by r, which cancels)

Intern-S1-Pro was made from Intern-S1 like this, 128 → 512 experts in 8 groups (arXiv 2603.25040 §2, Fig. 2). The paper
says that every group must own experts that were first or second choices, and that groups made of former ranks failed;
both assignments here are reconstructions of that. Dense models become sparse ones by copying their feed-forward network
into every expert ("sparse upcycling", arXiv 2212.05055).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.models.config import changed
from lit_interns1.nn.initialization import keyed_generator

ExpansionMethod = Literal["grouped", "ranked"]


@dataclass(frozen=True)
class Expansion:
    """How a model grows. None leaves something as it is.

    Attributes:
        num_experts: E, experts of every sparse layer, a multiple of the present number. Makes a dense model sparse.
        num_groups: G, groups of the router.
        experts_per_token: K.
        method: "grouped", or "ranked", the assignment that failed in the paper; see the module.
        router_noise: Router rows get noise of this many times the standard deviation of their row.
        expert_noise: The same for the rows of expert matrices.
        router_std: Dense to sparse: standard deviation of new routers; None: the model's initializer_range.
        dense_layers: Dense to sparse: layers that stay dense.
        router_gradient: "topk" or "ste"; None: "ste" where a softmax router gets groups, else as it is.
        positions: Fields of `PositionConfig` to change, such as {"kind": "fope", "fope_sin_pad": 1.0}.
        vocab_size: V. New rows of embedding and head are the mean of the old ones plus noise.
        vocab_noise: Noise of new rows, times the standard deviation of each column.
        allow_smaller_vocab: Let `vocab_size` cut rows off.
        seed: Seed of orders and noise.

    Raises:
        ValueError: If a value is out of its range.
    """

    num_experts: int | None = None
    num_groups: int | None = None
    experts_per_token: int | None = None
    method: ExpansionMethod = "grouped"
    router_noise: float = 1e-2
    expert_noise: float = 0.0
    router_std: float | None = None
    dense_layers: tuple[int, ...] = ()
    router_gradient: Literal["topk", "ste"] | None = None
    positions: Mapping[str, Any] | None = None
    vocab_size: int | None = None
    vocab_noise: float = 1e-2
    allow_smaller_vocab: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(ExpansionMethod):
            raise ValueError(
                f"method = {self.method!r} is unknown: choose one of {', '.join(get_args(ExpansionMethod))}"
            )
        for name in ("num_experts", "num_groups", "experts_per_token", "vocab_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        for name in ("router_noise", "expert_noise", "router_std", "vocab_noise"):
            if (factor := getattr(self, name)) is not None and not 0 <= factor < float("inf"):
                raise ValueError(f"{name} must be 0 or a positive number, got {factor}")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))


def expanded_config(config: LanguageModelConfig, expansion: Expansion) -> LanguageModelConfig:
    """The config of the grown model.

    Raises:
        ValueError: If the numbers do not fit together, or the expansion is not defined for this model.
    """
    changes: dict[str, Any] = {}
    if config.moe is None:
        changes |= _sparse_from_dense(config, expansion)
    else:
        if expansion.dense_layers or expansion.router_std is not None:
            raise ValueError(
                f"dense_layers = {list(expansion.dense_layers)} and router_std = {expansion.router_std} are for dense "
                f"models, this one has {config.moe.num_experts} experts"
            )
        changes |= {"moe": _router_changes(config, expansion)}
    if expansion.positions is not None:
        changes["positions"] = _position_changes(config, expansion.positions)
    if expansion.vocab_size is not None:
        if expansion.vocab_size < config.vocab_size and not expansion.allow_smaller_vocab:
            raise ValueError(
                f"vocab_size = {expansion.vocab_size} would cut off rows of the present {config.vocab_size}: allow it "
                "with allow_smaller_vocab if those tokens are not used"
            )
        changes["vocab_size"] = expansion.vocab_size
    grown = changed(config, changes)
    if grown == config:
        raise ValueError("the expansion changes nothing: give another number of experts, groups, tokens or positions")
    return grown


def _sparse_from_dense(config: LanguageModelConfig, expansion: Expansion) -> dict[str, Any]:
    asked = {name: getattr(expansion, name) for name in ("num_groups", "experts_per_token", "router_gradient")}
    if expansion.num_experts is None:
        if expansion.dense_layers or any(value is not None for value in asked.values()):
            raise ValueError(f"num_experts is needed to make this dense model sparse with {asked}")
        return {}
    if expansion.experts_per_token is None:
        raise ValueError(
            f"experts_per_token is needed beside num_experts = {expansion.num_experts} to make a dense model sparse"
        )
    groups = expansion.num_groups or 1
    moe = MoEConfig(
        expansion.num_experts, expansion.experts_per_token, config.intermediate_size,
        router="grouped" if groups > 1 else "topk", num_groups=groups,
        router_gradient=expansion.router_gradient or ("ste" if groups > 1 else "topk"),
    )  # fmt: skip
    size = config.intermediate_size if expansion.dense_layers else 0
    return {"moe": moe, "dense_layers": expansion.dense_layers, "intermediate_size": size}


def _router_changes(config: LanguageModelConfig, expansion: Expansion) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    experts = expansion.num_experts or moe.num_experts
    groups = expansion.num_groups or moe.num_groups
    changes: dict[str, Any] = {"num_experts": experts, "num_groups": groups}
    if expansion.experts_per_token is not None:
        changes["experts_per_token"] = expansion.experts_per_token
    if moe.router != "sigmoid":
        changes["router"] = "grouped" if groups > 1 else "topk"
        if groups != moe.num_groups and groups > 1:
            changes["router_gradient"] = "ste"
    if expansion.router_gradient is not None:
        changes["router_gradient"] = expansion.router_gradient
    if (experts, groups) != (moe.num_experts, moe.num_groups):
        if moe.num_groups > 1:
            raise ValueError(
                f"the router has {moe.num_groups} groups already: an assignment of its {moe.num_experts} experts to "
                f"num_experts = {experts} in num_groups = {groups} is only defined for a router without groups"
            )
        _check_assignment(moe.num_experts, experts, groups, expansion.method)
    return changes


def _check_assignment(old: int, new: int, groups: int, method: str) -> None:
    if new % old:
        raise ValueError(f"num_experts = {new} must be a multiple of the model's {old}")
    if new % groups:
        raise ValueError(f"num_experts = {new} must be divisible by num_groups = {groups}")
    if method == "grouped" and groups % (new // old):
        raise ValueError(
            f"num_groups = {groups} must be divisible by {new // old} = {new}/{old} (num_experts, now and before): "
            "method 'grouped' gives every copy of the old experts as many groups as the others"
        )
    if method == "ranked" and old % groups:
        raise ValueError(f"the model's {old} experts must be divisible by num_groups = {groups} for method 'ranked'")


def _position_changes(config: LanguageModelConfig, positions: Mapping[str, Any]) -> Mapping[str, Any]:
    old = config.positions
    if old.kind == "fope":
        raise ValueError(
            f"positions = {dict(positions)}: the model has FoPE already, with mixing matrices for its own frequencies"
        )
    fourier = [f"{name} = {value}" for name, value in positions.items() if name.startswith("fope_")]
    if fourier and positions.get("kind", old.kind) != "fope":
        raise ValueError(f"{', '.join(fourier)} needs positions 'fope', got {positions.get('kind', old.kind)!r}")
    return positions


def expert_sources(config: LanguageModelConfig, expansion: Expansion) -> Tensor | None:
    """Which old expert each new one copies.

    Args:
        config: The model before.
        expansion: What is to be done.

    Returns:
        (sparse layers, E) int64; None if the experts stay as they are, or come from dense layers.
    """
    if config.moe is None:
        return None
    grown = expanded_config(config, expansion).moe
    assert grown is not None
    old = config.moe
    if (grown.num_experts, grown.num_groups) == (old.num_experts, old.num_groups):
        return None
    assign = {"grouped": grouped_assignment, "ranked": ranked_assignment}[expansion.method]
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    rows = [assign(old.num_experts, grown.num_experts, grown.num_groups, expansion.seed, layer) for layer in layers]
    return torch.stack(rows)


def grouped_assignment(old: int, new: int, groups: int, seed: int, layer: int) -> Tensor:
    """Old expert of every new one: each of r replicas is a random order of all, cut into groups.

    Args:
        old: E₀.
        new: E, a multiple of E₀.
        groups: G, a multiple of E/E₀.
        seed: Seed of the orders.
        layer: Every layer has its own.

    Returns:
        (E,) int64; inside a group old experts ascend.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    _check_assignment(old, new, groups, "grouped")
    replicas = [_random_order(old, seed, layer, replica) for replica in range(new // old)]
    return torch.cat(replicas).view(groups, new // groups).sort(dim=1).values.flatten()


def ranked_assignment(old: int, new: int, groups: int, seed: int, layer: int) -> Tensor:
    """Old expert of every new one: group γ has r copies of part γ of all; arguments as `grouped_assignment`.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    _check_assignment(old, new, groups, "ranked")
    parts_GP = _random_order(old, seed, layer, 0).view(groups, old // groups).sort(dim=1).values
    return parts_GP.repeat(1, new // old).flatten()


def _random_order(experts: int, seed: int, layer: int, replica: int) -> Tensor:
    return torch.randperm(experts, generator=keyed_generator(f"{seed}:{layer}:{replica}"))
