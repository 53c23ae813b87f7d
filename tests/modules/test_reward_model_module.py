"""`RewardModelModule`: losses on the right values, learning, ranks, checkpoints, and what it starts from."""

import json
import math
import warnings
from dataclasses import asdict, replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from distributed_harness import run_ranks
from huggingface_folders import CONFIG, VALUES, write_folder, written_tensors
from lit_interns1.checkpoints import CONFIG_KEY, WeightsError
from lit_interns1.data import PackedBatch, PolarDataModule, PolarEncoder, PolarTemplate, PreferenceDataModule
from lit_interns1.models.polar import PolarScorer
from lit_interns1.modules import LanguageModelModule
from lit_interns1.modules.language_model_module import load_language_model
from lit_interns1.modules.reward_model_module import RewardModelModule, load_reward_model
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives.policy import TokenRewardLoss
from lit_interns1.objectives.reward import BradleyTerry, PolarPretrainLoss
from sharded_training import environment, whole

SMALL = replace(CONFIG, vocab_size=4096)
TEMPLATE = PolarTemplate(separator="<|im_start|>", end="<|im_end|>", max_length=64, max_response_length=24)
WORDS = {"red": ["rose", "blood", "ruby"], "blue": ["sky", "sea", "night"], "green": ["leaf", "grass", "frog"]}


def batch_of(lengths, row_length=64, **values):
    """A packed row of documents; each value of `values` lists one entry per document."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for i, length in enumerate(lengths):
        document = {"input_ids": torch.randint(0, 64, (length,), generator=generator)}
        document["labels"] = torch.full((length,), -100)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[length // 2 : -1] = True
        document["response_mask"] = mask
        for name, listed in values.items():
            document[name] = torch.full((length,), listed[i])
        documents.append(document)
    return PackedBatch.from_documents(documents, row_length, {"pair_ids": -1})


def values_of(module, batch):
    """The values, document by document, computed alone."""
    ids = [batch.input_ids[batch.sample_id_T == i] for i in range(int(batch.sample_id_T.max()) + 1)]
    return [module.model(document).values_T for document in ids]


def built(**options):
    module = RewardModelModule(CONFIG, head_std=0.5, balance=BalanceLoss(coefficient=0.0), **options)
    module.configure_model()
    return module


def test_pairs_are_scored_at_the_end_of_documents():
    module = built(objective=BradleyTerry(center_rewards_coefficient=0.1))
    batch = batch_of(
        [7, 12, 5, 9], pair_ids=[1, 0, 0, 1], is_chosen=[True, False, True, False], margins=[0.5, 0.0, 0.0, 0.5],
        weights=[2.0, 1.0, 1.0, 2.0],
    )  # fmt: skip
    loss = module.training_step(batch, 0)
    with torch.no_grad():
        r = [float(values_T[-1]) for values_T in values_of(module, batch)]
    expected = 0.0
    for chosen, rejected, margin, weight in ((2, 1, 0.0, 1.0), (0, 3, 0.5, 2.0)):
        difference = r[chosen] - r[rejected] - margin
        expected += weight * (math.log1p(math.exp(-difference)) + 0.1 * (r[chosen] + r[rejected]) ** 2)
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(loss.count) == 2
    loss.sum.backward()
    assert module.model.value_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("field", ["rewards", "is_chosen"])
def test_token_rewards_are_averaged_over_the_response(field):
    module = built(objective=TokenRewardLoss())
    right = [True, False, True]
    labels = right if field == "is_chosen" else [1.0, -1.0, 0.25]
    batch = batch_of([7, 12, 6], **{field: labels})
    loss = module.training_step(batch, 0)
    expected = 0.0
    for document, is_right in zip(values_of(module, batch), right, strict=True):
        mean = float(document[len(document) // 2 : -1].mean().detach())
        expected += math.log1p(math.exp(-mean if is_right else mean))
    assert float(loss.sum.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(loss.count) == 3
    with pytest.raises(ValueError, match="the token field `rewards` or `is_chosen`; the batch has response_mask"):
        module.training_step(batch_of([5, 6]), 0)


def test_a_pair_must_be_whole():
    with pytest.raises(ValueError, match="pair 3 has 1 chosen and 0 rejected"):
        built().training_step(batch_of([5, 6], pair_ids=[3, 4], is_chosen=[True, False]), 0)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Trajectories of policies that write about one colour each, for training and held-out prompts; and pairs."""
    folder = tmp_path_factory.mktemp("colours")
    names = {}
    for name, prompts in (("train", range(40)), ("test", range(40, 60))):
        rows = [
            {"prompt": f"say {p}", "policy": colour, "trajectory": f" {words[(p + turn) % 3]} {words[(p * turn) % 3]}"}
            for p in prompts for colour, words in WORDS.items() for turn in range(2)
        ]  # fmt: skip
        names[name] = write(folder / f"{name}.jsonl", rows)
    pairs = [{"prompt": f"p {i}", "chosen": f"good {i * 7}", "rejected": f"bad {i * 7}"} for i in range(24)]
    names["pairs"] = write(folder / "pairs.jsonl", pairs)
    return names


