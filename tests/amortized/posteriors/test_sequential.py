"""The losses of rounds are least at the posterior, whatever the latents were drawn from."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from amortized import fit
from amortized.posteriors import flows, npe, sequential
from amortized.posteriors.simulators import Simulations, simulator

from .problems import linear, linear_posterior, supports

KEY, X = jax.random.key(8), jnp.array([1.5, -2.0])


class Shifted(eqx.Module):
    """The exact posterior of the linear model, plus epsilon times a function in log density."""

    simulator: eqx.Module
    epsilon: jax.Array

    def summary(self, x):
        return x["x"]

    def given(self, theta, context):
        mean, covariance = linear_posterior(context)
        exact = dist.MultivariateNormal(mean, covariance).log_prob(theta)
        return exact + self.epsilon * jnp.tanh(theta[:, 0] - context[0] + theta[:, 1])


def proposed(num):
    """Simulations whose latents are not of the prior."""
    of = simulator(linear, latents=["theta"], observed=["x"])
    first, second = jax.random.split(KEY)
    theta = jnp.array([0.5, -2.0]) + jax.random.normal(first, (num, 2)) * jnp.array([0.5, 1.5])
    return of, Simulations(theta, jax.vmap(of.simulate)(jax.random.split(second, num), theta))


def slopes(atomic, of, rows):
    def loss(epsilon):
        return atomic.each(Shifted(of, epsilon), rows)

    found = jax.jit(jax.jacfwd(loss))(jnp.float32(0))
    return np.asarray(found, np.float64).reshape(-1, 40).mean(1)


class Flat(eqx.Module):
    """Forgets the prior."""

    def log_prior(self, theta):
        return jnp.float32(0)


@pytest.mark.bad_input
def test_the_posterior_is_a_stationary_point_and_the_prior_must_be_divided_out():
    of, rows = proposed(40_000)
    found = slopes(sequential.Atomic(4), of, rows)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 5 * error < 0.02
    wrong = slopes(sequential.Atomic(4), Flat(), rows)
    assert abs(wrong.mean()) > 10 * error


def test_latents_are_simulated_where_they_are():
    of = simulator(linear, latents=["theta"], observed=["x"])
    theta = jnp.array([3.0, -7.0])
    x = jax.vmap(lambda key: of.simulate(key, theta)["x"])(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(x.mean(0), [-4, -7], atol=0.08)
    np.testing.assert_allclose(x.std(0), [0.5, 1.0], rtol=0.1)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("how", [sequential.Atomic(5), sequential.Truncated(1e-3)])
def test_two_rounds_learn_the_posterior(how):
    out = sequential.run(
        *(KEY, linear, X),
        latents=["theta"],
        observed=["x"],
        how=how,
        optimizer=optax.adam(5e-3),
        num_rounds=2,
        num_simulations=3000,
        num_steps=1500,
        flow=flows.mixture(num_components=1, width=16, depth=1),
        progress=False,
    )
    mean, covariance = linear_posterior(X)
    scale = jnp.sqrt(jnp.diag(covariance))
    theta = out.posterior.sample(KEY, X, 5000)["theta"]
    assert out.num_simulations == 6000 and len(out.fits) == 2
    assert (abs(theta.mean(0) - mean) < 0.2 * scale).all()
    np.testing.assert_allclose(theta.std(0), scale, rtol=0.2)


def test_a_batch_has_no_simulation_twice():
    of = simulator(linear, latents=["theta"], observed=["x"])
    draw = sequential._stored(
        [of.draws(KEY, 60)], room=120, batch_size=50, how=sequential.Truncated()
    )
    seen = set()
    for key in jax.random.split(KEY, 30):
        batch, _ = draw(key, None, None)
        rows = {tuple(row) for row in batch.rows.theta.tolist()}
        held_out = {tuple(row) for row in batch.held_out.theta.tolist()}
        assert len(rows) == 50 and len(held_out) == 6 and not rows & held_out
        seen |= rows
    assert len(seen) == 54 and (0.0, 0.0) not in seen  # all, and no room that is not yet filled


def test_a_truncated_prior_is_the_prior_where_the_posterior_is():
    training = npe.training(KEY, linear, latents=["theta"], observed=["x"], flow=flows.gaussian())
    net = training.params
    theta, x = net.simulator.draws(KEY, 20_000)
    values = jax.vmap(net.standard)(theta)
    density = net.density.fitted(values, jax.vmap(net.summary)(x))
    net = eqx.tree_at(lambda net: net.density, net, density)
    posterior = npe.posterior(fit.Fitted(net, net, {}, None, 0, ""))
    found = sequential.Truncated(0.1).propose(jax.random.key(5), posterior, X, 4000)
    # In two dimensions a Gaussian's region of 90 % has squared distance -2 log 0.1.
    mean, covariance = linear_posterior(X)

    def inside(theta):
        rest = theta - mean
        return jnp.sum(rest * jnp.linalg.solve(covariance, rest.T).T, 1) / (-2 * jnp.log(0.1))

    assert 0.95 < inside(found).max() < 1.1
    kept = np.asarray(theta)[np.asarray(inside(theta)) < 1]
    error = kept.std(0) * (1 / len(kept) + 1 / len(found)) ** 0.5
    assert (abs(found.mean(0) - kept.mean(0)) < 5 * error + 0.02).all()


def narrow():
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([6]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, 0.01).to_event(1))


def test_a_truncated_prior_that_is_almost_nothing_does_not_hang():
    training = npe.training(KEY, narrow, latents=["theta"], observed=["x"], flow=flows.gaussian())
    net = training.params
    theta, x = net.simulator.draws(KEY, 20_000)
    values = jax.vmap(net.standard)(theta)
    density = net.density.fitted(values, jax.vmap(net.summary)(x))
    net = eqx.tree_at(lambda net: net.density, net, density)
    posterior = npe.posterior(fit.Fitted(net, net, {}, None, 0, ""))
    with pytest.raises(RuntimeError, match=r"got 0 of 1000: .*how=Atomic"):
        sequential.Truncated().propose(KEY, posterior, jnp.ones(6), 1)


@pytest.mark.bad_input
def test_bad_input():
    common = {"latents": ["theta"], "observed": ["x"], "optimizer": optax.adam(1e-3)}
    with pytest.raises(ValueError, match=r"expected x of shape \[2\]"):
        sequential.run(KEY, linear, jnp.zeros(3), **common)
    with pytest.raises(ValueError, match="expected at least a batch of 200"):
        sequential.run(KEY, linear, X, num_simulations=100, flow=flows.gaussian(), **common)
    with pytest.raises(ValueError, match="at least 10 simulations held out.* got 6"):
        sequential.run(
            *(KEY, linear, X), num_simulations=60, batch_size=30, flow=flows.gaussian(), **common
        )
    with pytest.raises(ValueError, match="'scale'"):
        sequential.run(KEY, supports, jnp.int32(1), **common | {"latents": ["rate"]})
