"""`LanguageModelModule(init_weights=...)`: what its config is, when the folder is read, and what goes over it."""

from dataclasses import replace

import pytest
import torch

from huggingface_folders import CONFIG, VALUES, write_folder, written_tensors
from lit_interns1.checkpoints import WeightsError
from lit_interns1.models import LanguageModel
from lit_interns1.modules import LanguageModelModule
from lit_interns1.modules.language_model_module import load_language_model


@pytest.fixture(scope="module")
def source():
    return LanguageModel.create(CONFIG, seed=4)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("folder"), written_tensors(source), VALUES))


def filled(module):
    module.configure_model()
    return module.model.state_dict()


def test_the_config_is_that_of_the_folder_unless_one_is_given(source, folder):
    for module in (LanguageModelModule(init_weights=folder), LanguageModelModule(CONFIG, init_weights=folder)):
        assert module.config == CONFIG
        for name, tensor in filled(module).items():
            assert torch.equal(tensor, source.state_dict()[name]), name
    with pytest.raises(WeightsError, match=r"another network \(folder → model\): hidden_size: 32 → 128; .*vocab_size"):
        LanguageModelModule("tiny-s1", init_weights=folder).configure_model()
    other = replace(CONFIG, positions=replace(CONFIG.positions, theta=1e6))
    with pytest.raises(WeightsError, match=r"positions.theta: 3000.0 → 1000000.0"):
        LanguageModelModule(other, init_weights=folder).configure_model()


def test_changes_apply_to_the_config_of_the_folder(source, folder):
    changes = {"activation_checkpointing": "block", "positions": {"theta": 1e6}, "moe": {"freeze_router": True}}
    module = LanguageModelModule(init_weights=folder, changes=changes)
    assert module.config == replace(
        CONFIG, activation_checkpointing="block", positions=replace(CONFIG.positions, theta=1e6),
        moe=replace(CONFIG.moe, freeze_router=True),
    )  # fmt: skip
    assert torch.equal(filled(module)["lm_head.weight"], source.lm_head.weight)
    assert not module.model.moe_layers[0].router.weight.requires_grad
    with pytest.raises(ValueError, match="MoEConfig has no field 'experts' to change: it has num_experts"):
        LanguageModelModule(init_weights=folder, changes={"moe": {"experts": 3}})
    with pytest.raises(ValueError, match="rms_norm_eps = 1e-05 has no fields"):
        LanguageModelModule(init_weights=folder, changes={"rms_norm_eps": {"a": 3}})


def test_nothing_is_read_where_a_checkpoint_follows(folder):
    module = LanguageModelModule(CONFIG, init_weights=folder, seed=2)
    module.checkpoint_follows = True
    expected = LanguageModel.create(CONFIG, seed=2).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in filled(module).items())
    assert module.loaded_weights is None


def test_one_door_for_files_and_folders(source, folder):
    model = load_language_model(folder)
    assert not model.training
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