def polar_data(files, **options):
    options = {"row_length": 128, "global_batch_size": 8, "micro_batch_size": 8, "template": TEMPLATE, **options}
    return PolarDataModule(files["train"], files["test"], triples_per_policy=2, **options)


def polar_module(**options):
    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=3e-3)

    options = {"objective": PolarPretrainLoss(), "optimizer": optimizer, "seed": 1, **options}
    return RewardModelModule(**({"config": SMALL} | options))


class Recorder(Callback):
    def __init__(self):
        self.training = []

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.training.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(steps, **options):
    return pl.Trainer(
        **{
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": -1,
            "check_val_every_n_epoch": None, "val_check_interval": steps, "log_every_n_steps": 1, **options,
        }
    )  # fmt: skip


def test_it_learns_who_wrote_a_text_and_a_checkpoint_judges_as_the_run_did(files, tmp_path):
    recorder = Recorder()
    run, module = trainer(40, callbacks=[recorder]), polar_module()
    data = polar_data(files)
    run.fit(module, data)
    assert recorder.training[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at zero
    assert recorder.training[0]["reward/accuracy"] == 0.5
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found["val/reward/accuracy"] > 0.9
    assert found["val/loss"] < 0.4
    assert {"reward/margin", "reward/score", "val/reward/margin", "val/reward/score", "train/balance"} <= found.keys()

    path = tmp_path / "reward.ckpt"
    run.save_checkpoint(path)
    loaded = load_reward_model(path)
    assert not loaded.training
    scorer = PolarScorer(loaded, PolarEncoder(data.tokenizer, TEMPLATE), batch_tokens=100)
    pairs = data.pairs(data.validation_sources[0])
    chosen, rejected = (
        scorer.score([p.prompt for p in pairs], [p.reference for p in pairs], [getattr(p, side) for p in pairs])
        for side in ("chosen", "rejected")
    )
    accuracy = sum((a > b) + 0.5 * (a == b) for a, b in zip(chosen, rejected, strict=True)) / len(pairs)
    assert found["val/reward/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    spread = math.sqrt(accuracy * (1 - accuracy) / (len(pairs) - 1))
    assert found["val/reward/accuracy_standard_error"] == pytest.approx(spread, rel=1e-4)
    margin = sum(a - b for a, b in zip(chosen, rejected, strict=True)) / len(pairs)
    assert found["val/reward/margin"] == pytest.approx(margin, rel=1e-3)

    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="holds a reward model"):
        load_language_model(path)
    again = polar_module(config=None, init_weights=str(path))
    again.configure_model()
    assert torch.equal(again.model.value_head.weight, module.model.value_head.weight)
    with pytest.raises(WeightsError, match="holds a reward model, which has no head for a LanguageModel"):
        LanguageModelModule(init_weights=str(path)).configure_model()


def test_what_it_starts_from(tmp_path):
    """A checkpoint or a folder of a language model: all but the head; the head as head_std says."""
    source = LanguageModelModule(CONFIG, seed=4)
    source.configure_model()
    file, folder = tmp_path / "lm.ckpt", tmp_path / "folder"
    checkpoint = {"state_dict": source.state_dict(), CONFIG_KEY: asdict(source.config), "global_step": 0}
    torch.save(checkpoint, file)
    write_folder(folder, written_tensors(source.model), VALUES)
    heads = []
    for path in (file, folder):
        for std in (0.0, 0.3):
            module = RewardModelModule(init_weights=str(path), head_std=std, seed=5)
            module.configure_model()
            for name, tensor in source.model.state_dict().items():
                if name != "lm_head.weight":
                    assert torch.equal(module.model.state_dict()[name], tensor), name
            heads.append(module.model.value_head.weight.detach())
    assert heads[0].abs().max() == heads[2].abs().max() == 0
    assert torch.equal(heads[1], heads[3])
    assert float(heads[1].std()) == pytest.approx(0.3, rel=0.5)
    for path in (file, folder):
        with pytest.raises(ValueError, match="holds a language model"):
            load_reward_model(path)
    with pytest.raises(WeightsError, match=r"another network .*num_layers: 2 → 3"):
        RewardModelModule(replace(CONFIG, num_layers=3), init_weights=str(file)).configure_model()
    with pytest.raises(ValueError, match="not written by RewardModelModule"):
        RewardModelModule(CONFIG).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"head_std = -1 must be at least 0"):
        RewardModelModule(CONFIG, head_std=-1)


