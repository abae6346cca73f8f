"""Draws of a guide, and the densities of model and guide at them, datum by datum.

A datum is an entry of the plates that all sites share: the rows of a batch, in a model whose
latents are all local.  Without such plates the whole model is one datum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import Delta, Distribution
from numpyro.util import check_model_guide_match

from ppl.showing import shown

Program = Callable[..., Any]
"""A NumPyro model or guide."""
Data = Mapping[str, Any]
"""Arrays [N, ...], given to model and guide under their names."""
Values = dict[str, Any]
"""What `numpyro.param` sites are, by name."""
Trace = Any
"""Sites by name, as `numpyro.handlers.trace` has them."""


@shown
class Densities(NamedTuple):
    """log p(x, z) and log q(z) of one draw of a guide, by datum.

    scale: the size of the data over that of the batch, which the densities are without.
    """

    log_p: Float[Array, "*B"]
    log_q: Float[Array, "*B"]
    scale: Float[Array, ""]


@shown
class Call(NamedTuple):
    """A model and a guide with what both are called with; `values` of their parameters."""

    model: Program
    guide: Program
    values: Values
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def drawn(
    key: PRNGKeyArray,
    call: Call,
    *,
    draws: Callable[[Any], Any] = lambda value: value,
    scored: Callable[[Any], Any] = lambda value: value,
) -> tuple[Trace, Trace]:
    """The traces of model and guide at one draw of the guide.

    The guide runs twice: its second run, whose trace this is, scores what the first has drawn.

    Args:
        draws: of every drawn value, `jax.lax.stop_gradient` say, before it is scored.
        scored: of the guide's parameters, where they score.
    """
    model_key, guide_key = jax.random.split(key)
    first = run(guide_key, call.guide, call.values, call)
    changed = {
        name: {**site, "value": draws(site["value"])} for name, site in samples(first).items()
    }
    first = {**first, **changed}
    # What is a function of other sites is made again: it need not come out to the bit.
    free = {name: site for name, site in first.items() if not _is_delta(site)}
    second = run(guide_key, replayed(call.guide, free), scored(call.values), call)
    joint = run(model_key, replayed(call.model, first), call.values, call)
    check_model_guide_match(joint, first)
    return joint, second


def weighed(
    key: PRNGKeyArray, call: Call, draws: Callable[[Any], Any] = lambda value: value
) -> Densities:
    """One draw of the guide with the densities at it, by datum.

    Raises:
        ValueError: if there are minibatches, in plates that not all sites share: then no datum has
            weights of its own.
    """
    return by_datum(*drawn(key, call, draws=draws))


def run(key: PRNGKeyArray, program: Program, values: Values, call: Call) -> Trace:
    """The trace of a model or guide where the parameters have these values."""
    seeded = handlers.seed(handlers.substitute(program, values), key)
    return handlers.trace(seeded).get_trace(*call.args, **call.kwargs)


def replayed(program: Program, trace: Trace) -> Program:
    """A model or guide that draws what another has drawn."""
    return handlers.replay(program, trace)


def samples(trace: Trace) -> Trace:
    """The sample sites of a trace."""
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def by_datum(joint: Trace, guide: Trace) -> Densities:
    """The densities of a model's and a guide's trace, summed within each datum."""
    sites = [*samples(joint).values(), *samples(guide).values()]
    frames = [set(site["cond_indep_stack"]) for site in sites]
    common = set.intersection(*frames)
    scales = {frame: joint[frame.name]["args"][0] / frame.size for frame in set.union(*frames)}
    if apart := [frame.name for frame in set.union(*frames) - common if scales[frame] != 1]:
        raise ValueError(
            f"expected minibatches in plates that all sites share, got {apart}, which some sites"
            " are outside of: weights of single data are not known then; take the whole data, or"
            " numpyro's Trace_ELBO"
        )
    scale = math.prod(scales[frame] for frame in common)
    dims = {frame.dim for frame in common}

    def within(trace: Trace) -> Array:
        values = (_within(log_prob(site), dims) for site in samples(trace).values())
        return functools.reduce(jnp.add, values, jnp.zeros(())) / scale

    return Densities(within(joint), within(guide), jnp.asarray(scale, jnp.result_type(float)))


def total(trace: Trace) -> Float[Array, ""]:
    """log density of a trace, an estimate of that of all data."""
    return functools.reduce(
        jnp.add, (log_prob(site).sum() for site in samples(trace).values()), jnp.zeros(())
    )


def log_prob(site: dict[str, Any]) -> Array:
    """A site's log density, by entry of its plates, and as often as the scale says."""
    value = site["fn"].log_prob(site["value"])
    return value if site["scale"] is None else site["scale"] * value


def _within(values: Array, dims: set[int]) -> Array:
    """The sum over all axes but some, counted from the right."""
    kept = {values.ndim + dim for dim in dims}
    return values.sum([axis for axis in range(values.ndim) if axis not in kept])


def _is_delta(site: dict[str, Any]) -> bool:
    fn = site["fn"] if site["type"] == "sample" else None
    while isinstance(inner := getattr(fn, "base_dist", None), Distribution):
        fn = inner
    return isinstance(fn, Delta)
