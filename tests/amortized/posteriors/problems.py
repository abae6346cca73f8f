"""Models whose posteriors are known."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import ppl
from amortized.posteriors import flows
from models import tabular

EOS, V, T = 1, 3, 3
STYLES = jnp.array(
    [
        [[0.1, 0.2, 0.7], [0.0, 1.0, 0.0], [0.6, 0.3, 0.1]],
        [[0.7, 0.1, 0.2], [0.0, 1.0, 0.0], [0.2, 0.1, 0.7]],
    ]
)
"""Two laws of the next token given the last."""


def linear() -> None:
    """theta ~ N((1, -1), diag(1, 4)), x = (theta_0 + theta_1, theta_1) + N(0, diag(.25, 1))."""
    prior = dist.Normal(jnp.array([1.0, -1.0]), jnp.array([1.0, 2.0])).to_event(1)
    theta = numpyro.sample("theta", prior)
    mean = jnp.stack([theta[0] + theta[1], theta[1]])
    numpyro.sample("x", dist.Normal(mean, jnp.array([0.5, 1.0])).to_event(1))


PRIOR_MEAN, PRIOR = jnp.array([1.0, -1.0]), jnp.diag(jnp.array([1.0, 4.0]))
DESIGN, NOISE = jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.diag(jnp.array([0.25, 1.0]))


def linear_posterior(x: Any) -> tuple[Any, Any]:
    """Mean and covariance of theta given x."""
    gain = PRIOR @ DESIGN.T @ jnp.linalg.inv(DESIGN @ PRIOR @ DESIGN.T + NOISE)
    mean = PRIOR_MEAN + gain @ (x - DESIGN @ PRIOR_MEAN)
    return mean, PRIOR - gain @ DESIGN @ PRIOR


def linear_evidence(x: Any) -> Any:
    """log p(x)."""
    covariance = DESIGN @ PRIOR @ DESIGN.T + NOISE
    return dist.MultivariateNormal(DESIGN @ PRIOR_MEAN, covariance).log_prob(x)


def supports() -> None:
    """Latents on five kinds of supports, one of which depends on another."""
    scale = numpyro.sample("scale", dist.LogNormal(0.3, 0.5))
    numpyro.sample("inside", dist.Uniform(-scale, 2 * scale))
    numpyro.sample("weights", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.sample("free", dist.Normal(0, 1).expand([2]).to_event(1))
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.5))
    numpyro.sample("x", dist.Poisson(rate))


def rate() -> None:
    """rate ~ Gamma(2, 1.5), x ~ Poisson(rate): the posterior is Gamma(2 + x, 2.5)."""
    numpyro.sample("x", dist.Poisson(numpyro.sample("rate", dist.Gamma(2.0, 1.5))))


def style(styles: Any) -> None:
    """A string in a mixture of two styles, with an unknown share of the first."""
    share = numpyro.sample("share", dist.Beta(2.0, 1.0))
    laws = share * styles[0] + (1 - share) * styles[1]
    lm = tabular.markov(laws, eos=EOS)
    numpyro.sample("text", ppl.Text(lm.given(jnp.array([0]), max_tokens=T)))


def noisy() -> None:
    """theta ~ N(0, .1), x ~ N(theta, .1), in each of two dimensions."""
    theta = numpyro.sample("theta", dist.Normal(0, 0.1**0.5).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def with_law(network: Any, a: Any, s: Any) -> Any:
    """The Gaussian network of `noisy` as N(a x, s), a and s [2] or numbers."""
    theta, x = network.standard, network.summary.standard
    (location, scale), (x_location, x_scale) = (
        (standard.location.tree, standard.scale.tree) for standard in (theta, x)
    )
    parts = (
        jnp.diag(a * x_scale / scale),
        (a * x_location - location) / scale,
        jnp.log(s**0.5 / scale - flows.LEAST_SCALE),
    )
    where = lambda net: (net.density.weight, net.density.bias, net.density.log_scale)  # noqa: E731
    return eqx.tree_at(where, network, parts)
