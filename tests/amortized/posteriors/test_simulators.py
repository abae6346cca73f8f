"""Simulators: supports, densities and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import log_density

from amortized.posteriors.simulators import simulator
from samplers.latent import posterior

from .problems import STYLES, linear, rate, style, supports

ALL = ["free", "inside", "rate", "scale", "weights"]
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def supported():
    return simulator(supports, latents=ALL, observed=["x"])


def test_latents_are_on_r_d_and_named(supported):
    assert supported.dim == 2 + 1 + 1 + 1 + 2
    theta, x = supported.draws(KEY, 50)
    assert theta.shape == (50, 7) and x["x"].shape == (50,)
    np.testing.assert_allclose(supported.draws(KEY, 7).theta, theta[:7], rtol=1e-5)


def test_every_support_is_left_and_entered(supported):
    theta, _ = supported.draws(KEY, 50)
    sites = jax.vmap(supported.constrain)(theta)
    assert (sites["inside"] > -sites["scale"]).all() and (
        sites["inside"] < 2 * sites["scale"]
    ).all()
    np.testing.assert_allclose(sites["weights"].sum(-1), 1, atol=1e-5)
    back = jax.vmap(supported.unconstrain)(sites)
    np.testing.assert_allclose(back, theta, atol=2e-4, rtol=1e-3)


def test_densities_are_those_of_the_model(supported):
    theta, data = supported.draw(KEY)[0], {"x": jnp.int32(2)}
    sites = supported.constrain(theta)
    model = handlers.condition(supports, data)
    joint, _ = log_density(model, (), {}, sites)
    seen = dist.Poisson(sites["rate"]).log_prob(2)
    prior = supported.log_prior(theta)
    np.testing.assert_allclose(supported.log_likelihood(theta, data), seen, rtol=1e-5)
    np.testing.assert_allclose(prior - supported.log_jacobian(theta), joint - seen, rtol=1e-4)
    # The coordinates are those of the samplers of continuous latents.
    of = posterior.density(model)
    np.testing.assert_allclose(prior, of.log_prior(theta), rtol=1e-4)
    np.testing.assert_allclose(of.log_likelihood(theta), seen, rtol=1e-5)


def test_the_jacobian_is_autodiffs(supported):
    theta = supported.draw(KEY)[0]

    def flat(theta):
        sites = supported.constrain(theta)
        return ravel_pytree(sites | {"weights": sites["weights"][:2]})[0]

    _, expected = jnp.linalg.slogdet(jax.jacobian(flat)(theta))
    np.testing.assert_allclose(supported.log_jacobian(theta), expected, rtol=1e-4)


def test_the_prior_on_the_line_sums_to_one():
    of = simulator(rate, latents=["rate"], observed=["x"])
    grid = jnp.linspace(-12, 6, 4001)[:, None]
    total = jnp.trapezoid(jnp.exp(jax.vmap(of.log_prior)(grid)), grid[:, 0])
    np.testing.assert_allclose(total, 1, rtol=1e-3)


def test_texts_have_a_density():
    of = simulator(style, latents=["share"], observed=["text"], args=[STYLES])
    value = of.log_likelihood(jnp.zeros(1), {"text": jnp.array([2, 0, 1])})
    laws = STYLES.mean(0)
    np.testing.assert_allclose(value, jnp.log(laws[0, 2] * laws[2, 0] * laws[0, 1]), rtol=1e-5)


def discrete():
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("x", dist.Normal(kind, 1.0))


def fixed():
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(theta, 1), obs=jnp.float32(1.0))


def tilted():
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    numpyro.factor("tilt", theta)
    numpyro.sample("x", dist.Normal(theta, 1))


@pytest.mark.parametrize(
    ("model", "latents", "observed", "message"),
    [
        (linear, ["phi"], ["x"], "expected latents among the model's sites.*'phi'"),
        (linear, ["theta"], ["y"], "expected observed among the model's sites.*'y'"),
        (linear, ["theta"], ["theta"], "named once"),
        (linear, "theta", ["x"], "expected latents as names of sites"),
        (linear, ["theta"], [], "expected observed as names of sites"),
        (discrete, ["kind"], ["x"], "discrete.*kind"),
        (fixed, ["theta"], ["x"], "leave out `obs=`"),
        (tilted, ["theta"], ["x"], r"\['tilt'\].*which a simulation does not heed"),
        ("linear", ["theta"], ["x"], "expected model to be a NumPyro model"),
    ],
)
@pytest.mark.bad_input
def test_what_is_refused(model, latents, observed, message):
    with pytest.raises(ValueError, match=message):
        simulator(model, latents=latents, observed=observed)


def test_nuisance_is_drawn_and_has_no_density():
    of = simulator(supports, latents=["rate"], observed=["x"])
    assert set(of.nuisance) == {"free", "inside", "scale", "weights"}
    assert of.draws(KEY, 3).theta.shape == (3, 1)
    with pytest.raises(ValueError, match=r"latent sites \['rate'\] alone, got .*'scale'"):
        of.log_prior(jnp.zeros(1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros(3), r"expected x of shape \[2\].*got \[3\]"),
        (jnp.array([0.0, jnp.nan]), "1 that are NaN or infinite"),
        ({"y": jnp.zeros(2)}, r"expected the observed sites \['x'\], got \['y'\]"),
    ],
)
def test_observations_that_are_none(x, message):
    of = simulator(linear, latents=["theta"], observed=["x"])
    with pytest.raises(ValueError, match=message):
        of.observation(x)
