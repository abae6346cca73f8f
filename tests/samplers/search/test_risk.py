"""Finite-sample promises: covered over many calibration sets, and broken by the usual mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from samplers.search import risk

ALPHA, DELTA = 0.2, 0.1
SPLITS = 1000


def prompts(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of answers whose confidence, in tenths, is the probability of being right, but for
    the top, which is a little too sure.
    """
    confidence = rng.integers(1, 11, num) / 10
    right = np.where(confidence == 1, 0.95, confidence)
    return rng.random(num) < right, confidence


def true_risk(tau: float) -> float:
    levels = np.arange(1, 11) / 10
    wrong = 1 - np.where(levels == 1, 0.95, levels)
    return float(wrong[levels >= tau - 1e-9].mean()) if tau < np.inf else 0.0


GRID = np.arange(1, 11) / 10


def test_learn_then_test_covers():
    """P(risk > alpha) <= delta over 1000 calibration sets; taking the lowest threshold whose
    empirical risk is allowed (planted) is wrong far more often.
    """
    rng = np.random.default_rng(0)
    exceeded, planted, answered = 0, 0, 0
    for _ in range(SPLITS):
        right, sure = prompts(rng, 300)
        tau = risk.learn_then_test(right, sure, GRID, ALPHA, DELTA)
        exceeded += true_risk(tau) > ALPHA
        answered += tau < np.inf
        curve = risk.risk_coverage(right, sure)
        allowed = curve.threshold[curve.risk <= ALPHA]
        planted += bool(len(allowed)) and true_risk(float(allowed.min())) > ALPHA
    slack = 3 * (DELTA * (1 - DELTA) / SPLITS) ** 0.5
    assert exceeded / SPLITS <= DELTA + slack and answered > 0.3 * SPLITS
    assert planted / SPLITS > 2 * DELTA


def test_learn_then_test_by_hand():
    """20 of 20 right: P(Bin(20, .2) = 0) = .0115.  Then 20 wrong: not the next threshold."""
    right = np.repeat([True, False], 20)
    sure = np.repeat([0.9, 0.5], 20)
    assert risk.learn_then_test(right, sure, [0.5, 0.9], 0.2, 0.02) == 0.9
    assert risk.learn_then_test(right, sure, [0.5, 0.9], 0.2, 0.01) == np.inf
    # The first test is the highest threshold's, and nothing is shown by no answers.
    assert risk.learn_then_test(right, sure, [0.9, 0.95], 0.2, 0.02) == np.inf
    assert risk.learn_then_test(right, sure, [0.5, 0.9], 0.7, 0.1) == 0.5


def conformal_losses(rng: np.random.Generator, num: int) -> np.ndarray:
    """[n, 201]: 1 while the setting is bolder than what a prompt can bear."""
    return (rng.random((num, 1)) ** 2 > np.linspace(0, 1, 201)).astype(float)


def test_conformal_risk_covers():
    """E[loss of a new prompt] <= alpha, over 1000 calibration sets of 10; without the + B (planted)
    it is more.
    """
    rng = np.random.default_rng(1)
    loss = 1 - np.sqrt(np.linspace(0, 1, 201))
    found, planted = [], []
    for _ in range(SPLITS):
        losses = conformal_losses(rng, 10)
        found.append(loss[risk.conformal_risk(losses, 0.1)])
        planted.append(loss[np.argmax(losses.mean(0) <= 0.1)])
    error = np.std(found) / SPLITS**0.5
    assert 0.05 < np.mean(found) <= 0.1 + 3 * error
    assert np.mean(planted) > 0.1 + 3 * error


def test_conformal_risk_by_hand():
    losses = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], float)
    # (sum + 1) / 4 = 1, .5, .25
    assert [risk.conformal_risk(losses, alpha) for alpha in (1.0, 0.5, 0.3, 0.2)] == [0, 1, 2, 3]


def clipped(scores: np.ndarray, delta: float) -> float:
    """Planted: the index of the quantile is clipped to n."""
    place = min(int(np.ceil((len(scores) + 1) * (1 - delta))), len(scores))
    return float(np.sort(scores)[place - 1])


def test_the_quantile_covers_and_a_clipped_one_does_not():
    """Exactly: the k-th smallest of n is exceeded with probability 1 - k / (n + 1)."""
    rng = np.random.default_rng(2)
    for num in (9, 19, 33, 100):
        scores = rng.random(num)
        for delta in (0.03, 0.05, 0.1, 0.3):
            above = (scores > risk.split_quantile(scores, delta)).sum()
            assert (above + 1) / (num + 1) <= delta or above == 0
            if risk.split_quantile(scores, delta) == np.inf:
                assert 1 / (num + 1) > delta  # what a clipped quantile is exceeded with
                assert clipped(scores, delta) < np.inf
            else:
                assert clipped(scores, delta) == risk.split_quantile(scores, delta)
    # delta = .03 needs 33 scores.
    assert risk.split_quantile(np.arange(32.0), 0.03) == np.inf
    assert risk.split_quantile(np.arange(33.0), 0.03) == 32
    assert risk.split_quantile(np.arange(99.0), 0.07) == 92


CUES, RHO = 10, 0.4


def trajectories(rng: np.random.Generator, num: int) -> np.ndarray:
    """Scores at ten cues, correlated by what the trajectory has as a whole."""
    common = rng.normal(size=(num, 1))
    return RHO**0.5 * common + (1 - RHO) ** 0.5 * rng.normal(size=(num, CUES))


