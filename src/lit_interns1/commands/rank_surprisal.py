"""`lit-interns1 data rank-surprisal`: which responses suit a student model, by its Rank-Surprisal Ratio.

Σ rank / Σ surprisal over the tokens of a response, lower = more suitable (arXiv 2601.14249); see
`objectives.rank_surprisal`. Scores each row, compares sources (teachers), and keeps the best rows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_interns1.commands.arguments import appending, check_new, errors_in_one_line, write_new

if TYPE_CHECKING:
    from lit_interns1.data.responses import Response
    from lit_interns1.models import LanguageModel
    from lit_interns1.objectives.rank_surprisal import RankSurprisal


def run(arguments: Sequence[str]) -> None:
    """Parses the arguments of `data`; `--data a --data b` means both."""
    from jsonargparse import auto_cli

    auto_cli(SUBCOMMANDS, args=appending(arguments, ["--data"]), as_positional=False, prog="lit-interns1 data")


def rank_surprisal(
    ckpt: str,
    data: list[str],
    out: str | None = None,
    selected: str | None = None,
    keep: float | None = None,
    best_per: str | None = None,
    tokenizer: str | None = None,
    max_rank: int = 100,
    chat: bool = False,
    max_length: int | None = None,
    overlong: Literal["error", "skip", "cut"] = "error",
    count_end: bool = True,
    limit: int | None = None,
    source_field: str = "source",
    batch_tokens: int = 4096,
    device: str = "cpu",
) -> None:
    """Scores responses by the Rank-Surprisal Ratio of a student: lower = more suitable.

    Args:
        ckpt: The student: a checkpoint file, a Hugging Face folder, or a GGUF file.
        data: JSONL with `prompt` and `response`, or `messages`, or `text`; a text file (each line a document); or a
            bundled source. May be given several times.
        out: JSONL of the scores, one line per row; it must not exist.
        selected: JSONL of the rows that `keep` or `best_per` leaves, as they stand in the data; it must not exist.
        keep: Share of all rows to keep, those with the lowest ratio.
        best_per: A field, such as prompt: of rows with the same value, keep the one with the lowest ratio.
        tokenizer: tokenizer.json, directory, or bundled:tokenizer; default: the one in the folder or run directory.
        max_rank: Larger ranks count as this.
        chat: Prompts that are texts are turns of a user, and responses answers in the chat format.
        max_length: Most tokens of a row; default: the longest position of the model.
        overlong: What becomes of longer rows: an error, left out, or cut at the end.
        count_end: Whether the token that ends a response counts; false for responses that stopped at a limit.
        limit: Read at most so many rows of each file; 200 per teacher is what the paper compares teachers with.
        source_field: The field that names the source (teacher) of a row; default for rows without: the file.
        batch_tokens: Tokens that go through the model together (a longer row alone).
        device: Where to compute, e.g. cpu or cuda.
    """
    with errors_in_one_line("data rank-surprisal"):
        chosen = [name for name, value in (("--keep", keep), ("--best_per", best_per)) if value is not None]
        if len(chosen) > 1 or bool(chosen) != (selected is not None):
            raise ValueError(
                f"--selected, the file for the rows that are kept, goes with either --keep or --best_per; got "
                f"{', '.join(chosen) or 'neither'}, and --selected {selected}"
            )
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"--keep {keep} must lie in (0, 1]")
        for name, number in (("--limit", limit), ("--batch_tokens", batch_tokens), ("--max_rank", max_rank)):
            if number is not None and number < 1:
                raise ValueError(f"{name} {number} must be at least 1")
        if out is not None and out == selected:
            raise ValueError(f"--out and --selected are the same file {out}")
        for option, path in (("--out", out), ("--selected", selected)):
            check_new(option, path)
        _score_and_select(
            ckpt, data, out, selected, keep, best_per, tokenizer, max_rank, chat, max_length, overlong, count_end,
            limit, source_field, batch_tokens, device,
        )  # fmt: skip


def _score_and_select(
    ckpt: str, data: list[str], out: str | None, selected: str | None, keep: float | None, best_per: str | None,
    tokenizer: str | None, max_rank: int, chat: bool, max_length: int | None,
    overlong: Literal["error", "skip", "cut"], count_end: bool, limit: int | None, source_field: str, batch_tokens: int,
    device: str,
) -> None:  # fmt: skip
    from lit_interns1.commands.generate import model_and_tokenizer
    from lit_interns1.data.responses import ResponseEncoder, read_rows

    model, encoder = model_and_tokenizer(Path(ckpt), tokenizer, device)
    length = model.config.positions.max_position_embeddings if max_length is None else max_length
    response_encoder = ResponseEncoder(encoder, chat, length, overlong, count_end)
    found = [response_encoder.encode(row) for path in data for row in read_rows(path, limit)]
    responses = [response for response in found if response is not None]
    if skipped := len(found) - len(responses):
        print(f"{skipped:,} of {len(found):,} rows are longer than {length:,} tokens and left out", file=sys.stderr)
    if not responses:
        raise ValueError(f"--data: no row has at most {length:,} tokens")
    groups = [_group(response, best_per) for response in responses] if best_per is not None else []
    scores = score(model, responses, max_rank, batch_tokens, progress=_print_progress(len(responses)))
    sources = [str(response.row.fields.get(source_field, response.row.path)) for response in responses]
    print("\n".join(table(scores, sources)))
    ratios: list[float] = scores.ratio_S.tolist()
    if out is not None:
        write_new(Path(out), "".join(score_lines(scores, responses, sources)))
        print(f"{len(responses):,} scores → {out}")
    if selected is not None:
        kept = best_of_groups(ratios, groups) if keep is None else best_share(ratios, keep)
        write_new(Path(selected), "".join(responses[index].row.line + "\n" for index in kept))
        print(f"{len(kept):,} of {len(responses):,} rows → {selected}")


def score(
    model: LanguageModel, responses: Sequence[Response], max_rank: int = 100, batch_tokens: int = 4096,
    progress: Callable[[int], None] = lambda done: None,
) -> RankSurprisal:  # fmt: skip
    """Sums of rank and surprisal of each response, on the CPU.

    Args:
        model: The student, in eval mode.
        responses: What is scored.
        max_rank: Larger ranks count as this.
        batch_tokens: Tokens that go through the model together.
        progress: Told how many are done, after every batch.
    """
    import torch

    from lit_interns1.data.packed_batch import PackedBatch
    from lit_interns1.objectives.rank_surprisal import RankSurprisal, rank_surprisal

    device = model.embed_tokens.weight.device
    parts, done = [], 0
    with torch.no_grad():
        for members in _batches(responses, batch_tokens):
            batch = PackedBatch.from_documents([response.document() for response in members]).to(device)
            scores = model(
                batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens, targets=batch.labels,
                rank=True,
            ).scores  # fmt: skip
            found = rank_surprisal(scores, batch.labels, batch.sample_id_T, len(members), max_rank)
            parts.append([column.cpu() for column in found])
            done += len(members)
            progress(done)
    return RankSurprisal(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _batches(responses: Sequence[Response], batch_tokens: int) -> Iterator[list[Response]]:
    members: list[Response] = []
    size = 0
    for response in responses:
        if members and size + len(response.ids_N) > batch_tokens:
            yield members
            members, size = [], 0
        members.append(response)
        size += len(response.ids_N)
    if members:
        yield members


def _print_progress(total: int, seconds: float = 10.0) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds or (done == total and total >= 1000):
            last = time.monotonic()
            print(f"{done:,} of {total:,} rows", file=sys.stderr, flush=True)

    return tell


def table(scores: RankSurprisal, sources: Sequence[str]) -> Iterator[str]:
    """Means by source, the most suitable first, and of all."""
    import torch

    from lit_interns1.objectives.rank_surprisal import RankSurprisalRatio

    names = {name: number for number, name in enumerate(dict.fromkeys(sources))}
    metric = RankSurprisalRatio(len(names))
    metric.update(scores, torch.tensor([names[source] for source in sources]))
    whole, groups = metric.compute()
    rows = sorted(zip(names, groups, strict=True), key=lambda row: row[1].ratio)
    rows += [("all", whole)] if len(names) > 1 else []
    yield "| source | samples | mean rank | mean surprisal | ratio | ± |\n|---|---|---|---|---|---|"
    for name, (ratio, rank, surprisal, samples, error) in rows:
        interval = f"{error:.4f}" if samples > 1 else ""
        yield f"| {name} | {samples:,} | {rank:.3f} | {surprisal:.4f} | {ratio:.4f} | {interval} |"


def score_lines(scores: RankSurprisal, responses: Sequence[Response], sources: Sequence[str]) -> Iterator[str]:
    """One JSON object per response, each with the end of its line."""
    columns = (scores.ratio_S, scores.mean_rank_S, scores.mean_surprisal_S, scores.tokens_S)
    for response, source, ratio, rank, surprisal, tokens in zip(
        responses, sources, *(column.tolist() for column in columns), strict=True
    ):
        row: dict[str, Any] = {
            "file": response.row.path, "line": response.row.number, "source": source, "ratio": ratio,
            "mean_rank": rank, "mean_surprisal": surprisal, "tokens": int(tokens),
        }  # fmt: skip
        yield json.dumps(row, ensure_ascii=False) + "\n"


def best_share(ratios: Sequence[float], share: float) -> list[int]:
    """Indices of the share of rows with the lowest ratios, at least one, in their order; of equals the first."""
    count = max(1, round(share * len(ratios)))
    return sorted(sorted(range(len(ratios)), key=ratios.__getitem__)[:count])


def best_of_groups(ratios: Sequence[float], groups: Sequence[str]) -> list[int]:
    """Index of the row with the lowest ratio in each group, in their order; of equals the first."""
    best: dict[str, int] = {}
    for index, group in enumerate(groups):
        if group not in best or ratios[index] < ratios[best[group]]:
            best[group] = index
    return sorted(best.values())


def _group(response: Response, field: str) -> str:
    if field not in response.row.fields:
        raise ValueError(f"{response.row.where}: --best_per {field}: the row has no such field")
    return json.dumps(response.row.fields[field], sort_keys=True)


SUBCOMMANDS: dict[str, Any] = {"rank-surprisal": rank_surprisal}
"""`lit-interns1 data …`: work on data sets."""
