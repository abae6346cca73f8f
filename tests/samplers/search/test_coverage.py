"""Coverage: its estimate's variance and the Beta laws by sums over outcomes, fits on problems whose
truth is known, and inverse sampling by its own law.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from samplers.search import coverage


def pass_at_k(correct: np.ndarray, num: int, k: int) -> np.ndarray:
    return np.asarray(1 - special.comb(num - correct, k) / special.comb(num, k))


def test_the_variance_of_the_unbiased_estimate():
    """The reference's example: standard deviation .293, and a plug-in of mean .568 for .651."""
    correct = np.arange(21)
    law, truth = stats.binom.pmf(correct, 20, 0.1), 1 - 0.9**10
    unbiased, plug_in = pass_at_k(correct, 20, 10), 1 - (1 - correct / 20) ** 10
    np.testing.assert_allclose(law @ unbiased, truth, atol=1e-12)
    variance = coverage.pass_at_k_variance(0.1, 20, 10)
    np.testing.assert_allclose(variance, law @ (unbiased - truth) ** 2, atol=1e-12)
    assert abs(math.sqrt(variance) - 0.293) < 5e-4
    assert abs(law @ plug_in - 0.568) < 5e-4 and abs(truth - 0.651) < 5e-4
    blocks = math.sqrt(truth * (1 - truth) / 2)
    assert abs(blocks - 0.337) < 5e-4 and variance < blocks**2
    np.testing.assert_allclose(coverage.pass_at_k_variance(0.3, 50, 1), 0.3 * 0.7 / 50, rtol=1e-9)
    np.testing.assert_allclose(
        coverage.pass_at_k_variance(0.1, 10, 10), 0.9**10 * (1 - 0.9**10), rtol=1e-9
    )


def test_laws_of_success_are_integrals():
    a, b, possible = np.array([0.4, 2.0]), np.array([3.0, 1.5]), np.array([1.0, 0.6])
    law = coverage.Posterior(a=a, b=b, possible=possible)
    for i, n in itertools.product(range(2), (0, 3, 20)):

        def density(p: float, power: int, n: int = n, i: int = i) -> float:
            return float(p**power * (1 - p) ** n * stats.beta.pdf(p, a[i], b[i]))

        failed = integrate.quad(density, 0, 1, args=(0,))[0]
        gain = integrate.quad(density, 0, 1, args=(1,))[0]
        np.testing.assert_allclose(law.coverage(n)[i], possible[i] * (1 - failed), atol=1e-8)
        np.testing.assert_allclose(law.marginal(n)[i], possible[i] * gain, atol=1e-8)
    n = np.array([4, 7])
    np.testing.assert_allclose(law.marginal(n), law.coverage(n + 1) - law.coverage(n), atol=1e-12)
    certain = coverage.Posterior(a=a, b=b, possible=np.ones(2))
    np.testing.assert_allclose(certain.chance(n), a / (a + b + n), rtol=1e-9)
    assert (law.chance(n)[1] < certain.chance(n)[1]) and law.chance(n)[0] == certain.chance(n)[0]
    known = coverage.Known(p=np.array([0.0, 0.3, 1.0]))
    np.testing.assert_allclose(known.coverage(3), [0, 1 - 0.7**3, 1], atol=1e-15)
    np.testing.assert_allclose(known.coverage(0), [0, 0, 0])
    np.testing.assert_allclose(known.marginal(0), [0, 0.3, 1])
    np.testing.assert_allclose(known.marginal(2), [0, 0.3 * 0.49, 0])


def test_extrapolation_a_hundredfold():
    """The reference's test: 300 problems of Beta(.35, 2), 100 draws each, coverage at 10^4."""
    rng = np.random.default_rng(3)
    p = rng.beta(0.35, 2.0, 300)
    correct, truth = rng.binomial(100, p), (1 - (1 - p) ** 1e4).mean()
    law = coverage.beta_binomial(correct, 100, hopeless=False)
    ks = np.unique(np.geomspace(1, 100, 40).round())
    curve = [pass_at_k(correct, 100, int(k)).mean() for k in ks]
    power = coverage.exponentiated_power(ks, curve)
    assert abs(law.a - 0.35) < 0.05 and abs(law.b - 2) < 0.5 and law.hopeless == 0
    found = truth, float(law.coverage(1e4)), float(power.coverage(1e4))
    np.testing.assert_allclose(found, [0.936, 0.944, 0.955], atol=1e-3)
    assert np.abs(law.coverage(ks) - curve).max() < 0.01
    assert np.abs(power.coverage(ks) - curve).max() < 0.01


def test_the_unsolved_share_falls_as_the_tail_of_hard_problems():
    law = coverage.BetaBinomial(a=0.35, b=2.0, hopeless=0.0, log_likelihood=0.0)
    k = 1e6
    limit = math.gamma(2.35) / math.gamma(2) * k**-0.35
    np.testing.assert_allclose(1 - law.coverage(k), limit, rtol=1e-5)


def test_problems_that_cannot_be_solved_are_not_taken_for_hard_ones():
    rng = np.random.default_rng(1)
    p = np.where(rng.random(1000) < 0.3, 0.0, rng.beta(2.0, 3.0, 1000))
    correct, truth = rng.binomial(20, p), (p > 0).mean()
    law = coverage.beta_binomial(correct, 20)
    without = coverage.beta_binomial(correct, 20, hopeless=False)
    assert abs(law.hopeless - (1 - truth)) < 0.02 and law.log_likelihood > without.log_likelihood
    assert abs(law.coverage(1e4) - truth) < 0.02 and float(without.coverage(1e4)) > truth + 0.05
    after = law.after(correct, 20)
    assert (after.possible[correct > 0] == 1).all()
    never = correct == 0
    np.testing.assert_allclose(after.possible[never], (p[never] > 0).mean(), atol=0.05)
    # Of these problems the share that 100 more draws solve is what is predicted for them.
    solved = 1 - (1 - p) ** 100
    error = after.coverage(100).mean() - solved.mean()
    assert abs(error) < 5 * (solved - after.coverage(100)).std() / 1000**0.5


