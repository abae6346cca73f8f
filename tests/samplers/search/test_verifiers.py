"""Imperfect verifiers and judges: by enumeration of what happens, by quadrature of another kind,
and the published numbers of arXiv 2411.17501 and 2512.19905.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from samplers.search import verifiers

PROBS, SOLVED = np.array([0.58, 0.42]), np.array([0.87, 0.13])
CURVE = verifiers.accept_curve(PROBS, SOLVED, completeness=1.0, soundness=0.75, num=30)


def test_precision_falls_with_the_attempts():
    """The reference's numbers: .835 at one attempt, .716 in the end."""
    assert abs(CURVE.precision[0] - 0.835) < 5e-4 and abs(CURVE.ceiling - 0.716) < 5e-4
    assert abs(CURVE.correct[-1] - CURVE.ceiling) < 1e-4
    assert (np.diff(CURVE.precision) < 0).all() and (np.diff(CURVE.correct) > 0).all()
    one = verifiers.accept_curve([1.0], [0.3], completeness=0.9, soundness=0.75, num=30)
    np.testing.assert_allclose(one.precision, 0.27 / (0.27 + 0.175), rtol=1e-12)


def test_the_curve_is_a_sum_over_what_happens():
    """Every sequence of three attempts of each class: accepted and right, accepted and wrong, not
    accepted.
    """
    p, r, c, s = np.array([0.2, 0.5, 0.3]), np.array([0.9, 0.4, 0.0]), 0.8, 0.7
    accepted = correct = 0.0
    for i, attempts in itertools.product(range(3), itertools.product((1, 0, -1), repeat=3)):
        law = {1: c * r[i], 0: (1 - s) * (1 - r[i])}
        law[-1] = 1 - law[1] - law[0]
        weight = p[i] * math.prod(law[a] for a in attempts)
        first = next((a for a in attempts if a >= 0), -1)
        accepted, correct = accepted + weight * (first >= 0), correct + weight * (first == 1)
    out = verifiers.accept_curve(p, r, completeness=c, soundness=s, num=3)
    np.testing.assert_allclose([out.accepted[2], out.correct[2]], [accepted, correct], atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "num", "value"),
    [(-0.7, 3, None), (-1.0, 2, 0.4724), (-2.0, 1, 0.3388), (-4.0, 1, 0.1184), (-8.0, 0, None)],
)
def test_the_best_number_of_attempts(wrong: float, num: int, value: float | None):
    assert CURVE.best_num(wrong) == num
    if value is not None:
        assert abs(CURVE.value(wrong)[num - 1] - value) < 5e-5


def test_what_costs_nothing_is_tried_for_ever():
    assert CURVE.best_num(0.0) == 30 and abs(CURVE.value(0.0)[-1] - 0.7162) < 1e-4
    never = verifiers.accept_curve([1.0], [0.0], completeness=1.0, soundness=1.0, num=3)
    assert never.ceiling == 0 and np.isnan(never.precision).all() and never.best_num(-1.0) == 0


def test_one_precision_for_all_attempts_would_be_seen():
    """The planted fault, the posterior of a class used at every attempt anew (as if classes were
    drawn again): precision would not fall.
    """
    accept = SOLVED + 0.25 * (1 - SOLVED)
    again = (PROBS @ SOLVED) / (PROBS @ accept)
    assert abs(again - CURVE.precision[-1]) > 0.1


JUDGE = {1: 1.25, 2: 0.638, 3: 0.5645, 4: 0.582, 6: 0.659, 8: 0.727, 16: 0.873}


def test_a_wrong_judge_has_a_best_k():
    """The reference's numbers, and the limit (target - truth)^2."""
    found = {k: verifiers.judge_error(k, truth=0.5, target=1.5) for k in JUDGE}
    np.testing.assert_allclose(list(found.values()), list(JUDGE.values()), atol=6e-4)
    assert min(found, key=lambda k: found[k]) == 3
    assert abs(verifiers.judge_error(10**5, truth=0.5, target=1.5) - 1.0) < 1e-3


