import pytest
import torch

from lit_interns1.nn.initialization import initialize_parameters
from lit_interns1.nn.moe import RoutingRecord, SigmoidRouter, TopKRouter, update_expert_bias


def make(hidden=8, experts=16, per_token=4, kind=TopKRouter, **options):
    router = kind(hidden, experts, per_token, initializer_std=0.5, **options)
    initialize_parameters(router)
    return router


def tokens(count=50, hidden=8, seed=0):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


def identity_router(logits, per_token=2, **options):
    """A router whose logits are the input itself, so that gradients of the input are gradients of the logits."""
    router = TopKRouter(len(logits), len(logits), per_token, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(len(logits)))
    return router, torch.tensor([logits], requires_grad=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient": "topk"}, (-0.235004, 0.235004, 0.0, 0.0)),
        ({"gradient": "ste"}, (-0.003214, 0.274055, -0.168587, -0.102253)),
        ({"gradient": "ste", "ste_temperature": 2.0}, (0.018374, 0.150573, -0.094978, -0.073969)),
    ],
)
def test_gradient_of_the_worked_example(options, expected):
    router, logits = identity_router((1.0, 0.5, 0.0, -0.5), **options)
    routing = router(logits)
    assert routing.ids_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([0.622459, 0.377541]), atol=1e-6, rtol=0)
    routing.weights_TK.backward(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(logits.grad[0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("groups", [1, 4])
def test_straight_through_is_bit_equal_forward_and_follows_its_closed_form(groups):
    temperature = 1.7
    sparse = make(num_groups=groups)
    dense = make(num_groups=groups, gradient="ste", ste_temperature=temperature)
    x = tokens().requires_grad_()
    expected, routing = sparse(x), dense(x)
    assert torch.equal(routing.weights_TK, expected.weights_TK)
    assert torch.equal(routing.ids_TK, expected.ids_TK)

    upstream = torch.randn(routing.weights_TK.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(routing.weights_TK, routing.logits_TE, upstream)
    soft = (routing.logits_TE.detach() / temperature).softmax(-1)
    u = torch.zeros_like(soft).scatter(-1, routing.ids_TK, upstream)
    closed = soft * (u - (u * soft).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(gradient, closed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_of_unchosen_experts_learn_only_with_the_straight_through_gradient(groups):
    x = tokens(1)
    gradients = {}
    for kind in ("topk", "ste"):
        router = make(num_groups=groups, gradient=kind)
        routing = router(x)
        (routing.weights_TK * torch.tensor([1.0, 2.0, -1.0, 0.5])).sum().backward()
        gradients[kind] = router.weight.grad
        unchosen = torch.ones(16, dtype=torch.bool)
        unchosen[routing.ids_TK[0]] = False
    assert torch.equal(gradients["topk"][unchosen], torch.zeros_like(gradients["topk"][unchosen]))
    assert (gradients["ste"][unchosen].abs().sum(-1) > 0).all()


def test_grouped_choice_takes_the_best_of_every_group():
    router = make(experts=16, per_token=4, num_groups=2)
    x = tokens(200)
    routing = router(x)
    probabilities = routing.logits_TE.softmax(-1)
    for row in range(len(x)):
        for group in range(2):
            inside = probabilities[row, group * 8 : group * 8 + 8]
            wanted = set((inside.topk(2).indices + group * 8).tolist())
            assert set(routing.ids_TK[row, group * 2 : group * 2 + 2].tolist()) == wanted
    load = routing.stats.counts_E.view(2, 8).sum(-1)
    assert load.tolist() == [400.0, 400.0]
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(200))


def test_one_group_is_the_plain_router():
    x = tokens()
    plain, grouped = make(num_groups=1)(x), make(num_groups=2)(x)
    assert torch.equal(make(num_groups=1)(x).ids_TK, plain.ids_TK)
    assert not torch.equal(plain.ids_TK, grouped.ids_TK)


def test_replayed_ids_are_used_with_live_scores():
    router = make()
    x = tokens()
    forced = torch.randint(0, 4, (50, 1)) + torch.arange(4) * 4
    routing = router(x, forced.to(torch.int16))
    assert torch.equal(routing.ids_TK, forced)
    probabilities = router(x).logits_TE.softmax(-1).gather(-1, forced)
    torch.testing.assert_close(routing.weights_TK, probabilities / probabilities.sum(-1, keepdim=True))
    assert torch.equal(routing.stats.counts_E, torch.bincount(forced.flatten(), minlength=16).float())

    partly = forced.clone()
    partly[::2] = -1
    mixed = router(x, partly)
    assert torch.equal(mixed.ids_TK[1::2], forced[1::2])
    assert torch.equal(mixed.ids_TK[::2], router(x).ids_TK[::2])

    with pytest.raises(ValueError, match=r"replayed expert 1\d does not exist"):
        router(x, forced + 4)
    with pytest.raises(ValueError, match=r"shape \(50, 3\)"):
        router(x, forced[:, :3])


def test_masked_tokens_do_not_count():
    router = make()
    x = tokens()
    mask = torch.arange(50) < 30
    stats, alone = router(x, token_mask_T=mask).stats, router(x[:30]).stats
    for masked, expected in zip(stats, alone, strict=True):
        torch.testing.assert_close(masked, expected)


def test_float32_router_keeps_float32_logits_under_bfloat16_and_autocast():
    router = make()
    x = tokens()
    exact = router(x).logits_TE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).logits_TE, exact)
    native = make(dtype="native").to(torch.bfloat16)
    assert not torch.equal(native(x.to(torch.bfloat16)).logits_TE, exact)
    assert native(x.to(torch.bfloat16)).weights_TK.dtype == torch.bfloat16


def test_sigmoid_router_chooses_by_bias_and_weighs_without_it():
    router = make(kind=SigmoidRouter)
    x = tokens()
    scores = router(x).logits_TE.sigmoid()
    router.expert_bias[3] = 10.0
    routing = router(x)
    assert (routing.ids_TK == 3).any(-1).all()
    chosen = scores.gather(-1, routing.ids_TK)
    torch.testing.assert_close(routing.weights_TK, chosen / chosen.sum(-1, keepdim=True))


def test_bias_update_is_exact_while_one_expert_gets_everything():
    bias, rate = torch.zeros(8), 1e-3
    counts = torch.tensor([100.0] + [0.0] * 7)
    for _ in range(5):
        update_expert_bias(bias, counts, rate)
    torch.testing.assert_close(bias, torch.tensor([-5e-3] + [5e-3] * 7))


def test_bias_evens_out_a_skewed_load():
    generator = torch.Generator().manual_seed(0)
    bias, violations = torch.zeros(8), []
    for _ in range(200):
        scores = torch.sigmoid(0.5 * torch.randn(4096, 8, generator=generator)) + torch.linspace(0, 0.2, 8)
        counts = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=8).float()
        violations.append(float(counts.max() / counts.mean() - 1))
        update_expert_bias(bias, counts)
    assert violations[0] > 1.0
    assert sum(violations[150:]) / 50 < 0.06


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 10, 4), {"num_groups": 4}, "num_experts 10 must be divisible by num_groups 4"),
        ((8, 16, 3), {"num_groups": 2}, "experts_per_token 3 must be divisible by num_groups 2"),
        ((8, 4, 5), {}, "experts_per_token 5 must lie between 1 and num_experts 4"),
        ((8, 4, 2), {"ste_temperature": 0.0}, "ste_temperature must be positive, got 0.0"),
    ],
)
def test_wrong_sizes_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(*arguments, **options)


def test_record_stacks_layers_and_refuses_gaps():
    record = RoutingRecord()
    record.put(0, torch.ones(5, 2, dtype=torch.long))
    record.put(1, torch.zeros(5, 2, dtype=torch.long))
    stacked = record.stacked()
    assert stacked.shape == (5, 2, 2)
    assert stacked.dtype == torch.int16
    assert torch.equal(RoutingRecord(stacked).get(0), stacked[:, 0])
    record.put(3, torch.zeros(5, 2, dtype=torch.long))
    with pytest.raises(RuntimeError, match="gaps"):
        record.stacked()
    with pytest.raises(ValueError, match="integers of shape"):
        RoutingRecord(torch.zeros(5, 2))
