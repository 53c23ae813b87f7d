"""How often the reward model prefers the trajectory of the reference's own policy, with standard errors.

    python evaluate.py reward.ckpt held-out.jsonl [more.jsonl …]

The pairs of one prompt are not independent, so the error is that of means over prompts: s / √prompts. Prints the share
for each file, by whether the checkpoints or only the temperatures differ, and for each pair of policies.
"""

import argparse
import math
from collections import defaultdict

from lit_interns1.data import PolarEncoder, PolarSource, PolarTemplate, load_tokenizer
from lit_interns1.models.polar import PolarScorer
from lit_interns1.modules.reward_model_module import load_reward_model

TEMPLATE = PolarTemplate("<|im_start|>", "<|im_end|>", wrapper="pretrain", max_length=256, max_response_length=100)


def share(pairs):
    """(mean, standard error) of what is right, by prompt; pairs: (prompt, right)."""
    by_prompt = defaultdict(list)
    for prompt, right in pairs:
        by_prompt[prompt].append(right)
    means = [sum(rights) / len(rights) for rights in by_prompt.values()]
    mean = sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / max(len(means) - 1, 1)
    return mean, math.sqrt(variance / len(means))


def main():
    """Scores and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    scorer = PolarScorer(load_reward_model(options.checkpoint), PolarEncoder(load_tokenizer(), TEMPLATE))
    for file in options.files:
        pairs = PolarSource(file).pairs(seed=0, triples_per_policy=2)
        chosen, rejected = (
            scorer.score([p.prompt for p in pairs], [p.reference for p in pairs], [getattr(p, side) for p in pairs])
            for side in ("chosen", "rejected")
        )
        groups = defaultdict(list)
        for pair, a, b in zip(pairs, chosen, rejected, strict=True):
            right = (pair.prompt, (a > b) + 0.5 * (a == b))
            (model, _), (other, _) = (policy.rsplit("-", 1) for policy in pair.policies)
            groups["all pairs"].append(right)
            groups["another checkpoint" if model != other else f"{model}, another temperature"].append(right)
            groups[" and ".join(sorted(pair.policies))].append(right)
        print(f"{file}: {len(pairs)} pairs, {len({pair.prompt for pair in pairs})} prompts")
        for name, rights in sorted(groups.items(), key=lambda item: (item[0] != "all pairs", " and " in item[0], item)):
            mean, error = share(rights)
            print(f"| {name} | {mean:.3f} ± {error:.3f} | {len(rights)} |")


if __name__ == "__main__":
    main()
