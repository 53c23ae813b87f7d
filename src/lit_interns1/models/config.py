"""Shapes of language models: plain frozen dataclasses, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from lit_interns1.nn.moe.experts import ExpertPrecision
from lit_interns1.nn.moe.router import ROUTERS
from lit_interns1.nn.rotary import kept_frequencies

Config = TypeVar("Config")


def check_positive(config: object, *names: str) -> None:
    """Raises ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be at least 1, got {getattr(config, name)}")


def check_divides(whole: tuple[str, int], part: tuple[str, int]) -> None:
    """Raises ValueError, with both names and numbers, unless the second divides the first."""
    if whole[1] % part[1]:
        raise ValueError(f"{whole[0]} = {whole[1]} must be divisible by {part[0]} = {part[1]}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is unknown: choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class PositionConfig:
    """How positions enter attention.

    Attributes:
        kind: "rope" (Intern-S1, Qwen3, Llama) or "fope" (Intern-S1-Pro).
        theta: Base of the frequencies.
        max_position_embeddings: Longest position; FoPE drops the frequencies that do not complete a period in it.
        fope_init_factor: FoPE: gain of the noise on the mixing matrices; 0 starts as RoPE on the kept frequencies.
        fope_separate_heads: FoPE: one mixing matrix per key/value head.
        fope_num_frequencies: FoPE: keep this many frequencies instead of following the rule.
        fope_sin_pad: FoPE: value of the padded sine channels: 1 as in the released code of Intern-S1-Pro, which knows
            nothing else; 0 leaves them unrotated.
        fope_seed: FoPE: seed of the mixing matrices (the same on every rank).
        fope_trainable: FoPE: train the mixing matrices.
    """

    kind: Literal["rope", "fope"] = "rope"
    theta: float = 1e6
    max_position_embeddings: int = 40960
    fope_init_factor: float = 0.5
    fope_separate_heads: bool = True
    fope_num_frequencies: int | None = None
    fope_sin_pad: float = 1.0
    fope_seed: int = 123
    fope_trainable: bool = False

    def __post_init__(self) -> None:
        _one_of("positions.kind", self.kind, ("rope", "fope"))
        check_positive(self, "max_position_embeddings")
        if self.theta <= 1:
            raise ValueError(f"positions.theta must be above 1, got {self.theta}")


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forward network of every MoE layer.

    Attributes:
        num_experts: E, routed experts per layer.
        experts_per_token: K.
        intermediate_size: Width inside one expert.
        router: "topk" (Intern-S1), "grouped" (Intern-S1-Pro: K/G experts in each of G groups) or "sigmoid" (with a
            bias that balances the load without a loss).
        num_groups: G; divides E and K. 1 for "topk".
        normalize_weights: Divide the K weights by their sum (`norm_topk_prob`).
        scaling_factor: Multiplies the weights.
        router_dtype: "float32", or "native" = the model's type.
        router_gradient: "topk" (through chosen weights) or "ste" (straight-through, dense; Intern-S1-Pro).
        ste_temperature: Temperature of the straight-through gradient.
        freeze_router: Do not train the router.
        expert_backend: "auto" (the fastest that runs on the device), "fused", "grouped_mm", or "loop" for reference.
        expert_precision: What experts multiply: "native" = numbers of the model's type, "fp8" = E4M3 with a float32
            scale per block of 128, "fp8_power_of_two" = the same with scales that are powers of two.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    router: Literal["topk", "grouped", "sigmoid"] = "topk"
    num_groups: int = 1
    normalize_weights: bool = True
    scaling_factor: float = 1.0
    router_dtype: Literal["float32", "native"] = "float32"
    router_gradient: Literal["topk", "ste"] = "topk"
    ste_temperature: float = 1.0
    freeze_router: bool = False
    expert_backend: Literal["auto", "fused", "grouped_mm", "loop"] = "auto"
    expert_precision: ExpertPrecision = "native"

    def __post_init__(self) -> None:
        check_positive(self, "num_experts", "experts_per_token", "intermediate_size", "num_groups")
        _one_of("moe.router", self.router, tuple(ROUTERS))
        _one_of("moe.expert_precision", self.expert_precision, get_args(ExpertPrecision))
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"moe.experts_per_token = {self.experts_per_token} exceeds moe.num_experts = {self.num_experts}"
            )
        check_divides(("moe.num_experts", self.num_experts), ("moe.num_groups", self.num_groups))
        check_divides(("moe.experts_per_token", self.experts_per_token), ("moe.num_groups", self.num_groups))
        if self.router == "topk" and self.num_groups > 1:
            raise ValueError(f"moe.num_groups = {self.num_groups} needs moe.router = 'grouped', got 'topk'")
        if self.router == "sigmoid" and self.router_gradient == "ste":
            raise ValueError(
                "moe.router_gradient = 'ste' is defined for softmax routers, not for moe.router = 'sigmoid'"
            )


