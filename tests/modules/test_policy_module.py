"""PolicyModule under the real Trainer: one process against gloo ranks with expert parallelism, resuming, options."""

import warnings
from dataclasses import replace

import pytest
import torch

from distributed_harness import run_ranks
from sharded_training import environment, whole


def parts(objective="GRPO", policy=None, data=None, objective_options=None, engine=None):
    """A tiny sparse policy and its data."""
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules.policy_module import PolicyModule
    from lit_interns1.objectives import policy as objectives
    from lit_interns1.rollout.prompt_format import PromptFormat
    from lit_interns1.rollout.rollout_data_module import RolloutDataModule
    from recorded_rollouts import Parity, SeededEngine, Words

    config = LanguageModelConfig(
        vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
    )  # fmt: skip
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "seed": 3, **(policy or {})}
    module = PolicyModule(
        config, objective=getattr(objectives, objective)(**(objective_options or {})),
        engine=engine or SeededEngine(), **options,
    )  # fmt: skip
    sizes = {"prompts_per_rollout": 4, "num_generations": 4, "samples_per_micro_batch": 2, "max_completion_length": 9}
    rewards = Parity(**{k: v for k, v in (data or {}).items() if k in ("right", "wrong", "missing")})
    rest = {k: v for k, v in (data or {}).items() if k not in ("right", "wrong", "missing")}
    return module, RolloutDataModule(Words(), rewards, form=PromptFormat(style="plain"), **{**sizes, **rest})


def trainer(steps, rank=0, strategy=None, world=1, callbacks=(), **options):
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if strategy is not None:
        from lit_interns1.strategies import MoEParallelStrategy

        environment(rank, world)
        options |= {
            "devices": world, "strategy": MoEParallelStrategy(**strategy), "plugins": [TorchElasticEnvironment()],
        }  # fmt: skip
    else:
        options |= {"devices": 1}
    return L.Trainer(
        **{
            "accelerator": "cpu", "max_epochs": -1, "max_steps": steps, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
            "log_every_n_steps": 1, "callbacks": list(callbacks), **options,
        }
    )  # fmt: skip


def train(rank, world, strategy, steps, arguments, save=None, resume=None):
    """What was logged per step, gradients of the first step, and parameters in the end.

    With `save` a checkpoint is written there after the first step; `resume` continues from one.
    """
    import lightning.pytorch as L

    module, data = parts(**arguments)
    if not hasattr(module.engine, "calls"):  # random weights end late: a fifth of all tokens ends a sample
        data.options = replace(data.options, stop_ids=tuple(range(0, 4096, 5)))
    result = {"logged": []}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1 and "gradients" not in result:
                named = pl_module.named_parameters()
                result["gradients"] = {n: whole(p.grad) for n, p in named if p.grad is not None}
            if trainer.global_step > len(result["logged"]):
                result["logged"].append({n: float(v) for n, v in trainer.callback_metrics.items()})
                if save is not None and trainer.global_step == 1:
                    trainer.save_checkpoint(save)

    trainer(steps, rank, strategy, world, [Record()]).fit(module, data, ckpt_path=resume)
    result["calls"] = getattr(module.engine, "calls", None)
    result["lengths"] = [len(scored.sample.response_ids) for scored in data.collected.samples]
    result["parameters"] = {name: whole(p) for name, p in module.named_parameters()}
    return result


def train_all(rank, world, cases):
    return [
        train(rank, world, strategy if world > 1 else None, steps, arguments) for strategy, steps, arguments in cases
    ]


TOKEN_REWARDS = {
    "objective": "OREAL", "policy": {"side_learning_rate": 2.0}, "data": {"updates_per_rollout": 2},
}  # fmt: skip
CASES = [
    # token-level reward head + OREAL: at first every weight of the policy's terms is 0 but that of the KL
    ({"expert_parallel_size": 2}, 3, TOKEN_REWARDS),
    ({"expert_parallel_size": 2}, 2, {
        "objective": "InternS1Pro", "objective_options": {"mismatch_low": 0.01, "mismatch_high": 1e9},
        "data": {"missing": 5, "updates_per_rollout": 2},
    }),
    ({"expert_parallel_size": 2, "activation_checkpointing": True}, 2, {
        "objective": "PPO", "policy": {"critic": "ValueLoss", "replay": "r2"}, "data": {"updates_per_rollout": 2},
    }),
    # generated by the divided network itself: lengths differ, and so do the numbers of forward passes of the ranks
    ({"expert_parallel_size": 2}, 2, {"objective": "RLOO", "engine": "embedded", "data": {"missing": 7}}),
    ({}, 2, {"objective": "GRPO", "policy": {"replay": "none"}, "objective_options": {"beta": 0.1}, "data": {
        "drop_equal": True,
    }}),
]  # fmt: skip


