"""How tokens travel in training: which dispatcher a layer gets; skewed, empty and padded ranks under the Trainer."""

import warnings

import pytest
import torch
import torch.distributed as dist

from distributed_harness import run_ranks
from sharded_training import environment, whole

EXPERTS, LENGTH, STEPS = 8, 12, 2


def rows(kind, seed):
    """One row of documents, one of padding only, or no row."""
    from lit_interns1.data import PackedBatch

    if kind == "documents":
        ids = torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(seed))
        return PackedBatch.from_documents([{"input_ids": ids[:5]}, {"input_ids": ids[5:]}], row_length=LENGTH)
    length = LENGTH if kind == "padding" else 0
    ids = torch.zeros(length, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, length][: 1 + (length > 0)], dtype=torch.int32)
    return PackedBatch(
        ids, ids - 100, torch.arange(length), cu_seqlens, ids - 1, num_rows=int(length > 0), num_tokens=0,
        num_loss_tokens=0, max_seqlen=length,
    )  # fmt: skip


def forced_router(ids):
    """A router that takes these experts for every token; weights and gradients stay live."""
    from lit_interns1.nn.moe import TopKRouter

    class Forced(TopKRouter):
        def decide(self, logits_TE, replay_TK):
            replay_TK = torch.tensor(ids).expand(len(logits_TE), -1).contiguous()
            return super().decide(logits_TE, replay_TK)

    return Forced


