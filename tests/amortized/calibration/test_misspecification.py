"""Observations among simulations: exact p-values if they are like them, a warning if not."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from amortized.calibration import misspecification


def simulated(rng: np.random.Generator, num: int) -> dict[str, Any]:
    """Summaries that depend on each other."""
    rows = rng.standard_normal((num, 3)) @ np.array([[1, 0, 2], [0, 1, 1], [0, 0, 0.2]])
    return {"center": 50 + rows[:, 0], "spread": rows[:, 1:]}


@pytest.mark.parametrize("num_observed", [1, 2])
def test_p_values_are_uniform_for_simulations(num_observed: int):
    rng, found = np.random.default_rng(num_observed), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in jax.random.split(jax.random.key(1), 80):
            out = misspecification.run(key, simulated(rng, num_observed), simulated(rng, 400))
            found.append(out.p_value)
    assert len(out.nulls) == 200 // num_observed
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_the_null_is_compared_with_others_as_the_observation_is(monkeypatch: pytest.MonkeyPatch):
    rng, seen = np.random.default_rng(8), []
    scores = misspecification._scores
    monkeypatch.setattr(misspecification, "_scores", lambda *a: seen.append(a) or scores(*a))
    misspecification.run(jax.random.key(1), simulated(rng, 1), simulated(rng, 400))
    asked, reference = ({*map(tuple, np.asarray(x).reshape(-1, 3))} for x in seen[0])
    assert len(asked) == 201 and len(reference) == 200 and not asked & reference


def test_an_observation_far_outside_is_said():
    rng = np.random.default_rng(5)
    far = simulated(rng, 1)
    far["spread"][0, 1] += 30
    with pytest.warns(UserWarning, match=r"misspecification score .*x\.spread\[1\] is 1\d"):
        out = misspecification.run(jax.random.key(2), far, simulated(rng, 1_000))
    assert out.p_value == pytest.approx(1 / 501) and out.score > out.nulls.max()
    assert out.furthest[0] == "x.spread[1]"


def test_an_observation_that_is_not_finite_is_said():
    rng = np.random.default_rng(6)
    bad = simulated(rng, 1)
    bad["center"][0] = np.nan
    with pytest.warns(UserWarning, match=r"x\.center is inf spreads"):
        assert misspecification.run(jax.random.key(2), bad, simulated(rng, 400)).p_value < 0.01


def test_bad_input():
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match="at least 200 simulations for 1 observations, got 150"):
        misspecification.run(jax.random.key(0), simulated(rng, 1), simulated(rng, 150))
    with pytest.raises(ValueError, match=r"put \[None\] before one observation"):
        misspecification.run(jax.random.key(0), np.zeros((1, 2)), np.zeros((300, 3)))
