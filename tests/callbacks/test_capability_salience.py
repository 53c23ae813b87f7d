"""Capability salience in validation: against plain float64 sums, over ranks, orders and batches; what it refuses."""

import warnings
from dataclasses import replace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from distributed_harness import run_ranks
from lit_interns1.callbacks import CapabilitySalienceValidation
from lit_interns1.data import PackedBatch, TextDataModule, TextSource, load_tokenizer
from lit_interns1.data.validation_tokens import data_hash, loss_positions, seen_tokens, tokenizer_hash
from lit_interns1.laws import CapabilitySalience, SalienceFile, ScoreMetrics
from lit_interns1.modules import LanguageModelModule
from lit_interns1.objectives.salience_metric import SalienceMetric
from lit_interns1.training import SummedLoss
from sharded_training import environment

WORDS = ["the", "loss", "of", "a", "(token)", "tells", "what", "naïve", "models", "can", "do;", "not", "[all]", "same"]
SHAPE = {"vocab_size": 4096, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


def text_file(folder):
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(3, 40))) for _ in range(160)]
    file = folder / "lines.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def data_module(folder, **changes):
    options = {
        "row_length": 32, "global_batch_size": 4, "micro_batch_size": 2, "validation_fraction": 0.3, "seed": 3,
        "cache_dir": folder / "cache", **changes,
    }  # fmt: skip
    return TextDataModule([TextSource(str(folder / "lines.txt"), lines=True)], **options)


def validation_batches(folder, **changes):
    data = data_module(folder, **changes)
    data.prepare_data()
    data.setup()
    return list(data.val_dataloader())


def capability(weights):
    metrics = ScoreMetrics(0.9, 0.01, 0.05, 0.9)
    return CapabilitySalience(weights, 3.0, 2.0, 0.1, 0.9, 1.0, np.diag([1e-4, 1e-4]), 0.2, metrics, metrics)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text file, and `weights.safetensors` for its validation tokens: uniform weights and signed ones."""
    folder = tmp_path_factory.mktemp("salience")
    text_file(folder)
    seen = seen_tokens(validation_batches(folder))
    ids = np.sort(seen.token_id_N)
    signed = np.random.default_rng(1).normal(size=ids.size)
    file = SalienceFile(
        tokenizer_hash(load_tokenizer()), data_hash(seen.lanes), ids,
        {"uniform": capability(np.full(ids.size, 1 / ids.size)), "signed": capability(signed / np.abs(signed).sum())},
    )  # fmt: skip
    file.save(folder / "weights.safetensors", dtype="float32")
    return folder


def loader(batches, **options):
    return torch.utils.data.DataLoader(batches, batch_size=None, **options)


class TableLoss(L.LightningModule):
    """A loss in float64 that depends on the token and its place alone, so that no batch or rank can change it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.steps = 0
        generator = torch.Generator().manual_seed(2)
        self.table_V = torch.rand(4096, generator=generator, dtype=torch.float64)

    def losses(self, batch):
        return 3 * self.table_V[batch.input_ids] + 0.01 * batch.position_ids

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return SummedLoss((self.weight * self.losses(batch)).sum().float(), torch.tensor(1.0)).mean

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def table_losses(module, batch):
    return module.losses(batch)


def trainer(*callbacks, **options):
    settings = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
        "enable_progress_bar": False, "enable_model_summary": False, **options,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **settings)


def expected(folder, module, **changes):
    """Weighted losses by hand: one token at a time, in float64."""
    from lit_interns1.laws import load_salience

    file = load_salience(folder / "weights.safetensors")
    loss_of = {}
    for batch in validation_batches(folder, **changes):
        positions = loss_positions(batch)
        for index, token_id in zip(positions.index_N.tolist(), positions.token_id_N.tolist(), strict=True):
            assert token_id not in loss_of
            loss_of[token_id] = float(module.losses(batch)[index])
    losses = [loss_of[token_id] for token_id in file.token_ids_T.tolist()]
    return {
        name: sum(w * loss for w, loss in zip(entry.weights_T.tolist(), losses, strict=True))
        for name, entry in file.capabilities.items()
    } | {"mean": sum(losses) / len(losses)}


def validate(folder, module=None, loaders=None, **changes):
    callback = CapabilitySalienceValidation(folder / "weights.safetensors", token_losses=table_losses)
    where = {"datamodule": data_module(folder, **changes)} if loaders is None else {"dataloaders": loaders}
    if loaders is not None:
        callback = CapabilitySalienceValidation(
            folder / "weights.safetensors", token_losses=table_losses, tokenizer_hash=tokenizer_hash(load_tokenizer())
        )
    run = trainer(callback)
    run.validate(module or TableLoss(), verbose=False, **where)
    return callback, run


