"""Preference training: losses and gradients by hand, a reference that stays, the same on any number of ranks."""

import json
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD, AdamW

from distributed_harness import run_ranks
from documented_keys import undocumented
from lit_interns1.data import PackedBatch
from lit_interns1.data.preference_data_module import PreferenceDataModule
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule, PreferenceModule
from lit_interns1.modules.language_model_module import load_language_model
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives.preference import DPO, IPO, KTO, ImplicitRewardSFT
from lit_interns1.reports import RunDirectory
from sharded_training import environment, whole

ROOT = Path(__file__).parents[2]
BETA = 0.3
CONFIG = LanguageModelConfig(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, initializer_range=0.2,
    moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
)  # fmt: skip
WORDS = ["alpha", "beta", "gamma rays", "delta of the river", "epsilon", "zeta function", "eta", "theta and iota"]
ROWS = [
    {"prompt": f"Number {i}? ", "chosen": WORDS[i % 8], "rejected": WORDS[(i + 3) % 8] + "."} for i in range(32)
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return str(file)


def pairs(path, **options):
    return PreferenceDataModule(
        path, path, **{"row_length": 96, "global_batch_size": 4, "micro_batch_size": 2, "validation_rows": 4} | options
    )


def module(**options):
    defaults = {"objective": DPO(beta=BETA), "seed": 3, "optimizer": lambda p: SGD(p, lr=0.5)}
    return PreferenceModule(**({"config": CONFIG} | defaults | options))


def trainer(steps=3, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(max_steps=steps, log_every_n_steps=1, **(defaults | silent | options))


@pytest.fixture(autouse=True)
def quiet():
    warnings.filterwarnings("ignore", message=".*")


def spoiled(network, scale=0.05):
    """The network with other weights, so that policy and reference differ."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(scale * noise)
    return network


def response_logprob(model, prompt, response):
    """Of one response alone, from logits."""
    logits = model(torch.tensor(prompt + response)).logits[len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def test_loss_and_gradient_are_those_of_single_responses(path):
    data = pairs(path)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ours = module(balance=BalanceLoss(coefficient=0.0), sft_coefficient=0.7)
    ours.configure_model()
    spoiled(ours.model)
    loss = ours.training_step(batch, 0)
    (loss.sum / loss.count).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.model.named_parameters()}
    assert all(parameter.grad is None for parameter in ours.reference.parameters())
    ours.model.zero_grad()
    losses = []
    for pair in range(int(batch.token_fields["pair_ids"].max()) + 1):
        ratio, chosen_loss = {}, None
        for side in (True, False):
            mine_T = (batch.token_fields["pair_ids"] == pair) & (batch.token_fields["is_chosen"] == side)
            first = int((batch.labels[mine_T] >= 0).nonzero()[0]) + 1
            ids = batch.input_ids[mine_T].tolist()
            logp = response_logprob(ours.model, ids[:first], ids[first:])
            with torch.no_grad():
                ratio[side] = logp - response_logprob(ours.reference.network, ids[:first], ids[first:])
            ratio[side] = ratio[side] + logp - logp.detach()
            if side:
                chosen_loss = -logp / len(ids[first:])
        losses.append(-torch.nn.functional.logsigmoid(BETA * (ratio[True] - ratio[False])) + 0.7 * chosen_loss)
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss.mean, expected.detach(), rtol=1e-5, atol=1e-6)
    assert float(loss.count) == len(losses)
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_reference_stays_what_the_model_was_and_the_optimizer_does_not_see_it(path):
    ours = module(optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.5))
    initial = LanguageModel.create(CONFIG, seed=3).state_dict()
    run = trainer(4)
    run.fit(ours, pairs(path))
    for name, tensor in ours.reference.network.state_dict().items():
        torch.testing.assert_close(tensor, initial[name], rtol=0, atol=0)
    assert not torch.equal(ours.model.embed_tokens.weight, initial["embed_tokens.weight"])
    seen = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert seen == {id(parameter) for parameter in ours.model.parameters()}
    assert not any(parameter.requires_grad for parameter in ours.reference.parameters())
    assert not any(part.training for part in ours.train().reference.modules())
    assert ours.model.training
    logged = run.callback_metrics
    assert logged["preference/accuracy"] > 0.5
    assert logged["preference/margin"] == pytest.approx(
        float(logged["preference/chosen_rewards"] - logged["preference/rejected_rewards"]), rel=1e-4
    )
    assert {"val/loss", "val/preference/margin", "val/preference/accuracy_standard_error"} <= set(logged)


def test_before_training_policy_and_reference_agree(path):
    ours, run = module(), trainer()
    (result,) = run.validate(ours, pairs(path, validation_rows=None), verbose=False)
    assert result["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert result["val/preference/accuracy"] == 0.5
    assert result["val/preference/margin"] == 0.0
    right = []
    for row in ROWS:  # what the untrained model itself finds more likely
        data = run.datamodule
        prompt = data.tokenizer.encode(row["prompt"])
        sides = [[*data.tokenizer.encode(row[side]), data.tokenizer.end_of_text_id] for side in ("chosen", "rejected")]
        with torch.no_grad():
            better, worse = (response_logprob(ours.model, prompt, response) for response in sides)
        right.append(float(better > worse))
    assert result["val/preference/likelihood_accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_resumed_run_keeps_its_reference_and_ends_like_one_that_was_not_interrupted(path, tmp_path):
    def run(steps, **options):
        ours = module(optimizer=lambda p: AdamW(p, lr=1e-2))
        attempt = trainer(steps)
        attempt.fit(ours, pairs(path), **options)
        return ours, attempt

    straight, _ = run(4)
    _, attempt = run(2)
    file = str(tmp_path / "half.ckpt")
    attempt.save_checkpoint(file)
    resumed, _ = run(4, ckpt_path=file)
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)
    # a run that starts from the weights alone has them as its reference
    fresh = module(config=None, init_weights=file)
    fresh.configure_model()
    saved = torch.load(file, weights_only=True)["state_dict"]
    for network in (fresh.model, fresh.reference.network):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, saved[f"model.{name}"]), name
    # the model of the checkpoint, for generation and export, is the one that was trained
    for name, tensor in load_language_model(file).state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name


def test_checkpoints_of_other_modules_are_refused_as_a_state_and_taken_as_weights(path, tmp_path):
    plain = LanguageModelModule(CONFIG, seed=9)
    before = trainer(1)
    batch = PackedBatch.from_documents([{"input_ids": torch.arange(20)}])
    before.fit(plain, torch.utils.data.DataLoader([batch], batch_size=None))
    file = str(tmp_path / "plain.ckpt")
    before.save_checkpoint(file)
    with pytest.raises(ValueError, match="name it as init_weights"):
        trainer(2).fit(module(), pairs(path), ckpt_path=file)
    ours = module(config=None, init_weights=file)
    ours.configure_model()
    assert ours.config == CONFIG
    torch.testing.assert_close(ours.reference.network.lm_head.weight, plain.model.lm_head.weight, rtol=0, atol=0)
    other = module(init_weights=file, reference_weights=str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match=r"other\.ckpt"):
        other.configure_model()
    other = module(seed=4, reference_weights=file)
    other.configure_model()
    torch.testing.assert_close(other.reference.network.lm_head.weight, plain.model.lm_head.weight, rtol=0, atol=0)
    assert not torch.equal(other.model.lm_head.weight, plain.model.lm_head.weight)


def test_options_that_do_not_fit_together_are_refused(path):
    for options, message in (
        ({"reference": None}, "reference = null, but DPO compares with one"),
        ({"reference": "none"}, "reference = 'none' is unknown"),
        ({"objective": ImplicitRewardSFT("tv")}, "needs none: set reference to null"),
        ({"reference": "precomputed", "offload_reference": True}, "are for reference = 'copy'"),
        ({"sft_coefficient": -1.0}, "sft_coefficient = -1.0 must be"),
        ({"objective": KTO(), "sft_coefficient": 1.0}, "sft_coefficient = 1.0 needs an objective of pairs; KTO"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**options)
    with pytest.raises(
        ValueError, match="reference = 'precomputed' needs log-probabilities of a reference in the data"
    ):
        trainer(1).fit(module(reference="precomputed"), pairs(path))


def test_precomputed_log_probabilities_are_worth_a_copy(path, tmp_path):
    reference = module()
    reference.configure_model()
    data = pairs(path)
    data.prepare_data()
    rows = []
    for row in ROWS:
        prompt = data.tokenizer.encode(row["prompt"])
        ends = {}
        for side in ("chosen", "rejected"):
            ids = [*data.tokenizer.encode(row[side]), data.tokenizer.end_of_text_id]
            with torch.no_grad():
                ends[f"ref_{side}_logps"] = float(response_logprob(reference.model, prompt, ids))
        rows.append(row | ends)
    file = tmp_path / "known.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    results = []
    for kind, source in (("copy", path), ("precomputed", str(file))):
        ours, run = module(reference=kind), trainer(3)
        run.fit(ours, pairs(source))
        results.append((ours, {name: float(value) for name, value in run.callback_metrics.items()}))
        assert hasattr(ours, "reference") == (kind == "copy")
    for name, value in results[0][1].items():
        assert results[1][1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(
        results[1][0].model.lm_head.weight, results[0][0].model.lm_head.weight, rtol=1e-4, atol=1e-5
    )


def test_other_objectives_train_too(path, tmp_path):
    run = trainer(2)
    run.fit(module(objective=IPO(beta=0.2)), pairs(path))
    assert "val/preference/likelihood_accuracy" in run.callback_metrics
    single = tmp_path / "single.jsonl"
    rows = [{"prompt": r["prompt"], "response": r["chosen"], "desirable": i % 2 == 0} for i, r in enumerate(ROWS)]
    single.write_text("\n".join(map(json.dumps, rows)))
    run = trainer(2)
    run.fit(module(objective=KTO(beta=0.2)), pairs(str(single), mismatched=True))
    assert {"preference/kl", "val/preference/accuracy"} <= set(run.callback_metrics)
    assert "val/preference/accuracy_standard_error" not in run.callback_metrics
    ours, run = module(objective=ImplicitRewardSFT("tv"), reference=None), trainer(2)
    run.fit(ours, pairs(path))
    assert not hasattr(ours, "reference")


def test_routers_of_the_reference_are_not_heard(path):
    from lit_interns1.callbacks.router_counter import RouterCounter
    from lit_interns1.callbacks.router_listener import RouterListener

    ours = module()
    ours.configure_model()
    heard = []
    listener, counter = RouterListener(ours, heard.extend), RouterCounter()
    assert [place.name for place in listener.routers] == ["model.moe_layers[0]", "model.moe_layers[1]"]
    counter.listen(ours)
    ours.train()
    data = pairs(path)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ours.training_step(batch, 0)
    assert [event.layer for event in heard] == [0, 1]
    counts_LE = counter.take()
    assert counts_LE.shape == (2, 8)
    assert counts_LE.sum(1).tolist() == [2.0 * batch.num_tokens] * 2


def test_the_config_runs_and_what_it_leaves_generates_and_is_exported(tmp_path, monkeypatch):
    from lit_interns1.checkpoints import load_pretrained_model
    from lit_interns1.cli import main
    from lit_interns1.models import generate

    monkeypatch.setenv("WANDB_MODE", "disabled")
    base, before = LanguageModelModule(CONFIG, seed=9), trainer(1)
    batch = PackedBatch.from_documents([{"input_ids": torch.arange(20)}])
    before.fit(base, torch.utils.data.DataLoader([batch], batch_size=None))
    start, run = tmp_path / "start.ckpt", tmp_path / "run"
    before.save_checkpoint(start)
    main([
        "fit", "--config", str(ROOT / "configs" / "preference" / "molecules.yaml"), f"--run_dir={run}",
        f"--model.init_weights={start}", "--data.sources=bundled:molecule-preferences/test", "--clock.max_tokens=2000",
        "--data.global_batch_size=2", "--data.micro_batch_size=2", "--data.validation_rows=2",
        "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    metrics = RunDirectory(run).metrics()
    assert undocumented(metrics) == []
    assert {f"{part}preference/{name}" for part in ("", "val/") for name in ("accuracy", "sft_loss")} <= set(metrics)
    trained = load_language_model(run / "checkpoints" / "last.ckpt")
    assert not torch.equal(trained.lm_head.weight, base.model.lm_head.weight)
    assert len(generate(trained, [[6]], max_new_tokens=3).token_ids[0]) <= 3
    main(["export", "--ckpt", str(run / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "folder")])
    exported = load_pretrained_model(tmp_path / "folder")
    torch.testing.assert_close(exported.lm_head.weight, trained.lm_head.weight, rtol=0, atol=0)


# -- ranks


def train(rank, world, strategy, path, folder):
    """Weights of both networks and metrics after three steps, and after one more from a checkpoint."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    environment(rank, world)
    data = {"micro_batch_size": 4 // world, "validation_rows": 7}

    def run(steps, **fit):
        options = {}
        if strategy is not None:
            made = DDPStrategy() if strategy == "ddp" else MoEParallelStrategy(expert_parallel_size=world)
            options = {"devices": world, "strategy": made, "plugins": [TorchElasticEnvironment()]}
        ours = module(balance=BalanceLoss(coefficient=0.05))
        attempt = trainer(steps, use_distributed_sampler=False, **options)
        attempt.fit(ours, pairs(path, **data), **fit)
        state = {
            name: whole(value) for name, value in ours.state_dict().items() if "network" in name or "model." in name
        }
        return state, {name: float(value) for name, value in attempt.callback_metrics.items()}, attempt

    state, metrics, attempt = run(3)
    file = f"{folder}/{strategy}.ckpt"
    attempt.save_checkpoint(file)
    resumed, _, _ = run(4, ckpt_path=file)
    return state, metrics, resumed


def train_all(rank, world, strategies, path, folder):
    return [train(rank, world, strategy, path, folder) for strategy in strategies]


def test_two_ranks_train_like_one_process(path, tmp_path):
    ((expected, wanted, further),) = run_ranks(train_all, 1, [None], path, str(tmp_path))[0]
    results = run_ranks(train_all, 2, ["moe", "ddp"], path, str(tmp_path))
    initial = LanguageModel.create(CONFIG, seed=3).state_dict()
    for index in range(2):
        for rank in range(2):
            state, metrics, resumed = results[rank][index]
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
            for name, value in further.items():
                torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-5)
            for name, value in wanted.items():
                # what routers do is logged by pairs, not by tokens
                near = 1e-2 if name in ("train/balance", "train/router_z") else 2e-4
                assert metrics[name] == pytest.approx(value, rel=near, abs=1e-5), name
            for name, value in initial.items():  # also after the resumption
                torch.testing.assert_close(resumed[f"reference.network.{name}"], value, rtol=0, atol=0)
    # the folder that two ranks wrote holds the model for generation, and weights for another run
    sharded = str(tmp_path / "moe.ckpt")
    again = module(config=None, init_weights=sharded)
    again.configure_model()
    for network in (load_language_model(sharded), again.model, again.reference.network):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, expected[f"model.{name}"], rtol=1e-5, atol=1e-5)
