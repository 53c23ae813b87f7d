"""Ranks with different numbers of batches under the real Trainer: the same steps on all, and what one process gets."""

import itertools
import re
import tempfile
import warnings
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from distributed_harness import run_ranks
from sharded_training import STEPS, batches, environment, sparse_network, whole

ROWS = 4


class Stream(IterableDataset):
    """Batches without a length; an exception among them is raised."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch


class Listed(torch.utils.data.Dataset):
    """Batches with a length; an exception among them is raised."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        if isinstance(self.batches[index], Exception):
            raise self.batches[index]
        return self.batches[index]


class Positioned:
    """Has a length and a position that is saved; the first iteration after loading continues there."""

    def __init__(self, batches):
        self.batches, self.position, self.start = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position, self.start = self.start, 0
        for batch in self.batches[self.position :]:
            self.position += 1
            yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"]


def loader(kind, batches):
    if kind == "positioned":
        return Positioned(batches)
    return DataLoader((Listed if kind == "sized" else Stream)(batches), batch_size=None)


def batch(rank, number):
    generator = torch.Generator().manual_seed(1000 * rank + number)
    x = torch.randn(ROWS, 16, generator=generator)
    return {"x": x, "y": x.sum(-1).sin(), "id": torch.tensor([rank, number])}


def together(batches):
    """What one process sees in place of the ranks' batches of one step."""
    return {"x": torch.cat([b["x"] for b in batches]), "y": torch.cat([b["y"] for b in batches])}


