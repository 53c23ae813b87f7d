"""Reward models: the body of a language model, a value per token, and where texts end."""

from dataclasses import replace

import pytest
import torch

from lit_interns1.models import LanguageModel, RewardModel, count_parameters, flops_per_token, preset
from lit_interns1.models.config import changed
from lit_interns1.models.reward_model import at_ends, last_positions

CONFIG = changed(preset("tiny-s1-pro"), {"vocab_size": 64, "num_layers": 2})


def twin(config=CONFIG, head_std=0.5):
    """A language model, and a reward model with its body."""
    language_model = LanguageModel.create(config, seed=3)
    reward_model = RewardModel(config, head_std)
    reward_model.load_state_dict(
        {k: v for k, v in language_model.state_dict().items() if not k.startswith("lm_head")}
        | {"value_head.weight": torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(0))}
    )
    for module in (language_model, reward_model):
        module.rotary_emb.reset_buffers()
    return language_model, reward_model


@pytest.mark.parametrize("tied", [False, True])
def test_value_is_head_times_hidden_of_the_language_model(tied):
    language_model, reward_model = twin(replace(CONFIG, tie_word_embeddings=tied))
    ids = torch.randint(0, 64, (23,), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 9, 23], dtype=torch.int32)
    hidden_TD = language_model(ids, cu_seqlens=cu_seqlens).hidden_TD
    output = reward_model(ids, cu_seqlens=cu_seqlens)
    expected_T = hidden_TD.double() @ reward_model.value_head.weight[0].double()
    torch.testing.assert_close(output.values_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    assert output.values_T.dtype == torch.float32
    assert len(output.router_stats) == 2
    assert output.routing is None
    assert "lm_head.weight" not in reward_model.state_dict()
    # the value of a document does not depend on its neighbours
    alone_T = reward_model(ids[9:]).values_T
    torch.testing.assert_close(alone_T, output.values_T[9:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_ends(output.values_T, cu_seqlens), output.values_T[[8, 22]])
