"""What an export writes: which tensor of ours becomes which keys, of which types, at which places of which files.

    source  =  what the config needs, no more and no less;   files  =  source  ∪  scales of FP8  ∪  encoders of `like`

Types follow three rules. A type that is asked for is the type of everything. "native" is the type of the source, or
with `like`, a folder that exists, the type that the tensor has there. "fp8" puts the linear layers of blocks in e4m3
with one scale per block of 128 × 128, and everything else in bfloat16 (or the type of `like`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_interns1.checkpoints.huggingface.audit import saved_tensors
from lit_interns1.checkpoints.huggingface.config import CONFIG_FILE, read_pretrained_config
from lit_interns1.checkpoints.huggingface.encoder_config import NetworkConfig, layout_of, network
from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError, counted
from lit_interns1.checkpoints.huggingface.files import SCALE_SUFFIX, WeightFiles
from lit_interns1.checkpoints.huggingface.json_file import read_json
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.checkpoints.huggingface.rules import Piece, Spelling, pieces
from lit_interns1.checkpoints.huggingface.safetensors_file import StoredTensor
from lit_interns1.checkpoints.huggingface.safetensors_writer import DTYPE_NAMES, PlannedFile, plan_files
from lit_interns1.checkpoints.huggingface.sources import TensorInfo
from lit_interns1.models import MultimodalConfig
from lit_interns1_kernels.fp8_quantize import BLOCK, count_blocks

FLOAT_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Types that can be asked for, and as headers spell them."""
FP8 = "F8_E4M3"
_CONFIG_TYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in DTYPE_NAMES.items()}
_BLOCK_LINEAR = re.compile(
    r"(language_model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(gate_up|down)_proj)"
)


@dataclass(frozen=True)
class WrittenPiece:
    """A piece of a tensor of ours that is one tensor of the files.

    Attributes:
        name: Our tensor.
        piece: Its part, and the key.
        scaled: It is written as FP8, its scales under the key plus `_scale_inv`.
    """

    name: str
    piece: Piece
    scaled: bool


@dataclass(frozen=True)
class ExportPlan:
    """All that is known before a number is read.

    Attributes:
        layout: How the files name tensors.
        pieces: What is written from the source.
        copied: Keys of `like` that are copied byte by byte.
        places: Where every key goes, in natural order.
        files: The files.
        dtype: Type that most bytes have, as config.json spells it; FP8 does not count.
        quantization: `quantization_config` of config.json; None without FP8.
        power_of_two_scales: Scales of FP8 are powers of two.
    """

    layout: Layout
    pieces: tuple[WrittenPiece, ...]
    copied: tuple[str, ...]
    places: dict[str, StoredTensor]
    files: tuple[PlannedFile, ...]
    dtype: str
    quantization: dict[str, Any] | None
    power_of_two_scales: bool


