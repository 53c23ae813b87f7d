"""Checkpoints that are overwritten, also in the background, are whole at any moment; SIGTERM saves and ends a run."""

import logging
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader

import distributed_harness
from distributed_harness import run_ranks
from lit_interns1.checkpoints import load_sharded
from sharded_training import environment, whole

WIDTH, LAYERS = 128, 4


def counting_module():
    """Every weight is the number of optimizer steps."""
    import lightning.pytorch as L
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

        def forward(self, x):
            return x + self.weight.sum()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Counting(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()
            self.save_hyperparameters({"options": OmegaConf.create({"sizes": [1, 2]})})

        def training_step(self, batch, batch_idx):
            return -self.network(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.0)

    return Counting()


def train(rank, world, folder, asynchronous, steps, signal_rank=None):
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.callbacks import RunCheckpoint
    from lit_interns1.strategies import MoEParallelStrategy

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment(rank, world)
    module = counting_module()
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.global_step)
            Path(folder, f"step-{rank}").write_text(str(trainer.global_step))
            if signal_rank == rank and trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_validation_start(self, trainer, pl_module):
            raise AssertionError("a run that is asked to end does not validate")

    module.validation_step = lambda batch, batch_idx: None
    every = 1 if signal_rank is None else 1000
    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_steps=steps, min_steps=steps, logger=False,
        callbacks=[Watch(), RunCheckpoint(f"{folder}/checkpoints", every_n_train_steps=every)],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        strategy=MoEParallelStrategy(async_save=asynchronous), plugins=[TorchElasticEnvironment()],
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.zeros(100_000, 1), batch_size=None)
    last = Path(folder, "checkpoints", "last.ckpt")
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(module, data, data, ckpt_path=str(last) if last.exists() else None)
    assert signal.getsignal(signal.SIGTERM) == before
    return seen, {name: sorted(set(whole(p).flatten().tolist())) for name, p in module.named_parameters()}


def opened(last):
    """The step of a checkpoint whose every weight belongs to it."""
    names = [
        name for name in FileSystemReader(last).read_metadata().state_dict_metadata if name.startswith("state_dict.")
    ]
    assert len(names) == LAYERS
    state = {name: torch.full((WIDTH, WIDTH), -1.0) for name in names}
    load_sharded(state, last)
    metadata = torch.load(last / "meta.pt", weights_only=True)
    assert metadata["hyper_parameters"] == {"options": {"sizes": [1, 2]}}
    for name, tensor in state.items():
        assert tensor.unique().tolist() == [metadata["global_step"]], name
    return metadata["global_step"]


def start(folder, asynchronous, world=2):
    """Ranks that train and save until somebody kills them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(distributed_harness._PRELOADED)
    store = str(folder / f"store-{time.monotonic()}")
    ranks = [
        context.Process(target=run_forever, args=(rank, world, store, str(folder), asynchronous), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_forever(rank, world, store, folder, asynchronous):
    os.environ.update(distributed_harness._ENVIRONMENT)
    os.setpgrp()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    train(rank, world, folder, asynchronous, 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_random_moments_the_last_checkpoint_is_whole(tmp_path, asynchronous):
    dice = random.Random(int(asynchronous))
    last = tmp_path / "checkpoints" / "last.ckpt"
    reached = 0
    for attempt in range(20 if asynchronous else 10):
        ranks = start(tmp_path, asynchronous)
        try:
            deadline = time.monotonic() + 60
            progress = tmp_path / "step-0"
            while not progress.exists() or int(progress.read_text() or 0) < reached + 3:
                assert time.monotonic() < deadline
                assert all(process.is_alive() for process in ranks), "a rank has ended by itself"
                time.sleep(0.01)
            time.sleep(dice.uniform(0.0, 0.3))
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        step = opened(last)
        assert step >= reached + 1, attempt  # it went on from the last one, and has saved since
        reached = step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_on_one_rank_saves_on_all_and_ends_the_run(tmp_path, asynchronous):
    results = run_ranks(train, 2, str(tmp_path), asynchronous, 50, 1)
    assert [seen for seen, _ in results] == [[1, 2, 3]] * 2
    assert opened(tmp_path / "checkpoints" / "last.ckpt") == 3
    assert all(values == [3.0] for _, weights in results for values in weights.values())
    again = run_ranks(train, 2, str(tmp_path), asynchronous, 6)
    assert [seen for seen, _ in again] == [[4, 5, 6]] * 2
    assert opened(tmp_path / "checkpoints" / "last.ckpt") == 6
