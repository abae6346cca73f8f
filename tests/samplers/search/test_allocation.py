"""Allocations against brute force over all allocations, and the reference's examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize

from samplers.search import allocation, coverage
from samplers.search.coverage import Known, Posterior

P = np.array([0.6, 0.2, 0.05, 0.01])


def best_of_all(law: Known | Posterior, budget: int, most: int) -> float:
    """The most coverage of any allocation, tried one by one."""
    size = law.marginal(0).size
    draws = np.array(
        [n for n in itertools.product(range(most + 1), repeat=size) if sum(n) <= budget]
    )
    return max(float(law.coverage(n).sum()) for n in draws)


POSTERIOR = Posterior(
    a=np.array([0.5, 2.0, 0.2, 1.0]),
    b=np.array([3.0, 1.0, 0.4, 9.0]),
    possible=np.array([1.0, 1.0, 0.4, 0.9]),
)


@pytest.mark.parametrize("law", [Known(p=P), POSTERIOR], ids=["known", "posterior"])
@pytest.mark.parametrize(("budget", "most"), [(1, 1), (6, 6), (9, 9), (9, 3)])
def test_greedy_is_the_best_of_all_allocations(law: Known | Posterior, budget: int, most: int):
    draws = allocation.greedy(law, budget, most=most)
    assert draws.sum() <= budget and draws.max() <= most
    np.testing.assert_allclose(
        law.coverage(draws).sum(), best_of_all(law, budget, most), atol=1e-12
    )


def test_the_example_of_the_reference():
    law = Known(p=P)
    draws = allocation.greedy(law, 9)
    np.testing.assert_array_equal(draws, [3, 6, 0, 0])
    np.testing.assert_array_equal(draws, allocation.greedy(P.tolist(), 9))
    values = law.coverage(draws).sum(), law.coverage(np.full(4, 9 / 4)).sum()
    np.testing.assert_allclose(values, [1.674, 1.399], atol=5e-4)
    ias = allocation.ias(P)
    np.testing.assert_array_equal(ias, [6, 21, 90, 459])
    assert (law.coverage(ias) >= 0.99).all() and (law.coverage(ias - 1) < 0.99).all()
    np.testing.assert_array_equal(allocation.ias([0.0, 1.0]), [46050, 1])
    # All of the draws that it makes, spent otherwise, solve more.
    best = allocation.greedy(law, int(ias.sum()))
    assert law.coverage(best).sum() > law.coverage(ias).sum() + 1e-3
    half = allocation.greedy(law, 60)
    uniform_by_ias = np.floor(ias * 60 / ias.sum())
    assert law.coverage(half).sum() > law.coverage(uniform_by_ias).sum() + 0.5


def test_draws_that_add_nothing_are_not_made():
    np.testing.assert_array_equal(allocation.greedy(Known(p=np.array([0.0, 1.0])), 5), [0, 1])


def test_at_a_fixed_price_neither_easy_nor_hopeless_prompts_get_many():
    found = allocation.at_price([0.9, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01, 1.0], 0.02)
    np.testing.assert_allclose(found, [1.7, 4.6, 7.6, 15.3, 17.9, 0, 0, 0.1], atol=0.05)
    p, n = 0.3, allocation.at_price([0.3], 0.02)[0]
    assert abs(p * (1 - p) ** n - 0.02) < 1e-12


def test_looking_after_every_draw_solves_more_than_planning():
    """Draw where the next one is likeliest right, and leave what is solved: the value of all
    policies by dynamic programming is that of this one, above the best plan's.
    """
    law = Posterior(a=np.array([0.5, 1.0]), b=np.array([1.0, 3.0]), possible=np.array([0.7, 1.0]))
    chance = np.stack([law.chance(n) for n in range(6)])

    def value(failed: tuple[int, ...], left: int, myopic: bool) -> float:
        """failed: -1 of a prompt that is solved."""
        options = []
        for i in range(2):
            if failed[i] >= 0 and left:
                p = chance[failed[i], i]
                right = tuple(-1 if j == i else n for j, n in enumerate(failed))
                wrong = tuple(n + (j == i) for j, n in enumerate(failed))
                then = p * (1 + value(right, left - 1, myopic))
                options.append((p, then + (1 - p) * value(wrong, left - 1, myopic)))
        if not options:
            return 0.0
        return max(options)[1] if myopic else max(v for _, v in options)

    planned = law.coverage(allocation.greedy(law, 5)).sum()
    np.testing.assert_allclose(value((0, 0), 5, True), value((0, 0), 5, False), atol=1e-12)
    assert value((0, 0), 5, True) > planned + 0.02


C, ALPHA = np.array([1.0, 4.0, 2.0]), np.array([0.3, 1.0, 2.0])


def cost(b: np.ndarray) -> float:
    return float((C * b**-ALPHA).sum())


def test_power_laws_of_the_reference():
    ours, published = allocation.power_law(C, ALPHA, 100), allocation.plan_and_budget(C, ALPHA, 100)
    np.testing.assert_allclose(ours, [44.6, 43.1, 12.3], atol=0.05)
    np.testing.assert_allclose(published, [9.9, 50.2, 39.9], atol=0.06)
    np.testing.assert_allclose([cost(ours), cost(published)], [0.426, 0.583], atol=5e-4)
    np.testing.assert_allclose([ours.sum(), published.sum()], 100)
    slopes = C * ALPHA * ours ** -(ALPHA + 1)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-9)
    # What a numerical optimiser finds is no better.
    found = optimize.minimize(
        lambda x: cost(100 * np.exp(x) / np.exp(x).sum()), np.zeros(3), options={"gtol": 1e-9}
    )
    np.testing.assert_allclose(cost(ours), found.fun, rtol=1e-8)


def test_equal_exponents_make_the_published_form_optimal():
    same = np.full(3, 0.7)
    np.testing.assert_allclose(
        allocation.power_law(C, same, 5), allocation.plan_and_budget(C, same, 5), rtol=1e-9
    )
    np.testing.assert_allclose(allocation.power_law([0, 1, 1], [1, 2, 2], 10), [0, 5, 5])
    extreme = allocation.power_law([1e-12, 1e9], [0.01, 5.0], 1e-3)
    assert (extreme >= 0).all() and abs(extreme.sum() - 1e-3) < 1e-12


def test_gvm_minimises_the_variance_of_the_gradient():
    """The reference's oracle: two prompts, all splits of 1000 draws."""
    p, norm = np.array([0.1, 0.6]), np.array([1.0, 3.0])
    n = np.arange(1, 1000) / 1000
    variance = norm[0] ** 2 / (n * p[0]) + norm[1] ** 2 / ((1 - n) * p[1])
    share = allocation.gvm(p, norm, smooth=0.0)
    assert abs(share[0] - n[variance.argmin()]) < 1e-3
    np.testing.assert_allclose(share[0] / share[1], (1 / 0.1**0.5) / (3 / 0.6**0.5), rtol=1e-12)
    smooth = allocation.gvm([0.001, 0.6, 0.0], [1.0, 1.0, 5.0])
    ratio = np.sqrt((0.6 + 1e-3 / 0.6) / (0.001 + 1e-3 / 0.001))
    np.testing.assert_allclose(smooth, np.array([ratio, 1, 0]) / (1 + ratio), rtol=1e-12)


