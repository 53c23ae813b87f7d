"""The model of a checkpoint, whether one file or shards; what is neither is refused by name."""

from dataclasses import asdict

import pytest
import torch
from torch.distributed.checkpoint import save

from lit_interns1.models import LanguageModel, preset
from lit_interns1.modules.language_model_module import CONFIG_KEY, load_language_model, read_checkpoint


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(preset("tiny-s1", num_layers=1, vocab_size=64), seed=4)


def written(model, path, sharded):
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = {CONFIG_KEY: asdict(model.config), "global_step": 7}
    if sharded:
        save({"state_dict": weights, "optimizer_0": {"state": {"lr": 1.0}}}, checkpoint_id=path)
        torch.save(rest, path / "meta.pt")
    else:
        torch.save({"state_dict": weights, **rest}, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_model_comes_back(model, tmp_path, sharded):
    path = written(model, tmp_path / "last.ckpt", sharded)
    assert read_checkpoint(path)["global_step"] == 7
    again = load_language_model(path)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"is no checkpoint of a run: it has no meta\.pt"):
        read_checkpoint(tmp_path)
    torch.save([1], tmp_path / "meta.pt")
    with pytest.raises(ValueError, match="it has no 'global_step'"):
        read_checkpoint(tmp_path)
    (tmp_path / "meta.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path)
