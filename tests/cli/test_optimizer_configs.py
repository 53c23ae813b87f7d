"""Optimizers chosen by `class_path`: the overlays of configs/optimizers, under Lightning and over ranks."""

import importlib
import inspect
import re
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml

from distributed_harness import run_ranks
from sharded_training import STEPS, batches, environment, whole

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.stem for path in (ROOT / "configs/optimizers").glob("*.yaml"))
COMPILED = [name for name in OVERLAYS if name.startswith("adamw-")]  # torchao compiles its steps: minutes on a CPU


def options_of(name):
    overlay = yaml.safe_load((ROOT / f"configs/optimizers/{name}.yaml").read_text())
    return overlay["model"]["init_args"]["optimizer"]


def kind_of(name):
    """The class of an overlay; skips without its package."""
    module, _, kind = options_of(name)["class_path"].rpartition(".")
    pytest.importorskip(module.partition(".")[0], reason="the extra `optimizers` is not installed")
    return getattr(importlib.import_module(module), kind)


def make(name):
    """The optimizer of an overlay, as a function of parameter groups."""
    kind, options = kind_of(name), options_of(name)["init_args"]
    return lambda groups: kind(groups, **options)


def small(optimizer):
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.optim import WarmupStableDecay

    config = LanguageModelConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=32),
    )  # fmt: skip
    return LanguageModelModule(config, optimizer=optimizer, schedule=WarmupStableDecay(200, 100, 50), seed=3)


