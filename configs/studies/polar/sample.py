"""Trajectories of several policies for the same prompts: a policy is a checkpoint and a temperature.

    python sample.py out.jsonl --policies early:…/early/checkpoints/last.ckpt late:… --temperatures 0.5 0.8 1.1

A prompt is the beginning of a piece of a bundled text; `--held_out` takes other pieces. Every line of the output is
{"prompt", "policy", "trajectory"}; a policy is called after its checkpoint and temperature, such as "late-0.8".
"""

import argparse
import json
import random

from lit_interns1.data.sources import TextSource
from lit_interns1.data.tokenizer import load_tokenizer
from lit_interns1.models import generate
from lit_interns1.modules.language_model_module import load_language_model

STRIDE = 400


def prompts(count, tokens, held_out):
    """Pieces of Shakespeare, cut at lines; every fifth document is held out."""
    tokenizer, found = load_tokenizer(), []
    for number, document in enumerate(TextSource("bundled:shakespeare").documents()):
        if (number % 5 == 0) != held_out:
            continue
        for start in range(0, len(document), STRIDE):
            begin = document.find("\n", start) + 1
            ids = tokenizer.encode(document[begin : begin + 8 * tokens])[:tokens]
            if begin and len(ids) == tokens:
                found.append(tokenizer.decode(ids))
    random.Random(0).shuffle(found)
    found = list(dict.fromkeys(found))
    if len(found) < count:
        raise SystemExit(f"there are {len(found)} prompts, {count} were asked for")
    return found[:count]


def main():
    """Samples and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--policies", nargs="+", required=True, help="name:checkpoint")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.5, 0.8, 1.1])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--each", type=int, default=2, help="trajectories of a policy for a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=12)
    parser.add_argument("--trajectory_tokens", type=int, default=32)
    parser.add_argument("--held_out", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    texts = prompts(options.prompts, options.prompt_tokens, options.held_out)
    tasks = [(text, tokenizer.encode(text)) for text in texts for _ in range(options.each)]
    with open(options.out, "w", encoding="utf-8") as out:
        for place, policy in enumerate(options.policies):
            name, path = policy.split(":", 1)
            model = load_language_model(path)
            for turn, temperature in enumerate(options.temperatures):
                for first in range(0, len(tasks), options.batch):
                    part = tasks[first : first + options.batch]
                    result = generate(
                        model, [ids for _, ids in part], max_new_tokens=options.trajectory_tokens,
                        temperature=temperature, seed=((place * 100 + turn) * 2 + options.held_out) * 10_000 + first,
                        stop_ids=[tokenizer.end_of_text_id],
                    )  # fmt: skip
                    for (prompt, _), ids in zip(part, result.token_ids, strict=True):
                        trajectory = tokenizer.decode(ids, skip_special_tokens=True)
                        if trajectory.strip():
                            row = {"prompt": prompt, "policy": f"{name}-{temperature:g}", "trajectory": trajectory}
                            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
