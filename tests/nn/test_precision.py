"""FP8 experts and the precision switch, against E4M3 arithmetic written out in float64."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError

from distributed_harness import run_ranks
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, RewardModel
from lit_interns1.models.config import config_from_dict, differing_fields
from lit_interns1.models.generation import generate
from lit_interns1.nn.initialization import initialize_parameters
from lit_interns1.nn.moe import LocalDispatcher, RoutedExperts
from lit_interns1.nn.precision import INTERN_S1_PRO, PrecisionRecipe, apply_precision, computing_in
from lit_interns1.objectives.policy.kl import kl_estimate
from lit_interns1_kernels.fp8_grouped_gemm import fp8_grouped_linear
from sharded_training import batches, environment, whole

FP8, NATIVE = PrecisionRecipe("fp8"), PrecisionRecipe("native")


# -- E4M3 in float64, without torch's conversions ----------------------------------------------------------------------


def rounded(x, mantissa_bits, least_exponent):
    """To the nearest number with so many bits behind the point, ties to even."""
    exponent = torch.frexp(x).exponent.double() - 1
    step = 2.0 ** (exponent.clamp(min=least_exponent) - mantissa_bits)
    return torch.round(x / step) * step


def bfloat16(x):
    return rounded(x, 7, -126)


def blocks_of(x, rows, columns):
    """(block of rows, block of columns) of a matrix; the last ones may be smaller."""
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            yield slice(top, top + rows), slice(left, left + columns)


def scales(x, rows, power_of_two):
    """The scale of every number of a matrix."""
    result = torch.empty_like(x, dtype=torch.float64)
    for block in blocks_of(x, rows, 128):
        scale = x[block].double().abs().max().clamp(min=1e-4) / 448
        result[block] = 2.0 ** torch.log2(scale).ceil() if power_of_two else scale
    return result


def quantized(x, rows, power_of_two):
    """What E4M3 numbers and scales stand for."""
    scale = scales(x, rows, power_of_two)
    return rounded(x.double() / scale, 3, -6).clamp(-448, 448) * scale


def quantization_error(x, rows, power_of_two):
    """The most by which a number can change: half a step of 2^-3 |x|, below 2^-6 scales half a step of 2^-9."""
    return torch.maximum(x.double().abs() * 2.0**-4, scales(x, rows, power_of_two) * 2.0**-10)


def oracle(x, gate_up, down, ids, weights, upstream, power_of_two=False, between=lambda t: t):
    """Value and gradients of the layer, expert by expert; `between` rounds what lies between the products."""
    x, gate_up, down, weights, upstream = (t.detach().double() for t in (x, gate_up, down, weights, upstream))
    y, grad_x, grad_weights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert in range(len(gate_up)):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        rows, weight = x[tokens], weights[tokens, places][:, None]
        matrices = [quantized(w, 128, power_of_two) for w in gate_up[expert].chunk(2)]
        parts = [bfloat16(quantized(rows, 1, power_of_two) @ w.T).requires_grad_() for w in matrices]
        hidden = F.silu(parts[0])
        hidden = (hidden + (between(hidden) - hidden).detach()) * parts[1]
        hidden = hidden + (between(hidden) - hidden).detach()
        last = quantized(down[expert], 128, power_of_two)
        outputs = bfloat16(quantized(hidden.detach(), 1, power_of_two) @ last.T)
        y.index_add_(0, tokens, outputs * weight)

        grad_weights[tokens, places] = (upstream[tokens] * outputs).sum(-1)
        grad_outputs = upstream[tokens] * weight
        grad_down[expert] = grad_outputs.T @ hidden.detach()
        hidden.backward(bfloat16(quantized(grad_outputs, 1, power_of_two) @ last))
        grad_gate_up[expert] = torch.cat([part.grad.T @ rows for part in parts])
        grad_rows = sum(quantized(p.grad, 1, power_of_two) @ w for p, w in zip(parts, matrices, strict=True))
        grad_x.index_add_(0, tokens, bfloat16(grad_rows))
    return y, grad_x, grad_gate_up, grad_down, grad_weights


def case(hidden, intermediate, tokens=24, experts=4, dtype=torch.float32, precision="fp8", scale=1.0):
    """Experts, of which the third is empty, and what they are given."""
    generator = torch.Generator().manual_seed(hidden + intermediate)
    layer = RoutedExperts(experts, hidden, intermediate, initializer_std=0.1, precision=precision)
    initialize_parameters(layer)
    x = (torch.randn(tokens, hidden, generator=generator) * scale).to(dtype)
    preference = torch.rand(tokens, experts, generator=generator)
    preference[:, 2:3] = -1.0
    ids = preference.topk(min(experts, 2)).indices
    return layer.to(dtype), x, ids, torch.rand(ids.shape, generator=generator)


def run(layer, x, ids, weights):
    """Value and gradients of x, the stacks and the weights of rows."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    layer.zero_grad()
    y = layer(LocalDispatcher(layer.num_experts).dispatch(x, ids, weights))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(upstream)
    return upstream, [y.detach(), x.grad, layer.gate_up_proj.grad, layer.down_proj.grad, weights.grad]


