"""The text model of the official Intern-S1-Pro code on small random weights (golden/interns1_pro_tiny)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.objectives import NextTokenCrossEntropy
from reference_weights import load_reference_weights, reference_gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.detach() - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def build(router_gradient="topk"):
    text = json.loads((GOLDEN / "config.json").read_text())["text_config"]
    config = LanguageModelConfig(
        vocab_size=text["vocab_size"], hidden_size=text["hidden_size"], num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"], num_kv_heads=text["num_key_value_heads"], head_dim=text["head_dim"],
        moe=MoEConfig(
            text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"], router="grouped",
            num_groups=text["router_n_groups"], router_gradient=router_gradient,
        ),
        positions=PositionConfig(
            kind="fope", theta=text["rope_theta"], max_position_embeddings=text["max_position_embeddings"],
            fope_init_factor=text["rope_scaling"]["fope_init_factor"], fope_sin_pad=1.0,
        ),
    )  # fmt: skip
    model = LanguageModel.create(config)
    state = load_file(GOLDEN / "model.safetensors")
    text_state = {k: v for k, v in state.items() if not k.startswith("model.visual.")}
    load_reference_weights(model, text_state, prefix="model.language_model.")
    return model


@pytest.mark.parametrize("router_gradient", ["topk", "ste"])
def test_logits_and_router_logits(golden, router_gradient):
    model = build(router_gradient)
    captured = [
        layer.router.register_forward_hook(lambda m, i, out: logits.append(out.logits_TE)) for layer in model.moe_layers
    ]
    logits: list[torch.Tensor] = []
    output = model(golden["input_ids"])
    assert relative(output.logits, golden["logits"]) < 1e-5
    assert len(captured) == 2
    for layer, ours in enumerate(logits):
        assert relative(ours, golden[f"router_logits.{layer}"]) < 1e-5


def test_cross_entropy_and_gradients(golden):
    model = build()
    ids = golden["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1).flatten()
    objective = NextTokenCrossEntropy()
    loss = objective(model(ids, targets=labels).scores, labels)[0].mean
    assert loss.item() == pytest.approx(golden["cross_entropy"].item(), rel=1e-5)
    loss.backward()
    gradients = dict(model.named_parameters())
    wanted = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    for name, expected in wanted.items():
        name = name.removeprefix("model.language_model.")
        if ".experts.3.down_proj.weight" in name:
            ours = gradients["layers.1.mlp.experts.down_proj"].grad[3]
        else:
            (ours_name,) = reference_gradients({name: expected})
            ours = gradients[ours_name].grad
        assert relative(ours, expected) < 1e-5, name
    assert len(wanted) == 4
