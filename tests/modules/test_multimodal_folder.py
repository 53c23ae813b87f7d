"""Whole models that start from a Hugging Face folder, and go back into one from a checkpoint."""

import pytest
import torch
from lightning.pytorch import Trainer

from lit_interns1.checkpoints.huggingface import (
    ModelSource,
    WeightsError,
    export_pretrained,
    load_pretrained_multimodal_model,
    open_source,
)
from lit_interns1.models import MultimodalModel, multimodal_preset
from lit_interns1.modules import MultimodalModule
from lit_interns1.modules.language_model_module import load_language_model
from lit_interns1.modules.multimodal_module import load_multimodal_model
from lit_interns1.nn.initialization import materialize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.device("meta"):
        model = MultimodalModel(multimodal_preset("tiny-s1-mini", text={"num_layers": 2}))
    materialize(model, seed=8)
    path = tmp_path_factory.mktemp("whole") / "folder"
    export_pretrained(ModelSource(model), model.config, path)
    return path, model


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_training_starts_from_a_folder_and_its_checkpoint_becomes_one(folder, tmp_path):
    path, model = folder
    module = MultimodalModule(init_weights=str(path), changes={"text": {"attention_backend": "dense"}})
    module.configure_model()
    assert_same(module.model, model)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same(load_multimodal_model(tmp_path / "last.ckpt"), model)
    assert_same(load_multimodal_model(path), model)
    assert_same(load_language_model(tmp_path / "last.ckpt"), model.language_model)
    source, config = open_source(tmp_path / "last.ckpt")
    export_pretrained(source, config, tmp_path / "out")
    assert_same(load_pretrained_multimodal_model(tmp_path / "out"), model)


def test_another_network_is_refused(folder):
    path, _ = folder
    other = multimodal_preset("tiny-s1-mini", text={"num_layers": 2}, vision={"norm_eps": 1e-5})
    with pytest.raises(WeightsError, match=r"vision.norm_eps: 1e-05 → 1e-06"):
        MultimodalModule(other, init_weights=str(path)).configure_model()
    with pytest.raises(ValueError, match=r"changes = .* are for presets and folders"):
        MultimodalModule(other, changes={"text": {"num_layers": 1}})
