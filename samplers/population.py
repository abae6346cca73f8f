"""The one loop that moves weighted populations: select where weights have degenerated, move, weigh.

Strings, states, temperatures and parameters are all moved by rounds of the same few functions.  A
sampler writes one round, (key, run) -> run, out of them, in the order that it needs:

    select      draw ancestors if the ESS is low (LAW 1 is kept: `base.resample`)
    advance     apply a move (LAW 2); what is no number dies and is counted
    record      write down the ESS and the evidence so far
    note        write down what else is to be known of the round
    end         the round is over, and has cost so much

and `rounds`, or `every_round`, runs it; `finish` banks the evidence, `result` says all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, take_rows

from .base import Cost, Move, Particles, Resampler, X, bank, dead, resample, spent
from .diagnostics import ess, log_z_std_error
from .results import History, Trace, Weighted

ALWAYS = 2.0
"""An ESS threshold that no population passes."""

Rows = TypeVar("Rows")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """A run between two rounds.

    Attributes:
        particles: the population.
        roots: [N] every particle's ancestor in the first generation.
        rounds: [] how many are over.
        going: [] whether it takes part in the round; False where it is over and other prompts'
            runs, beside it in one batch, are not.
        num_invalid: [] how often, over rounds and living particles, a weight or what a move went
            by was NaN or +inf, or a resampler named an ancestor that there is not.
        cost: what has been spent.
        rows: what is written down, by name: [R, ...] with a row for every round.  `record` writes
            "ess" and "log_z" (with what is not yet banked) of the population as it then is, and
            "log_weights" [R, N]; `select` "resampled", whether ancestors were drawn, and
            "ancestors" [R, N]: slot i of round r continues slot ancestors[r, i] of round r - 1.
    """

    particles: Particles
    roots: Int[Array, " N"]
    rounds: Int[Array, ""]
    going: Bool[Array, ""]
    num_invalid: Int[Array, ""]
    cost: Cost
    rows: dict[str, Array]


Round = Callable[[PRNGKeyArray, Run], Run]
"""(key, run) -> the run one round later."""


def start(
    particles: Particles, num_rounds: int = 0, *, genealogy: bool = False, **rows: Any
) -> Run:
    """A run of at most R = `num_rounds` rounds; of none, if nothing is to be written down.

    `rows` are the sampler's own, each by the value [...] that it has in rounds that are not run.
    With `genealogy`, ancestors and log-weights are kept too.
    """
    slots = jnp.arange(particles.log_weights.shape[0], dtype=jnp.int32)
    zero = jnp.float32(0)
    if num_rounds:
        rows |= {"ess": zero, "log_z": zero, "resampled": jnp.bool_(False)}
    if genealogy:
        rows |= {"ancestors": slots, "log_weights": jnp.zeros(slots.shape, jnp.float32)}
    return Run(
        particles=particles,
        roots=slots,
        rounds=jnp.int32(0),
        going=jnp.bool_(True),
        num_invalid=jnp.int32(0),
        cost=Cost(),
        rows={
            name: jnp.broadcast_to(value, (num_rounds, *value.shape))
            for name, value in rows.items()
        },
    )


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
    selecting = run.particles.log_weights if log_selection is None else log_selection
    when = (ess(selecting) < threshold * selecting.shape[0]) & ~dead(selecting).all() & run.going
    after, named = resample(key, run.particles, resampler, when, reorder, log_selection)
    ancestors = jnp.maximum(named, 0)
    run = dataclasses.replace(
        run,
        particles=after,
        roots=run.roots[ancestors],
        num_invalid=run.num_invalid + (named < 0).sum(dtype=jnp.int32),
    )
    return note(run, resampled=when, ancestors=ancestors)


def advance(key: PRNGKeyArray, run: Run, move: Move) -> Run:
    """Apply a move; see `moved`."""
    return moved(run, *move.sample(key, run.particles.state))


def moved(
    run: Run,
    state: X,
    dw: Float[Array, " N"] | float = 0.0,
    invalid: Bool[Array, " N"] | bool = False,
) -> Run:
    """The run with what a move has given: a weight of NaN or +inf kills its particle and is
    counted, unless that was dead before.

    What else was `invalid` is counted too and kills nothing: the move has weighed it.
    """
    p = run.particles
    # -inf absorbs: a dead particle stays dead whatever the move says.
    was_dead, no_number = dead(p.log_weights), ~(jnp.asarray(dw) < jnp.inf)
    log_weights = jnp.where(was_dead | no_number, -jnp.inf, p.log_weights + dw)
    return dataclasses.replace(
        run,
        particles=Particles(state, log_weights.astype(jnp.float32), p.log_z),
        num_invalid=run.num_invalid + ((no_number | invalid) & ~was_dead).sum(dtype=jnp.int32),
    )


def weigh(run: Run, dw: Float[Array, " N"]) -> Run:
    """The particles stay, and weigh `dw` more; see `moved`."""
    return moved(run, run.particles.state, dw)


def record(run: Run) -> Run:
    """Write down the ESS, the evidence and the weights of the population."""
    p = run.particles
    return note(run, ess=ess(p.log_weights), log_z=bank(p).log_z, log_weights=p.log_weights)


def note(run: Run, **values: Any) -> Run:
    """Write values in this round's rows, of which a run keeps those that it was started with."""
    new = {
        name: rows.at[run.rounds].set(values[name])
        for name, rows in run.rows.items()
        if name in values
    }
    return dataclasses.replace(run, rows={**run.rows, **new})