def train(rank, world, sharded, moe, forced, kinds):
    """Losses, loss of validation, parameters, and how many calls went by static splits and by exact sizes."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.data import PackedBatch
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.nn.moe import ROUTERS, BalanceLoss
    from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
    from lit_interns1.nn.moe.static_split import StaticSplitDispatcher
    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    moe = MoEConfig(num_experts=EXPERTS, experts_per_token=2, intermediate_size=16, **moe)
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, moe=moe
    )
    plain = ROUTERS[moe.router]
    ROUTERS[moe.router] = forced_router(forced) if forced else plain
    calls = {"static": 0, "exact": 0}

    def counted(kind, function):
        def dispatch(*arguments, **options):
            calls[kind] += 1
            return function(*arguments, **options)

        return dispatch

    originals = StaticSplitDispatcher.dispatch, AllToAllDispatcher.dispatch
    StaticSplitDispatcher.dispatch = counted("static", originals[0])
    AllToAllDispatcher.dispatch = counted("exact", originals[1])
    try:
        module = LanguageModelModule(
            config, optimizer=lambda p: torch.optim.SGD(p, lr=0.3), balance=BalanceLoss("global", 0.05), seed=3
        )
        losses = []

        class Record(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                losses.append(float(trainer.callback_metrics["train/loss"]))

        environment(rank, world)
        options = {"devices": 1}
        if sharded:
            strategy = MoEParallelStrategy(expert_parallel_size=world)
            options = {"devices": world, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}
        steps = [[rows(kind, seed=10 * step + r) for r, kind in enumerate(kinds)] for step in range(STEPS)]
        data = [step[rank] if sharded else PackedBatch.concatenate(step) for step in steps]
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
            callbacks=[Record()], log_every_n_steps=1, **options,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        trainer.fit(module, loader, loader)
    finally:
        ROUTERS[moe.router] = plain
        StaticSplitDispatcher.dispatch, AllToAllDispatcher.dispatch = originals
    loss = float(trainer.callback_metrics["val/loss"])
    return losses, loss, {name: whole(p) for name, p in module.named_parameters()}, calls


GROUPED, TOPK = {"router": "grouped", "num_groups": 2, "router_gradient": "ste"}, {"router": "topk"}
FULL = ("documents", "documents")
CASES = {
    "grouped, even": (GROUPED, None, FULL),
    "grouped, one expert of each rank gets all": (GROUPED, [1, 6], FULL),
    "one rank gets all": (TOPK, [1, 0], FULL),
    "a rank of padding, grouped": (GROUPED, None, ("documents", "padding")),
    "a rank of padding": (TOPK, None, ("documents", "padding")),
    "a rank without tokens, grouped": (GROUPED, None, ("documents", "nothing")),
    "a rank without tokens": (TOPK, None, ("nothing", "documents")),
}


def train_all(rank, world, sharded):
    return {name: train(rank, world, sharded, *case) for name, case in CASES.items()}


def test_skewed_and_empty_ranks_train_like_one_process():
    (expected,) = run_ranks(train_all, 1, False, timeout=120.0)
    for results in run_ranks(train_all, 2, True, timeout=120.0):
        for name, (losses, validation, parameters, calls) in results.items():
            wanted_losses, wanted_validation, wanted_parameters, _ = expected[name]
            assert losses == pytest.approx(wanted_losses, rel=1e-5), name
            assert validation == pytest.approx(wanted_validation, rel=1e-5), name
            for key, parameter in parameters.items():
                error = (parameter - wanted_parameters[key]).norm() / wanted_parameters[key].norm().clamp(min=1e-8)
                assert error < 1e-5, f"{name}: {key}: {error:.1e}"
            total = 2 * 2 * STEPS  # layers, training and validation
            grouped, falls_back = "grouped" in name, "without tokens" in name
            static, exact = total * grouped, total * (not grouped or falls_back)
            assert calls == {"static": static, "exact": exact}, name


def choices(rank, world):
    """On the fourth of eight ranks that do not exist."""
    from torch import nn
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lit_interns1.nn.moe import LocalDispatcher, MoEFeedForward, RoutedExperts, SigmoidRouter, TopKRouter
    from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
    from lit_interns1.nn.moe.static_split import StaticSplitDispatcher
    from lit_interns1.nn.parallel_plan import default_plan
    from lit_interns1.strategies import ParallelDims
    from lit_interns1.strategies.parallelize import parallelize

    class Foreign(nn.Module):
        """Has no router of ours."""

        def __init__(self):
            super().__init__()
            self.experts, self.dispatcher = RoutedExperts(16, 16, 8), LocalDispatcher(16)

        def forward(self, x):
            return x

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    meshes = {size: ParallelDims(8, expert_parallel_size=size) for size in (1, 2, 4, 8)}
    meshes = {size: (dims.build_meshes("cpu"), dims) for size, dims in meshes.items()}

    def dispatcher_of(layer, size, name):
        model = nn.Module()
        with torch.device("meta"):
            model.layers = nn.ModuleList([layer()])
        parallelize(model, default_plan(model), *meshes[size], dispatcher=name)
        return type(model.layers[0].dispatcher)

    def ours(groups, router=TopKRouter):
        return lambda: MoEFeedForward(router(16, 16, 8, num_groups=groups), RoutedExperts(16, 16, 8))

    for name in ("auto", "static"):
        assert dispatcher_of(ours(4), 2, name) is StaticSplitDispatcher
        assert dispatcher_of(ours(4), 4, name) is StaticSplitDispatcher
        assert dispatcher_of(ours(4, SigmoidRouter), 4, name) is StaticSplitDispatcher
        assert dispatcher_of(ours(1), 1, name) is LocalDispatcher
    assert dispatcher_of(ours(4), 4, "exact") is AllToAllDispatcher
    for layer, size in ((ours(4), 8), (ours(1), 2), (Foreign, 2)):
        assert dispatcher_of(layer, size, "auto") is AllToAllDispatcher
    with pytest.raises(
        ValueError,
        match=r'dispatcher = "static" needs whole groups per rank: num_groups = 4 of layers\.0 is not divisible by '
        r"expert_parallel_size = 8",
    ):
        dispatcher_of(ours(4), 8, "static")
    for layer in (ours(1), Foreign):
        with pytest.raises(ValueError, match=r"layers\.0 has no grouped router, and expert_parallel_size = 2"):
            dispatcher_of(layer, 2, "static")
    with pytest.raises(ValueError, match="dispatcher = 'fast' is unknown: choose one of auto, exact, static, deepep"):
        dispatcher_of(ours(4), 2, "fast")
    with pytest.raises(ImportError, match='dispatcher = "deepep" needs'):
        dispatcher_of(ours(4), 2, "deepep")


def test_the_layer_decides_between_static_and_exact():
    run_ranks(choices, 1)
