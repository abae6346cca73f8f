"""The network that all estimators of a posterior share: a summary of the observation, and a
conditional density given it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import non_trainable

from . import discrete, flows, summaries
from .batches import PILOT, Fresh, Stored
from .simulators import Observation, Simulations, Simulator
from .summaries import Standardised

AT_ONCE = 500
"""Draws that are made side by side."""


class Network(eqx.Module):
    """q(theta | x) on R^D, over latents that are standardised.

    Attributes:
        simulator: the model whose posterior it learns; fixed.
        summary: observation -> context [C].
        density: of standardised latents given the context.
        standard: the scales of the latents; fixed.  Numbers of discrete values stay what they are.
        pilot: some simulated observations [R, ...], by which others are judged; fixed.
    """

    simulator: Simulator
    summary: summaries.Reads
    density: AbstractDistribution
    standard: Standardised
    pilot: Observation

    def log_prob(self, theta: Float[Array, "B D"], x: Observation) -> Float[Array, " B"]:
        """log q of B latents, each given its own observation."""
        return self.given(theta, jax.vmap(self.summary)(x))

    def given(
        self, theta: Float[Array, "B D"], context: Float[Array, "*B C"]
    ) -> Float[Array, " B"]:
        """log q of B latents given one context [C] or as many."""
        values = jax.vmap(self.standard)(theta)
        return self.density.log_prob(values, context) - self.standard.log_scale

    def sample(
        self, key: PRNGKeyArray, context: Float[Array, " C"], num: int
    ) -> Float[Array, "N D"]:
        """`num` latents given one context; the first are those of a smaller number."""
        # Some at a time: what a flow holds of each is a thousand numbers.
        one = lambda key: self.standard.inverse(self.density.sample(key, (), context))  # noqa: E731
        return jax.lax.map(one, jax.random.split(key, num), batch_size=AT_ONCE)


def network(
    key: PRNGKeyArray,
    simulator: Simulator,
    pilot: Simulations,
    flow: flows.Family | None,
    summary: summaries.Summary | None,
) -> Network:
    """An untrained network, scaled by simulations that are finite."""
    first, second = jax.random.split(key)
    reads = (summaries.identity() if summary is None else summary)(first, pilot)
    family = flows.spline_coupling() if flow is None else flow
    if simulator.discrete:
        family = discrete.beside(family, simulator.num_values)
    density = family(second, simulator.dim, summaries.size(reads, pilot))
    some = jax.tree.map(lambda leaf: leaf[:PILOT], pilot.x)
    standard = Standardised(pilot.theta, unchanged=len(simulator.num_values))
    return Network(non_trainable(simulator), reads, density, standard, non_trainable(some))


def remembering(network: Network, draw: Fresh | Stored) -> tuple[Network, Fresh | Stored]:
    """Both with what the summary's frozen part makes of stored simulations, so that it is made
    once; fresh ones are read as they come.
    """
    fixed = getattr(network.summary, "fixed", None)
    if fixed is None or isinstance(draw, Fresh):
        return network, draw
    rows, held_out = (
        part._replace(x=part.x | _fixed(fixed, part.x)) for part in (draw.rows, draw.held_out)
    )
    some = non_trainable(jax.tree.map(lambda leaf: leaf[:PILOT], rows.x))
    return (
        dataclasses.replace(network, pilot=some),
        dataclasses.replace(draw, rows=rows, held_out=held_out),
    )


@eqx.filter_jit
def _fixed(fixed: Any, x: Observation) -> Observation:
    return jax.lax.map(fixed, x, batch_size=50)
