"""Training of whole models: parts, ranks with and without images, accuracy of answers, kill and resume."""

import hashlib
import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_harness import RankError, run_ranks
from lit_interns1.data import PackedBatch
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.models.generation import generate
from lit_interns1.models.multimodal import MultimodalConfig
from lit_interns1.models.time_series import TimeSeriesConfig
from lit_interns1.models.vision import NativeVisionConfig
from lit_interns1.modules import LanguageModelModule, MultimodalModule
from lit_interns1.modules.multimodal_module import part_of
from lit_interns1.nn.media import MediaItems
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives.answer_accuracy import AnswerAccuracy
from sharded_training import environment, whole

LENGTH, STEPS = 24, 2
IMAGE, SIGNAL = 60, 61


def config_of(**changes):
    text = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16),
    )  # fmt: skip
    vision = NativeVisionConfig(32, 1, 2, 64, patch_size=2, num_positions=16)
    signals = TimeSeriesConfig(
        hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, adapted_size=16, max_positions=16,
        patch_size=16, patch_heads=2, patch_intermediate_size=32, output_size=32,
    )  # fmt: skip
    return MultimodalConfig(
        text, **{"vision": vision, "time_series": signals, "image_token_id": IMAGE, "time_series_token_id": SIGNAL}
        | changes
    )  # fmt: skip


