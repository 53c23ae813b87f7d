"""The command line: `lit-interns1 fit | validate | test | predict` through LightningCLI, and commands of our own.

Commands without a Trainer start without Lightning. Everything below a run directory is named once, by `--run_dir`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from lit_interns1.commands.process import keep_freed_memory, quiet_waiting_threads

COMMANDS: dict[str, tuple[str, str]] = {
    "export": ("lit_interns1.commands.export:export_weights", "write a checkpoint's weights as a Hugging Face folder"),
    "summarize": ("lit_interns1.commands.summarize:summarize", "pictures, samples and baselines of a finished run"),
    "tokenizer": ("lit_interns1.commands.tokenizer:SUBCOMMANDS", "vocabularies of scientific domains: train, ratio"),
    "salience": ("lit_interns1.commands.salience:SUBCOMMANDS", "which validation tokens tell what a model can do"),
}
"""Commands of our own: where they are, and what they do."""

PAGE_COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("lit_interns1.commands.generate", "continue a prompt with a checkpoint; ask about images and signals"),
    "expand": ("lit_interns1.commands.expand", "a larger model from a trained one: experts, positions, tokens"),
    "lr-search": ("lit_interns1.commands.lr_search", "the best learning rate of a config; the law of several"),
    "batch-size-law": ("lit_interns1.commands.batch_size_law", "from runs at several batch sizes to a schedule of it"),
    "recipe": ("lit_interns1.commands.recipe", "batch sizes, rate, schedule and mixture from small runs, as a config"),
    "batch-size-branch": ("lit_interns1.commands.batch_size_branch", "the critical batch size at a checkpoint"),
    "mixing-law": ("lit_interns1.commands.mixing_law", "which mixture of sources to train on, from runs on several"),
    "data": ("lit_interns1.commands.rank_surprisal", "which responses suit a student model: rank-surprisal"),
    "vote": ("lit_interns1.commands.vote", "pass@k and votes among sampled answers"),
    "report": ("lit_interns1.commands.report", "one HTML page about a run, from its local logs"),
    "dashboard": ("lit_interns1.commands.dashboard", "the matching W&B workspace, as a file or uploaded"),
}
"""Commands that parse their arguments themselves, with `run`."""

TRAINER_COMMANDS: dict[str, str] = {
    "fit": "train a model",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "log-probabilities of every token",
}


PLAN = ("plan", "memory, communication and speed bounds of a run on N ranks, without running it")
"""Takes the options of `fit`, so it parses them as Lightning's commands do."""


def usage() -> str:
    """The overview that `lit-interns1 --help` prints."""
    rows = [*TRAINER_COMMANDS.items(), PLAN]
    rows += [(name, text) for name, (_, text) in (COMMANDS | PAGE_COMMANDS).items()]
    width = max(len(name) for name, _ in rows)
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        "usage: lit-interns1 COMMAND [options]\n\n"
        "Train, extend and study the Intern-S1 family with PyTorch Lightning.\n\n"
        f"commands:\n{listing}\n\n"
        "  lit-interns1 COMMAND --help     options of a command (loads PyTorch and Lightning first: some seconds)\n"
        "  lit-interns1 --version\n\n"
        "first run:\n  lit-interns1 fit --config configs/pretrain/tiny.yaml --run_dir runs/first\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        args: Arguments after the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if args is None:  # the process is ours
        quiet_waiting_threads()
        keep_freed_memory()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from lit_interns1 import __version__

        print(f"lit-interns1 {__version__}")
    elif command in COMMANDS:
        from jsonargparse import auto_cli

        module, function = COMMANDS[command][0].split(":")
        action = getattr(import_module(module), function)
        auto_cli(action, args=rest, as_positional=False, prog=f"lit-interns1 {command}")
    elif command in PAGE_COMMANDS:
        import_module(PAGE_COMMANDS[command][0]).run(rest)
    elif command in TRAINER_COMMANDS:
        if "-h" in rest or "--help" in rest:
            print("loading PyTorch and Lightning …", file=sys.stderr, flush=True)
        import_module("lit_interns1.commands.trainer").run(None if args is None else arguments)
    elif command == PLAN[0]:
        import_module("lit_interns1.commands.plan").run(rest)
    else:
        from difflib import get_close_matches

        near = get_close_matches(command, [*COMMANDS, *PAGE_COMMANDS, *TRAINER_COMMANDS, PLAN[0]], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"lit-interns1: unknown command {command!r}{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
