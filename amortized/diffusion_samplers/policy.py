"""The drift of a diffusion sampler, learned, and the flow of its states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count, check_counts
from ppl.showing import shown

LogDensity = Callable[[Float[Array, " D"]], Float[Array, ""]]
"""x -> log R(x), a jax function of one point."""

LARGEST = 100.0
"""Gradients of log R are clipped to this length."""
WIDEST = 4.0
"""The log-variance of a step changes by less than that."""


@shown
class Outputs(NamedTuple):
    """Of one state: the drift u [D], by how much the log-variance of the step changes [], and what
    is learned of the log-flow [].
    """

    drift: Float[Array, "*N D"]
    log_variance: Float[Array, "*N"]
    log_flow: Float[Array, "*N"]


@shown
class Policy(eqx.Module):
    """u(s, t) = network(s, t) + scale(t) grad log R(s), which is nothing at first; as PIS
    (arXiv 2111.15141) has it.
    """

    first: eqx.nn.Linear
    network: eqx.nn.MLP
    flow: eqx.nn.MLP
    pull: eqx.nn.MLP | None
    frequencies: Float[Array, " F"]
    size: float = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        width: int = 64,
        depth: int = 2,
        size: float = 1.0,
        langevin: bool = True,
    ):
        """A policy on R^D.

        Args:
            key: typed key.
            dim: D.
            width, depth: of the hidden layers.
            size: about how large states are; they are divided by it.
            langevin: whether the gradient of log R is part of the drift.
        """
        check_count("dim", dim)
        check_counts(width=width, depth=depth)
        first, second, third, fourth = jax.random.split(key, 4)
        self.first = eqx.nn.Linear(2 * NUM_HARMONICS, width, key=first)
        self.network = _silent(
            eqx.nn.MLP(dim + width, dim + 1, width, depth, jax.nn.gelu, key=second)
        )
        self.flow = _silent(eqx.nn.MLP(dim + width, 1, width, depth, jax.nn.gelu, key=third))
        self.pull = (
            _silent(eqx.nn.MLP(width, 1, width, 1, jax.nn.gelu, key=fourth)) if langevin else None
        )
        self.frequencies = jnp.linspace(0.1, 100.0, NUM_HARMONICS)
        self.size = float(size)

    def __call__(
        self, s: Float[Array, " D"], t: Float[Array, ""], log_density: LogDensity
    ) -> Outputs:
        """At state s and time t in [0, 1]."""
        angles = t * jax.lax.stop_gradient(self.frequencies)
        time = jax.nn.gelu(self.first(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        inputs = jnp.concatenate([s / self.size, time])
        drift, log_variance = jnp.split(self.network(inputs), [s.shape[0]])
        if self.pull is not None:
            gradient = clipped(jax.grad(log_density)(s))
            drift = drift + self.pull(time)[0] * gradient
        return Outputs(drift, WIDEST * jnp.tanh(log_variance[0]), self.flow(inputs)[0])


NUM_HARMONICS = 32


def clipped(gradient: Float[Array, " D"]) -> Float[Array, " D"]:
    """Of length `LARGEST` at most; 0 where it is no number."""
    gradient = jnp.where(jnp.isfinite(gradient).all(), gradient, 0.0)
    norm = jnp.sqrt((gradient**2).sum() + 1e-12)
    return gradient * jnp.minimum(1.0, LARGEST / norm)


def _silent(network: eqx.nn.MLP) -> eqx.nn.MLP:
    """With an output of 0 everywhere."""
    last = lambda mlp: (mlp.layers[-1].weight, mlp.layers[-1].bias)  # noqa: E731
    return eqx.tree_at(last, network, jax.tree.map(jnp.zeros_like, last(network)))
