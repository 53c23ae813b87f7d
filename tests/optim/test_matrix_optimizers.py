"""Muon and Mousse on one process: the authors' own code, closed forms, and properties."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_interns1.optim import Mousse, Muon, matrix_groups, newton_schulz, polar_factor
from lit_interns1.optim.orthogonalization import factor_from_gram

GOLDEN = Path(__file__).parents[1] / "golden" / "mousse"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SIDES = {0: "both", 1: "left", 2: "right"}
DOUBLE = torch.float64


def matrix(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def golden_run(variant, dtype, **options):
    """Largest relative error of the parameters over 12 steps, by step."""
    hyper, changes = CONFIG["hyper_parameters"], CONFIG["variants"][variant]
    data = load_file(GOLDEN / f"{variant}.safetensors")
    parameters = [nn.Parameter(data[f"init.{n}"].to(dtype)) for n in range(2)]
    optimizer = Mousse(
        parameters, lr=hyper["lr"], momentum=hyper["mu"], weight_decay=hyper["weight_decay"],
        side=SIDES[changes.get("use_LorR", 0)], alpha=hyper["shampoo_alpha"], beta=hyper["shampoo_beta"],
        eps=hyper["shampoo_epsilon"], refresh_every=hyper["shampoo_update_freq"],
        graft=changes.get("apply_norm", True),
        adjust_lr="match_rms_adamw" if changes.get("adjust_lr") == "rms_norm" else "spectral_norm", **options,
    )  # fmt: skip
    errors = []
    for step in range(12):
        for number, parameter in enumerate(parameters):
            parameter.grad = data[f"grad.{step}.{number}"].to(dtype)
        optimizer.step()
        want = [data[f"param.{step}.{number}"] for number in range(2)]
        errors.append(max(float((p.detach() - w).norm() / w.norm()) for p, w in zip(parameters, want, strict=True)))
    return errors


@pytest.mark.parametrize("variant", CONFIG["variants"])
def test_mousse_takes_the_steps_of_the_authors_code(variant):
    assert max(golden_run(variant, DOUBLE, polar="svd")) < 1e-11
    # five iterations leave singular values 3 % from 1; float32 changes nothing beside that
    assert max(golden_run(variant, torch.float32)) < 1e-2
    assert max(golden_run(variant, torch.float32, polar="svd")) < 2e-3


def one_step(gradient, make, **options):
    """−ΔW / η of a first step on zero weights."""
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    make([parameter], lr=1.0, momentum=0.0, weight_decay=0.0, adjust_lr="none", **options).step()
    return -parameter.detach()


EXAMPLE = torch.tensor([[3.0, 1, 0], [1, 2, -1], [0, 1, 1]], dtype=DOUBLE)


@pytest.mark.parametrize(("side", "power"), [("both", 4), ("left", 2), ("right", 2)])
@pytest.mark.parametrize("alpha", [0.0, 0.125, 0.25])
def test_the_first_step_of_mousse_has_a_closed_form(side, power, alpha):
    u, s, vh = torch.linalg.svd(EXAMPLE)
    powers = s ** (-power * alpha)
    want = 3**0.5 * (u * (powers / powers.norm())) @ vh
    found = one_step(EXAMPLE, Mousse, side=side, alpha=alpha, polar="svd", eps=1e-15)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    ungrafted = one_step(EXAMPLE, Mousse, side=side, alpha=alpha, polar="svd", eps=1e-15, graft=False)
    mean = (s**2).mean()  # scaled to mean eigenvalue 1
    torch.testing.assert_close(ungrafted, (u * (s**2 / mean) ** (-power * alpha / 2)) @ vh, rtol=1e-12, atol=1e-12)


def test_the_two_floors_on_eigenvalues_are_those_of_the_authors_code():
    found = one_step(EXAMPLE, Mousse, side="both", polar="svd", eps=1e-5)
    torch.testing.assert_close(found[0], torch.tensor([0.809150, -0.112299, 0.184890], dtype=DOUBLE), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("coefficients", "values"), [
    ("quintic", [0.470544, 0.698917, 0.758120, 0.712120, 1.079592, 0.765439, 1.119204, 0.696436]),
    ("dion", [0.474982, 1.018025, 1.010644, 1.019050, 0.996224, 0.985869, 1.005632, 0.978346]),
    ("polar_express", [0.858873, 1.027110, 0.908558, 1.059161, 0.983142, 0.910611, 1.033750, 0.859129]),
])  # fmt: skip
def test_newton_schulz_maps_singular_values(coefficients, values):
    headroom = 1.02 if coefficients == "polar_express" else 1.0  # what the norm is divided by besides
    given = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=DOUBLE)
    given = given[: 7 if headroom > 1 else 8] * headroom
    matrices = torch.diag_embed(torch.stack([given, (1 - given**2).sqrt()], dim=-1))  # of norm 1
    q1, q2 = (torch.linalg.qr(matrix(5, 2, seed=s))[0] for s in (1, 2))
    mapped = q1.T @ newton_schulz(q1 @ matrices @ q2.T, coefficients) @ q2
    expected = torch.tensor(values, dtype=DOUBLE)[: len(given)]
    torch.testing.assert_close(mapped[:, 0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("coefficients", ["quintic", "dion", "polar_express", None])
def test_the_factor_from_a_gram_matrix_is_that_of_the_iteration(coefficients):
    tall = matrix(2, 9, 5) * torch.logspace(0, -3, 5, dtype=DOUBLE)
    want = polar_factor(tall) if coefficients is None else newton_schulz(tall, coefficients)
    torch.testing.assert_close(tall @ factor_from_gram(tall.mT @ tall, coefficients), want, rtol=1e-7, atol=1e-9)
    assert factor_from_gram(torch.zeros(3, 3, dtype=DOUBLE), coefficients).isfinite().all()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 5, 8)])
def test_polar_factors(shape):
    given = matrix(*shape)
    exact = polar_factor(given)
    small = min(shape[-2:])
    gram = exact @ exact.mT if shape[-2] <= shape[-1] else exact.mT @ exact
    torch.testing.assert_close(gram, torch.eye(small, dtype=DOUBLE).expand_as(gram))
    assert (exact.mT @ given - (exact.mT @ given).mT).norm() < 1e-12  # the other factor is symmetric
    for coefficients in ("quintic", "dion", "polar_express"):
        values = torch.linalg.svdvals(newton_schulz(given, coefficients))
        assert values.min() > 0.6
        assert values.max() < 1.25
    rounded = newton_schulz(1e30 * given, "dion", torch.bfloat16)  # the norm is taken before it is rounded
    assert (rounded - newton_schulz(given, "dion")).norm() < 0.1 * exact.norm()
    assert newton_schulz(torch.zeros(2, 3, 4)).abs().max() == polar_factor(torch.zeros(2, 3, 4)).abs().max() == 0


@pytest.mark.parametrize(("make", "options"), [(Muon, {}), (Mousse, {"side": "both"}), (Mousse, {"side": "smaller"})])
def test_scale_and_rotation(make, options):
    gradient, options = matrix(6, 9), {"polar": "svd", "eps": 1e-14, **options} if make is Mousse else {"polar": "svd"}
    step = one_step(gradient, make, **options)
    torch.testing.assert_close(one_step(1e4 * gradient, make, **options), step, rtol=1e-9, atol=1e-9)
    left, right = (torch.linalg.qr(matrix(n, n, seed=n))[0] for n in (6, 9))
    torch.testing.assert_close(
        one_step(left @ gradient @ right, make, **options), left @ step @ right, rtol=1e-6, atol=1e-8
    )
    assert float(step.norm()) == pytest.approx(6**0.5, rel=1e-9)


def gradients(parameters, step, scale=1.0):
    for number, parameter in enumerate(parameters):
        parameter.grad = scale * matrix(*parameter.shape, seed=100 * step + number, dtype=parameter.dtype)


def run_steps(make, shapes, steps=8, **options):
    parameters = [nn.Parameter(matrix(*shape, seed=n)) for n, shape in enumerate(shapes)]
    optimizer = make(parameters, lr=0.05, **options)
    for step in range(1, steps + 1):
        gradients(parameters, step)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_mousse_without_powers_is_muon():
    shapes = [(4, 7), (7, 4), (3, 5, 5), (6,)]
    mousse = run_steps(Mousse, shapes, alpha=0.0, nesterov=True, side="both", refresh_every=3, polar="svd")
    for found, want in zip(mousse, run_steps(Muon, shapes, polar="svd"), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs(shape, nesterov, adjust):
    want, found = (nn.Parameter(matrix(*shape, seed=3, dtype=torch.float32)) for _ in range(2))
    # torch's momentum is a mean, ours a sum: the same direction
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    theirs = torch.optim.Muon([want], adjust_lr_fn=adjust, **options)
    ours = Muon([found], adjust_lr=adjust, coefficients="quintic", compute_dtype="bfloat16", **options)
    start = want.detach().clone()
    for step in range(6):
        gradients([want], step)
        found.grad = want.grad.clone()
        theirs.step()
        ours.step()
    assert (want - found).norm() < 0.02 * (want - start).norm()


@pytest.mark.parametrize(("make", "options"), [
    (Muon, {}), (Mousse, {"side": "both"}), (Mousse, {"side": "auto"}), (Mousse, {"side": "right", "graft": False}),
])  # fmt: skip
def test_a_stack_and_fused_rows_are_matrices_one_by_one(make, options):
    options = {**options, "elementwise_optimizer": "lion"}
    stack = nn.Parameter(matrix(3, 8, 5))
    singles = [nn.Parameter(stack.detach()[e, rows].clone()) for e in range(3) for rows in (slice(0, 4), slice(4, 8))]
    ours = make([{"params": [stack], "kind": "matrix", "row_blocks": 2, "head_blocks": 1}], lr=0.1, **options)
    theirs = make(singles, lr=0.1, **options)
    for step in range(12):
        gradients([stack], step)
        for number, single in enumerate(singles):
            single.grad = stack.grad[number // 2, 4 * (number % 2) :][:4].clone()
        ours.step()
        theirs.step()
    for number, single in enumerate(singles):
        part = stack.detach()[number // 2, 4 * (number % 2) :][:4]
        torch.testing.assert_close(part, single.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [Muon, Mousse])
def test_an_expert_without_tokens_only_decays_and_does_not_disturb_others(make):
    options = {"lr": 0.1, "weight_decay": 0.5}
    stack, rest = nn.Parameter(matrix(3, 4, 5)), nn.Parameter(matrix(3, 4, 5)[1:].clone())
    start = stack.detach()[0].clone()
    ours, theirs = make([stack], **options), make([rest], **options)
    for step in range(5):
        gradients([stack], step)
        stack.grad[0] = 0
        rest.grad = stack.grad[1:].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach()[0], start * 0.95**5)
    torch.testing.assert_close(stack.detach()[1:], rest.detach(), rtol=1e-12, atol=1e-12)
    assert all(
        float(value[0].abs().max()) == 0 for name, value in ours.state[stack].items() if name in ("momentum", "left")
    )
    gradients([stack], 9)  # its first tokens: no basis yet, so the step is Muon's
    before = stack.detach()[0].clone()
    ours.step()
    torch.testing.assert_close(
        (before * 0.95 - stack.detach()[0]) / 0.1, newton_schulz(stack.grad[0]) * 0.2 * 5**0.5, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("make", [Muon, Mousse])
def test_state_waits_while_an_expert_has_no_tokens(make):
    stack = nn.Parameter(matrix(2, 4, 5))
    optimizer = make([stack], lr=0.1)
    for step in range(4):
        gradients([stack], step)
        stack.grad[0] *= step < 2
        if step == 2:
            before = {name: value.clone() for name, value in optimizer.state[stack].items()}
        optimizer.step()
    for name, value in optimizer.state[stack].items():
        assert torch.equal(value[0], before[name][0])
    assert not torch.equal(optimizer.state[stack]["momentum"][1], before["momentum"][1])


@pytest.mark.parametrize(("make", "options"), [(Muon, {}), (Mousse, {"side": "both"}), (Mousse, {"stagger": True})])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_continuing_is_bit_equal(make, options, stop):
    shapes = [(4, 6), (2, 5, 5), (7,)]
    options = {"refresh_every": 5, **options} if make is Mousse else options
    want = run_steps(make, shapes, 12, **options)
    parameters = [nn.Parameter(matrix(*shape, seed=n)) for n, shape in enumerate(shapes)]
    optimizer = make(parameters, lr=0.05, **options)
    for step in range(1, 13):
        gradients(parameters, step)
        optimizer.step()
        if step == stop:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
            optimizer = make(parameters, lr=1.0, **options)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    for found, expected in zip(parameters, want, strict=True):
        assert torch.equal(found.detach(), expected)


def test_staggered_bases_are_spread_over_steps():
    stack = nn.Parameter(matrix(6, 4, 4))
    optimizer = Mousse([stack], refresh_every=3, stagger=True, side="left")
    changed = []
    for step in range(1, 8):
        before = optimizer.state[stack]["left_basis"].clone()
        gradients([stack], step)
        optimizer.step()
        moved = (optimizer.state[stack]["left_basis"] != before).flatten(1).any(1)
        changed.append(moved.nonzero().flatten().tolist())
    assert changed == [[0, 1, 2, 3, 4, 5], [2, 5], [1, 4], [0, 3], [2, 5], [1, 4], [0, 3]]


def test_a_failed_decomposition_falls_back_to_float64_and_then_keeps_the_basis(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def fails_in_float32(given):
        calls.append(given.dtype)
        if given.dtype == torch.float32 or float(given.diagonal().sum()) < 0:
            raise torch.linalg.LinAlgError("did not converge")
        return real(given)

    parameter = nn.Parameter(matrix(2, 4, 4, dtype=torch.float32))
    want, other = (Mousse([p], side="left") for p in (parameter, nn.Parameter(parameter.detach().clone())))
    other_parameter = other.param_groups[0]["params"][0]
    gradients([parameter], 1)
    other_parameter.grad = parameter.grad.clone()
    want.step()
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    other.step()
    assert calls == [torch.float32, DOUBLE, DOUBLE]
    torch.testing.assert_close(other_parameter, parameter, rtol=1e-4, atol=1e-5)

    bases = other.state[other_parameter]["left_basis"].clone()
    other.state[other_parameter]["left"][1] = torch.nan
    other.refresh_every = 1
    gradients([other_parameter], 2)
    with pytest.warns(UserWarning, match="1 of 2 preconditioners could not be decomposed"):
        other.step()
    assert not torch.equal(other.state[other_parameter]["left_basis"][0], bases[0])
    assert torch.equal(other.state[other_parameter]["left_basis"][1], bases[1])


def test_factors_are_float32_where_parameters_are_not():
    parameter = nn.Parameter(matrix(4, 4).bfloat16())
    optimizer = Mousse([parameter], side="both")
    gradients([parameter], 1)
    optimizer.step()
    assert parameter.dtype == torch.bfloat16
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert {value.dtype for value in optimizer.state[parameter].values()} == {torch.float32}


def test_sides_by_shape():
    def sides(rows, columns, **options):
        return set(Mousse([nn.Parameter(torch.zeros(2, 2))], **options).sides(rows, columns))

    assert sides(4, 8) == {"left", "right"}
    assert sides(4, 9) == {"left"}
    assert sides(9, 4) == {"right"}
    assert sides(9, 4, side="left") == {"left"}
    assert sides(4, 9, side="smaller") == {"left"}
    assert sides(4, 9, side="both", max_precondition_size=8) == {"left"}
    assert sides(9, 9, max_precondition_size=8) == set()


@pytest.mark.parametrize(("name", "oracle"), [
    ("adamw", lambda p, **k: torch.optim.AdamW(p, betas=(0.9, 0.95), **k)), ("lion", None),
])  # fmt: skip
def test_elementwise_rules(name, oracle):
    parameters = [nn.Parameter(matrix(5)), nn.Parameter(matrix(3, seed=1))]
    start = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=7.0, weight_decay=0.1, elementwise_optimizer=name, elementwise_lr=0.01)
    copies = [nn.Parameter(p.clone()) for p in start]
    theirs = oracle(copies, lr=0.01, weight_decay=0.1) if oracle else None
    means = [torch.zeros_like(p) for p in start]
    for step in range(5):
        gradients(parameters, step)
        for copy, parameter, mean in zip(copies, parameters, means, strict=True):
            copy.grad = parameter.grad.clone()
            if theirs is None:
                with torch.no_grad():
                    copy.copy_(copy * (1 - 0.001) - 0.01 * torch.sign(0.9 * mean + 0.1 * copy.grad))
                mean.copy_(0.99 * mean + 0.01 * copy.grad)
        if theirs is not None:
            theirs.step()
        optimizer.step()
    for found, want in zip(parameters, copies, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_clipping_is_of_elementwise_gradients_only():
    parameters = [nn.Parameter(matrix(4, 4)), nn.Parameter(matrix(5))]
    optimizer = Muon(parameters, lr=0.1, elementwise_optimizer="adamw", elementwise_clip=0.5)
    gradients(parameters, 1, scale=100.0)
    of_matrix = parameters[0].grad.clone()
    optimizer.step()
    assert torch.equal(parameters[0].grad, of_matrix)
    assert float(optimizer.state[parameters[1]]["exp_avg"].norm()) == pytest.approx(0.1 * 0.5, rel=1e-6)


def test_groups_of_a_model():
    from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig

    model = LanguageModel(LanguageModelConfig(
        vocab_size=50, hidden_size=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=6,
        moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=10),
    ))  # fmt: skip
    names = {id(p): n.removeprefix("layers.0.") for n, p in model.named_parameters()}
    groups = {
        (g["kind"], g.get("row_blocks"), g.get("head_blocks"), g.get("weight_decay")): {
            names[id(p)] for p in g["params"]
        }
        for g in matrix_groups(model)
    }
    flat = [name for members in groups.values() for name in members]
    assert sorted(flat) == sorted(names.values())
    found = {key: {n.rpartition("self_attn.")[2] for n in members} for key, members in groups.items()}
    assert found["matrix", 1, 4, None] == {"q_proj.weight"}
    assert found["matrix", 1, 2, None] == {"k_proj.weight", "v_proj.weight"}
    assert {n.rpartition(".")[2] for n in found["matrix", 2, 1, None]} == {"gate_up_proj"}
    assert {n.rpartition("mlp.")[2] for n in found["matrix", 1, 1, None]} >= {"o_proj.weight"}
    assert {"embed_tokens.weight", "lm_head.weight"} <= found["elementwise", None, None, None]
    assert all("norm" in n for n in found["elementwise", None, None, 0.0])
    free = matrix_groups(model, decay_embeddings=False)
    assert any(
        "embed_tokens.weight" in {names[id(p)] for p in g["params"]} and g.get("weight_decay") == 0 for g in free
    )
    split = Muon(matrix_groups(model), split_heads=True)
    query = next(p for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    assert split.state[query]["momentum"].shape == (1, 4, 6, 24)


@pytest.mark.parametrize(("options", "message"), [
    ({"momentum": 1.0}, "momentum must lie in"), ({"adjust_lr": "rms"}, "adjust_lr must be one of"),
    ({"coefficients": "cubic"}, "coefficients must be one of"), ({"polar": "qr"}, "polar must be one of"),
    ({"elementwise_optimizer": "sgd"}, "elementwise_optimizer must be one of"), ({"lr": -1.0}, "lr must not be"),
    ({"compute_dtype": "float8"}, "compute_dtype must be"), ({"elementwise_clip": 0.0}, "elementwise_clip must be"),
    ({"side": "top"}, "side must be one of"), ({"alpha": 0.5}, "alpha must lie"), ({"beta": 1.0}, "beta must lie"),
    ({"refresh_every": 0}, "refresh_every and max_precondition_size"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    make = Mousse if options.keys() & {"side", "alpha", "beta", "refresh_every"} else Muon
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2, 2))], **options)


def test_states_of_others_are_refused():
    def make(kind, **options):
        return kind([nn.Parameter(torch.zeros(4, 6))], **options)

    saved = make(Muon).state_dict()
    with pytest.raises(ValueError, match="written by another optimizer, or with other options"):
        make(Mousse).load_state_dict(saved)
    grouped = Muon([{"params": [nn.Parameter(torch.zeros(4, 6))], "kind": "matrix", "row_blocks": 2}])
    with pytest.raises(ValueError, match="row_blocks is None there and 2 here"):
        grouped.load_state_dict(saved)
    with pytest.raises(ValueError, match="the state is of 1 parameters, the optimizer has 2"):
        Muon([nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]).load_state_dict(saved)


@pytest.mark.parametrize("options", [{"side": "both"}, {"stagger": True, "refresh_every": 2}])
def test_steps_can_be_planned_on_shapes(options):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        parameters = [nn.Parameter(torch.zeros(3, 4, 6)), nn.Parameter(torch.zeros(5, 5))]
        optimizer = Mousse(parameters, **options)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
