"""`lit-interns1 export` on what a run leaves, in process; and the callback that exports while training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file

from huggingface_folders import CONFIG, config_values, write_folder, written_tensors
from lit_interns1.callbacks import ExportWeights
from lit_interns1.cli import main
from lit_interns1.commands.export import bytes_of
from lit_interns1.data.tokenizer import BUNDLED_TOKENIZER
from lit_interns1.models import LanguageModel
from lit_interns1.modules import LanguageModelModule
from sharded_training import batches


def train(run_dir, *callbacks, steps=3, config=CONFIG):
    module = LanguageModelModule(config, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=list(callbacks), default_root_dir=run_dir,
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(0, 1, 1), batch_size=None))
    return trainer, module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    trainer, module = train(directory, config=replace(CONFIG, vocab_size=4096))
    trainer.save_checkpoint(directory / "checkpoints" / "last.ckpt")
    shutil.copy(BUNDLED_TOKENIZER, directory / "tokenizer.json")
    torch.save(module.model.state_dict(), directory / "weights.pt")
    return directory


def refused(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["export", *map(str, args)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_checkpoint_becomes_a_folder_that_goes_on(run_dir, tmp_path, capsys):
    checkpoint, out = run_dir / "checkpoints" / "last.ckpt", tmp_path / "out"
    main(["export", f"--ckpt={checkpoint}", f"--out={out}", "--dtype=bfloat16", "--shard_size=100kB"])
    printed = capsys.readouterr().out
    assert f"{out}: 69 tensors, " in printed
    assert "layout qwen3_moe" in printed
    assert (out / "tokenizer.json").exists()
    tensors = {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
    model = LanguageModel.create(replace(CONFIG, vocab_size=4096))
    model.load_state_dict(torch.load(run_dir / "weights.pt", weights_only=True))
    expected = written_tensors(model, torch.bfloat16)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    main(["generate", f"--ckpt={out}", "--prompt=To be", "--max_new_tokens=3", "--temperature=0"])
    assert capsys.readouterr().out.startswith("To be")


def test_a_dry_run_prints_the_mapping_and_writes_nothing(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}", "--dtype=fp8", "--dry_run=true"])
    printed = capsys.readouterr().out.splitlines()
    row = next(line.split("  ") for line in printed if "experts.{0-7}.up_proj.weight " in line)
    assert [part.strip() for part in row if part] == [
        "layers.{0-1}.mlp.experts.gate_up_proj", "model.layers.{0-1}.mlp.experts.{0-7}.up_proj.weight", "16 × 32",
        "F8_E4M3", "16 × 512 B",
    ]  # fmt: skip
    assert any(line.startswith("125 tensors (13 BF16, 56 F32, 56 F8_E4M3), ") for line in printed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_converted_and_is_like_itself(tmp_path, capsys, caplog):
    model = LanguageModel.create(replace(CONFIG, vocab_size=4096), seed=4)
    tensors = {k.replace("model.", "model.language_model.", 1): v for k, v in written_tensors(model).items()}
    tensors["model.vision_tower.embeddings.cls_token"] = torch.randn(1, 1, 8)
    text = {**config_values(model.config), "model_type": "qwen3_moe"}
    values = {"model_type": "interns1", "text_config": text, "image_token_id": 7, "tie_word_embeddings": False}
    folder = write_folder(tmp_path / "in", tensors, values)
    shutil.copy(BUNDLED_TOKENIZER, folder / "tokenizer.json")
    main(["export", f"--ckpt={folder}", f"--out={tmp_path / 'same'}", "--shard_size=50kB"])
    assert f"1 of them as they are in {folder}" in capsys.readouterr().out
    again = {k: t for file in (tmp_path / "same").glob("*.safetensors") for k, t in load_file(file).items()}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in again.items())
    assert json.loads((tmp_path / "same" / "config.json").read_text())["image_token_id"] == 7
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == BUNDLED_TOKENIZER.read_bytes()
    main(["export", f"--ckpt={folder}", f"--out={tmp_path / 'text'}", "--layout=qwen3_moe"])
    assert "as they are" not in capsys.readouterr().out
    plain = load_file(tmp_path / "text" / "model-00001-of-00001.safetensors")
    assert plain.keys() == written_tensors(model).keys()
    assert (tmp_path / "text" / "tokenizer.json").exists()
    assert "encoders" not in caplog.text


def test_what_cannot_be_done_is_said_in_one_line(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    assert "checkpoint nothing does not exist" in refused(capsys, "--ckpt=nothing", f"--out={tmp_path / 'out'}")
    assert "exists: an export overwrites nothing" in refused(capsys, f"--ckpt={checkpoint}", f"--out={run_dir}")
    error = refused(capsys, f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}", "--shard_size=five")
    assert "--shard_size='five' is no size: write it as 5GB, 500MB or 2GiB" in error
    error = refused(capsys, f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}", "--layout=llama")
    assert "llama" in error
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "1.5 MB": 1_500_000, "2GiB": 2**31, "7": 7, "3kb": 3000}
    assert {text: bytes_of(text) for text in sizes} == sizes
    for text in ("0GB", "GB", "-1MB", "5XB"):
        with pytest.raises(ValueError, match="--shard_size"):
            bytes_of(text)


# -- the callback ----------------------------------------------------------------------------------------------------


def test_the_callback_exports_in_between_and_at_the_end(tmp_path):
    callback = ExportWeights(every_n_steps=2, dtype="bfloat16")
    _, module = train(tmp_path, callback)
    assert {path.name for path in tmp_path.iterdir()} == {"huggingface", "huggingface-step-2"}
    final = load_file(tmp_path / "huggingface" / "model-00001-of-00001.safetensors")
    expected = written_tensors(module.model, torch.bfloat16)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in final.items())
    before = load_file(tmp_path / "huggingface-step-2" / "model-00001-of-00001.safetensors")
    assert not torch.equal(before["lm_head.weight"], final["lm_head.weight"])
    assert [result.folder.name for result in callback.exported] == ["huggingface-step-2", "huggingface"]


def test_the_callback_finds_out_before_training(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *arguments):
            steps.append(1)

    for callback, message in (
        (ExportWeights(folder=str(tmp_path / "mine")), "mine exists: an export overwrites nothing"),
        (ExportWeights(folder=str(tmp_path / "new"), layout="llama", every_n_steps=1, at_end=False), "llama"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, callback, Count())
    assert not steps
    assert {path.name for path in Path(tmp_path).iterdir()} == {"mine"}
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ExportWeights(every_n_steps=0)
    with pytest.raises(ValueError, match="would export nothing"):
        ExportWeights(at_end=False)
