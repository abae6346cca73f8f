"""A posterior network that has learned: named sites in their own supports, given an observation.

    posterior.sample(key, x, 10_000)     # {"theta": [10_000, 2], "scale": [10_000]}
    posterior.log_prob(sites, x)         # [10_000], Jacobian included
    posterior(x)                         # the same as a numpyro Distribution

An observation that is far from everything that the simulator draws is said: nothing that a network
returns would show it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from paramax import unwrap

from ppl.checks import check_count, check_key
from ppl.showing import shown

from .network import Network
from .simulators import Simulator

log = logging.getLogger(__name__)

FAR = 2.0
"""An observation is far if its distance is so many times the largest of them."""


@shown
class Posterior(eqx.Module):
    """q(sites | x) (`npe.posterior` and its siblings).

    Attributes:
        network: q on R^D given a context.
        usual: what the context of an observation of the model is like.
    """

    network: Network
    usual: Usual

    @property
    def simulator(self) -> Simulator:
        """The model whose posterior it is."""
        return self.network.simulator

    def __call__(self, x: Any) -> Sites:
        """The posterior of an observation, as a numpyro distribution over a dict of sites."""
        return Sites(self, self.context(x))

    def sample(self, key: PRNGKeyArray, x: Any, num_samples: int) -> dict[str, Array]:
        """Independent draws: every latent site in its own support, [num_samples, ...].

        Args:
            key: typed key.
            x: the observed sites by name, or of a single one the array.
            num_samples: how many.

        Raises:
            ValueError: for an observation of another shape or that is not finite, and for a count
                that is not positive.
        """
        check_key(key)
        check_count("num_samples", num_samples)
        return _sites(self.network, self._draws(key, self.context(x), num_samples))

    def draws(self, key: PRNGKeyArray, x: Any, num_samples: int) -> Float[Array, "N D"]:
        """Independent draws on R^D, as calibration takes them."""
        return self._draws(key, self.context(x), num_samples)

    def log_prob(self, sites: Mapping[str, Any], x: Any) -> Float[Array, " N"]:
        """log density of N values of the latent sites, [N, ...] each, in their own supports."""
        return _log_prob(self.network, dict(sites), self.context(x))

    def far(self, x: Any) -> float:
        """How far an observation is from what the model draws: its Mahalanobis distance in the
        space of summaries over the largest of the pilot simulations; above 1 it is beyond them all.
        """
        return float(self.usual.ratio(self.network.summary(self.simulator.observation(x))))

    def context(self, x: Any) -> Float[Array, " C"]:
        """The summary of an observation [C]; one far from what the model draws is said."""
        context = _summary(self.network, self.simulator.observation(x))
        if not isinstance(context, Tracer) and ((ratio := float(self.usual.ratio(context))) > FAR):
            log.warning(
                "the observation is %.1f times as far from the simulations as the farthest of %d of"
                " them (Mahalanobis distance of its summary): the network has learned nothing there"
                " and its posterior may be anything; see whether the model can draw what was"
                " observed (calibration.misspecification)",
                *(ratio, self.usual.num),
            )
        return context

    def _draws(self, key: PRNGKeyArray, context: Array, num: int) -> Float[Array, "N D"]:
        return _draws(self.network, key, context, num)


class Usual(eqx.Module):
    """Mean and a root of the inverse covariance of `num` contexts, and the largest distance."""

    mean: Float[Array, " C"]
    root: Float[Array, "C C"]
    largest: Float[Array, ""]
    num: int = eqx.field(static=True)

    def ratio(self, context: Float[Array, " C"]) -> Float[Array, ""]:
        """The distance of a context over the largest."""
        return jnp.linalg.norm(self.root @ (context - self.mean)) / self.largest


class Sites(Distribution):
    """A posterior given one observation; its values are dicts of named sites."""

    support = constraints.dependent  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("posterior", "context")

    def __init__(self, posterior: Posterior, context: Float[Array, " C"]) -> None:
        self.posterior, self.context = posterior, context
        super().__init__(batch_shape=(), event_shape=(), validate_args=False)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Every site [*sample_shape, ...]."""
        num = int(np.prod(sample_shape, dtype=int))
        network = self.posterior.network
        sites = _sites(network, _draws(network, key, self.context, num))
        return {name: rows.reshape(*sample_shape, *rows.shape[1:]) for name, rows in sites.items()}

    def log_prob(self, value: Mapping[str, Any], intermediates: Any = None) -> Array:
        """log density of sites [*shape, ...]: [*shape]."""
        network = self.posterior.network
        shapes = {site: jnp.shape(rows) for site, rows in value.items()}
        ndim = {name: len(leaf.shape) for name, leaf in _like(network).items()}
        (shape, *others) = {shapes[name][: len(shapes[name]) - ndim[name]] for name in ndim}
        if others:
            raise ValueError(f"expected sites with the same axes in front, got {shapes}")
        rows = {
            name: jnp.reshape(jnp.asarray(value[name]), (-1, *shapes[name][len(shape) :]))
            for name in ndim
        }
        return _log_prob(network, rows, self.context).reshape(shape)


def over(network: Network) -> Posterior:
    """The posterior of a trained network."""
    contexts = np.asarray(_summaries(network, unwrap(network.pilot)), np.float64)
    mean, covariance = contexts.mean(0), np.atleast_2d(np.cov(contexts.T))
    # Constant and nearly constant directions get a small scale, not an infinite one.
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 1e-6 * max(values[-1], 1e-12))
    root = (vectors / np.sqrt(values)).T
    largest = np.linalg.norm((contexts - mean) @ root.T, axis=1).max()
    usual = Usual(
        mean=jnp.asarray(mean, jnp.float32),
        root=jnp.asarray(root, jnp.float32),
        largest=jnp.float32(max(largest, 1e-6)),
        num=len(contexts),
    )
    return Posterior(network, usual)


def _like(network: Network) -> dict[str, Any]:
    return jax.eval_shape(network.simulator.constrain, jnp.zeros(network.simulator.dim))


@eqx.filter_jit
def _summary(network: Network, x: dict[str, Array]) -> Float[Array, " C"]:
    return network.summary(x)


@eqx.filter_jit
def _summaries(network: Network, x: dict[str, Array]) -> Float[Array, "N C"]:
    return jax.lax.map(network.summary, x, batch_size=100)


@eqx.filter_jit
def _draws(network: Network, key: PRNGKeyArray, context: Array, num: int) -> Float[Array, "N D"]:
    return network.sample(key, context, num)


@eqx.filter_jit
def _sites(network: Network, theta: Float[Array, "N D"]) -> dict[str, Array]:
    return jax.vmap(network.simulator.constrain)(theta)


@eqx.filter_jit
def _log_prob(network: Network, sites: dict[str, Any], context: Array) -> Float[Array, " N"]:
    theta = jax.vmap(network.simulator.unconstrain)(sites)
    return network.given(theta, context) - jax.vmap(network.simulator.log_jacobian)(theta)