def distance(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("precision", ["fp8", "fp8_power_of_two"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (160, 72), (48, 24)])
def test_values_and_gradients_equal_the_arithmetic_of_the_format(hidden, intermediate, precision):
    layer, *inputs = case(hidden, intermediate, precision=precision)
    upstream, ours = run(layer, *inputs)
    theirs = oracle(
        inputs[0], layer.gate_up_proj, layer.down_proj, *inputs[1:], upstream, precision == "fp8_power_of_two"
    )
    layer.precision = "native"
    exact = run(layer, *inputs)[1]
    names = ["y", "x", "gate_up", "down", "weight"]
    for name, mine, wanted, unrounded in zip(names, ours, theirs, exact, strict=True):
        assert distance(mine, wanted) < 1e-3, name  # a float32 sum may fall on the other side of a rounding
        assert 0.01 < distance(mine, unrounded) < 0.12, name
    assert (ours[2][2] == 0).all(), "an expert without rows has no gradient"


def test_bfloat16_numbers_are_quantised_as_they_are():
    layer, *inputs = case(128, 64, dtype=torch.bfloat16)
    upstream, ours = run(layer, *inputs)
    theirs = oracle(inputs[0], layer.gate_up_proj, layer.down_proj, *inputs[1:], upstream, between=bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in ours[:4])
    assert distance(ours[0], theirs[0]) < 0.005
    for mine, wanted in zip(ours, theirs, strict=True):  # gradients between the products are rounded, too
        assert distance(mine, wanted) < 0.04


def test_one_operand_changes_by_half_a_step_of_three_mantissa_bits():
    layer, x, *_ = case(128, 128, tokens=200, experts=1, precision="fp8_power_of_two")
    with torch.no_grad():  # gate: silu(32) = 32 to the bit of bfloat16; up and down: the identity
        x[:, 0] = 4.0
        layer.gate_up_proj.zero_()
        layer.gate_up_proj[0, :128, 0] = 8.0
        layer.gate_up_proj[0, 128:], layer.down_proj[0] = torch.eye(128), torch.eye(128)
        rows = LocalDispatcher(1).dispatch(x, torch.zeros(200, 1, dtype=torch.long), torch.ones(200, 1))
        y = layer(rows) / 32
    error = (y.double() - x).abs() / quantization_error(x, 1, True)
    assert error.max() <= 1.0, "x is quantised, and what is quantised stays so in the second product"
    assert error.max() > 0.9


def product_error(x, x_error, w, w_error):
    """The most by which x wᵀ can change; with float32 sums of blocks of 128, and a result in bfloat16."""
    changed = x.abs() @ w_error.T + x_error @ (w.abs() + w_error).T
    accumulated = 2.0**-22 * ((x.abs() + x_error) @ (w.abs() + w_error).T)
    return changed + accumulated + 2.0**-8 * ((x @ w.T).abs() + changed)


def test_a_product_stays_within_the_bound_of_the_format():
    """Two operands that may change by 2^-4 each: 2^-3 + 2^-8 of Σ |x w|, and a little for what is below the range."""
    layer, x, *_ = case(256, 128, tokens=300)
    w = layer.down_proj[0].detach()
    y = fp8_grouped_linear(x[:, :128].contiguous(), w[None], torch.tensor([300], dtype=torch.int32)).double()
    x, w = x[:, :128].double(), w.double()
    bound = product_error(x, quantization_error(x, 1, False), w, quantization_error(w, 128, False))
    error, terms = (y - x @ w.T).abs(), x.abs() @ w.abs().T
    assert (error <= bound).all()
    assert (bound <= (2.0**-3 + 2.0**-8 + 0.01) * terms).all()
    assert error.max() > 0.02 * terms.median()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_the_layer_stays_within_the_bound_of_the_format(scale):
    """What the rounding of every operand can do at worst, carried through three products and SwiGLU in float64."""
    layer, x, ids, weights = case(256, 128, experts=1, tokens=64, scale=scale)
    with torch.no_grad():
        y = layer(LocalDispatcher(1).dispatch(x, ids, torch.ones_like(weights))).double()
    x, down = x.double(), layer.down_proj[0].detach().double()
    x_error = quantization_error(x, 1, False)
    (gate, gate_error), (up, up_error) = (
        (x @ w.T, product_error(x, x_error, w, quantization_error(w, 128, False)))
        for w in layer.gate_up_proj[0].detach().double().chunk(2)
    )
    hidden = F.silu(gate) * up
    hidden_error = 1.1 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error  # |silu'| < 1.1
    hidden_error = hidden_error + quantization_error(hidden.abs() + hidden_error, 1, False)
    exact = hidden @ down.T
    assert ((y - exact).abs() <= product_error(hidden, hidden_error, down, quantization_error(down, 128, False))).all()
    assert 0.01 < distance(y, exact) < 0.1


def test_no_rows_no_tokens_and_huge_numbers():
    layer, x, ids, weights = case(160, 72)
    for rows in (0, 1):
        _, results = run(layer, x[:rows], ids[:rows], weights[:rows])
        assert results[0].shape == (rows, 160)
        assert all(t.isfinite().all() for t in results)
    _, results = run(layer, torch.zeros_like(x), ids, weights)
    assert (results[0] == 0).all()
    assert all(t.isfinite().all() for t in results)
    x[3, 5], x[4, 7], x[5] = 1e15, -1e15, 1e-30  # one number takes the scale of its block: its neighbours become 0
    upstream, results = run(layer, x, ids, weights)
    assert all(t.isfinite().all() for t in results)
    for mine, wanted in zip(
        results, oracle(x, layer.gate_up_proj, layer.down_proj, ids, weights, upstream), strict=True
    ):
        assert distance(mine, wanted) < 1e-3
    with torch.no_grad():
        layer.gate_up_proj.zero_()
        layer.gate_up_proj[:, 0, 0] = 1e30
    x.zero_()
    x[:, 0] = -1e8  # silu(-1e38) = -0
    _, results = run(layer, x, ids, weights)
    assert not any(t.isnan().any() for t in results[:1])


def test_rows_behind_the_last_offset_neither_count_nor_poison():
    layer, x, ids, weights = case(160, 72)

    def results(tail):
        layer.zero_grad()
        source = x.clone().requires_grad_()
        rows = LocalDispatcher(4).dispatch(source, ids, weights)
        rows.row_index_R = torch.cat([rows.row_index_R, torch.zeros(tail, dtype=torch.long)])
        tail_weights = torch.full((tail,), torch.nan, requires_grad=True)
        rows.row_weight_R, rows.has_tail = torch.cat([rows.row_weight_R, tail_weights]), tail > 0
        y = layer(rows)
        y.square().sum().backward()
        assert not tail_weights.grad.any()
        return [y.detach(), source.grad, *(p.grad.clone() for p in layer.parameters())]

    for ours, wanted in zip(results(50), results(0), strict=True):
        assert torch.equal(ours, wanted)


# -- the switch --------------------------------------------------------------------------------------------------------


def network(seed=0, std=0.1, **changes):
    moe = MoEConfig(8, 2, 32, **changes.pop("moe", {}))
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=48, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, moe=moe,
        dense_layers=(1,), intermediate_size=64, initializer_range=std, **changes,
    )  # fmt: skip
    return LanguageModel.create(config, seed=seed)


