"""Amortized optimisation of quadratics f(y, b) = y'Qy / 2 - b'y, whose solutions Q^-1 b a linear
map gives.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit
from amortized.maps import optimisation

KEY = jax.random.key(5)
Q = jnp.array([[3.0, 0.5], [0.5, 0.4]], jnp.float32)
ROWS = jax.random.normal(KEY, (200, 2), jnp.float32)
SOLVED = jnp.linalg.solve(Q, ROWS.T).T


def f(y, b):
    return y @ Q @ y / 2 - b @ y


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, b):
        return self.weight @ b


START = Linear(jnp.array([[1.0, 0.2], [-0.3, 0.1]], jnp.float32))


def gradient(training, network, batch):
    return jax.grad(lambda network: training.loss(network, KEY, batch)[0])(network).weight


def test_the_losses_share_the_optimum_and_their_gradients_differ_by_the_curvature():
    objective = optimisation.objective(START, f, ROWS)
    regression = optimisation.regression(START, ROWS, SOLVED)
    ours, theirs = (
        gradient(training, START, batch)
        for training, batch in ((objective, ROWS), (regression, (ROWS, SOLVED)))
    )
    np.testing.assert_allclose(ours, Q @ theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(ours - theirs).max() > 0.3
    best = Linear(jnp.linalg.inv(Q))
    np.testing.assert_allclose(gradient(objective, best, ROWS), 0, atol=1e-5)
    np.testing.assert_allclose(gradient(regression, best, (ROWS, SOLVED)), 0, atol=1e-5)


def test_steps_after_the_network_shrink_its_error_by_the_curvature():
    steps, rate = 4, 0.3
    after = optimisation.refined(f, START(ROWS[0]), ROWS[0], num_steps=steps, rate=rate)
    shrunk = np.linalg.matrix_power(np.eye(2) - rate * np.asarray(Q), steps)
    np.testing.assert_allclose(after - SOLVED[0], shrunk @ (START(ROWS[0]) - SOLVED[0]), atol=1e-5)
    # Learned through the steps the gradient has them twice.
    training = optimisation.objective(START, f, ROWS, num_steps=steps, rate=rate)
    plain = gradient(optimisation.regression(START, ROWS, SOLVED), START, (ROWS, SOLVED))
    found = gradient(training, START, ROWS)
    np.testing.assert_allclose(found, shrunk @ Q @ shrunk @ plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solved", [None, SOLVED])
def test_both_learn_the_solution(solved):
    training = (
        optimisation.objective(START, f, ROWS)
        if solved is None
        else optimisation.regression(START, ROWS, solved)
    )
    out = fit.run(KEY, training, optimizer=optax.adam(0.05), num_steps=400, progress=False)
    np.testing.assert_allclose(out.best.weight, jnp.linalg.inv(Q), atol=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match=r"scalar of f\(y, x\), got shape \(2,\)"):
        optimisation.objective(START, lambda y, x: y, ROWS)
    with pytest.raises(ValueError, match="num_steps of at least 0, got -1"):
        optimisation.objective(START, f, ROWS, num_steps=-1)
    with pytest.raises(
        ValueError, match=r"a solution for each problem, \(200, 2\), got \(199, 2\)"
    ):
        optimisation.regression(START, ROWS, SOLVED[1:])
