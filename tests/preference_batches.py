"""What tests of preference objectives share: packed pairs and lone responses, TRL's figures, all objectives."""

import json
from functools import cache
from pathlib import Path

import torch

import policy_batches
from lit_interns1.objectives import preference

LENGTHS = [5, 1, 9, 3, 1, 1, 2, 7]  # response tokens, chosen and rejected by turns
WEIGHTS = [0.5, 2.0, 0.0, 1.25]  # of the pairs


@cache
def figures():
    return json.loads((Path(__file__).parent / "golden" / "preference" / "figures.json").read_text())


def pack(logp, mask, **values):
    """Rows (S, L) of responses, or values (S,), side by side in one packed row; rubbish outside the mask.

    Returns:
        logp_T, the inputs, and a function from flat back to (S, L).
    """
    flat, back = policy_batches.pack({"logp": logp, **values}, mask)
    logp_T = torch.nan_to_num(flat.pop("logp"), nan=7.0)
    for name in ("is_chosen", "mismatched"):
        if name in flat:
            flat[name] = flat[name] == 1
    flat["pair_ids"] = torch.nan_to_num(flat["pair_ids"], nan=99).long()
    return logp_T, preference.PreferenceInputs.from_fields(flat, flat.pop("sample_ids")), back


def random_batch(seed=0, dtype=torch.float64, lone=False):
    """logp_T and inputs of four pairs; `lone`: of eight responses without pairs, of which three are mismatched."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    mask[2, 4:6] = False  # something between two parts of a response
    logp = -torch.randn(shape, generator=generator, dtype=dtype).abs() - 0.05
    reference = logp + 0.6 * torch.randn(shape, generator=generator, dtype=dtype)
    place = torch.arange(len(LENGTHS))
    values = {
        "ref_logprobs": reference, "pair_ids": 40 - place // 2, "is_chosen": place % 2 == 0,
        "weights": torch.tensor(WEIGHTS, dtype=dtype).repeat_interleave(2),
    }  # fmt: skip
    if lone:
        values |= {
            "pair_ids": torch.full((8,), -1), "is_chosen": torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]).bool(),
            "mismatched": torch.tensor([0, 1, 0, 0, 1, 0, 0, 1]).bool(), "weights": torch.rand(8, generator=generator),
        }  # fmt: skip
    return pack(logp, mask, **values)


PAIRED = {
    "DPO": preference.DPO(),
    "DPO smoothed": preference.DPO(0.7, label_smoothing=0.2),
    "DPO robust": preference.DPO(0.7, label_smoothing=0.2, robust=True),
    "DPO hinge": preference.DPO(0.6, "hinge"),
    "DPO forward_kl": preference.DPO(0.5, f_divergence="forward_kl"),
    "DPO js": preference.DPO(0.5, f_divergence="js"),
    "DPO alpha": preference.DPO(0.5, f_divergence="alpha", alpha=0.3),
    "DPO normalized": preference.DPO(0.9, length_normalized=True),
    "IPO": preference.IPO(0.3),
}
LONE = {
    "KTO": preference.KTO(0.4, 1.3, 0.8),
    "KTO without baseline": preference.KTO(0.4, baseline="none"),
    **{
        f"SFT {divergence} {level}": preference.ImplicitRewardSFT(divergence, 0.7, level, clip=1.5)
        for divergence in ("tv", "pearson", "hellinger", "js", "reverse_kl", "forward_kl")
        for level in ("token", "sequence")
    },
}


def loss_and_gradient(objective, logp_T, inputs, sizes=None, prepare=True):
    """The mean loss over micro-batches of so many tokens, its gradient at the log-probabilities, and mean metrics."""
    logp_T = logp_T.clone().requires_grad_()
    if prepare:
        inputs = objective.prepare(policy_batches.scores_of(logp_T.detach()), inputs)
    sizes = sizes or [len(logp_T)]
    total, count, sums = 0.0, 0.0, {}
    for part, logp in zip(inputs.split(sizes), logp_T.split(sizes), strict=True):
        loss, metrics = objective(policy_batches.scores_of(logp), part)
        total, count = total + loss.sum, count + loss.count
        for name, metric in metrics.items():
            assert not metric.sum.requires_grad, name
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + metric.sum, before[1] + metric.count
    mean = total / count.clamp(min=1)
    mean.backward()
    return mean.detach(), logp_T.grad, {name: (a / b.clamp(min=1)).item() for name, (a, b) in sums.items()}
