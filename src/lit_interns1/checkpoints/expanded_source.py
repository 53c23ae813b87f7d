"""A grown model as a source of weights: windows of the new tensors are made from windows of the old ones.

    experts, router rows   new[e] = old[s(e)] + ε std(row) N(0, 1)                  s: `expert_sources`
    dense to sparse        gate_up[e] = (gate; up),  down[e] = down;   router ~ N(0, std²)
    vocabulary             new rows = mean of old rows + ε std(column) N(0, 1)
    RoPE to FoPE           sin_coef, cos_coef as the model itself starts them

Nothing is held but what is asked for, and one matrix of noise. Numbers depend on the seed, the name and the expert, not
on windows or processes: standard deviations are taken of exact sums, so the order of adding does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_interns1.checkpoints.agreement import this_rank
from lit_interns1.checkpoints.exact_moments import column_moments, exact_sums, moments
from lit_interns1.checkpoints.expansion import Expansion, expanded_config, expert_sources
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.files import Window
from lit_interns1.checkpoints.huggingface.sources import TensorInfo, WeightSource, whole_window
from lit_interns1.models import LanguageModel, LanguageModelConfig
from lit_interns1.nn.initialization import draw_normal

_PER_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.(router\.(weight|expert_bias)|experts\.(gate_up|down)_proj)")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


class _Tensor(Protocol):
    """One tensor of the grown model."""

    @property
    def info(self) -> TensorInfo: ...

    def windows(self) -> Sequence[Window]: ...

    def read(self, window: Window) -> Tensor: ...


class ExpandedSource:
    """The tensors of a grown model.

    Every process that contributes to `source` makes one: growing the vocabulary over several processes communicates.

    Args:
        source: The tensors of the model.
        config: The model.
        expansion: How it grows.

    Attributes:
        config: The grown model.
        sources_LE: Which old expert each new one copies, see `expert_sources`.
        tensors: All tensors of the grown model.

    Raises:
        ValueError: If the expansion is not defined for this model.
        WeightsError: If a tensor of the model is missing, or cut so that the noise of a row cannot be told.
    """

    def __init__(self, source: WeightSource, config: LanguageModelConfig, expansion: Expansion) -> None:
        self.config = expanded_config(config, expansion)
        self.sources_LE = expert_sources(config, expansion)
        self._made: dict[str, _Tensor] = {name: _Same(source, name) for name in source.tensors}
        self._source, self._expansion = source, expansion
        if config.moe is None and self.config.moe is not None:
            self._make_sparse()
        elif self.sources_LE is not None:
            self._copy_experts(config, self.sources_LE)
        if self.config.vocab_size != config.vocab_size:
            self._resize_vocabulary()
        if self.config.positions.kind == "fope" and config.positions.kind == "rope":
            self._mix_frequencies()
        self.tensors = {name: tensor.info for name, tensor in self._made.items()}

    def windows(self, name: str) -> Sequence[Window]:
        """What this process contributes of a tensor."""
        return self._made[name].windows()

    def read(self, name: str, window: Window) -> Tensor:
        """The numbers of a box inside one of `windows(name)`."""
        return self._made[name].read(window)

    def _copy_experts(self, config: LanguageModelConfig, sources_LE: Tensor) -> None:
        layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
        sources = dict(zip(layers, sources_LE.tolist(), strict=True))
        for name in self._source.tensors:
            if (match := _PER_EXPERT.fullmatch(name)) is None:
                continue
            noise = self._expansion.router_noise if match[3] == "weight" else 0.0
            if match[4] is not None:
                noise = self._expansion.expert_noise
            key = f"{self._expansion.seed}:{name}:noise"
            self._made[name] = _Copies(self._source, name, sources[int(match[1])], noise, key)

    def _make_sparse(self) -> None:
        moe, expansion = self.config.moe, self._expansion
        assert moe is not None
        std = self.config.initializer_range if expansion.router_std is None else expansion.router_std
        for layer in range(self.config.num_layers):
            if not self.config.is_moe_layer(layer):
                continue
            block = f"layers.{layer}.mlp."
            parts = {name: f"{block}{name}_proj.weight" for name in ("gate", "up", "down")}
            if missing := [name for name in parts.values() if name not in self._made]:
                raise WeightsError(f"the dense model has no {', '.join(missing)}, which its experts would copy")
            for names, ours in (((parts["gate"], parts["up"]), "gate_up_proj"), ((parts["down"],), "down_proj")):
                name = f"{block}experts.{ours}"
                key = f"{expansion.seed}:{name}:noise"
                self._made[name] = _Upcycled(self._source, names, moe.num_experts, expansion.expert_noise, key)
            for name in parts.values():
                del self._made[name]
            info = TensorInfo((moe.num_experts, self.config.hidden_size), self._source.tensors[parts["gate"]].dtype)
            name = f"{block}router.weight"
            self._made[name] = _Drawn(info, partial(draw_normal, f"{expansion.seed}:{name}", info.shape, std))

    def _resize_vocabulary(self) -> None:
        expansion, rows = self._expansion, self.config.vocab_size
        for name in _VOCABULARY:
            if name not in self._source.tensors:
                continue
            new = None
            if rows > self._source.tensors[name].shape[0]:
                mean_D, deviation_D = column_moments(self._source, name)
                new = mean_D, expansion.vocab_noise * deviation_D
            key = f"{expansion.seed}:{name}:noise"
            self._made[name] = _Resized(self._source, name, rows, new, key)

    def _mix_frequencies(self) -> None:
        rotary = LanguageModel.build_rotary(self.config)
        for name, tensor in rotary.state_dict(prefix="rotary_emb.").items():
            self._made[name] = _Drawn(TensorInfo(tuple(tensor.shape), torch.float32), tensor.clone)


# -- kinds of tensors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Same:
    """A tensor that stays."""

    source: WeightSource
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.name]

    def windows(self) -> Sequence[Window]:
        return self.source.windows(self.name)

    def read(self, window: Window) -> Tensor:
        return self.source.read(self.name, window)


@dataclass(frozen=True)
class _Drawn:
    """A small tensor that is made here; the first process contributes it."""

    info: TensorInfo
    draw: Callable[[], Tensor]

    def windows(self) -> Sequence[Window]:
        return [whole_window(self.info.shape)] if this_rank()[0] == 0 else []

    def read(self, window: Window) -> Tensor:
        return self.draw()[window].to(self.info.dtype)


@dataclass(frozen=True)
class _Copies:
    """Experts or router rows (E, ...) as copies of E₀ others."""

    source: WeightSource
    name: str
    sources_E: list[int]
    noise: float
    key: str

    def __post_init__(self) -> None:
        _check_whole_rows(self.source, self.name, self.noise)

    @property
    def info(self) -> TensorInfo:
        old = self.source.tensors[self.name]
        return TensorInfo((len(self.sources_E), *old.shape[1:]), old.dtype)

    def windows(self) -> Sequence[Window]:
        old = self.source.windows(self.name)
        if list(old) == [whole_window(self.source.tensors[self.name].shape)]:
            return [whole_window(self.info.shape)]
        return [
            (slice(expert, expert + 1), *box[1:])
            for expert, copied in enumerate(self.sources_E)
            for box in old
            if box[0].start <= copied < box[0].stop
        ]

    def read(self, window: Window) -> Tensor:
        info = self.info
        result = torch.empty([part.stop - part.start for part in window], dtype=info.dtype)
        for place, expert in enumerate(range(window[0].start, window[0].stop)):
            result[place] = _with_noise(
                partial(self._read_old, self.sources_E[expert]), window[1:], info.shape[1:], self.noise,
                f"{self.key}:{expert}",
            )  # fmt: skip
        return result

    def _read_old(self, expert: int, inner: Window) -> Tensor:
        return self.source.read(self.name, (slice(expert, expert + 1), *inner))[0]


@dataclass(frozen=True)
class _Upcycled:
    """A stack of E copies of one dense matrix, or of several, one below the other."""

    source: WeightSource
    names: tuple[str, ...]
    experts: int
    noise: float
    key: str

    def __post_init__(self) -> None:
        for name in self.names:
            _check_whole_rows(self.source, name, self.noise)

    @property
    def info(self) -> TensorInfo:
        parts = [self.source.tensors[name] for name in self.names]
        rows = sum(part.shape[0] for part in parts)
        return TensorInfo((self.experts, rows, parts[0].shape[1]), parts[0].dtype)

    def _first_rows(self) -> list[int]:
        return [self.source.tensors[self.names[0]].shape[0] * number for number in range(len(self.names))]

    def windows(self) -> Sequence[Window]:
        return [
            (slice(0, self.experts), slice(first + rows.start, first + rows.stop), columns)
            for name, first in zip(self.names, self._first_rows(), strict=True)
            for rows, columns in self.source.windows(name)
        ]

    def read(self, window: Window) -> Tensor:
        number, shape = window[0].stop - window[0].start, self.info.shape[1:]
        if not self.noise:
            values = self._read_dense(window[1:])
            return values.expand(number, *values.shape)
        experts = range(window[0].start, window[0].stop)
        return torch.stack(
            [_with_noise(self._read_dense, window[1:], shape, self.noise, f"{self.key}:{e}") for e in experts]
        )

    def _read_dense(self, inner: Window) -> Tensor:
        rows, columns = inner
        parts = zip(self.names, self._first_rows(), strict=True)
        name, first = max((part for part in parts if part[1] <= rows.start), key=lambda part: part[1])
        return self.source.read(name, (slice(rows.start - first, rows.stop - first), columns))


@dataclass(frozen=True)
class _Resized:
    """Rows of a vocabulary: the old ones, then new ones with this mean and deviation; or the first of the old ones."""

    source: WeightSource
    name: str
    rows: int
    new: tuple[Tensor, Tensor] | None
    key: str

    @property
    def info(self) -> TensorInfo:
        old = self.source.tensors[self.name]
        return TensorInfo((self.rows, old.shape[1]), old.dtype)

    def windows(self) -> Sequence[Window]:
        result = []
        for rows, columns in self.source.windows(self.name):
            is_last = rows.stop == self.source.tensors[self.name].shape[0]  # who has the last row adds the new ones
            stop = self.rows if is_last else min(rows.stop, self.rows)
            if rows.start < stop:
                result.append((slice(rows.start, stop), columns))
        return result

    def read(self, window: Window) -> Tensor:
        rows, columns = window
        info, old = self.info, min(rows.stop, self.source.tensors[self.name].shape[0])
        parts = [self.source.read(self.name, (slice(rows.start, old), columns))] if rows.start < old else []
        for row in range(max(rows.start, old), rows.stop):
            assert self.new is not None
            mean_D, deviation_D = self.new
            noise_D = deviation_D * draw_normal(f"{self.key}:{row}", info.shape[1:], 1.0).double()
            parts.append((mean_D + noise_D)[None, columns].to(info.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- numbers -----------------------------------------------------------------------------------------------------------


def _check_whole_rows(source: WeightSource, name: str, noise: float) -> None:
    shape = source.tensors[name].shape
    for box in source.windows(name) if noise else ():
        if box[-1] != slice(0, shape[-1]):
            raise WeightsError(
                f"noise = {noise} on {name} {shape} is relative to the deviation of whole rows, but this process holds "
                f"columns {box[-1].start} to {box[-1].stop} only: expand from a checkpoint, or with noise 0"
            )


def _with_noise(
    read: Callable[[Window], Tensor], window: Window, shape: tuple[int, ...], noise: float, key: str
) -> Tensor:
    """A window of a matrix with noise relative to the standard deviation of each row.

    Rows are read whole, and the noise of the whole matrix is drawn, so that windows do not matter.
    """
    if not noise:
        return read(window)
    rows = (*window[:-1], slice(0, shape[-1]))
    values = read(rows)
    wide = values.double()
    largest = wide.abs().amax(-1)
    _, deviation = moments(exact_sums(wide, -1, largest, shape[-1]), largest, shape[-1])
    wide = wide + deviation.unsqueeze(-1) * draw_normal(key, shape, noise).double()[rows]
    return wide[..., window[-1]].to(values.dtype)


# -- in memory ---------------------------------------------------------------------------------------------------------


class StateDictSource:
    """Tensors in memory as a source.

    Args:
        state_dict: The tensors by our names.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.state_dict = state_dict
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}

    def windows(self, name: str) -> Sequence[Window]:
        """Whole tensors."""
        return [whole_window(self.state_dict[name].shape)]

    def read(self, name: str, window: Window) -> Tensor:
        """A view."""
        return self.state_dict[name].detach()[window]


