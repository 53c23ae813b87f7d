"""Makes figures.json: losses and gradients by the authors' own code on small random tensors.

    python generate.py --oreal train_oreal.py        # needs trl==1.16.0, verl==0.9.1 (--no-deps) and OREAL's file

verl is imported with stubs for packages that its arithmetic does not use. Where a formula stands in the middle of a
long function (OREAL's training loop, TRL's advantages), those lines are cut out of the source and run on stubs.
"""

import argparse
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from torch.nn import functional as F

STUBS = (
    "ray", "tensordict", "codetiming", "hydra", "peft", "torchdata", "pylatexenc", "vllm", "sglang", "tensorboard",
    "orjson", "torchvision",
)  # fmt: skip
LENGTHS = [5, 1, 8, 3, 8, 6]
WIDTH, GROUPS = 8, [0, 0, 1, 1, 1, 2]


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        known = name.split(".")[0] in STUBS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        module = MagicMock()
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def tensors(seed=11):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return (torch.randn(len(LENGTHS), WIDTH, generator=generator) * scale * 1e4).round() / 1e4

    logp = -normal(1.0).abs() - 0.05
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 3:5] = False  # tool output inside a response
    rewards = torch.tensor([1.0, 0.0, 0.25, 1.0, -0.5, 1.0])
    return {
        "logp": logp, "old_logprobs": logp + normal(0.25), "rollout_logprobs": logp + normal(0.4),
        "ref_logprobs": logp + normal(0.5), "entropy": normal(1.0).abs(), "values": normal(0.6),
        "new_values": normal(0.6),
        "token_rewards": normal(1.5), "response_mask": mask, "rewards": rewards,
        "advantages": torch.tensor([0.7, -0.7, 0.0, 1.2, -1.3, 0.4]),
    }  # fmt: skip


def cut(source, first, last):
    """The lines from the one that starts with `first` up to and including the one that starts with `last`."""
    lines = source.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(lines)) if lines[i].strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def with_gradient(function, start):
    x = start.clone().requires_grad_()
    loss = function(x)
    loss.backward()
    return {"loss": loss.item(), "gradient": x.grad.tolist()}


