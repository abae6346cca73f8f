"""Distribution Transformers against Kalman updates of every component, and against quadrature."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from amortized import fit
from amortized.posteriors import distribution_transformer, gaussians
from amortized.posteriors.gaussians import Gaussians
from samplers.latent import filtering

KEY, K = jax.random.key(4), 2


def sample_prior(key):
    first, second, third = jax.random.split(key, 3)
    return Gaussians(
        jax.nn.log_softmax(jax.random.normal(first, (K,))),
        2 * jax.random.normal(second, (K, 1)),
        jnp.exp(0.5 * jax.random.normal(third, (K, 1, 1))),
    )


def observe(key, theta):
    return theta[None] + jax.random.normal(key, (1, 1))


def disturbed(training):
    """As after some training."""
    leaves, structure = jax.tree.flatten(training.params)
    keys = jax.random.split(KEY, len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape) if eqx.is_inexact_array(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="module")
def training():
    return distribution_transformer.training(KEY, sample_prior, observe, num_layers=2)


def test_it_starts_as_the_prior(training):
    prior = sample_prior(KEY)
    posterior = training.params(prior, jnp.ones((1, 1)))
    for one, other in zip(*map(jax.tree.leaves, (posterior, prior)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_components_in_another_order_come_out_in_that_order(training):
    network, prior, y = disturbed(training), sample_prior(KEY), jnp.ones((1, 1))
    turned = jax.tree.map(lambda leaf: leaf[::-1], prior)
    one, other = network(turned, y), network(prior, y)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b[::-1], atol=1e-5)


def test_data_have_no_order_and_what_is_not_there_is_not_seen(training):
    network, prior = disturbed(training), sample_prior(KEY)
    y, there = jnp.array([[1.0], [-2.0], [0.5]]), jnp.array([True, False, True])
    value = network(prior, y, there).means
    np.testing.assert_allclose(network(prior, y[::-1], there[::-1]).means, value, atol=1e-5)
    np.testing.assert_allclose(network(prior, y.at[1].set(50.0), there).means, value, atol=1e-5)
    assert abs(network(prior, y.at[0].set(50.0), there).means - value).max() > 1e-3
    nothing = network(prior, y, jnp.zeros(3, bool))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


def test_the_loss_is_at_least_that_of_the_exact_update(training):
    batch, _ = training.draw(KEY, training.params, None)
    prior, theta, y, _ = batch

    def exact(prior, theta, y):
        after = gaussians.updated(prior, y[0], jnp.eye(1), jnp.eye(1))
        return -after.log_prob(theta) - prior.log_prob(theta)

    value, metrics = training.loss(training.params, KEY, batch)
    assert value > jax.vmap(exact)(prior, theta, y).mean()
    np.testing.assert_allclose(
        metrics["prior"], -jax.vmap(Gaussians.log_prob)(prior, theta).mean(), atol=0.02
    )


def test_a_kalman_filter_of_every_component_is_that_of_particles():
    walk = filtering.StateSpace(
        initial=lambda: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])),
            dist.Normal(jnp.array([-2.0, 1.0]), jnp.array([0.5, 1.5])),
        ),
        transition=lambda t, x: dist.Normal(-0.8 * x, 0.3**0.5),
        observation=lambda t, x: dist.Normal(x, 1.0),
    )
    y = jnp.array([0.2, -1.5, 0.7, 2.0])
    belief = Gaussians(
        jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-2.0], [1.0]]), jnp.array([[[0.5]], [[1.5]]])
    )
    belief = gaussians.updated(belief, y[:1], jnp.eye(1), jnp.eye(1))
    for value in y[1:]:
        belief = gaussians.predicted(belief, -0.8 * jnp.eye(1), 0.3 * jnp.eye(1))
        belief = gaussians.updated(belief, value[None], jnp.eye(1), jnp.eye(1))
    out = filtering.run(KEY, walk, y, num_particles=20_000)
    weights = jax.nn.softmax(out.log_weights)
    mean = weights @ out.samples
    second = jnp.exp(belief.log_weights) @ (belief.covariances[:, 0, 0] + belief.means[:, 0] ** 2)
    np.testing.assert_allclose(mean, belief.mean[0], atol=0.05)
    np.testing.assert_allclose(weights @ out.samples**2, second, atol=0.1)


@pytest.mark.slow
@pytest.mark.optimised
def test_what_is_learned_is_the_kalman_update_of_every_component():
    training = distribution_transformer.training(
        KEY, sample_prior, observe, num_layers=2, batch_size=250
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, 1000)
    out = fit.run(
        KEY,
        training,
        optimizer=optax.adamw(schedule),
        num_steps=1000,
        max_grad_norm=1.0,
        progress=False,
    )
    update = distribution_transformer.update(out)
    grid = jnp.linspace(-14, 14, 2001)[:, None]
    step = grid[1, 0] - grid[0, 0]

    def divergence(one, other):
        one, other = (jax.vmap(law.log_prob)(grid) for law in (one, other))
        return (jnp.exp(one) * (one - other)).sum() * step

    def compared(key):
        first, second, *keys = jax.random.split(key, 4)
        prior = sample_prior(first)
        theta = prior.sample(second)
        y, again = (observe(key, theta) for key in keys)
        exact = gaussians.updated(prior, y[0], jnp.eye(1), jnp.eye(1))
        both = gaussians.updated(exact, again[0], jnp.eye(1), jnp.eye(1))
        after = update(prior, y)
        return divergence(exact, after), divergence(both, update(after, again))

    once, twice = jax.jit(jax.vmap(compared))(jax.random.split(jax.random.key(9), 1000))
    assert once.mean() < 0.02, "nats, over 1,000 priors"
    assert twice.mean() < 0.06, "filtered twice"

    def filtered(key):
        """A random walk of ten steps, by the network and exactly."""
        first, second, key = jax.random.split(key, 3)
        prior = sample_prior(first)

        def step(carry, key):
            theta, learned, exact = carry
            noise, seen = jax.random.split(key)
            theta = theta + 0.3**0.5 * jax.random.normal(noise, (1,))
            y = observe(seen, theta)
            learned, exact = (
                gaussians.predicted(law, jnp.eye(1), 0.3 * jnp.eye(1)) for law in (learned, exact)
            )
            learned, exact = (
                update(learned, y),
                gaussians.updated(exact, y[0], jnp.eye(1), jnp.eye(1)),
            )
            return (theta, learned, exact), divergence(exact, learned)

        start = prior.sample(second), prior, prior
        return jax.lax.scan(step, start, jax.random.split(key, 10))[1]

    kls = jax.jit(jax.vmap(filtered))(jax.random.split(jax.random.key(10), 300)).mean(0)
    assert kls.max() < 0.06, "nats, at every step, over 300 walks"


def heavy_tailed(key):
    first, second, third = jax.random.split(key, 3)
    freedom = 2 + 8 * jax.random.uniform(first, (1,))
    scale = jnp.exp(0.5 * jax.random.normal(third, (1,)))
    return dist.StudentT(freedom, 2 * jax.random.normal(second, (1,)), scale).to_event(1)


def test_a_prior_of_another_family_comes_in_and_gaussians_go_on(training):
    of_family = distribution_transformer.training(
        KEY, heavy_tailed, observe, num_components=3, num_layers=1, batch_size=8
    )
    # A network that is untouched gives back the prior, whatever the data.
    network, y = disturbed(of_family), jnp.ones((1, 1))
    belief = network(heavy_tailed(KEY), y)
    assert belief.means.shape == (3, 1)
    assert not np.allclose(belief.means, network(heavy_tailed(jax.random.key(1)), y).means)
    assert network(belief, y).means.shape == (3, 1)
    batch, _ = of_family.draw(KEY, network, None)
    value, metrics = of_family.loss(network, KEY, batch)
    parts = [metrics[name] for name in ("posterior", "prior", "second")]
    np.testing.assert_allclose(value, sum(parts), rtol=1e-6)
    prior, theta, y, again = batch
    # Each observation counts once.
    assert not np.allclose(y, again)
    twice = jax.vmap(lambda prior, *ys: network(network(prior, ys[0]), ys[1]))(prior, y, again)
    exact = -jax.vmap(Gaussians.log_prob)(twice, theta).mean()
    np.testing.assert_allclose(metrics["second"], exact, rtol=1e-5)
    # Another family may have as many parameters.
    other = dist.TruncatedNormal(jnp.zeros(1), jnp.ones(1), low=jnp.zeros(1)).to_event(1)
    for wrong, expected in ((training.params, "Gaussians"), (network, "StudentT")):
        with pytest.raises(ValueError, match=rf"expected .*{expected}.* got Independent\("):
            wrong(other, y[0])


@pytest.mark.slow
@pytest.mark.optimised
def test_what_is_learned_of_heavy_tails_is_their_posterior():
    training = distribution_transformer.training(
        KEY, heavy_tailed, observe, num_components=3, num_layers=2, batch_size=250
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, 600)
    options = {"num_steps": 600, "max_grad_norm": 1.0, "progress": False}
    update = distribution_transformer.update(
        fit.run(KEY, training, optimizer=optax.adamw(rate), **options)
    )
    grid = jnp.linspace(-40, 40, 1601)
    step = grid[1] - grid[0]

    def divergence(log_p, log_q):
        return (jnp.exp(log_p) * (log_p - log_q)).sum() * step

    def compared(key):
        first, second, third, fourth = jax.random.split(key, 4)
        prior = heavy_tailed(first)
        theta = prior.sample(second)
        y, again = observe(third, theta), observe(fourth, theta)
        belief = update(prior, y)
        log_p, found = jax.vmap(prior.log_prob)(grid[:, None]), []
        for law, value in ((belief, y), (update(belief, again), again)):
            log_p = log_p + dist.Normal(grid, 1.0).log_prob(value[0, 0])
            log_p = log_p - jax.nn.logsumexp(log_p) - jnp.log(step)
            found.append(divergence(log_p, jax.vmap(law.log_prob)(grid[:, None])))
        return found

    once, twice = jax.jit(jax.vmap(compared))(jax.random.split(jax.random.key(9), 100))
    assert once.mean() < 0.04, "nats, over 100 priors"
    assert twice.mean() < 0.04, "a belief that was fed back"


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match=r"expected a draw of a prior to be a vector .* \[\]"):
        distribution_transformer.training(KEY, lambda key: dist.Normal(0.0, 1.0), observe)
    with pytest.raises(ValueError, match="5 heads share evenly"):
        distribution_transformer.training(KEY, sample_prior, observe, num_heads=5)
    with pytest.raises(ValueError, match="num_layers"):
        distribution_transformer.training(KEY, sample_prior, observe, num_layers=0)
