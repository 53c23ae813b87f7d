from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from lit_interns1.models import LanguageModel, MoEConfig, preset
from lit_interns1.nn.moe import BalanceLoss, RoutingRecord
from lit_interns1.objectives import NextTokenCrossEntropy

CONFIG = preset("tiny-s1-pro", vocab_size=64, num_layers=2, initializer_range=0.2)
IDS = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(0))
BOUNDARIES = torch.tensor([0, 25, 26, 60])


def run(model, **options):
    model.zero_grad()
    labels = IDS.roll(-1)
    objective = NextTokenCrossEntropy()
    output = model(IDS, cu_seqlens=BOUNDARIES, targets=labels, gradient_hint=objective.gradient_hint(labels), **options)
    loss = objective(output.scores, labels)[0].mean + BalanceLoss("layer", 0.1, 0.01)(output.router_stats)[0]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, output


@pytest.mark.parametrize("changes", [{}, {"moe": MoEConfig(16, 4, 32, router="sigmoid", num_groups=2)}], ids=str)
def test_activation_checkpointing_changes_nothing(changes):
    config = replace(CONFIG, **changes)
    plain = LanguageModel.create(config)
    recomputing = LanguageModel.create(replace(config, activation_checkpointing="block"))
    loss, gradients, output = run(plain)
    loss_again, gradients_again, output_again = run(recomputing)
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    for stats, stats_again in zip(output.router_stats, output_again.router_stats, strict=True):
        assert torch.equal(stats.counts_E, stats_again.counts_E)
        assert stats.num_tokens == stats_again.num_tokens == 60


def inject_near_tie(model):
    """From its second call on, every router that may choose ranks experts the other way round: a near-tie at worst."""
    for layer in model.moe_layers:
        decide = layer.router.decide
        calls = []

        def flipping(logits, replay, decide=decide, calls=calls):
            calls.append(1)
            if len(calls) > 1:
                with torch.no_grad():
                    replay = decide(-logits, replay)[1]
            return decide(logits, replay)

        layer.router.decide = flipping


def test_recomputation_replays_the_record_where_it_would_choose_other_experts(monkeypatch):
    config = replace(CONFIG, activation_checkpointing="block")
    _, expected, _ = run(LanguageModel.create(config))
    model = LanguageModel.create(config)
    inject_near_tie(model)
    _, gradients, _ = run(model)
    for name, gradient in expected.items():
        assert torch.equal(gradient, gradients[name]), name

    monkeypatch.setattr(RoutingRecord, "get", lambda self, layer: None)
    without = LanguageModel.create(config)
    inject_near_tie(without)
    try:
        _, gradients, _ = run(without)
    except CheckpointError:
        return  # torch noticed that other shapes came out
    assert any(not torch.allclose(gradients[name], expected[name], rtol=1e-2) for name in expected)


def test_recorded_routing_replays_to_the_same_output():
    model = LanguageModel.create(CONFIG)
    _, gradients, output = run(model, record_routing=True)
    ids = output.routing.stacked()
    assert ids.shape == (60, 2, 4)
    for layer, stats in enumerate(output.router_stats):
        assert torch.equal(torch.bincount(ids[:, layer].flatten().long(), minlength=32).float(), stats.counts_E)
    inject_near_tie(model)
    for layer in model.moe_layers:
        layer.router.decide(torch.zeros(1, 32), None)  # from now on a live choice would differ
    _, replayed, output = run(model, routed_experts_TLK=ids)
    assert all(torch.equal(gradient, replayed[name]) for name, gradient in gradients.items())
    live = ids.clone()
    live[7] = -1
    mixed = model(IDS, cu_seqlens=BOUNDARIES, routed_experts_TLK=live, record_routing=True).routing.stacked()
    different = (mixed != ids).any(-1).any(-1)
    assert different.nonzero().flatten().tolist() == [7]
    with pytest.raises(ValueError, match="routing of 1 layers for 2 MoE layers"):
        model(IDS, routed_experts_TLK=ids[:, :1])


def test_rows_and_flat_tokens_are_the_same():
    model = LanguageModel.create(CONFIG)
    rows = IDS.view(3, 20)
    with torch.no_grad():
        flat = model(IDS, cu_seqlens=torch.arange(4) * 20)
        two_dimensional = model(rows)
        embedded = model(inputs_embeds_TD=model.embed_tokens(IDS), cu_seqlens=torch.arange(4) * 20)
        last = model(rows, logits_index=torch.tensor([19, 59]))
    assert two_dimensional.logits.shape == (3, 20, 64)
    assert torch.equal(flat.logits, two_dimensional.logits.view(60, 64))
    assert torch.equal(flat.logits, embedded.logits)
    torch.testing.assert_close(last.logits, flat.logits[[19, 59]])


def test_padding_is_left_out_of_the_statistics():
    model = LanguageModel.create(CONFIG)
    mask = torch.arange(60) < 26
    stats = model(IDS, cu_seqlens=BOUNDARIES, token_mask_T=mask).router_stats
    alone = model(IDS[:26], cu_seqlens=BOUNDARIES[:3]).router_stats
    for masked, expected in zip(stats, alone, strict=True):
        assert torch.equal(masked.counts_E, expected.counts_E)


def test_mixed_dense_and_sparse_layers_and_a_frozen_router():
    config = replace(CONFIG, num_layers=3, dense_layers=(1,), intermediate_size=32)
    config = replace(config, moe=replace(config.moe, freeze_router=True))
    model = LanguageModel.create(config)
    output = model(IDS, cu_seqlens=BOUNDARIES, record_routing=True)
    assert len(output.router_stats) == 2
    assert output.routing.stacked().shape == (60, 2, 4)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "layers.0.mlp.router.weight",
        "layers.2.mlp.router.weight",
    ]


def test_wrong_inputs():
    model = LanguageModel.create(CONFIG)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds_TD"):
        model()
    with pytest.raises(ValueError, match="cu_seqlens ends at 50, but there are 60 tokens"):
        model(IDS, cu_seqlens=torch.tensor([0, 50]))
    with pytest.raises(ValueError, match=r"\(tokens,\) or \(rows, length\)"):
        model(IDS.view(3, 4, 5))


def test_bfloat16_training_step_is_finite():
    model = LanguageModel.create(CONFIG).to(torch.bfloat16)
    loss, gradients, _ = run(model)
    exact, _, _ = run(LanguageModel.create(CONFIG))
    assert abs(loss - exact) / exact < 0.05
    assert all(gradient.isfinite().all() for gradient in gradients.values())
