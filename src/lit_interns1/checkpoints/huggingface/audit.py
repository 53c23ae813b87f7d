"""The audit: every tensor of the files and of the model is accounted for before any is written.

    files  =  what the model needs, once  ∪  scales of FP8 tensors  ∪  what the layout says lies elsewhere
    model  =  parameters and saved buffers, each filled completely

Anything else ends with a table of what is missing, unexpected, twice there, or of another shape or type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError
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
    """

    sources: tuple[Source, ...]
    elsewhere: dict[str, int]


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
    problems: list[Problem] = []
    claimed: set[str] = set()
    chosen: list[tuple[str, tuple[int, ...], Spelling | None, list[Spelling]]] = []
    turned: Counter[bool] = Counter()
    for name, (tensor, names) in saved_tensors(model).items():
        shape = tuple(tensor.shape)
        groups = [rule_spellings(layout, one) for one in names]
        if not any(groups):
            problems.append(Problem("missing", name, f"{shape}: files of the layout {layout.name} do not hold it"))
            continue
        present = [[s for s in group if _keys(s, shape) & files.tensors.keys()] for group in groups]
        found = [spelling for group in present for spelling in group]
        claimed.update(key for spelling in found for key in _keys(spelling, shape))
        if not found:
            usual = next(group[0] for group in groups if group)
            problems += [Problem("missing", key, f"needed by {name} {shape}") for key in _ordered(usual, shape)]
            continue
        alternatives = _same_keys(found)
        if any(len(_same_keys(group)) > 1 for group in present):
            keys = [alternative[0].keys[0] for alternative in alternatives]
            problems.append(Problem("duplicate", keys[0], f"{name} is stored also as {', '.join(keys[1:])}"))
            continue
        first, *copies = alternatives
        fitting = [s for s in first if not _misfits(s, shape, files)]
        if len(first) > 1 and len(fitting) == 1:
            turned[fitting[0].transposed] += 1
        known = None if len(fitting) > 1 else (fitting or first)[0]
        chosen.append((name, shape, known, [copy[0] for copy in copies]))

    sources = []
    for name, shape, spelling, others in chosen:
        if spelling is None:  # rows and columns are as many: it lies as the others do
            spelling = _by_majority(layout, name, turned)
        if spelling is None:
            problems.append(Problem("shape", name, f"{shape}: rows and columns cannot be told apart in {layout.name}"))
            continue
        for part in (spelling, *others):
            problems += _misfits(part, shape, files)
        copied = tuple(piece for copy in others for piece in pieces(copy, shape))
        sources.append(Source(name, tuple(pieces(spelling, shape)), copied))

    claimed |= _audit_scales(files, claimed, problems)
    elsewhere: Counter[str] = Counter()
    for key in sorted(files.tensors.keys() - claimed):
        pattern = next((pattern for pattern in layout.elsewhere if fnmatchcase(key, pattern)), None)
        if pattern is not None:
            elsewhere[pattern] += 1
        else:
            stored = files.tensors[key]
            problems.append(Problem("unexpected", key, f"{stored.shape} {stored.dtype} in {stored.file}"))
    if problems:
        counts = Counter(problem.kind for problem in problems)
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise WeightsError(
            f"{files.folder} (layout {layout.name}) does not fit the model: {summary}; nothing was read:", problems
        )
    return WeightPlan(tuple(sources), dict(elsewhere))


def rule_spellings(layout: Layout, name: str) -> tuple[Spelling, ...]:
    """How files of a layout may spell one tensor of ours; empty: they have none."""
    return next((found for rule in layout.rules if (found := rule.spellings(name)) is not None), ())


def _ordered(spelling: Spelling, shape: tuple[int, ...]) -> list[str]:
    return [piece.key for piece in pieces(spelling, shape)]


def _keys(spelling: Spelling, shape: tuple[int, ...]) -> set[str]:
    return set(_ordered(spelling, shape))


def _same_keys(spellings: Sequence[Spelling]) -> list[list[Spelling]]:
    """Grouped by what they name: the same keys may lie in two ways."""
    groups: dict[tuple[str, ...], list[Spelling]] = {}
    for spelling in spellings:
        groups.setdefault(spelling.keys, []).append(spelling)
    return list(groups.values())


def _by_majority(layout: Layout, name: str, turned: Counter[bool]) -> Spelling | None:
    if not turned:
        return None
    transposed = turned.most_common(1)[0][0]
    return next(s for s in rule_spellings(layout, name) if s.transposed == transposed)


def _misfits(spelling: Spelling, shape: tuple[int, ...], files: WeightFiles) -> list[Problem]:
    problems = []
    for piece in pieces(spelling, shape):
        stored = files.tensors.get(piece.key)
        if stored is None:
            problems.append(Problem("missing", piece.key, f"{piece.file_shape} needed"))
        elif stored.shape != piece.file_shape:
            problems.append(Problem("shape", piece.key, f"{stored.shape} in the file, {piece.file_shape} needed"))
        elif stored.dtype not in WEIGHT_TYPES:
            problems.append(Problem("type", piece.key, f"{stored.dtype} is not one of {', '.join(WEIGHT_TYPES)}"))
    return problems


def _audit_scales(files: WeightFiles, keys: Iterable[str], problems: list[Problem]) -> set[str]:
    """Keys of the scales that belong to the FP8 tensors among `keys`."""
    scales = set()
    for key in keys:
        stored = files.tensors.get(key)
        if stored is None or not stored.is_scaled:
            continue
        scale_key = key + SCALE_SUFFIX
        scale = files.tensors.get(scale_key)
        if len(stored.shape) < 2:
            problems.append(Problem("type", key, f"{stored.dtype} with {len(stored.shape)} dimension has no blocks"))
        elif scale is None:
            problems.append(Problem("missing", scale_key, f"{key} is {stored.dtype} and needs its scales"))
        elif scale.shape != files.scale_shape(stored.shape):
            needed = f"{files.scale_shape(stored.shape)} needed for blocks of {files.block_shape}"
            problems.append(Problem("shape", scale_key, f"{scale.shape} in the file, {needed}"))
        elif scale.dtype not in SCALE_TYPES:
            problems.append(Problem("type", scale_key, f"{scale.dtype} is not one of {', '.join(SCALE_TYPES)}"))
        scales.add(scale_key)
    return scales