def test_weighted_losses_and_scores_are_those_of_plain_sums(folder):
    module = TableLoss()
    callback, run = validate(folder, module)
    by_hand = expected(folder, module)
    for name in ("uniform", "signed"):
        loss = callback.values[f"salience/{name}/loss"]
        assert loss == pytest.approx(by_hand[name], abs=1e-12)
        score = 0.1 + 0.8 / (1 + np.exp(3.0 * (by_hand[name] - 2.0)))
        assert callback.values[f"salience/{name}/predicted_score"] == pytest.approx(score, abs=1e-12)
        assert callback.values[f"salience/{name}/predicted_std"] > 0
        assert float(run.callback_metrics[f"salience/{name}/loss"]) == pytest.approx(loss, rel=1e-6)
    assert by_hand["uniform"] == pytest.approx(by_hand["mean"], abs=1e-9)  # uniform weights: the mean loss
    # bits per byte: what is predicted is all text but the first token of each document; ends of text have no bytes
    data = data_module(folder)
    data.prepare_data()
    data.setup()
    documents = [segment.tokens_N for segment in data.iter_validation_documents()]
    text = [data.tokenizer.decode(tokens, skip_special_tokens=True).encode() for tokens in documents]
    first = [data.tokenizer.decode(tokens[:1], skip_special_tokens=True).encode() for tokens in documents]
    size = sum(map(len, text)) - sum(map(len, first))
    count = sum(len(loss_positions(batch).index_N) for batch in data.val_dataloader())
    assert callback.values["val/bits_per_byte"] == pytest.approx(by_hand["mean"] * count / np.log(2) / size, rel=1e-9)


def test_order_and_batches_change_nothing(folder):
    reference = validate(folder)[0].values
    batches = validation_batches(folder)
    loaders = {
        "micro-batches": validate(folder, micro_batch_size=1, global_batch_size=1)[0].values,
        "shuffled": validate(folder, loaders=loader(batches, shuffle=True))[0],
        "rows": validate(folder, loaders=loader([row for batch in reversed(batches) for row in batch.split(1)]))[0],
    }
    for name, found in loaders.items():
        values = found if isinstance(found, dict) else found.values
        for key in (key for key in reference if key.startswith("salience/")):
            assert values[key] == pytest.approx(reference[key], abs=1e-12), (name, key)


def fails(folder, batches, message, **options):
    module = TableLoss()
    callback = CapabilitySalienceValidation(
        folder / "weights.safetensors", token_losses=table_losses, tokenizer_hash=tokenizer_hash(load_tokenizer())
    )
    run = trainer(callback, limit_train_batches=2, **options)
    with pytest.raises(ValueError, match=message):
        run.fit(module, loader(batches), loader(batches))
    assert module.steps == 0


def test_a_token_that_comes_twice_or_never_is_an_error_before_training(folder):
    batches = validation_batches(folder)
    total = sum(len(loss_positions(batch).index_N) for batch in batches)
    lost = len(loss_positions(batches[-1]).index_N)
    fails(folder, batches[:-1], f"of {total} weighted .*, {lost} were never visited and 0 more than once")
    twice = len(loss_positions(batches[0]).index_N)
    fails(folder, [*batches, batches[0]], f"0 were never visited and {twice} more than once", num_sanity_val_steps=0)


def test_a_token_that_comes_twice_later_is_an_error_at_that_validation(folder):
    class Changing:
        batches, turns = validation_batches(folder), 0

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            self.turns += 1  # the pass that checks the tokens comes first
            return iter(self.batches if self.turns == 1 else [self.batches[0], *self.batches[:-1]])

    with pytest.raises(ValueError, match="never visited and"):
        validate(folder, loaders=Changing())