def fit(module, rank=0, world=1, strategy=None, save=None, load=None, repeats=1):
    """The rates and losses of all steps, and the weights in the end."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    warnings.filterwarnings("ignore")
    seen = {"rates": [], "losses": []}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen["rates"].append(float(trainer.optimizers[0].param_groups[0]["lr"]))
            seen["losses"].append(float(trainer.callback_metrics["train/loss"]))
            if save is not None and trainer.global_step == STEPS - 1:
                trainer.save_checkpoint(save)

    options = {} if strategy is None else {"strategy": strategy, "plugins": [TorchElasticEnvironment()]}
    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[Record()],
        log_every_n_steps=1, **options,
    )  # fmt: skip
    data = batches(rank, world, 1) * repeats
    if load is not None:  # a plain DataLoader starts again at its first batch
        data = data[-1:] + data[:-1]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=load)
    return {**seen, "weights": {name: whole(p) for name, p in module.named_parameters()}}


def assert_equal(ours, expected, tolerance):
    for name, tensor in ours["weights"].items():
        error = (tensor - expected["weights"][name]).norm() / expected["weights"][name].norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_names_the_options_that_the_config_below_would_leave_in(name):
    """Where two classes have an option of the same name, its value stays when the class changes."""
    options = options_of(name)
    parameters = inspect.signature(kind_of(name)).parameters
    below = yaml.safe_load((ROOT / "configs/pretrain/tiny.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert {option for option in below["init_args"] if option in parameters} <= options["init_args"].keys()
    assert options["init_args"].keys() <= parameters.keys()


def test_an_overlay_on_a_config_is_what_the_command_line_makes(capsys):
    from lit_interns1.cli import main

    configs = [f"--config={ROOT}/configs/{name}.yaml" for name in ("pretrain/tiny", "optimizers/adalomo")]
    with pytest.raises(SystemExit):
        main(["fit", *configs, "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    optimizer = resolved["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "lit_interns1.optim.AdaLomo"
    assert options_of("adalomo")["init_args"].items() <= optimizer["init_args"].items()
    assert not {"fused", "betas"} & optimizer["init_args"].keys()
    assert resolved["trainer"]["gradient_clip_val"] is None


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in COMPILED else []) for n in OVERLAYS])
def test_every_overlay_trains_with_rates_of_the_schedule_and_resumes(name, tmp_path):
    optimizer = make(name)
    rate = options_of(name)["init_args"]["lr"]
    run = fit(small(optimizer), save=tmp_path / "two.ckpt", repeats=1)
    assert run["rates"][0] == pytest.approx(rate * 0.66, rel=1e-5)  # 66 of 100 tokens of warm-up
    if name not in COMPILED:  # Lightning cannot read their moments from a checkpoint of one file
        resumed = fit(small(optimizer), load=tmp_path / "two.ckpt")
        assert resumed["losses"] == pytest.approx(run["losses"][-1:], rel=1e-6)
        assert_equal(resumed, run, 1e-6)
    assert fit(small(optimizer), repeats=5)["losses"][-1] < run["losses"][0]


def over_ranks(rank, world, names, folder):
    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    results = {}
    for name in names:
        path = f"{folder}/{name}"
        strategy = [MoEParallelStrategy(expert_parallel_size=2) for _ in range(2)]
        results[name] = fit(small(make(name)), rank, world, strategy[0], save=path)
        results[name + " resumed"] = fit(small(make(name)), rank, world, strategy[1], load=path)
    return results


def check_ranks(names, folder, tolerance):
    results = run_ranks(over_ranks, 2, names, str(folder), timeout=600.0)[0]
    for name in names:
        assert_equal(results[name], fit(small(make(name))), tolerance)
        assert_equal(results[name + " resumed"], results[name], 1e-6)


@pytest.mark.slow
def test_two_ranks_that_share_experts_step_as_one_process(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    check_ranks(["lion", "adan"], tmp_path, 1e-4)  # signs of sums near zero may flip


def low_bit_over_ranks(rank, world):
    from lit_interns1.strategies import MoEParallelStrategy

    class AdamW8bit(torch.optim.SGD):
        pass

    environment(rank, world)
    with pytest.raises(ValueError, match="optimizer AdamW8bit is for one device: over 2 ranks"):
        fit(small(lambda groups: AdamW8bit(groups, lr=0.1)), rank, world, MoEParallelStrategy())


def test_low_bit_moments_are_for_one_device():
    run_ranks(low_bit_over_ranks, 2)


@pytest.mark.parametrize("kind", ["SophiaH", "CPUOffloadOptimizer"])
def test_optimizers_that_would_train_wrongly_are_refused(kind):
    class Stand(torch.optim.SGD):
        pass

    Stand.__name__ = kind
    module = small(lambda groups: Stand(groups, lr=0.1))
    with pytest.raises(ValueError, match=f"optimizer {kind} "):
        fit(module)

    class WithSecondDerivatives(type(module)):
        def backward(self, loss, *args, **kwargs):
            loss.backward()

    module = small(lambda groups: Stand(groups, lr=0.1))
    module.__class__ = WithSecondDerivatives
    assert len(fit(module)["losses"]) == STEPS


# -- LoRA, as the page shows it ----------------------------------------------------------------------------------------


def lora():
    """A module of the page's class, and its `merge`."""
    from lit_interns1.models import LanguageModelConfig, MoEConfig

    page = (ROOT / "docs/optimizers-other.md").read_text()
    (code,) = re.findall(r"^```python\n(?:(?!```).)*?inject_adapter.*?^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code.removeprefix("```python\n").removesuffix("```"), names)
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=32),
    )  # fmt: skip
    module = names["LoRALanguageModel"](config, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), seed=3)
    return module, names["merge"]


def lora_over_ranks(rank, world):
    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    return fit(lora()[0], rank, world, MoEParallelStrategy(expert_parallel_size=2))


@pytest.mark.slow
def test_lora_trains_its_adapters_alone_over_ranks_too_and_merges():
    pytest.importorskip("peft", reason="the extra `optimizers` is not installed")
    module, merge = lora()
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = fit(module)
    learned = {name for name, tensor in run["weights"].items() if not torch.equal(tensor, before[name])}
    assert learned == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert len(learned) == 4
    assert_equal(run_ranks(lora_over_ranks, 2, timeout=200.0)[0], run, 1e-6)
    batch = batches(0, 1, 1)[0]
    with torch.no_grad():
        scores = module.token_scores(batch).logp_T
        merge(module.model)
        torch.testing.assert_close(module.token_scores(batch).logp_T, scores, rtol=0, atol=1e-5)
    plain = small(lambda p: torch.optim.AdamW(p))
    plain.configure_model()
    assert [n for n, _ in module.model.named_parameters()] == [n for n, _ in plain.model.named_parameters()]
