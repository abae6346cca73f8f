"""Fisher regularisation and attacks on a linear Gaussian model, where all is known.

theta ~ N(0, .1), x ~ N(theta, .1) in each of two dimensions; of q = N(a x, s) the regularised loss
is least at a = 1 / (2 + 20 beta), s = .1 - .01 / (.2 + 2 beta), and tr I_x = 2 a^2 / s.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amortized import fit
from amortized.posteriors import flow_matching, flows, npe, robustness
from amortized.posteriors.batches import Fresh
from amortized.training import trained_part

from .problems import noisy as model
from .problems import rate, with_law

KEY = jax.random.key(2)
BETA = 0.07


@pytest.fixture(scope="module")
def training():
    return npe.training(
        KEY, model, latents=["theta"], observed=["x"], flow=flows.gaussian(), batch_size=20_000
    )


def optimum(beta):
    return 1 / (2 + 20 * beta), 0.1 - 0.01 / (0.2 + 2 * beta)


def slope(training, network):
    """The largest derivative of the loss on one large batch."""
    batch, _ = training.draw(jax.random.key(7), network, training.data)
    trained, fixed = trained_part(network)

    def loss(trained):
        return training.loss(eqx.combine(trained, fixed), KEY, batch)[0]

    return max(float(abs(g).max()) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(trained)))


def test_the_trace_is_that_of_the_law(training):
    a, s = 0.4, 0.06
    rows = training.params.simulator.draws(KEY, 50)
    found = robustness.trace(with_law(training.params, a, s), KEY, rows, 400)
    np.testing.assert_allclose(found, 2 * a**2 / s, rtol=5 * (1 / 400) ** 0.5)
    np.testing.assert_allclose(found.mean(), 2 * a**2 / s, rtol=0.03)


def test_the_regularised_loss_is_least_where_the_formula_says(training):
    robust = robustness.regularised(training, beta=BETA, num_samples=2)
    network = with_law(training.params, *optimum(BETA))
    assert slope(robust, network) < 0.05
    assert slope(robust, with_law(training.params, *optimum(0.0))) > 0.3
    assert slope(training, with_law(training.params, *optimum(0.0))) < 0.05


def test_the_average_is_of_the_gradients_of_late(training):
    few = npe.training(
        KEY, model, latents=["theta"], observed=["x"], flow=flows.gaussian(), batch_size=50
    )
    robust = robustness.averaged(few, beta=BETA, decay=0.6, num_samples=3)
    network, data, gradients = few.params, robust.data, []
    trained, fixed = trained_part(network)
    for key in jax.random.split(KEY, 2):
        batch, data = robust.draw(key, network, data)
        first, second = jax.random.split(key)
        rows = few.draw(first, network, None)[0].rows
        np.testing.assert_array_equal(rows.theta, batch.batch.rows.theta)
        gradients.append(
            jax.grad(
                lambda t, rows=rows, key=second: robustness.trace(
                    eqx.combine(t, fixed), key, rows, 3
                ).mean()
            )(trained)
        )
    expected = jax.tree.map(lambda a, b: (0.6 * a + b) / 1.6, *gradients)
    for mine, theirs in zip(*map(jax.tree.leaves, (batch.gradient, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)

    # The loss has the value of -log q, and that gradient beside its own.
    def loss(trained, objective, batch):
        return objective(eqx.combine(trained, fixed), KEY, batch)[0]

    (value, total), (plain, own) = (
        jax.value_and_grad(loss)(trained, objective, b)
        for objective, b in ((robust.loss, batch), (few.loss, batch.batch))
    )
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    for whole, part, more in zip(*map(jax.tree.leaves, (total, own, expected)), strict=True):
        np.testing.assert_allclose(whole, part + BETA * more, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("beta", [0.01, 0.07])
def test_training_comes_to_the_optimum(training, beta):
    few = dataclasses.replace(training, draw=Fresh(300))
    robust = robustness.averaged(few, beta=beta)
    rates = optax.adam(optax.cosine_decay_schedule(0.03, 1000))
    out = fit.run(KEY, robust, optimizer=rates, num_steps=1000, progress=False)
    posterior = npe.posterior(out)
    a, s = optimum(beta)
    theta = posterior.sample(KEY, jnp.array([0.5, -0.5]), 20_000)["theta"]
    np.testing.assert_allclose(theta.mean(0), [0.5 * a, -0.5 * a], atol=0.01)
    np.testing.assert_allclose(theta.var(0), s, atol=0.004)


def test_the_worst_change_is_that_of_the_formula(training):
    a, s = 0.4, 0.06
    network = with_law(training.params, a, s)
    posterior = npe.posterior(fit.Fitted(network, network, {}, None, 0, ""))
    x = jnp.array([0.3, -0.2])
    found = robustness.attack(KEY, posterior, x, radius=0.2)
    np.testing.assert_allclose(found.size, 0.2, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(found.x["x"] - x), 0.2, rtol=1e-4)
    # Of this law every direction is as bad; 1,000 latents have a standard error of a |d| / s^.5.
    expected = a**2 * 0.2**2 / (2 * s)
    assert abs(found.kl - expected) < 5 * a * 0.2 / s**0.5 / 1000**0.5


@pytest.mark.bad_input
def test_bad_input(training):
    posterior = npe.posterior(fit.Fitted(training.params, training.params, {}, None, 0, ""))
    with pytest.raises(ValueError, match="radius above 0"):
        robustness.attack(KEY, posterior, jnp.zeros(2), radius=0.0)
    with pytest.raises(ValueError, match="decay"):
        robustness.averaged(training, beta=0.1, decay=1.0)
    with pytest.raises(ValueError, match="beta"):
        robustness.regularised(training, beta=-1.0)
    other = flow_matching.training(KEY, model, latents=["theta"], observed=["x"])
    with pytest.raises(ValueError, match=r"a training of npe\.training"):
        robustness.regularised(other, beta=0.1)
    counts = npe.training(KEY, rate, latents=["rate"], observed=["x"], flow=flows.gaussian())
    of_counts = npe.posterior(fit.Fitted(counts.params, counts.params, {}, None, 0, ""))
    with pytest.raises(ValueError, match=r"discrete \['x'\]"):
        robustness.attack(KEY, of_counts, jnp.int32(3), radius=1.0)
