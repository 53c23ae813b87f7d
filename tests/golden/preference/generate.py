"""Makes figures.json: losses, gradients and metrics by TRL's own code on small random tensors.

    python generate.py        # needs trl==1.16.0

The methods of TRL's trainers are called on stubs that hold what they read: options, a model that answers with given
log-probabilities, and one process.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

LENGTHS = [5, 1, 8, 3, 1, 1, 4, 6]  # chosen and rejected by turns
WIDTH = 8
DPO_OPTIONS = {
    "sigmoid": {"loss_types": ["sigmoid"]},
    "beta": {"loss_types": ["sigmoid"], "beta": 0.7},
    "hinge": {"loss_types": ["hinge"], "beta": 0.6},
    "ipo": {"loss_types": ["ipo"], "beta": 0.3},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.2},
    "normalized": {"loss_types": ["sigmoid_norm"], "beta": 0.9},
    "forward_kl": {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js": {"loss_types": ["hinge"], "f_divergence_type": "js_divergence"},
    "alpha": {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
    "alpha 1.5 ipo": {"loss_types": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    "forward_kl normalized": {"loss_types": ["sigmoid_norm"], "f_divergence_type": "forward_kl"},
}
KTO_OPTIONS = {
    "kto": {},
    "weights": {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "no baseline": {"calculate_KL": False, "loss_type": "apo_zero_unpaired"},
    "negative KL": {"negative": True},
}
REWARD_OPTIONS = {"plain": {}, "margin": {"margin": True}, "centred": {"margin": True, "centre": 0.01}}


def tensors(seed=5):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale, *shape):
        return (torch.randn(*(shape or (len(LENGTHS), WIDTH)), generator=generator) * scale * 1e4).round() / 1e4

    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    logp = (-normal(1.0).abs() - 0.05) * mask
    return {
        "logp": logp, "ref_logprobs": (logp + normal(0.6)) * mask, "mask": mask,
        "mismatched_logp": (-normal(1.0).abs()) * mask, "mismatched_ref": (-normal(1.0).abs() - 0.5) * mask,
        "desirable": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool(),
        "scores": normal(2.0, len(LENGTHS)), "margin": normal(1.0, len(LENGTHS) // 2).abs(),
    }  # fmt: skip


def stub(**options):
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    defaults = {
        "accelerator": accelerator, "model": SimpleNamespace(training=False), "beta": 0.1, "label_smoothing": 0.0,
        "_metrics": defaultdict(lambda: defaultdict(list)), "ld_alpha": None, "precompute_ref_logps": True,
        "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "use_weighting": False, "aux_loss_enabled": False, "_total_train_tokens": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **options})


def batch_of(mask):
    completion_mask = torch.cat([torch.zeros(len(mask), 1), mask.float()], dim=1).long()
    return {"completion_mask": completion_mask, "input_ids": torch.zeros_like(completion_mask)}


def model_of(logp):
    outputs = SimpleNamespace(
        log_probs=logp, entropy=torch.zeros_like(logp), mean_logits=torch.zeros_like(logp), is_top1=logp > 0
    )
    return lambda **inputs: outputs


def result(loss, start, trainer):
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return {"loss": loss.item(), "gradient": start.grad.tolist(), "metrics": metrics}


def by_side(value):
    return torch.cat([value[0::2], value[1::2]])


def dpo_figures(data):
    from trl.trainer.dpo_trainer import DPOTrainer

    figures = {}
    for name, options in DPO_OPTIONS.items():
        logp, trainer = data["logp"].clone().requires_grad_(), stub(**options)
        reference = by_side(data["ref_logprobs"]).sum(1)
        half = len(reference) // 2
        inputs = batch_of(by_side(data["mask"])) | {
            "ref_chosen_logps": reference[:half], "ref_rejected_logps": reference[half:]
        }  # fmt: skip
        loss = DPOTrainer._compute_loss(trainer, model_of(by_side(logp * data["mask"])), inputs, False)
        figures[name] = result(loss, logp, trainer)
    return figures


def kto_figures(data):
    from trl.trainer.kto_trainer import KTOTrainer

    figures = {}
    for name, options in KTO_OPTIONS.items():
        options = {
            "calculate_KL": True,
            "loss_type": "kto",
            "desirable_weight": 1.0,
            "undesirable_weight": 1.0,
        } | options
        sign = -1.0 if options.pop("negative", False) else 1.0
        trainer = stub(_compute_kl_logps=lambda *_: (sign * data["mismatched_logp"]).sum(1), **options)  # noqa: B023
        logp = data["logp"].clone().requires_grad_()
        inputs = batch_of(data["mask"]) | {
            "label": data["desirable"], "ref_logps": data["ref_logprobs"].sum(1),
            "ref_KL_logps": (sign * data["mismatched_ref"]).sum(1),
        }  # fmt: skip
        loss = KTOTrainer._compute_loss(trainer, model_of(logp * data["mask"]), inputs, False)
        figures[name] = result(loss, logp, trainer)
    return figures


def reward_figures(data):
    from trl.trainer.reward_trainer import RewardTrainer

    figures = {}
    for name, options in REWARD_OPTIONS.items():
        scores = data["scores"].clone().requires_grad_()
        trainer = stub(args=SimpleNamespace(center_rewards_coefficient=options.get("centre")))
        inputs = {"margin": data["margin"]} if "margin" in options else {}
        outputs = SimpleNamespace(logits=by_side(scores)[:, None])
        loss = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)  # noqa: B023
        figures[name] = result(loss, scores, trainer)
    return figures


def make():
    data = tensors()
    figures = {"dpo": dpo_figures(data), "kto": kto_figures(data), "reward": reward_figures(data)}
    return {"inputs": {name: value.tolist() for name, value in data.items()}, **figures}


if __name__ == "__main__":
    import trl

    figures = {"versions": {"trl": trl.__version__}, **make()}
    path = Path(__file__).with_name("figures.json")
    path.write_text(json.dumps(figures, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")
