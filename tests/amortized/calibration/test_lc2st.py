"""Local tests: exact p-values where the sampler is right, small ones only where it is not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from amortized.calibration import lc2st
from amortized.calibration.joint import Joint

from .problems import SD, simulations


def simulated(rng: np.random.Generator, num: int, spread: Any) -> tuple[Joint, Any, Any]:
    """Simulations, and draws for x_o = -1 and 1, whose sd is spread(x)."""
    theta, x = simulations(rng, num, dim=1)
    draws = x[:, None] / 2 + spread(x)[..., None] * rng.standard_normal((num, 1, 1))
    x_o = np.array([[-1.0], [1.0]])
    of_x_o = x_o[:, None] / 2 + spread(x_o)[..., None] * rng.standard_normal((2, 200, 1))
    return Joint(theta, x, draws), x_o, of_x_o


def right(x: Any) -> Any:
    return np.full(x.shape, SD)


def locally_wrong(x: Any) -> Any:
    """Draws are too narrow for x > 0."""
    return np.where(x > 0, 0.3 * SD, SD)


def test_it_says_where_a_sampler_is_wrong():
    out = lc2st.run(
        jax.random.key(1), *simulated(np.random.default_rng(1), 500, locally_wrong), num_nulls=9
    )
    assert out.nulls.shape == (2, 9)
    assert out.p_values[1] == pytest.approx(1 / 10) and out.statistic[1] > 3 * out.nulls[1].max()
    assert out.statistic[0] < out.statistic[1] / 4


@pytest.mark.slow
def test_p_values_are_uniform_where_a_sampler_is_right():
    rng, found = np.random.default_rng(2), []
    for key in jax.random.split(jax.random.key(2), 48):
        found.append(lc2st.run(key, *simulated(rng, 100, right), num_nulls=7).p_values)
    for places in (np.array(found) * 8 - 1).round().astype(int).T:
        assert stats.chisquare(np.bincount(places, minlength=8)).pvalue > 1e-3, places


def test_bad_input():
    them, x_o, draws = simulated(np.random.default_rng(3), 10, right)
    with pytest.raises(ValueError, match=r"B observations like the simulated ones"):
        lc2st.run(jax.random.key(0), them, x_o[0], draws)
    with pytest.raises(ValueError, match="num_nulls to be a whole number"):
        lc2st.run(jax.random.key(0), them, x_o, draws, num_nulls=0)