def test_other_tokens_tokenizers_or_modules_are_refused_before_training(folder, tmp_path):
    path = folder / "weights.safetensors"

    def refuse(message, callback=None, module=None, **changes):
        module = module or TableLoss()
        callback = callback or CapabilitySalienceValidation(path, token_losses=table_losses)
        with pytest.raises(ValueError, match=message):
            trainer(callback, limit_train_batches=2).fit(module, datamodule=data_module(folder, **changes))
        assert module.steps == 0

    refuse("belong to validation data .* this run has", row_length=16)  # the same tokens, cut elsewhere
    refuse("never visited", seed=4)
    own = CapabilitySalienceValidation(path, token_losses=table_losses, tokenizer_hash="0" * 32)
    refuse("belong to tokenizer .* this run has 0000", own)
    refuse(r"TableLoss has no token_scores\(batch\)", CapabilitySalienceValidation(path))
    with pytest.raises(ValueError, match=r"knows no \['chess'\]; it has"):
        CapabilitySalienceValidation(path, capabilities=["chess"])
    callback = CapabilitySalienceValidation(path, token_losses=table_losses)
    with pytest.raises(ValueError, match="give tokenizer_hash"):
        trainer(callback).validate(TableLoss(), loader(validation_batches(folder)), verbose=False)
    batch = validation_batches(folder)[0]
    with pytest.raises(ValueError, match="has no 'validation_token_id'"):
        loss_positions(replace(batch, token_fields={}))


def test_partial_validations_are_left_out_with_a_message(folder):
    callback = CapabilitySalienceValidation(folder / "weights.safetensors", token_losses=table_losses)
    run = trainer(callback, limit_val_batches=1)
    with pytest.warns(UserWarning, match="limit_val_batches=1 hides validation tokens"):
        run.validate(TableLoss(), datamodule=data_module(folder), verbose=False)
    assert not callback.values
    run = trainer(callback, limit_train_batches=2, num_sanity_val_steps=1)
    run.fit(TableLoss(), datamodule=data_module(folder))
    assert set(callback.values) == {
        f"salience/{name}/{key}"
        for name in ("uniform", "signed")
        for key in ("loss", "predicted_score", "predicted_std")
    } | {"val/bits_per_byte"}


def language_model(seed=0):
    from lit_interns1.models import LanguageModelConfig, MoEConfig

    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8)
    return LanguageModelModule(
        LanguageModelConfig(moe=moe, **SHAPE), optimizer=lambda p: torch.optim.SGD(p, lr=0.5), seed=seed
    )


