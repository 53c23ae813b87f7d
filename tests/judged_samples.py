"""Prompts and samples for judges, without an engine."""

import torch

from lit_interns1.rollout import Prompt, Sample


def prompt(source="", index=0, text="", **data):
    return Prompt((1, 2), text, source, data, index)


def sample(length=3, finish_reason="stop"):
    return Sample(
        (1, 2), [5] * length, torch.zeros(length), finish_reason, 0, torch.zeros(length, dtype=torch.int64),
        torch.zeros(max(length + 1, 0), 1, 1, dtype=torch.int16),
    )  # fmt: skip


def judged(judge, text, length=3, **data):
    """What a judge says of one response."""
    return judge.judge(prompt(**data), text, sample(length))


def score_groups(mixture, groups, source="", data=None):
    """Scored samples of groups of texts, each for a prompt of its own."""
    prompts = [prompt(source, index, **(data or {})) for index in range(len(groups))]
    return mixture(prompts, [[sample() for _ in group] for group in groups], groups)
