"""The strategy under the real Trainer on gloo ranks against one process without it: losses, gradients, weights."""

import warnings

import pytest
import torch
from torch.distributed.tensor import DTensor

from distributed_harness import run_ranks
from sharded_training import batches, environment, sparse_network, whole


def train(rank, world, strategy, optimizer, changes, accumulation, clip):
    """Losses, gradients of the first step as they were applied, and the parameters in the end."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.nn.moe import BalanceLoss

    torch.set_num_threads(1)
    moe = {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 16, **changes.pop("moe", {})}
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(**moe), **changes,
    )  # fmt: skip
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
    }[optimizer]
    module = LanguageModelModule(config, optimizer=make, balance=BalanceLoss("global", coefficient=0.05), seed=3)
    result = {"losses": []}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1 and "gradients" not in result:
                result["gradients"] = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}
            result["losses"].append(float(trainer.callback_metrics.get("train/loss", torch.nan)))

    if strategy is None:
        environment(0, 1)
        options = {"devices": 1}
        clip_of_lightning = module.configure_gradient_clipping

        def measure_and_clip(optimizer, **options):
            result["norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))
            clip_of_lightning(optimizer, **options)

        module.configure_gradient_clipping = measure_and_clip
    else:
        from lit_interns1.strategies import MoEParallelStrategy

        environment(rank, world)
        options = {
            "devices": world,
            "strategy": MoEParallelStrategy(**strategy),
            "plugins": [TorchElasticEnvironment()],
        }
    warnings.filterwarnings("ignore")
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=accumulation,
        gradient_clip_val=clip, callbacks=[Record()], log_every_n_steps=1, **options,
    )  # fmt: skip
    data = batches(rank, world if strategy is not None else 1, accumulation)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    result["parameters"] = {name: whole(p) for name, p in module.named_parameters()}
    result["biases"] = {name: whole(b) for name, b in module.named_buffers() if name.endswith("expert_bias")}
    if strategy is not None and clip is not None:
        result["norm"] = float(trainer.callback_metrics["optim/grad_norm"])
    result["local"] = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())
    return result


def train_all(rank, world, cases):
    return [train(rank, world, *case) for case in cases]


GROUPED = {"router": "grouped", "num_groups": 2, "router_gradient": "ste"}
SGD_CLIPPED = ("sgd", {}, 1, 0.05)
CASES = {
    1: [({}, *SGD_CLIPPED)],
    2: [
        ({}, *SGD_CLIPPED),
        ({"expert_parallel_size": 2}, *SGD_CLIPPED),
        ({"expert_parallel_size": 2}, "adamw", {}, 1, None),
        ({"expert_parallel_size": 2}, "sgd", {}, 2, None),
        ({"expert_parallel_size": 2, "activation_checkpointing": True}, "sgd", {}, 1, None),
        ({"expert_parallel_size": 2}, "sgd", {"moe": {"router": "sigmoid"}, "tie_word_embeddings": True}, 1, None),
        ({"expert_parallel_size": 2}, "sgd", {"moe": GROUPED}, 1, None),
        ({"expert_parallel_size": 2, "compute_dtype": "bfloat16"}, "sgd", {"moe": GROUPED}, 1, 0.05),
    ],
    4: [
        ({}, *SGD_CLIPPED),
        ({"expert_parallel_size": 2}, *SGD_CLIPPED),
        ({"expert_parallel_size": 4}, *SGD_CLIPPED),
        ({"replicate_size": 2, "expert_parallel_size": 2}, *SGD_CLIPPED),
        ({"replicate_size": 2, "expert_parallel_size": 1}, "adamw", {}, 1, None),
        (
            {"replicate_size": 2, "expert_parallel_size": 2, "compute_dtype": "float32"},
            "sgd",
            {"moe": GROUPED},
            1,
            None,
        ),
    ],
}


def reference(strategy):
    """One process without the strategy; with it only where its precision is the thing to be compared."""
    return {"compute_dtype": "bfloat16"} if strategy.get("compute_dtype") == "bfloat16" else None


@pytest.mark.parametrize("world", list(CASES))
def test_every_layout_trains_like_one_process(world):
    cases = CASES[world]
    wanted = run_ranks(train_all, 1, [(reference(sizes), *rest) for sizes, *rest in cases], timeout=120.0)[0]
    results = run_ranks(train_all, world, cases, timeout=120.0)
    for number, (case, expected) in enumerate(zip(cases, wanted, strict=True)):
        is_rounded = case[0].get("compute_dtype") == "bfloat16"
        tolerance = 0.02 if is_rounded else 1e-5
        for rank in range(world):
            ours = results[rank][number]
            assert ours["losses"] == pytest.approx(expected["losses"], rel=tolerance, nan_ok=True), case
            assert "norm" not in ours or ours["norm"] == pytest.approx(expected["norm"], rel=tolerance), case
            for kind in ("gradients", "parameters", "biases"):
                assert ours[kind].keys() == expected[kind].keys(), case
                errors = {name: tensor - expected[kind][name] for name, tensor in ours[kind].items()}
                if is_rounded:  # a small weight's gradient is noise in bf16, all of them together are not
                    together = sum(e.square().sum() for e in errors.values()) ** 0.5
                    assert together <= 0.02 * sum(t.square().sum() for t in expected[kind].values()) ** 0.5, case
                    continue
                for name, error in errors.items():
                    relative = error.norm() / expected[kind][name].norm().clamp(min=1e-8)
                    assert relative < 1e-5, f"{case}: {kind} of {name}: {relative:.1e}"
        total = sum(p.numel() for p in expected["parameters"].values())
        held = sum(results[rank][number]["local"] for rank in range(world))
        assert held >= total
        if case[0].get("replicate_size", 1) == 1:
            assert held == total, "every parameter is held once"


def foreign_module():
    """A LightningModule that knows nothing of the kit's strategy, built whole in `__init__`; its loss is a mean."""
    import lightning.pytorch as L

    class Foreign(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = sparse_network(2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return (self.network(x) - y).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Foreign()


def foreign_batches(rank, world, accumulation):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 16, generator=generator)
    y = x.sum(-1).sin()
    shares = [(x[s].chunk(world * accumulation), y[s].chunk(world * accumulation)) for s in range(3)]
    return [(xs[m * world + rank], ys[m * world + rank]) for xs, ys in shares for m in range(accumulation)]


def train_foreign(rank, world, strategy, accumulation):
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    environment(rank, world)
    module = foreign_module()
    options = {"devices": 1}
    if strategy is not None:
        from lit_interns1.strategies import MoEParallelStrategy

        if rank:  # a module built with other random numbers takes rank 0's
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(1.0)
        options = {
            "devices": world, "strategy": MoEParallelStrategy(**strategy), "plugins": [TorchElasticEnvironment()],
        }  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=accumulation,
        gradient_clip_val=0.02, gradient_clip_algorithm="value", **options,
    )  # fmt: skip
    data = foreign_batches(rank, world if strategy is not None else 1, accumulation)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return {name: whole(p) for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [({"expert_parallel_size": 2, "activation_checkpointing": True}, 1), ({"replicate_size": 2}, 2)],
)
def test_a_module_that_returns_a_mean_keeps_its_meaning(sizes, accumulation):
    expected = run_ranks(train_foreign, 1, None, accumulation)[0]
    for ours in run_ranks(train_foreign, 2, sizes, accumulation):
        assert ours.keys() == expected.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=name)
