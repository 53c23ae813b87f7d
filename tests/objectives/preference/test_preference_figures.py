"""Losses, gradients and metrics equal TRL 1.16.0's (`tests/golden/preference`)."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import preference_batches as batches
from lit_interns1.objectives import preference
from lit_interns1.objectives.reward import BradleyTerry

FIGURES = batches.figures()
INPUTS = {name: torch.tensor(value) for name, value in FIGURES["inputs"].items()}
DPO = {
    "sigmoid": preference.DPO(),
    "beta": preference.DPO(beta=0.7),
    "hinge": preference.DPO(0.6, "hinge"),
    "ipo": preference.IPO(0.3),
    "robust": preference.DPO(label_smoothing=0.2, robust=True),
    "normalized": preference.DPO(0.9, length_normalized=True),
    "forward_kl": preference.DPO(f_divergence="forward_kl"),
    "js": preference.DPO(loss_type="hinge", f_divergence="js"),
    "alpha": preference.DPO(f_divergence="alpha"),
    "alpha 1.5 ipo": preference.DPO(loss_type="ipo", f_divergence="alpha", alpha=1.5),
    "forward_kl normalized": preference.DPO(f_divergence="forward_kl", length_normalized=True),
}
KTO = {
    "kto": preference.KTO(),
    "weights": preference.KTO(0.4, 1.3, 0.8),
    "no baseline": preference.KTO(baseline="none"),
    "negative KL": preference.KTO(),
}
PAIR_METRICS = {
    "rewards/chosen": "chosen_rewards", "rewards/rejected": "rejected_rewards", "rewards/margins": "margin",
    "rewards/accuracies": "accuracy", "logps/chosen": "chosen_logprobs", "logps/rejected": "rejected_logprobs",
    "kl": "kl", "accuracy": "accuracy", "margin": "margin", "mean_reward": "score",
}  # fmt: skip


def check(figure, loss, gradient, metrics, skipped=()):
    assert loss.item() == pytest.approx(figure["loss"], rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(figure["gradient"]), rtol=1e-5, atol=1e-7)
    compared = {name: ours for name, ours in PAIR_METRICS.items() if name in figure["metrics"] and name not in skipped}
    assert len(compared) >= 3
    for name, ours in compared.items():
        assert metrics[ours] == pytest.approx(figure["metrics"][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", FIGURES["dpo"])
def test_pairs_equal_trl(name: str) -> None:
    place = torch.arange(8)
    logp_T, inputs, back = batches.pack(
        INPUTS["logp"], INPUTS["mask"], ref_logprobs=INPUTS["ref_logprobs"], pair_ids=place // 2,
        is_chosen=place % 2 == 0,
    )  # fmt: skip
    loss, gradient, metrics = batches.loss_and_gradient(DPO[name], logp_T, inputs)
    check(FIGURES["dpo"][name], loss, back(gradient), metrics)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FIGURES["kto"])
def test_kto_equals_trl(name: str, prepare: bool) -> None:
    sign = -1 if name == "negative KL" else 1
    mask, other = INPUTS["mask"], torch.arange(16) >= 8
    logp_T, inputs, back = batches.pack(
        torch.cat([INPUTS["logp"], sign * INPUTS["mismatched_logp"]]), torch.cat([mask, mask]),
        ref_logprobs=torch.cat([INPUTS["ref_logprobs"], sign * INPUTS["mismatched_ref"]]),
        pair_ids=torch.full((16,), -1), is_chosen=torch.cat([INPUTS["desirable"], INPUTS["desirable"]]),
        mismatched=other,
    )  # fmt: skip
    loss, gradient, metrics = batches.loss_and_gradient(KTO[name], logp_T, inputs, prepare=prepare)
    check(FIGURES["kto"][name], loss, back(gradient)[:8], metrics, skipped=("rewards/margins",))
    assert not back(gradient)[8:].any()


@pytest.mark.parametrize("name", FIGURES["reward"])
def test_reward_equals_trl(name: str) -> None:
    scores = INPUTS["scores"].clone().requires_grad_()
    loss, metrics = BradleyTerry(center_rewards_coefficient=0.01 if name == "centred" else None)(
        scores[0::2], scores[1::2], margin_P=None if name == "plain" else INPUTS["margin"]
    )
    loss.mean.backward()
    check(FIGURES["reward"][name], loss.mean, scores.grad, {n: metric.mean.item() for n, metric in metrics.items()})


@pytest.mark.slow
def test_figures_are_those_of_the_installed_trl() -> None:
    pytest.importorskip("trl")
    path = Path(batches.__file__).parent / "golden" / "preference" / "generate.py"
    specification = importlib.util.spec_from_file_location("generate_preference_figures", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made = module.make()
    for kind in ("dpo", "kto", "reward"):
        assert set(made[kind]) == set(FIGURES[kind])
        for name, figure in made[kind].items():
            assert math.isclose(figure["loss"], FIGURES[kind][name]["loss"], rel_tol=1e-5), (kind, name)
            torch.testing.assert_close(
                torch.tensor(figure["gradient"]), torch.tensor(FIGURES[kind][name]["gradient"]), rtol=1e-5, atol=1e-7
            )
