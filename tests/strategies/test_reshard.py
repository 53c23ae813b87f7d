"""A checkpoint of any layout continues on any other: next losses, weights, and optimizer state behind them."""

import warnings
from pathlib import Path

import pytest
import torch

from distributed_harness import run_ranks
from sharded_training import STEPS, batches, environment, whole

LAYOUTS = {
    1: {"plain": None, "ep1": {}},
    2: {
        "ep1": {}, "ep2": {"expert_parallel_size": 2, "async_save": True},
        "file": {"save_distributed_checkpoint": False},
    },
    4: {
        "ep1": {}, "ep2": {"expert_parallel_size": 2}, "ep4": {"expert_parallel_size": 4},
        "hsdp": {"replicate_size": 2, "expert_parallel_size": 2},
    },
}  # fmt: skip


def fit(rank, world, strategy, load=None, save=None):
    """Losses of the steps taken, and the weights in the end."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.strategies import MoEParallelStrategy

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    environment(rank, world)
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(8, 2, 16, router="sigmoid"),
    )  # fmt: skip
    module = LanguageModelModule(config, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3), seed=load is None)
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(trainer.callback_metrics["train/loss"]))
            if save is not None and trainer.global_step == STEPS - 1:
                trainer.save_checkpoint(save)

    options = {"devices": world}
    if strategy is not None:
        options |= {"strategy": MoEParallelStrategy(**strategy), "plugins": [TorchElasticEnvironment()]}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[Record()],
        log_every_n_steps=1, **options,
    )  # fmt: skip
    data = batches(rank, world, 1)
    if load is not None:  # a plain DataLoader starts again at its first batch
        data = data[-1:] + data[:-1]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=load, weights_only=load and True)
    return losses, {name: whole(p) for name, p in module.state_dict().items()}


def save_all(rank, world, folder):
    for name, strategy in LAYOUTS[world].items():
        fit(rank, world, strategy, save=f"{folder}/{world}-{name}.ckpt")


def load_all(rank, world, folder):
    results = {}
    for name, strategy in LAYOUTS[world].items():
        for path in sorted(Path(folder).glob("*.ckpt")):
            if strategy is None and path.is_dir():
                continue  # a sharded checkpoint needs the strategy
            results[f"{path.stem} on {world}-{name}"] = fit(rank, world, strategy, load=str(path))
    return results


def uninterrupted(rank, world):
    return fit(rank, world, None)


@pytest.mark.slow
def test_every_layout_continues_every_checkpoint(tmp_path):
    losses, weights = run_ranks(uninterrupted, 1)[0]
    for world in LAYOUTS:
        run_ranks(save_all, world, str(tmp_path), timeout=300.0)
    assert len(list(tmp_path.glob("*.ckpt"))) == 9
    for world in LAYOUTS:
        for case, (next_losses, reached) in run_ranks(load_all, world, str(tmp_path), timeout=600.0)[0].items():
            assert next_losses == pytest.approx(losses[-1:], rel=1e-6), case
            for name, tensor in reached.items():
                error = (tensor - weights[name]).norm() / weights[name].norm().clamp(min=1e-6)
                assert error < 1e-5, f"{case}: {name}: {error:.1e}"
