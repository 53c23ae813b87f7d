"""`lit-interns1 vote`: which of several sampled answers to take, and how good that is where the right ones are known.

{"id": …, "answer": …, "tokens": 512, "correct": true}          one sample a line; see `objectives.answer_metrics`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_interns1.commands.arguments import appending, check_new, errors_in_one_line, write_new

if TYPE_CHECKING:
    from lit_interns1.objectives.answer_metrics import VoteRule

_LENGTHS = ("tokens", "length")


def run(arguments: Sequence[str]) -> None:
    """Parses the arguments of the command; options with several values may be repeated."""
    from jsonargparse import auto_cli

    repeated = appending(arguments, ("--data", "--rules", "--ks"))
    auto_cli(vote_answers, args=repeated, as_positional=False, prog="lit-interns1 vote")


def vote_answers(
    data: list[str],
    rules: list[Literal["majority", "shortest", "shortest_majority"]] | None = None,
    ks: list[int] | None = None,
    out: str | None = None,
) -> None:
    """Lets samples vote on the answer to each question; prints a table, with standard errors over questions.

    Args:
        data: JSONL, one sample a line: `id` or `prompt` (the question), `answer` (null = none could be read), `tokens`
            (their number, or the list) or `length`, and, if it is known, `correct`. May be given several times; samples
            of a question may lie in several files.
        rules: majority, shortest or shortest_majority; may be given several times. Default: all for which there are
            lengths.
        ks: Numbers of samples for pass@k; may be given several times. Default: 1, 2, 4, … as far as every question has
            samples.
        out: JSON of the table and of every question's winners; it must not exist.
    """
    with errors_in_one_line("vote"):
        check_new("--out", out)
        questions = read_questions(data)
        result = vote_result(questions, rules, ks)
        print("\n".join(table(result)))
        if out is not None:
            write_new(Path(out), json.dumps(result, indent=2, ensure_ascii=False) + "\n")


class Sample(NamedTuple):
    """One answer to a question.

    Attributes:
        answer: The answer as text; None = none could be read.
        length: Tokens; None = not said.
        correct: Whether it is right; None = not said.
        where: File and line.
    """

    answer: str | None
    length: int | None
    correct: bool | None
    where: str


def read_questions(data: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples of each question, in the order in which they come.

    Raises:
        ValueError: If a row has not the form, or some rows say whether they are right, or how long they are, and others
            do not.
    """
    from lit_interns1.data.sources import json_objects

    questions: dict[str, list[Sample]] = {}
    for path in data:
        for number, _, row in json_objects(Path(path).expanduser()):
            question, sample = _sample(row, f"{path}, line {number}")
            questions.setdefault(question, []).append(sample)
    samples = [sample for members in questions.values() for sample in members]
    if not samples:
        raise ValueError(f"--data {', '.join(data)}: there is no row")
    for name in ("correct", "length"):
        missing = [sample for sample in samples if getattr(sample, name) is None]
        if missing and len(missing) < len(samples):
            raise ValueError(
                f"{missing[0].where}: the row has no `{name}`, but others have one; give it to all or to none (leave "
                "out samples that could not be judged)"
            )
    return questions


def _sample(row: dict[str, Any], where: str) -> tuple[str, Sample]:
    key = next((name for name in ("id", "prompt") if name in row), None)
    if key is None or "answer" not in row:
        raise ValueError(
            f"{where}: expected `id` or `prompt`, and `answer` (null if none could be read); got "
            f"{', '.join(sorted(row)) or 'no field'}"
        )
    length, correct = next((row[name] for name in _LENGTHS if row.get(name) is not None), None), row.get("correct")
    if isinstance(length, list):
        length = len(length)
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
        raise ValueError(f"{where}: {' or '.join(_LENGTHS)} is a number of tokens or their list, got {length!r:.80}")
    if correct is not None and correct not in (0, 1):  # True and False are 1 and 0
        raise ValueError(f"{where}, correct: expected true or false, got {correct!r:.80}")
    question = _as_text(row[key])
    if question is None:
        raise ValueError(f"{where}, {key}: it is empty")
    return question, Sample(_as_text(row["answer"]), length, None if correct is None else bool(correct), where)


