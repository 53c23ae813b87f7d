import pytest
import torch
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels.routing import route, route_reference

OPS = torch.ops.lit_interns1
OPTIONS = [  # num_groups, normalize, scaling, gradient, temperature
    (1, True, 1.0, "topk", 1.0),
    (4, True, 2.5, "topk", 3.0),
    (1, False, 1.5, "topk", 3.0),
    (4, True, 1.0, "ste", 1.0),
    (1, True, 2.0, "ste", 0.3),
    (2, False, 1.0, "ste", 1.7),
]


def logits(tokens: int = 29, experts: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def upstream(z_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = (z_TE.shape[0], k), z_TE.shape
    weights_TK, p_TE = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return weights_TK, p_TE


def plain_router(z_TE, num_groups, normalize, scaling, gradient, temperature, replay_TK):
    """Token by token, and a surrogate whose gradient stands for the weights'."""
    p_TE = z_TE.softmax(-1)
    size, chosen = z_TE.shape[1] // num_groups, []
    for t, p_E in enumerate(p_TE.tolist()):
        if replay_TK is not None and min(replay_TK[t]) >= 0:
            chosen.append(replay_TK[t].tolist())
            continue
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        chosen.append([e for group in groups for e in sorted(group, key=lambda e: -p_E[e])[: 4 // num_groups]])
    ids_TK = torch.tensor(chosen)
    weights_TK = p_TE.gather(-1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + (1e-20 if num_groups > 1 else 0.0))
    surrogate_TK = weights_TK
    if gradient == "ste":
        surrogate_TK = (z_TE / temperature).softmax(-1).gather(-1, ids_TK)
    return (weights_TK.detach() + (surrogate_TK - surrogate_TK.detach())) * scaling, ids_TK, p_TE


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize(("num_groups", "normalize", "scaling", "gradient", "temperature"), OPTIONS)
def test_equals_a_plain_router(num_groups, normalize, scaling, gradient, temperature, replayed):
    z_TE = logits()
    replay_TK = None
    if replayed:
        replay_TK = torch.stack([torch.randperm(24)[:4] for _ in range(29)])
        replay_TK[::5, 1] = -1
    weights_TK, ids_TK, scores_TE = plain_router(z_TE, num_groups, normalize, scaling, gradient, temperature, replay_TK)
    for form in (route, route_reference):
        actual = form(z_TE, 4, num_groups, normalize, scaling, gradient, temperature, replay_TK)
        for a, e in zip(actual, (weights_TK, ids_TK, scores_TE), strict=True):
            assert torch.equal(a, e)
        grad_TK, grad_TE = (g.float() for g in upstream(z_TE, 4))
        for roots, grads in (((0,), (grad_TK,)), ((2,), (grad_TE,)), ((0, 2), (grad_TK, grad_TE))):
            expected = (weights_TK, ids_TK, scores_TE)
            options = {"grad_outputs": grads, "retain_graph": True}
            (got,) = torch.autograd.grad([actual[i] for i in roots], z_TE, **options)
            (want,) = torch.autograd.grad([expected[i] for i in roots], z_TE, **options)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_groups", "normalize", "scaling", "gradient", "temperature"), OPTIONS)
def test_gradient_is_the_closed_form(num_groups, normalize, scaling, gradient, temperature):
    """Jacobians written out: diag(d) − d dᵀ of the softmax that the gradient is taken of."""
    z_TE = logits(dtype=torch.float64)
    weights_TK, ids_TK, p_TE = route(z_TE, 4, num_groups, normalize, scaling, gradient, temperature)
    grad_TK, grad_TE = upstream(z_TE, 4)
    (actual_TE,) = torch.autograd.grad((weights_TK, p_TE), z_TE, (grad_TK, grad_TE))
    with torch.no_grad():
        u_TE = torch.zeros_like(z_TE).scatter(1, ids_TK, scaling * grad_TK)
        tau = temperature if gradient == "ste" else 1.0
        e_TE = (z_TE / tau).exp()
        if gradient == "topk" and normalize:
            e_TE = e_TE * torch.zeros_like(z_TE).scatter(1, ids_TK, 1.0)
        p_TE = z_TE.exp() / z_TE.exp().sum(1, keepdim=True)
        expected_TE = torch.zeros_like(z_TE)
        for d_TE, v_TE in ((e_TE / e_TE.sum(1, keepdim=True), u_TE / tau), (p_TE, grad_TE)):
            jacobian_TEE = torch.diag_embed(d_TE) - d_TE[:, :, None] * d_TE[:, None, :]
            expected_TE += torch.einsum("tef,tf->te", jacobian_TEE, v_TE)
    torch.testing.assert_close(actual_TE, expected_TE, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_numerical_gradients(num_groups, normalize):
    def outputs(z_TE):
        weights_TK, _, p_TE = route(z_TE, 4, num_groups, normalize, 1.5)
        return weights_TK, p_TE

    assert torch.autograd.gradcheck(outputs, logits(5, 8, torch.float64))


def test_experts_that_were_not_chosen_get_exactly_nothing():
    z_TE = logits()
    weights_TK, ids_TK, _ = route(z_TE, 4)
    (grad_TE,) = torch.autograd.grad(weights_TK.square().sum(), z_TE)
    assert not grad_TE.scatter(1, ids_TK, 0.0).any()
    dense_TK, ids_TK, _ = route(z_TE, 4, gradient="ste")
    assert torch.equal(dense_TK, weights_TK)
    (grad_TE,) = torch.autograd.grad(dense_TK.square().sum(), z_TE)
    assert grad_TE.scatter(1, ids_TK, 1.0).ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened(dtype):
    z_TE = logits(dtype=dtype)
    actual = route(z_TE, 4, 2)
    for a, e in zip(actual, route(z_TE.float(), 4, 2), strict=True):
        assert torch.equal(a, e)
    (grad_TE,) = torch.autograd.grad(actual[0].square().sum(), z_TE)
    assert grad_TE.dtype == dtype


def test_no_tokens():
    z_TE = torch.empty(0, 8, requires_grad=True)
    weights_TK, ids_TK, p_TE = route(z_TE, 4, 2)
    assert (weights_TK.shape, ids_TK.shape, p_TE.shape) == ((0, 4), (0, 4), (0, 8))
    (weights_TK.sum() + p_TE.sum()).backward()
    assert z_TE.grad.shape == (0, 8)


def test_operations_are_registered_completely():
    replay_TK = torch.arange(4).expand(29, 4).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        z_TE = logits(dtype=dtype)
        torch.library.opcheck(OPS.route.default, (z_TE, 4, 1, True, 1.0, False, 1.0, None))
        torch.library.opcheck(OPS.route.default, (z_TE, 4, 2, True, 2.0, True, 0.5, replay_TK))
        z_TE = z_TE.detach()
        _, ids_TK, p_TE = route(z_TE, 4)
        grad_TK, grad_TE = (g.float() for g in upstream(z_TE, 4))
        for given, dense in ((grad_TE, False), (None, True)):
            torch.library.opcheck(
                OPS.route_backward.default, (grad_TK, given, z_TE, ids_TK, p_TE, 1.5, dense, 1.0 + dense)
            )


def test_runs_on_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=False):
        z_TE = torch.zeros(29, 24, requires_grad=True)
        weights_TK, ids_TK, p_TE = route(z_TE, 4, 2, gradient="ste", replay_TK=torch.zeros(29, 4, dtype=torch.int16))
        assert (weights_TK.shape, ids_TK.shape, p_TE.shape) == ((29, 4), (29, 4), (29, 24))
        (weights_TK.sum() + p_TE.sum()).backward()
        assert z_TE.grad.shape == (29, 24)


def test_fake_tensors_of_a_gpu_stay_there():
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        for output in route(torch.zeros(29, 24, device="cuda"), 4, 2):
            assert output.device.type == "cuda"


def test_compiles_into_one_graph():
    def loss(z_TE):
        weights_TK, ids_TK, p_TE = route(z_TE, 4, 2, gradient="ste", temperature=0.5)
        return (weights_TK.square() * (ids_TK + 1)).sum() + p_TE.square().sum()

    z_TE = logits()
    expected, actual = loss(z_TE), torch.compile(loss, backend="aot_eager", fullgraph=True)(z_TE)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(x, z_TE)[0] for x in (actual, expected)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(8), 2), r"logits_TE \(8,\)"),
        ((torch.zeros(3, 8, dtype=torch.int64), 2), "torch.int64: must be a floating-point matrix"),
        ((torch.zeros(3, 8), 9), "k = 9 .* experts 8"),
        ((torch.zeros(3, 8), 0), "k = 0 .* experts 8"),
        ((torch.zeros(3, 8), 4, 3), "num_groups = 3 must divide k = 4"),
        ((torch.zeros(3, 8), 3, 2), "num_groups = 2 must divide k = 3"),
        ((torch.zeros(3, 8), 3, 0), "num_groups = 0"),
        ((torch.zeros(3, 8), 2, 1, True, 1.0, "dense"), "gradient = 'dense'"),
        ((torch.zeros(3, 8), 2, 1, True, 1.0, "ste", 0.0), "temperature = 0.0"),
        ((torch.zeros(3, 8), 2, 1, True, 1.0, "ste", 1.0, torch.zeros(3, 3)), r"replay_TK \(3, 3\) must be \(3, 2\)"),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        route(*arguments)