class ExpandedModel(NamedTuple):
    """A grown model in memory.

    Attributes:
        state_dict: Its tensors.
        config: Its config.
        sources_LE: Which old expert each new one copies, (sparse layers, E); None if none was copied.
    """

    state_dict: dict[str, Tensor]
    config: LanguageModelConfig
    sources_LE: Tensor | None


def expand_experts(
    state_dict: Mapping[str, Tensor], config: LanguageModelConfig, expansion: Expansion
) -> ExpandedModel:
    """Grows a model in memory.

    Args:
        state_dict: Of a `LanguageModel`.
        config: Of the same.
        expansion: How it grows.

    Raises:
        ValueError: If the expansion is not defined for this model.
    """
    tied = config.tie_word_embeddings and "lm_head.weight" in state_dict
    source = StateDictSource({name: t for name, t in state_dict.items() if not (tied and name == "lm_head.weight")})
    grown = ExpandedSource(source, config, expansion)
    result = {}
    for name, info in grown.tensors.items():
        result[name] = torch.empty(info.shape, dtype=info.dtype)
        for window in grown.windows(name):
            result[name][window] = grown.read(name, window)
    if tied:
        result["lm_head.weight"] = result["embed_tokens.weight"]
    return ExpandedModel(result, grown.config, grown.sources_LE)
