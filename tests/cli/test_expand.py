"""`lit-interns1 expand`, in process."""

import json
from dataclasses import replace

import pytest
import torch

from huggingface_folders import CONFIG, write_folder, written_tensors
from lit_interns1.checkpoints import load_pretrained_model
from lit_interns1.checkpoints.expanded_source import expand_experts
from lit_interns1.checkpoints.expansion import Expansion
from lit_interns1.cli import main
from lit_interns1.models import LanguageModel
from lit_interns1.modules import LanguageModelModule


@pytest.fixture(scope="module")
def model():
    return LanguageModel.create(CONFIG, seed=4)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hub") / "model", written_tensors(model), files=2)


def expand(source, out, *options):
    main(["expand", f"--from={source}", f"--out={out}", *options])


def same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


GROWN = Expansion(
    num_experts=16, num_groups=2, seed=3, vocab_size=80,
    positions={"kind": "fope", "theta": 5e3, "fope_sin_pad": 1.0, "fope_init_factor": 0.25},
)  # fmt: skip
OPTIONS = (
    "--experts=16", "--groups=2", "--seed=3", "--vocab_size=80", "--positions=fope", "--theta=5e3",
    "--fope_init_factor=0.25", "--shard_size=20KB",
)  # fmt: skip


def test_the_folder_holds_what_is_made_in_memory_and_a_run_starts_from_it(model, folder, tmp_path, capsys):
    expand(folder, tmp_path / "out", *OPTIONS)
    printed = capsys.readouterr().out
    for line in (
        "vocab_size: 64 → 80", "moe.num_experts: 8 → 16", "moe.router: topk → grouped", "moe.num_groups: 1 → 2",
        "moe.router_gradient: topk → ste", "positions.kind: rope → fope",
        "assignment: grouped, seed 3: each of 8 experts 2 times, in 2 layers",
    ):  # fmt: skip
        assert line in printed.splitlines()
    expected = expand_experts(model.state_dict(), CONFIG, GROWN)
    loaded = load_pretrained_model(tmp_path / "out")
    assert loaded.config == expected.config
    same_weights(loaded.state_dict(), expected.state_dict)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    table = json.loads((tmp_path / "out" / "expansion.json").read_text())
    assert torch.equal(torch.tensor(table["source_experts"]), expected.sources_LE)
    assert table["sparse_layers"] == [0, 1]
    assert table["source"] == str(folder)
    assert Expansion(**table["options"]) == GROWN
    assert (table["before"]["moe"]["num_experts"], table["after"]["moe"]["num_experts"]) == (8, 16)

    module = LanguageModelModule(init_weights=str(tmp_path / "out"))
    module.configure_model()
    same_weights(module.model.state_dict(), expected.state_dict)


def test_a_checkpoint_of_a_run_grows_and_nothing_is_overwritten(model, tmp_path, capsys):
    module = LanguageModelModule(CONFIG)
    checkpoint = {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    options = ("--experts=16", "--groups=2", "--method=ranked", "--noise=0")
    expand(tmp_path / "last.ckpt", tmp_path / "out", *options, "--dry_run=true")
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    expand(tmp_path / "last.ckpt", tmp_path / "out", *options)
    expansion = Expansion(num_experts=16, num_groups=2, method="ranked", router_noise=0.0)
    same_weights(
        load_pretrained_model(tmp_path / "out").state_dict(),
        expand_experts(model.state_dict(), CONFIG, expansion).state_dict,
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        expand(tmp_path / "last.ckpt", tmp_path / "out", "--experts=32", "--groups=4", "--experts_per_token=4")
    assert stopped.value.code == 2
    assert "out exists" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@torch.no_grad()
def test_a_dense_folder_becomes_a_sparse_one(tmp_path, capsys):
    config = replace(CONFIG, moe=None, intermediate_size=48)
    model = LanguageModel.create(config)
    values = {
        "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "intermediate_size": 48, "rope_theta": 3e3,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = write_folder(tmp_path / "dense", written_tensors(model), values)
    options = ("--experts=4", "--experts_per_token=2", "--dense_layers=[0]")
    expand(folder, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert "moe.num_experts: 4" in printed
    assert "in 1 layers" in printed
    sparse, ids = load_pretrained_model(tmp_path / "out"), torch.arange(30)
    assert sparse.config.dense_layers == (0,)
    torch.testing.assert_close(sparse(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts=20", "--groups=2"), "num_experts = 20 must be a multiple of the model's 8"),
        (("--experts=32", "--groups=2"), "num_groups = 2 must be divisible by 4 = 32/8"),
        (("--fope_sin_pad=0",), "fope_sin_pad = 0.0 needs positions 'fope'"),
        (("--experts=16", "--groups=2", "--layout=qwen3_moe"), "cannot say"),
        (("--experts=16", "--groups=2", "--shard_size=many"), "is no size"),
        ((), "changes nothing"),
    ],
)
def test_refusals_are_one_message_and_leave_nothing(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        expand(folder, tmp_path / "out", *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lit-interns1 expand: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        expand(tmp_path / "nothing", tmp_path / "out")
    assert "nothing does not exist" in capsys.readouterr().err