def rows_of_step(step):
    """Four rows of two documents: images in the first two alone; a signal in the last one of the second step."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for row in range(4):
        documents, media = [], {}
        for _ in range(2):
            ids = torch.randint(0, 60, (9 + row // 2,), generator=generator)
            labels = torch.roll(ids, -1)
            labels[-1], labels[: 2 + row] = -100, -100
            if row < 2:
                ids[1:3], labels[:3] = IMAGE, -100  # 2 × 4 patches are two vectors
                media.setdefault("image", []).append((torch.randn(8, 24, generator=generator), (1, 2, 4)))
            if (row, step) == (3, 1):
                ids[1:2] = SIGNAL
                media.setdefault("time_series", []).append((torch.randn(10, generator=generator), (10, 1, 1.0)))
            documents.append({"input_ids": ids, "labels": labels})
        batch = PackedBatch.from_documents(documents, row_length=LENGTH)
        batch.media = {kind: MediaItems.of(*zip(*items, strict=True)) for kind, items in media.items()}
        rows.append(batch)
    return rows


def train(rank, world, strategy, parts):
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    torch.set_num_threads(1)
    module = MultimodalModule(
        config_of(), train_parts=parts, optimizer=lambda p: torch.optim.SGD(p, lr=0.3), seed=3,
        balance=BalanceLoss("global", coefficient=0.05),
    )  # fmt: skip
    result = {"losses": []}

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if "initial" not in result:
                result["initial"] = {name: whole(p) for name, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                result["gradients"] = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}
            result["losses"].append(float(trainer.callback_metrics["train/loss"]))

    environment(rank if strategy is not None else 0, world if strategy is not None else 1)
    options = {"devices": 1}
    if strategy is not None:
        from lit_interns1.strategies import MoEParallelStrategy

        plugins = [TorchElasticEnvironment()]
        options = {"devices": world, "strategy": MoEParallelStrategy(**strategy), "plugins": plugins}
    warnings.filterwarnings("ignore")
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1, callbacks=[Record()], **options,
    )  # fmt: skip
    share = 4 // (world if strategy is not None else 1)
    first = share * rank if strategy is not None else 0
    data = [PackedBatch.concatenate(rows_of_step(step)[first : first + share]) for step in range(STEPS)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    result["parameters"] = {name: whole(p) for name, p in module.named_parameters()}
    return result


def train_all(rank, world, cases):
    return [train(rank, world, *case) for case in cases]


STAGES = {
    "all, one stage": [None, ["vision", "projector"]],
    "others": [["projector"], ["language_model"], ["time_series", "projector"]],
}


@pytest.mark.parametrize("name", ["all, one stage", pytest.param("others", marks=pytest.mark.slow)])
def test_ranks_with_and_without_images_train_like_one_process(name):
    """Rank 0 has all images and rank 1 all signals, experts are divided; stages leave the other parts as they were."""
    stages = STAGES[name]
    wanted = run_ranks(train_all, 1, [(None, parts) for parts in stages], timeout=120.0)[0]
    cases = [({"expert_parallel_size": 2}, parts) for parts in stages]
    cases += [({}, stages[-1])] if name == "others" else []
    results = run_ranks(train_all, 2, cases, timeout=120.0)
    for number, (_, parts) in enumerate(cases):
        expected = wanted[stages.index(parts)]
        for rank in range(2):
            ours = results[rank][number]
            assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5), parts
            assert ours["gradients"].keys() == expected["gradients"].keys(), parts
            for kind in ("gradients", "parameters"):
                for parameter, tensor in ours[kind].items():
                    other = expected[kind][parameter]
                    error = (tensor - other).norm() / other.norm().clamp(min=1e-6)
                    assert error < 2e-5, f"{parts}: {kind} of {parameter}: {error:.1e}"
        changed_parts = {
            part_of(parameter.removeprefix("model."))
            for parameter, tensor in expected["parameters"].items()
            if not torch.equal(tensor, expected["initial"][parameter])
        }
        assert changed_parts == set(parts or ["language_model", "vision", "projector", "time_series"])
        trained = {part_of(parameter.removeprefix("model.")) for parameter in expected["gradients"]}
        assert trained == changed_parts


def test_parts_are_checked():
    with pytest.raises(ValueError, match=r"train_parts = \['audio'\]: this model has no audio; it has language_model"):
        MultimodalModule(config_of(), train_parts=["audio"])
    with pytest.raises(ValueError, match=r"this model has no vision; it has language_model, projector, time_series"):
        MultimodalModule(config_of(vision=None, image_token_id=None), train_parts=["vision"])
    with pytest.raises(ValueError, match="trains nothing"):
        MultimodalModule(config_of(), train_parts=[])
    module = MultimodalModule(config_of(), train_parts=["projector"])
    module.configure_model()
    (name,) = {part_of(n) for n, p in module.model.named_parameters() if p.requires_grad}
    assert name == "projector"
    optimized = sum(len(group["params"]) for group in module.configure_optimizers().param_groups)
    assert optimized == sum(part_of(n) == "projector" for n, _ in module.model.named_parameters())


def test_a_language_model_refuses_images():
    module = LanguageModelModule(config_of().text)
    with pytest.raises(ValueError, match="holds image, which LanguageModelModule cannot see"):
        module.media_inputs(rows_of_step(0)[0])


def test_accuracy_is_that_of_greedy_decoding():
    """Answers that the model itself gave are right, those with one other token are wrong; two answers in a document."""
    torch.manual_seed(0)
    nothing = {"vision": None, "time_series": None, "image_token_id": None, "time_series_token_id": None}
    module = MultimodalModule(config_of(**nothing), seed=1)
    module.configure_model()
    for parameter in module.model.parameters():  # answers of all kinds
        parameter.data.mul_(3)
    model = module.model.language_model
    generator = torch.Generator().manual_seed(0)
    documents, right = [], []
    for number in range(12):
        ids, labels = [], []
        for answer in range(2):
            asked = torch.randint(0, 60, (3 + number % 3,), generator=generator).tolist()
            reply = generate(model, [[*ids, *asked]], max_new_tokens=1 + number % 4, temperature=0).token_ids[0]
            spoiled = (number + answer) % 3 == 0
            if spoiled:
                place = number % len(reply)
                reply[place] = (reply[place] + 1) % 60
            labels += [-100] * (len(asked) - 1) + reply + [-100]
            ids += asked + reply
            right.append(not spoiled)
        documents.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    # the second answer of a document was asked for behind a first one that may be spoiled: that is its prefix
    batch = PackedBatch.from_documents(documents, row_length=sum(len(d["input_ids"]) for d in documents) + 5)
    with torch.no_grad():
        scores = module.token_scores(batch, rank=True)
    metric = AnswerAccuracy()
    metric.update(scores.rank_T, batch.labels, batch.cu_seqlens)
    assert int(metric.total) == 24
    assert float(metric.compute()) == pytest.approx(sum(right) / 24)
    one_more = AnswerAccuracy()  # neighbouring documents whose labels touch are two answers
    one_more.update(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]))
    assert (int(one_more.right), int(one_more.total)) == (1, 2)


# kill and resume

SIDE = 8


def write_conversations(folder: Path):
    from PIL import Image

    random = np.random.default_rng(0)
    lines = []
    for number in range(40):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", random.normal(size=20))
        media = [
            {"type": "image", "image": f"{number}.png"},
            {"type": "time_series", "time_series": f"{number}.npy", "sampling_rate": 1},
        ][: 1 + number % 2]
        question = [*media, {"type": "text", "text": "Which?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(number % 3)}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "a.jsonl").write_text("\n".join(lines))


def run(rank, world, folder, name, kill_at, resume):
    """Trains 12 steps, more than two epochs; writes what each batch was made of, and its loss."""
    import lightning.pytorch as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lit_interns1.data.conversation_data_module import ConversationDataModule
    from lit_interns1.data.conversation_media import NativeVisuals, RandomAffine
    from lit_interns1.data.media import NativeImageProcessor, NativeVideoProcessor
    from lit_interns1.models.config import changed

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sizes = {"patch_size": 2, "min_pixels": 16, "max_pixels": 64}
    data = ConversationDataModule(
        [str(folder / "a.jsonl")], [str(folder / "a.jsonl")], row_length=64, global_batch_size=4, micro_batch_size=2,
        visuals=NativeVisuals(NativeImageProcessor(**sizes), NativeVideoProcessor(**sizes)), seed=2,
        transform=RandomAffine(1, 20), cache_dir=folder / "cache",
    )  # fmt: skip
    config = changed(
        config_of(), {"text": {"vocab_size": 4103}, "image_token_id": 4097, "time_series_token_id": 4101}
    )  # fmt: skip
    module = MultimodalModule(config, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), seed=1)
    record = folder / f"{name}.jsonl"

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            digest = hashlib.sha1(batch.input_ids.numpy().tobytes())
            for kind in sorted(batch.media):
                digest.update(batch.media[kind].values.numpy().tobytes())
            entry = {"micro": trainer.fit_loop.total_batch_idx + 1, "rows": digest.hexdigest()}
            with record.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    environment(0, 1)
    checkpoint = ModelCheckpoint(folder / name, every_n_train_steps=2, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=12, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Record(), checkpoint], log_every_n_steps=1,
        limit_val_batches=2,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=folder / name / "last.ckpt" if resume else None)
    digest = hashlib.sha1()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {"weights": digest.hexdigest(), "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "epoch": len(data.train_dataloader())}  # fmt: skip


def rows_of(file: Path):
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return {entry["micro"]: entry["rows"] for entry in entries}, len(entries)


def test_killed_in_the_middle_of_an_epoch_the_run_is_bit_equal(tmp_path):
    write_conversations(tmp_path)
    (wanted,) = run_ranks(run, 1, tmp_path, "whole", None, False)
    with pytest.raises(RankError, match="died"):
        run_ranks(run, 1, tmp_path, "killed", 7, False)
    (resumed,) = run_ranks(run, 1, tmp_path, "killed", None, True)
    assert 2 < wanted["epoch"] < 12  # the kill is inside an epoch
    assert wanted["epoch"] % 6
    whole_rows, count = rows_of(tmp_path / "whole.jsonl")
    assert len(whole_rows) == count == 24
    killed_rows, count = rows_of(tmp_path / "killed.jsonl")
    assert count == 26  # the step behind the last checkpoint was done again
    assert killed_rows == whole_rows
    assert resumed["weights"] == wanted["weights"]
    assert {"train/loss", "val/loss", "val/accuracy"} <= wanted["metrics"].keys()
    assert resumed["metrics"]["train/loss"] == wanted["metrics"]["train/loss"]