def verl_figures(data):
    from verl.trainer.ppo import core_algos, rollout_corr_helper
    from verl.workers.config import ActorConfig

    mask, advantages = data["response_mask"].float(), data["advantages"][:, None].expand(-1, WIDTH)

    def config(**values):
        result = object.__new__(ActorConfig)
        defaults = {
            "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0,
            "global_batch_info": {},
            "policy_loss": SimpleNamespace(
                clip_cov_ratio=0.2, clip_cov_lb=-0.5, clip_cov_ub=5.0, kl_cov_ratio=0.2, ppo_kl_coef=0.7
            ),
        }  # fmt: skip
        for name, value in {**defaults, **values}.items():
            object.__setattr__(result, name, value)
        return result

    def policy(loss_mode, agg, weights=None, **values):
        function = core_algos.get_policy_loss_fn(loss_mode)
        return with_gradient(
            lambda logp: function(
                old_log_prob=data["old_logprobs"], log_prob=logp, advantages=advantages, response_mask=mask,
                loss_agg_mode=agg, config=config(**values), rollout_is_weights=weights,
            )[0],
            data["logp"],
        )  # fmt: skip

    correction = rollout_corr_helper.compute_rollout_correction_weights
    log_ratio = data["old_logprobs"] - data["rollout_logprobs"]
    weights = {
        "token_2": correction(log_ratio, mask, "token", 2.0)[0],
        "sequence_2": correction(log_ratio, mask, "sequence", 2.0)[0],
        "token_0.7_1.4": correction(log_ratio, mask, "token", "0.7_1.4")[0],
    }
    # its k1 is log μ/π_old: bounds on that ratio, here symmetric in the log
    rejected = {
        name: rollout_corr_helper.compute_rollout_rejection_mask(log_ratio, mask, name, bounds)[0]
        for name, bounds in (("token_k1", "0.8_1.25"), ("seq_sum_k1", "0.5_2.0"), ("seq_mean_k1", "0.9_1.1111111"))
    }
    index = np.array(GROUPS, dtype=object)
    last = torch.zeros(len(LENGTHS), WIDTH)
    last[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = data["rewards"]
    kl = data["old_logprobs"] - data["ref_logprobs"]
    penalised = (last - 0.05 * kl) * mask
    gae, gae_returns = core_algos.compute_gae_advantage_return(penalised, data["values"] * mask, mask, 0.97, 0.9)
    plus, plus_returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        penalised, mask, config=SimpleNamespace(gamma=0.97)
    )
    estimators = {
        "grpo": core_algos.compute_grpo_outcome_advantage(last, mask, index)[0],
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(last, mask, index, norm_adv_by_std_in_grpo=False)[0],
        "rloo": core_algos.compute_rloo_outcome_advantage(last, mask, index)[0],
        "opo": core_algos.compute_opo_outcome_advantage(last, mask, index)[0],
        "reinforce_plus_plus_baseline": core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
            last, mask, index
        )[0],
        "reinforce_plus_plus": plus, "reinforce_plus_plus_returns": plus_returns,
        "gae": gae, "gae_returns": gae_returns,
    }  # fmt: skip
    return {
        "ppo": policy("vanilla", "token-mean"),
        "ppo_c_1.05": policy("vanilla", "token-mean", clip_ratio_c=1.05),
        "dapo": policy("vanilla", "token-mean", clip_ratio_high=0.28),
        "dapo_tis": policy("vanilla", "token-mean", weights["token_2"], clip_ratio_high=0.28),
        "grpo": policy("vanilla", "seq-mean-token-mean"),
        "seq_sum": policy("vanilla", "seq-mean-token-sum"),
        "dr_grpo": policy("vanilla", "seq-mean-token-sum-norm"),
        "gspo": policy("gspo", "seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.06),
        "cispo": policy("cispo", "token-mean", clip_ratio_high=0.3),
        "kl_cov": policy("kl_cov", "token-mean"),
        "kl": {
            name: with_gradient(
                lambda logp, name=name: (core_algos.kl_penalty(logp, data["ref_logprobs"], name) * mask).sum(),
                data["logp"],
            )
            for name in ("k1", "k2", "k3", "abs", "k1+", "k3+")
        },
        "value": with_gradient(
            lambda values: core_algos.compute_value_loss(
                values, gae_returns, data["values"], mask, cliprange_value=0.3, loss_agg_mode="token-mean"
            )[0],
            data["new_values"],
        ),
        "correction": {name: value.tolist() for name, value in weights.items()},
        "rejection": {name: value.tolist() for name, value in rejected.items()},
        "advantages": {name: value.tolist() for name, value in estimators.items()},
    }


def trl_figures(data):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.utils import nanstd

    mask = data["response_mask"].long()
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True
    )

    def loss(trainer=GRPOTrainer, inputs=None, **values):
        def function(logp):
            settings = {
                "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "grpo",
                "importance_sampling_level": "token", "off_policy_mask_threshold": None, "use_vllm": False,
                "_entropy_bonus_enabled": False, "delta": None, "use_bias_correction_kl": False, **values,
            }  # fmt: skip
            stub = SimpleNamespace(
                aux_loss_enabled=False, top_entropy_quantile=1.0, vllm_importance_sampling_correction=True,
                current_gradient_accumulation_steps=1, max_completion_length=WIDTH, accelerator=accelerator,
                use_adaptive_entropy=False, entropy_coef=0.1, model=SimpleNamespace(training=True),
                _metrics={"train": defaultdict(list)}, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
                args=SimpleNamespace(
                    delta=settings.pop("delta"), use_bias_correction_kl=settings.pop("use_bias_correction_kl"),
                    steps_per_generation=1,
                ),
                _get_per_token_logps_and_entropies=lambda *a, **k: (logp, data["entropy"], None), **settings,
            )  # fmt: skip
            batch = {
                "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
                "advantages": data["advantages"], "old_per_token_logps": data["old_logprobs"],
                "ref_per_token_logps": data["ref_logprobs"], "num_items_in_batch": mask.sum(),
                "old_logps": (data["old_logprobs"] * mask).sum(1), **(inputs or {}),
            }  # fmt: skip
            return trainer._compute_loss(stub, None, batch)

        return with_gradient(function, data["logp"])

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    advantage_lines = cut(source, "if self.multi_objective_aggregation ==", "advantages = torch.nan_to_num")
    importance_lines = cut(source, "mask = completion_mask if tool_mask", "raise ValueError(") + '"unused")'

    def advantages(scale_rewards, rewards):
        names = {
            "self": SimpleNamespace(
                multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1),
                scale_rewards=scale_rewards,
            ),
            "rewards_per_func": rewards[:, None], "unscorable_mask": rewards.isnan(), "device": "cpu",
            "num_generations": 3, "torch": torch, "nanstd": nanstd,
        }  # fmt: skip
        exec(advantage_lines, names)
        return names["advantages"].tolist()

    def importance(mode, low, high):
        names = {
            "self": SimpleNamespace(
                vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
                vllm_importance_sampling_clip_max=high,
            ),
            "completion_mask": mask, "tool_mask": None, "old_per_token_logps": data["old_logprobs"],
            "sampling_per_token_logps": data["rollout_logprobs"], "torch": torch, "math": __import__("math"),
        }  # fmt: skip
        exec(importance_lines, names)
        return names["vllm_importance_sampling_ratio"].expand(-1, WIDTH).tolist()

    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, float("nan"), -1.0, 0.5, 0.5, 0.5])
    sampling = {"sampling_per_token_logps": data["rollout_logprobs"]}
    return {
        "grpo": loss(),
        "grpo_kl": loss(beta=0.04),
        "grpo_kl_corrected": loss(beta=0.04, use_bias_correction_kl=True),
        "grpo_delta": loss(delta=1.1),
        "grpo_entropy": loss(_entropy_bonus_enabled=True),
        "grpo_opsm": loss(inputs=sampling, off_policy_mask_threshold=0.01),
        "bnpo": loss(loss_type="bnpo"),
        "dr_grpo": loss(loss_type="dr_grpo"),
        "dapo": loss(loss_type="dapo", epsilon_high=0.28),
        "cispo": loss(loss_type="cispo", epsilon_high=1.3),
        "gspo": loss(importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.06),
        "rloo": loss(trainer=RLOOTrainer),
        "rewards": rewards.tolist(),
        "advantages": {scale: advantages(scale, rewards) for scale in ("group", "batch", "none")},
        "importance": {
            "token_truncate": importance("token_truncate", None, 1.4),
            "token_mask": importance("token_mask", 0.7, 1.4),
            "sequence_truncate": importance("sequence_truncate", 0.6, 1.4),
            "sequence_mask": importance("sequence_mask", None, 1.4),
        },
    }


