"""SMC^2: the parameters and the states of a state-space model at once, one observation at a time.

M particles theta each have a particle filter of their own with N states.  A new observation moves
every filter on, and

    dw = log p-hat(y_t | y_0..y_{t-1}, theta)           the filter's own increment

weighs its theta.  At some times thetas are drawn in proportion to their weights and moved by
particle marginal Metropolis-Hastings over all data so far, which replaces theta together with its
filter.  This is SMC on the space of (theta, all variables of its filter), for which N need not be
large.  Chopin, Jacob and Papaspiliopoulos (2013, arXiv 1101.1528).

When to move matters: E[exp(log_z)] is the evidence if the times do not depend on the particles
(`run`).  Moving when the ESS has fallen (`adaptive`) moves just those populations that are bad, and
a kernel that leaves the target as it is does not leave it so given that: consistent, and biased by
O(1/M).  (Resampling, which changes no expectation at all, may depend on anything.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.pytrees import as_pytree

from .. import population
from ..base import Cost, Guarantee, Move, Particles, Resampler, X, particles
from ..kernels import mh, repeat
from ..population import ALWAYS, Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from . import filtering, pmmh
from .filtering import StateSpace
from .laws import Law, batched, draw

Model = Callable[[X], StateSpace]
"""One theta -> its state-space model."""


class Options(TypedDict, total=False):
    """How `run` and `adaptive` may differ.

    proposal: of the moves: over theta [M, ...], weighed by log q(theta | theta') - log q(theta' |
        theta), see `pmmh.propose`.
    num_particles: M; 100 by default.
    num_states: N, particles of every filter; 100 by default.
    num_moves: moves of every theta at each of the times; 3 by default.
    resampler: how thetas are drawn (`samplers.resampling`); systematic by default.
    """

    proposal: Required[Move]
    num_particles: int
    num_states: int
    num_moves: int
    resampler: Resampler


def init(
    key: PRNGKeyArray,
    model: Model,
    prior: Law,
    observations: Any,
    *,
    num_particles: int,
    num_states: int,
) -> Particles:
    """M draws from the prior with their filters, weighed by y_0; the state is `pmmh.State`."""
    draw_key, filter_key = jax.random.split(key)
    theta = draw(draw_key, batched("prior", prior, num_particles))
    y = filtering.at_time(observations, 0)
    filters = jax.vmap(
        lambda key, theta: filtering.init(key, model(theta), y, num_particles=num_states)
    )(jax.random.split(filter_key, num_particles), theta)
    log_z = filters.particles.log_z
    state = pmmh.State(theta, pmmh.log_prior_of(prior, theta), log_z, filters)
    return dataclasses.replace(particles(state, num_particles), log_weights=log_z)


def extend(model: Model, observations: Any, t: Int[Array, ""]) -> Move:
    """The move of every filter by y_t, t >= 1, weighed by what its evidence gains."""
    y = filtering.at_time(observations, t)

    def sample(key: PRNGKeyArray, x: pmmh.State) -> tuple[pmmh.State, Float[Array, " M"]]:
        filters = jax.vmap(lambda key, theta, run: filtering.step(key, model(theta), run, y))(
            jax.random.split(key, x.log_z.shape[0]), x.theta, x.rest
        )
        log_z = filters.particles.log_z
        dw = jnp.where(jnp.isneginf(log_z), -jnp.inf, log_z - x.log_z)
        return dataclasses.replace(x, log_z=log_z, rest=filters), dw

    return Move(sample)


def rejuvenation(
    model: Model,
    prior: Law,
    proposal: Move,
    observations: Any,
    t: Int[Array, ""],
    num_states: int,
    batch_size: int,
) -> Move:
    """The step of particle marginal Metropolis-Hastings over `pmmh.State` for y_0..y_t; see
    `pmmh.particle_move`.
    """

    def log_evidence(key: PRNGKeyArray, theta: X) -> tuple[Array, Run]:
        space = model(theta)

        def one(s: Array, run: Run) -> Run:
            y = filtering.at_time(observations, s)
            return filtering.step(jax.random.fold_in(key, s), space, run, y)

        y = filtering.at_time(observations, 0)
        first = filtering.init(jax.random.fold_in(key, 0), space, y, num_particles=num_states)
        run = jax.lax.fori_loop(1, t + 1, one, first)
        return run.particles.log_z, run

    return pmmh.particle_move(log_evidence, prior, proposal, batch_size)


def step(
    key: PRNGKeyArray,
    run: Run,
    move: Move,
    threshold: float | Float[Array, ""],
    *,
    num_moves: int,
    resampler: Resampler = systematic,
) -> Run:
    """If the ESS is below threshold * M, select thetas and move each `num_moves` times by
    `kernels.mh(move)`; the share of moves accepted is noted.
    """
    select_key, move_key = jax.random.split(key)
    run = population.select(select_key, run, resampler, threshold)
    chain = repeat(mh(move), num_moves)

    def moved() -> tuple[pmmh.State, Array]:
        # No weight changes: the chain leaves what they are proper for invariant.
        state, info = chain.step(move_key, run.particles.state)
        return state, info.accepted.mean(dtype=jnp.float32)

    selected = run.rows["resampled"][run.rounds]
    state, acceptance = jax.lax.cond(selected, moved, lambda: (run.particles.state, jnp.float32(0)))
    run = dataclasses.replace(run, particles=dataclasses.replace(run.particles, state=state))
    return population.note(run, acceptance=acceptance)


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_smc2.py")
def run(
    key: PRNGKeyArray,
    model: Model,
    prior: Law,
    observations: Any,
    *,
    times: Sequence[int] | Int[Any, " S"],
    **options: Unpack[Options],
) -> Weighted:
    """SMC^2 that moves at given times: E[exp(log_z)] is the evidence at any M and N, and the
    weights obey LAW 1.

        smc2.run(key, lambda drift: model(drift), dist.Normal(0.0, 1.0), y, times=[3, 10, 30],
                 proposal=pmmh.propose(lambda drift: dist.Normal(drift, 0.3)))

    Args:
        key: typed key.
        model: one theta -> `filtering.StateSpace`; its filter is a bootstrap filter.
        prior: a NumPyro distribution of one theta, or a pytree of them.
        observations: as in `filtering.run`.
        times: t after whose observation thetas are selected and moved; a move at t takes t + 1
            rounds of M filters. `adaptive` finds good ones (its `moved`); use them with another
            key.
        options: see `Options`.

    Returns:
        `Weighted`: theta [M, ...].  Rounds are observations: trace.log_z estimates log p(y_0..y_t),
            trace.resampled says whether thetas were selected and moved, and trace.acceptance is 0
            where not.  details["filters"]: every theta's filter after the last one, `Particles`
            of states [M, N, ...], log_weights [M, N] and log_z [M].  Tokens of the cost are states
            drawn, forwards and depth are rounds of filters one after another, potential_calls are
            observation densities evaluated.

    Raises:
        ValueError: if a count is not positive, a time is not in 0..T-1, or for observations and
            laws as in `filtering.run`.
    """
    observations, horizon = filtering.record(observations)
    listed = np.asarray(times, np.int64)
    if listed.ndim != 1 or ((listed < 0) | (listed >= horizon)).any():
        raise ValueError(
            f"expected times in 0..{horizon - 1}, one for each stop, got {listed.tolist()}; t is an"
            " index of the"
            " observations"
        )
    # Everything is below the one threshold, and nothing below the other.
    thresholds = jnp.zeros(horizon, jnp.float32).at[listed].set(ALWAYS)
    return _checked(key, model, prior, observations, thresholds, **options)


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/latent/test_smc2.py")
def adaptive(
    key: PRNGKeyArray,
    model: Model,
    prior: Law,
    observations: Any,
    *,
    threshold: float | Float[Array, ""] = 0.5,
    **options: Unpack[Options],
) -> Weighted:
    """SMC^2 as published: thetas are selected and moved when their ESS falls below threshold * M.

    As the times depend on the particles, exp(log_z) is biased by O(1/M): consistent, not unbiased.

    Args:
        threshold: 0 never moves, above 1 after every observation.
        Others as in `run`.

    Returns, raises:
        As `run`.
    """
    observations, horizon = filtering.record(observations)
    thresholds = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (horizon,))
    return _checked(key, model, prior, observations, thresholds, **options)


def _checked(
    key: PRNGKeyArray,
    model: Model,
    prior: Law,
    observations: Any,
    thresholds: Float[Array, " T"],
    *,
    proposal: Move,
    num_particles: int = 100,
    num_states: int = 100,
    num_moves: int = 3,
    resampler: Resampler = systematic,
) -> Weighted:
    sizes = {"num_particles": num_particles, "num_states": num_states, "num_moves": num_moves}
    check_counts(**sizes)
    moving = Move(*map(as_pytree, proposal))
    return _run(
        key, as_pytree(model), prior, observations, moving, thresholds, resampler=resampler, **sizes
    )


@functools.partial(
    jax.jit, static_argnames=("num_particles", "num_states", "num_moves", "resampler")
)
def _run(
    key: Any,
    model: Any,
    prior: Any,
    observations: Any,
    proposal: Move,
    thresholds: Float[Array, " T"],
    *,
    num_particles: int,
    num_states: int,
    num_moves: int,
    resampler: Resampler,
) -> Weighted:
    seen = (~jax.vmap(filtering.missing)(observations)).astype(jnp.int32)

    def one(key: PRNGKeyArray, run: Run) -> Run:
        t = run.rounds
        extend_key, step_key = jax.random.split(key)
        # The first observation has been weighed by `init`.
        run = jax.lax.cond(
            t == 0,
            lambda: run,
            lambda: population.advance(extend_key, run, extend(model, observations, t)),
        )
        run = population.record(run)
        move = rejuvenation(model, prior, proposal, observations, t, num_states, num_particles)
        run = step(step_key, run, move, thresholds[t], num_moves=num_moves, resampler=resampler)
        moves, size = jnp.where(run.rows["resampled"][t], num_moves, 0), num_particles * num_states
        passes = 1 + moves * (t + 1)
        asked = seen[t] + moves * jnp.where(jnp.arange(seen.shape[0]) <= t, seen, 0).sum()
        spent = Cost(
            tokens=passes * size, forwards=passes, depth=passes, potential_calls=asked * size
        )
        return population.end(run, spent)

    init_key, loop_key = jax.random.split(key)
    fresh = init(
        init_key, model, prior, observations, num_particles=num_particles, num_states=num_states
    )
    keys = jax.random.split(loop_key, thresholds.shape[0])
    run = population.start(fresh, keys.shape[0], acceptance=jnp.float32(0))
    run, _ = population.every_round(keys, run, one)
    x = run.particles.state
    return population.result(run, x.theta, details={"filters": x.rest.particles})
