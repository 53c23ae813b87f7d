import itertools

import pytest
import torch

from lit_interns1_kernels import linear_token_scores as public
from lit_interns1_kernels.device import linear_token_scores as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 10), (1, 1), (5, 37), (3, 4096), (2, 9001)]  # tokens, vocabulary
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts bfloat16 off


def chunk(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in front of unused memory, and targets of which some are missing; the largest logit comes late."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits_CV = 3 * torch.randn(tokens, vocabulary, generator=generator)
    logits_CV += torch.linspace(-40, 0, vocabulary)
    memory = torch.full((tokens * vocabulary + 9000,), torch.nan, dtype=dtype)
    memory[: tokens * vocabulary] = logits_CV.to(dtype).flatten()
    targets_C = vocabulary - 1 - torch.randint(0, min(vocabulary, 9), (tokens,), generator=generator)
    targets_C[1::3] = -100
    return memory[: tokens * vocabulary].view(tokens, vocabulary), targets_C


def oracle(logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """In float64, with other functions than the code under test."""
    y_CV = logits_CV.double() / temperature
    valid_C = targets_C >= 0
    distribution = torch.distributions.Categorical(logits=y_CV, validate_args=False)
    logp_C = torch.where(valid_C, distribution.log_prob(targets_C.clamp(min=0)), 0.0)
    target_C1 = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])
    rank_C = torch.where(valid_C, (logits_CV > target_C1).sum(1), 0)
    return logp_C, y_CV.logsumexp(1), distribution.entropy(), rank_C


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_scores(tokens, vocabulary, temperature, dtype):
    logits_CV, targets_C = chunk(tokens, vocabulary, dtype)
    actual = kernels.score_rows(logits_CV, targets_C, temperature, True, True)
    for got, want in zip(actual[:3], oracle(logits_CV, targets_C, temperature)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6 / temperature)
    assert torch.equal(actual[3], oracle(logits_CV, targets_C, temperature)[3])
    for entropy, rank in ((True, False), (False, True), (False, False)):
        part = kernels.score_rows(logits_CV, targets_C, temperature, entropy, rank)
        assert [x is not None for x in part] == [True, True, entropy, rank]
        assert all(torch.equal(p, a) for p, a in zip(part, actual) if p is not None)


def test_scores_of_rows_with_infinite_and_broken_logits():
    logits_CV = torch.randn(3, 9001)
    logits_CV[0, :5000] = -torch.inf  # the whole first block
    logits_CV[1, 8999] = torch.nan
    logp_C, logsumexp_C, entropy_C, rank_C = kernels.score_rows(logits_CV, torch.full((3,), 9000), 1.0, True, True)
    expected = oracle(logits_CV[[0, 2], 5000:], torch.full((2,), 4000), 1.0)
    torch.testing.assert_close(logp_C[0].double(), expected[0][0])
    torch.testing.assert_close(logsumexp_C[0].double(), expected[1][0])
    torch.testing.assert_close(entropy_C[0].double(), expected[2][0])
    assert rank_C[0] == expected[3][0]
    assert logp_C.isnan().tolist() == logsumexp_C.isnan().tolist() == entropy_C.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_gradient_in_place(tokens, vocabulary, with_entropy, temperature, dtype):
    logits_CV, targets_C = chunk(tokens, vocabulary, dtype)
    wide = logits_CV.double().requires_grad_()
    logp_C, logsumexp_C, entropy_C, _ = oracle(wide, targets_C, temperature)
    upstream = torch.randn(3, tokens, generator=torch.Generator().manual_seed(1))
    upstream[0, targets_C < 0] = 0.0
    if not with_entropy:
        upstream[2] = 0.0
    loss = sum((u * s).sum() for u, s in zip(upstream, (logp_C, logsumexp_C, entropy_C)))
    (expected_CV,) = torch.autograd.grad(loss, wide)
    at_target_C, slope_C, curve_C = upstream / temperature
    logsumexp_C, entropy_C = logsumexp_C.detach().float(), entropy_C.detach().float()
    actual_CV = kernels.logit_gradient_(
        logits_CV, targets_C, logsumexp_C, slope_C - at_target_C, at_target_C, temperature,
        *((curve_C, entropy_C) if with_entropy else ()),
    )  # fmt: skip
    assert actual_CV.data_ptr() == logits_CV.data_ptr()
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(actual_CV.double(), expected_CV, rtol=tolerance + 1e-4, atol=tolerance / temperature)


