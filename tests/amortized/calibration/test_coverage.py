"""Regions of probability alpha hold the truth with probability alpha; and do not where draws are
off.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from amortized.calibration import coverage

from . import problems

KEY, ALPHA = jax.random.key(6), np.array([0.1, 0.5, 0.9])


def log_prob(theta: Any, x: Any) -> Any:
    return -((theta - x / 2) ** 2).sum()


def both(sd: float = problems.SD, num: int = 3_000) -> list[coverage.Coverage]:
    them = problems.gaussian(np.random.default_rng(11), num, 99, sd=sd)
    return [coverage.central(KEY, them), coverage.highest_density(KEY, them, log_prob)]


def test_an_exact_sampler_covers_as_it_says():
    for out in both():
        assert out.p_value > 1e-3
        error = np.sqrt(ALPHA * (1 - ALPHA) / 3_000)[:, None]
        assert (np.abs(out.at(ALPHA) - ALPHA[:, None]) < 4 * error).all()
        low, high = out.band(ALPHA)
        assert ((low < out.at(ALPHA)) & (out.at(ALPHA) < high)).all()
        np.testing.assert_allclose((high - low) / error, 2 * 1.96, rtol=0.08)
        assert np.abs(out.excess).max() < 0.02


@pytest.mark.parametrize("sd", [0.9 * problems.SD, 1.1 * problems.SD])
def test_a_spread_that_is_off_is_found_with_its_direction(sd: float):
    for out in both(sd):
        assert out.p_value < 1e-3
        assert (np.sign(out.excess) == np.sign(sd - problems.SD)).all()


def test_the_coverage_of_normals_that_are_too_narrow_is_the_exact_one():
    """P(|theta - m| < z sd') for the quantile z of alpha."""
    out = coverage.central(KEY, problems.gaussian(np.random.default_rng(12), 4_000, 199, sd=0.5))
    z = stats.norm.ppf((1 + ALPHA) / 2)
    expected = 2 * stats.norm.cdf(z * 0.5 / problems.SD) - 1
    assert (np.abs(out.at(ALPHA) - expected[:, None]) < 0.03).all()


def test_the_prior_passes_both():
    """What neither can see, and `tarp` does."""
    them = problems.prior(np.random.default_rng(13), 1_000, 99)
    assert coverage.central(KEY, them).p_value > 1e-3
    normal = coverage.highest_density(KEY, them, lambda theta, x: -(theta**2).sum())
    assert normal.p_value > 1e-3


def test_highest_density_looks_at_the_density():
    """Planted: the sign of log q."""
    them = problems.gaussian(np.random.default_rng(11), 1_000, 99, sd=0.5)
    right = coverage.highest_density(KEY, them, log_prob)
    wrong = coverage.highest_density(KEY, them, lambda theta, x: -log_prob(theta, x))
    assert right.excess[0] < 0 < wrong.excess[0]
