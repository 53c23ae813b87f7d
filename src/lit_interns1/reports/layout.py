"""Which logged keys belong together: the sections and charts that the HTML page and the W&B dashboard share.

A key is written as in the table of keys: `val/loss/{source}` stands for every `val/loss/...`. Keys that no chart names
join the section of their prefix by themselves; keys of three parts that differ in one of them are curves of one chart:
`router/layer_0/load_std` and `router/layer_1/load_std`, or `stability/weight_rms/head` and `stability/weight_rms/norm`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_STATISTIC = re.compile(r"(.+)_(mean|max|min|std)$")
_NOT_DRAWN = {"epoch", "step", "train/tokens", "trainer/global_step", "batch/switch"} | {
    f"lr_search/{name}" for name in ("rate", "loss", "diverged")
}
"""Axes, events and trials, not curves over tokens."""


def key_regex(pattern: str) -> str:
    """The regular expression of a documented key; a name in braces is one part of the key.

    Args:
        pattern: For example `val/loss/{source}`.

    Returns:
        For example `^val/loss/([^/]+)$`.
    """
    pieces = _PLACEHOLDER.split(pattern)
    return "^" + "".join("([^/]+)" if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)) + "$"


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: What stands above.
        keys: Documented keys of its curves.
        unit: Unit of all of them; empty = a number without unit.
    """

    title: str
    keys: tuple[str, ...]
    unit: str = ""


@dataclass(frozen=True)
class Section:
    """Charts under one heading.

    Args:
        title: The heading.
        prefixes: First parts of the keys that belong here.
        charts: In the order of reading.
        curve: Which part of a key `prefix/a/b` that no chart names tells the curves of a chart apart.
    """

    title: str
    prefixes: tuple[str, ...]
    charts: tuple[Chart, ...] = ()
    curve: Literal["middle", "last"] = "middle"


SECTIONS: tuple[Section, ...] = (
    Section(
        "Loss",
        ("train", "val", "test"),
        (
            Chart("Loss", ("train/loss", "val/loss"), "nats per token"),
            Chart("Validation loss by source", ("val/loss/{source}",), "nats per token"),
            Chart("Validation loss per byte of text", ("val/bits_per_byte",), "bits per byte"),
            Chart("Answers that are right", ("val/accuracy",)),
            Chart(
                "Retrieval among validation pairs",
                (
                    "val/image_to_text/recall_at_1",
                    "val/image_to_text/recall_at_5",
                    "val/text_to_image/recall_at_1",
                    "val/text_to_image/recall_at_5",
                    "val/retrieval_chance",
                ),
            ),
            Chart("Temperature and alignment of pairs", ("train/temperature", "train/alignment")),
            Chart("Balance loss", ("train/balance",)),
            Chart("Router z loss", ("train/router_z",), "nats²"),
        ),
    ),
    Section(
        "Reward model",
        ("reward",),
        (
            Chart("Pairs, or responses, in the right order", ("reward/accuracy", "val/reward/accuracy")),
            Chart("Difference of the scores of a pair", ("reward/margin", "val/reward/margin")),
            Chart("Mean score", ("reward/score", "val/reward/score")),
        ),
    ),
    Section(
        "Preference",
        ("preference",),
        (
            Chart("Pairs in the right order", ("preference/accuracy", "val/preference/accuracy")),
            Chart("Difference of the implicit rewards", ("preference/margin", "val/preference/margin"), "nats"),
            Chart("Implicit rewards", ("preference/chosen_rewards", "preference/rejected_rewards"), "nats"),
        ),
    ),
    Section(
        "Rollouts",
        ("rollout", "mismatch", "rollout_is"),
        (
            Chart("Reward", ("rollout/reward", "val/reward")),
            Chart("Right answers", ("rollout/correct", "val/correct")),
            Chart("Reward by source", ("rollout/reward/{source}",)),
            Chart("Scores of judges", ("rollout/judge/{judge}",)),
            Chart("Length of responses", ("rollout/response_length", "val/response_length"), "tokens"),
            Chart("Samples that teach nothing", ("rollout/zero_variance", "rollout/failed", "rollout/truncated")),
            Chart("Engine against trainer: KL", ("mismatch/k1", "mismatch/k3"), "nats"),
            Chart("Engine against trainer: tokens off by a factor of 2", ("mismatch/extreme",)),
            Chart("Masked by the correction", ("rollout_is/masked", "rollout_is/rejected")),
        ),
    ),
    Section(
        "Policy",
        ("policy",),
        (
            Chart("Entropy", ("policy/entropy",), "nats"),
            Chart("Terms of the loss", ("policy/loss/{term}",)),
            Chart("Clipped", ("policy/clip_fraction/{side}",)),
        ),
    ),
    Section(
        "Capability salience",
        ("salience",),
        (
            Chart("Predicted score", ("salience/{capability}/predicted_score",), "of the score"),
            Chart("Its standard deviation", ("salience/{capability}/predicted_std",), "of the score"),
            Chart("Salience-weighted loss", ("salience/{capability}/loss",), "nats"),
        ),
    ),
    Section(
        "Optimizer",
        ("optim",),
        (Chart("Learning rate", ("optim/lr",)), Chart("Gradient norm", ("optim/grad_norm",))),
    ),
    Section(
        "Batch size",
        ("batch",),
        (
            Chart("Rows of an optimizer step", ("batch/rows_per_step",), "rows"),
            Chart("Tokens of an optimizer step", ("batch/tokens_per_step",), "tokens"),
            Chart("Gradient noise scale", ("batch/noise_scale",), "tokens"),
        ),
    ),
    Section("Learning-rate search", ("lr_search",)),
    Section(
        "Router",
        ("router",),
        (
            Chart("Imbalance (MaxVio)", ("router/all/max_violation_mean", "router/all/max_violation_max")),
            Chart("Imbalance of single layers", ("router/layer_{i}/max_violation",)),
        ),
    ),
    Section(
        "Stability",
        ("stability",),
        (
            Chart("Skipped steps", ("stability/skipped_steps",), "steps"),
            Chart("Update / weight", ("stability/update_ratio/{class}",)),
            Chart("Gradient norm of each class", ("stability/grad_norm/{class}",)),
            Chart("Weight rms", ("stability/weight_rms/{class}",)),
            Chart("Activation rms", ("stability/activation_rms/{class}",)),
            Chart("Feature change", ("stability/feature_change/{class}",)),
        ),
        curve="last",
    ),
    Section(
        "Throughput",
        ("throughput",),
        (
            Chart("Tokens per second", ("throughput/tokens_per_second",), "tokens/s"),
            Chart("Time of an optimizer step", ("throughput/step_seconds",), "s"),
            Chart("Share of the peak (MFU)", ("throughput/mfu",)),
            Chart(
                "Time of a rollout batch",
                ("throughput/generate_seconds", "throughput/judge_seconds", "throughput/prepare_seconds"),
                "s",
            ),
            Chart("Generated tokens per second", ("throughput/rollout_tokens_per_second",), "tokens/s"),
        ),
    ),
)
"""What is drawn, in the order of reading."""


