"""`fit --model.init_weights` and `generate --ckpt` with a Hugging Face folder, in process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from huggingface_folders import CONFIG, config_values, write_folder, written_tensors
from lit_interns1.cli import main
from lit_interns1.data.tokenizer import BUNDLED_TOKENIZER
from lit_interns1.models import LanguageModel

ROOT = Path(__file__).parents[2]
DATA = [
    "--data=TextDataModule", "--data.tokenizer=bundled:tokenizer", "--data.row_length=32", "--data.global_batch_size=4",
    "--data.micro_batch_size=4", "--data.validation_rows=4", f"--data.cache_dir={ROOT / '.cache' / 'tests'}",
    "--data.sources=[{path: 'bundled:molecules', name: molecules, prefix: '<SMILES>', suffix: '</SMILES>'}]",
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", "--trainer.max_epochs=-1",
    "--trainer.num_sanity_val_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(replace(CONFIG, vocab_size=4096), seed=4)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("hub") / "model", written_tensors(model), config_values(model.config))
    shutil.copy(BUNDLED_TOKENIZER, folder / "tokenizer.json")
    return folder


def fit(run_dir, folder, *options, tokens=128):
    model = ["--model=LanguageModelModule", f"--model.init_weights={folder}"]
    main(["fit", *model, *DATA, f"--run_dir={run_dir}", f"--clock.max_tokens={tokens}", *options])


def weights(run_dir):
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()}


def test_training_starts_from_the_folder_and_resumes_from_its_checkpoint(model, folder, tmp_path, capsys):
    sgd = "--model.optimizer=torch.optim.SGD"
    fit(tmp_path / "still", folder, sgd, "--model.optimizer.lr=0")
    started = weights(tmp_path / "still")
    for name, tensor in model.state_dict().items():
        assert torch.equal(started[name], tensor), name
    fit(tmp_path / "run", folder, sgd, "--model.optimizer.lr=0.1")
    before = weights(tmp_path / "run")
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "other")
    # the weights are gone, the checkpoint is there
    fit(tmp_path / "run", tmp_path / "other", sgd, "--model.optimizer.lr=0.1", "--ckpt_path=last", tokens=256)
    assert not torch.equal(weights(tmp_path / "run")["lm_head.weight"], before["lm_head.weight"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["init_weights"] == str(folder)

    with pytest.raises(SystemExit):
        fit(tmp_path / "new", tmp_path / "other")
    error = capsys.readouterr().err
    assert "other holds no *.safetensors file" in error
    assert "NotImplementedError" not in error
    assert not (tmp_path / "new").exists()


def test_a_config_that_is_given_must_match(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path / "a", folder, "--model.config=tiny-s1-mini", "--model.changes={vocab_size: 4096}")
    assert "holds another network (folder → model): hidden_size: 32 → 128; intermediate_size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit(tmp_path / "b", tmp_path / "nothing")
    assert "nothing is no folder of this machine" in capsys.readouterr().err


def test_generation_from_a_folder(folder, capsys):
    args = ["generate", f"--ckpt={folder}", "--prompt=<SMILES>C", "--max_new_tokens=4"]
    main(args)
    text = capsys.readouterr().out
    assert text.startswith("<SMILES>C")
    main(args)
    assert capsys.readouterr().out == text
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(4096))}))
    main(args)
    assert len(capsys.readouterr().out) < len(text)  # whatever comes first ends it
