"""The tensors of a Hugging Face folder one by one, from a model that runs: for engines with weights of their own.

    tensor of theirs = Σ over ranks of (what the rank holds of it, zero elsewhere), taken over bytes

Each number is held for the stream by one rank (`ModelSource`), so a sum of bytes moves every bit pattern as it is, on
any mesh. Nothing is larger than one tensor of theirs: of a stack of experts one matrix travels at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.checkpoints.agreement import this_rank
from lit_interns1.checkpoints.huggingface.export_plan import WrittenPiece, plan_export
from lit_interns1.checkpoints.huggingface.sources import ModelSource
from lit_interns1.models import LanguageModel


def exported_tensors(model: LanguageModel, layout: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under the names that `export_pretrained` writes, with the same bits, in the order of its files.

    All ranks iterate together, to the end, and all get every tensor; weights must not change meanwhile. The tensors are
    copies of the type and on the device of the model's.

    Args:
        model: Whole, or divided over ranks in any way.
        layout: How tensors are named, see `LAYOUTS`; default: the plainest that can say what the network is.

    Raises:
        WeightsError: If the model has no weights, or the layout has no place for one of them.
    """
    source = ModelSource(model)
    plan = plan_export(source.tensors, model.config, layout, "native", None, sys.maxsize)
    device = next(model.parameters()).device
    written = {piece.piece.key: piece for piece in plan.pieces}
    for key in plan.places:
        yield key, _gathered(source, written[key], device)


@torch.no_grad()
def _gathered(source: ModelSource, written: WrittenPiece, device: torch.device) -> Tensor:
    """One tensor of theirs; all ranks call it together."""
    piece, dtype = written.piece, source.tensors[written.name].dtype
    result = torch.zeros(piece.file_shape, dtype=dtype, device=device)
    for window in source.windows(written.name):
        shared = piece.common(window)
        if shared is not None:
            ours, theirs = shared
            result[theirs].copy_(piece.as_theirs(source.read(written.name, ours)))
    if this_rank()[1] > 1:
        dist.all_reduce(result.reshape(-1).view(torch.uint8))
    return result
