"""The exact law of each rule: published numbers, closed forms, and the error that is promised."""

from __future__ import annotations

from math import comb
from typing import Any

import jax
import numpy as np
import pytest

from samplers.search import leading, rules, stopping

TABLE = {
    # p: accuracy, E[n], P(wrong stop), P(stop) of Beta .95 and of the e-process .05; accuracy at 40
    0.5: ((0.500, 28.7, 0.210, 0.420), (0.500, 38.8, 0.024, 0.048), 0.500),
    0.6: ((0.876, 24.2, 0.054, 0.624), (0.897, 36.9, 0.003, 0.159), 0.898),
    0.7: ((0.985, 15.1, 0.012, 0.920), (0.9955, 29.4, 0.0003, 0.561), 0.9957),
    0.8: ((0.998, 8.7, 0.002, 0.998), (1.000, 18.3, 0.0000, 0.941), 1.000),
}
UNITS = np.array([0.00051, 0.051, 0.00051, 0.00051])
"""Half of the last digit of the table."""


def numbers(law: Any) -> np.ndarray:
    return np.array([law.accuracy, law.mean_draws, law.wrong, law.stopped])


@pytest.mark.parametrize("p", TABLE)
def test_the_table_of_two_answers(p: float):
    beta, evalue, fixed = TABLE[p]
    for rule, expected in ((stopping.beta(0.95), beta), (stopping.evalue(0.05, 2), evalue)):
        found = numbers(stopping.lattice(rule, [p, 1 - p], cap=40))
        assert (np.abs(found - expected) < UNITS).all(), (found, expected)
    law = stopping.lattice(stopping.fixed(40), [p, 1 - p], cap=40)
    assert abs(law.accuracy - fixed) < UNITS[0] and law.draws[40] == pytest.approx(1)
    np.testing.assert_allclose(law.answer.sum(), 1, atol=1e-10)


def test_evidence_without_its_factor_2_is_not_that_of_the_table(monkeypatch: pytest.MonkeyPatch):
    """Planted."""
    right = leading.log_evidence
    monkeypatch.setattr(rules, "log_evidence", lambda *args: right(*args) - np.log(2))
    jax.clear_caches()
    found = stopping.lattice(stopping.evalue(0.05, 2), [0.7, 0.3], cap=40)
    monkeypatch.undo()
    jax.clear_caches()
    assert abs(found.mean_draws - TABLE[0.7][1][1]) > 1


@pytest.mark.parametrize(
    ("share", "expected"), [(0.6, (0.728, 8.4, None)), (0.5, (0.5, None, 0.79))]
)
def test_doubling(share: float, expected: tuple):
    law = stopping.lattice(stopping.doubling(0.75), [share, 1 - share], cap=32)
    found = law.accuracy, law.mean_draws, law.stopped
    for value, number, unit in zip(found, expected, (5e-4, 0.05, 0.005), strict=True):
        assert number is None or abs(value - number) < unit


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_window_has_its_closed_form(width: int):
    pi, most = np.array([0.6, 0.3, 0.1]), 40
    law = stopping.lattice(stopping.window(width), pi, cap=most)
    s = (pi**width).sum()
    stops = 1 - (1 - s) ** (most / width)
    np.testing.assert_allclose(law.mean_draws, width * stops / s, atol=1e-10)
    np.testing.assert_allclose(law.stopped, stops, atol=1e-10)
    if width == 1:
        np.testing.assert_allclose(law.answer, pi, atol=1e-10)


def test_a_run_has_its_closed_form():
    """Renewal theory: the mean wait for a run of m is 1 over sum_a (1 - pi_a) pi_a^m / (1 -
    pi_a^m).
    """
    pi, m = np.array([0.6, 0.4]), 3
    law = stopping.lattice(stopping.stable(m), pi, cap=150)
    rates = (1 - pi) * pi**m / (1 - pi**m)
    np.testing.assert_allclose(law.mean_draws, 1 / rates.sum(), atol=1e-8)
    np.testing.assert_allclose(law.stopped, 1, atol=1e-10)


