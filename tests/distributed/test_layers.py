"""What layers do on several ranks: the same initial weights in every layout, the balance loss over all ranks."""

from types import SimpleNamespace

import torch

from distributed_harness import run_ranks
from lit_interns1.models import LanguageModel, preset
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.moe import BalanceLoss, RouterStats
from lit_interns1.training import WindowMeans

CONFIG = preset("tiny-s1-pro", vocab_size=96, num_layers=2)


def sharded_weights(rank, world_size):
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    for block in model.layers:
        fully_shard(block.mlp.experts)
        fully_shard(block)
    fully_shard(model)
    materialize(model, seed=5)
    gathered = {name: p.full_tensor() for name, p in model.named_parameters()}
    return {**gathered, "sin_coef": model.rotary_emb.sin_coef, "frequencies": model.rotary_emb.frequencies}


def test_initial_weights_are_the_same_in_every_layout():
    whole = LanguageModel.create(CONFIG, seed=5)
    expected = dict(whole.named_parameters())
    expected |= {"sin_coef": whole.rotary_emb.sin_coef, "frequencies": whole.rotary_emb.frequencies}
    for gathered in run_ranks(sharded_weights, 2):
        assert gathered.keys() == expected.keys()
        for name, value in gathered.items():
            assert torch.equal(value, expected[name]), name


def statistics(logits):
    ids = logits.topk(2).indices
    return RouterStats.measure(logits, logits.softmax(-1), ids)


def micro_batches(rank, requires_grad=False):
    """Two micro-batches of a rank; rank 1 has more tokens."""
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(count * (rank + 1), 6, generator=generator) + torch.arange(6) / 3).requires_grad_(requires_grad)
        for count in (8, 5)
    ]


def global_balance(rank, world_size):
    loss = BalanceLoss("global", coefficient=1.0)
    parts, means = [], WindowMeans()
    for logits in micro_batches(rank, requires_grad=True):
        value, _ = loss([statistics(logits)])
        (gradient,) = torch.autograd.grad(value, logits)
        parts.append((value.item(), gradient))
        means.add({"balance": value}, float(len(logits)))
    return parts, means.reduce()["balance"].item()


def test_global_balance_loss_uses_the_load_of_all_ranks_and_of_the_step_so_far():
    results = run_ranks(global_balance, 2)
    everything = [micro_batches(rank) for rank in range(2)]
    for step in range(2):
        seen = torch.cat([logits for rank in everything for logits in rank[: step + 1]])
        load = torch.bincount(seen.topk(2).indices.flatten(), minlength=6) / (2 * len(seen))
        for rank in range(2):
            logits = everything[rank][step].clone().requires_grad_()
            expected = 6 * (load * logits.softmax(-1).mean(0)).sum()
            (gradient,) = torch.autograd.grad(expected, logits)
            value, ours = results[rank][0][step]
            assert abs(value - expected.item()) < 1e-5
            torch.testing.assert_close(ours, gradient)
    weights = [[8, 5], [16, 10]]
    total = sum(w * results[r][0][i][0] for r in range(2) for i, w in enumerate(weights[r]))
    assert abs(results[0][1] - total / 39) < 1e-5
    assert results[0][1] == results[1][1]


def bias_after_a_step(rank, world_size):
    """One optimizer step of the bias callback with tokens of this rank only."""
    from dataclasses import replace

    from lit_interns1.callbacks import ExpertBiasUpdate
    from lit_interns1.models import MoEConfig

    config = replace(CONFIG, moe=MoEConfig(8, 2, 32, router="sigmoid"))
    model = LanguageModel.create(config).train()
    callback, trainer = ExpertBiasUpdate(rate=0.5), SimpleNamespace(callbacks=[])
    callback.on_train_start(None, model)
    counts = torch.zeros(2, 8)
    for micro in range(2):
        tokens = torch.arange(40 * (rank + 1)) * (7 + rank + micro) % 96
        counts += torch.stack([stats.counts_E for stats in model(tokens).router_stats])
    callback.on_before_optimizer_step(trainer, model, None)
    model.eval()(torch.arange(5))  # evaluation does not count
    callback.on_before_optimizer_step(trainer, model, None)
    return counts, torch.stack([layer.router.expert_bias for layer in model.moe_layers])


def test_expert_bias_moves_by_the_counts_of_all_ranks_and_micro_batches():
    (first, bias), (second, same) = run_ranks(bias_after_a_step, 2)
    counts = first + second
    assert torch.equal(bias, 0.5 * torch.sign(counts.mean(-1, keepdim=True) - counts))
    assert torch.equal(bias, same)
