"""Reward models: the body of a language model, a value per token, and where texts end."""

from dataclasses import replace

import pytest
import torch

from gguf_files import CONFIGS, random_model, write_model
from lit_interns1.checkpoints import WeightsError, load_pretrained_model
from lit_interns1.models import LanguageModel, RewardModel, count_parameters, flops_per_token, preset
from lit_interns1.models.config import changed
from lit_interns1.models.reward_model import at_ends, last_positions
from lit_interns1.modules.initial_weights import load_weights
from lit_interns1.modules.reward_model_module import load_reward_model
from lit_interns1.nn.initialization import materialize

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


def test_values_start_at_zero_unless_asked_otherwise_and_depend_on_the_seed_only():
    ids = torch.arange(10)
    assert RewardModel.create(CONFIG).value_head(torch.ones(3, CONFIG.hidden_size)).tolist() == [0.0] * 3
    weights = []
    for seed in (1, 1, 2):
        model = RewardModel(CONFIG, head_std=0.2)
        materialize(model, seed=seed)
        weights.append(model.value_head.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].std()) == pytest.approx(0.2, rel=0.3)
    body = LanguageModel.create(CONFIG, seed=7).state_dict()
    for name, tensor in RewardModel.create(CONFIG, seed=7).state_dict().items():
        assert name == "value_head.weight" or torch.equal(tensor, body[name]), name
    with pytest.raises(ValueError, match=r"initializer_std = -0.1 must be at least 0"):
        RewardModel(CONFIG, head_std=-0.1)
    assert RewardModel.create(CONFIG)(ids).values_T.shape == (10,)


def test_routing_is_recorded_and_replayed_and_recomputed():
    _, model = twin(replace(CONFIG, activation_checkpointing="none"))
    _, again = twin(replace(CONFIG, activation_checkpointing="block"))
    ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(2))
    output = model(ids, record_routing=True)
    replayed = model(ids, routed_experts_TLK=output.routing.stacked())
    torch.testing.assert_close(replayed.values_T, output.values_T)
    recomputed = again(ids)
    for one in (output, recomputed):
        one.values_T.sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_values_are_float32_whatever_the_model_computes_in():
    _, model = twin()
    ids = torch.arange(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids)
    assert output.values_T.dtype == torch.float32
    expected_T = output.hidden_TD.double() @ model.value_head.weight[0].double()
    torch.testing.assert_close(output.values_T.double(), expected_T, rtol=1e-5, atol=1e-5)


def test_ends_of_documents():
    sample_id_T = torch.tensor([0, 0, 1, -1, -1, 2, 2, 2, -1])
    assert last_positions(sample_id_T).tolist() == [1, 2, 7]
    values_T = torch.arange(9.0)
    assert at_ends(values_T, sample_id_T=sample_id_T).tolist() == [1.0, 2.0, 7.0]
    assert at_ends(values_T, torch.tensor([0, 4, 9])).tolist() == [3.0, 8.0]
    assert at_ends(values_T, sample_id_T=torch.full((9,), -1)).tolist() == []
    for arguments in (
        {}, {"cu_seqlens": torch.tensor([0, 9]), "sample_id_T": sample_id_T}, {"cu_seqlens": torch.tensor([0, 8])},
        {"cu_seqlens": torch.tensor([0, 4, 4, 9])}, {"sample_id_T": sample_id_T[1:]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"give either|must rise|does not fit"):
            at_ends(values_T, **arguments)


def test_plan_leaves_nothing_out_and_counts_are_those_of_what_is_multiplied():
    config = replace(CONFIG, tie_word_embeddings=True)
    model = RewardModel.create(config)
    plan = model.parallel_plan()
    units = [*plan.units, *plan.float32]
    covered = {id(p) for unit in units for p in unit.parameters()}
    assert covered == {id(p) for p in model.parameters()}
    assert model.value_head in plan.float32
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    # 6 per weight that is multiplied: all but the embedding, which is looked up only
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * 10
    assert flops_per_token(model, 10) == 6 * (counts.active - model.embed_tokens.weight.numel()) + attention


# -- weights from elsewhere


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_reward_models_of_transformers(tmp_path, kind):
    """Classes for sequence classification with one label: the value at the last token is their logit."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "dense":
        theirs = transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**sizes))
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        theirs = transformers.Qwen3MoeForSequenceClassification(transformers.Qwen3MoeConfig(**sizes, **moe))
    theirs.eval().save_pretrained(tmp_path)
    ours = load_reward_model(tmp_path)
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, 0]
        values_T = ours(ids).values_T
    torch.testing.assert_close(values_T.view(3, 9)[:, -1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightsError, match=r"unexpected.*score\.weight|score\.weight"):
        load_pretrained_model(tmp_path)  # a language model has no place for the score


def test_a_gguf_file_of_a_language_model_gives_the_body(tmp_path):
    language_model = random_model(CONFIGS["llama"])
    path = write_model(tmp_path / "model.gguf", language_model, "llama")
    model = RewardModel(CONFIGS["llama"], head_std=0.5)
    loaded = load_weights(model, path, seed=1)
    assert loaded.fresh == ("value_head.weight",)
    assert loaded.elsewhere == {"output.weight": 1}
    for name, tensor in language_model.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(model.state_dict()[name], tensor)
    assert float(model.value_head.weight.detach().std()) == pytest.approx(0.5, rel=0.3)
