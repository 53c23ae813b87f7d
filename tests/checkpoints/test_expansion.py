"""Grown models: closed forms of the expanded layers, and windows that give the same bits however they are read."""

from dataclasses import replace
from itertools import product
from math import comb

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distributed_harness import run_ranks
from lit_interns1.checkpoints import WeightsError
from lit_interns1.checkpoints.exact_moments import exact_sums, moments
from lit_interns1.checkpoints.expanded_source import ExpandedSource, StateDictSource, expand_experts
from lit_interns1.checkpoints.expansion import (
    Expansion,
    expanded_config,
    expert_sources,
    grouped_assignment,
    ranked_assignment,
)
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1_kernels.routing import route

SPARSE = LanguageModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, initializer_range=0.3,
    moe=MoEConfig(num_experts=16, experts_per_token=8, intermediate_size=16),
    positions=PositionConfig(theta=3e3, max_position_embeddings=128),
)  # fmt: skip
DENSE = replace(SPARSE, moe=None, intermediate_size=48)
EXACT = Expansion(num_experts=64, num_groups=8, router_noise=0.0)
IDS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))


def grown(model, expansion):
    result = expand_experts(model.state_dict(), model.config, expansion)
    other = LanguageModel(result.config)
    other.load_state_dict(result.state_dict)
    return other, result


def loss(model, ids=IDS):
    scores = model(ids, targets=ids.roll(-1, 1)).scores
    return -scores.logp_T.double().mean()


def expert(gate_up, down, x):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def closed_form(x_TD, router, gate_up, down, halves):
    """A layer that was expanded in groups, two to a replica, from the old weights: for every replica the best expert
    of all, and the best of the half in which that one is not."""
    result = []
    for x in x_TD:
        p = (router @ x).softmax(0)
        first = int(p.argmax())
        y, total = torch.zeros_like(x), torch.zeros((), dtype=p.dtype)
        for replica in halves:
            other = next(half for half in replica if first not in half)
            best = max(other, key=lambda e: float(p[e]))
            y = y + p[first] * expert(gate_up[first], down[first], x) + p[best] * expert(gate_up[best], down[best], x)
            total = total + p[first] + p[best]
        result.append(y / total)
    return torch.stack(result)


def halves_of(sources_E):
    return sources_E.view(4, 2, 8).tolist()


# -- the identity ------------------------------------------------------------------------------------------------------


def test_grouped_layer_is_its_closed_form_in_float64():
    generator = torch.Generator().manual_seed(2)
    old = {
        "layers.0.mlp.router.weight": torch.randn(16, 32, generator=generator, dtype=torch.float64),
        "layers.0.mlp.experts.gate_up_proj": torch.randn(16, 48, 32, generator=generator, dtype=torch.float64),
        "layers.0.mlp.experts.down_proj": torch.randn(16, 32, 24, generator=generator, dtype=torch.float64),
    }
    config = replace(SPARSE, num_layers=1, moe=replace(SPARSE.moe, intermediate_size=24))
    new = expand_experts(old, config, EXACT)
    router, gate_up, down = (new.state_dict[name] for name in old)
    x_TD = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    weights, ids, _ = route(x_TD @ router.T, 8, 8)
    y = torch.stack(
        [sum(w * expert(gate_up[e], down[e], x) for w, e in zip(*row)) for x, *row in zip(x_TD, weights, ids)]
    )
    expected = closed_form(x_TD, *old.values(), halves_of(new.sources_LE[0]))
    assert (y - expected).abs().max() < 1e-12 * expected.abs().max()


class ClosedForm(nn.Module):
    """Stands in the old model where the layer was."""

    def __init__(self, layer, sources_E):
        super().__init__()
        self.layer, self.halves = layer, halves_of(sources_E)

    def forward(self, x_TD, *args):
        _, routing = self.layer(x_TD)
        weights = self.layer.router.weight, self.layer.experts.gate_up_proj, self.layer.experts.down_proj
        return closed_form(x_TD, *weights, self.halves), routing


