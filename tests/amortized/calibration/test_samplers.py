"""Samplers of NumPyro models are checked as they are: tempered SMC, NUTS, a posterior network."""

from __future__ import annotations

from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial
from numpyro import infer

from amortized.calibration import coverage, joint, report, sbc
from amortized.posteriors import flows, npe, posterior
from samplers.latent import tempered
from tests.amortized.posteriors.problems import linear

SEEN = 4


def model(x: Any = None) -> Any:
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("data", SEEN):
        return numpyro.sample("x", dist.Normal(theta, scale), obs=x)


def simulate(key: Any) -> Any:
    out = infer.Predictive(model, num_samples=1)(key)
    return {name: out[name][0] for name in ("scale", "theta")}, out["x"][0]


def by_tempering(key: Any, x: Any, num_samples: int, *, step: Any) -> Any:
    """Draws of a population of which many more would be no more independent."""

    def walk(log_density: Any, beta: Any) -> Any:
        return blackjax.additive_step_random_walk(
            log_density, lambda key, z: step * jax.random.normal(key, z.shape)
        )

    run_key, pick_key = jax.random.split(key)
    out = tempered.run(
        run_key, model, x, ladder=(0.1, 0.4, 1.0), kernel=walk, num_particles=256, num_steps=5
    )
    rows = jax.random.categorical(pick_key, out.log_weights, shape=(num_samples,))
    return {name: out.samples[name][rows] for name in ("scale", "theta")}


@pytest.mark.slow
def test_tempered_smc_is_calibrated():
    them = joint.draw(
        jax.random.key(3),
        simulate,
        Partial(by_tempering, step=jnp.float32(0.6)),
        num_simulations=1_000,
        num_samples=4,
        batch_size=100,
    )
    out = sbc.run(jax.random.key(1), them)
    assert out.names == ("scale", "theta") and out.p_value > 1e-3, out.p_values


def by_nuts(key: Any, x: Any, num_samples: int) -> Any:
    """Draws of one chain, far from each other, after steps that are thrown away."""
    init_key, key = jax.random.split(key)
    info = infer.util.initialize_model(init_key, model, model_args=(x,))
    nuts = blackjax.nuts(lambda z: -info.potential_fn(z), 0.3, jnp.ones(2))

    def step(state: Any, key: Any) -> Any:
        state, _ = nuts.step(key, state)
        return state, state.position

    # Far in the tail, where many start, the first steps of this length would diverge.
    start = nuts.init({"theta": x.mean(), "scale": jnp.log(x.std() + 0.5)})
    _, draws = jax.lax.scan(step, start, jax.random.split(key, 40 + 8 * num_samples))
    rows = jax.tree.map(lambda leaf: leaf[47::8], draws)
    sites = jax.vmap(info.postprocess_fn)(rows)
    return {name: sites[name] for name in ("scale", "theta")}


@pytest.mark.slow
def test_nuts_is_calibrated():
    them = joint.draw(
        jax.random.key(4),
        simulate,
        by_nuts,
        num_simulations=500,
        num_samples=4,
        batch_size=100,
    )
    out = sbc.run(jax.random.key(1), them)
    assert out.names == ("scale", "theta") and out.p_value > 1e-3, out.p_values


@pytest.mark.slow
def test_a_posterior_network_is_calibrated_once_it_is_trained():
    """The network of the linear model at its optimum, a regression; and as it starts."""
    network = npe.training(
        jax.random.key(8), linear, latents=["theta"], observed=["x"], flow=flows.gaussian()
    ).params
    theta, x = network.simulator.draws(jax.random.key(77), 100_000)
    values, context = jax.vmap(network.standard)(theta), jax.vmap(network.summary)(x)
    fitted = eqx.tree_at(lambda n: n.density, network, network.density.fitted(values, context))
    for net, right in ((fitted, True), (network, False)):
        of = posterior.over(net)
        them = joint.draw(
            jax.random.key(1), of.simulator.draw, of.draws, num_simulations=1_000, num_samples=99
        )
        assert report.run(jax.random.key(2), them).ok == right


def test_a_network_that_holds_functions_is_drawn_from_and_scored():
    """Activations are no arrays, and a compiled program takes them all the same."""
    network = npe.training(
        *(jax.random.key(8), linear),
        latents=["theta"],
        observed=["x"],
        flow=flows.mixture(num_components=2, width=4, depth=1),
    ).params
    of = posterior.over(network)
    them = joint.draw(
        jax.random.key(1), of.simulator.draw, of.draws, num_simulations=12, num_samples=9
    )
    assert them.draws.shape == (12, 9, 2)
    key = jax.random.split(jax.random.split(jax.random.key(1), 12)[3])
    theta, x = of.simulator.draw(key[0])
    np.testing.assert_allclose(them.theta[3], theta, rtol=1e-5)
    np.testing.assert_allclose(them.draws[3], of.draws(key[1], x, 9), rtol=1e-4)

    def log_prob(theta: Any, x: Any) -> Any:
        return network.given(theta[None], network.summary(x))[0]

    found = coverage.highest_density(jax.random.key(2), them, log_prob)
    assert found.levels.shape == (12, 1) and np.isfinite(found.levels).all()