def test_elimination_keeps_what_the_rule_wants():
    """Of four draws two and two, one at a time: the law of when a prompt of p = .2 is done is that
    of the later of two waits, and the share kept is 1/2, not p.
    """
    p, law, expected, done = 0.2, {(0, 0): 1.0}, 0.0, 0.0
    for _ in range(400):
        later: dict[tuple[int, int], float] = {}
        for (right, wrong), mass in law.items():
            if not allocation.going([right], [wrong], 4)[0]:
                done += mass
                continue
            expected += mass
            for key, step in (((right + 1, wrong), p), ((right, wrong + 1), 1 - p)):
                later[key] = later.get(key, 0.0) + mass * step
        law = later
    # E max(A, B) = E A + E B - E min(A, B), and the first of two of a kind comes after 2 or 3.
    first = 2 * (p**2 + (1 - p) ** 2) + 3 * 2 * p * (1 - p)
    np.testing.assert_allclose([expected, done], [2 / p + 2 / (1 - p) - first, 1], atol=1e-9)
    found = allocation.going([0, 1, 3], [5, 0, 1], 4, balanced=False)
    np.testing.assert_array_equal(found, [True, False, False])
    np.testing.assert_array_equal(allocation.going([1, 1, 2], [2, 1, 9], 3), [False, True, False])


def test_draws_for_estimating_pass_at_k():
    """Of two prompts, the shares with the least variance of the unbiased estimates' mean."""
    p, k, budget = (0.05, 0.3), 4, 600
    share = allocation.for_estimating(p, k)
    split = np.arange(20, 581, 4)
    variance = [
        coverage.pass_at_k_variance(p[0], int(n), k)
        + coverage.pass_at_k_variance(p[1], budget - int(n), k)
        for n in split
    ]
    assert abs(share[0] - split[np.argmin(variance)] / budget) < 0.02


def test_largest_remainders():
    np.testing.assert_array_equal(allocation.rounded([0.1, 0.5, 0.4], 7), [1, 3, 3])
    np.testing.assert_array_equal(allocation.rounded([1, 1, 1], 4), [2, 1, 1])
    rng = np.random.default_rng(0)
    share = rng.random(50)
    draws = allocation.rounded(share, 333)
    assert draws.sum() == 333 and np.abs(draws - 333 * share / share.sum()).max() < 1


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="budget to be a whole number of at least 1, got 0"):
        allocation.greedy(Known(p=P), 0)
    with pytest.raises(ValueError, match="expected law between 0 and 1, got 2"):
        allocation.greedy([0.5, 2.0], 4)
    with pytest.raises(ValueError, match="expected p between 0 and 1, got -1"):
        Known(p=np.array([-1.0]))
    with pytest.raises(ValueError, match="price between 0 and 1"):
        allocation.at_price(P, 0.0)
    with pytest.raises(ValueError, match="certainty between 0 and 1, got 1"):
        allocation.ias(P, certainty=1.0)
    with pytest.raises(ValueError, match="as many alpha above 0"):
        allocation.power_law([1.0], [1.0, 2.0], 3.0)
    with pytest.raises(ValueError, match="as many alpha above 0"):
        allocation.plan_and_budget([1.0], [0.0], 3.0)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        allocation.for_estimating([0.0, 1.0], 2)
    with pytest.raises(ValueError, match="more pilot draws"):
        allocation.gvm([0.0, 0.5], [1.0, 0.0])
    with pytest.raises(ValueError, match="got 1 for 2"):
        allocation.going([0, 1], [1], 4)
    with pytest.raises(ValueError, match="shares of at least 0"):
        allocation.rounded([0.0, 0.0], 3)