@torch.no_grad()
def test_grouped_model_is_its_closed_form():
    model = LanguageModel.create(SPARSE, seed=3)
    other, result = grown(model, EXACT)
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for layer, new, sources_E in zip(model.moe_layers, other.moe_layers, result.sources_LE):
        expected = ClosedForm(layer, sources_E)(x_TD)[0]
        assert (new(x_TD)[0] - expected).abs().max() < 2e-6 * expected.abs().max()
    unlike = model(IDS).logits
    for block, sources_E in zip(model.layers, result.sources_LE):
        block.mlp = ClosedForm(block.mlp, sources_E)
    expected, found = model(IDS).logits, other(IDS).logits
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert (found - unlike).abs().max() > 0.01 * unlike.abs().max()  # the function is another one than before


@torch.no_grad()
def test_former_ranks_of_the_chosen_experts():
    z_TE = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    rank_TE = z_TE.argsort(-1, descending=True).argsort(-1)

    def shares(sources_E):
        _, ids_TK, _ = route(z_TE[:, sources_E], 8, 8)
        ranks_TK = rank_TE.gather(1, sources_E[ids_TK])
        return ranks_TK.flatten().bincount(minlength=16) / ranks_TK.numel(), ids_TK

    # grouped: of two halves one has the best; rank k is the best of the other, if the k − 2 between are not there
    found, _ = shares(grouped_assignment(16, 64, 8, 0, 0))
    expected = [0.5] + [0.5 * comb(14 - k, 7) / comb(15, 8) for k in range(15)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.006, rtol=0)
    assert [round(float(f), 1) for f in found[:3]] == [0.5, 0.3, 0.1]
    # ranked: the better of a pair, in each of 8 pairs
    sources_E = ranked_assignment(16, 64, 8, 0, 0)
    found, ids_TK = shares(sources_E)
    expected = [(15 - k) / 15 / 8 for k in range(16)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.006, rtol=0)
    assert (ids_TK // 8 == torch.arange(8)).all()  # one of each group, hence one of its four copies
    chosen = sources_E[ids_TK].sort(-1).values
    assert (chosen.diff(dim=-1) > 0).all()


# -- assignments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "groups"), [(16, 64, 8), (128, 512, 8), (8, 8, 4), (6, 18, 3)])
def test_every_replica_of_a_grouped_assignment_holds_every_old_expert_once(old, new, groups):
    table = torch.stack([grouped_assignment(old, new, groups, 0, layer) for layer in range(4)])
    assert table.shape == (4, new)
    replicas = table.view(4, new // old, old)
    assert torch.equal(replicas.sort(-1).values, torch.arange(old).expand_as(replicas))
    if groups > new // old > 1:  # with one group to a replica all groups are the same
        assert len(table.unique(dim=0)) == 4
        sets = replicas.view(4, new // old, -1, new // groups)[0, :, 0].tolist()
        assert len({tuple(sorted(row)) for row in sets}) == new // old


def test_ranked_assignment_puts_all_copies_of_an_expert_into_one_group():
    for layer in range(3):
        groups_GE = ranked_assignment(16, 64, 8, 0, layer).view(8, 8)
        for row in groups_GE.tolist():
            assert len(set(row)) == 2
            assert all(row.count(e) == 4 for e in set(row))
        assert groups_GE.flatten().bincount().tolist() == [4] * 16


def test_a_layers_assignment_depends_on_seed_and_layer_only():
    torch.manual_seed(7)
    table = expert_sources(SPARSE, EXACT)
    torch.manual_seed(8)
    more = expert_sources(replace(SPARSE, num_layers=5), EXACT)
    assert torch.equal(table, more[:2])
    mixed = expert_sources(replace(SPARSE, num_layers=5, dense_layers=(0, 2), intermediate_size=8), EXACT)
    assert torch.equal(mixed, more[[1, 3, 4]])
    assert not torch.equal(table, expert_sources(SPARSE, replace(EXACT, seed=1)))
    assert table[0, :16].tolist() == [3, 5, 6, 8, 11, 13, 14, 15, 0, 1, 2, 4, 7, 9, 10, 12]


# -- weights -----------------------------------------------------------------------------------------------------------


def test_experts_are_copied_and_router_rows_get_relative_noise():
    model = LanguageModel.create(SPARSE)
    with torch.no_grad():
        model.moe_layers[0].router.weight.mul_(torch.logspace(-3, 3, 16)[:, None])
    _, plain = grown(model, EXACT)
    _, noisy = grown(model, replace(EXACT, router_noise=0.05))
    for layer, sources_E in enumerate(plain.sources_LE):
        block, old = f"layers.{layer}.mlp.", model.state_dict()
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            assert torch.equal(plain.state_dict[block + name], old[block + name][sources_E])
            assert torch.equal(plain.state_dict[block + name], noisy.state_dict[block + name])
        name = f"{block}router.weight"
        assert torch.equal(plain.state_dict[name], old[name][sources_E])
        change = noisy.state_dict[name].double() - plain.state_dict[name].double()
        relative = change / plain.state_dict[name].double().std(-1, unbiased=False, keepdim=True)
        assert abs(relative.std() / 0.05 - 1) < 0.05
        assert abs(relative.mean()) < 0.005
        assert len(noisy.state_dict[name].unique(dim=0)) == 64  # copies differ
    untouched = [name for name in plain.state_dict if "mlp" not in name]
    assert all(torch.equal(plain.state_dict[name], model.state_dict()[name]) for name in untouched)


def test_expert_noise_and_the_bias_of_a_sigmoid_router():
    config = replace(SPARSE, moe=replace(SPARSE.moe, router="sigmoid"))
    model = LanguageModel.create(config)
    model.moe_layers[1].router.expert_bias.copy_(torch.arange(16.0))
    other, result = grown(model, replace(EXACT, router_noise=0.2, expert_noise=0.1))
    assert other.config.moe == replace(config.moe, num_experts=64, num_groups=8)
    assert torch.equal(other.moe_layers[1].router.expert_bias, result.sources_LE[1].float())
    old, new = model.moe_layers[0].experts, other.moe_layers[0].experts
    for mine, theirs in ((new.gate_up_proj, old.gate_up_proj), (new.down_proj, old.down_proj)):
        copied = theirs.detach()[result.sources_LE[0]]
        relative = (mine.detach() - copied) / copied.std(-1, unbiased=False, keepdim=True)
        assert abs(relative.std() / 0.1 - 1) < 0.02
        assert len(mine.detach().flatten(1).unique(dim=0)) == 64


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_a_dense_model_made_sparse_is_the_same_function(groups):
    model = LanguageModel.create(DENSE, seed=5)
    expansion = Expansion(num_experts=8, experts_per_token=4, num_groups=groups, dense_layers=(1,), router_std=0.7)
    other, result = grown(model, expansion)
    assert other.config.is_moe_layer(0)
    assert not other.config.is_moe_layer(1)
    assert result.sources_LE is None
    assert other.config.moe.router == ("grouped" if groups > 1 else "topk")
    assert abs(loss(other) - loss(model)) < 1e-6
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    router = other.moe_layers[0].router.weight
    assert abs(router.std() / 0.7 - 1) < 0.1
    whole, _ = grown(model, replace(expansion, dense_layers=(), router_std=None))
    assert whole.config.num_moe_layers == 2
    assert whole.config.intermediate_size == 0
    assert abs(whole.moe_layers[1].router.weight.std() / DENSE.initializer_range - 1) < 0.2
    assert abs(loss(whole) - loss(model)) < 1e-6
    noisy, _ = grown(model, replace(expansion, expert_noise=0.2))
    up = noisy.moe_layers[0].experts.gate_up_proj
    assert len(up.flatten(1).unique(dim=0)) == 8
    assert abs((up - other.moe_layers[0].experts.gate_up_proj).std() / (0.2 * 0.3) - 1) < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_the_mean_of_the_old_ones(tied):
    model = LanguageModel.create(replace(SPARSE, tie_word_embeddings=tied))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(torch.logspace(-4, 2, 32)).add_(1e-3)
    other, _ = grown(model, Expansion(vocab_size=600, vocab_noise=0.0))
    noisy, _ = grown(model, Expansion(vocab_size=600, vocab_noise=0.1))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        old, new, more = (m.state_dict()[name] for m in (model, other, noisy))
        assert new.shape == (600, 32)
        assert torch.equal(new[:64], old)
        assert torch.equal(more[:64], old)
        mean = old.double().mean(0)
        torch.testing.assert_close(new[64:].double(), mean.expand(536, -1), rtol=1e-6, atol=0)
        relative = (more[64:].double() - mean) / old.double().std(0, unbiased=False)
        torch.testing.assert_close(relative.std(0), torch.full((32,), 0.1, dtype=torch.float64), atol=0.015, rtol=0)
    assert (other.lm_head.weight is other.embed_tokens.weight) == tied
    smaller, _ = grown(model, Expansion(vocab_size=48, allow_smaller_vocab=True))
    assert torch.equal(smaller.embed_tokens.weight, model.embed_tokens.weight[:48])
    with pytest.raises(ValueError, match="vocab_size = 48 would cut off rows of the present 64"):
        grown(model, Expansion(vocab_size=48))


@torch.no_grad()
def test_rope_to_fope():
    model = LanguageModel.create(SPARSE)
    fope = {"kind": "fope", "fope_sin_pad": 1.0}
    other, result = grown(model, Expansion(positions=fope))
    assert result.config == replace(SPARSE, positions=replace(SPARSE.positions, **fope))
    new = LanguageModel.create(result.config, seed=9).rotary_emb
    assert torch.equal(other.rotary_emb.sin_coef, new.sin_coef)
    assert torch.equal(other.rotary_emb.cos_coef, new.cos_coef)
    # without noise and with every frequency it is RoPE; with those that the rule keeps it is not
    same, _ = grown(model, Expansion(positions={**fope, "fope_init_factor": 0.0, "fope_num_frequencies": 8}))
    torch.testing.assert_close(same(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    fewer, _ = grown(model, Expansion(positions={**fope, "fope_init_factor": 0.0}))
    assert fewer.rotary_emb.kept < 8
    assert (fewer(IDS).logits - model(IDS).logits).abs().max() > 0.01


def test_the_grown_config_has_the_shape_of_the_larger_family_member():
    from lit_interns1.models import preset

    expansion = Expansion(
        num_experts=512, num_groups=8, vocab_size=155008,
        positions={"kind": "fope", "theta": 5e6, "max_position_embeddings": 262144, "fope_sin_pad": 1.0},
    )  # fmt: skip
    assert expanded_config(preset("intern-s1-241b"), expansion) == preset("intern-s1-pro-1t")


# -- windows -----------------------------------------------------------------------------------------------------------

ALL = Expansion(
    num_experts=64, num_groups=8, router_noise=0.02, expert_noise=0.01, vocab_size=150, positions={"kind": "fope"}
)  # fmt: skip
DENSE_ALL = Expansion(num_experts=4, experts_per_token=2, expert_noise=0.01, vocab_size=150)


class Watched(StateDictSource):
    """Remembers the most numbers that were read at once."""

    most = 0

    def read(self, name, window):
        values = super().read(name, window)
        Watched.most = max(Watched.most, values.numel())
        return values


@pytest.mark.parametrize(("config", "expansion"), [(SPARSE, ALL), (DENSE, DENSE_ALL)], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_give_the_bits_of_the_whole(config, expansion, dtype):
    state = LanguageModel.create(config).to(dtype).state_dict()
    expected = expand_experts(state, config, expansion).state_dict
    source = ExpandedSource(Watched(state), config, expansion)
    assert set(source.tensors) == set(expected)
    Watched.most = 0
    for name, info in source.tensors.items():
        assert expected[name].shape == info.shape
        assert expected[name].dtype == info.dtype == (torch.float32 if "coef" in name else dtype)
        seen = torch.zeros(info.shape, dtype=torch.int32)
        for whole in source.windows(name):
            for window in small(whole):
                assert torch.equal(source.read(name, window), expected[name][window]), (name, window)
                seen[window] += 1
        assert (seen == 1).all(), name
    largest = max(t[0].numel() if "experts" in name else t.numel() for name, t in state.items())
    assert Watched.most <= largest


def small(window):
    """One expert, or some rows; the last two dimensions in halves."""
    step = 1 if len(window) == 3 else 7
    for first in range(window[0].start, window[0].stop, step):
        yield from product([slice(first, min(first + step, window[0].stop))], *(halves(part) for part in window[1:]))


def halves(part):
    middle = (part.start + part.stop) // 2
    return slice(part.start, middle), slice(middle, part.stop)


class Part(StateDictSource):
    """A process that holds a part of every tensor, divided along its last dimension but one, or its first."""

    def __init__(self, state_dict, number, parts, dim=0):
        super().__init__(state_dict)
        self.part = number, parts, dim

    def windows(self, name):
        number, parts, dim = self.part
        shape = self.state_dict[name].shape
        dim = min(dim, len(shape) - 1)
        edges = [shape[dim] * i // parts for i in range(parts + 1)]
        box = [slice(0, size) for size in shape]
        box[dim] = slice(edges[number], edges[number + 1])
        return [tuple(box)] if edges[number] < edges[number + 1] else []


@pytest.mark.parametrize(("config", "expansion"), [(SPARSE, ALL), (DENSE, DENSE_ALL)], ids=["sparse", "dense"])
def test_noise_needs_whole_rows(config, expansion):
    state = LanguageModel.create(config).state_dict()
    with pytest.raises(WeightsError, match="but this process holds columns 0 to 16 only"):
        ExpandedSource(Part(state, 0, 2, dim=1), replace(config, vocab_size=64), replace(expansion, vocab_size=None))


def contributions(rank, world, dim, sparse):
    config, expansion = (SPARSE, ALL) if sparse else (DENSE, DENSE_ALL)
    if dim:
        expansion = replace(expansion, router_noise=0.0, expert_noise=0.0)
    state = LanguageModel.create(config).state_dict()
    source = ExpandedSource(Part(state, rank, world, dim), config, expansion)
    return {name: [(w, source.read(name, w).clone()) for w in source.windows(name)] for name in source.tensors}


def all_contributions(rank, world):
    return [contributions(rank, world, dim, sparse) for dim in (0, 1) for sparse in (True, False)]


def test_processes_together_give_the_bits_of_one():
    results = run_ranks(all_contributions, 2)
    for number, (dim, (config, expansion)) in enumerate(product((0, 1), ((SPARSE, ALL), (DENSE, DENSE_ALL)))):
        if dim:
            expansion = replace(expansion, router_noise=0.0, expert_noise=0.0)
        expected = expand_experts(LanguageModel.create(config).state_dict(), config, expansion).state_dict
        for name, tensor in expected.items():
            seen = torch.zeros(tensor.shape, dtype=torch.int32)
            for result in results:
                for window, values in result[number][name]:
                    assert torch.equal(values, tensor[window]), (name, window)
                    seen[window] += 1
            assert (seen == 1).all(), name


def test_moments_do_not_depend_on_order():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(999, 5, generator=generator) * torch.tensor([1e-20, 1e-3, 1.0, 1e4, 0.0]) + 1e-3
    largest = values.double().abs().amax(0)
    whole = exact_sums(values, 0, largest, 999)
    order = torch.randperm(999, generator=generator)
    parts = sum(exact_sums(part, 0, largest, 999) for part in values[order].split(100))
    assert torch.equal(whole, parts)
    mean, deviation = moments(whole, largest, 999)
    torch.testing.assert_close(mean, values.double().mean(0), rtol=1e-12, atol=0)
    expected = values.double().std(0, unbiased=False)
    torch.testing.assert_close(deviation[1:4], expected[1:4], rtol=1e-9, atol=0)
    assert deviation[4] < 1e-9


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SPARSE, {"num_experts": 40, "num_groups": 8}, "num_experts = 40 must be a multiple of the model's 16"),
        (SPARSE, {"num_experts": 64, "num_groups": 2}, "num_groups = 2 must be divisible by 4 = 64/16"),
        (SPARSE, {"num_experts": 64}, "num_groups = 1 must be divisible by 4"),
        (SPARSE, {"num_experts": 48, "num_groups": 9}, "num_experts = 48 must be divisible by num_groups = 9"),
        (SPARSE, {"num_experts": 96, "num_groups": 32, "method": "ranked"}, "16 experts must be divisible by .* = 32"),
        (SPARSE, {"num_experts": 64, "num_groups": 16}, "experts_per_token = 8 must be divisible by .* = 16"),
        (SPARSE, {"experts_per_token": 17}, "experts_per_token = 17 exceeds moe.num_experts = 16"),
        (SPARSE, {"num_experts": 64, "num_groups": 8, "dense_layers": (0,)}, r"dense_layers = \[0\] .* has 16 experts"),
        (SPARSE, {"num_experts": 16}, "changes nothing"),
        (SPARSE, {"positions": {"fope_sin_pad": 1.0}}, "fope_sin_pad = 1.0 needs positions 'fope', got 'rope'"),
        (SPARSE, {"positions": {"base": 1}}, "has no field 'base'"),
        (DENSE, {"num_experts": 8}, "experts_per_token is needed beside num_experts = 8"),
        (DENSE, {"num_groups": 2, "vocab_size": 70}, "num_experts is needed"),
        (DENSE, {"num_experts": 8, "experts_per_token": 2, "dense_layers": (5,)}, r"dense_layers = \(5,\) must lie in"),
    ],
)  # fmt: skip
def test_what_is_not_defined_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        expanded_config(config, Expansion(**options))


def test_models_that_have_groups_or_fope_already_are_refused():
    config = expanded_config(SPARSE, Expansion(num_experts=64, num_groups=8, positions={"kind": "fope"}))
    with pytest.raises(ValueError, match=r"the router has 8 groups already: .* 64 experts to num_experts = 128 in"):
        expanded_config(config, Expansion(num_experts=128))
    with pytest.raises(ValueError, match="has FoPE already"):
        expanded_config(config, Expansion(positions={"theta": 1e6}))
    assert expanded_config(config, Expansion(vocab_size=80)).moe == config.moe  # the rest of it may grow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method = 'random' is unknown: choose one of grouped, ranked"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"router_noise": -0.1}, "router_noise must be 0 or a positive number, got -0.1"),
        ({"vocab_noise": float("nan")}, "vocab_noise must be 0 or a positive number, got nan"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Expansion(**options)


def test_weights_that_are_missing_or_not_finite():
    state = LanguageModel.create(DENSE).state_dict()
    expansion = Expansion(num_experts=4, experts_per_token=2)
    without = {name: tensor for name, tensor in state.items() if name != "layers.1.mlp.up_proj.weight"}
    with pytest.raises(WeightsError, match=r"has no layers\.1\.mlp\.up_proj\.weight"):
        expand_experts(without, DENSE, expansion)
    state["lm_head.weight"] = torch.full((64, 32), float("nan"))
    with pytest.raises(WeightsError, match=r"lm_head\.weight has numbers that are not finite"):
        expand_experts(state, DENSE, replace(expansion, vocab_size=70))
