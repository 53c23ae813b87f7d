"""Recomputation in backward changes no gradient, even where a router would choose other experts the second time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_interns1.models import LanguageModel, preset
from lit_interns1.nn.moe import MoEFeedForward, RoutedExperts, Router, TopKRouter
from lit_interns1.nn.parallel_plan import HasParallelPlan, ParallelPlan, default_plan
from lit_interns1.strategies.recompute import recompute_in_backward


class ChangeableRouter(Router):
    """Prefers the other half of the experts at every second call."""

    calls = 0

    def scores(self, logits_TE):
        return logits_TE.softmax(-1)

    def selection_scores(self, scores_TE):
        self.calls += 1
        return scores_TE + (torch.arange(self.num_experts) % 2 == self.calls % 2) * 10.0


class Network(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.layers = nn.ModuleList(MoEFeedForward(router(16, 4, 2), RoutedExperts(4, 16, 8)) for _ in range(2))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def gradients(network):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    F.mse_loss(network(x), torch.zeros(6, 16)).backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("router", [TopKRouter, ChangeableRouter])
def test_a_plain_network_keeps_its_gradients_and_experts(router):
    expected, network = gradients(Network(router)), Network(router)
    recompute_in_backward(network, default_plan(network))
    actual = gradients(network)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)
    if router is ChangeableRouter:
        assert [layer.router.calls for layer in network.layers] == [2, 2]


def numbers_kept(model):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(torch.arange(32), targets=torch.arange(32)).scores.logp_T.sum().backward()
    return sum(saved)


def test_a_language_model_recomputes_its_blocks():
    model = LanguageModel.create(preset("tiny-s1", num_layers=2, vocab_size=64), seed=1)
    assert isinstance(model, HasParallelPlan)
    before = numbers_kept(model)
    recompute_in_backward(model, model.parallel_plan())
    assert numbers_kept(model) < before / 2


def test_a_plan_that_names_nothing_is_refused():
    with pytest.raises(ValueError, match="the parallel plan of Network names no modules to recompute"):
        recompute_in_backward(Network(TopKRouter), ParallelPlan(units=[]))