def prepared(case):
    """Options that cannot travel to another process before its imports."""
    from lit_interns1.objectives.policy import ValueLoss
    from lit_interns1.rollout.collector import Selection

    strategy, steps, arguments = case
    if arguments.get("engine") == "embedded":
        from lit_interns1.rollout import EmbeddedEngine

        arguments = {**arguments, "engine": EmbeddedEngine(max_batch_size=5)}
    policy, data = dict(arguments.get("policy", {})), dict(arguments.get("data", {}))
    if policy.get("critic"):
        policy["critic"] = ValueLoss()
    if data.pop("drop_equal", False):
        data["selection"] = Selection(drop_equal_groups=True)
    return strategy, steps, {**arguments, "policy": policy, "data": data}


def train_prepared(rank, world, cases, folder=None):
    results = train_all(rank, world, [prepared(case) for case in cases])
    if folder is not None:  # the first case again, stopped between the two steps on its first rollout batch
        strategy, steps, arguments = prepared(cases[0])
        train(rank, world, strategy, 1, arguments, save=f"{folder}/one.ckpt")
        results.append(train(rank, world, strategy, steps, arguments, resume=f"{folder}/one.ckpt"))
    return results


def test_steps_on_two_ranks_with_expert_parallelism_are_those_of_one_process(tmp_path):
    expected = run_ranks(train_prepared, 1, CASES, timeout=120.0)[0]
    results = run_ranks(train_prepared, 2, CASES, str(tmp_path), timeout=120.0)
    for have in results:
        assert (have[0]["calls"], have[-1]["calls"]) == (2, 1)  # the samples of the first batch are in the checkpoint
        for name, tensor in have[-1]["parameters"].items():
            torch.testing.assert_close(tensor, have[0]["parameters"][name], rtol=1e-6, atol=1e-8, msg=name)
    for number, case in enumerate(CASES):
        want = expected[number]
        if case[2].get("engine") == "embedded":
            lengths = [results[rank][number]["lengths"] for rank in range(2)]
            assert lengths[0] + lengths[1] == want["lengths"]
            assert sum(lengths[0]) != sum(lengths[1])
            assert len(set(want["lengths"])) > 2
        assert any(name.startswith("token_reward_model") for name in want["gradients"]) == (number == 0)
        for rank in range(2):
            have = results[rank][number]
            for mine, theirs in zip(have["logged"], want["logged"], strict=True):
                for name, value in theirs.items():
                    # the balance of a micro-batch is another one where micro-batches are other ones
                    if not name.startswith(("throughput", "train/balance", "train/router_z")):
                        assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6, nan_ok=True), (case, name)
            for kind in ("gradients", "parameters"):
                assert have[kind].keys() == want[kind].keys(), case
                for name, tensor in have[kind].items():
                    error = (tensor - want[kind][name]).norm() / want[kind][name].norm().clamp(min=1e-6)
                    assert error < 2e-5, f"{case}: {kind} of {name}: {error:.1e}"


def test_the_token_reward_model_learns_first_and_then_weighs_the_policy():
    arguments = {**TOKEN_REWARDS, "policy": {"side_learning_rate": 2.0, "replay": "none"}}
    start, _ = parts(**arguments)
    start.configure_model()
    result = train(0, 1, None, 3, arguments)
    first, last = result["logged"][0], result["logged"][-1]
    assert first["policy/loss/token_reward"] == pytest.approx(0.6931, abs=1e-4)  # log 2: a head of zeros
    assert first["policy/loss/behaviour_cloning"] == first["policy/loss/policy_gradient"] == 0.0
    assert last["policy/loss/behaviour_cloning"] != 0.0  # the second rollout is weighed by what the head has learned
    head = result["gradients"]["token_reward_model.value_head.weight"]
    assert head.norm() > 0
    policy = {n: p for n, p in result["gradients"].items() if n.startswith("model.")}
    assert max(float(g.abs().max()) for g in policy.values()) < 1e-6  # the KL to itself is 0, too
    frozen = dict(start.named_parameters())
    assert not any(name.startswith("reference") for name in result["gradients"])
    for name in ("reference.network.norm.weight", "reference.network.embed_tokens.weight"):
        torch.testing.assert_close(result["parameters"][name], frozen[name].detach(), rtol=0, atol=0)


def test_the_policy_stands_still_while_only_the_reward_model_learns():
    arguments = {**TOKEN_REWARDS, "policy": {"policy_freeze_steps": 3, "side_learning_rate": 2.0}}
    start, _ = parts(**arguments)
    start.configure_model()
    result = train(0, 1, None, 4, arguments)
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, result["parameters"][n])}
    assert any(name.startswith("model.") for name in moved)
    result = train(0, 1, None, 3, arguments)
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, result["parameters"][n])}
    assert moved
    assert all(name.startswith("token_reward_model") for name in moved)


