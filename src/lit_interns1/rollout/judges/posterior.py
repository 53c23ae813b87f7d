"""A reward from several checks by a verifier that errs (OREAL-H, arXiv 2512.10739; read in notes, not in the paper).

    p ~ Beta(k + 1, n − k + 1)        what is known of the probability to pass, after k of n checks, from a flat prior
    R = P(p₁ > p₀)                    p₁ of this response, p₀ of what it is compared with

The notes do not say what it is compared with: that is the caller's choice here. Against the flat prior (0 of 0 checks)
R is Laplace's (k + 1)/(n + 2).
"""

from __future__ import annotations

from math import exp, lgamma, log


def posterior_reward(passed: int, checks: int, other_passed: int = 0, other_checks: int = 0) -> float:
    """P(p₁ > p₀), exactly.

    Args:
        passed: k, checks that this response passed.
        checks: n, all its checks.
        other_passed: Checks that the other passed.
        other_checks: All checks of the other.

    Raises:
        ValueError: If more checks are passed than there are.
    """
    for k, n in ((passed, checks), (other_passed, other_checks)):
        if not 0 <= k <= n:
            raise ValueError(f"passed = {k} must lie between 0 and checks = {n}")
    a, b, c, d = passed + 1, checks - passed + 1, other_passed + 1, other_checks - other_passed + 1
    # Σ_{i<a} B(c + i, b + d) / ((b + i) B(1 + i, b) B(c, d))
    terms = (_log_beta(c + i, b + d) - log(b + i) - _log_beta(1 + i, b) - _log_beta(c, d) for i in range(a))
    return min(sum(exp(term) for term in terms), 1.0)


def _log_beta(a: int, b: int) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