def tensors(value):
    """All tensors in what a module gives."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


@torch.no_grad()
def outputs_by_module(model, inputs):
    return {name: tensors(model.get_submodule(name)(*args, **options)) for name, (args, options) in inputs.items()}


@torch.no_grad()
def changed_modules(model, recipe):
    """Names of the modules that give anything else for the inputs that they have in a forward pass; and of all."""
    inputs = {}
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, options, name=name: inputs.setdefault(name, (copy.copy(args), options)), with_kwargs=True
        )
        for name, part in model.named_modules()
    ]
    model(torch.arange(24) % 64, targets=torch.arange(1, 25) % 64)
    for hook in hooks:
        hook.remove()
    plain = outputs_by_module(model, inputs)
    with computing_in(model, recipe) as applied:
        switched = outputs_by_module(model, inputs)
    again = outputs_by_module(model, inputs)
    differing = set()
    for name, wanted in plain.items():
        assert wanted, name
        assert all(torch.equal(a, b) for a, b in zip(wanted, again[name], strict=True)), f"{name} is as before"
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(wanted, switched[name], strict=True)):
            differing.add(name)
    return differing, set(plain), applied.changed


def test_experts_and_what_contains_them_change_and_nothing_else():
    model = network()
    differing, everything, named = changed_modules(model, FP8)
    assert named == ["layers.0.mlp.experts", "layers.2.mlp.experts"]
    assert differing == {"", *named, "layers.0.mlp", "layers.0", "layers.2.mlp", "layers.2"}
    assert {"layers.1.mlp", "layers.0.mlp.router", "layers.0.self_attn", "norm", "lm_head"} <= everything - differing
    assert changed_modules(model, NATIVE)[0] == set()


def test_the_recipe_of_intern_s1_pro():
    model = network(std=0.3)
    seen = {}
    for name, part in model.named_modules():
        part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args, out)}))
    targets = torch.arange(1, 25) % 64
    with torch.no_grad(), computing_in(model, INTERN_S1_PRO) as applied:
        output = model(torch.arange(24) % 64, targets=targets)
    assert applied.changed == ["layers.0.mlp.experts", "layers.2.mlp.experts", "lm_head", ""]
    for name in ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "layers.1.mlp", "layers.0.mlp.experts"):
        assert seen[name][1].dtype == torch.bfloat16, name
    assert seen["layers.0.mlp.router"][1].logits_TE.dtype == torch.float32
    assert seen["norm"][1].dtype == torch.float32
    logits = F.linear(output.hidden_TD.float(), model.lm_head.weight)
    logp = logits.log_softmax(-1)[torch.arange(24), targets]
    torch.testing.assert_close(output.scores.logp_T, logp, atol=1e-5, rtol=0)
    with torch.no_grad(), computing_in(model, PrecisionRecipe(None, "bfloat16", "native")):
        rounded_head = model(torch.arange(24) % 64, targets=targets)
    assert (rounded_head.scores.logp_T - logp).abs().max() > 1e-3


def test_recipes_nest_and_end_with_an_error():
    model = network(moe={"expert_precision": "fp8"}, head_dtype="float32")
    ids = torch.arange(9)
    states = []

    def state():
        with torch.no_grad():
            return model(ids).logits

    states.append(state())
    with computing_in(model, INTERN_S1_PRO):
        states.append(state())
        with computing_in(model, PrecisionRecipe("native", "native", "native")):
            inner = state()
            twin = copy.deepcopy(model)
        assert torch.equal(state(), states[1])
    with pytest.raises(ValueError, match="inputs_embeds_TD"), computing_in(model, INTERN_S1_PRO):
        model()
    assert torch.equal(state(), states[0])
    assert "forward" not in vars(model)
    with torch.no_grad():
        plain = network()
        assert torch.equal(inner, plain(ids).logits), "autocast of the outer recipe does not reach the inner one"
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids).logits, inner), "a copy computes with its own weights"
    with computing_in(model, None) as applied:
        assert applied.changed == []


def test_bad_recipes_are_refused_and_change_nothing():
    with pytest.raises(ValueError, match=r"PrecisionRecipe.experts = 'fp4' is unknown: choose one of native, fp8"):
        PrecisionRecipe("fp4")
    with pytest.raises(ValueError, match=r"moe.expert_precision = 'fp4' is unknown"):
        MoEConfig(8, 2, 32, expert_precision="fp4")
    with pytest.raises(ValueError, match="expert precision 'fp4' is unknown"):
        RoutedExperts(8, 16, 8, precision="fp4")
    reward = RewardModel.create(network().config)
    with pytest.raises(ValueError, match=r"PrecisionRecipe.head = 'float32': RewardModel has no LanguageModelHead"):
        apply_precision(reward, INTERN_S1_PRO)
    assert all(part.precision == "native" for part in reward.modules() if isinstance(part, RoutedExperts))
    apply_precision(reward, PrecisionRecipe("fp8", "bfloat16"))
    dense = LanguageModel.create(dataclasses.replace(network().config, moe=None, dense_layers=()))
    with pytest.raises(ValueError, match=r"experts = 'fp8': LanguageModel has no RoutedExperts"):
        apply_precision(dense, FP8)

    class Step(nn.Module):
        training_step, inner = None, None

    module = Step()
    module.inner = network()
    with pytest.raises(ValueError, match="nobody calls Step"):
        apply_precision(module, INTERN_S1_PRO)


def test_precision_in_the_config_is_the_switch():
    ids = torch.arange(20)
    for precision in ("fp8", "fp8_power_of_two"):
        model = network(moe={"expert_precision": precision})
        assert f"precision={precision}" in repr(model)
        plain = network()
        with torch.no_grad(), computing_in(plain, PrecisionRecipe(precision)):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, plain(ids).logits)


# -- training and rollout ----------------------------------------------------------------------------------------------


def gradients(model, recipe=None):
    ids = torch.arange(25) * 7 % 64
    model.zero_grad()
    with computing_in(model, recipe):
        (-model(ids[:-1], targets=ids[1:]).scores.logp_T.mean()).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_recomputation_gives_the_same_gradients():
    plain = gradients(network(moe={"expert_precision": "fp8"}))
    recomputed = gradients(network(moe={"expert_precision": "fp8"}, activation_checkpointing="block"))
    switched = gradients(network(activation_checkpointing="block"), FP8)
    for one, two, three in zip(plain, recomputed, switched, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    rounded = gradients(network(), INTERN_S1_PRO)
    again = gradients(network(activation_checkpointing="block"), INTERN_S1_PRO)
    assert all(torch.equal(one, two) for one, two in zip(rounded, again, strict=True))


def test_leaving_a_recipe_before_the_recomputation_is_an_error():
    model = network(activation_checkpointing="block")
    ids = torch.arange(25)
    with computing_in(model, FP8):
        loss = model(ids[:-1], targets=ids[1:]).scores.logp_T.sum()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_equal_formats_on_both_sides_and_the_mismatch_of_different_ones():
    model = network(std=0.15)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 64, (6,), generator=generator).tolist() for _ in range(8)]
    recipes = {"native": NATIVE, "fp8": FP8, "pro": INTERN_S1_PRO}
    k3, worst = {}, {}
    for rollout, recipe in recipes.items():
        with computing_in(model, recipe):
            samples = generate(model, prompts, max_new_tokens=12, record_routing=True)
        sampled = torch.cat(samples.log_probs)
        for trainer, its in recipes.items():
            with torch.no_grad(), computing_in(model, its):
                scored = []
                for prompt, new, routing in zip(prompts, samples.token_ids, samples.routed_experts, strict=True):
                    ids = torch.tensor(prompt + new)
                    output = model(ids[:-1], targets=ids[1:], routed_experts_TLK=routing)
                    scored.append(output.scores.logp_T[len(prompt) - 1 :])
            k3[rollout, trainer] = kl_estimate(sampled, torch.cat(scored)).mean().item()
            worst[rollout, trainer] = (torch.cat(scored) - sampled).abs().median().item()
    assert k3["native", "native"] < 1e-9
    assert worst["fp8", "fp8"] < 1e-5  # where no number falls to the other side of a rounding
    assert k3["fp8", "fp8"] < 1e-5
    assert k3["pro", "pro"] < k3["native", "pro"] / 3
    for pair in [("native", "fp8"), ("fp8", "native"), ("native", "pro"), ("pro", "native")]:
        assert k3[pair] > 1e-4, pair
        assert k3[pair] > 50 * k3["fp8", "fp8"], pair


# -- divided over ranks, and saved -------------------------------------------------------------------------------------


def train(rank, world, strategy, moe):
    """Losses, weights, and log-probabilities under some recipes, of a short run."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.strategies import MoEParallelStrategy

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    environment(rank, world)
    config = network(moe=moe, std=0.05).config
    module = LanguageModelModule(config, optimizer=lambda p: torch.optim.SGD(p, lr=0.3), seed=3)
    losses, options = [], {"devices": 1}
    if strategy is not None:
        divided = MoEParallelStrategy(expert_parallel_size=world, **strategy)
        options = {"devices": world, "strategy": divided, "plugins": [TorchElasticEnvironment()]}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[Record()], log_every_n_steps=1, **options,
    )  # fmt: skip
    data = batches(rank, world if strategy is not None else 1, 1)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    ids = torch.arange(25) * 5 % 64
    scores = {}
    with torch.no_grad():
        for name, recipe in {"native": NATIVE, "fp8": FP8, "pro": INTERN_S1_PRO}.items():
            with computing_in(module.model, recipe) as applied:
                scores[name] = module.model(ids[:-1], targets=ids[1:]).scores.logp_T.clone()
        scores["after"] = module.model(ids[:-1], targets=ids[1:]).scores.logp_T.clone()
    parameters = {name: whole(p) for name, p in module.model.named_parameters()}
    return {"losses": losses, "parameters": parameters, "scores": scores, "changed": applied.changed}