def test_what_is_known_after_some_draws_is_bayes_rule():
    """1 - P(c of N, then k failures) / P(c of N), by integrals over the success rate."""
    law = coverage.BetaBinomial(a=0.7, b=2.5, hopeless=0.2, log_likelihood=0.0)
    correct, num, k = [0, 1, 3], [5, 4, 6], 7
    found = law.after(correct, num)

    def joint(c: int, n: int, later: int) -> float:
        def density(p: float) -> float:
            return float(p**c * (1 - p) ** (n - c + later) * stats.beta.pdf(p, 0.7, 2.5))

        return 0.8 * integrate.quad(density, 0, 1)[0] + 0.2 * (c == 0)

    expected = [1 - joint(c, n, k) / joint(c, n, 0) for c, n in zip(correct, num, strict=True)]
    np.testing.assert_allclose(found.coverage(k), expected, atol=1e-7)


def test_the_likelihood_is_that_of_the_counts():
    law = coverage.beta_binomial([0, 0, 3, 5, 1, 2], [5, 5, 5, 5, 4, 8])
    terms = stats.betabinom.pmf([0, 0, 3, 5, 1, 2], [5, 5, 5, 5, 4, 8], law.a, law.b)
    terms = (1 - law.hopeless) * terms + law.hopeless * np.array([1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(law.log_likelihood, np.log(terms).sum(), atol=1e-9)
    nothing = coverage.beta_binomial([0, 0, 0], 10)
    assert nothing.coverage(100) < 0.01
    assert coverage.beta_binomial([10, 10], 10).coverage(1) > 0.99


def test_a_curve_that_is_an_exponentiated_power_is_found():
    ks = np.geomspace(1, 1000, 40)
    truth = coverage.ExponentiatedPower(a=-2.0, b=-0.4)
    found = coverage.exponentiated_power(ks, truth.coverage(ks))
    np.testing.assert_allclose([found.a, found.b], [-2.0, -0.4], rtol=1e-6)
    # What is solved at once, or never, has a curve too.
    assert coverage.exponentiated_power([1, 10], [1.0, 1.0]).coverage(5) > 0.999
    assert coverage.exponentiated_power([1, 10], [0.0, 0.0]).coverage(5) < 0.01


def attempts(r: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of attempts until the r-th success and their probabilities."""
    num = np.arange(r, 3000)
    return num, stats.nbinom.pmf(num - r, r, p)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_inverse_sampling_is_unbiased(r: int):
    """T14, by the law of the number of attempts: cost 2 an attempt, p = .2."""
    num, law = attempts(r, 0.2)
    found = [coverage.cost_of_pass([2.0] * n, [False] * (n - r) + [True] * r) for n in num[:400]]
    values, rates = [f.value for f in found], [f.success_rate for f in found]
    np.testing.assert_allclose(values @ law[:400], 2 / 0.2, rtol=1e-9)
    np.testing.assert_allclose(rates @ law[:400], 0.2, rtol=1e-9)
    # The plant: r / attempts for the rate.
    assert abs((r / num) @ law - 0.2) > 0.01


def test_the_plug_in_cost_has_no_expectation():
    assert abs(stats.binom.pmf(0, 8, 0.2) - 0.168) < 5e-4


def test_the_standard_error_is_that_of_cycles():
    cost = np.array([1.0, 2.0, 4.0, 1.0, 3.0])
    out = coverage.cost_of_pass(cost, [False, True, True, False, True])
    cycles = np.array([3.0, 4.0, 4.0])
    np.testing.assert_allclose(out.value, cycles.mean())
    np.testing.assert_allclose(out.std_error, cycles.std(ddof=1) / 3**0.5)
    assert out.success_rate == 0.5
    one = coverage.cost_of_pass([7.0], [True])
    assert (one.value, one.std_error, one.success_rate) == (7.0, math.inf, 1.0)


def test_drawing_several_at_once_costs_more_per_success():
    found = [coverage.premium(0.2, k) for k in (1, 2, 4, 8)]
    np.testing.assert_allclose(found, [1, 1.11, 1.355, 1.92], atol=5e-3)
    assert coverage.premium(0.0, 3) == 1.0


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="at least k = 11 draws, got 10"):
        coverage.pass_at_k_variance(0.1, 10, 11)
    with pytest.raises(ValueError, match="p between 0 and 1, got 10"):
        coverage.pass_at_k_variance(10, 10, 1)
    with pytest.raises(ValueError, match="counts 0 <= correct <= num"):
        coverage.beta_binomial([3, 11], 10)
    with pytest.raises(ValueError, match="not their share"):
        coverage.beta_binomial([0.5, 0.2], 10)
    with pytest.raises(ValueError, match="at least two numbers of draws, got 1 for 1"):
        coverage.exponentiated_power([1], [0.5])
    with pytest.raises(ValueError, match="end with a success"):
        coverage.cost_of_pass([1.0, 2.0], [True, False])
    with pytest.raises(ValueError, match="got 2 costs for 1 outcomes"):
        coverage.cost_of_pass([1.0, 2.0], [True])