def test_an_impossible_token_has_no_gradient_through_entropy():
    logits_CV = torch.tensor([[0.0, 1.0, -torch.inf]])
    _, logsumexp_C, entropy_C, _ = kernels.score_rows(logits_CV, torch.tensor([0]), 1.0, True, False)
    one = torch.ones(1)
    gradient_CV = kernels.logit_gradient_(logits_CV, torch.tensor([0]), logsumexp_C, one, one, 1.0, one, entropy_C)
    assert gradient_CV[0, 2] == 0.0
    assert gradient_CV.isfinite().all()


@pytest.fixture
def on_kernels(monkeypatch):
    monkeypatch.setattr(public, "_row_kernels", lambda like: kernels)


@pytest.mark.parametrize("promise", ["none", "kept", "part", "broken"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_operation(on_kernels, dtype, temperature, promise):
    """Scores and gradients of the operation when the kernels do what lies between its matrix products."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(11, 16, generator=generator).to(dtype)
    weight_VD = (0.7 * torch.randn(83, 16, generator=generator)).to(dtype)
    targets_T = torch.randint(0, 83, (11,), generator=generator)
    targets_T[::4] = -100
    weight_T = torch.rand(11, generator=generator)
    if promise == "part":
        weight_T[3:7] = 0.0
    hint = {} if promise == "none" else {"loss_weight_T": weight_T, "z_loss": 0.1}
    options = {"temperature": temperature, "entropy": True, "rank": True}

    def loss(scores):
        logp_T, logsumexp_T, entropy_T, _ = scores
        value = -(weight_T * logp_T).sum() + 0.1 * (weight_T * logsumexp_T.square()).sum()
        return 3.0 * value + (0.5 * entropy_T.sum() if promise in ("none", "broken") else 0.0)

    inputs = [x.clone().requires_grad_() for x in (hidden_TD, weight_VD)]
    scores = public.linear_token_scores(*inputs, targets_T, chunk_tokens=4, **options, **hint)
    wide = [x.double().requires_grad_() for x in (hidden_TD, weight_VD)]
    expected = public.linear_token_scores_plain(*wide, targets_T, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # the logits themselves are bfloat16
    for got, want in zip(scores[:3], expected[:3]):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(scores[3], expected[3])
    for got, want in zip(torch.autograd.grad(loss(scores), inputs), torch.autograd.grad(loss(expected), wide)):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_gradients_of_every_mixture_of_outputs(on_kernels):
    generator = torch.Generator().manual_seed(8)
    inputs = [torch.randn(n, 6, generator=generator, requires_grad=True) for n in (7, 29)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    targets_T = torch.tensor([3, -1, 28, 0, 5, 9, 14])
    upstream = torch.randn(3, 7, generator=generator)
    upstream[:, 2:4] = 0.0
    for mixture in list(itertools.product([0, 1], repeat=3))[1:]:
        gradients = []
        for form, xs in ((public.linear_token_scores, inputs), (public.linear_token_scores_plain, wide)):
            scores = form(*xs, targets_T, temperature=0.7, entropy=True)
            loss = sum((u * s).sum() for m, u, s in zip(mixture, upstream, scores[:3]) if m)
            gradients.append(torch.autograd.grad(loss, xs))
        for got, want in zip(*gradients):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_low_precision_logits_are_kept_once(on_kernels, monkeypatch):
    """One buffer in the dtype of the hidden states, and the gradient in its place."""
    made = []
    original = public._Buffers.tempered_logits

    def tempered_logits(self, *args):
        made.append(
            (self.logits_CV.dtype, self.scratch_CV, original(self, *args).data_ptr() == self.logits_CV.data_ptr())
        )
        return self.logits_CV[: len(args[0])]

    monkeypatch.setattr(public._Buffers, "tempered_logits", tempered_logits)
    inputs = [torch.randn(n, 6).bfloat16().requires_grad_() for n in (7, 29)]
    scores = public.linear_token_scores(*inputs, torch.arange(7), entropy=True, rank=True)
    (scores[0].sum() + scores[2].sum()).backward()
    assert made == 2 * [(torch.bfloat16, None, True)]