def spend(run: Run, cost: Cost) -> Run:
    """The run, when it has cost so much more."""
    return dataclasses.replace(run, cost=spent(run.cost, cost))


def end(run: Run, cost: Cost) -> Run:
    """The round is over."""
    return dataclasses.replace(spend(run, cost), rounds=run.rounds + 1)


def rounds(
    keys: Key[Array, " R"], run: Run, one: Round, going: Callable[[Run], Bool[Array, ""]]
) -> Run:
    """Rounds until R are over or `going` fails; round r has key r."""

    def more(run: Run) -> Run:
        return dataclasses.replace(run, going=(run.rounds < keys.shape[0]) & going(run))

    def body(run: Run) -> Run:
        after = one(keys[run.rounds], run)
        # A run that is over stays as it is.  Its state does by itself, and is not copied: nothing
        # in it is active, and `select` leaves its rows.
        state = after.particles.state
        rest = (dataclasses.replace(x, particles=_without_state(x.particles)) for x in (after, run))
        kept = jax.tree.map(functools.partial(jnp.where, run.going), *rest)
        return more(
            dataclasses.replace(kept, particles=dataclasses.replace(kept.particles, state=state))
        )

    return jax.lax.while_loop(lambda run: anywhere(run.going), body, more(run))


def _without_state(p: Particles) -> Particles:
    return dataclasses.replace(p, state=())


def every_round(
    keys: Key[Array, " R"], run: Run, one: Round, keep: Callable[[Run], Any] = lambda run: None
) -> tuple[Run, Any]:
    """A round for every key, and what `keep` gives after each, [R, ...]."""

    def body(run: Run, key: PRNGKeyArray) -> tuple[Run, Any]:
        run = one(key, run)
        return run, keep(run)

    return jax.lax.scan(body, run, keys)


def finish(run: Run) -> tuple[Particles, Float[Array, ""]]:
    """The population with all its evidence banked, and the standard error of log_z."""
    p = bank(run.particles)
    return p, log_z_std_error(p.log_weights, run.roots)


def result(run: Run, samples: X, *, drawn: X | None = None, **known: Any) -> Weighted:
    """The population of a run (finished or not), with all its evidence banked, as a result.

    `samples` [N, ...] are what its states stand for, and `known` further fields.  Rows that `Trace`
    has fields for are its trace; with a genealogy there is a history of what was `drawn`
    [R, N, ...], by default the row of that name.
    """
    p, log_z_std_error = finish(run)
    rows = run.rows if drawn is None else {**run.rows, "drawn": drawn}
    return Weighted(
        samples=samples,
        log_weights=p.log_weights,
        log_z=p.log_z,
        log_z_std_error=log_z_std_error,
        num_roots=jnp.zeros_like(run.roots)
        .at[run.roots]
        .max(~dead(p.log_weights))
        .sum(dtype=jnp.int32),
        num_invalid=run.num_invalid,
        rounds=run.rounds,
        cost=run.cost,
        trace=_written(rows, Trace),
        history=_written(rows, History) if "ancestors" in rows else None,
        **known,
    )


def _written(rows: dict[str, Any], shape: type[Rows]) -> Rows:
    """The rows that a dataclass has fields for."""
    names: Any = shape.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    return shape(**{name: rows[name] for name in names if name in rows})