def enumerate_counts(pi: np.ndarray, n: int) -> np.ndarray:
    """P(majority is a) of three answers by the multinomial law."""
    found = np.zeros(3)
    for a in range(n + 1):
        for b in range(n + 1 - a):
            counts = np.array([a, b, n - a - b])
            best = counts == counts.max()
            found += comb(n, a) * comb(n - a, b) * (pi**counts).prod() * best / best.sum()
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_a_fixed_number_is_the_majority_law(n: int):
    pi = np.array([0.45, 0.35, 0.2])
    law = stopping.lattice(stopping.fixed(n), pi, cap=12)
    np.testing.assert_allclose(law.answer, enumerate_counts(pi, n), atol=1e-10)
    assert law.draws[n] == pytest.approx(1)
    error = {1: 0.55, 5: 0.476, 11: 0.398}.get(n, 0.55)  # two draws are no better than one
    assert abs(1 - law.accuracy - error) < 6e-4


def laws(num: int) -> list[np.ndarray]:
    """Laws of two and three answers, many of them close to a tie, where errors are likeliest."""
    rng = np.random.default_rng(0)
    two = [np.array([p, 1 - p]) for p in np.linspace(0.5005, 0.9, num // 2)]
    three = [rng.dirichlet([3.0, 3.0, 3.0]) for _ in range(num - len(two) - 1)]
    return [*two, *three, np.array([0.334, 0.333, 0.333])]


def wrong_stops(rule_of: Any, some: list[np.ndarray]) -> list[float]:
    caps = {2: 40, 3: 15}
    return [stopping.lattice(rule_of(len(pi)), pi, cap=caps[len(pi)]).wrong for pi in some]


def test_the_evidence_keeps_its_promise():
    """P(it ever stops wrongly) <= delta, on a grid of 50 laws; and it does stop."""
    delta = 0.2
    found = wrong_stops(lambda num: stopping.evalue(delta, num), laws(50))
    assert len(found) == 50 and 0.02 < max(found) <= delta
    # Planted: a posterior of 1 - delta is no such promise.
    assert wrong_stops(lambda num: stopping.beta(1 - delta), laws(50)[:1])[0] > delta


def test_the_evidence_of_open_sets_keeps_its_promise():
    found = [
        stopping.lattice(stopping.evalue(0.5), pi, cap=cap).wrong
        for pi, cap in (([0.5005, 0.4995], 30), ([0.6, 0.4], 30), ([0.36, 0.33, 0.31], 9))
    ]
    assert 0.002 < max(found) <= 0.5


def test_what_answers_nothing_is_a_draw():
    """Half of the draws are lost: the counts after 2 n draws are those of a thinned stream."""
    law = stopping.lattice(stopping.fixed(2), [0.3, 0.2], cap=5)
    # One answer of two draws, or two: ties are by chance.
    a = 0.3**2 + 2 * 0.3 * 0.5 + 0.3 * 0.2
    b = 0.2**2 + 2 * 0.2 * 0.5 + 0.3 * 0.2
    np.testing.assert_allclose(law.answer, [a, b], atol=1e-10)
    assert "Law(" in repr(law)


@pytest.mark.bad_input
def test_bad_input():
    rule = stopping.beta(0.95)
    for probs in ([0.6, 0.6], [-0.1, 0.5], [], [[0.5, 0.5]], [np.nan, 0.5]):
        with pytest.raises(ValueError, match="expected the probabilities of K answers"):
            stopping.lattice(rule, probs, cap=4)
    with pytest.raises(ValueError, match="expected cap to be a whole number"):
        stopping.lattice(rule, [0.5, 0.5], cap=0)
    with pytest.raises(ValueError, match="expected one rule, got"):
        stopping.lattice(stopping.beta([0.9, 0.95]), [0.5, 0.5], cap=4)
    with pytest.raises(ValueError, match="expected one rule, got 'beta'"):
        stopping.lattice("beta", [0.5, 0.5], cap=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"reads scores, .* use stopping\.replay"):
        stopping.lattice(stopping.secretary(4), [0.5, 0.5], cap=4)
