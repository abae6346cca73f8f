"""Quantiles of a chance of success against those of the law that the chances were drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from amortized import fit
from amortized.calibration import success

KEY, LEVELS = jax.random.key(2), (0.1, 0.5, 0.9)


def test_the_pinball_loss_is_least_at_the_quantile():
    values = np.random.default_rng(1).beta(2, 5, 20_001)
    grid = jnp.linspace(0, 1, 1001)
    for level in LEVELS:
        loss = success.pinball(
            jnp.float32(level), grid[:, None], jnp.asarray(values[None, ::40], jnp.float32)
        )
        best = float(grid[loss.mean(axis=1).argmin()])
        assert abs(best - np.quantile(values[::40], level)) < 2e-3
    # Of the other sign it would be the quantile of the other side.
    low, high = jnp.float32(0.2), jnp.float32(0.6)
    assert success.pinball(jnp.float32(0.9), low, high) == pytest.approx(0.36)
    assert success.pinball(jnp.float32(0.9), high, low) == pytest.approx(0.04)


def test_what_is_learned_are_the_quantiles_given_the_features():
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 2, 4000)
    a, b = np.where(kind, 6, 1), np.where(kind, 2, 3)
    training = success.training(KEY, 100 + 5.0 * kind[:, None], rng.beta(a, b), levels=LEVELS)
    rate = optax.cosine_decay_schedule(1e-2, 600)
    out = fit.run(KEY, training, optimizer=optax.adam(rate), num_steps=600, progress=False)
    found = success.quantiles(out)(jnp.array([[100.0], [105.0]]))
    exact = [stats.beta.ppf(LEVELS, *law) for law in ((1, 3), (6, 2))]
    np.testing.assert_allclose(found, exact, atol=0.04)
    assert (np.diff(np.asarray(found), axis=1) > 0).all()


@pytest.mark.bad_input
def test_bad_input():
    x, p = np.zeros((5, 2)), np.full(5, 0.5)
    with pytest.raises(ValueError, match="finite features"):
        success.training(KEY, x, p[:4])
    with pytest.raises(ValueError, match=r"shares of rollouts in \[0, 1\], got 0.5 to 3.0"):
        success.training(KEY, x, np.array([0.5, 3, 1, 1, 1]))
    with pytest.raises(ValueError, match="increasing levels between 0 and 1"):
        success.training(KEY, x, p, levels=(0.9, 0.1))
