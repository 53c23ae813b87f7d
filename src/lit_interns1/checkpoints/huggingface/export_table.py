"""What goes where, as text: one line for all layers and experts that are alike.

layers.{0-1}.mlp.experts.gate_up_proj  →  model.layers.{0-1}.mlp.experts.{0-7}.up_proj.weight  16 × 32  F32  16 × 2.0 kB
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lit_interns1.checkpoints.huggingface.export_plan import ExportPlan
from lit_interns1.checkpoints.huggingface.files import SCALE_SUFFIX
from lit_interns1.checkpoints.huggingface.safetensors_writer import natural

_COPIED = "(as it is)"


def mapping_table(plan: ExportPlan) -> str:
    """The lines of a plan and its totals."""
    pairs = [(written.name, written.piece.key) for written in plan.pieces]
    pairs += [(written.name, written.piece.key + SCALE_SUFFIX) for written in plan.pieces if written.scaled]
    pairs += [(_COPIED, key) for key in plan.copied]
    groups: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for ours, theirs in sorted(pairs, key=lambda pair: natural(pair[1])):
        place = plan.places[theirs]
        groups.setdefault((_frame(ours), _frame(theirs), place.shape, place.dtype), []).append((ours, theirs))
    rows = [("ours", "theirs", "shape", "type", "bytes")]
    for members in groups.values():
        place = plan.places[members[0][1]]
        shape = " × ".join(map(str, place.shape)) or "1"
        size = as_bytes(place.nbytes)
        size = size if len(members) == 1 else f"{len(members)} × {size}"
        rows.append((_joined(a for a, _ in members), _joined(b for _, b in members), shape, place.dtype, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    types = Counter(place.dtype for place in plan.places.values())
    total = sum(place.nbytes for place in plan.places.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in sorted(types.items()))
    return "\n".join([*lines, f"{len(plan.places)} tensors ({kinds}), {as_bytes(total)}, {len(plan.files)} files"])


def as_bytes(count: int) -> str:
    """A size in bytes, kB, MB or GB (powers of 1000)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _frame(name: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in name.split("."))


def _joined(names: Iterable[str]) -> str:
    """Names that differ in numbers only as one, with the ranges of the numbers."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "{" + _ranges(map(int, column)) + "}" for column in columns)


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)
