"""The one loop that moves weighted populations: select where weights have degenerated, move, weigh.

Strings, states, temperatures and parameters are all moved by rounds of the same few functions.  A
sampler writes one round, (key, run) -> run, out of them, in the order that it needs:

    select      draw ancestors if the ESS is low (LAW 1 is kept: `base.resample`)
    advance     apply a move (LAW 2); what is no number dies and is counted
    record      write down the ESS and the evidence so far
    note        write down what else is to be known of the round
    end         the round is over, and has cost so much

and `rounds`, or `every_round`, runs it; `finish` banks the evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.pytrees import register_dataclass
from ppl.rows import take_rows

from .base import Cost, Move, Particles, Resampler, X, bank, dead, no_cost, resample
from .diagnostics import ess, log_z_std_error

ALWAYS = 2.0
"""An ESS threshold that no population passes."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Genealogy:
    """Slot i of round r continues slot ancestors[r, i] of round r - 1, and then weighs
    log_weights[r, i]."""

    ancestors: Int[Array, "R N"]
    log_weights: Float[Array, "R N"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What is written down of R rounds; rows of rounds that were not run are as at the start.

    Attributes:
        roots: [N] every particle's ancestor in the first generation.
        ess, log_z: [R] of the population when it was recorded; log_z with what is not yet banked.
        resampled: [R] whether ancestors were drawn.
        genealogy: if asked for.
        notes: rows [R, ...] of the sampler's own, by name.
    """

    roots: Int[Array, " N"]
    ess: Float[Array, " R"]
    log_z: Float[Array, " R"]
    resampled: Bool[Array, " R"]
    genealogy: Genealogy | None
    notes: dict[str, Array]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """A run between two rounds.

    Attributes:
        particles: the population.
        rounds: [] how many are over.
        num_invalid: [] particles that died because their weight was NaN or +inf.
        cost: what has been spent.
        trace: what is written down, if anything is.
    """

    particles: Particles
    rounds: Int[Array, ""]
    num_invalid: Int[Array, ""]
    cost: Cost
    trace: Trace | None

    @property
    def written(self) -> Trace:
        """The trace of a run that has one (`traced`)."""
        assert self.trace is not None, "expected a run that is written down, by population.traced"
        return self.trace


Round = Callable[[PRNGKeyArray, Run], Run]
"""(key, run) -> the run one round later."""


def start(particles: Particles) -> Run:
    """A run of which nothing is written down: it has no trace, roots or standard error."""
    return Run(particles, jnp.int32(0), jnp.int32(0), no_cost(), None)


def traced(
    particles: Particles,
    num_rounds: int,
    *,
    notes: Mapping[str, Any] | None = None,
    genealogy: bool = False,
) -> Run:
    """A run of at most R = `num_rounds` rounds, written down.

    `notes` are the rows of the sampler's own, each by the value [...] that it has in a round that
    is not run.
    """
    slots = jnp.arange(particles.log_weights.shape[0], dtype=jnp.int32)

    def rows(value: Any) -> Array:
        return jnp.broadcast_to(value, (num_rounds, *jnp.shape(value)))

    trace = Trace(
        roots=slots,
        ess=rows(jnp.float32(0)),
        log_z=rows(jnp.float32(0)),
        resampled=rows(jnp.bool_(False)),
        genealogy=Genealogy(rows(slots), rows(jnp.zeros(slots.shape, jnp.float32)))
        if genealogy
        else None,
        notes={name: rows(value) for name, value in (notes or {}).items()},
    )
    return dataclasses.replace(start(particles), trace=trace)


def select(
    key: PRNGKeyArray,
    run: Run,
    resampler: Resampler,
    threshold: float | Float[Array, ""],
    *,
    reorder: Callable[[X, Int[Array, " N"]], X] = take_rows,
    log_selection: Float[Array, " N"] | None = None,
) -> Run:
    """Draw ancestors if the ESS of what they are drawn from is below threshold * N.

    `log_selection` [N] is what they are drawn from, by default the weights; see `base.resample`.
    """
    p = run.particles
    selecting = p.log_weights if log_selection is None else log_selection
    when = (ess(selecting) < threshold * selecting.shape[0]) & ~dead(selecting).all()
    after, ancestors = resample(key, p, resampler, when, reorder, log_selection)
    return dataclasses.replace(
        run, particles=after, trace=_selected(run.trace, run.rounds, when, ancestors)
    )


def _selected(
    trace: Trace | None, r: Int[Array, ""], when: Bool[Array, ""], ancestors: Int[Array, " N"]
) -> Trace | None:
    if trace is None:
        return None
    tree = trace.genealogy
    return dataclasses.replace(
        trace,
        roots=trace.roots[ancestors],
        resampled=trace.resampled.at[r].set(when),
        genealogy=None
        if tree is None
        else dataclasses.replace(tree, ancestors=tree.ancestors.at[r].set(ancestors)),
    )


def advance(key: PRNGKeyArray, run: Run, move: Move) -> Run:
    """Apply a move; see `moved`."""
    return moved(run, *move.sample(key, run.particles.state))


def moved(run: Run, state: X, dw: Float[Array, " N"]) -> Run:
    """The run with what a move has given: a weight of NaN or +inf kills its particle and is
    counted, unless that was dead before.
    """
    p = run.particles
    # -inf absorbs: a dead particle stays dead whatever the move says.
    was_dead, invalid = dead(p.log_weights), ~(dw < jnp.inf)
    log_weights = jnp.where(was_dead | invalid, -jnp.inf, p.log_weights + dw)
    return dataclasses.replace(
        run,
        particles=Particles(state, log_weights.astype(jnp.float32), p.log_z),
        num_invalid=run.num_invalid + (invalid & ~was_dead).sum(dtype=jnp.int32),
    )


def record(run: Run) -> Run:
    """Write down the population's ESS, evidence and weights in the row of this round."""
    r, p, trace = run.rounds, run.particles, run.trace
    if trace is None:
        return run
    tree = trace.genealogy
    trace = dataclasses.replace(
        trace,
        ess=trace.ess.at[r].set(ess(p.log_weights)),
        log_z=trace.log_z.at[r].set(bank(p).log_z),
        genealogy=None
        if tree is None
        else dataclasses.replace(tree, log_weights=tree.log_weights.at[r].set(p.log_weights)),
    )
    return dataclasses.replace(run, trace=trace)


def note(run: Run, **values: Any) -> Run:
    """Write values in this round's row of the notes of a traced run."""
    trace, r = run.written, run.rounds
    new = {name: trace.notes[name].at[r].set(value) for name, value in values.items()}
    return dataclasses.replace(run, trace=dataclasses.replace(trace, notes={**trace.notes, **new}))


def end(run: Run, cost: Cost) -> Run:
    """The round is over."""
    return dataclasses.replace(run, rounds=run.rounds + 1, cost=run.cost + cost)


def rounds(
    keys: Key[Array, " R"], run: Run, one: Round, going: Callable[[Run], Bool[Array, ""]]
) -> Run:
    """Rounds until R are over or `going` fails; round r has key r."""
    return jax.lax.while_loop(
        lambda run: (run.rounds < keys.shape[0]) & going(run),
        lambda run: one(keys[run.rounds], run),
        run,
    )


def every_round(
    keys: Key[Array, " R"], run: Run, one: Round, keep: Callable[[Run], Any] = lambda run: None
) -> tuple[Run, Any]:
    """A round for every key, and what `keep` gives after each, [R, ...]."""

    def body(run: Run, key: PRNGKeyArray) -> tuple[Run, Any]:
        run = one(key, run)
        return run, keep(run)

    return jax.lax.scan(body, run, keys)


def finish(run: Run) -> tuple[Particles, Float[Array, ""]]:
    """The population of a traced run with all its evidence banked, and the standard error of
    log_z.
    """
    p = bank(run.particles)
    return p, log_z_std_error(p.log_weights, run.written.roots)
