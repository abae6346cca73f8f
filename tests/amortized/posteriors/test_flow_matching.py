"""Flow matching against fields that are known."""

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
from amortized.posteriors import flow_matching, flows, npe
from amortized.posteriors.flow_matching import LEAST, Transported

from .problems import linear, linear_posterior

KEY, X = jax.random.key(8), jnp.array([1.5, -2.0])


class Exact(eqx.Module):
    """E[e - theta | theta_t] where theta ~ N(c, scale^2)."""

    scale: jax.Array

    def __call__(self, theta, t, context):
        rest = theta - (1 - t) * context
        variance = (1 - t) ** 2 * self.scale**2 + (t + LEAST) ** 2
        noise = (t + LEAST) / variance * rest
        return noise - context - (1 - t) * self.scale**2 / variance * rest


@pytest.fixture(scope="module")
def exact():
    return Transported((2,), (2,), Exact(jnp.array([0.5, 2.0])))


def test_the_density_of_the_exact_field_is_the_normal(exact):
    theta = jnp.array([[0.0, 0.0], [1.0, -2.0], [2.0, 3.0]])
    context = jnp.array([0.5, -1.0])
    law = dist.Normal(context, jnp.sqrt(jnp.array([0.5, 2.0]) ** 2 + LEAST**2)).to_event(1)
    np.testing.assert_allclose(exact.log_prob(theta, context), law.log_prob(theta), atol=1e-3)


def test_draws_of_the_exact_field_are_of_the_normal(exact):
    context = jnp.array([0.5, -1.0])
    draws = exact.sample(KEY, (2000,), context)
    scale = jnp.array([0.5, 2.0])
    assert (abs(draws.mean(0) - context) < 5 * scale / 2000**0.5).all()
    np.testing.assert_allclose(draws.std(0), scale, rtol=0.08)


def test_the_exact_field_has_the_least_loss(exact):
    """Perturbed, it has a greater one: the derivative is zero and the second positive."""
    training = flow_matching.training(
        *(KEY, linear), latents=["theta"], observed=["x"], batch_size=20_000
    )
    network = training.params
    _, covariance = linear_posterior(X)
    batch, _ = training.draw(KEY, network, None)
    root = jnp.linalg.cholesky(covariance) / network.standard.scale.tree[:, None]

    class Rotated(eqx.Module):
        """The exact field of a normal with this Cholesky factor and a mean that is affine in x."""

        epsilon: jax.Array

        def __call__(self, theta, t, context):
            x = network.summary.standard.inverse(context)
            mean = network.standard(linear_posterior(x)[0])
            rest = theta - (1 - t) * mean
            eye = jnp.eye(2)
            total = (1 - t) ** 2 * root @ root.T + (t + LEAST) ** 2 * eye
            solved = jnp.linalg.solve(total, rest)
            exact = (t + LEAST) * solved - mean - (1 - t) * root @ root.T @ solved
            return exact + self.epsilon * jnp.tanh(theta + context)

    def loss(epsilon):
        density = Transported((2,), (2,), Rotated(epsilon))
        changed = eqx.tree_at(lambda net: net.density, network, density)
        return training.loss(changed, KEY, batch)[0]

    zero = jnp.float32(0)
    assert abs(jax.grad(loss)(zero)) < 0.03
    assert jax.grad(loss)(zero + 0.3) > 0.1 and jax.grad(loss)(zero - 0.3) < -0.1


@pytest.mark.slow
@pytest.mark.optimised
def test_what_is_learned_is_the_posterior():
    training = flow_matching.training(
        *(KEY, linear), latents=["theta"], observed=["x"], flow=flow_matching.family(width=64)
    )
    schedule = optax.cosine_decay_schedule(3e-3, 3000)
    out = fit.run(KEY, training, optimizer=optax.adam(schedule), num_steps=3000, progress=False)
    posterior = npe.posterior(out)
    mean, covariance = linear_posterior(X)
    theta = posterior.sample(KEY, X, 5000)["theta"]
    scale = jnp.sqrt(jnp.diag(covariance))
    assert (abs(theta.mean(0) - mean) < 0.15 * scale).all()
    np.testing.assert_allclose(theta.std(0), scale, rtol=0.1)
    exact = dist.MultivariateNormal(mean, covariance).log_prob(theta)
    found = posterior.log_prob({"theta": theta}, X)
    assert -0.02 < (found - exact).mean() < 0.05, "KL of what is drawn to the posterior"


def test_what_has_no_field_is_refused():
    def kinds():
        kind = numpyro.sample("kind", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(kind, 1.0))

    with pytest.raises(ValueError, match="expected continuous latents.*got no continuous latent"):
        flow_matching.training(KEY, kinds, latents=[], discrete=["kind"], observed=["x"])
    with pytest.raises(ValueError, match="a density of flow_matching.family.*got Mixture; learn"):
        flow_matching.training(KEY, linear, latents=["theta"], observed=["x"], flow=flows.mixture())