def test_training_visits_the_experts_of_the_rollout_and_the_reference_its_own():
    """Replayed ids change the scores of the policy, in the forward pass of log π_old and in the steps, and nowhere
    else."""
    from lit_interns1.objectives.policy import PolicyInputs

    found = {}
    for replay in ("r3", "r2", "none"):
        module, data = parts(policy={"replay": replay}, objective_options={"beta": 0.1})
        fit = trainer(1)
        fit.fit(module, data)
        batches = data.train_dataloader().current.updates[0]
        found[replay] = batches
        assert ("routed_experts" in batches[0].token_fields) == (replay != "none")
    for name in ("ref_logprobs", "input_ids"):
        for a, b in zip(found["r3"], found["none"], strict=True):
            x, y = (v.input_ids if name == "input_ids" else v.token_fields[name] for v in (a, b))
            torch.testing.assert_close(x, y)
    differ = [
        bool((a.token_fields["old_logprobs"] - b.token_fields["old_logprobs"]).abs().max() > 1e-6)
        for a, b in zip(found["r3"], found["none"], strict=True)
    ]
    assert all(differ)
    for a, b in zip(found["r2"], found["none"], strict=True):
        torch.testing.assert_close(a.token_fields["old_logprobs"], b.token_fields["old_logprobs"])
    module, data = parts(policy={"replay": "r3"})
    module.configure_model()
    batch = found["r3"][0]
    output = module(batch, targets=batch.labels, record_routing=True)
    assert torch.equal(output.routing.stacked(), batch.token_fields["routed_experts"])
    assert PolicyInputs.from_fields(batch.token_fields, batch.sample_id_T).weights.keys() == {"policy", "kl"}


def test_a_run_that_is_resumed_inside_a_rollout_batch_takes_the_same_steps(tmp_path):
    """Saved after the first of two steps on a rollout batch: the samples come out of the checkpoint, nothing is
    generated again, and the weights end where those of the uninterrupted run do."""
    import lightning.pytorch as L

    arguments = {
        "objective": "OREAL", "policy": {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)},
        "data": {"updates_per_rollout": 2},
    }  # fmt: skip

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3 and not (tmp_path / "a.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    whole_run, data = parts(**arguments)
    trainer(5, callbacks=[Save()]).fit(whole_run, data)
    calls = whole_run.engine.calls
    assert calls == 3
    again, more = parts(**arguments)
    trainer(5).fit(again, more, ckpt_path=tmp_path / "a.ckpt")
    assert again.engine.calls == 1  # the rollout batch behind the one in the checkpoint
    for (name, mine), theirs in zip(again.named_parameters(), whole_run.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 must be positive"),
        ({"replay": "r4"}, "replay = 'r4' must be none, r2 or r3"),
        ({"replay": "r2", "old_logprobs": "rollout"}, "replay = 'r2' records routing"),
        ({"policy_freeze_steps": -1}, "policy_freeze_steps must not be negative"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        parts(policy=options)


def test_validation_reports_rewards_with_their_standard_error():
    from recorded_rollouts import Words

    module, data = parts(data={"validation_generations": 3, "validation_prompts": Words(6), "right": 1.0, "wrong": 0.0})
    found = trainer(1).validate(module, data, verbose=False)[0]
    groups = [
        [s % 2 == 0 for s in (sum(x.sample.response_ids) for x in g)]
        for batch in data.val_dataloader()
        for g in batch.groups
    ]
    means = torch.tensor([sum(g) / 3 for g in groups], dtype=torch.float64)
    assert found["val/reward"] == pytest.approx(float(means.mean()))
    assert found["val/correct"] == pytest.approx(float(means.mean()))
    assert found["val/reward_standard_error"] == pytest.approx(float(means.std() / 6**0.5))


def test_formats_of_numbers_are_one_switch_for_trainer_and_engine():
    """FP8 experts on both sides, and on one side only: the mismatch tells."""
    from lit_interns1.nn.precision import PrecisionRecipe
    from lit_interns1.rollout import EmbeddedEngine

    found = {}
    for name, trained, rolled in (
        ("native", None, None), ("both", PrecisionRecipe(experts="fp8"), None),
        ("trainer", PrecisionRecipe(experts="fp8"), PrecisionRecipe(experts="native")),
        ("engine", None, PrecisionRecipe(experts="fp8")),
    ):  # fmt: skip
        torch.manual_seed(0)
        engine = EmbeddedEngine(precision=rolled)
        module, data = parts(
            policy={"precision": trained, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}, engine=engine
        )
        module.config = type(module.config)(**{**vars(module.config), "initializer_range": 0.2})
        trainer(1).fit(module, data)
        found[name] = module.rollout_metrics["mismatch/k3"]
        assert {layer.experts.precision for layer in module.model.moe_layers} == {"fp8" if trained else "native"}
    assert found["native"] < 1e-9
    assert found["both"] < found["trainer"] / 10
    assert found["trainer"] > 1e-7
    assert found["engine"] > 1e-7
    with pytest.raises(ValueError, match="precision = 'fp4' must be"):
        parts(policy={"precision": "fp4"})
