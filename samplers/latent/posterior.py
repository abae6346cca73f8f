"""A NumPyro model as prior times likelihood on the unconstrained space R^D, for samplers that treat
the two apart.
"""

from __future__ import annotations

import dataclasses
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
from numpyro.infer.util import compute_log_probs, constrain_fn

from ppl.showing import shown

from ..results import Chains

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
    run = functools.partial(model, *args, **kwargs)
    latent, seen = _sites(run)
    _, unravel = ravel_pytree(_draw(run, latent, jax.random.key(0)))

    def log_prior(z: Float[Array, " D"]) -> Array:
        position = unravel(z)
        log_probs, sites = compute_log_probs(run, (), {}, constrain_fn(run, (), {}, position))
        total = functools.reduce(jnp.add, [log_probs[name] for name in latent])
        for name in latent:
            to_support = biject_to(sites[name]["fn"].support)
            jacobian = to_support.log_abs_det_jacobian(position[name], sites[name]["value"])
            total = total + jnp.sum(jacobian)
        return total

    def log_likelihood(z: Float[Array, " D"]) -> Array:
        log_probs, _ = compute_log_probs(run, (), {}, constrain_fn(run, (), {}, unravel(z)))
        return functools.reduce(jnp.add, [log_probs[name] for name in seen])

    return Density(
        log_prior=log_prior,
        log_likelihood=log_likelihood,
        sample_prior=lambda key: ravel_pytree(_draw(run, latent, key))[0],
        constrain=lambda z: constrain_fn(run, (), {}, unravel(z), return_deterministic=True),
    )


def named(of: Density, result: Chains) -> Chains:
    """Chains over R^D with every site by its name, in its own support, in `draws["latents"]` and in
    the place of `position`: for tables, means and ArviZ.

        of = posterior.density(model, data)
        out = posterior.named(of, chains.run(key, kernel, x, num_samples=1000))

    Raises:
        ValueError: if the chains kept no `position` [S, C, D].
    """
    if "position" not in result.draws:
        raise ValueError(
            f"expected draws with `position` [S, C, D], got {list(result.draws)}; keep it by"
            " `collect`"
        )
    draws = dict(result.draws)
    draws["latents"] = jax.jit(jax.vmap(jax.vmap(of.constrain)))(draws.pop("position"))
    return dataclasses.replace(result, draws=jax.device_get(draws))


def _sites(run: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """The names of a model's latent and of its observed sites."""
    traced = handlers.trace(handlers.seed(run, jax.random.key(0))).get_trace()
    sites = [site for site in traced.values() if site["type"] == "sample"]
    latent = [site for site in sites if not site["is_observed"]]
    names = [site["name"] for site in latent]
    seen = [site["name"] for site in sites if site["is_observed"]]
    if not names or not seen:
        raise ValueError(
            f"expected a model with latent and observed sites, got latent {names} and observed"
            f" {seen}; observe data by numpyro.sample(name, law, obs=data) or handlers.condition,"
            " and pass the data to the model"
        )
    discrete = [site["name"] for site in latent if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"expected continuous latent sites, got discrete {discrete}; sum them out, e.g. by"
            " dist.MixtureSameFamily"
        )
    return names, seen


def _draw(run: Callable[[], Any], latent: list[str], key: PRNGKeyArray) -> dict[str, Array]:
    """The latent sites of a draw from the prior, unconstrained."""
    traced = handlers.trace(handlers.seed(run, key)).get_trace()
    return {
        name: biject_to(traced[name]["fn"].support).inv(traced[name]["value"]) for name in latent
    }


def split_static(tree: Any) -> tuple[tuple, tuple]:
    """Arrays, which jit traces, and the rest (sizes, flags), which the model may need to know when
    it is traced.
    """
    leaves, structure = jax.tree.flatten(tree)
    traced = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    arrays, rest = (
        tuple(leaf if t == wanted else None for leaf, t in zip(leaves, traced, strict=True))
        for wanted in (True, False)
    )
    return arrays, (structure, rest)


def join_static(arrays: tuple, static: tuple) -> Any:
    structure, rest = static
    return jax.tree.unflatten(
        structure, [b if a is None else a for a, b in zip(arrays, rest, strict=True)]
    )