def module():
    import lightning.pytorch as L

    class Foreign(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = sparse_network(1)
            self.trained, self.evaluated, self.outputs = [], [], []

        def training_step(self, batch, batch_idx):
            parts = list(batch.values()) if "x" not in batch else [batch]
            if "id" in parts[0]:
                self.trained.append([part["id"].tolist() for part in parts])
            return sum((self.network(part["x"]) - part["y"]).square().mean() for part in parts)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.evaluated.append([dataloader_idx, *batch["id"].tolist()])
            self.outputs.append(self.network(batch["x"]))

        test_step = validation_step

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self.network(batch["x"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Foreign()


def make_trainer(rank, world, **options):
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    if world > 1:
        torch.set_num_threads(1)
        environment(rank, world)
        from lit_interns1.strategies import MoEParallelStrategy

        options |= {"strategy": MoEParallelStrategy(expert_parallel_size=2), "plugins": [TorchElasticEnvironment()]}
    defaults = {"max_epochs": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        accelerator="cpu", devices=world, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **(defaults | options),
    )  # fmt: skip


def parameters(model):
    return {name: whole(p) for name, p in model.named_parameters()}


# -- training ----------------------------------------------------------------------------------------------------------

# kinds of the ranks' loaders, their numbers of batches, options of the Trainer
TRAINING = {
    "sized": (["sized", "sized"], [4, 3], {"max_epochs": 2}),
    "unsized": (["unsized", "unsized"], [2, 4], {"max_epochs": 2}),
    "mixed": (["sized", "unsized"], [4, 3], {}),
    "mixed, sized is shorter": (["sized", "unsized"], [2, 3], {"max_epochs": 2}),
    "a tail shorter than the window": (["sized", "sized"], [3, 5], {"accumulate_grad_batches": 2, "max_epochs": 2}),
    "an unsized tail": (["unsized", "unsized"], [5, 3], {"accumulate_grad_batches": 2}),
    "a fraction of the agreed length": (["sized", "sized"], [4, 6], {"limit_train_batches": 0.5}),
    "reloaded": (["sized", "sized"], [3, 2], {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}),
}


def train_all(rank, world):
    results = {}
    for name, (kinds, counts, options) in TRAINING.items():
        steps = min(counts)
        batches = [[batch(r, number) for number in range(count)] for r, count in enumerate(counts)]
        if world == 1:
            data = loader(kinds[0], [together(of_step) for of_step in zip(*(b[:steps] for b in batches), strict=True)])
        else:
            data = loader(kinds[rank], batches[rank])
        model, trainer = module(), make_trainer(rank, world, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, data)
        told = [str(w.message) for w in caught if "different numbers of batches" in str(w.message)]
        results[name] = (parameters(model), [ids[0] for ids in model.trained], trainer.global_step, told)
    return results


def test_training_stops_at_the_shortest_rank_and_equals_one_process(two_ranks):
    expected, results = train_all(0, 1), [result["training"] for result in two_ranks]
    for name, (_, counts, options) in TRAINING.items():
        steps = int(min(counts) * options.get("limit_train_batches", 1))
        for rank, result in enumerate(results):
            weights, seen, global_step, told = result[name]
            assert seen == [[rank, n] for n in range(steps)] * options.get("max_epochs", 1), name
            assert global_step == expected[name][2], name
            assert len(told) == (options.get("reload_dataloaders_every_n_epochs", 0) + 1) * (rank == 0), (name, told)
            for parameter, value in weights.items():
                torch.testing.assert_close(value, expected[name][0][parameter], rtol=1e-5, atol=1e-6, msg=name)


def several_loaders(rank, world):
    """Loaders side by side, of which one is shorter on one rank and is cycled through."""
    from lightning.pytorch.utilities import CombinedLoader

    counts = {"a": [2, 3], "b": [5, 4]}
    loaders = {
        name: loader("sized", [batch(10 * i + rank, n) for n in range(counts[name][rank])])
        for i, name in enumerate(counts)
    }
    model, trainer = module(), make_trainer(rank, world, max_epochs=2)
    trainer.fit(model, loaders)
    combined = CombinedLoader(loaders, "min_size")
    for _ in range(2):  # Lightning puts the wrapped loaders into the user's own object
        again, trainer = module(), make_trainer(rank, world)
        trainer.fit(again, combined)
    return model.trained, again.trained


def use_again(rank, world):
    """The same object for training and for evaluation; attributes; loaders that are equal anyway."""
    from lightning.pytorch.trainer.states import RunningStage
    from lightning.pytorch.utilities import CombinedLoader

    from lit_interns1.strategies.equal_steps import equal_steps

    plain = loader("sized", [batch(rank, n) for n in range(2 + rank)])
    combined = CombinedLoader(plain, "min_size")
    model = module()
    make_trainer(rank, world).fit(model, combined)
    make_trainer(rank, world).validate(model, combined, verbose=False)
    wrapped = combined.flattened[0]
    wrapped.worker_init_fn = print
    assert plain.worker_init_fn is print
    assert wrapped.dataset is plain.dataset
    assert not hasattr(wrapped, "state_dict")
    assert len(wrapped) == 3
    plain.equal_on_all_ranks = rank == 0
    assert equal_steps(plain, RunningStage.TRAINING) is not plain
    plain.equal_on_all_ranks = True
    assert equal_steps(plain, RunningStage.TRAINING) is plain
    return model.evaluated


# -- four ranks, resuming ----------------------------------------------------------------------------------------------


def resume(rank, world, folder):
    import lightning.pytorch as L

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (2, 3):
                trainer.save_checkpoint(Path(folder) / f"{trainer.global_step}.ckpt")

    counts = [3, 5, 4, 3]
    batches = [batch(rank, number) for number in range(counts[rank])]
    model, trainer = module(), make_trainer(rank, world, max_epochs=2, callbacks=[Save()])
    trainer.fit(model, loader("positioned", batches))
    results = [(parameters(model), model.trained)]
    for step in (2, 3):  # in the middle of an epoch, and at its end, where other ranks have a tail
        model, trainer = module(), make_trainer(rank, world, max_epochs=2)
        trainer.fit(model, loader("positioned", batches), ckpt_path=Path(folder) / f"{step}.ckpt")
        results.append((parameters(model), model.trained))
    return results


def test_four_ranks_resume_a_loader_with_a_state():
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(resume, 4, folder)
    for rank, ((straight, seen), *others) in enumerate(results):
        assert seen == [[[rank, number]] for number in range(3)] * 2
        for step, (resumed, rest) in zip((2, 3), others, strict=True):
            assert rest == seen[step:] * (step == 2)  # as one process: the loaded position ends the second epoch
            for name, value in straight.items():
                assert torch.equal(resumed[name], value) == (step == 2)


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(rank, world):
    counts = [[1, 3], [2, 1]]  # by loader and rank
    batches = [[batch(10 * i + rank, n) for n in range(of_rank[rank])] for i, of_rank in enumerate(counts)]
    loaders = [loader("sized", batches[0]), loader("unsized", batches[1])]
    model, trainer = module(), make_trainer(rank, world, max_epochs=2, num_sanity_val_steps=2)
    outputs = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader("sized", [batch(rank, 0)]), loaders)
    told = [str(w.message) for w in caught if "different numbers of batches" in str(w.message)]
    outputs["fit"] = model.evaluated
    for name in ("validate", "test"):
        model.evaluated, model.outputs = [], []
        getattr(make_trainer(rank, world), name)(model, loaders, verbose=False)
        outputs[name] = model.evaluated
    predicted = make_trainer(rank, world).predict(model, loaders)
    return outputs, told, [o.clone() for o in model.outputs], predicted, parameters(model)


def test_evaluation_goes_on_to_the_longest_rank(two_ranks):
    for rank, result in enumerate(two_ranks):
        seen, told, outputs, predicted, weights = result["evaluation"]
        first = [[0, rank, n] for n in ([0, 0, 0], [0, 1, 2])[rank]]
        second = [[1, 10 + rank, n] for n in ([0, 1], [0, 0])[rank]]
        assert seen["validate"] == seen["test"] == first + second
        assert seen["fit"] == first[:2] + second + 2 * (first + second)  # two sanity steps a loader, two epochs
        assert len(told) == 2 * (rank == 0), told
        model = module()
        model.load_state_dict(weights)
        with torch.no_grad():
            alone = [model.network(batch(*ids)["x"]) for _, *ids in first + second]
        for expected, ours, again in zip(alone, outputs, itertools.chain(*predicted), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


def predict_samples(rank, world):
    """Lightning deals five samples out to two ranks, and a writer looks up which a batch holds."""
    from lightning.pytorch.callbacks import BasePredictionWriter

    class Write(BasePredictionWriter):
        def write_on_batch_end(self, trainer, module, prediction, batch_indices, *_):
            written.append(batch_indices)

    written = []
    trainer = make_trainer(rank, world, use_distributed_sampler=True, callbacks=[Write("batch")])
    trainer.predict(module(), DataLoader(Listed([batch(0, n) for n in range(5)]), collate_fn=itemgetter(0)))
    return written


# -- ranks that cannot go on -------------------------------------------------------------------------------------------

BROKEN = OSError("disk is gone")
# what is called, kinds of the ranks' loaders, their batches (numbers, or what is raised), the error on every rank
STOPPED = [
    ("fit", ["sized", "sized"], [2, 0], r"ValueError: train_dataloader: ranks \[1\] have no batch"),
    ("fit", ["unsized", "sized"], [0, 2], r"ValueError: train_dataloader: ranks \[0\] have no batch"),
    ("validate", ["sized", "sized"], [0, 2], r"ValueError: val_dataloader: ranks \[0\] have no batch"),
    ("test", ["unsized", "unsized"], [1, 0], r"ValueError: test_dataloader: ranks \[1\] have no batch"),
    ("fit", ["sized", "sized"], [3, [0, BROKEN, 1]], "RuntimeError: train_dataloader failed on rank 1: OSError: disk"),
    ("fit", ["unsized", "unsized"], [[BROKEN], 3], "RuntimeError: train_dataloader failed on rank 0: OSError: disk"),
    ("predict", ["unsized", "sized"], [3, [0, BROKEN]], "RuntimeError: predict_dataloader failed on rank 1: OSError"),
]


def stop(rank, world):
    messages = []
    for function, kinds, contents, _ in STOPPED:
        numbers = contents[rank] if isinstance(contents[rank], list) else range(contents[rank])
        batches = [n if isinstance(n, Exception) else batch(rank, n) for n in numbers]
        with pytest.raises((RuntimeError, ValueError)) as caught:
            getattr(make_trainer(rank, world), function)(module(), loader(kinds[rank], batches))
        messages.append(f"{caught.type.__name__}: {caught.value}")
    trainer = make_trainer(rank, world, val_check_interval="00:00:01:00", check_val_every_n_epoch=None)
    with pytest.raises(ValueError, match="as a time is not possible on several ranks"):
        trainer.fit(module(), loader("sized", [batch(rank, 0)]), loader("sized", [batch(rank, 0)]))
    return messages


def test_every_rank_stops_with_the_error_of_one(two_ranks):
    for result in two_ranks:
        for message, (*case, expected) in zip(result["stopped"], STOPPED, strict=True):
            assert re.match(expected, message), (case, message)


# -- ranks without a token ---------------------------------------------------------------------------------------------


def padding(tokens):
    from lit_interns1.data import PackedBatch

    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64), labels=torch.full((tokens,), -100),
        position_ids=torch.arange(tokens), cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        sample_id_T=torch.full((tokens,), -1), num_rows=1, num_tokens=0, num_loss_tokens=0, max_seqlen=tokens,
    )  # fmt: skip


def train_without_tokens(rank, world):
    """Rank 0 has the rows of one process, the other only padding."""
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.nn.moe import BalanceLoss

    results = []
    for tokens in (24, 0):
        config = LanguageModelConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
            moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
        )  # fmt: skip
        model = LanguageModelModule(config, optimizer=SGD, balance=BalanceLoss("global", coefficient=0.05), seed=3)
        rows = [padding(tokens)] * STEPS if rank else batches(0, 1, 1)
        data = DataLoader(rows, batch_size=None)
        trainer = make_trainer(rank, world)
        trainer.fit(model, data, data)
        results.append((parameters(model), float(trainer.callback_metrics["val/loss"])))
    return results