GROUPED = {"router": "grouped", "num_groups": 2, "router_gradient": "ste", "expert_precision": "fp8"}
RECOMPUTED = {"activation_checkpointing": True}


def train_all(rank, world, *cases):
    return [train(rank, world, *case) for case in cases]


@pytest.mark.parametrize(
    "moe",
    [
        pytest.param(GROUPED, id="static"),
        pytest.param({"expert_precision": "fp8"}, id="exact", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_that_share_the_experts_train_like_one_process(moe):
    native = {**moe, "expert_precision": "native"}
    ((one, unquantized),) = run_ranks(train_all, 1, (None, moe), (None, native), timeout=120.0)
    for (two,) in run_ranks(train_all, 2, (RECOMPUTED, moe), timeout=120.0):
        assert two["changed"] == ["lm_head", ""], "experts are in FP8 already"
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for name, parameter in one["parameters"].items():
            assert distance(two["parameters"][name], parameter) < 1e-4, name
        for recipe, tolerance in {"native": 1e-4, "fp8": 1e-3, "pro": 2e-2}.items():
            torch.testing.assert_close(two["scores"][recipe], one["scores"][recipe], atol=tolerance, rtol=0)
        assert torch.equal(two["scores"]["after"], two["scores"]["fp8"]), "the config's own format is back"
        assert not torch.equal(two["scores"]["native"], two["scores"]["fp8"])
    assert one["losses"][0] != pytest.approx(unquantized["losses"][0], rel=1e-6)
    assert one["losses"] == pytest.approx(unquantized["losses"], rel=1e-2)


@pytest.mark.slow
def test_two_ranks_that_gather_bfloat16():
    """FSDP2's mixed precision: what is quantised are numbers of bfloat16."""
    rounded = {"compute_dtype": "bfloat16"}
    ((one,),) = run_ranks(train_all, 1, (rounded, GROUPED), timeout=120.0)
    for (two,) in run_ranks(train_all, 2, ({**rounded, **RECOMPUTED}, GROUPED), timeout=120.0):
        assert two["losses"] == pytest.approx(one["losses"], rel=0.02)
        for recipe, scores in one["scores"].items():
            torch.testing.assert_close(two["scores"][recipe], scores, atol=0.05, rtol=0)


def test_a_checkpoint_holds_the_same_and_opens_in_any_format():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with computing_in(model, INTERN_S1_PRO):
        inside = model.state_dict()
        assert inside.keys() == before.keys()
        assert all(inside[name].dtype == t.dtype and torch.equal(inside[name], t) for name, t in before.items())
    assert network(moe={"expert_precision": "fp8"}).state_dict().keys() == before.keys()

    saved = dataclasses.asdict(model.config)
    present = dataclasses.asdict(network(moe={"expert_precision": "fp8"}).config)
    assert differing_fields(saved, present) == []
    del saved["moe"]["expert_precision"]  # written before the field was there
    assert differing_fields(saved, present) == []
    assert config_from_dict(saved) == model.config