def test_the_validation_pass_of_the_kits_module_is_not_repeated(folder):
    callback, module, calls = CapabilitySalienceValidation(folder / "weights.safetensors"), language_model(), []
    module.configure_model()
    module.model.register_forward_hook(lambda *_: calls.append(1))
    run = trainer(callback)
    run.validate(module, datamodule=data_module(folder), verbose=False)
    assert len(calls) == len(validation_batches(folder))
    assert callback.values["salience/uniform/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-6)


def test_a_resumed_run_predicts_what_the_uninterrupted_one_does(folder, tmp_path):
    def fit(steps, resume=None):
        callback = CapabilitySalienceValidation(folder / "weights.safetensors")
        run = trainer(callback, max_steps=steps, max_epochs=-1, val_check_interval=4, check_val_every_n_epoch=None)
        run.fit(language_model(), datamodule=data_module(folder), ckpt_path=resume)
        return callback.values, run

    whole, _ = fit(4)
    before, run = fit(2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(4, tmp_path / "two.ckpt")
    assert resumed == whole
    assert resumed["salience/signed/loss"] != before["salience/signed/loss"]


def test_transformers_model_in_a_foreign_module(folder):
    transformers = pytest.importorskip("transformers")

    class Foreign(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(
                    vocab_size=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                    head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=16,
                )
            )  # fmt: skip

        def validation_step(self, batch, batch_idx):
            pass

    def losses(module, batch):
        logits = module.network(batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")

    rows = [
        {**batch.as_rows(), "validation_token_id": batch.token_fields["validation_token_id"].view(batch.num_rows, -1)}
        for batch in validation_batches(folder)
    ]
    callback = CapabilitySalienceValidation(
        folder / "weights.safetensors", ["signed"], losses, tokenizer_hash(load_tokenizer())
    )
    module = Foreign().eval()
    trainer(callback).validate(module, loader(rows), verbose=False)
    weight = dict(
        zip(callback.salience.token_ids_T.tolist(), callback.salience.capabilities["signed"].weights_T, strict=True)
    )
    by_hand = 0.0
    with torch.no_grad():
        for batch in rows:
            logp = module.network(batch["input_ids"]).logits.double().log_softmax(-1)
            for where in zip(*torch.nonzero(batch["labels"] >= 0, as_tuple=True), strict=True):
                by_hand -= weight[int(batch["validation_token_id"][where])] * float(logp[where][batch["labels"][where]])
    assert set(callback.values) == {f"salience/signed/{key}" for key in ("loss", "predicted_score", "predicted_std")}
    assert callback.values["salience/signed/loss"] == pytest.approx(by_hand, abs=1e-7)


def on_ranks(rank, world, folder):
    """Values of every kind of run on two ranks."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    environment(rank, world)
    results = {}
    for name, strategy, module in (
        ("table", DDPStrategy(), TableLoss()),
        ("ddp", DDPStrategy(), language_model()),
        ("ep2", MoEParallelStrategy(expert_parallel_size=2), language_model()),
    ):
        callback = CapabilitySalienceValidation(
            folder / "weights.safetensors", token_losses=table_losses if name == "table" else None
        )
        run = trainer(callback, strategy=strategy, devices=world, plugins=[TorchElasticEnvironment()])
        run.validate(module, datamodule=data_module(folder), verbose=False)
        results[name] = callback.values
    callback = CapabilitySalienceValidation(
        folder / "weights.safetensors", token_losses=table_losses, tokenizer_hash=tokenizer_hash(load_tokenizer())
    )
    options = {"use_distributed_sampler": False, "plugins": [TorchElasticEnvironment()]}
    run = trainer(callback, strategy=DDPStrategy(), devices=world, **options)
    try:
        run.validate(TableLoss(), loader(validation_batches(folder)), verbose=False)  # every rank reads all rows
    except ValueError as error:
        results["twice"] = str(error)
    return results


def test_two_ranks_predict_what_one_process_does(folder):
    table = validate(folder)[0].values
    callback = CapabilitySalienceValidation(folder / "weights.safetensors")
    trainer(callback).validate(language_model(), datamodule=data_module(folder), verbose=False)
    first, second = run_ranks(on_ranks, 2, folder)
    assert first == second
    for key, value in table.items():
        assert first["table"][key] == pytest.approx(value, abs=1e-12), key
    for key, value in callback.values.items():  # the model itself computes in float32
        assert first["ddp"][key] == pytest.approx(value, abs=2e-6), key
        assert first["ep2"][key] == pytest.approx(value, abs=2e-6), key
    assert "0 were never visited" in first["twice"]
    assert "(up to 2 times)" in first["twice"]


def test_metric_adds_up_in_float64_and_counts_visits():
    ids = np.array([2, 3, 7, 11])
    weights = np.array([[0.5, -1.0, 2.0, 0.25], [0.25] * 4])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    metric = SalienceMetric(ids, weights)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        metric.reset()
        for index in order:  # token 5 has no weight, but counts for the mean
            metric.update(losses[index, None], torch.tensor([[2, 3, 7, 11, 5][index]]), torch.tensor([3]))
        sums = metric.compute()
        assert sums.capability_losses == (0.5 - 2.0 + 6.0 + 1.0, 2.5)
        assert sums.mean_loss == 22.0
        assert sums.bits_per_byte == pytest.approx(110 / np.log(2) / 15)
    metric.update(losses[:2], torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"of 4 .* 0 were never .* 1 more than once \(up to 3 times\).*token_id 2\b"):
        metric.compute()
    with pytest.raises(ValueError, match="strictly ascending"):
        SalienceMetric(ids[::-1].copy(), weights)


def test_hash_knows_contexts_but_not_order(folder):
    batches = validation_batches(folder)
    reference = data_hash(seen_tokens(batches).lanes)
    rows = [row for batch in batches for row in batch.split(1)]
    assert data_hash(seen_tokens(reversed(rows)).lanes) == reference
    assert data_hash(seen_tokens([PackedBatch.concatenate(rows)]).lanes) == reference
    assert data_hash(seen_tokens(validation_batches(folder, row_length=16)).lanes) != reference
    changed = batches[0].input_ids.clone()
    changed[0] += 1
    assert data_hash(seen_tokens([replace(batches[0], input_ids=changed), *batches[1:]]).lanes) != reference
    # hashes are kept in files: they must not change between versions, and anyone can compute them

    def mix(value, *key):
        for part in (*key, len(key)):
            value = (value + (part + 1) * 0x9E3779B97F4A7C15) % 2**64
            value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
            value ^= value >> 31
        return value

    document = {"input_ids": torch.tensor([5, 6, 7]), "validation_token_id": torch.tensor([40, 41, 42])}
    seen = seen_tokens([PackedBatch.from_documents([document])])
    assert seen.token_id_N.tolist() == [40, 41]  # nothing is predicted behind the last token
    terms = ((40, 0, 5), (41, 1, 6))
    sums = [sum(mix(mix(mix(t, lane) + p) + i) for t, p, i in terms) % 2**64 for lane in range(2)]
    assert data_hash(seen.lanes) == f"{sums[0]:016x}{sums[1]:016x}" == "31c941f48f7cc4b2923dae8f3804c1be"
