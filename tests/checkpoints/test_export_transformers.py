"""transformers reads what is exported: nothing missing, nothing unexpected, the same logits; its own bytes return."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lit_interns1.checkpoints import ModelSource, export_pretrained, load_pretrained_model, open_source
from lit_interns1.models import LanguageModel

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}  # fmt: skip
SPARSE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}
IDS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(3))
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
}
MORE = {"qwen3_moe": SPARSE, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


def reference(kind, **changes):
    torch.manual_seed(1)
    config, model = CLASSES[kind]
    return model(config(**{**SHAPE, **MORE.get(kind, {}), **changes})).eval()


def relative(ours, theirs):
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def stored(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
        ("mixtral", {}),
    ],
    ids=str,
)
def test_there_and_back(kind, changes, tmp_path):
    theirs = reference(kind, **changes)
    for number, options in enumerate(({}, {"max_shard_size": "20KB"})):
        folder, out = tmp_path / f"in-{number}", tmp_path / f"out-{number}"
        theirs.save_pretrained(folder, **options)
        assert (len(list(folder.glob("*.safetensors"))) > 2) == bool(options)
        ours = load_pretrained_model(folder)
        with torch.no_grad():
            logits = theirs(IDS).logits
            assert relative(ours(IDS).logits, logits) < 1e-5
        export_pretrained(ModelSource(ours), ours.config, out, max_shard_bytes=40_000 if options else 5_000_000_000)
        before, after = stored(folder), stored(out)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            assert torch.equal(tensor, after[key]), key
        again, info = type(theirs).from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            assert torch.equal(again.eval()(IDS).logits, logits)


def test_a_new_model_is_read_by_auto_classes(tmp_path):
    """Nothing of transformers went into it."""
    from huggingface_folders import CONFIG

    model = LanguageModel.create(CONFIG, seed=3)
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "out", dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert relative(theirs.float()(ids).logits, load_pretrained_model(tmp_path / "out")(ids).logits) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_fp8_is_read_by_transformers(kind, tmp_path, monkeypatch):
    """Its own loader, which multiplies the blocks out, finds the numbers that ours finds."""
    from transformers.quantizers import quantizer_finegrained_fp8

    # it asks for accelerate, which it needs to place a model on devices only
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    wide = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64}
    theirs = reference(kind, **wide)
    theirs.save_pretrained(tmp_path / "in")
    source, config = open_source(tmp_path / "in")
    export_pretrained(source, config, tmp_path / "out", dtype="fp8")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in values["quantization_config"]["modules_to_not_convert"]
    options = transformers.FineGrainedFP8Config(dequantize=True)
    read, info = type(theirs).from_pretrained(
        tmp_path / "out", quantization_config=options, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    read.float().eval()
    ours = load_pretrained_model(tmp_path / "out")
    with torch.no_grad():
        assert relative(ours(IDS).logits, read(IDS).logits) < 1e-4
