"""Laws of selection against enumeration of every tuple of draws, and the published numbers of arXiv
2401.01879 and of majority votes.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from samplers.search import laws

P = np.array([0.35, 0.2, 0.15, 0.2, 0.1])
LOG_P = np.log(P)
SCORES = np.array([1.0, 2.0, 2.0, 0.0, 3.0])
"""The example of the reference: two strings tie."""


def tuples(num: int, n: int) -> np.ndarray:
    return np.array(list(itertools.product(range(num), repeat=n)))


def enumerated(n: int) -> np.ndarray:
    """The law of best-of-n, from all tuples of n strings; a draw among the tied ones."""
    law = np.zeros(P.size)
    for draws in tuples(P.size, n):
        best = draws[SCORES[draws] == SCORES[draws].max()]
        np.add.at(law, best, P[draws].prod() / best.size)
    return law


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_best_of_n_is_the_law_of_all_tuples(n: int):
    np.testing.assert_allclose(laws.best_of_n(LOG_P, SCORES, n), enumerated(n), atol=1e-12)


def test_the_law_of_the_example_breaks_ties_over_draws():
    """.3226 for the second string; a vote among those that tie would give it .3264."""
    law = laws.best_of_n(LOG_P, SCORES, 4)
    assert round(law[1], 4) == 0.3226
    np.testing.assert_allclose(law[1] / law[2], 0.2 / 0.15, rtol=1e-12)


def test_log_probabilities_are_normalised_and_impossible_strings_stay_so():
    log_p = np.append(LOG_P + 3.0, -np.inf)
    law = laws.best_of_n(log_p, np.append(SCORES, 9.0), 4)
    np.testing.assert_allclose(law[:-1], enumerated(4), atol=1e-12)
    assert law[-1] == 0
    rejected = laws.best_of_n(LOG_P, np.where(SCORES > 0, SCORES, -np.inf), 3)
    np.testing.assert_allclose(rejected, laws.best_of_n(LOG_P, SCORES, 3), atol=1e-15)


KL = {2: 0.1706, 4: 0.5648, 16: 1.590, 64: 2.292, 1024: 2.3026}
BOUND = {2: 0.1931, 4: 0.6363, 16: 1.835, 64: 3.175, 1024: 5.932}


@pytest.mark.parametrize("n", KL)
def test_kl_of_the_example_is_not_its_bound(n: int):
    kl, law = laws.best_of_n_kl(LOG_P, SCORES, n), laws.best_of_n(LOG_P, SCORES, n)
    assert abs(kl - KL[n]) < 6e-4 and abs(laws.best_of_n_kl_bound(n) - BOUND[n]) < 6e-4
    np.testing.assert_allclose(kl, stats.entropy(law, P), atol=1e-12)
    assert kl < laws.best_of_n_kl_bound(n) - 0.02


def test_kl_saturates_where_scores_tie_and_meets_the_bound_where_none_do():
    np.testing.assert_allclose(laws.best_of_n_kl(LOG_P, SCORES, 10**6), math.log(10), atol=1e-9)
    many = np.arange(200_000)
    kl = laws.best_of_n_kl(np.zeros(many.size), many, 16)
    np.testing.assert_allclose(kl, laws.best_of_n_kl_bound(16), atol=1e-4)
    # Far in the tail nothing cancels: the first of a million equal levels at n = 2.
    law = laws.best_of_n(np.zeros(10**6), np.arange(10**6), 2)
    np.testing.assert_allclose(law[[0, -1]], [1e-12, 2e-6 - 1e-12], rtol=1e-6)


def test_the_best_of_continuous_scores_wins_n_times_of_n_plus_one():
    many = np.arange(4000)
    law = laws.best_of_n(np.zeros(many.size), many, 7)
    np.testing.assert_allclose(law @ (many + 0.5) / many.size, 7 / 8, atol=1e-4)
    chi_squared = (law**2).sum() * many.size - 1
    np.testing.assert_allclose(chi_squared, 49 / 13 - 1, atol=1e-2)


def test_moments_of_the_best_score():
    draws = tuples(P.size, 4)
    weights, best = P[draws].prod(1), SCORES[draws].max(1)
    mean = weights @ best
    found = laws.best_of_n_moments(LOG_P, SCORES, 4)
    np.testing.assert_allclose(found, [mean, weights @ (best - mean) ** 2], atol=1e-12)
    assert laws.best_of_n_moments(LOG_P, np.where(SCORES > 0, SCORES, -np.inf), 4)[0] == -math.inf


def test_the_highest_of_draws_with_laws_of_their_own():
    rng = np.random.default_rng(0)
    probs, values = rng.dirichlet(np.ones(4), size=3), rng.normal(size=4)
    expected = sum(
        probs[[0, 1, 2], list(draws)].prod() * values[list(draws)].max()
        for draws in itertools.product(range(4), repeat=3)
    )
    np.testing.assert_allclose(laws.expected_max(probs, values), expected, atol=1e-12)
    # Of three draws from one law it is the moment of best-of-3.
    same = laws.expected_max(np.tile(P, (3, 1)), SCORES)
    np.testing.assert_allclose(same, laws.best_of_n_moments(LOG_P, SCORES, 3)[0], atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_soft_best_of_n_is_the_law_of_all_tuples(n: int, temperature: float):
    draws = tuples(P.size, n)
    w = np.exp(SCORES / temperature)[draws]
    law = np.zeros(P.size)
    np.add.at(law, draws, P[draws].prod(1)[:, None] * w / w.sum(1, keepdims=True))
    found = laws.soft_best_of_n(LOG_P, SCORES, n, temperature)
    np.testing.assert_allclose(found, law, atol=1e-12)


def test_soft_best_of_n_lies_between_its_limits():
    np.testing.assert_allclose(laws.soft_best_of_n(LOG_P, SCORES, 9, 1e9), P, atol=1e-8)
    np.testing.assert_allclose(
        laws.soft_best_of_n(LOG_P, SCORES, 4, 1e-2), enumerated(4), atol=1e-12
    )
    np.testing.assert_array_equal(
        laws.soft_best_of_n(LOG_P, SCORES, 4, 0.0), laws.best_of_n(LOG_P, SCORES, 4)
    )
    tilted = P * np.exp(SCORES / 0.5)
    tilted /= tilted.sum()
    w = np.exp(SCORES / 0.5)
    cv2 = (P @ w**2) / (P @ w) ** 2 - 1
    for n in (1, 2, 4, 16, 256):
        law = laws.soft_best_of_n(LOG_P, SCORES, n, 0.5)
        assert 0 < (tilted * np.log(tilted / law)).sum() <= math.log1p(cv2 / n)
    # One string whose weight is 0: all n draws are it with probability .2^n.
    law = laws.soft_best_of_n(LOG_P, np.where(SCORES > 0, SCORES, -np.inf), 3, 0.5)
    assert law[3] == 0
    np.testing.assert_allclose(law.sum(), 1 - 0.2**3, atol=1e-12)


def votes(p: np.ndarray, n: int) -> np.ndarray:
    """The law of the majority from every multinomial outcome."""
    law = np.zeros(p.size)
    for first in itertools.product(range(n + 1), repeat=p.size - 1):
        if sum(first) <= n:
            counts = np.array([*first, n - sum(first)])
            most = counts == counts.max()
            law += stats.multinomial.pmf(counts, n, p) * most / most.sum()
    return law


@pytest.mark.parametrize("n", [1, 2, 3, 6, 11])
def test_majority_is_the_law_of_all_counts(n: int):
    for p in (np.array([0.45, 0.35, 0.2]), np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.3, 0.7])):
        np.testing.assert_allclose(laws.majority(p, n), votes(p, n), atol=1e-12)


def test_majority_of_the_reference():
    p = [0.45, 0.35, 0.2]
    wrong = [1 - laws.majority(p, n)[0] for n in (1, 5, 11, 21, 41, 81)]
    np.testing.assert_allclose(wrong, [0.55, 0.476, 0.398, 0.323, 0.241, 0.157], atol=6e-4)
    right = [laws.majority([0.4, 0.35, 0.25], n)[0] for n in range(1, 7)]
    np.testing.assert_allclose(right, [0.4, 0.4, 0.422, 0.436, 0.443, 0.455], atol=6e-4)
    # At most the union of the pairwise bounds, of which the greater has this exponent.
    rates = [1 - (math.sqrt(0.45) - math.sqrt(q)) ** 2 for q in (0.35, 0.2)]
    assert 1 - laws.majority(p, 201)[0] < sum(rate**201 for rate in rates)
    assert abs(-math.log(rates[0]) - 0.0063) < 5e-5


def test_many_answers_and_impossible_ones():
    """A right answer that is not the likeliest, among hundreds of rare ones: each rare one as
    likely as the other, and the right one against 20,000 votes.
    """
    p = np.array([0.2, 0.5, *[0.001] * 300])
    counts = np.random.default_rng(0).multinomial(6, p, size=20_000)
    most = counts == counts.max(1, keepdims=True)
    share = most[:, 0] / most.sum(1)
    law = laws.majority(p, 6)
    assert abs(law[0] - share.mean()) < 5 * share.std() / 20_000**0.5
    np.testing.assert_allclose(law[2:], law[2])
    np.testing.assert_allclose(law.sum(), 1, atol=1e-12)
    with_none = laws.majority([0.0, 0.6, 0.4], 5)
    np.testing.assert_allclose(with_none, [0, *votes(np.array([0.6, 0.4]), 5)])
    np.testing.assert_allclose(laws.majority([1.0], 3), [1.0])


def test_arrays_of_jax_are_as_good():
    law = laws.best_of_n(jnp.asarray(LOG_P), jnp.asarray(SCORES), 4)
    assert law.dtype == np.float64
    np.testing.assert_allclose(law, enumerated(4), atol=1e-6)


def test_the_bound_reported_as_the_kl_would_be_seen():
    """The planted faults: the bound for the KL, and ties that the first string wins."""
    assert abs(laws.best_of_n_kl_bound(16) - KL[16]) > 0.2
    below = np.array([P[SCORES < s].sum() for s in SCORES])
    first = (below + P) ** 4 - below**4
    assert abs(first.sum() - 1) > 0.05 and np.abs(first - enumerated(4)).max() > 0.05


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="n to be a whole number of at least 1, got 0"):
        laws.best_of_n(LOG_P, SCORES, 0)
    with pytest.raises(ValueError, match="a score for each of 5 strings, got 4"):
        laws.best_of_n(LOG_P, SCORES[:4], 2)
    with pytest.raises(ValueError, match="scores .* got NaN among them"):
        laws.best_of_n_kl(LOG_P, [1, math.nan, 2, 3, 4], 2)
    with pytest.raises(ValueError, match="some are possible, got a total of 0"):
        laws.best_of_n([-math.inf], [1.0], 2)
    with pytest.raises(ValueError, match="sum to 1, got 0.9"):
        laws.majority([0.5, 0.4], 3)
    with pytest.raises(ValueError, match="between 0 and 1, got -0.1"):
        laws.majority([-0.1, 1.1], 3)
    with pytest.raises(ValueError, match="temperature of at least 0, got -1"):
        laws.soft_best_of_n(LOG_P, SCORES, 2, -1.0)
    with pytest.raises(ValueError, match="one for every value"):
        laws.expected_max(np.array([[0.5, 0.5]]), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="shape \\[0\\]"):
        laws.majority([], 3)
