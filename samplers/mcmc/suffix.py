"""Suffix Metropolis-Hastings: chains over strings that draw what follows a cut anew, and accept or
reject it.

With a cut r and the proposal q, keep x_<r, draw y_r, y_r+1, ... until EOS or the horizon, and
accept y with probability min(1, e^A) where

    A = sum_{t >= r} log w_t(y) - log w_t(x)  +  log c(r | y) - log c(r | x)
    log w_t = alpha log p(x_t | x_<t) - log q(x_t | x_<t) + log phi_t(x_1:t)

and c(r | x) is the law of the cut.  The chain leaves gamma / Z invariant and is reversible.  Cuts
after the end of a string do nothing; a law that avoids them (`cuts.uniform_in_length`) pays for it
in the last two terms.

All log w_t of the present string are kept, so it is scored once; the model's cache is cut back, so
no prompt and no prefix is processed again.  (Potentials cannot be cut back: their states are
stepped through the prefix.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.draw import uniforms
from ppl.potential import State as PotentialState
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, where_rows
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, holding
from ..registry import sampler
from ..results import MoveInfo, changed_rows, moved
from ..strings.cuts import Cut, Plan, draw, whole
from ..strings.growing import Growing, pass_cost
from ..strings.proposals import Powered
from ..strings.regeneration import (
    State,
    drawn,
    grow,
    increments,
    init,
    log_density,
    replay_cost,
    settled,
    start,
    truncated,
    with_cache,
    without_cache,
)
from .options import Method, Options, method

SLACK = 1e-2
"""How far below log u a bound must be to reject early: far more than float32's error, so that no
draw changes.
"""


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_suffix.py")
def kernel(target: Target, **options: Unpack[Options]) -> Kernel:
    """Suffix Metropolis-Hastings: chains over strings that leave gamma / Z invariant.

    Each of the C chains has its own cut, length and keys, so that it does not depend on how many
    there are.

    Args:
        target: gamma(x) = p(x)^alpha Phi(x).
        options: as in `method`.

    Returns:
        `Kernel`: `init` scores `Sequences` of C strings and makes a `State`, `step` is one move and
            returns `MoveInfo` [C], whose `details` have `cut`, r in 0..T-1, and `rejected_early`:
            the draw was stopped before its end, and `log_ratio` is an upper bound.

    Raises:
        ValueError: as in `method`; by `init`, if the strings are not the target's, or one has
            density zero (under jit, `MoveInfo.outside_support` says so; a chain outside of the
            support takes the first string inside).
    """
    return kernel_of(target, method(target, **options))


def kernel_of(target: Target, how: Method) -> Kernel:
    """The kernel of options that are bound already."""
    return Kernel(
        Partial(init, target, how.proposal), holding(_one_move, target, how, whole(target, 1))
    )


def _one_move(
    key: PRNGKeyArray, target: Target, how: Method, plan: Plan, state: State
) -> tuple[State, MoveInfo]:
    state, info = moves(key, target, how, state, plan)
    rows = jax.tree.map(lambda leaf: leaf[:, 0], dataclasses.replace(info, cost=None))
    return state, dataclasses.replace(rows, cost=info.cost)


# What acceptance is made of.


def log_ratio(
    target: Target,
    cut_law: Cut,
    x: State,
    y: State,
    cut: Int[Array, " C"],
    horizon: Int[Array, " C"],
) -> Float[Array, " C"]:
    """A, for `y` drawn from x_<cut.  A chain that is outside of the support accepts whatever is
    inside.
    """
    rest = jnp.arange(x.log_p.shape[1]) >= cut[:, None]
    gain = jnp.where(rest, increments(target, y), 0.0).sum(1) - jnp.where(
        rest, increments(target, x), 0.0
    ).sum(1)
    gain += cut_law(cut, y.sequences.length, horizon) - cut_law(cut, x.sequences.length, horizon)
    rescue = jnp.where(jnp.isneginf(log_density(target, y)), -jnp.inf, jnp.inf)
    return jnp.where(jnp.isneginf(log_density(target, x)), rescue, gain)


def log_ratio_bound(
    target: Target,
    how: Method,
    x: State,
    y: State,
    potential: PotentialState,
    cut: Int[Array, " C"],
    log_cut: Float[Array, " C"],
) -> Float[Array, " C"]:
    """An upper bound of A for strings that start with `y`; `log_cut` bounds log c(r | .) - log c(r
    | x).

    Of what is to come the model's part is at most 0, and the potential's at most what is left of
    log_phi_max.
    """
    rest = jnp.arange(x.log_p.shape[1]) >= cut[:, None]
    model = target.log_prob_factor(y.log_p) - y.log_q
    gain = jnp.where(rest, model, 0.0).sum(1) - jnp.where(rest, increments(target, x), 0.0).sum(1)
    # A proposal that looks ahead leaves room for what is to come: only -inf is certain then.
    looks_ahead = isinstance(how.proposal, Powered) and how.proposal.looks_ahead(target, potential)
    gain += (
        (jnp.inf if looks_ahead else how.log_phi_max)
        - jnp.where(rest, 0.0, y.log_phi).sum(1)
        + log_cut
    )
    gain = jnp.where(jnp.isneginf(log_density(target, x)), jnp.inf, gain)
    return jnp.where(jnp.isneginf(log_density(target, y)), -jnp.inf, gain)


# Moves.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Trial:
    """A move under way.

    growth: the string drawn.  cut, log_u: as in the module.  log_cut [C, T + 1]: how large log c(r
    | y) - log c(r | x) may be if y has at least so many tokens.  bound: of A.  stopped: rejected
    early.
    """

    growth: Growing
    cut: Int[Array, " C"]
    log_u: Float[Array, " C"]
    log_cut: Float[Array, "C L"]
    bound: Float[Array, " C"]
    stopped: Bool[Array, " C"]


class _Turn(NamedTuple):
    """In the rows `rows` move number `move` of the plan, which asks for `now`, ends or begins."""

    rows: Bool[Array, " C"]
    move: Int[Array, " C"]
    now: Plan


@jax.jit
def moves(key: Any, target: Target, how: Method, x: State, plan: Plan) -> tuple[State, MoveInfo]:
    """All M moves of a plan for every chain; no chain waits for another.

    Returns the chains and `MoveInfo` as in `kernel`, leaves [C, M].
    """
    num, num_moves = x.log_p.shape[0], plan.horizon.shape[0]
    keys = jax.random.split(key, num)

    def current(move: Array) -> Plan:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[jnp.clip(move, 0, num_moves - 1)], plan)

    def draw_key(chain: Array, number: Array, position: Array) -> Array:
        return jax.random.fold_in(
            jax.random.split(jax.random.fold_in(chain, number), 3)[2], position
        )

    def waiting(trial: _Trial, move: Array) -> Bool[Array, ""]:
        return anywhere(~trial.growth.active & (move + 1 < num_moves))

    def tick(carry: tuple) -> tuple:
        x, trial, move, info = carry
        now = current(move)
        at = jax.vmap(draw_key)(keys, now.number, trial.growth.sequences.length)
        passes = pass_cost(target, how.proposal, trial.growth)
        trial = _advance(at, target, how, x, trial, now.horizon)
        return x, trial, move, dataclasses.replace(info, cost=info.cost + passes)

    def round(carry: tuple) -> tuple:
        x, trial, move, info = carry
        ended = ~trial.growth.active & (move < num_moves)
        turn = _Turn(ended & (move >= 0), move, current(move))
        x, trial, info = _decide(target, how, x, trial, turn, info)
        move = move + ended
        turn = _Turn(ended & (move < num_moves), move, current(move))
        trial, spent = _propose(keys, target, how, x, trial, turn)
        carry = x, trial, move, dataclasses.replace(info, cost=info.cost + spent)
        # Chains that have no more to do wait until the others have, so that strings are taken over
        # together.
        return jax.lax.while_loop(
            lambda c: anywhere(c[1].growth.active) & ~waiting(c[1], c[2]), tick, carry
        )

    none = jnp.full(num, -1, jnp.int32)
    carry = x, _no_trial(target, how, x), none, _no_info(num, num_moves)
    x, _, _, info = jax.lax.while_loop(lambda c: anywhere(c[2] < num_moves), round, carry)
    asked = info.tokens.sum(dtype=jnp.int32) if target.tilted else 0
    spent = Cost(tokens=info.tokens.sum(dtype=jnp.int32), potential_calls=jnp.int32(asked))
    return x, dataclasses.replace(info, cost=info.cost + spent)


def _no_trial(target: Target, how: Method, x: State) -> _Trial:
    num, horizon = x.log_p.shape
    idle = start(target, how.proposal, x, jnp.zeros(num, bool))
    zeros = jnp.zeros(num, jnp.float32)
    many = jnp.zeros((num, horizon + 1), jnp.float32)
    return _Trial(idle, jnp.zeros(num, jnp.int32), zeros, many, zeros, jnp.zeros(num, bool))


def _no_info(num: int, num_moves: int) -> MoveInfo:
    flags = jnp.zeros((num, num_moves), bool)
    details = {"cut": jnp.zeros((num, num_moves), jnp.int32), "rejected_early": flags}
    return moved(flags, changed=flags, details=details)


def _propose(
    keys: Key[Array, " C"], target: Target, how: Method, x: State, old: _Trial, turn: _Turn
) -> tuple[_Trial, Cost]:
    """New trials in the rows of the turn: cuts and thresholds, and the strings, cut.

    Nothing is to be drawn beyond a string's end.  A trial that has ended holds the cache of its
    chain (`settled`).
    """
    rows = turn.rows
    cut, log_u, log_cut = _cuts(keys, how, x, turn)
    active = rows & (cut <= x.sequences.length)
    kept, most = drawn(old.growth), jnp.where(rows, cut, target.max_tokens)
    y = where_rows(rows, without_cache(x), without_cache(kept))
    growth = start(target, how.proposal, truncated(target, with_cache(y, kept.cache), most), active)
    zeros, flags = jnp.zeros(cut.shape, jnp.float32), jnp.zeros(cut.shape, bool)
    new = _Trial(_without_strings(growth), cut, log_u, log_cut, zeros, flags)
    bare = dataclasses.replace(old, growth=_without_strings(old.growth))
    trial = where_rows(rows, new, bare)
    whole = dataclasses.replace(
        trial.growth, sequences=growth.sequences, cache=growth.cache, pieces=growth.pieces
    )
    spent = replay_cost(target, how.proposal, jnp.where(active, cut, 0))
    return dataclasses.replace(trial, growth=whole), spent


def _cuts(
    keys: Key[Array, " C"], how: Method, x: State, turn: _Turn
) -> tuple[Int[Array, " C"], Float[Array, " C"], Float[Array, "C L"]]:
    """Cuts, log u, and log_cut of `_Trial`."""
    now, (num, horizon) = turn.now, x.log_p.shape
    own = jax.vmap(lambda chain, number: jax.random.split(jax.random.fold_in(chain, number), 3))(
        keys, now.number
    )
    cut, log_cut = draw(own[:, 0], how.cut, x.sequences.length, now.horizon, horizon)
    cut = jnp.where(now.extends, now.before, cut)
    log_u = jnp.where(now.extends, -jnp.inf, jnp.log(uniforms(own[:, 1])))
    lengths = jnp.broadcast_to(jnp.arange(horizon + 1, dtype=jnp.int32), (num, horizon + 1))
    longest = now.horizon[:, None]
    log_law = how.cut(cut[:, None], lengths, longest).astype(jnp.float32)
    possible = jnp.where(lengths <= longest, log_law, -jnp.inf)
    log_most = jax.lax.cummax(possible, axis=1, reverse=True)
    return cut, log_u, log_most - log_cut[:, None]


def _without_strings(g: Growing) -> Growing:
    return dataclasses.replace(g, sequences=None, cache=None, pieces=None)


def _advance(
    keys: Key[Array, " C"],
    target: Target,
    how: Method,
    x: State,
    trial: _Trial,
    horizon: Int[Array, " C"],
) -> _Trial:
    """One more token of the strings drawn; those that cannot be accepted any more are stopped."""
    growth = grow(keys, target, how.proposal, trial.growth)
    going = growth.active & (growth.sequences.length < horizon)
    growth = dataclasses.replace(growth, active=going)
    if not how.early_rejection:
        return dataclasses.replace(trial, growth=growth)
    log_cut = jnp.take_along_axis(trial.log_cut, growth.sequences.length[:, None], axis=1)[:, 0]
    y = drawn(growth)
    bound = log_ratio_bound(target, how, x, y, growth.potential, trial.cut, log_cut)
    stopped = growth.active & (bound < trial.log_u - SLACK)
    return dataclasses.replace(
        trial,
        growth=dataclasses.replace(growth, active=growth.active & ~stopped),
        bound=jnp.where(stopped, bound, trial.bound),
        stopped=trial.stopped | stopped,
    )


def _decide(
    target: Target,
    how: Method,
    x: State,
    trial: _Trial,
    turn: _Turn,
    info: MoveInfo,
) -> tuple[State, _Trial, MoveInfo]:
    """Accept or reject in the rows of the turn, and write down this move of theirs.

    Of the trials only the caches of these rows change: they become the chains'.
    """
    rows, now, growth, y = turn.rows, turn.now, trial.growth, drawn(trial.growth)
    before, proposed = x, trial.cut <= x.sequences.length
    ratio = log_ratio(target, how.cut, x, y, trial.cut, now.horizon).astype(jnp.float32)
    ratio = jnp.where(proposed, ratio, 0.0)
    accepted = proposed & ~trial.stopped & (now.extends | (trial.log_u < ratio))
    x_cache, y_cache = settled((x.cache, y.cache), accepted, rows)
    x = with_cache(where_rows(rows & accepted, without_cache(y), without_cache(x)), x_cache)
    entry = rows[:, None] & (jnp.arange(info.accepted.shape[1]) == turn.move[:, None])
    found = dataclasses.replace(
        info,
        accepted=accepted,
        proposed=proposed,
        changed=changed_rows(before.sequences, x.sequences),
        log_ratio=jnp.where(trial.stopped, trial.bound, ratio),
        tokens=growth.drawn,
        missing_support=growth.missing,
        outside_support=jnp.isneginf(log_density(target, x)),
        invalid=growth.invalid,
        cost=None,
        details={"cut": trial.cut, "rejected_early": trial.stopped},
    )
    old = dataclasses.replace(info, cost=None)
    written = jax.tree.map(lambda new, all: jnp.where(entry, new[:, None], all), found, old)
    trial = dataclasses.replace(trial, growth=dataclasses.replace(growth, cache=y_cache))
    return x, trial, dataclasses.replace(written, cost=info.cost)
