"""Optimizers that update in backward over gloo ranks: FSDP2 and expert parallelism against one process."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distributed_harness import run_ranks
from sharded_training import STEPS, batches, environment, whole


def module_of(name, changes, seed=3):
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.nn.moe import BalanceLoss
    from lit_interns1.optim import LOMO, AdaLomo, WarmupStableDecay

    changes = dict(changes)
    moe = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16, **changes.pop("moe", {})}
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(**moe), **changes,
    )  # fmt: skip
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
        "lomo": lambda p: LOMO(p, lr=0.5),
        "adalomo": lambda p: AdaLomo(p, lr=0.02, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[name]
    schedule = WarmupStableDecay(total_tokens=200, warmup_tokens=100, decay_tokens=50)
    balance = BalanceLoss("global", coefficient=0.05)
    return LanguageModelModule(config, optimizer=make, schedule=schedule, balance=balance, seed=seed)


def train(rank, world, strategy, name, changes, save=None, load=None):
    """The parameters in the end, the loss, and the most bytes of gradients that lived at a time."""
    import warnings

    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    module = module_of(name, changes, seed=3 if load is None else 4)
    options = {"devices": 1}
    environment(rank if strategy is not None else 0, world if strategy is not None else 1)
    if strategy is not None:
        options = {
            "devices": world,
            "strategy": MoEParallelStrategy(**strategy),
            "plugins": [TorchElasticEnvironment()],
        }
    result = {"peak": 0}

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            parameters = list(pl_module.parameters())

            def look(_):
                gradients = [p.grad for p in parameters if p.grad is not None]
                local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
                storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in local}
                result["peak"] = max(result["peak"], sum(storages.values()))

            for parameter in parameters:  # goes first, before the optimizer's
                hooks = dict(parameter._post_accumulate_grad_hooks or {})
                parameter.register_post_accumulate_grad_hook(look)
                for key in hooks:
                    parameter._post_accumulate_grad_hooks.move_to_end(key)

        def on_train_batch_end(self, trainer, *_):
            if save is not None and trainer.global_step == STEPS - 1:
                trainer.save_checkpoint(save)

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[Look()],
        log_every_n_steps=1, **options,
    )  # fmt: skip
    data = batches(rank, world if strategy is not None else 1, 1)
    if load is not None:  # a plain DataLoader starts again at its first batch
        data = data[-1:] + data[:-1]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=load)
    result["loss"] = float(trainer.callback_metrics["train/loss"])
    result["parameters"] = {key: whole(p) for key, p in module.named_parameters()}
    if strategy is not None:
        units = [(p.to_local().nbytes, key) for key, p in module.named_parameters()]
        result["bytes"] = sum(size for size, _ in units)
        layers = [sum(s for s, k in units if f".layers.{n}." in k and ".experts." not in k) for n in range(2)]
        experts = [sum(s for s, k in units if f".layers.{n}." in k and ".experts." in k) for n in range(2)]
        result["unit"] = max(*layers, *experts, *(s for s, k in units if ".layers." not in k))
    return result


def refusals(rank, world):
    """Messages for parameters that every rank holds whole, and for DDP."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.optim import LOMO

    environment(rank, world)
    messages = []
    with pytest.raises(ValueError, match="LOMO updates in backward") as error:
        LOMO(nn.Linear(2, 3).parameters())
    messages.append(str(error.value))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp", logger=False, enable_checkpointing=False, max_steps=1,
        enable_progress_bar=False, enable_model_summary=False, plugins=[TorchElasticEnvironment()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="LOMO updates in backward"):
        trainer.fit(module_of("lomo", {}), torch.utils.data.DataLoader(batches(rank, world, 1), batch_size=None))
    return messages


def train_all(rank, world, cases):
    return [refusals(rank, world) if case == "refusals" else train(rank, world, *case) for case in cases]


TIED = {"tie_word_embeddings": True}
CASES = [
    ({"expert_parallel_size": 2}, "lomo", {}),
    ({"expert_parallel_size": 2}, "adalomo", {}),
    ({}, "adalomo", TIED),
    ({"replicate_size": 2}, "adalomo", {}),
    ({"expert_parallel_size": 2, "activation_checkpointing": True}, "adalomo", TIED),
    ({}, "adalomo", {"moe": {"num_experts": 1, "experts_per_token": 1}}),  # experts are divided by rows
]


def assert_equal(ours, expected, case):
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6), case
    for key, tensor in ours["parameters"].items():
        relative = (tensor - expected["parameters"][key]).norm() / expected["parameters"][key].norm()
        assert relative < 1e-6, f"{case}: {key}: {relative:.1e}"


def test_two_ranks_step_as_one_process_and_hold_the_gradients_of_one_unit(tmp_path):
    whole_file, folder = str(tmp_path / "whole.ckpt"), str(tmp_path / "divided.ckpt")
    ep2 = {"expert_parallel_size": 2}
    single = [(None, name, changes) for _, name, changes in CASES] + [(None, "sgd", {})]
    single[1] += (whole_file,)
    wanted = run_ranks(train_all, 1, single, timeout=240.0)[0]
    cases = [*CASES, (ep2, "adamw", {}), ({}, "adalomo", {}, None, folder), (ep2, "adalomo", {}, None, whole_file)]
    cases[1] += (folder,)
    results = run_ranks(train_all, 2, [*cases, "refusals"], timeout=240.0)
    for name, tensor in wanted[0]["parameters"].items():
        assert torch.equal(tensor, wanted[-1]["parameters"][name]), "LOMO is gradient descent"
    for rank in results:
        *ours, adamw, from_folder, from_file, messages = rank
        for case, result, expected in zip(CASES, ours, wanted, strict=False):
            assert_equal(result, expected, case)
            assert 0 < result["peak"] <= result["unit"] * 1.05, case  # FSDP2 pads the parts of a unit
        assert adamw["peak"] >= adamw["bytes"] > 2 * adamw["unit"], "all gradients together"
        assert_equal(from_folder, wanted[1], "a checkpoint of experts on two ranks, read where each has all")
        assert_equal(from_file, wanted[1], "a checkpoint of one process")
        assert "a parameter of shape (3, 2) is held whole by each of 2 ranks" in messages[0]
