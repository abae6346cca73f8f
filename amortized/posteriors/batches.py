"""What a posterior network learns from: fresh simulations in every step, or a stored set of them.

    Fresh(200)                       # the simulator runs inside the compiled loop
    stored(key, simulations, 200)    # a budget of simulations, a tenth of which is held out

Both are the `draw` of a `Training`.  Simulations that are not finite are counted and left out: what
is learned is the posterior of what can be observed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.rows import take_rows
from ppl.showing import shown

from .simulators import Simulations, Simulator

log = logging.getLogger(__name__)


@shown
class Batch(NamedTuple):
    """A step's simulations.

    rows: B of them; numbers that are not finite are replaced by 0 there.
    finite: [B] which count.
    held_out: what the step may look at and not learn from; None of fresh simulations.
    """

    rows: Simulations
    finite: Bool[Array, " B"]
    held_out: Simulations | None

    @property
    def invalid(self) -> Float[Array, ""]:
        """The share that does not count."""
        return 1 - self.finite.mean()

    def losses(
        self, each: Callable[[Simulations], Float[Array, " B"]]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean of a loss per row, and as metrics the share that did not count, and the loss on
        what is held out.
        """
        metrics = {"invalid": self.invalid}
        if self.held_out is not None:
            metrics["held_out"] = jax.lax.stop_gradient(each(self.held_out).mean())
        return self.mean(each(self.rows)), metrics

    def mean(self, values: Float[Array, " B"]) -> Float[Array, ""]:
        """Of those that count."""
        return jnp.where(self.finite, values, 0).sum() / jnp.maximum(self.finite.sum(), 1)


class Fresh(eqx.Module):
    """Draws `batch_size` new simulations of the network's own simulator in every step."""

    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, network: Any, data: None) -> tuple[Batch, None]:
        simulations = Simulations(
            *jax.vmap(network.simulator.draw)(jax.random.split(key, self.batch_size))
        )
        finite = simulations.finite
        return Batch(jax.tree.map(_zeroed, simulations), finite, None), data


@shown
class Cursor(NamedTuple):
    """Where an epoch is: the order of its rows, and how many steps of it are made."""

    order: Int[Array, " N"]
    step: Int[Array, ""]


def walked(key: PRNGKeyArray, cursor: Cursor, batch_size: int) -> tuple[Int[Array, " B"], Cursor]:
    """The next rows of an epoch, and the cursor behind them; an epoch begins with a new order."""
    order = jax.lax.cond(
        cursor.step == 0, lambda: jax.random.permutation(key, cursor.order), lambda: cursor.order
    )
    at = jax.lax.dynamic_slice_in_dim(order, cursor.step * batch_size, batch_size)
    return at, Cursor(order, (cursor.step + 1) % (len(order) // batch_size))


class Stored(eqx.Module):
    """Walks through stored simulations in an order that changes with every epoch."""

    rows: Simulations
    held_out: Simulations
    batch_size: int = eqx.field(static=True)

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return len(self.rows.theta) // self.batch_size

    @property
    def watched(self) -> int:
        """How many held-out simulations a step looks at: an epoch sees them all."""
        return -(-len(self.held_out.theta) // self.steps)

    @property
    def start(self) -> Cursor:
        """Before the first step."""
        return Cursor(jnp.arange(len(self.rows.theta), dtype=jnp.int32), jnp.int32(0))

    def __call__(self, key: PRNGKeyArray, network: Any, data: Cursor) -> tuple[Batch, Cursor]:
        del network
        at, cursor = walked(key, data, self.batch_size)
        held_out = None
        if self.watched:
            seen = data.step * self.watched + jnp.arange(self.watched)
            seen = seen % len(self.held_out.theta)
            held_out = take_rows(self.held_out, seen)
        batch = Batch(take_rows(self.rows, at), jnp.ones(self.batch_size, bool), held_out)
        return batch, cursor


PILOT = 1000
"""How many simulations tell the scales, where all others are drawn during training, and at most
judge observations.
"""
HELD_OUT = 0.1
"""The share of a budget that is held out."""


@shown
class Data(NamedTuple):
    """What a training draws from: `draw` and what it carries at the `start`; `pilot` tells the
    scales.
    """

    pilot: Simulations
    draw: Fresh | Stored
    start: Cursor | None


def prepared(
    key: PRNGKeyArray, simulator: Simulator, num_simulations: int | None, batch_size: int
) -> Data:
    """Fresh simulations, or a budget of `num_simulations` of which a tenth is held out."""
    check_count("batch_size", batch_size)
    first, second = jax.random.split(key)
    if num_simulations is None:
        pilot = simulator.draws(first, PILOT)
        return Data(finite(pilot), Fresh(batch_size), None)
    check_count("num_simulations", num_simulations)
    draw = stored(second, simulator.draws(first, num_simulations), batch_size)
    return Data(draw.rows, draw, draw.start)


def stored(key: PRNGKeyArray, simulations: Simulations, batch_size: int) -> Stored:
    """Those that are finite, a random tenth of them held out.

    Raises:
        ValueError: if a batch has more rows than there are to learn from.
    """
    check_count("batch_size", batch_size)
    rest = finite(simulations)
    order = jax.random.permutation(key, len(rest.theta))
    num = round(HELD_OUT * len(order))
    if len(order) - num < batch_size:
        raise ValueError(
            f"expected at least a batch of {batch_size} simulations to learn from, got"
            f" {len(order) - num}: {len(simulations.theta)} drawn, {len(order)} finite, {num} held"
            " out; draw more, or take smaller batches"
        )
    rows, held_out = take_rows(rest, order[num:]), take_rows(rest, order[:num])
    return Stored(rows, held_out, batch_size)


def finite(simulations: Simulations) -> Simulations:
    """Those that are finite; a warning names the sites of those that are not.

    Raises:
        ValueError: if none is finite.
    """
    kept = np.asarray(simulations.finite)
    if kept.all():
        return simulations
    sites = {"the latents": simulations.theta, **simulations.x}
    named = [name for name, rows in sites.items() if not np.isfinite(np.asarray(rows)).all()]
    num, total = int((~kept).sum()), len(kept)
    if num == total:
        raise ValueError(
            f"expected simulations that are finite, got {total} of {total} with NaN or infinite"
            f" values in {named}"
        )
    log.warning(
        "%d of %d simulations (%.1f %%) have NaN or infinite values in %s.  They are left out: what"
        " is learned is the posterior given that the observation is finite.",
        *(num, total, 100 * num / total, named),
    )
    return take_rows(simulations, jnp.asarray(np.flatnonzero(kept), jnp.int32))


def _zeroed(leaf: Array) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(jnp.isfinite(leaf), leaf, 0)
