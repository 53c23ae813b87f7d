"""`lit-interns1 expand`: a larger model from a trained one, as a Hugging Face folder that a run can start from.

lit-interns1 expand --from models/Intern-S1 --out models/grown --experts 512 --groups 8
lit-interns1 fit --config CONFIG --model.init_weights models/grown …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lit_interns1.checkpoints.expanded_source import ExpandedSource
    from lit_interns1.checkpoints.expansion import Expansion
    from lit_interns1.models import LanguageModelConfig

TABLE_FILE = "expansion.json"
"""Beside the weights: what was done, and which old expert each new one copies."""


def run(args: Sequence[str]) -> None:
    """Parses the options and expands.

    Args:
        args: What stands behind the command's name.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lit-interns1 expand",
        description="A larger model from a trained one: more experts and groups, experts for a dense model, FoPE, more "
        "tokens. What is not named stays as it is.",
    )
    parser.add_argument(
        "--from", type=str, required=True, help="Hugging Face folder, or checkpoint of a run (a file or a folder)"
    )
    parser.add_function_arguments(expand_weights, skip={"source"})
    options = vars(parser.parse_args(list(args)))
    try:
        expand_weights(source=options.pop("from"), **options)
    except (OSError, ValueError) as error:
        print(f"lit-interns1 expand: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def expand_weights(
    source: str,
    out: str,
    experts: int | None = None,
    groups: int | None = None,
    experts_per_token: int | None = None,
    method: Literal["grouped", "ranked"] = "grouped",
    noise: float = 0.01,
    expert_noise: float = 0.0,
    router_gradient: Literal["topk", "ste"] | None = None,
    dense_layers: list[int] | None = None,
    router_std: float | None = None,
    positions: Literal["rope", "fope"] | None = None,
    theta: float | None = None,
    max_position_embeddings: int | None = None,
    fope_init_factor: float | None = None,
    fope_sin_pad: float | None = None,
    fope_separate_heads: bool | None = None,
    fope_num_frequencies: int | None = None,
    fope_seed: int | None = None,
    vocab_size: int | None = None,
    vocab_noise: float = 0.01,
    allow_smaller_vocab: bool = False,
    seed: int = 0,
    layout: str | None = None,
    dtype: Literal["native", "float32", "bfloat16", "float16", "fp8"] = "native",
    like: str | None = None,
    shard_size: str = "5GB",
    tokenizer: str | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a larger model.

    Args:
        source: Hugging Face folder, or checkpoint of a run.
        out: Folder to write; it must not exist.
        experts: Experts of every sparse layer, a multiple of the present number; makes a dense model sparse.
        groups: Groups of the router.
        experts_per_token: Experts that a token visits.
        method: grouped, or ranked, the assignment that failed in arXiv 2603.25040.
        noise: Noise of router rows, relative to the standard deviation of each row.
        expert_noise: Noise of expert weights, relative to the standard deviation of each row.
        router_gradient: topk or ste (straight-through); default: ste where a router gets groups.
        dense_layers: Dense to sparse: layers that stay dense.
        router_std: Dense to sparse: standard deviation of new routers; default: the model's initializer_range.
        positions: fope changes rotary positions to FoPE. Frequencies that it drops change the function.
        theta: Base of the frequencies.
        max_position_embeddings: Longest position; FoPE drops frequencies that do not complete a period in it.
        fope_init_factor: Gain of the noise on the mixing matrices; default: 0.5. 0 = RoPE on the kept frequencies.
        fope_sin_pad: Sine of the dropped frequencies; default: 1, which folders of Intern-S1-Pro's layout imply.
        fope_separate_heads: One mixing matrix per key/value head; default: true.
        fope_num_frequencies: Keep this many frequencies instead of following the rule.
        fope_seed: Seed of the mixing matrices.
        vocab_size: Tokens; new ones start as the mean of the old ones.
        vocab_noise: Noise of new tokens, relative to the standard deviation of each column.
        allow_smaller_vocab: Let vocab_size cut tokens off.
        seed: Seed of assignment and noise.
        layout: model_type of the folder; default: the plainest that can say what the model is.
        dtype: Type of the weights, see `export`.
        like: Hugging Face folder of the layout that is written, to take types, encoders and other fields from.
        shard_size: Bytes in one file at most, e.g. 5GB or 500MB.
        tokenizer: tokenizer.json or a folder; default: that of the source, if it has one.
        dry_run: Only say what would be done and which tensors would be written.
    """
    from lit_interns1.checkpoints.expanded_source import ExpandedSource
    from lit_interns1.checkpoints.expansion import Expansion
    from lit_interns1.checkpoints.huggingface.export import export_pretrained
    from lit_interns1.checkpoints.huggingface.export_table import as_bytes, mapping_table
    from lit_interns1.checkpoints.huggingface.sources import open_source
    from lit_interns1.commands.export import bytes_of, tokenizer_to_write
    from lit_interns1.models import LanguageModelConfig

    if positions == "fope" and fope_sin_pad is None:
        fope_sin_pad = 1.0
    asked = {
        "kind": positions, "theta": theta, "max_position_embeddings": max_position_embeddings,
        "fope_init_factor": fope_init_factor, "fope_sin_pad": fope_sin_pad, "fope_separate_heads": fope_separate_heads,
        "fope_num_frequencies": fope_num_frequencies, "fope_seed": fope_seed,
    }  # fmt: skip
    expansion = Expansion(
        num_experts=experts, num_groups=groups, experts_per_token=experts_per_token, method=method, router_noise=noise,
        expert_noise=expert_noise, router_std=router_std, dense_layers=tuple(dense_layers or ()),
        router_gradient=router_gradient, vocab_size=vocab_size, vocab_noise=vocab_noise,
        positions={name: value for name, value in asked.items() if value is not None} or None,
        allow_smaller_vocab=allow_smaller_vocab, seed=seed,
    )  # fmt: skip
    old, config = open_source(source)
    if not isinstance(config, LanguageModelConfig):
        raise ValueError(
            f"{source} holds a whole model with encoders: export it to a folder, and expand that with --like the folder"
        )
    grown = ExpandedSource(old, config, expansion)
    print("\n".join(what_changes(config, grown, expansion)))
    written = export_pretrained(
        grown, grown.config, out, layout=layout, dtype=dtype, like=like, max_shard_bytes=bytes_of(shard_size),
        dry_run=dry_run, tokenizer=tokenizer_to_write(Path(source), tokenizer, like),
    )  # fmt: skip
    if dry_run:
        print(mapping_table(written.plan))
        print(f"nothing was written; without --dry_run {out} would have the layout {written.layout}")
        return
    _write_table(Path(out), source, config, grown, expansion)
    print(f"{out}: {written.tensors} tensors, {as_bytes(written.total_bytes)}, layout {written.layout}")


def what_changes(config: LanguageModelConfig, grown: ExpandedSource, expansion: Expansion) -> Iterator[str]:
    """The lines that the command prints before it writes."""
    import torch

    from lit_interns1.models import LanguageModel, count_parameters
    from lit_interns1.training.units import with_unit

    yield from _differences(asdict(config), asdict(grown.config))
    with torch.device("meta"):
        before, after = (count_parameters(LanguageModel(c)) for c in (config, grown.config))
    yield f"parameters: {with_unit(before.total)} → {with_unit(after.total)}"
    yield f"active per token: {with_unit(before.active)} → {with_unit(after.active)}"
    if grown.sources_LE is not None:
        assert config.moe is not None
        layers, experts = grown.sources_LE.shape
        yield (
            f"assignment: {expansion.method}, seed {expansion.seed}: each of {config.moe.num_experts} experts "
            f"{experts // config.moe.num_experts} times, in {layers} layers"
        )
    elif config.moe is None and grown.config.moe is not None:
        layers = grown.config.num_moe_layers
        yield f"assignment: every expert is a copy of its layer's feed-forward network, in {layers} layers"


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, old in before.items():
        new = after[name]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old is None and isinstance(new, dict):
            yield from (f"{prefix}{name}.{inner}: {value}" for inner, value in new.items())
        elif old != new:
            yield f"{prefix}{name}: {old} → {new}"


def _write_table(
    out: Path, source: str, config: LanguageModelConfig, grown: ExpandedSource, expansion: Expansion
) -> None:
    sparse = [layer for layer in range(grown.config.num_layers) if grown.config.is_moe_layer(layer)]
    values = {
        "source": str(source),
        "options": asdict(expansion),
        "before": asdict(config),
        "after": asdict(grown.config),
        "sparse_layers": sparse,
        "source_experts": None if grown.sources_LE is None else grown.sources_LE.tolist(),
    }
    (out / TABLE_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