@dataclass(frozen=True)
class Curves:
    """A chart of one run: which of its keys are drawn.

    Attributes:
        title: What stands above.
        unit: Unit of the values.
        keys: Key by name of the curve, in the order of drawing.
    """

    title: str
    unit: str = ""
    keys: dict[str, str] = field(default_factory=dict)


def arrange(names: Iterable[str]) -> list[tuple[str, list[Curves]]]:
    """Places logged keys: each in the first chart that names it, else in the section of its prefix.

    Args:
        names: Keys that a run logged.

    Returns:
        Sections with at least one chart, as title and charts; a section for every unknown prefix behind the known ones.
    """
    left = sorted(set(names) - _NOT_DRAWN, key=_natural)
    placed: dict[str, list[Curves]] = {section.title: [] for section in SECTIONS}
    for section in SECTIONS:
        for chart in section.charts:
            keys: dict[str, str] = {}
            for pattern in chart.keys:
                for name in (name for name in left if re.match(key_regex(pattern), name)):
                    curve = _curve_name(pattern, name)
                    keys[name if curve in keys else curve] = name
            left = [name for name in left if name not in keys.values()]
            if keys:
                placed[section.title].append(Curves(chart.title, chart.unit, keys))
    home = {prefix: section for section in SECTIONS for prefix in section.prefixes}
    families: dict[tuple[str, str], Curves] = {}
    for name in left:
        prefix = name.split("/")[0] if "/" in name else "other"
        section = home.get(prefix, Section(prefix, (prefix,)))
        title, curve = _family(name, section.curve)
        keys = families.setdefault((section.title, title), Curves(title)).keys
        keys[name if curve in keys else curve] = name
    for (section_title, _), curves in families.items():
        placed.setdefault(section_title, []).append(curves)
    return [(title, charts) for title, charts in placed.items() if charts]


def _curve_name(pattern: str, name: str) -> str:
    """The parts with braces, the statistic (`router/all/z_mean` -> `mean`) or the prefix (`train/loss` -> `train`)."""
    variable = [part for part, form in zip(name.split("/"), pattern.split("/")) if "{" in form]
    if variable:
        return "/".join(variable)
    prefix, _, last = name.rpartition("/")
    statistic = _STATISTIC.match(last)
    if "/" in prefix and statistic:
        return statistic[2]
    return {"val": "validation"}.get(prefix, prefix or name)


def _family(name: str, curve: str) -> tuple[str, str]:
    """Chart and curve of a key that no chart names."""
    prefix, *middle, last = name.split("/") if "/" in name else (name, name)
    group, statistic = "/".join(middle), _STATISTIC.match(last)
    if not group:
        return _words(last), prefix
    if group in ("all", "val") and statistic:
        return _words(statistic[1]) + (", validation" if group == "val" else ""), statistic[2]
    if curve == "last":
        return _words(group), last
    return _words(last) + (" by layer" if re.fullmatch(r"layer_\d+", group) else ""), group


def _words(name: str) -> str:
    return name[:1].upper() + name[1:].replace("_", " ")


def _natural(text: str) -> list[tuple[int, str]]:
    """Numbers in a text compare as numbers."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", text)]
