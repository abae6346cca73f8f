"""Mixtures of Gaussians, and their update by linear data, against sums on a grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from amortized.posteriors.gaussians import Gaussians, updated

KEY = jax.random.key(3)
PRIOR = Gaussians(
    jnp.log(jnp.array([0.3, 0.7])),
    jnp.array([[-1.0, 0.5], [2.0, 0.0]]),
    jnp.array([[[1.0, 0.0], [0.5, 0.4]], [[0.6, 0.0], [-0.3, 1.2]]]),
)


def test_the_density_is_that_of_the_mixture_and_draws_have_its_moments():
    laws = dist.MultivariateNormal(PRIOR.means, scale_tril=PRIOR.factors)
    mixed = dist.MixtureSameFamily(dist.Categorical(logits=PRIOR.log_weights), laws)
    theta = jax.random.normal(KEY, (20, 2)) * 2
    np.testing.assert_allclose(
        jax.vmap(PRIOR.log_prob)(theta), mixed.log_prob(theta), rtol=1e-4, atol=1e-4
    )
    draws = jax.vmap(PRIOR.sample)(jax.random.split(KEY, 20_000))
    error = 5 * draws.std(0) / 20_000**0.5
    assert (abs(draws.mean(0) - PRIOR.mean) < error).all()


def test_the_update_is_bayes_rule():
    """On a grid: prior times likelihood over their sum."""
    design, noise = jnp.array([[1.0, -0.5]]), jnp.array([[0.3]])
    y = jnp.array([0.8])
    found = updated(PRIOR, y, design, noise)
    np.testing.assert_allclose(jnp.exp(found.log_weights).sum(), 1, rtol=1e-5)
    line = jnp.linspace(-7, 7, 281)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    likelihood = dist.Normal((grid @ design.T)[:, 0], noise[0, 0] ** 0.5).log_prob(y[0])
    joint = jax.vmap(PRIOR.log_prob)(grid) + likelihood
    expected = joint - jax.nn.logsumexp(joint) - 2 * jnp.log(line[1] - line[0])
    seen = expected > -15
    np.testing.assert_allclose(
        jax.vmap(found.log_prob)(grid)[seen], expected[seen], rtol=2e-3, atol=2e-3
    )


def test_two_updates_are_one_of_both():
    design, noise = jnp.array([[1.0, -0.5], [0.2, 1.0]]), jnp.diag(jnp.array([0.3, 0.5]))
    y = jnp.array([0.8, -1.0])
    both = updated(PRIOR, y, design, noise)
    first = updated(PRIOR, y[:1], design[:1], noise[:1, :1])
    second = updated(first, y[1:], design[1:], noise[1:, 1:])
    for one, other in zip(*map(jax.tree.leaves, (second, both)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
