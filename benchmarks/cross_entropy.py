"""Cross-entropy of a language-model head, forward and backward, against the form with whole logits and against torch.

    python benchmarks/cross_entropy.py [--tokens 2048] [--hidden 512] [--vocabulary 32768 152064] [--repeats 5]

Goals, float32 on a CPU: with a hint at most 1.05 times the time of whole logits at 32,768 and 0.9 times at 152,064
entries; extra peak memory at most the two gradients and 64 MiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import MEBIBYTE, interleaved_medians, peak_extra_memory
from torch.nn import functional as F

from lit_interns1.nn.head import LanguageModelHead
from lit_interns1.objectives import NextTokenCrossEntropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIME_GOALS = {32768: 1.05, 152064: 0.9}
MEMORY_GOAL = 64 * MEBIBYTE
WHOLE, OURS = "whole logits", "ours, with hint"


def build(name: str, tokens: int, hidden_size: int, vocabulary: int, dtype: str = "float32") -> Callable[[], None]:
    """The training step of one candidate: gradients of the hidden states and of the weight."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, dtype=DTYPES[dtype], requires_grad=True)
    head = LanguageModelHead(hidden_size, vocabulary).to(DTYPES[dtype])
    labels = torch.randint(0, vocabulary, (tokens,))
    objective = NextTokenCrossEntropy()
    rows = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)

    def ours(hinted: bool) -> None:
        hint = objective.gradient_hint(labels) if hinted else None
        objective(head(hidden, labels, gradient_hint=hint), labels)[0].mean.backward()

    def library(options: torch.nn.LinearCrossEntropyOptions | None) -> None:
        F.linear_cross_entropy(hidden, head.weight, labels, options=options).backward()

    steps: dict[str, Callable[[], None]] = {
        WHOLE: lambda: F.cross_entropy(F.linear(hidden, head.weight).float(), labels).backward(),
        "torch, 256 tokens a chunk": lambda: library(rows),
        "torch, default options": lambda: library(torch.nn.LinearCrossEntropyOptions()),
        "ours, without hint": lambda: ours(False),
        OURS: lambda: ours(True),
    }

    def step() -> None:
        hidden.grad = head.weight.grad = None
        steps[name]()

    small = torch.randn(64, 64, requires_grad=True)  # wakes up thread pools and libraries
    F.cross_entropy(small @ small, torch.zeros(64, dtype=torch.int64)).backward()
    return step


SLOW = {"torch, default options"}  # timed once
NAMES = [WHOLE, "torch, 256 tokens a chunk", "torch, default options", "ours, without hint", OURS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=list(TIME_GOALS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--skip", nargs="*", default=[], help="candidates to leave out, by name")
    arguments = parser.parse_args()
    names = [name for name in NAMES if name not in arguments.skip]
    for vocabulary in arguments.vocabulary:
        sizes = (arguments.tokens, arguments.hidden, vocabulary, arguments.dtype)
        memory = {name: peak_extra_memory(build, name, *sizes) for name in names}
        steps = {name: build(name, *sizes) for name in names}
        times = interleaved_medians({n: s for n, s in steps.items() if n not in SLOW}, repeats=arguments.repeats)
        times |= interleaved_medians({n: s for n, s in steps.items() if n in SLOW}, repeats=1, warmup=0)
        gradients = (arguments.tokens + vocabulary) * arguments.hidden * DTYPES[arguments.dtype].itemsize
        print(
            f"\n{arguments.tokens} tokens, hidden {arguments.hidden}, vocabulary {vocabulary}, {arguments.dtype}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; gradients {gradients / MEBIBYTE:.0f} MiB"
        )
        print(f"{'':28}{'seconds':>9}{'ratio':>8}{'peak MiB':>10}{'beyond gradients':>18}")
        for name in names:
            print(
                f"{name:28}{times[name]:9.3f}{times[name] / times[WHOLE]:8.2f}{memory[name] / MEBIBYTE:10.0f}"
                f"{(memory[name] - gradients) / MEBIBYTE:14.0f} MiB"
            )
        if arguments.dtype == "float32" and vocabulary in TIME_GOALS:
            ratio, beyond = times[OURS] / times[WHOLE], memory[OURS] - gradients
            goal = TIME_GOALS[vocabulary]
            print(f"goal: time ratio <= {goal}: {'met' if ratio <= goal else 'MISSED'}")
            print(f"goal: at most 64 MiB beyond the gradients: {'met' if beyond <= MEMORY_GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