def SGD(groups):
    return torch.optim.SGD(groups, lr=0.5)


def test_a_rank_without_tokens_changes_nothing(two_ranks):
    for result in two_ranks:
        for (expected, loss), (ours, our_loss) in zip(train_without_tokens(0, 1), result["padding"], strict=True):
            assert our_loss == pytest.approx(loss, rel=1e-5)
            for name, value in expected.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


# ----------------------------------------------------------------------------------------------------------------------


def on_two_ranks(rank, world):
    return {
        "training": train_all(rank, world),
        "side by side": several_loaders(rank, world),
        "again": use_again(rank, world),
        "evaluation": evaluate(rank, world),
        "writer": predict_samples(rank, world),
        "stopped": stop(rank, world),
        "padding": train_without_tokens(rank, world),
    }


@pytest.fixture(scope="module")
def two_ranks():
    """What each rank returned: one process group for all tests of two ranks."""
    return run_ranks(on_two_ranks, 2)


def test_loaders_side_by_side(two_ranks):
    for rank, result in enumerate(two_ranks):
        trained, again = result["side by side"]
        assert trained == [[[rank, n % 2], [10 + rank, n]] for n in range(4)] * 2  # 2 and 4 batches on every rank
        assert again == [[[rank, n], [10 + rank, n]] for n in range(2)]


def test_a_loader_that_was_trained_with_is_evaluated_to_its_end(two_ranks):
    assert [result["again"] for result in two_ranks] == [
        [[0, rank, n] for n in numbers] for rank, numbers in enumerate(([0, 1, 1], [0, 1, 2]))
    ]


def test_prediction_writers_get_the_indices_of_repeated_batches(two_ranks):
    assert [result["writer"] for result in two_ranks] == [[[0], [2], [4]], [[1], [3], [3]]]
