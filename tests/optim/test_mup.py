"""Learning rate and decay by module: the table of rules, and steps of one size at any width."""

import pytest
import torch
from torch import nn

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig
from lit_interns1.optim.mup import epsilon_multiplier, module_classes, mup_groups, mup_rules, residual_multiplier


def language_model(**changes):
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
    values = {
        "vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
        "moe": moe, **changes,
    }  # fmt: skip
    with torch.device("meta"):
        return LanguageModel(LanguageModelConfig(**values))


def test_every_parameter_has_its_class():
    classes = module_classes(language_model())
    found = {
        kind: {name.rpartition("layers.")[2] for name, k in classes.items() if k == kind} for kind in classes.values()
    }
    assert len(found["embedding"]) == 1
    assert len(found["head"]) == 1
    assert len(found["final_norm"]) == 1
    assert all("router" in name for name in found["router"])
    assert len(found["router"]) == 2
    assert any("experts" in name for name in found["hidden"])
    assert all("norm" in name or "bias" in name for name in found["hidden_vector"])
    assert not any("norm" in name or "router" in name for name in found["hidden"])


def test_tied_head_counts_as_embedding():
    classes = module_classes(language_model(tie_word_embeddings=True))
    assert "embedding" in classes.values()
    assert "head" not in classes.values()


def test_rates_and_decay_by_the_rules():
    model = language_model()
    groups = {g["mup_class"]: g for g in mup_groups(model, 0.01, width=4, depth=8, weight_decay=0.1, alpha=0.5)}
    deep = 8**-0.5
    expected = {
        "embedding": (1, 1), "head": (1, 1), "router": (1, 1), "final_norm": (1, 0), "hidden_vector": (deep, 0),
        "hidden": (deep / 4, 4),
    }  # fmt: skip
    assert groups.keys() == expected.keys()
    for kind, (rate, decay) in expected.items():
        assert groups[kind]["lr"] == pytest.approx(0.01 * rate)
        assert groups[kind]["weight_decay"] == pytest.approx(0.1 * decay)
        assert groups[kind]["lr_multiplier"] == pytest.approx(rate)
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    hidden = groups["hidden"]
    assert hidden["lr"] * hidden["weight_decay"] == pytest.approx(0.01 * 0.1 * deep)  # η λ does not change with width


def test_completep_leaves_rates_alone_in_depth():
    assert mup_rules(1, 8)["hidden"].learning_rate == 1
    assert residual_multiplier(8) == 1 / 8
    assert epsilon_multiplier(4, 8, alpha=0.5) == pytest.approx(1 / (4 * 8**0.5))


def change_of_output(width, rates):
    """RMS change of a layer's output for one token by one step of Adam, and what µP says: base width · η · mean |x|."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(width, width, bias=False, dtype=torch.float64)])})
    layer = net["layers"][0]
    x_D = torch.randn(width, dtype=torch.float64)
    groups = mup_groups(net, 1e-3, width / 64) if rates == "mup" else net.parameters()
    optimizer = torch.optim.Adam(groups, lr=1e-3, eps=1e-20)
    before_D = layer(x_D).detach()
    (layer(x_D) * x_D).sum().backward()
    optimizer.step()
    change = (layer(x_D) - before_D).detach().square().mean().sqrt()
    return float(change), 64 * 1e-3 * float(x_D.abs().mean())


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_one_step_changes_features_alike_at_any_width(width):
    change, expected = change_of_output(width, "mup")
    assert change == pytest.approx(expected, rel=1e-9)
    assert change_of_output(width, "standard")[0] == pytest.approx(expected * width / 64, rel=1e-9)


def test_frozen_parameters_are_left_out_and_bad_values_refused():
    model = language_model()
    model.embed_tokens.weight.requires_grad_(False)
    assert "embedding" not in {group["mup_class"] for group in mup_groups(model, 0.01, 2)}
    for options in ({"lr": 0, "width": 1}, {"lr": 1, "width": 0}, {"lr": 1, "width": 1, "alpha": 2}):
        with pytest.raises(ValueError, match="must"):
            mup_groups(model, **options)
