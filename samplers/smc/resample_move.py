"""Resample-move SMC over strings: blocks of tokens, resampling, and suffix moves that tell copies
apart again.

Stage s of ceil(T / B) extends every particle to T_s = min(s B, T) tokens and weighs it for

    gamma_s(x) = p(x_1:T_s)^alpha Phi_s(x_1:T_s)

by the product of the block's increments p(x_t | x_<t)^alpha phi_t / q(x_t | x_<t); resamples if the
weights have degenerated; and makes M suffix moves of every particle, which leave gamma_s invariant
and so change no weight.  The moves are those of `power.run`, with cuts anywhere in what there is:
copies of one ancestor become different strings again.  Gilks and Berzuini (2001).
"""

from __future__ import annotations

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.target import Target

from .. import population
from ..base import Guarantee, Resampler, particles
from ..mcmc import suffix
from ..population import Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from ..strings import costs
from ..strings.cuts import Plan
from ..strings.growing import complete
from ..strings.proposals import Proposal
from ..strings.regeneration import drawn, increments, keys_at, no_strings, rows_of, start


def init(target: Target, proposal: Proposal, num_particles: int, num_stages: int) -> Run:
    """N empty strings of weight 1; states are `regeneration.State`."""
    empty, zero = no_strings(target, proposal, num_particles), jnp.float32(0)
    run = population.start(
        particles(empty, num_particles), num_stages, acceptance=zero, missing=zero
    )
    return population.spend(run, costs.prompt(target, proposal))


def extended(
    key: PRNGKeyArray,
    target: Target,
    proposal: Proposal,
    run: Run,
    before: Int[Array, ""] | int,
    horizon: Int[Array, ""] | int,
) -> Run:
    """Strings of `before` tokens continued up to `horizon`, and not weighed; the others have
    ended.
    """
    x = run.particles.state
    num, growing = x.log_p.shape[0], x.sequences.length >= before
    first = start(target, proposal, x, growing)
    keys, longest = jax.random.split(key, num), jnp.full(num, horizon, jnp.int32)
    g = complete(keys_at(keys), target, proposal, first, longest)
    run = population.moved(run, drawn(g), invalid=g.invalid)
    run = population.note(run, missing=g.missing.max())
    replayed = costs.replay(target, proposal, first)
    return population.spend(run, costs.of_round(target, proposal, g) + replayed)


def refresh(
    key: PRNGKeyArray,
    target: Target,
    how: suffix.Method,
    plan: Plan,
    run: Run,
    resampler: Resampler,
    threshold: float | Float[Array, ""],
) -> Run:
    """The end of a stage: resample where the ESS is below threshold * N, and make a plan's moves,
    which leave the target invariant.
    """
    resample_key, move_key = jax.random.split(key)
    reorder = functools.partial(rows_of, target)
    run = population.record(run)
    run = population.select(resample_key, run, resampler, threshold, reorder=reorder)
    x, info = suffix.moves(move_key, target, how, run.particles.state, plan)
    run = population.note(
        population.moved(run, x),
        acceptance=info.acceptance,
        missing=jnp.maximum(run.rows["missing"][run.rounds], info.missing_support.max()),
    )
    return population.end(run, info.cost)


def result(run: Run) -> Weighted:
    """The population of a run, with all its evidence banked."""
    x, worst = run.particles.state, run.rows["missing"].max()
    return population.result(run, x.sequences, log_prob=x.log_prob, missing_support=worst)


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_resample_move.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_particles: int = 32,
    block_size: int = 16,
    num_moves: int = 2,
    threshold: float | Float[Array, ""] = 0.5,
    resampler: Resampler = systematic,
    **options: Unpack[suffix.Options],
) -> Weighted:
    """SMC for gamma(x) = p(x)^alpha Phi(x) by blocks of tokens, with suffix moves as rejuvenation,
    in one jit.

    Args:
        key: typed key.
        target: gamma.
        num_particles: N.
        block_size: B, tokens between two resamplings; the last block ends at max_tokens.
        num_moves: M, suffix moves of every particle at the end of each block.
        threshold: resample when ESS < threshold * N; 0 never, above 1 at the end of every block.
        resampler: how ancestors are drawn (`samplers.resampling`).
        options: of the moves, as in `suffix.method`; their proposal also draws the blocks.

    Returns:
        `Weighted`: strings that obey LAW 1.

    Raises:
        ValueError: unless the counts are at least 1, or as in `suffix.method`.
    """
    check_counts(num_particles=num_particles, block_size=block_size, num_moves=num_moves)
    how = suffix.method(target, **options)
    return _run(key, target, how, threshold, (num_particles, block_size, num_moves), resampler)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(
    key: Any,
    target: Target,
    how: suffix.Method,
    threshold: Any,
    sizes: tuple[int, int, int],
    resampler: Resampler,
) -> Weighted:
    num_particles, block_size, num_moves = sizes
    extend_key, refresh_key = jax.random.split(key)
    num_stages = -(-target.max_tokens // block_size)
    zeros, order = jnp.zeros(num_moves, jnp.int32), jnp.arange(num_moves, dtype=jnp.int32)

    def stage(key: PRNGKeyArray, run: Run) -> Run:
        before = run.rounds * block_size
        horizon = jnp.minimum(before + block_size, target.max_tokens)
        positions = jnp.arange(target.max_tokens, dtype=jnp.int32)
        block = (positions >= before) & (positions < horizon)

        # One key for all blocks: a token's is that of its position.
        run = extended(extend_key, target, how.proposal, run, before, horizon)
        dw = jnp.where(block, increments(target, run.particles.state), 0.0).sum(1)
        plan = Plan(zeros + horizon, zeros > 0, zeros, order)
        return refresh(key, target, how, plan, population.weigh(run, dw), resampler, threshold)

    run = init(target, how.proposal, num_particles, num_stages)
    return result(population.every_round(jax.random.split(refresh_key, num_stages), run, stage)[0])
