"""The audit: every tensor of the files and of the model is accounted for before any is written.

    files  =  what the model needs, once  ∪  scales of FP8 tensors  ∪  parts of the layout that the model lacks
    model  =  parameters and saved buffers, each filled completely

A reward model starts its head afresh where the files lack it, and passes over the head of a language model.
Anything else ends with a table of what is missing, unexpected, twice there, or of another shape or type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lit_interns1.checkpoints.huggingface.errors import Problem, ProblemKind, WeightsError, counted
from lit_interns1.checkpoints.huggingface.files import SCALE_SUFFIX, SCALE_TYPES, WEIGHT_TYPES, WeightFiles
from lit_interns1.checkpoints.huggingface.layouts import Layout
from lit_interns1.checkpoints.huggingface.rules import Piece, Spelling, pieces


@dataclass(frozen=True)
class Source:
    """Where one tensor of the model comes from.

    Attributes:
        name: Its name in the model.
        pieces: What fills it.
        copies: Tensors that must hold the same numbers: a head that is tied to the embedding may be stored beside it.
    """

    name: str
    pieces: tuple[Piece, ...]
    copies: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class WeightPlan:
    """The result of an audit.

    Attributes:
        sources: One for every tensor of the model.
        elsewhere: Number of tensors that are no part of the model, by the pattern of the layout that says so.
        fresh: Tensors of the model that the files lack and that may start afresh (`fresh_weights` of the model).
    """

    sources: tuple[Source, ...]
    elsewhere: dict[str, int]
    fresh: tuple[str, ...] = ()


def saved_tensors(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Parameters and saved buffers by name, each once, with all the names that it has (a tied head has two)."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return {names[key][0]: (tensor, names[key]) for key, tensor in tensors.items()}


def plan_weights(model: nn.Module, files: WeightFiles, layout: Layout) -> WeightPlan:
    """Audits; works on the meta device.

    Raises:
        WeightsError: With a table of all that does not fit.
    """
    audit = _Audit(files, layout, getattr(model, "fresh_weights", ()))
    tensors = saved_tensors(model)
    chosen = [audit.choose(tuple(tensor.shape), names) for tensor, names in tensors.values()]
    sources = [audit.source(choice) for choice in chosen if choice is not None]
    audit.check_scales()
    elsewhere = audit.count_elsewhere(tensors, getattr(model, "foreign_weights", ()))
    if audit.problems:
        raise WeightsError(
            f"{files.folder} (layout {layout.name}) does not fit the model: {counted(audit.problems)}; nothing was "
            "read:",
            audit.problems,
        )
    return WeightPlan(tuple(source for source in sources if source is not None), elsewhere, tuple(audit.fresh))


@dataclass(frozen=True)
class _Choice:
    """How the files spell a tensor: one spelling, or two with the same keys that both fit; and its copies."""

    name: str
    shape: tuple[int, ...]
    spellings: Sequence[Spelling]
    copies: Sequence[Spelling]


class _Audit:
    """Walks through the tensors of a model and notes what does not fit."""

    def __init__(self, files: WeightFiles, layout: Layout, may_be_fresh: Collection[str]) -> None:
        self.files, self.layout, self._may_be_fresh = files, layout, may_be_fresh
        self.fresh: list[str] = []
        self.problems: list[Problem] = []
        self._claimed: set[str] = set()
        self._transposed: Counter[bool] = Counter()

    def _report(self, kind: ProblemKind, key: str, detail: str) -> None:
        self.problems.append(Problem(kind, key, detail))

    def choose(self, shape: tuple[int, ...], names: Sequence[str]) -> _Choice | None:
        """Decides by the keys, and where they leave it open by the shapes, how the files spell a tensor."""
        name = names[0]
        groups = [group for group in (self.layout.spellings(one) for one in names) if group]
        keys = {spelling: _keys(spelling, shape) for group in groups for spelling in group}
        present = [[s for s in group if not self.files.tensors.keys().isdisjoint(keys[s])] for group in groups]
        found = [spelling for group in present for spelling in group]
        if not found and name in self._may_be_fresh:
            self.fresh.append(name)
            return None
        if not groups:
            self._report("missing", name, f"{shape}: files of the layout {self.layout.name} do not hold it")
            return None
        if not found:
            for key in keys[groups[0][0]]:
                self._report("missing", key, f"needed by {name} {shape}")
            return None
        self._claimed.update(key for spelling in found for key in keys[spelling])
        ways = _by_keys(found)
        if any(len(_by_keys(group)) > 1 for group in present):
            self._report("duplicate", ways[0][0].keys[0], f"{name} is stored also as {ways[1][0].keys[0]}")
            return None
        fitting = [spelling for spelling in ways[0] if not self._misfits(spelling, shape)]
        if len(ways[0]) > 1 and len(fitting) == 1:
            self._transposed[fitting[0].transposed] += 1
        return _Choice(name, shape, fitting or ways[0][:1], [copy[0] for copy in ways[1:]])

    def source(self, choice: _Choice) -> Source | None:
        """The pieces of a tensor, checked. With as many rows as columns it lies as the others of the files do."""
        spelling = choice.spellings[0]
        if len(choice.spellings) > 1:
            if not self._transposed:
                detail = f"{choice.shape}: rows and columns cannot be told apart"
                self._report("shape", choice.name, detail)
                return None
            transposed = self._transposed.most_common(1)[0][0]
            spelling = next(s for s in choice.spellings if s.transposed == transposed)
        for part in (spelling, *choice.copies):
            self.problems += self._misfits(part, choice.shape)
        copies = tuple(piece for copy in choice.copies for piece in pieces(copy, choice.shape))
        return Source(choice.name, tuple(pieces(spelling, choice.shape)), copies)

    def _misfits(self, spelling: Spelling, shape: tuple[int, ...]) -> list[Problem]:
        found = []
        for piece in pieces(spelling, shape):
            stored = self.files.tensors.get(piece.key)
            if stored is None:
                found.append(Problem("missing", piece.key, f"{piece.file_shape} needed"))
            elif stored.shape != piece.file_shape:
                found.append(Problem("shape", piece.key, f"{stored.shape} in the file, {piece.file_shape} needed"))
            elif stored.dtype not in WEIGHT_TYPES:
                found.append(Problem("type", piece.key, f"{stored.dtype} is not one of {', '.join(WEIGHT_TYPES)}"))
        return found

    def check_scales(self) -> None:
        """Every FP8 tensor has scales for its blocks."""
        tensors, block_shape = self.files.tensors, self.files.block_shape
        scaled = [key for key in sorted(self._claimed & tensors.keys()) if tensors[key].is_scaled]
        for key in scaled:
            shape, scale_key = tensors[key].shape, key + SCALE_SUFFIX
            scale = tensors.get(scale_key)
            if len(shape) < 2:
                self._report("type", key, f"{tensors[key].dtype} of shape {shape} has no blocks")
            elif scale is None:
                self._report("missing", scale_key, f"{key} is {tensors[key].dtype} and needs its scales")
            elif scale.shape != (needed := self.files.scale_shape(shape)):
                detail = f"{scale.shape} in the file, {needed} needed for blocks of {block_shape}"
                self._report("shape", scale_key, detail)
            elif scale.dtype not in SCALE_TYPES:
                self._report("type", scale_key, f"{scale.dtype} is not one of {', '.join(SCALE_TYPES)}")
        self._claimed.update(key + SCALE_SUFFIX for key in scaled)

    def count_elsewhere(self, names: Collection[str], foreign: Collection[str]) -> dict[str, int]:
        """Tensors that nobody has claimed, by the pattern that allows them beside tensors of ours with these names.

        Args:
            names: What the model has.
            foreign: What other models of the kind have, and this one passes over; by name in those models.
        """
        counts: Counter[str] = Counter()
        passed = {key for name in foreign for spelling in self.layout.spellings(name) for key in spelling.keys}
        parts = {self.layout.part_of(name).ours for name in names}
        for key in sorted(self.files.tensors.keys() - self._claimed):
            if (pattern := key if key in passed else self.layout.elsewhere(key, parts)) is not None:
                counts[pattern] += 1
            else:
                stored = self.files.tensors[key]
                self._report("unexpected", key, f"{stored.shape} {stored.dtype} in {stored.file}")
        return dict(counts)


def _keys(spelling: Spelling, shape: tuple[int, ...]) -> dict[str, None]:
    """In order, and quick to look into."""
    return {piece.key: None for piece in pieces(spelling, shape)}


def _by_keys(spellings: Sequence[Spelling]) -> list[list[Spelling]]:
    """Grouped by what they name: the same keys may lie in two ways."""
    groups: dict[tuple[str, ...], list[Spelling]] = {}
    for spelling in spellings:
        groups.setdefault(spelling.keys, []).append(spelling)
    return list(groups.values())
