"""Posterior networks against posteriors in closed form."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats

from amortized import fit
from amortized.posteriors import flows, npe, summaries
from models import tabular
from ppl import exact

from .problems import EOS, STYLES, T, V, linear, linear_posterior, rate, style

KEY, X = jax.random.key(8), jnp.array([1.5, -2.0])


def optimum(training):
    """The Gaussian network at its best: a regression on many simulations of its own."""
    network = training.params
    theta, x = network.simulator.draws(jax.random.key(77), 200_000)
    context = jax.vmap(network.summary)(x)
    values = jax.vmap(network.standard)(theta)
    density = network.density.fitted(values, context)
    return fit.eqx.tree_at(lambda net: net.density, network, density)


@pytest.fixture(scope="module")
def gaussian():
    return npe.training(
        KEY, linear, latents=["theta"], observed=["x"], flow=flows.gaussian(), batch_size=500
    )


@pytest.fixture(scope="module")
def learned(gaussian):
    schedule = optax.cosine_decay_schedule(0.05, 600)
    return fit.run(KEY, gaussian, optimizer=optax.adam(schedule), num_steps=600, progress=False)


def test_the_least_loss_is_the_entropy_of_the_posterior(gaussian, learned):
    _, covariance = linear_posterior(X)
    entropy = dist.MultivariateNormal(jnp.zeros(2), covariance).entropy()
    # Of 100 steps of 500 simulations: the standard error is 1 / sqrt(50,000).
    np.testing.assert_allclose(learned.history["loss"][-100:].mean(), entropy, atol=0.025)
    best = optimum(gaussian)
    batch, _ = gaussian.draw(jax.random.key(2), best, None)
    value, _ = gaussian.loss(best, KEY, batch)
    np.testing.assert_allclose(value, entropy, atol=5 / 500**0.5)


def test_what_is_learned_is_the_posterior(learned):
    posterior = npe.posterior(learned)
    mean, covariance = linear_posterior(X)
    theta = posterior.sample(KEY, X, 20_000)["theta"]
    scale = jnp.sqrt(jnp.diag(covariance))
    assert (abs(theta.mean(0) - mean) < 0.08 * scale).all()
    np.testing.assert_allclose(jnp.cov(theta.T), covariance, rtol=0.1, atol=0.02)
    exact_log = dist.MultivariateNormal(mean, covariance).log_prob(theta)
    assert abs((posterior.log_prob({"theta": theta}, X) - exact_log).mean()) < 0.02
    # The same by name, and as a distribution of numpyro.
    law = posterior({"x": X})
    sites = law.sample(KEY, (2, 3))
    assert sites["theta"].shape == (2, 3, 2)
    flat = {"theta": sites["theta"].reshape(6, 2)}
    np.testing.assert_allclose(law.log_prob(sites).reshape(6), posterior.log_prob(flat, X))


def test_draws_of_a_longer_run_begin_with_those_of_a_shorter(learned):
    posterior = npe.posterior(learned)
    few, many = (posterior.sample(KEY, X, num)["theta"] for num in (3, 10))
    assert few.tolist() == many[:3].tolist()


def test_sites_are_in_their_own_supports_with_their_jacobian():
    training = npe.training(KEY, rate, latents=["rate"], observed=["x"], flow=flows.gaussian())
    posterior = npe.posterior(fit.Fitted(training.params, training.params, {}, None, 0, ""))
    grid = jnp.linspace(1e-3, 60, 40_001)
    density = jnp.exp(posterior.log_prob({"rate": grid}, jnp.int32(3)))
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1, rtol=5e-3)
    assert (posterior.sample(KEY, 3, 1000)["rate"] > 0).all()


@pytest.mark.slow
@pytest.mark.optimised
def test_a_mixture_learns_a_posterior_that_is_not_normal():
    training = npe.training(
        KEY, rate, latents=["rate"], observed=["x"], flow=flows.mixture(num_components=4, width=32)
    )
    schedule = optax.cosine_decay_schedule(3e-3, 3000)
    out = fit.run(KEY, training, optimizer=optax.adam(schedule), num_steps=3000, progress=False)
    posterior = npe.posterior(out)
    for x in range(4):
        draws = np.asarray(posterior.sample(jax.random.key(x), x, 4000)["rate"])
        law = scipy.stats.gamma(2 + x, scale=1 / 2.5)
        assert scipy.stats.kstest(draws, law.cdf).statistic < 0.05


@pytest.mark.slow
@pytest.mark.optimised
def test_the_style_of_a_text_is_that_of_the_enumeration():
    training = npe.training(
        KEY,
        style,
        latents=["share"],
        observed=["text"],
        args=[STYLES],
        flow=flows.mixture(num_components=4, width=32),
        summary=summaries.one_hot(V),
    )
    schedule = optax.cosine_decay_schedule(2e-3, 3000)
    out = fit.run(KEY, training, optimizer=optax.adam(schedule), num_steps=3000, progress=False)
    posterior = npe.posterior(out)
    strings, middle = exact.strings(V, T, EOS), (jnp.arange(1000) + 0.5) / 1000

    def log_likelihood(share):
        lm = tabular.markov(share * STYLES[0] + (1 - share) * STYLES[1], eos=EOS)
        p = lm.given(jnp.array([0]), max_tokens=T)
        return p.log_density(strings.tokens, strings.length)

    joint = jax.vmap(log_likelihood)(middle) + dist.Beta(2.0, 1.0).log_prob(middle)[:, None]
    probs = jnp.exp(jax.nn.logsumexp(joint, 0) - jnp.log(1000))
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-4)
    logging.disable(logging.WARNING)  # some strings are rare
    found = jnp.stack(
        [posterior.log_prob({"share": middle}, tokens) for tokens in strings.tokens], axis=1
    )
    logging.disable(logging.NOTSET)
    law = joint - jnp.log(probs)
    kl = (jnp.exp(law) * (law - found)).mean(0)
    assert (probs * kl).sum() < 0.01, "mean KL to the enumerated posterior"


def broken():
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(theta, 1))
    value = jnp.where(theta > 1, jnp.nan, theta)
    numpyro.sample("x", dist.Delta(value))


def test_simulations_that_are_no_numbers_are_counted_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        training = npe.training(
            *(KEY, broken),
            latents=["theta"],
            observed=["x", "y"],
            flow=flows.gaussian(),
            num_simulations=1000,
        )
    num = 1000 - len(training.draw.rows.theta) - len(training.draw.held_out.theta)
    assert abs(num - 1000 * scipy.stats.norm.sf(1)) < 60
    assert f"{num} of 1000 simulations" in caplog.text and "['x']" in caplog.text
    fresh = npe.training(
        *(KEY, broken), latents=["theta"], observed=["x", "y"], flow=flows.gaussian()
    )
    batch, _ = fresh.draw(KEY, fresh.params, None)
    value, metrics = fresh.loss(fresh.params, KEY, batch)
    assert jnp.isfinite(value) and abs(metrics["invalid"] - scipy.stats.norm.sf(1)) < 0.13
    kept = fresh.params.log_prob(batch.rows.theta, batch.rows.x)[batch.finite]
    np.testing.assert_allclose(value, -kept.mean(), rtol=1e-5)


def test_a_budget_is_held_out_and_every_row_is_used_once_an_epoch():
    training = npe.training(
        *(KEY, linear),
        latents=["theta"],
        observed=["x"],
        flow=flows.gaussian(),
        num_simulations=100,
        batch_size=30,
    )
    draw, data, seen = training.draw, training.data, []
    assert (draw.steps, len(draw.rows.theta), len(draw.held_out.theta)) == (3, 90, 10)
    held_out = []
    for step in range(6):
        batch, data = draw(jax.random.key(step), training.params, data)
        seen.append(batch.rows.theta)
        held_out.append(batch.held_out.theta)
    epochs = [np.sort(np.concatenate(seen[:3]), 0), np.sort(np.concatenate(seen[3:]), 0)]
    np.testing.assert_array_equal(epochs[0], np.sort(draw.rows.theta, 0))
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert not np.array_equal(seen[0], seen[3])
    rows = {tuple(row) for row in np.concatenate(held_out[:3]).tolist()}
    assert rows == {tuple(row) for row in draw.held_out.theta.tolist()}


def test_an_observation_far_from_all_that_is_drawn_is_said(learned, caplog):
    posterior = npe.posterior(learned)
    with caplog.at_level(logging.WARNING):
        posterior.sample(KEY, X, 3)
        assert not caplog.text
        posterior.sample(KEY, 100 * X, 3)
    assert "times as far from the simulations" in caplog.text
    assert posterior.far(X) < 1 < 5 < posterior.far(100 * X)


def test_a_checkpoint_of_another_model_is_refused(gaussian, tmp_path):
    options = {"optimizer": optax.adam(1e-3), "num_steps": 2, "chunk": 1, "progress": False}
    fit.run(KEY, gaussian, **options, directory=tmp_path)
    other = npe.training(KEY, rate, latents=["rate"], observed=["x"], flow=flows.gaussian())
    with pytest.raises(ValueError, match="checkpoint"):
        fit.run(KEY, other, **options, directory=tmp_path)


@pytest.mark.bad_input
def test_bad_input(gaussian, learned):
    posterior = npe.posterior(learned)
    with pytest.raises(ValueError, match=r"expected x of shape \[2\]"):
        posterior.sample(KEY, jnp.zeros(3), 10)
    with pytest.raises(ValueError, match="num_samples"):
        posterior.sample(KEY, X, 0)
    with pytest.raises(ValueError, match="expected at least a batch of 200"):
        npe.training(KEY, linear, latents=["theta"], observed=["x"], num_simulations=100)
    with pytest.raises(ValueError, match="a part is held out"):
        npe.held_out({"loss": np.zeros(3)})
