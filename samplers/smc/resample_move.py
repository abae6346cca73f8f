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

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee, Particles, Resampler, bank, dead, particles, resample
from ..diagnostics import ess, log_z_std_error
from ..mcmc import suffix
from ..registry import sampler
from ..resampling import systematic
from ..strings.cuts import Plan
from ..strings.growing import complete
from ..strings.proposals import Proposal
from ..strings.regeneration import drawn, increments, keys_at, no_strings, rows_of, start


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened in each of S stages.

    ess: after weighing, before resampling.  log_z: the running estimate.  resampled: whether.
    acceptance: of the moves that drew something; 0 if none did.
    """

    ess: Float[Array, "*S"]
    log_z: Float[Array, "*S"]
    resampled: Bool[Array, "*S"]
    acceptance: Float[Array, "*S"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """A weighted population of strings (LAW 1) and what it took.

    Attributes:
        sequences: N strings.
        log_prob: [N] log p(x | prompt).
        log_weights: [N], scaled so that mean_i exp(w_i) = 1; -inf is dead.
        log_z: [] log of the unbiased estimate of Z; -inf if all particles are dead.
        log_z_std_error: [] its standard error from this run (`diagnostics.log_z_std_error`).
        num_invalid: [] particles killed because the potential gave NaN or +inf, or the model NaN.
        missing_support: [] the greatest share of the target's one-step law that the proposal could
            not draw; above 0 the run has a truncated target.
        cost: what the run spent.
        trace: of its stages.
    """

    sequences: Sequences
    log_prob: Float[Array, " N"]
    log_weights: Float[Array, " N"]
    log_z: Float[Array, ""]
    log_z_std_error: Float[Array, ""]
    num_invalid: Int[Array, ""]
    missing_support: Float[Array, ""]
    cost: Cost
    trace: Trace

    @property
    def all_dead(self) -> Bool[Array, ""]:
        """Whether no particle has positive weight."""
        return jnp.isneginf(self.log_z)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """A run between two stages: particles with a `regeneration.State`, and their ancestors in the
    first generation.
    """

    particles: Particles
    roots: Int[Array, " N"]
    num_invalid: Int[Array, ""]
    missing_support: Float[Array, ""]
    cost: Cost


def init(target: Target, proposal: Proposal, num_particles: int) -> Carry:
    """N empty strings of weight 1."""
    empty = particles(no_strings(target, proposal, num_particles), num_particles)
    prompt = Cost(forwards=jnp.int32(1))
    roots = jnp.arange(num_particles, dtype=jnp.int32)
    return Carry(empty, roots, jnp.int32(0), jnp.float32(0), prompt)


def weighed(c: Carry, dw: Float[Array, " N"]) -> Carry:
    """The same particles with `dw` added to their log-weights; the dead stay dead."""
    p = c.particles
    log_weights = jnp.where(dead(p.log_weights), -jnp.inf, p.log_weights + dw)
    return dataclasses.replace(c, particles=Particles(p.state, log_weights, p.log_z))


def extended(
    key: PRNGKeyArray,
    target: Target,
    proposal: Proposal,
    c: Carry,
    before: Int[Array, ""] | int,
    horizon: Int[Array, ""] | int,
) -> Carry:
    """Strings of `before` tokens continued up to `horizon`, and not weighed; the others
    have ended.
    """
    x = c.particles.state
    num = x.log_p.shape[0]
    growing = x.sequences.length >= before
    first = start(target, proposal, x, growing)
    keys, longest = jax.random.split(key, num), jnp.full(num, horizon)
    g = complete(keys_at(keys), target, proposal, first, longest)
    passes = g.drawn.max()
    # The states of the potential and the proposal were stepped up to here again.
    replayed = jnp.where(growing, before, 0)
    asked = g.drawn.sum() + replayed.sum() if target.tilted else 0
    forwards = passes * (1 + proposal.forwards) + replayed.max() * proposal.forwards
    p = c.particles
    return Carry(
        Particles(drawn(g), p.log_weights, p.log_z),
        c.roots,
        c.num_invalid + (g.invalid & ~dead(p.log_weights)).sum(),
        jnp.maximum(c.missing_support, g.missing.max()),
        c.cost
        + Cost(
            tokens=g.drawn.sum(),
            forwards=forwards,
            potential_calls=jnp.int32(asked),
            depth=forwards,
        ),
    )


def refresh(
    key: PRNGKeyArray,
    target: Target,
    how: suffix.Method,
    plan: Plan,
    c: Carry,
    resampler: Resampler,
    threshold: float | Float[Array, ""],
) -> tuple[Carry, Trace]:
    """Resample where the ESS is below threshold * N, and make a plan's moves, which leave the
    target invariant.
    """
    resample_key, move_key = jax.random.split(key)
    size, log_z = ess(c.particles.log_weights), bank(c.particles).log_z
    when = size < threshold * c.roots.shape[0]
    p, ancestors = resample(
        resample_key, c.particles, resampler, when, functools.partial(rows_of, target)
    )
    x, info = suffix.moves(move_key, target, how, p.state, plan)
    tried = (info.tokens > 0).sum()
    after = Carry(
        Particles(x, p.log_weights, p.log_z),
        c.roots[ancestors],
        c.num_invalid,
        jnp.maximum(c.missing_support, info.missing_support.max()),
        c.cost + info.cost,
    )
    return after, Trace(size, log_z, when, info.accepted.sum() / jnp.maximum(tried, 1))


def result(c: Carry, trace: Trace) -> Result:
    """The population of a run, with all its evidence banked."""
    p = bank(c.particles)
    return Result(
        sequences=p.state.sequences,
        log_prob=p.state.log_prob,
        log_weights=p.log_weights,
        log_z=p.log_z,
        log_z_std_error=log_z_std_error(p.log_weights, c.roots),
        num_invalid=c.num_invalid,
        missing_support=c.missing_support,
        cost=c.cost,
        trace=trace,
    )


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
) -> Result:
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
        `Result`: weighted strings that obey LAW 1.

    Raises:
        ValueError: unless the counts are at least 1, or as in `suffix.method`.
    """
    for name, count in (
        ("num_particles", num_particles),
        ("block_size", block_size),
        ("num_moves", num_moves),
    ):
        check_count(name, count)
    how = suffix.method(target, **options)
    return _run(key, target, how, threshold, num_particles, block_size, num_moves, resampler)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _run(
    key: Any,
    target: Target,
    how: suffix.Method,
    threshold: Any,
    num_particles: int,
    block_size: int,
    num_moves: int,
    resampler: Resampler,
) -> Result:
    extend_key, refresh_key = jax.random.split(key)

    def stage(c: Carry, inputs: tuple) -> tuple[Carry, Trace]:
        stage_key, before, horizon = inputs
        c = extended(
            extend_key, target, how.proposal, c, before, horizon
        )  # a token's key is that of its position
        positions = jnp.arange(target.max_tokens)
        block = (positions >= before) & (positions < horizon)
        dw = jnp.where(block, increments(target, c.particles.state), 0.0).sum(1)
        zeros = jnp.zeros(num_moves, jnp.int32)
        plan = Plan(zeros + horizon, zeros > 0, zeros, jnp.arange(num_moves))
        return refresh(stage_key, target, how, plan, weighed(c, dw), resampler, threshold)

    before = jnp.arange(0, target.max_tokens, block_size)
    inputs = (
        jax.random.split(refresh_key, len(before)),
        before,
        jnp.minimum(before + block_size, target.max_tokens),
    )
    return result(*jax.lax.scan(stage, init(target, how.proposal, num_particles), inputs))
