"""Conditional SMC from a cut: particle Gibbs over suffixes, for ends too long to be drawn in one
go.

With a cut r, all N particles keep x_<r; the last one, the reference, follows x, the others draw
from the proposal q:

    log w_t = alpha log p(x_t | x_<t) - log q(x_t | x_<t) + log phi_t(x_1:t)      t = r, r + 1, ...

When the weights since the last resampling have degenerated, all but the reference draw ancestors in
proportion to them, from all N; strings that have ended stay in the pool.  In the end one particle
is drawn by weight.  The chain leaves gamma / Z invariant at any N (Andrieu, Doucet and Holenstein
2010); with N = 1 it stays.

Particles of one chain have the same length until they end, whatever its cut; chains need not.

No ancestors are drawn for the reference (`conditional.kernel` does that from the empty string on):
its rest would have to be scored after every particle, at every resampling.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.checks import check_count
from ppl.draw import categorical
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows, where_rows
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, holding
from ..diagnostics import ess
from ..registry import sampler
from ..resampling import pinned_multinomial
from ..results import MoveInfo
from ..strings.cuts import Cut
from ..strings.growing import Follow, Growing, reorder
from ..strings.proposals import Proposal
from ..strings.regeneration import State, drawn, each_times, init, log_density, rows_of
from . import from_cuts, suffix
from .options import DrawOptions


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """The options of `kernel`, checked and bound."""

    proposal: Proposal
    cut: Cut
    threshold: float | Float[Array, ""]
    num_particles: int = dataclasses.field(metadata={"static": True})


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """A sweep under way, N particles of every chain, one chain after another.

    log_weights: since the last resampling.  follows: the references.  resampled [C].
    """

    growth: Growing
    log_weights: Float[Array, " CN"]
    follows: Bool[Array, " CN"]
    resampled: Int[Array, " C"]
    cost: Cost


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_suffix_csmc.py")
def kernel(
    target: Target,
    *,
    num_particles: int = 8,
    threshold: float | Float[Array, ""] = 0.5,
    **options: Unpack[DrawOptions],
) -> Kernel:
    """Particle Gibbs from a cut: chains over strings that leave gamma / Z invariant.

    Every chain has its own cut, length and keys; its N particles are rows of one batch, so that C
    chains step the model for C * N rows, and their caches take as much memory.  Rows move only if
    some chain resamples.  Chains may have an alpha each (`target.alpha` [C]); potentials and
    proposals must be the same for all chains.

    Kernels with the same target and proposal have the same state (that of `suffix.kernel`) and can
    be cycled.

    Args:
        target: gamma.
        num_particles: N, the reference included.
        threshold: resample when ESS < threshold * N; 0 never, above 1 after every token.
        options: `temperature`, `proposal` and `cut` as in `suffix.method`.  A chain whose string
            the proposal cannot draw from the cut on stays there.

    Returns:
        `Kernel`: `init` scores `Sequences` of C strings and makes a `regeneration.State`, `step` is
        one sweep of every chain and returns `MoveInfo` [C], whose `details` have `cut`, r in
        0..T-1, and `resampled`: how often ancestors were drawn.  A sweep is never rejected:
        `changed` says whether the string is another one.  `tokens` are those of all particles; the
        references cost forward passes, but are not drawn.

    Raises:
        ValueError: unless `num_particles` is at least 1; and as `suffix.kernel` does.
    """
    how = method(target, num_particles=num_particles, threshold=threshold, **options)
    return Kernel(Partial(init, target, how.proposal), holding(_step, target, how))


def method(
    target: Target,
    *,
    num_particles: int = 8,
    threshold: float | Float[Array, ""] = 0.5,
    **options: Unpack[DrawOptions],
) -> Method:
    """Check and bind the options of `kernel`."""
    check_count("num_particles", num_particles)
    how = suffix.method(target, **options)
    return Method(how.proposal, how.cut, threshold, num_particles)


# What a sweep is made of.


def increment(target: Target, y: State, position: Int[Array, " CN"]) -> Float[Array, " CN"]:
    """log w_t at `position` of every string; -inf where p or phi is zero, whatever q is."""
    log_p, log_q, log_phi = (
        jnp.take_along_axis(leaf, position[:, None], axis=1)[:, 0]
        for leaf in (y.log_p, y.log_q, y.log_phi)
    )
    density = target.log_prob_factor(log_p) + log_phi
    return jnp.where(jnp.isneginf(density), -jnp.inf, density - log_q)


def degenerate(
    log_weights: Float[Array, "C N"],
    active: Bool[Array, "C N"],
    threshold: float | Float[Array, ""],
) -> Bool[Array, " C"]:
    """Which chains are to resample: not if all particles have ended, or none can be drawn."""
    small = jax.vmap(ess)(log_weights) < threshold * log_weights.shape[1]
    return small & active.any(1) & ~jnp.isneginf(log_weights).all(1)


def final_log_weights(
    target: Target,
    how: Method,
    log_weights: Float[Array, " CN"],
    cut: Int[Array, " CN"],
    length: Int[Array, " CN"],
) -> Float[Array, " CN"]:
    """By which the next string is drawn: the cut has its law given the string that is left, not the
    one before.
    """
    return log_weights + how.cut(cut, length, jnp.full_like(cut, target.max_tokens))


def can_move(target: Target, x: State, cut: Int[Array, " C"]) -> Bool[Array, " C"]:
    """Not beyond the end; nor if the string is in the support but cannot be drawn, for nothing
    would lead back.
    """
    unlikely = jnp.isneginf(x.log_q) & (jnp.arange(x.log_q.shape[1]) >= cut[:, None])
    outside = jnp.isneginf(log_density(target, x))
    return (cut <= x.sequences.length) & (outside | ~unlikely.any(1))


@jax.jit
def _step(key: Any, target: Target, how: Method, x: State) -> tuple[State, MoveInfo]:
    cut, (grow_keys, select_keys, draw_keys) = from_cuts.begin(key, how.cut, x)
    proposed = can_move(target, x, cut)
    end = _sweep(grow_keys, select_keys, target, how, x, cut, proposed)

    num, size = cut.shape[0], how.num_particles
    g, strings = end.growth, drawn(end.growth)
    finals = final_log_weights(
        target, how, end.log_weights, jnp.repeat(cut, size), g.sequences.length
    )
    chosen, log_prob = categorical(draw_keys, finals.reshape(num, size))
    y = rows_of(target, strings, chosen + size * jnp.arange(num, dtype=jnp.int32))
    new = where_rows(proposed & ~jnp.isneginf(log_prob), y, x)
    details = {"cut": cut, "resampled": end.resampled}
    known = {"proposed": proposed, "cost": end.cost, "details": details}
    return new, from_cuts.report(target, x, new, proposed, g, **known)


def _sweep(
    grow_keys: Any,
    select_keys: Any,
    target: Target,
    how: Method,
    x: State,
    cut: Array,
    proposed: Bool[Array, " C"],
) -> _Carry:
    """All particles of the chains `proposed`, until they have ended."""
    num, size = cut.shape[0], how.num_particles
    first, own, cost = from_cuts.rows(grow_keys, target, how.proposal, x, cut, proposed, size)
    chains = jnp.repeat(jnp.arange(num, dtype=jnp.int32), size)
    rows, given = each_times(target, size), take_rows(x.sequences, chains)

    def one_more(c: _Carry) -> _Carry:
        position = c.growth.sequences.length
        c = _token(own, rows, how, c, given)
        return _resample(select_keys, rows, how, c, position.reshape(num, size).max(1))

    carry = _Carry(
        growth=first,
        log_weights=jnp.zeros(num * size, jnp.float32),
        follows=jnp.tile(jnp.arange(size) == size - 1, num),
        resampled=jnp.zeros(num, jnp.int32),
        cost=cost,
    )
    return jax.lax.while_loop(lambda c: c.growth.active.any(), one_more, carry)


def _token(
    own: Key[Array, " CN"], rows: Target, how: Method, c: _Carry, given: Sequences
) -> _Carry:
    """One more token of every particle, weighed; the references follow the strings `given`."""
    g, last = c.growth, rows.max_tokens - 1
    new, spent = from_cuts.longer(own, rows, how.proposal, g, Follow(c.follows, given))
    gain = increment(rows, drawn(new), jnp.minimum(g.sequences.length, last))
    log_weights = c.log_weights + jnp.where(g.active, gain, 0.0)
    new = dataclasses.replace(new, active=new.active & ~jnp.isneginf(log_weights))
    return dataclasses.replace(c, growth=new, log_weights=log_weights, cost=c.cost + spent)


def _resample(
    keys: Any, rows: Target, how: Method, c: _Carry, position: Int[Array, " C"]
) -> _Carry:
    """Ancestors for the chains whose weights have degenerated; `rows` is the target of the
    particles.
    """
    num, size = c.resampled.shape[0], how.num_particles
    log_weights = c.log_weights.reshape(num, size)
    when = degenerate(log_weights, c.growth.active.reshape(num, size), how.threshold)

    def move_rows(carry: tuple[Bool[Array, " C"], _Carry]) -> tuple[Bool[Array, " C"], _Carry]:
        when, c = carry
        at = jax.vmap(jax.random.fold_in)(keys, position)
        found = jax.vmap(lambda key, log_probs: pinned_multinomial(key, log_probs, size))(
            at, log_weights
        )
        local = jnp.where(when[:, None], found, jnp.arange(size, dtype=jnp.int32))
        g = reorder(
            rows,
            how.proposal,
            c.growth,
            (local + size * jnp.arange(num, dtype=jnp.int32)[:, None]).reshape(-1),
        )
        # What was spent and seen stays with the slots.
        g = dataclasses.replace(
            g, drawn=c.growth.drawn, missing=c.growth.missing, invalid=c.growth.invalid
        )
        fresh = jnp.repeat(when, size)
        proposed = _Carry(
            growth=g,
            log_weights=jnp.where(fresh, 0.0, c.log_weights),
            # A reference of density zero is given up: its slot has taken the place of a living
            # particle.
            follows=c.follows & ~(fresh & jnp.isneginf(c.log_weights)),
            resampled=c.resampled + when,
            cost=c.cost,
        )
        return jnp.zeros_like(when), proposed

    # A loop of at most one turn, not a `cond`, which would copy the caches (`base.resample`).
    return jax.lax.while_loop(lambda carry: carry[0].any(), move_rows, (when, c))[1]
