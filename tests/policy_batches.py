"""What tests of policy objectives share: rollout batches in packed form, all objectives, the authors' figures."""

import json
from functools import cache
from pathlib import Path

import torch

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives import policy

LENGTHS = [5, 1, 9, 3, 4, 6, 2, 7]  # response tokens of the random batch; sample 4 is masked as a whole


@cache
def figures():
    return json.loads((Path(__file__).parent / "golden" / "policy" / "figures.json").read_text())


def pack(rows, mask):
    """(B, L) matrices side by side in one packed row: a prompt token before each response, padding at the end.

    Outside the mask there is rubbish (NaN), which nobody may read.

    Returns:
        The flat vectors by name with `response_mask` and `sample_ids`, and a function from flat back to (B, L).
    """
    count, width = mask.shape
    flat = {}
    for name, value in rows.items():
        value = value[:, None].expand(-1, width) if value.ndim == 1 else value
        spoiled = torch.where(mask, value, torch.nan)
        flat[name] = torch.cat([torch.full((count, 1), torch.nan), spoiled], dim=1).flatten()
    padding = torch.full((3,), torch.nan)
    flat = {name: torch.cat([value, padding]) for name, value in flat.items()}
    flat["response_mask"] = torch.cat([torch.cat([torch.zeros(count, 1).bool(), mask], 1).flatten(), padding > 0])
    ids = torch.arange(count)[:, None].expand(-1, width + 1).flatten()
    flat["sample_ids"] = torch.cat([ids, torch.tensor([-1, -1, -1])])
    return flat, lambda value_T: value_T[:-3].view(count, width + 1)[:, 1:]


def random_batch(seed=0, dtype=torch.float32):
    """logp_T, entropy_T and inputs with every vector, with masked tool output inside a response and a masked sample."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(LENGTHS), max(LENGTHS)

    def normal(scale, *shape):
        return torch.randn(*(shape or (count, width)), generator=generator, dtype=dtype) * scale

    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask[2, 4:6] = False
    mask[4] = False
    logp = -normal(1.0).abs() - 0.05
    rows = {
        "logp": logp, "entropy": normal(1.0).abs(), "old_logprobs": logp + normal(0.3),
        "rollout_logprobs": logp + normal(0.6), "ref_logprobs": logp + normal(0.5), "values": normal(0.5),
        "returns": normal(0.5), "token_rewards": normal(1.5), "advantages": normal(1.0, count),
        "rewards": torch.tensor([1.0, -1, 1, -1, 1, -1, -1, 1], dtype=dtype),
    }  # fmt: skip
    flat, back = pack(rows, mask)
    scores = torch.nan_to_num(flat.pop("logp")), torch.nan_to_num(flat.pop("entropy"))
    ids = flat.pop("sample_ids")
    return *scores, policy.PolicyInputs.from_fields(flat, ids), back


def objectives():
    """Every objective, with options under which each of its parts does something on `random_batch`."""
    return {
        "GRPO": policy.GRPO(beta=0.04),
        "GRPO corrected": policy.GRPO(beta=0.04, kl_type="k3+", use_bias_correction_kl=True, entropy_coef=0.1),
        "GRPO OPSM": policy.GRPO(off_policy_mask_threshold=0.05, delta=1.3),
        "DrGRPO": policy.DrGRPO(max_completion_length=9),
        "DAPO": policy.DAPO(),
        "RLOO": policy.RLOO(),
        "RLOO reinforce": policy.RLOO(surrogate="reinforce", loss_agg_mode="seq-mean-token-sum", on_policy=True),
        "ReinforcePlusPlus": policy.ReinforcePlusPlus(),
        "PPO": policy.PPO(clip_ratio_c=1.1),
        "GSPO": policy.GSPO(0.03, 0.04),
        "CISPO": policy.CISPO(epsilon_high=0.2),
        "KLCov": policy.KLCov(kl_cov_ratio=0.2),
        "ClipCov": policy.ClipCov(clip_cov_ratio=0.2, clip_cov_low=-1.0),
        "OREAL": policy.OREAL(kl_coef=0.1),
        "OREAL topk": policy.OREAL(rescale="topk", kl_coef=0.1, running_mean=False),
        "OREAL without token rewards": policy.OREAL(credit="none"),
        "InternS1": policy.InternS1(kl_cov_ratio=0.2, kl_cov_coef=0.3),
        "InternS1Pro": policy.InternS1Pro(mismatch_high=2.0, staleness_high=1.2),
    }


def scores_of(logp_T, entropy_T=None):
    return TokenScores(logp_T, torch.zeros_like(logp_T), entropy_T)


def loss_and_gradient(objective, logp_T, entropy_T, inputs, sizes=None):
    """The mean loss over micro-batches of so many tokens, and its gradient at the log-probabilities."""
    logp_T = logp_T.clone().requires_grad_()
    prepared = objective.prepare(inputs)
    sizes = sizes or [len(logp_T)]
    total, count, metrics = 0.0, 0.0, {}
    for part, logp, entropy in zip(prepared.split(sizes), logp_T.split(sizes), entropy_T.split(sizes), strict=True):
        loss, values = objective(scores_of(logp, entropy), part)
        total, count = total + loss.sum, count + loss.count
        for name, value in values.items():
            assert not value.sum.requires_grad, name
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = before[0] + value.sum, before[1] + value.count
    mean = total / count.clamp(min=1)
    mean.backward()
    return mean.detach(), logp_T.grad, {name: (a / b.clamp(min=1)).item() for name, (a, b) in metrics.items()}
