"""Our language model beside transformers' Qwen3 and Qwen3-MoE on random weights: logits, losses, gradients, text."""

import pytest
import torch

from lit_interns1.data.packed_batch import IGNORED_LABEL
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig, generate
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives import NextTokenCrossEntropy
from reference_weights import load_reference_weights, reference_gradients

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
CASES = [
    # seed, query heads, key/value heads, experts, experts per token (None = dense), tied
    (0, 4, 2, 8, 4, False),
    (1, 8, 1, 16, 2, True),
    (2, 4, 4, 8, 1, False),
    (3, 6, 3, 12, 3, True),
    (4, 4, 2, None, None, False),
    (5, 8, 2, None, None, True),
]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.detach() - reference.detach()).norm() / reference.detach().norm())


def build_pair(seed, heads, kv_heads, experts, per_token, tied, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }  # fmt: skip
    moe = None
    if experts is None:
        reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    else:
        moe = MoEConfig(experts, per_token, 24, **changes)
        reference = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **shape,
                num_experts=experts,
                num_experts_per_tok=per_token,
                moe_intermediate_size=24,
                norm_topk_prob=moe.normalize_weights,
                decoder_sparse_step=1,
                mlp_only_layers=[],
            )
        )
        reference.set_experts_implementation("eager")
    reference = reference.to(dtype).eval()
    config = LanguageModelConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=16,
        intermediate_size=64, moe=moe, positions=PositionConfig(theta=1e4, max_position_embeddings=64),
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LanguageModel.create(config).to(dtype)
    load_reference_weights(model, dict(reference.state_dict()))
    return model, reference


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED_LABEL)], dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_loss_balance_loss_and_gradients(case):
    model, reference = build_pair(*case)
    ids = torch.randint(0, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(case[0]))
    is_moe = case[3] is not None
    extra = {"output_router_logits": True} if is_moe else {}
    expected = reference(ids, labels=ids, **extra)
    expected.loss.backward()

    assert relative(model(ids).logits, expected.logits) < 1e-5
    labels = next_tokens(ids).flatten()
    objective = NextTokenCrossEntropy()
    output = model(ids, targets=labels, gradient_hint=objective.gradient_hint(labels))
    loss = objective(output.scores, labels)[0].mean
    if is_moe:
        coefficient = reference.config.router_aux_loss_coef
        balance, metrics = BalanceLoss("huggingface", coefficient)(output.router_stats)
        assert metrics["balance"].item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
        loss = loss + balance
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    wanted = reference_gradients({name: p.grad for name, p in reference.named_parameters()})
    assert set(gradients) == set(wanted)
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        # with one expert per token only the balance loss moves the router: rounding of the zero task gradient remains
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-8 * whole, name


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "dense"])
def test_packed_rows_equal_documents_run_alone(case, backend):
    from dataclasses import replace

    model, reference = build_pair(*case)
    model.config = replace(model.config, attention_backend=backend)
    lengths = [5, 17, 1, 9, 16, 2]
    generator = torch.Generator().manual_seed(7)
    documents = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        packed = model(torch.cat(documents), cu_seqlens=cu_seqlens).logits
        alone = torch.cat([reference(document[None]).logits[0] for document in documents])
    assert relative(packed, alone) < 1e-5


def test_router_weights_are_not_normalised_where_the_config_says_so():
    model, reference = build_pair(*CASES[0], normalize_weights=False)
    ids = torch.arange(12)[None]
    assert relative(model(ids).logits, reference(ids).logits) < 1e-5


def test_norm_rotary_and_router_are_bit_equal_in_bfloat16():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

    from lit_interns1.nn.rotary import apply_rotary

    model, reference = build_pair(*CASES[0], dtype=torch.bfloat16, router_dtype="native")
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(40, 48, generator=generator)).to(torch.bfloat16)
    ours, theirs = model.layers[0], reference.model.layers[0]
    with torch.no_grad():
        norm = torch.rand(48, generator=generator).to(torch.bfloat16)
        ours.input_layernorm.weight.copy_(norm)
        theirs.input_layernorm.weight.copy_(norm)
        assert torch.equal(ours.input_layernorm(x), theirs.input_layernorm(x))

        positions = torch.arange(40)
        q = torch.randn(40, 4, 16, generator=generator).to(torch.bfloat16)
        k = torch.randn(40, 2, 16, generator=generator).to(torch.bfloat16)
        cos, sin = reference.model.rotary_emb(x[None], positions[None])
        expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        ours_q, ours_k = apply_rotary(q, k, *model.rotary_emb(positions))
        assert torch.equal(ours_q, expected_q[0].transpose(0, 1))
        assert torch.equal(ours_k, expected_k[0].transpose(0, 1))

        routing = ours.mlp.router(x)
        logits, weights, ids = theirs.mlp.gate(x)
        assert torch.equal(routing.logits_TE.to(torch.bfloat16), logits)
        assert torch.equal(routing.weights_TK, weights)
        assert torch.equal(routing.ids_TK, ids)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_greedy_text_equals_transformers_generate(case):
    model, reference = build_pair(*case)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 11, 7)]
    ours = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    for prompt, tokens in zip(prompts, ours.token_ids, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()
