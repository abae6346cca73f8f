"""The correction is exact whatever the network has learned."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized import fit
from amortized.posteriors import correction, flows, npe, summaries
from samplers import diagnostics

from .problems import (
    STYLES,
    V,
    linear,
    linear_evidence,
    linear_posterior,
    rate,
    style,
    supports,
)

KEY, X = jax.random.key(4), jnp.array([1.5, -2.0])


def untrained(model, latents, observed, **options):
    training = npe.training(jax.random.key(1), model, latents=latents, observed=observed, **options)
    return npe.posterior(fit.Fitted(training.params, training.params, {}, None, 0, ""))


@pytest.fixture(scope="module")
def poor():
    """A network that has learned nothing: a wide normal."""
    return untrained(linear, ["theta"], ["x"], flow=flows.gaussian())


def z(values, truth):
    return (values.mean() - truth) / (values.std() / len(values) ** 0.5)


def test_law_1_with_a_network_that_has_learned_nothing(poor):
    def run(key):
        return correction.run(key, poor, X, num_particles=50)

    out = jax.vmap(run)(jax.random.split(KEY, 2000))
    evidence = np.exp(linear_evidence(X))
    totals = np.exp(np.asarray(out.log_z, np.float64))
    assert abs(z(totals, evidence)) < 5 and totals.std() / 2000**0.5 < 0.03 * evidence
    mean, _ = linear_posterior(X)
    weights = np.exp(np.asarray(out.log_weights, np.float64)) * totals[:, None]
    for i in range(2):
        values = (weights * np.asarray(out.samples["theta"])[..., i]).mean(1)
        assert abs(z(values, evidence * mean[i])) < 5


def test_the_ess_tells_a_bad_network(poor):
    network = poor.network
    theta, x = network.simulator.draws(jax.random.key(9), 100_000)
    values, context = jax.vmap(network.standard)(theta), jax.vmap(network.summary)(x)
    good = eqx.tree_at(lambda p: p.network.density, poor, network.density.fitted(values, context))
    found = [
        diagnostics.ess(correction.run(KEY, p, X, num_particles=1000).log_weights)
        for p in (poor, good)
    ]
    assert found[0] < 300 and found[1] > 980


def test_the_jacobian_of_a_bijection_is_in_the_weights(monkeypatch):
    posterior = untrained(rate, ["rate"], ["x"], flow=flows.gaussian())
    # A Poisson count of a Gamma rate is negative binomial.
    evidence = 1.5**2 / 2.5**5 * 24 / 6

    def run(num):
        return correction.run(KEY, posterior, jnp.int32(3), num_particles=num)

    found = run(20_000)
    error = 5 * found.log_z_std_error
    assert error < 0.1 and abs(found.log_z - np.log(evidence)) < error
    monkeypatch.setattr(
        type(posterior.simulator), "_log_jacobian", lambda self, position, found: jnp.float32(0)
    )
    # Another number: another program.
    assert abs(run(20_001).log_z - np.log(evidence)) > error


def test_a_model_with_a_text():
    posterior = untrained(
        *(style, ["share"], ["text"]),
        args=[STYLES],
        flow=flows.gaussian(),
        summary=summaries.one_hot(V),
    )
    text = jnp.array([2, 0, 1])
    shares = (jnp.arange(2000) + 0.5) / 2000
    laws = shares[:, None, None] * STYLES[0] + (1 - shares[:, None, None]) * STYLES[1]
    likelihood = laws[:, 0, 2] * laws[:, 2, 0] * laws[:, 0, 1]
    evidence = (2 * shares * likelihood).mean()
    out = correction.run(KEY, posterior, text, num_particles=20_000)
    assert abs(out.log_z - jnp.log(evidence)) < 5 * out.log_z_std_error < 0.05


@pytest.mark.bad_input
def test_what_has_no_density_is_refused(poor):
    nuisance = untrained(supports, ["rate"], ["x"], flow=flows.gaussian())
    with pytest.raises(ValueError, match=r"got .*'scale'.* besides"):
        correction.run(KEY, nuisance, jnp.int32(1))
    with pytest.raises(ValueError, match="num_particles"):
        correction.run(KEY, poor, X, num_particles=0)
