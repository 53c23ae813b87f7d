import pytest
import torch
from torch import nn

from lit_interns1.models import LanguageModel, preset
from lit_interns1.nn.initialization import draw_normal, initialize_parameters, materialize


def test_weights_depend_on_names_and_seed_only():
    torch.manual_seed(1)
    one = LanguageModel.create(preset("tiny-s1-pro"), seed=3)
    torch.manual_seed(2)
    with torch.device("meta"):
        two = LanguageModel(preset("tiny-s1-pro"))
    materialize(two, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = LanguageModel.create(preset("tiny-s1-pro"), seed=4)
    assert not torch.equal(one.layers[0].self_attn.q_proj.weight, other.layers[0].self_attn.q_proj.weight)


def test_distributions():
    model = LanguageModel.create(preset("tiny-s1-pro", initializer_range=0.05))
    assert (model.norm.weight == 1).all()
    for weight in (model.embed_tokens.weight, model.lm_head.weight, model.layers[1].mlp.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert abs(weight.mean().item()) < 0.002
    experts = model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1])
    assert torch.equal(experts[5], draw_normal("0:layers.0.mlp.experts.gate_up_proj:5", tuple(experts.shape[1:]), 0.05))


def test_tied_weights_stay_tied_and_are_drawn_once():
    model = LanguageModel.create(preset("tiny-s1", tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = LanguageModel.create(preset("tiny-s1"))
    assert torch.equal(model.embed_tokens.weight, untied.embed_tokens.weight)


def test_a_module_that_does_not_say_how_it_starts_is_refused():
    class Mystery(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))

    with pytest.raises(TypeError, match="Mystery has the parameter 'scale'"):
        initialize_parameters(Mystery())