def _as_text(value: Any) -> str | None:
    """Answers are equal if they are the same text: 7 and 7.0 and " 7"; an empty one is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value, sort_keys=True)
    return text or None


def vote_result(
    questions: dict[str, list[Sample]], rules: Sequence[VoteRule] | None = None, ks: Sequence[int] | None = None
) -> dict[str, Any]:
    """Winners by question, and, where right answers are known, means over questions with their standard errors.

    Args:
        questions: See `read_questions`.
        rules: Which votes; None = all for which there are lengths.
        ks: Numbers of samples for pass@k; None = powers of 2.

    Raises:
        ValueError: If a rule needs lengths that are not there, or a k more samples than a question has.
    """
    import torch

    from lit_interns1.objectives.answer_metrics import NO_ANSWER, VOTE_RULES, AnswerMetrics, answer_ids, vote

    first = next(iter(questions.values()))[0]
    if rules is None:
        rules = [rule for rule in VOTE_RULES if rule == "majority" or first.length is not None]
    elif first.length is None and (needing := [rule for rule in rules if rule != "majority"]):
        raise ValueError(f"--rules {', '.join(needing)}: the rows have no `tokens` or `length`")
    question, fewest = min(((name, len(members)) for name, members in questions.items()), key=lambda entry: entry[1])
    if ks is not None and first.correct is None:
        raise ValueError(f"--ks {', '.join(map(str, ks))}: pass@k needs `correct` in the rows")
    if ks is not None and not all(1 <= k <= fewest for k in ks):
        raise ValueError(f"--ks {', '.join(map(str, ks))}: from 1 to {fewest}, the samples of {question[:80]!r}")
    ks = [1 << power for power in range(fewest.bit_length())] if ks is None else ks
    metric = AnswerMetrics(ks, rules) if first.correct is not None else None
    winners, differing = [], dict.fromkeys(rules, 0)
    for name, members in questions.items():
        answers = [sample.answer for sample in members]
        ids = answer_ids(answers)
        lengths = None if first.length is None else torch.tensor([sample.length for sample in members])
        row: dict[str, Any] = {"question": name, "samples": len(members)}
        majority = vote(ids)
        for rule in rules:
            winner = vote(ids, lengths, rule)
            row[rule] = None if winner == NO_ANSWER else answers[ids.tolist().index(winner)]
            differing[rule] += winner != majority
        winners.append(row)
        if metric is not None:
            metric.update(torch.tensor([sample.correct for sample in members]), ids, lengths)
    samples = sum(map(len, questions.values()))
    unread = sum(sample.answer is None for members in questions.values() for sample in members)
    result: dict[str, Any] = {
        "questions": len(questions), "samples": samples, "without_answer": unread, "rules": list(rules),
        "differs_from_majority": {rule: count / len(questions) for rule, count in differing.items()},
    }  # fmt: skip
    if metric is not None:
        means = {name: None if value != value else value for name, value in metric.compute().items()}
        errors = {name: None if value != value else value for name, value in metric.standard_errors.items()}
        result |= {"mean": means, "standard_error": errors}
    return result | {"winners": winners}


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    yield (
        f"{result['questions']:,} questions, {result['samples']:,} samples, {result['without_answer']:,} of them "
        "without an answer\n"
    )
    if "mean" not in result:
        yield "| rule | differs from majority |\n|---|---|"
        for rule in result["rules"]:
            yield f"| {_title(rule)} | {result['differs_from_majority'][rule]:.4f} |"
        return
    yield "| | right | ± |\n|---|---|---|"
    for name, error in result["standard_error"].items():
        yield f"| {_title(name)} | {result['mean'][name]:.4f} | {'' if error is None else f'{error:.4f}'} |"
    lengths = [(name, result["mean"][f"length_{name}"]) for name in ("right", "wrong")]
    if any(length is not None for _, length in lengths):
        yield "\n| samples | mean tokens |\n|---|---|"
        for name, length in lengths:
            yield f"| {name} | {'' if length is None else f'{length:.1f}'} |"


def _title(name: str) -> str:
    return name.replace("pass_at_", "pass@").replace("_", " ")
