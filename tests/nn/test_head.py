from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_interns1.nn.head import GradientHint, LanguageModelHead, TokenScores
from lit_interns1_kernels import linear_token_scores as kernel

TOKENS, HIDDEN, VOCABULARY, CHUNK = 37, 24, 103, 8


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenScores:
    """All scores from whole float64 logits, written with other functions than the code under test."""
    logits = hidden.double() @ weight.double().T
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    valid = targets >= 0
    logp = distribution.log_prob(targets.clamp(min=0)).masked_fill(~valid, 0.0)
    better = [int((row > row[t]).sum()) if t >= 0 else 0 for row, t in zip(logits.detach(), targets.tolist())]
    return TokenScores(
        logp, torch.logsumexp(logits / temperature, -1), distribution.entropy(), torch.tensor(better, dtype=torch.int64)
    )


def example(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, LanguageModelHead, Tensor]:
    torch.manual_seed(3)
    head = LanguageModelHead(HIDDEN, VOCABULARY, chunk_tokens=CHUNK, initializer_std=0.5).to(dtype)
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,))
    targets[::5] = -100
    return hidden, head, targets


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_whole_logits(dtype: torch.dtype, temperature: float) -> None:
    hidden, head, targets = example(dtype)
    scores = head(hidden, targets, temperature=temperature, entropy=True, rank=True)
    expected = oracle(hidden, head.weight, targets, temperature)
    for name in ("logp_T", "logsumexp_T", "entropy_T"):
        assert getattr(scores, name).dtype == dtype
        torch.testing.assert_close(getattr(scores, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert scores.rank_T.dtype == torch.int64
    assert not scores.rank_T.requires_grad
    assert torch.equal(scores.rank_T, expected.rank_T)
    assert head(hidden, targets).entropy_T is None
    assert head(hidden, targets).rank_T is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mixture", list(itertools.product([0, 1], repeat=3))[1:])
def test_gradients_of_every_mixture_of_outputs(mixture: tuple[int, int, int], temperature: float) -> None:
    hidden, head, targets = example()
    upstream = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(1))
    upstream[:, 7:19] = 0  # rows that no loss looks at

    def loss(scores: TokenScores) -> Tensor:
        return sum(m * (u * s).sum() for m, u, s in zip(mixture, upstream, scores[:3]) if m)

    scores = head(hidden, targets, temperature=temperature, entropy=bool(mixture[2]))
    actual = gradients(loss(scores), hidden, head.weight)
    expected = gradients(loss(oracle(hidden, head.weight, targets, temperature)), hidden, head.weight)
    for a, e in zip(actual, expected):
        assert_close_relative(a, e, 2e-6)


@pytest.mark.parametrize("hinted", [False, True])
def test_gradcheck(hinted: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, -100, 6, 0, 3])
    hint = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]) if hinted else None

    def scores(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return kernel.linear_token_scores(
            h, w, targets, temperature=0.8, entropy=True, loss_weight_T=hint, chunk_tokens=2
        )[:3]

    def promised_loss(h: Tensor, w: Tensor) -> Tensor:
        logp, logsumexp, *_ = kernel.linear_token_scores(h, w, targets, loss_weight_T=hint, z_loss=0.1, chunk_tokens=2)
        weights = torch.ones(5) if hint is None else hint
        return 3.0 * (weights * (0.1 * logsumexp**2 - logp)).sum()

    assert torch.autograd.gradcheck(scores, (hidden, weight))
    # The second backward of the check recomputes: equal up to rounding, not bit for bit.
    assert torch.autograd.gradcheck(promised_loss, (hidden, weight), nondet_tol=1e-12)


class CountMatrixProducts(TorchDispatchMode):
    """Counts matrix products that touch the vocabulary, and remembers the largest tensor that was made."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.products, self.largest, self.vocabulary = 0, 0, vocabulary

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.products += 1
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def hinted_loss(scores: TokenScores, weight: Tensor, z_loss: float) -> Tensor:
    return (weight * -scores.logp_T).sum() + z_loss * (weight * scores.logsumexp_T.square()).sum()


def hint_weights(targets: Tensor) -> Tensor:
    torch.manual_seed(9)
    return torch.rand(targets.shape).add(0.1) * (targets >= 0)


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("factor", [1.0, -0.037, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kept_hint_gives_the_gradients_with_three_products(z_loss: float, factor: float, temperature: float) -> None:
    hidden, head, targets = example()
    weight = hint_weights(targets)
    with CountMatrixProducts() as counter:
        scores = head(hidden, targets, temperature=temperature, gradient_hint=GradientHint(weight, z_loss))
        actual = gradients(factor * hinted_loss(scores, weight, z_loss), hidden, head.weight)
    active, rest = int((weight != 0).sum()), int((weight == 0).sum())
    assert counter.products == 3 * -(-active // CHUNK) + -(-rest // CHUNK)  # rows without loss: scores only
    wide_weight = weight.double()
    expected_scores = oracle(hidden, head.weight, targets, temperature)
    expected = gradients(factor * hinted_loss(expected_scores, wide_weight, z_loss), hidden, head.weight)
    for a, e in zip(actual, expected):
        assert_close_relative(a, e, 2e-6)
    torch.testing.assert_close(scores.logsumexp_T.double(), expected_scores.logsumexp_T, rtol=1e-5, atol=1e-5)


def _another_weight(scores: TokenScores, weight: Tensor) -> Tensor:
    return hinted_loss(scores, weight + 0.001 * (torch.arange(TOKENS) == 3), 0.01)


def _another_z(scores: TokenScores, weight: Tensor) -> Tensor:
    return hinted_loss(scores, weight, 0.0101)


def _no_z(scores: TokenScores, weight: Tensor) -> Tensor:
    return (weight * -scores.logp_T).sum()


def _entropy_too(scores: TokenScores, weight: Tensor) -> Tensor:
    return hinted_loss(scores, weight, 0.01) - 0.01 * scores.entropy_T.sum()


def _a_masked_row(scores: TokenScores, weight: Tensor) -> Tensor:
    return hinted_loss(scores, weight, 0.01) + scores.logsumexp_T[0]


def _clipped_ratio(scores: TokenScores, weight: Tensor) -> Tensor:
    return -(weight * (scores.logp_T - scores.logp_T.detach() + 0.1 * torch.sin(scores.logp_T)).exp()).sum()


@pytest.mark.parametrize("loss", [_another_weight, _another_z, _no_z, _entropy_too, _a_masked_row, _clipped_ratio])
def test_broken_hint_is_still_exact(loss) -> None:
    hidden, head, targets = example()
    weight = hint_weights(targets)
    scores = head(hidden, targets, entropy=True, gradient_hint=GradientHint(weight, 0.01))
    actual = gradients(loss(scores, weight), hidden, head.weight)
    expected = gradients(loss(oracle(hidden, head.weight, targets), weight.double()), hidden, head.weight)
    for a, e in zip(actual, expected):
        assert_close_relative(a, e, 2e-6)


def test_second_backward_through_a_hinted_graph_is_exact() -> None:
    hidden, head, targets = example()
    weight = hint_weights(targets)
    loss = hinted_loss(head(hidden, targets, gradient_hint=GradientHint(weight)), weight, 0.0)
    loss.backward(retain_graph=True)
    first = head.weight.grad.clone(), hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * first[0])
    torch.testing.assert_close(hidden.grad, 2 * first[1])


def test_overflown_loss_gives_no_finite_gradient_from_a_hint() -> None:
    hidden, head, targets = example()
    weight = hint_weights(targets)
    loss = hinted_loss(head(hidden, targets, gradient_hint=GradientHint(weight)), weight, 0.0)
    (loss * float("inf")).backward()
    assert not head.weight.grad.isfinite().all()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_frozen_side_gets_no_gradient_and_no_product(trained: str) -> None:
    hidden, head, targets = example()
    weight = hint_weights(torch.zeros_like(targets))
    hidden.requires_grad_(trained == "hidden")
    head.weight.requires_grad_(trained == "weight")
    with CountMatrixProducts() as counter:
        hinted_loss(head(hidden, targets, gradient_hint=GradientHint(weight)), weight, 0.0).backward()
    assert counter.products == 2 * -(-TOKENS // CHUNK)
    assert (hidden.grad is None) == (trained == "weight")
    assert (head.weight.grad is None) == (trained == "hidden")


@pytest.mark.parametrize("hinted", [False, True])
def test_whole_logits_never_exist(hinted: bool) -> None:
    torch.manual_seed(0)
    tokens, hidden_size, vocabulary, chunk = 64, 8, 500, 4
    head = LanguageModelHead(hidden_size, vocabulary, chunk_tokens=chunk)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    hint = GradientHint(torch.ones(tokens)) if hinted else None
    with CountMatrixProducts() as recorder:
        scores = head(hidden, targets, entropy=True, rank=True, gradient_hint=hint)
        (scores.logp_T.sum() if hinted else scores.logp_T.sum() + scores.entropy_T.sum()).backward()
    assert recorder.largest == max(vocabulary * hidden_size, chunk * vocabulary)
    with CountMatrixProducts() as recorder:
        F.cross_entropy(F.linear(hidden, head.weight), targets).backward()
    assert recorder.largest >= tokens * vocabulary  # the recorder sees what it is meant to see


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 32_768, 70_001, 152_064])
def test_default_chunk_keeps_to_its_budget(vocabulary: int, dtype: torch.dtype, scratch: bool) -> None:
    hidden, weight = torch.empty(2_000_000, 1, dtype=dtype), torch.empty(vocabulary, 1, dtype=dtype)
    buffers = kernel._Buffers(hidden, weight, kernel._Plan(1.0, scratch, False, 0.0, None), with_scratch=scratch)
    held = buffers.logits_CV.nbytes * (2 if scratch else 1)
    if dtype == torch.bfloat16:
        held += buffers.logits_CV.nbytes // 2
    assert (16 << 20) < held <= (56 << 20)
    assert held <= (32 << 20) or buffers.chunk_tokens <= 128


def test_hinted_gradient_becomes_the_parameter_gradient_without_a_copy() -> None:
    hidden, head, targets = example()
    scores = head(hidden, targets, gradient_hint=GradientHint(torch.ones(TOKENS)))
    made = scores.logp_T.grad_fn.promised[1].data_ptr()
    (-3.0 * scores.logp_T.sum()).backward()
    assert head.weight.grad.data_ptr() == made


def test_hinted_gradients_are_freed_with_the_graph() -> None:
    hidden, head, targets = example()
    scores = head(hidden, targets, gradient_hint=GradientHint(torch.ones(TOKENS)))
    held = weakref.ref(scores.logp_T.grad_fn.promised[1])
    gc.disable()
    try:
        del scores
        assert held() is None
    finally:
        gc.enable()


def test_nothing_is_prepared_without_grad() -> None:
    hidden, head, targets = example()
    hint = GradientHint(hint_weights(targets))
    with torch.no_grad(), CountMatrixProducts() as counter:
        scores = head(hidden, targets, gradient_hint=hint)
    assert counter.products == -(-TOKENS // CHUNK)
    assert not scores.logp_T.requires_grad


@pytest.mark.parametrize("hinted", [False, True])
def test_no_tokens(hinted: bool) -> None:
    hidden, head, targets = example(tokens=0)
    hint = GradientHint(torch.zeros(0)) if hinted else None
    scores = head(hidden, targets, entropy=True, rank=True, gradient_hint=hint)
    assert [s.shape for s in scores] == [(0,)] * 4
    (scores.logp_T.sum() + scores.entropy_T.sum()).backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("hinted", [False, True])
def test_only_masked_tokens(hinted: bool) -> None:
    hidden, head, _ = example()
    targets = torch.full((TOKENS,), -100)
    hint = GradientHint(torch.zeros(TOKENS), 0.1) if hinted else None
    scores = head(hidden, targets, rank=True, gradient_hint=hint)
    assert not scores.logp_T.any()
    assert not scores.rank_T.any()
    torch.testing.assert_close(scores.logsumexp_T.double(), oracle(hidden, head.weight, targets).logsumexp_T)
    scores.logp_T.sum().backward()
    assert not head.weight.grad.any()
    assert not hidden.grad.any()


@pytest.mark.parametrize("hinted", [False, True])
def test_tied_weight_adds_both_gradients(hinted: bool) -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(VOCABULARY, HIDDEN), LanguageModelHead(HIDDEN, VOCABULARY, chunk_tokens=CHUNK)
    head.tie(embedding.weight)
    assert head.weight is embedding.weight
    inputs, targets = torch.randint(0, VOCABULARY, (2, TOKENS))
    hint = GradientHint(torch.ones(TOKENS)) if hinted else None
    (-head(embedding(inputs).tanh(), targets, gradient_hint=hint).logp_T.sum()).backward()
    weight = embedding.weight.detach().double().requires_grad_()
    F.cross_entropy(weight[inputs].tanh() @ weight.T, targets, reduction="sum").backward()
    assert_close_relative(embedding.weight.grad, weight.grad, 2e-6)


@pytest.mark.parametrize("hinted", [False, True])
def test_bfloat16_is_as_good_as_whole_logits_in_bfloat16(hinted: bool) -> None:
    hidden, head, targets = example(torch.bfloat16)
    weight = hint_weights(targets)
    scores = head(hidden, targets, entropy=True, gradient_hint=GradientHint(weight) if hinted else None)
    assert scores.logp_T.dtype == scores.logsumexp_T.dtype == scores.entropy_T.dtype == torch.float32
    actual = gradients(hinted_loss(scores, weight, 0.0) * 0.3, hidden, head.weight)
    plain = kernel.linear_token_scores_plain(hidden, head.weight, targets)
    reference = gradients(hinted_loss(TokenScores(*plain), weight, 0.0) * 0.3, hidden, head.weight)
    exact_scores = oracle(hidden, head.weight, targets)
    exact = gradients(hinted_loss(exact_scores, weight.double(), 0.0) * 0.3, hidden, head.weight)
    torch.testing.assert_close(scores.logp_T.double(), exact_scores.logp_T, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(scores.logp_T, plain[0], rtol=1e-5, atol=1e-5)
    for a, r, e in zip(actual, reference, exact):
        assert (a - e).norm() <= 1.5 * (r - e).norm() + 1e-3 * e.norm()
        assert_close_relative(a, e, 1e-2)


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    tokens = 512
    head = LanguageModelHead(8, 11, chunk_tokens=1).bfloat16()
    hidden = torch.randn(tokens, 8).add(0.5).bfloat16()
    targets = torch.randint(0, 11, (tokens,))
    loss = -head(hidden, targets, gradient_hint=GradientHint(torch.ones(tokens))).logp_T.sum()
    (actual,) = gradients(loss, head.weight)
    (expected,) = gradients(-oracle(hidden, head.weight, targets).logp_T.sum(), head.weight)
    assert_close_relative(actual, expected, 5e-3)


def test_float16_waits_for_the_loss_scale() -> None:
    hidden, head, targets = example(torch.float16)
    weight = hint_weights(targets) * 1e-7  # without the scale these gradients are zero in float16
    scores = head(hidden, targets, gradient_hint=GradientHint(weight))
    actual = gradients(hinted_loss(scores, weight, 0.0) * 1e7, hidden, head.weight)
    exact_scores = oracle(hidden, head.weight, targets)
    expected = gradients(hinted_loss(exact_scores, weight.double(), 0.0) * 1e7, hidden, head.weight)
    for a, e in zip(actual, expected):
        assert_close_relative(a, e, 5e-3)


@pytest.mark.parametrize("hinted", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_works_like_a_linear_layer(hinted: bool, backward_inside: bool) -> None:
    hidden, head, targets = example()
    weight = hint_weights(targets)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(hidden, targets, gradient_hint=GradientHint(weight) if hinted else None)
        logits = F.linear(hidden, head.weight)
        assert torch.equal(head(hidden), logits)
        assert logits.dtype == torch.bfloat16
    expected = -F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(scores.logp_T, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        actual = torch.autograd.grad(hinted_loss(scores, weight, 0.0), (hidden, head.weight))
    reference = torch.autograd.grad((weight * -expected).sum(), (hidden, head.weight))
    for a, r in zip(actual, reference):
        assert a.dtype == torch.float32
        assert_close_relative(a, r, 1e-2)


def test_float32_logits_of_a_bfloat16_model_are_exact() -> None:
    hidden, head, targets = example(torch.bfloat16)
    head.logits_dtype = torch.float32
    expected = oracle(hidden, head.weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        scores, logits = head(hidden, targets, rank=True), head(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(scores.logp_T.double(), expected.logp_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), hidden.double() @ head.weight.double().T, rtol=1e-5, atol=1e-5)
    actual, reference = (gradients(-s.logp_T.sum(), hidden, head.weight) for s in (scores, expected))
    grads = torch.autograd.grad(head(hidden, targets).logp_T.sum(), (hidden, head.weight))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    for a, e in zip(actual, reference):
        assert_close_relative(a, e, 4e-3)


@pytest.mark.parametrize("hinted", [False, True])
def test_float32_logits_have_float32_gradients_under_autocast(hinted: bool) -> None:
    hidden, head, targets = example()
    head.logits_dtype = torch.float32
    weight = hint_weights(targets)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(hidden, targets, gradient_hint=GradientHint(weight) if hinted else None)
        actual = gradients(hinted_loss(scores, weight, 0.0), hidden, head.weight)
    expected_scores = oracle(hidden, head.weight, targets)
    expected = gradients(hinted_loss(expected_scores, weight.double(), 0.0), hidden, head.weight)
    for a, e in zip(actual, expected):
        assert_close_relative(a, e, 2e-6)


def test_huge_logits_stay_finite() -> None:
    hidden, head, targets = example()
    with torch.no_grad():
        hidden *= 300
    scores = head(hidden, targets, entropy=True)
    expected = oracle(hidden, head.weight, targets)
    for name in ("logp_T", "logsumexp_T", "entropy_T"):
        torch.testing.assert_close(getattr(scores, name).double(), getattr(expected, name), rtol=1e-5, atol=2e-3)
    (scores.logp_T.sum() + scores.entropy_T.sum()).backward()
    assert head.weight.grad.isfinite().all()


def test_plain_form_equals_the_oracle() -> None:
    hidden, head, targets = example(torch.float64)
    plain = kernel.linear_token_scores_plain(hidden, head.weight, targets, temperature=0.7, entropy=True, rank=True)
    for p, e in zip(plain, oracle(hidden, head.weight, targets, 0.7)):
        torch.testing.assert_close(p, e)


def test_logits_have_any_leading_shape_and_a_gradient() -> None:
    _, head, _ = example()
    hidden = torch.randn(2, 3, HIDDEN)
    logits = head(hidden)
    assert torch.equal(logits, F.linear(hidden, head.weight))
    logits.sum().backward()
    assert head.weight.grad is not None


def test_bad_arguments_are_named() -> None:
    hidden, head, targets = example()
    with pytest.raises(ValueError, match=r"logits_dtype = torch.bfloat16 must be None"):
        LanguageModelHead(4, 8, logits_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="vocabulary_size = 0"):
        LanguageModelHead(4, 0)
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        LanguageModelHead(4, 8, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"temperature = 0\.0 must be finite and greater than 0"):
        head(hidden, targets, temperature=0.0)
    with pytest.raises(ValueError, match=r"targets_T \(36,\) must have one entry for each of 37 tokens"):
        head(hidden, targets[1:])
    with pytest.raises(ValueError, match="must hold integer token ids"):
        head(hidden, targets.float())
    with pytest.raises(ValueError, match=r"loss_weight_T \(3,\)"):
        head(hidden, targets, gradient_hint=GradientHint(torch.ones(3)))
    with pytest.raises(ValueError, match="need targets_T"):
        head(hidden, entropy=True)
    with pytest.raises(ValueError, match=r"weight_T must be a floating-point vector"):
        GradientHint(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"z_loss = nan must be finite"):
        GradientHint(torch.ones(3), float("nan"))
    with pytest.raises(ValueError, match=r"embedding weight \(103, 25\)"):
        head.tie(nn.Parameter(torch.empty(VOCABULARY, HIDDEN + 1)))
    with pytest.raises(ValueError, match="they must be equal"):
        head(hidden.double(), targets)
