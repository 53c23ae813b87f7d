"""Which parameters a matrix optimizer orthogonalises, and into which matrices it cuts them.

    weights of linear layers, routers               one matrix
    stacks of experts (E, rows, columns)            E matrices
    fused projections, heads of an attention        blocks of rows, each a matrix of its own

Everything else (embeddings, language-model heads, norms, biases, convolutions, positions, tensors that are vectors in
truth) is for the elementwise optimizer beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_interns1.nn.head import LanguageModelHead

FUSED_ROWS: Mapping[str, int] = {"gate_up_proj": 2, "qkv.weight": 3, "in_proj_weight": 3, "kv.weight": 2}
"""Equal blocks of rows that are matrices of their own, by how a parameter's name ends."""

_HEADS: Mapping[str, str] = {
    "q_proj.weight": "num_heads", "k_proj.weight": "num_kv_heads", "v_proj.weight": "num_kv_heads",
    "qkv.weight": "num_heads", "in_proj_weight": "num_heads", "kv.weight": "num_heads",
}  # fmt: skip


def _is_matrix(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag, LanguageModelHead)):
        return False
    if parameter.ndim == 3:  # experts; kernels of convolutions and tables of positions have three dimensions, too
        return "experts" in name.split(".") and min(parameter.shape[1:]) > 1
    return parameter.ndim == 2 and name.endswith("weight") and min(parameter.shape) > 1


def _heads(name: str, modules: Mapping[str, nn.Module]) -> int:
    """Heads whose rows follow each other in the parameter; 1 where there are none."""
    for ending, attribute in _HEADS.items():
        if name.endswith(ending):
            holder = modules[name.removesuffix(ending).rstrip(".")]
            count = getattr(holder, attribute, getattr(holder, "num_heads", 1))
            return int(count) if isinstance(count, int) else 1
    return 1


def matrix_groups(
    model: nn.Module, decay_embeddings: bool = True, fused_rows: Mapping[str, int] = FUSED_ROWS
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon` and `Mousse`.

    Groups of matrices say `kind` "matrix", `row_blocks` (how many fused matrices a parameter holds) and `head_blocks`
    (into how many heads each of those divides, used with `split_heads`); the others `kind` "elementwise". Vectors are
    not decayed.

    Args:
        model: Parameters that do not require a gradient are left out.
        decay_embeddings: Also decay embedding tables.
        fused_rows: Instead of `FUSED_ROWS`.

    Raises:
        ValueError: If rows do not divide into blocks.
    """
    modules = dict(model.named_modules())
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in tables and _is_matrix(name, parameter, modules[name.rpartition(".")[0]]):
            blocks = next((count for ending, count in fused_rows.items() if name.endswith(ending)), 1)
            heads = _heads(name, modules)
            rows = parameter.shape[-2]
            if rows % blocks:
                raise ValueError(f"{name} has {rows} rows, which do not divide into {blocks} equal blocks")
            heads = heads if rows % (blocks * heads) == 0 else 1
            key: tuple[Any, ...] = ("matrix", blocks, heads)
            extra: dict[str, Any] = {"kind": "matrix", "row_blocks": blocks, "head_blocks": heads}
        else:
            decayed = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in tables)
            key, extra = ("elementwise", decayed), {"kind": "elementwise"}
            if not decayed:
                extra["weight_decay"] = 0.0
        groups.setdefault(key, {"params": [], **extra})["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["kind"] != "matrix")  # the first rate is that of matrices
