"""`val/loss/{source}`: exact over ragged batches and ranks, and named after the sources that are validated on."""

import warnings

import lightning.pytorch as pl
import pytest
import torch

from distributed_harness import run_ranks
from documented_keys import undocumented
from lit_interns1.data import PackedBatch, TextDataModule, TextSource
from lit_interns1.data.tokenizer import load_tokenizer
from lit_interns1.models import LanguageModel, LanguageModelConfig
from lit_interns1.modules import LanguageModelModule
from sharded_training import environment

CONFIG = LanguageModelConfig(
    vocab_size=4096, hidden_size=32, num_layers=1, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
    moe=None, initializer_range=0.2,
)  # fmt: skip
TEXTS = {  # unequal numbers of documents, of unequal length
    "plays": [f"Enter the {n} of us, and speak of {n} things" for n in ("first", "second", "third", "fourth", "fifth")],
    "sums": [f"{n} + {n} = {2 * n}" for n in range(11)],
    "ends": ["Exeunt all but one, who stays."],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name, texts in TEXTS.items():
        (path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    (path / "trained.txt").write_text("\n".join(f"line {n} of what is trained on" for n in range(400)) + "\n")
    return str(path)


def validated(rank, world, folder, weights, validation=("sums", "plays", "ends")):
    """What a validation logs."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    warnings.filterwarnings("ignore")
    options = {}
    if world > 1:
        environment(rank, world)
        options = {"devices": world, "strategy": DDPStrategy(), "plugins": [TorchElasticEnvironment()]}
    sources = [TextSource(f"{folder}/trained.txt", weight, f"part-{i}", lines=True) for i, weight in enumerate(weights)]
    data = TextDataModule(
        sources, row_length=32, global_batch_size=4, micro_batch_size=2, packing="whole", cache_dir=f"{folder}/cache",
        validation_sources=[TextSource(f"{folder}/{name}.txt", lines=True) for name in validation],
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.validate(LanguageModelModule(CONFIG, seed=5), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def expected():
    """One document at a time, each source by itself, in float64."""
    model, tokenizer = LanguageModel.create(CONFIG, seed=5).eval(), load_tokenizer("bundled:tokenizer")
    sums, counts = {}, {}
    for name, texts in TEXTS.items():
        losses = []
        for text in texts:
            ids = torch.tensor([*tokenizer.encode(text), tokenizer.end_of_text_id])
            batch = PackedBatch.from_documents([{"input_ids": ids}])
            with torch.no_grad():
                output = model(
                    batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens, targets=batch.labels
                )
            losses.append(-output.scores.logp_T.double()[:-1])
        sums[name], counts[name] = float(torch.cat(losses).sum()), len(torch.cat(losses))
    by_source = {f"val/loss/{name}": sums[name] / counts[name] for name in TEXTS}
    return by_source | {"val/loss": sum(sums.values()) / sum(counts.values())}


def test_one_process_and_two_ranks_log_the_loss_of_each_validation_source(folder):
    want = expected()
    assert len({round(value, 2) for value in want.values()}) == 4
    ranks = run_ranks(validated, 2, folder, (1.0,))
    for got in (validated(0, 1, folder, (1.0,)), *ranks):
        assert got == pytest.approx(want, rel=1e-5)
        assert not undocumented(got)


def test_it_depends_neither_on_what_is_trained_on_nor_on_its_weights(folder):
    assert validated(0, 1, folder, (0.7, 0.3, 0.2, 0.1)) == validated(0, 1, folder, (1.0,))


def test_a_single_source_has_no_loss_of_its_own(folder):
    assert validated(0, 1, folder, (1.0, 2.0), ("sums",)).keys() == {"val/loss"}
