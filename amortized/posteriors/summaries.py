"""Summaries: networks that turn an observation into the context of a conditional density.

    summary = summaries.identity()
    s = summary(key, simulations)     # built for what a simulator draws
    s(x)                              # one observation -> context [C]

A summary is a function (key, pilot) -> network; `pilot` are simulations, by which it standardises.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import NonTrainable, unwrap

from .simulators import Observation, Simulations

Reads = Callable[[Observation], Float[Array, " C"]]
"""A summary network: one observation -> context [C]."""

Summary = Callable[[PRNGKeyArray, Simulations], Reads]
"""(key, pilot) -> a summary network for what a simulator draws."""


class Standardised(eqx.Module):
    """(values - location) / scale; a constant coordinate is only centred."""

    location: NonTrainable[Float[Array, " D"]]
    scale: NonTrainable[Float[Array, " D"]]

    def __init__(self, rows: Float[Array, "N D"]):
        spread = rows.std(0)
        self.location = NonTrainable(rows.mean(0))
        self.scale = NonTrainable(jnp.where(spread > 0, spread, 1.0))

    def __call__(self, values: Float[Array, " D"]) -> Float[Array, " D"]:
        location, scale = unwrap((self.location, self.scale))
        return (values - location) / scale

    def inverse(self, values: Float[Array, " D"]) -> Float[Array, " D"]:
        """The values before."""
        location, scale = unwrap((self.location, self.scale))
        return location + scale * values

    @property
    def log_scale(self) -> Float[Array, ""]:
        """log |d values / d standardised|."""
        return jnp.log(unwrap(self.scale)).sum()


class Identity(eqx.Module):
    """All observed numbers, each standardised (`identity`)."""

    standard: Standardised

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return self.standard(flat(x))


class Dense(eqx.Module):
    """An MLP over all observed numbers, each standardised (`mlp`)."""

    standard: Standardised
    network: eqx.nn.MLP

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return self.network(self.standard(flat(x)))


def identity() -> Summary:
    """All observed numbers in one vector, each standardised."""
    return lambda key, pilot: Identity(Standardised(jax.vmap(flat)(pilot.x)))


def mlp(*, size: int = 20, width: int = 50, depth: int = 2) -> Summary:
    """An MLP over all observed numbers that learns `size` of its own."""

    def build(key: PRNGKeyArray, pilot: Simulations) -> Dense:
        rows = jax.vmap(flat)(pilot.x)
        network = eqx.nn.MLP(rows.shape[1], size, width, depth, jax.nn.relu, key=key)
        return Dense(Standardised(rows), network)

    return build


def size(reads: Reads, pilot: Simulations) -> int:
    """C, of the contexts that a summary network makes."""
    first = jax.tree.map(lambda leaf: leaf[0], pilot.x)
    return jax.eval_shape(reads, first).shape[0]


def flat(x: Observation) -> Float[Array, " C"]:
    """All numbers of an observation, sites in the order of their names."""
    return jnp.concatenate([jnp.ravel(x[name]).astype(jnp.float32) for name in sorted(x)])


class OneHot(eqx.Module):
    """Every token of a short string as a unit vector (`one_hot`)."""

    vocab_size: int = eqx.field(static=True)

    def __call__(self, x: Observation) -> Float[Array, " C"]:
        return jnp.concatenate(
            [jnp.ravel(jax.nn.one_hot(x[name], self.vocab_size)) for name in sorted(x)]
        )


def one_hot(vocab_size: int) -> Summary:
    """Every token of short strings as a unit vector: for small vocabularies and horizons."""
    return lambda key, pilot: OneHot(vocab_size)
