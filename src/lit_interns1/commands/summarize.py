"""`lit-interns1 summarize`: what a finished run has learned, on one page.

Held-out loss beside n-gram models fitted on the very tokens that the run consumed, pictures, text, and molecules judged
by the rules of SMILES.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from lit_interns1.data import TextDataModule
    from lit_interns1.models import LanguageModel

MOLECULE_TAGS = ("<SMILES>", "</SMILES>")


def data_module_of(config: dict[str, Any]) -> TextDataModule:
    """The DataModule that a run's `config.yaml` names.

    Raises:
        ValueError: If the run was not trained on a `TextDataModule`.
    """
    from lit_interns1.data import TextDataModule, TextSource

    data = config.get("data") or {}
    if not str(data.get("class_path", "")).endswith("TextDataModule"):
        raise ValueError(f"summarize reads runs of TextDataModule; this one used {data.get('class_path')!r}")
    options = dict(data.get("init_args") or {})
    for name in ("sources", "validation_sources"):
        if isinstance(options.get(name), list):
            options[name] = [TextSource(**s) if isinstance(s, dict) else s for s in options[name]]
    return TextDataModule(**options)


def rows_consumed(checkpoint: dict[str, Any]) -> int:
    """Rows of the global order that the checkpoint's run has trained on."""
    states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    rows = [state["rows"] for state in states if isinstance(state, dict) and "rows" in state]
    if not rows:
        raise ValueError("the checkpoint does not say which rows were consumed: its loader keeps no position")
    return int(rows[0])


def ngram_losses(data: TextDataModule, rows: int) -> dict[str, float]:
    """Held-out cross-entropy in nats per token of interpolated 2- and 3-gram models fitted on the first `rows` rows.

    They are asked for the same tokens as the language model: every token of a document but its first.
    """
    from lit_interns1.data.ngram import InterpolatedNGram

    losses = {}
    held_out: list[np.ndarray] = [segment.tokens_N for segment in data.iter_validation_documents()]
    for name, order in (("bigram", 2), ("3-gram", 3)):
        model = InterpolatedNGram(order, data.vocab_size)
        for row in data.iter_training_rows(rows):
            model.update(row)
        total = sum(float(model.log_prob(tokens)[1:].sum()) for tokens in held_out)
        losses[name] = -total / sum(len(tokens) - 1 for tokens in held_out)
    return losses


def validation_loss(model: LanguageModel, data: TextDataModule) -> float:
    """Held-out cross-entropy of the model in nats per token."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            output = model(
                batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens, targets=batch.labels
            )
            assert output.scores is not None
            total -= float(output.scores.logp_T.double().sum())
            count += batch.num_loss_tokens
    return total / max(1, count)


def molecules(model: LanguageModel, data: TextDataModule, number: int, seed: int) -> list[str]:
    """SMILES strings that the model writes after the opening tag; empty if the tokenizer has no such tag."""
    from lit_interns1.models import generate

    opening, closing = (data.tokenizer.encode(tag) for tag in MOLECULE_TAGS)
    if len(opening) != 1 or len(closing) != 1:
        return []
    output = generate(
        model, [opening] * number, max_new_tokens=96, temperature=0.8,
        stop_ids=[*closing, data.tokenizer.end_of_text_id], seed=seed,
    )  # fmt: skip
    texts = []
    for tokens, finished in zip(output.token_ids, output.finished, strict=True):
        texts.append(data.tokenizer.decode(tokens[:-1] if finished else tokens).strip())
    return texts


def report_lines(result: dict[str, Any]) -> Iterator[str]:
    """The page as Markdown."""
    yield f"# {result['run']}\n"
    yield f"{result['tokens']:,} tokens consumed in {result['steps']:,} optimizer steps.\n"
    yield "| held-out loss | nats per token |\n|---|---|"
    for name, value in result["losses"].items():
        yield f"| {name} | {value:.4f} |"
    yield "\n## Text\n\n```\n" + result["text"] + "\n```"
    if result["molecules"]:
        valid = sum(entry["valid"] for entry in result["molecules"])
        yield f"\n## Molecules\n\n{valid} of {len(result['molecules'])} keep the rules of SMILES.\n"
        yield "| | SMILES | |\n|---|---|---|"
        for entry in result["molecules"]:
            smiles = " ".join(entry["smiles"].replace("|", "\\|").split())
            yield f"| {'✓' if entry['valid'] else '✗'} | `{smiles}` | {entry['reason'] or ''} |"
    yield "\n## Pictures\n"
    for name, path in result["pictures"].items():
        yield f"![{name}]({path})"


def summarize(
    run_dir: str,
    ckpt: str | None = None,
    prompt: str = "ROMEO.\n",
    num_molecules: int = 20,
    max_new_tokens: int = 160,
    seed: int = 0,
) -> None:
    """Writes summary.md, summary.json and pictures of a run, and prints the essence.

    Args:
        run_dir: Directory of the run.
        ckpt: Checkpoint file; default: the run's last.
        prompt: Prompt of the text sample.
        num_molecules: Molecules to generate (0 = none).
        max_new_tokens: Length of the text sample.
        seed: Seed of the samples.
    """
    try:
        print("\n".join(summary(Path(run_dir), ckpt, prompt, num_molecules, max_new_tokens, seed)))
    except (OSError, ValueError) as error:
        print(f"lit-interns1 summarize: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def summary(
    run_dir: Path, ckpt: str | None, prompt: str, num_molecules: int, max_new_tokens: int, seed: int
) -> list[str]:
    """Does the work of `summarize`; returns the lines of the page."""
    from lit_interns1.commands.generate import continue_prompt
    from lit_interns1.data.smiles import check_smiles
    from lit_interns1.modules.language_model_module import load_language_model, read_checkpoint
    from lit_interns1.reports import RunDirectory, draw_pictures

    run = RunDirectory(run_dir)
    path = Path(ckpt) if ckpt else run.checkpoints / "last.ckpt"
    checkpoint, model = read_checkpoint(path), load_language_model(path)
    data = data_module_of(run.config())
    print("reading the data …", flush=True)
    data.prepare_data()
    data.setup()
    rows = rows_consumed(checkpoint)
    print(f"fitting n-gram models on the {rows:,} rows that were consumed …", flush=True)
    losses = {"model": validation_loss(model, data), **ngram_losses(data, rows)}
    print("drawing pictures, writing text and molecules …", flush=True)
    pictures = draw_pictures(run, {name: value for name, value in losses.items() if name != "model"})
    written = molecules(model, data, num_molecules, seed) if num_molecules else []
    checks = [(text, check_smiles(text)) for text in written]
    clock: dict[str, Any] = next((s for key, s in checkpoint["callbacks"].items() if key.startswith("TokenClock")), {})
    result = {
        "run": run_dir.name,
        "tokens": clock.get("tokens", 0),
        "steps": clock.get("steps", checkpoint["global_step"]),
        "losses": losses,
        "text": continue_prompt(path, prompt, max_new_tokens=max_new_tokens, seed=seed)[0],
        "molecules": [{"smiles": text, "valid": check.valid, "reason": check.reason} for text, check in checks],
        "pictures": {name: str(file.relative_to(run_dir)) for name, file in pictures.items()},
    }
    lines = list(report_lines(result))
    (run_dir / "summary.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (run_dir / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