def oreal_figures(data, path):
    source = Path(path).read_text()
    functions = cut(source, "def threshold_rescale", "return result")
    body = cut(source, "_positive_losses = []", "loss = sum(_losses)")
    counts = data["response_mask"].sum(1)

    def loss(token_rm=True, **options):
        def function(logp):
            right = data["rewards"] > 0
            args = {
                "token_level_rm": "x" if token_rm else None, "positive_loss_factor": 1.0, "negative_loss_factor": 0.5,
                "kl_coef": 0.01, "pos_mult_adv": True, **options,
            }  # fmt: skip

            def rows(x):  # a prompt token before, the position of the last token after
                return [torch.cat([x[:1] * 0, x, x[:1] * 0])[None] for x in responses(x)]

            def responses(x):
                return [row[keep] for row, keep in zip(x, data["response_mask"])]

            names = {
                "args": type("Args", (SimpleNamespace,), {"get": lambda self, k, d=None: getattr(self, k, d)})(**args),
                "rl_batch_size": len(LENGTHS), "judger_rewards": torch.where(right, 1.0, -1.0),
                "judger_advantages": data["advantages"], "rl_num_tokens": counts + 2,
                "unpacked_labels": [torch.tensor([[-100] + [1] * n + [-100]]) for n in counts.tolist()],
                "logprobs": rows(logp), "ref_logprobs": rows(data["ref_logprobs"]), "sft_loss": rows(-logp),
                "rm_logits": rows(data["token_rewards"]), "DEVICE": "cpu", "actor_dp_size": 1,
                "global_positive_tokens": counts[right].sum().item(), "global_num_seqs": len(LENGTHS),
                "global_negative_tokens": counts[~right].sum().item(), "global_action_tokens": counts.sum().item(),
                "step_sum_gen_entropy": 0.0, "step_sum_ref_kl": 0.0, "step_sum_adv": 0.0, "step_action_tokens": 0,
                "torch": torch, "F": F,
            }  # fmt: skip
            exec(functions, names)
            # the slice [-n - 1 : -1] of the code takes the n positions before the last one
            exec(body, names)
            reward_model.append(float(sum(names["_token_level_rm_losses"])))
            return names["loss"]

        reward_model = []
        return {**with_gradient(function, data["logp"]), "reward_model_loss": reward_model[0]}

    topk = {"topk_rescale": True, "correct_topk_ratio": 0.25, "incorrect_topk_ratio": 0.25}
    long_enough = all(n * 0.25 >= 1 for n in counts.tolist())
    return {
        "threshold": loss(threshold_rescale=True),
        "threshold_0.6": loss(threshold_rescale=True, correct_threshold=0.6, incorrect_threshold=0.6),
        "plain_positives": loss(threshold_rescale=True, pos_mult_adv=False),
        "k2": loss(threshold_rescale=True, kl_type="mse"),
        "without_token_rm": loss(token_rm=False),
        **({"topk": loss(**topk)} if long_enough else {}),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--oreal", required=True)
    data = tensors()
    trl = trl_figures(data)  # before the stubs: transformers would take them for real
    sys.meta_path.insert(0, Stubs())
    oreal = parser.parse_args().oreal
    longer = {**data, "response_mask": data["response_mask"].clone()}
    longer["response_mask"][[1, 3]] = torch.arange(WIDTH) < 4
    figures = {
        "provenance": {
            "trl": "1.16.0: _compute_loss of GRPOTrainer and RLOOTrainer, lines of _generate_and_score_completions",
            "verl": "0.9.1: verl/trainer/ppo/core_algos.py, rollout_corr_helper.py",
            "oreal": "InternLM/OREAL 2859cc092ddfd7c530da183f6a667a94a6b36d37: train_oreal.py",
        },
        "groups": GROUPS,
        "data": {name: value.tolist() for name, value in data.items()},
        "longer_mask": longer["response_mask"].tolist(),
        "trl": trl, "verl": verl_figures(data), "oreal": oreal_figures(data, oreal),
        "oreal_longer": {"topk": oreal_figures(longer, oreal)["topk"]},
    }  # fmt: skip

    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.8g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    Path(__file__).with_name("figures.json").write_text(json.dumps(rounded(figures)) + "\n")


if __name__ == "__main__":
    main()