def test_pairs_and_labels_of_preference_data(files):
    """The same file trains a Bradley-Terry model and a token reward model."""
    for objective, key in ((BradleyTerry(), "val/reward/accuracy_standard_error"), (TokenRewardLoss(), "val/loss")):
        data = PreferenceDataModule(
            files["pairs"], files["pairs"], row_length=64, global_batch_size=4, micro_batch_size=4
        )
        run = trainer(12)
        run.fit(polar_module(objective=objective), data)
        found = {name: float(value) for name, value in run.callback_metrics.items()}
        assert key in found
        assert found["val/reward/accuracy"] == 1.0
        assert found["val/loss"] < 0.5  # ln 2 at the start
        assert ("val/reward/margin" in found) == isinstance(objective, BradleyTerry)
        rewards = run.predict(datamodule=data, ckpt_path=None, model=run.lightning_module)
        assert sum(len(part["rewards"]) for part in rewards) == 48


# -- ranks


def train(rank, world, files, folder):
    """Weights and metrics after three steps; a checkpoint, and one more step from it."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    environment(rank, world)

    def run(steps, **fit):
        options = {}
        if world > 1:
            strategy = MoEParallelStrategy(expert_parallel_size=world)
            options = {"devices": world, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}
            options["use_distributed_sampler"] = False
        module, attempt = polar_module(balance=BalanceLoss(coefficient=0.05), head_std=0.1), trainer(steps, **options)
        attempt.fit(module, polar_data(files, micro_batch_size=8 // world, validation_rows=7), **fit)
        state = {name: whole(value) for name, value in module.model.state_dict().items()}
        return state, {name: float(value) for name, value in attempt.callback_metrics.items()}, attempt

    state, metrics, attempt = run(3)
    file = f"{folder}/{world}.ckpt"
    attempt.save_checkpoint(file)
    return state, metrics, run(4, ckpt_path=file)[0]


def test_two_ranks_train_like_one_process(files, tmp_path):
    ((expected, wanted, further),) = run_ranks(train, 1, files, str(tmp_path))
    for state, metrics, resumed in run_ranks(train, 2, files, str(tmp_path)):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
        for name, value in further.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-5)
        for name, value in wanted.items():
            assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    loaded = load_reward_model(tmp_path / "2.ckpt")  # what two ranks wrote as a folder
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    module = polar_module(config=None, init_weights=str(tmp_path / "2.ckpt"))
    module.configure_model()
    torch.testing.assert_close(module.model.value_head.weight, expected["value_head.weight"], rtol=1e-5, atol=1e-5)