class LikeFolder:
    """A Hugging Face folder that an export resembles.

    Args:
        folder: The folder.

    Raises:
        WeightsError: If it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        pretrained = read_pretrained_config(folder)
        self.folder, self.layout = Path(folder), pretrained.layout
        self.values = read_json(self.folder / CONFIG_FILE)
        self.files = WeightFiles(self.folder, pretrained.block_shape)
        self._by_pattern = {_pattern(key): stored for key, stored in self.files.tensors.items()}

    @property
    def quantization(self) -> Mapping[str, Any]:
        """Its `quantization_config`."""
        return self.values.get("quantization_config") or {}

    def find(self, key: str) -> StoredTensor | None:
        """A tensor, or else one of another layer or expert with the same name."""
        return self.files.tensors.get(key) or self._by_pattern.get(_pattern(key))


def plan_export(
    tensors: Mapping[str, TensorInfo],
    config: NetworkConfig,
    layout: str | None,
    dtype: str,
    like: LikeFolder | None,
    max_shard_bytes: int,
) -> ExportPlan:
    """Audits the source and decides everything.

    Raises:
        WeightsError: With a table of what the config needs and the source lacks, or the layout has no place for; or if
            an argument is out of range.
    """
    if dtype not in ("native", "fp8", *FLOAT_TYPES):
        raise WeightsError(f"dtype = {dtype!r} is unknown: choose one of native, fp8, {', '.join(FLOAT_TYPES)}")
    if max_shard_bytes < 1:
        raise WeightsError(f"the shard size must be at least 1 byte, got {max_shard_bytes}")
    return _Planner(tensors, config, _chosen_layout(config, layout, like), dtype, like).plan(max_shard_bytes)


def _chosen_layout(config: NetworkConfig, name: str | None, like: LikeFolder | None) -> Layout:
    if name is not None and name not in LAYOUTS:
        raise WeightsError(f"layout = {name!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    if like is None:
        return layout_of(config) if name is None else LAYOUTS[name]
    if name not in (None, like.layout.name):
        raise WeightsError(f"layout = {name!r}, but {like.folder}, which it is to be like, has {like.layout.name!r}")
    return like.layout


@dataclass
class _Planner:
    tensors: Mapping[str, TensorInfo]
    config: NetworkConfig
    layout: Layout
    dtype: str
    like: LikeFolder | None
    problems: list[Problem] = field(default_factory=list)
    _transposed: Counter[bool] = field(default_factory=Counter)

    def plan(self, max_shard_bytes: int) -> ExportPlan:
        names = self._audited()
        written: list[WrittenPiece] = []
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, spelling in self._spelled(names):
            for piece in pieces(spelling, self.tensors[name].shape):
                kind = self._type(name, piece)
                written.append(WrittenPiece(name, piece, kind == FP8))
                shapes[piece.key] = piece.file_shape, kind
                if kind == FP8:
                    shapes[piece.key + SCALE_SUFFIX] = _scale_shape(piece.file_shape), self._scale_type(piece.key)
        copied = self._copied(shapes)
        if self.problems:
            raise WeightsError(
                f"the weights cannot be written in the layout {self.layout.name}: {counted(self.problems)}; nothing "
                "was written:",
                self.problems,
            )
        quantization = self._quantization(shapes)
        files, places = plan_files(shapes | copied, max_shard_bytes)
        return ExportPlan(
            self.layout, tuple(written), tuple(copied), places, tuple(files), _main_type(shapes, places), quantization,
            self._power_of_two_scales,
        )  # fmt: skip

    def _report(self, kind: Any, key: str, detail: str) -> None:
        self.problems.append(Problem(kind, key, detail))

    # -- names -------------------------------------------------------------------------------------------------------

    def _audited(self) -> list[tuple[str, list[str]]]:
        """Tensors of the source, with all names that they have in the model."""
        prefix = self.layout.text.ours
        inside = not isinstance(self.config, MultimodalConfig)  # a decoder that stands in a larger model
        prefix = prefix if inside and any(name.startswith(prefix) for name in self.tensors) else ""
        with torch.device("meta"):
            model = network(self.config)
        needed = {prefix + name: (tuple(t.shape), names) for name, (t, names) in saved_tensors(model).items()}
        for name in self.tensors.keys() - needed.keys():
            if self.layout.part_of(name) is self.layout.text:
                self._report("unexpected", name, f"{self.tensors[name].shape}: a model of this config does not have it")
            else:
                needed[name] = self.tensors[name].shape, [name]
        found = []
        for name, (shape, names) in needed.items():
            info = self.tensors.get(name)
            if info is None:
                self._report("missing", name, f"{shape}: the model has it, the source does not")
            elif tuple(info.shape) != shape:
                self._report("shape", name, f"{info.shape} in the source, {shape} needed")
            elif DTYPE_NAMES.get(info.dtype) not in ("F64", *FLOAT_TYPES.values()):
                self._report("type", name, f"{info.dtype} cannot be written")
            else:
                found.append((name, [prefix + other if other in names[1:] else name for other in names]))
        return found

    def _spelled(self, names: Sequence[tuple[str, list[str]]]) -> list[tuple[str, Spelling]]:
        """How each tensor is written; one that is tied may be written under several names."""
        chosen: list[tuple[str, list[Spelling]]] = []
        for name, others in names:
            ways = [found for other in others if (found := self._fitting(name, self.layout.spellings(other)))]
            there = [way for way in ways if self.like is not None and way[0].keys[0] in self.like.files.tensors]
            if not ways:
                shape = self.tensors[name].shape
                self._report(
                    "unexpected", name, f"{shape}: files of the layout {self.layout.name} have no place for it"
                )
            for way in there or ways[:1]:
                chosen.append((name, way))
        transposed = self._transposed.most_common(1)[0][0] if self._transposed else None
        return [(name, next((s for s in way if s.transposed == transposed), way[0])) for name, way in chosen]

    def _fitting(self, name: str, spellings: Sequence[Spelling]) -> list[Spelling]:
        """The usual spelling, or the one of `like`; two, if only the other tensors tell which."""
        if self.like is None or not spellings:
            return list(spellings[:1])
        like = self.like
        keys = next((s.keys for s in spellings if all(like.find(key) is not None for key in s.keys)), spellings[0].keys)
        same = [spelling for spelling in spellings if spelling.keys == keys]
        fitting = []
        for spelling in same:
            piece = next(pieces(spelling, self.tensors[name].shape))
            stored = like.find(piece.key)
            if stored is not None and stored.shape[-2:] == piece.file_shape[-2:]:
                fitting.append(spelling)
        if len(same) > 1 and len(fitting) == 1:
            self._transposed[fitting[0].transposed] += 1
        return fitting or same

    # -- types -------------------------------------------------------------------------------------------------------

    def _type(self, name: str, piece: Piece) -> str:
        if self.dtype in FLOAT_TYPES:
            return FLOAT_TYPES[self.dtype]
        if self.dtype == "fp8" and _BLOCK_LINEAR.fullmatch(name):
            return FP8
        stored = self.like.find(piece.key) if self.like is not None else None
        if stored is None:
            return "BF16" if self.dtype == "fp8" else DTYPE_NAMES[self.tensors[name].dtype]
        if stored.dtype not in ("F64", FP8, *FLOAT_TYPES.values()):
            self._report("type", piece.key, f"{stored.dtype} in {stored.file}, which is not written")
        if stored.dtype == FP8 and self.dtype == "fp8":
            return "BF16"
        if stored.dtype == FP8 and self.like is not None and self.like.files.block_shape != (BLOCK, BLOCK):
            detail = f"blocks of {self.like.files.block_shape}, only {BLOCK} × {BLOCK} are written"
            self._report("type", piece.key, detail)
        return stored.dtype

    def _scale_type(self, key: str) -> str:
        stored = self.like.find(key + SCALE_SUFFIX) if self.like is not None else None
        return "F32" if stored is None else stored.dtype

    @property
    def _power_of_two_scales(self) -> bool:
        """As `like` has them; narrow types of scales hold nothing else exactly."""
        if self.like is None:
            return False
        stored = self.like.files.tensors
        narrow = any(key.endswith(SCALE_SUFFIX) and stored[key].dtype != "F32" for key in stored)
        return narrow or self.like.quantization.get("scale_fmt") == "ue8m0"

    def _quantization(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any] | None:
        if not any(kind == FP8 for _, kind in shapes.values()):
            return None
        kept = [
            key.removesuffix(".weight") for key, (_, kind) in shapes.items() if key.endswith(".weight") and kind != FP8
        ]
        values = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
        if self.like is None:
            return {**values, "modules_to_not_convert": kept}
        copied = [key.removesuffix(".weight") for key in self._beside(shapes) if key.endswith(".weight")]
        kept += [key for key in copied if key + ".weight" + SCALE_SUFFIX not in self.like.files.tensors]
        return {"modules_to_not_convert": kept, **values, **self.like.quantization}

    # -- what else `like` holds ----------------------------------------------------------------------------------------

    def _beside(self, shapes: Mapping[str, object]) -> dict[str, StoredTensor]:
        """Tensors of `like` that are no part of the model."""
        if self.like is None:
            return {}
        stored = self.like.files.tensors
        have = {self.layout.part_of(name).ours for name in self.tensors}
        others = stored.keys() - shapes.keys()
        return {key: stored[key] for key in others if self.layout.elsewhere(key, have) is not None}

    def _copied(self, shapes: Mapping[str, object]) -> dict[str, tuple[tuple[int, ...], str]]:
        beside = self._beside(shapes)
        if self.like is not None:
            parts = (self.layout.text, *self.layout.encoders)
            known = {k for part in parts for rule in part.rules for s in rule.theirs for k in s.keys}
            of_a_part = re.compile("|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(key)) for key in sorted(known)))
            for key in self.like.files.tensors.keys() - shapes.keys() - beside.keys():
                if of_a_part.fullmatch(key.removesuffix(SCALE_SUFFIX)) is None:
                    self._report("unexpected", key, f"in {self.like.folder}, of no part of the layout")
            if self.dtype in FLOAT_TYPES and (scaled := [key for key, t in beside.items() if t.is_scaled]):
                detail = f"it is {FP8} in {self.like.folder}, which cannot stand beside dtype = {self.dtype!r}"
                self._report("type", min(scaled), detail)
        return {key: (tensor.shape, tensor.dtype) for key, tensor in beside.items()}


def _pattern(key: str) -> str:
    """A key without the numbers of layer and expert."""
    return re.sub(r"(?<=\.)(\d+|\{layer\}|\{expert\})(?=\.)", "#", key)


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], count_blocks(shape[-2]), count_blocks(shape[-1]))


def _main_type(shapes: Mapping[str, tuple[tuple[int, ...], str]], places: Mapping[str, StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for key, (_, kind) in shapes.items():
        if kind != FP8 and not key.endswith(SCALE_SUFFIX):
            sizes[kind] += places[key].nbytes
    return _CONFIG_TYPES[sizes.most_common(1)[0][0]]
