"""A learned likelihood makes a NumPyro model whose posterior is the true one."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from amortized import fit
from amortized.posteriors import flows, nle
from amortized.posteriors.summaries import flat
from samplers.latent import posterior

from .problems import linear, linear_posterior, rate, supports

KEY, X = jax.random.key(8), jnp.array([1.5, -2.0])


def fitted(network):
    return fit.Fitted(network, network, {}, None, 0, "")


@pytest.fixture(scope="module")
def best():
    """The Gaussian likelihood at its optimum, a regression."""
    training = nle.training(KEY, linear, latents=["theta"], observed=["x"], flow=flows.gaussian())
    network = training.params
    theta, x = network.simulator.draws(jax.random.key(77), 100_000)
    values = jax.vmap(lambda x: network.observations(flat(x)))(x)
    density = network.density.fitted(values, jax.vmap(network.latents)(theta))
    return training, eqx.tree_at(lambda net: net.density, network, density)


def test_the_least_loss_is_the_entropy_of_the_likelihood(best):
    training, network = best
    rows = network.simulator.draws(jax.random.key(3), 20_000)
    entropy = dist.Normal(jnp.zeros(2), jnp.array([0.5, 1.0])).entropy().sum()
    value, _ = training.loss(network, KEY, nle.Batch(rows, jnp.ones(20_000, bool), None))
    np.testing.assert_allclose(value, entropy, atol=5 / 20_000**0.5)


def test_the_model_that_it_makes_has_the_posterior(best):
    """Prior times likelihood is Gaussian, so mode and curvature are all of it."""
    of = posterior.density(nle.model(fitted(best[1]), X))
    log_density = of.at(jnp.float32(1))
    mean, covariance = linear_posterior(X)
    hessian = jax.hessian(log_density)(mean)
    np.testing.assert_allclose(-jnp.linalg.inv(hessian), covariance, rtol=0.03, atol=0.01)
    step = -jnp.linalg.solve(hessian, jax.grad(log_density)(mean))
    np.testing.assert_allclose(step, 0, atol=0.03)
    # The prior is drawn anew for every key.
    first, second = (of.sample_prior(jax.random.key(seed)) for seed in (0, 1))
    assert abs(first - second).max() > 0.01


def test_latents_keep_their_supports():
    def noisy():
        scale = numpyro.sample("scale", dist.LogNormal(0.3, 0.5))
        inside = numpyro.sample("inside", dist.Uniform(-scale, 2 * scale))
        numpyro.sample("x", dist.Normal(inside, scale))

    training = nle.training(
        *(KEY, noisy), latents=["scale", "inside"], observed=["x"], flow=flows.gaussian()
    )
    of = posterior.density(nle.model(fitted(training.params), jnp.float32(0.3)))
    network = training.params
    theta = network.simulator.draw(KEY)[0]
    np.testing.assert_allclose(of.log_prior(theta), network.simulator.log_prior(theta), rtol=1e-4)
    seen = network.log_prob(theta[None], {"x": jnp.full(1, 0.3)})
    np.testing.assert_allclose(of.log_likelihood(theta), seen[0], rtol=1e-3)


@pytest.mark.bad_input
def test_bad_input(best):
    with pytest.raises(ValueError, match=r"discrete \['x'\]"):
        nle.training(KEY, rate, latents=["rate"], observed=["x"])
    with pytest.raises(ValueError, match=r"expected x of shape \[2\]"):
        nle.model(fitted(best[1]), jnp.zeros(3))
    of = nle.simulator(supports, latents=["rate"], observed=["x"])
    nuisance = dataclasses.replace(best[1], simulator=of)
    with pytest.raises(ValueError, match="'scale'"):
        nle.model(fitted(nuisance), jnp.int32(1))
