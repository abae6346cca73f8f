"""A NumPyro model as prior times likelihood on the unconstrained space R^D, for samplers that treat
the two apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to

from ppl.showing import shown

LogDensity = Callable[[Float[Array, " D"]], Float[Array, ""]]


@shown
class Density(NamedTuple):
    """A model on R^D: log prior (Jacobian included) and log likelihood of one position [D], and
    what else it takes.
    """

    log_prior: LogDensity
    log_likelihood: LogDensity
    sample_prior: Callable[[PRNGKeyArray], Float[Array, " D"]]
    constrain: Callable[[Float[Array, " D"]], dict[str, Array]]

    def at(self, beta: Float[Array, ""]) -> LogDensity:
        """log prior + beta log likelihood."""
        return lambda z: self.log_prior(z) + beta * self.log_likelihood(z)


def density(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Density:
    """Split a NumPyro model into prior (its latent sites) and likelihood (its observed sites,
    `numpyro.factor` too).

    Raises:
        ValueError: if the model has no observed site, no latent site, or a discrete latent site.
    """
    sites = handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace(*args, **kwargs)
    sites = [site for site in sites.values() if site["type"] == "sample"]
    latent = [site["name"] for site in sites if not site["is_observed"]]
    if not latent or len(latent) == len(sites):
        raise ValueError(
            f"expected a model with latent and observed sites, got latent {latent} and observed"
            f" {[site['name'] for site in sites if site['is_observed']]}; observe data by"
            " numpyro.sample(name, law, obs=data) or handlers.condition, and pass the data to the"
            " model"
        )
    discrete = [
        site["name"] for site in sites if not site["is_observed"] and site["fn"].support.is_discrete
    ]
    if discrete:
        raise ValueError(
            f"expected continuous latent sites, got discrete {discrete}; sum them out, e.g. by"
            " dist.MixtureSameFamily"
        )

    def draw(key: PRNGKeyArray) -> dict[str, Array]:
        traced = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
        return {
            name: biject_to(traced[name]["fn"].support).inv(traced[name]["value"])
            for name in latent
        }

    _, unravel = ravel_pytree(draw(jax.random.key(0)))

    def trace_at(z: Float[Array, " D"]) -> dict[str, Any]:
        position = unravel(z)

        def substitute(site: dict) -> Any:
            return (
                biject_to(site["fn"].support)(position[site["name"]])
                if site["name"] in position
                else None
            )

        return handlers.trace(handlers.substitute(model, substitute_fn=substitute)).get_trace(
            *args, **kwargs
        )

    def log_prob(site: dict) -> Array:
        scale = 1.0 if site["scale"] is None else site["scale"]
        return jnp.sum(scale * site["fn"].log_prob(site["value"]))

    def log_prior(z: Float[Array, " D"]) -> Array:
        position, traced = unravel(z), trace_at(z)
        total = jnp.float32(0)
        for name in latent:
            bijection = biject_to(traced[name]["fn"].support)
            jacobian = bijection.log_abs_det_jacobian(position[name], traced[name]["value"])
            total = total + log_prob(traced[name]) + jnp.sum(jacobian)
        return total

    def log_likelihood(z: Float[Array, " D"]) -> Array:
        traced = trace_at(z).values()
        seen = [site for site in traced if site["type"] == "sample" and site["is_observed"]]
        return functools.reduce(jnp.add, [log_prob(site) for site in seen])

    def constrain(z: Float[Array, " D"]) -> dict[str, Array]:
        traced = trace_at(z).items()
        return {
            name: site["value"]
            for name, site in traced
            if name in latent or site["type"] == "deterministic"
        }

    return Density(log_prior, log_likelihood, lambda key: ravel_pytree(draw(key))[0], constrain)


def split_static(tree: Any) -> tuple[tuple, tuple]:
    """Arrays, which jit traces, and the rest (sizes, flags), which the model may need to know when
    it is traced.
    """
    leaves, structure = jax.tree.flatten(tree)
    traced = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    arrays = tuple(leaf if t else None for leaf, t in zip(leaves, traced, strict=True))
    return arrays, (
        structure,
        tuple(None if t else leaf for leaf, t in zip(leaves, traced, strict=True)),
    )


def join_static(arrays: tuple, static: tuple) -> Any:
    structure, rest = static
    return jax.tree.unflatten(
        structure, [b if a is None else a for a, b in zip(arrays, rest, strict=True)]
    )