def test_exits_are_calibrated_on_trajectories():
    """Calibrated on cues, a threshold of 5 % is passed on 28 % of the trajectories; on their maxima
    on 5 %.
    """
    rng = np.random.default_rng(3)
    nodes = np.linspace(-8, 8, 2001)
    inside = norm.cdf((norm.ppf(0.95) - RHO**0.5 * nodes) / (1 - RHO) ** 0.5) ** CUES
    exact = 1 - (norm.pdf(nodes) * inside).sum() * (nodes[1] - nodes[0])
    per_cue, per_trajectory = [], []
    for _ in range(SPLITS):
        past, new = trajectories(rng, 200), trajectories(rng, 50)
        peaks = risk.trajectory_scores(new)
        per_cue.append((peaks > risk.split_quantile(past[:, 0], 0.05)).mean())
        threshold = risk.split_quantile(risk.trajectory_scores(past), 0.05)
        per_trajectory.append((peaks > threshold).mean())
    errors = [3 * np.std(x) / SPLITS**0.5 for x in (per_cue, per_trajectory)]
    assert abs(exact - 0.277) < 1e-3 and abs(np.mean(per_cue) - exact) < 0.02
    assert abs(np.mean(per_trajectory) - 10 / 201) < errors[1] < 0.005
    assert 1 - 0.95**CUES > exact  # what independent cues would do


def test_cues_that_are_not_there():
    scores = np.array([[1.0, 9.0], [2.0, 3.0], [5.0, 5.0]])
    there = np.array([[True, False], [True, True], [False, False]])
    np.testing.assert_array_equal(risk.trajectory_scores(scores, there), [1, 3, -np.inf])


def test_risk_against_coverage():
    curve = risk.risk_coverage([1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1])
    np.testing.assert_allclose(curve.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 3, 0.5])
    assert curve.area == pytest.approx(0.5 / 3 + 0.25 / 2)


def test_deferral():
    """By the gap .595 and .615 at shares .3 and .7; by the first model's confidence .51 at .4, .615
    only at .9.
    """
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    p1, p2 = np.array([0.9, 0.5, 0.6, 0.3]), np.array([0.95, 0.5, 0.95, 0.35])
    gap = risk.deferral_curve(p1, p2, weights)
    sure = risk.deferral_curve(p1, p2, weights, by=-p1)
    at = lambda curve, share: curve.accuracy[np.argmin(np.abs(curve.deferred - share))]  # noqa: E731
    np.testing.assert_allclose([at(gap, 0.3), at(sure, 0.4), at(sure, 0.9)], [0.595, 0.51, 0.615])
    np.testing.assert_allclose(gap.accuracy.max(), 0.62)
    np.testing.assert_allclose([gap.accuracy[0], gap.accuracy[-1]], [weights @ p1, weights @ p2])
    assert list(gap.order[:1]) == [2]
    # Optimal: no set of prompts of that share is better.
    for share, accuracy in zip(gap.deferred, gap.accuracy, strict=True):
        for subset in range(16):
            some = np.array([subset >> i & 1 for i in range(4)], bool)
            if abs(np.dot(some, weights) - share) < 1e-9:
                assert accuracy >= np.dot(weights, np.where(some, p2, p1)) - 1e-9


@pytest.mark.parametrize(
    ("wrong", "least"), [(0.0, 0.0), (-1.0, 0.5), (-20.0, 20 / 21), (-np.inf, 1.0)]
)
def test_when_to_answer(wrong: float, least: float):
    threshold = risk.answer_threshold(wrong)
    assert threshold == pytest.approx(least)
    if np.isfinite(wrong):  # there, answering is worth as much as silence
        assert threshold + (1 - threshold) * wrong == pytest.approx(0)


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="expected alpha between 0 and 1, got 1.5"):
        risk.learn_then_test([True], [0.5], [0.5], 1.5, 0.1)
    with pytest.raises(ValueError, match="a confidence for each answer"):
        risk.learn_then_test([True], [0.5, 0.4], [0.5], 0.1, 0.1)
    with pytest.raises(ValueError, match="expected grid to be a row of at least one number"):
        risk.learn_then_test([True], [0.5], [], 0.1, 0.1)
    for graded in ([np.nan, 1.0], [0.3, 1.0], [2, 1]):
        with pytest.raises(ValueError, match="expected correct as booleans, got"):
            risk.risk_coverage(graded, [0.5, 0.4])
    with pytest.raises(ValueError, match="losses that fall along each row"):
        risk.conformal_risk([[0.0, 1.0]], 0.1)
    with pytest.raises(ValueError, match=r"between 0 and bound=1"):
        risk.conformal_risk([[2.0, 1.0]], 0.1)
    with pytest.raises(ValueError, match="expected alpha of at least 0"):
        risk.conformal_risk([[1.0, 0.0]], -0.1)
    with pytest.raises(ValueError, match="expected delta between 0 and 1"):
        risk.split_quantile([1.0], 0.0)
    with pytest.raises(ValueError, match="got NaN among them"):
        risk.split_quantile([1.0, np.nan], 0.1)
    with pytest.raises(ValueError, match=r"their cues as \[n, M\]"):
        risk.trajectory_scores([1.0, 2.0])
    with pytest.raises(ValueError, match="one number for each of 2 prompts"):
        risk.deferral_curve([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="weights of at least 0"):
        risk.deferral_curve([0.1, 0.2], [0.1, 0.3], [0.0, 0.0])
    with pytest.raises(ValueError, match="worth at most 0"):
        risk.answer_threshold(1.0)