@dataclass(frozen=True)
class LanguageModelConfig:
    """A decoder-only language model: Intern-S1, S1-mini, Pro, and any Qwen3 or Llama-style decoder.

    Attributes:
        vocab_size: V.
        hidden_size: Width of the residual stream.
        num_layers: Decoder blocks.
        num_heads: Query heads.
        num_kv_heads: Key/value heads, a divisor of the query heads.
        head_dim: Width of a head; heads × width need not be the hidden size.
        intermediate_size: Width inside dense feed-forward layers.
        moe: The sparse feed-forward layers; None = a dense model.
        dense_layers: Indices of layers that stay dense in an MoE model (`mlp_only_layers`).
        positions: Position encoding.
        qk_norm: RMSNorm on queries and keys (Qwen3); off for Llama.
        attention_bias: Biases on the query, key and value projections.
        rms_norm_eps: ε of every RMSNorm.
        tie_word_embeddings: The head uses the embedding's weight.
        head_dtype: "float32" computes logits in float32 whatever the model's type; "native" in the model's type (log-
            probabilities are float32 either way).
        initializer_range: Standard deviation of initial weights.
        attention_backend: "sdpa", "flex" or "dense" (the reference).
        activation_checkpointing: "none", or "block": recompute every block in backward, with its router's choice saved.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int = 0
    moe: MoEConfig | None = None
    dense_layers: tuple[int, ...] = ()
    positions: PositionConfig = field(default_factory=PositionConfig)
    qk_norm: bool = True
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    head_dtype: Literal["native", "float32"] = "native"
    initializer_range: float = 0.02
    attention_backend: Literal["sdpa", "flex", "dense"] = "sdpa"
    activation_checkpointing: Literal["none", "block"] = "none"

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_divides(("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads))
        check_divides(("head_dim", self.head_dim), ("2 (halves of a rotation)", 2))
        _one_of("attention_backend", self.attention_backend, ("sdpa", "flex", "dense"))
        _one_of("activation_checkpointing", self.activation_checkpointing, ("none", "block"))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if any(not 0 <= layer < self.num_layers for layer in self.dense_layers):
            raise ValueError(
                f"dense_layers = {self.dense_layers} must lie in 0 … num_layers − 1 = {self.num_layers - 1}"
            )
        if any(not self.is_moe_layer(i) for i in range(self.num_layers)) and self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1 for dense layers, got {self.intermediate_size}")
        if self.positions.kind == "fope":
            kept = kept_frequencies(
                self.head_dim,
                self.positions.theta,
                self.positions.max_position_embeddings,
                self.positions.fope_num_frequencies,
            )
            if not 1 <= kept <= self.head_dim // 2:
                raise ValueError(
                    f"FoPE would keep {kept} of head_dim/2 = {self.head_dim // 2} frequencies; "
                    "check positions.theta, positions.max_position_embeddings and positions.fope_num_frequencies"
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the block with this index is sparse."""
        return self.moe is not None and layer not in self.dense_layers

    @property
    def num_moe_layers(self) -> int:
        """Sparse blocks."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with some fields changed; a mapping changes fields of the config inside, as in {"moe": {...}}.

    Raises:
        ValueError: If a field does not exist, or the result is no valid config.
    """
    values = dict(changes)
    known = [entry.name for entry in fields(config)]  # type: ignore[arg-type]
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{type(config).__name__} has no field {name!r} to change: it has {', '.join(known)}")
        inner = getattr(config, name)
        if isinstance(value, Mapping):
            if not is_dataclass(inner):
                raise ValueError(f"{name} = {inner!r} has no fields: {dict(value)} cannot be changed in it")
            values[name] = changed(inner, value)
    return replace(config, **values)  # type: ignore[type-var]


def config_from_dict(values: Mapping[str, Any]) -> LanguageModelConfig:
    """The config that `dataclasses.asdict` was taken of."""
    given = dict(values)
    moe = given.get("moe")
    given["moe"] = MoEConfig(**moe) if moe is not None else None
    given["positions"] = PositionConfig(**given["positions"])
    given["dense_layers"] = tuple(given["dense_layers"])
    return LanguageModelConfig(**given)


def differing_fields(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields of the architecture in which two configs differ, as "name: saved → present"."""
    run_time = {
        "attention_backend", "activation_checkpointing", "expert_backend", "expert_precision", "freeze_router",
        "router_gradient",
    }  # fmt: skip
    differences = []
    for name in sorted(set(saved) | set(present)):
        old, new = saved.get(name), present.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += differing_fields(old, new, f"{prefix}{name}.")
        elif name not in run_time and (list(old) if isinstance(old, tuple) else old) != (
            list(new) if isinstance(new, tuple) else new
        ):
            differences.append(f"{prefix}{name}: {old!r} → {new!r}")
    return differences