@pytest.mark.parametrize(("gap", "scaled"), [(0.0, 3.1324), (0.5, 4.0221), (1.0, 8.5148)])
def test_a_right_judge_is_ever_better(gap: float, scaled: float):
    error = verifiers.judge_error(1024, mean=gap, truth=0.0, target=0.0)
    assert abs(1024**2 * error - scaled) < 2e-4


def test_the_best_of_k_by_quadrature_of_another_kind():
    f = (0.3, 0.8)

    def integrand(y: float) -> float:
        u = abs(y - 1.0)
        farther = stats.norm.sf(1.0 + u, *f) + stats.norm.cdf(1.0 - u, *f)
        return float((y - 0.2) ** 2 * 5 * stats.norm.pdf(y, *f) * farther**4)

    expected = sum(integrate.quad(integrand, *ends)[0] for ends in ((-6.0, 1.0), (1.0, 8.0)))
    found = verifiers.judge_error(5, mean=0.3, std=0.8, truth=0.2, target=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_a_soft_judge():
    """k = 2 by a double integral; one answer, or a hot judge, as the law of answers has it."""
    y, h = np.linspace(-8, 8, 1601, retstep=True)
    f, w = stats.norm.pdf(y) * h, np.exp(-((y - 1.5) ** 2) / 0.7)
    share = w[:, None] / (w[:, None] + w)
    expected = f @ (2 * share * ((y - 0.5) ** 2)[:, None]) @ f
    found = verifiers.judge_error(2, truth=0.5, target=1.5, temperature=0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    one = verifiers.judge_error(1, truth=0.5, target=1.5, temperature=0.7)
    np.testing.assert_allclose(one, 1.25, rtol=1e-9)
    # E(T) = E[g] - (1 - 1 / k) Cov(g, q) / T with Cov = s^2 (2 s^2 + 4 (m - t)(m - y_R)).
    hot = verifiers.judge_error(4, truth=0.5, target=1.5, temperature=1e3)
    assert abs((1.25 - hot) * 1e3 - 0.75 * (2 + 4 * 0.5 * 1.5)) < 0.02


def test_a_budget_for_solving_and_verifying():
    """Two solutions with one vote each, and the majority of six, by enumeration."""
    p, yes = np.array([0.4, 0.35, 0.25]), (0.8, 0.3)
    out = verifiers.iso_cost(6, p, true_positive=0.8, false_positive=0.3, verify_cost=1.0)
    np.testing.assert_array_equal(out.num_solutions[:7], [6, 3, 2, 1, 1, 1, 0])
    assert np.isnan(out.accuracy[6:]).all()
    expected = 0.0
    for states in itertools.product(itertools.product((True, False), (1, 0)), repeat=3):
        weight = 1.0
        for correct, vote in states:
            q = yes[0] if correct else yes[1]
            weight *= (0.4 if correct else 0.6) * (q if vote else 1 - q)
        best = [correct for correct, vote in states if vote == max(v for _, v in states)]
        expected += weight * sum(best) / len(best)
    np.testing.assert_allclose(out.accuracy[1], expected, atol=1e-12)
    np.testing.assert_allclose(out.accuracy[3], 0.4, atol=1e-12)  # one solution is not chosen


def test_more_votes_pay_as_the_budget_grows():
    found = [
        verifiers.iso_cost(c, [0.4, 0.3, 0.3], true_positive=0.8, false_positive=0.2)
        for c in (4, 16, 64)
    ]
    assert [out.best for out in found] == [1, 3, 5]
    # With a verifier that knows little, the vote is better.
    poor = verifiers.iso_cost(64, [0.5, 0.3, 0.2], true_positive=0.55, false_positive=0.45)
    assert poor.best == 0


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="for each of 2 classes, got 1"):
        verifiers.accept_curve(PROBS, [0.5], completeness=1.0, soundness=0.75)
    with pytest.raises(ValueError, match="completeness and soundness between 0 and 1, got 1.5"):
        verifiers.accept_curve(PROBS, SOLVED, completeness=1.5, soundness=0.75)
    with pytest.raises(ValueError, match="at least 0.1 std"):
        verifiers.judge_error(3, truth=0.0, target=1.0, temperature=0.01)
    with pytest.raises(ValueError, match="at least one solution"):
        verifiers.iso_cost(0.5, [1.0], true_positive=0.5, false_positive=0.5)
