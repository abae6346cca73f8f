"""Parallel power tempering: replicas at several powers of p that exchange their strings (PPT, arXiv
2609.38104).

A chain is K replicas.  Rung k of the ladder alpha_1 < ... < alpha_K = alpha holds a string whose
target is

    gamma_k(x) = p(x)^alpha_k Phi(x)

and a step leaves the product of all gamma_k / Z_k invariant, the last of which is the target.
First every replica moves by a kernel of its own rung.  Then a sweep over k = 1..K-1 lets the
strings x, y of rungs k and k + 1 change places with probability min(1, e^A), where

    A = (alpha_{k+1} - alpha_k) (log p(x) - log p(y))

Phi is the same at all rungs and cancels.  All C K replicas are the rows of one batch.  A swap moves
no string and no cache: rows change rungs.  As log p and the norms of all rungs are known
(`proposals.Powered`), it takes no pass of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.checks import check_count, check_counts
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Guarantee, Kernel, holding
from ..registry import sampler
from ..results import Chains, MoveInfo
from ..strings import costs, regeneration
from ..strings.cuts import Cut, Plan, uniform, whole
from ..strings.ladders import Ladder, check_powers
from ..strings.proposals import Powered
from ..strings.regeneration import at_rung, without_cache
from . import power, suffix

Make = Callable[[Target, Powered], Kernel]
"""(target, proposal) -> kernel over `regeneration.State` whose rows have powers of their own,
target.alpha [C K].

It must leave every token's log q and norms as the proposal has them, and its info is a
`MoveInfo`."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C chains of K replicas.

    rung: [C, K], in 0..K-1, of every replica; a permutation of them in each chain.  rows: C K
    strings; row c K + i is replica i of chain c, with log q of its rung.
    """

    rung: Int[Array, "C K"]
    rows: regeneration.State

    @property
    def replica(self) -> Int[Array, "C K"]:
        """Which replica is at each rung."""
        return jnp.argsort(self.rung, axis=1)

    def at(self, rung: int) -> regeneration.State:
        """The C strings at a rung, without their caches; -1 is the last, the target's."""
        num_chains, num_rungs = self.rung.shape
        return take_rows(
            without_cache(self.rows),
            jnp.arange(num_chains, dtype=jnp.int32) * num_rungs + self.replica[:, rung],
        )

    @property
    def sequences(self) -> Sequences:
        """The strings at the target's rung."""
        return self.at(-1).sequences

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p(x | prompt) of the strings at the target's rung."""
        return self.at(-1).log_prob


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixMoves:
    """See `suffix_moves`."""

    cut: Cut
    log_phi_max: float | Float[Array, ""] | None
    num_moves: int = dataclasses.field(metadata={"static": True})

    def __call__(self, target: Target, proposal: Powered) -> Kernel:
        how = suffix.method(target, proposal=proposal, cut=self.cut, log_phi_max=self.log_phi_max)
        step = holding(_moved, target, how, whole(target, self.num_moves))
        return Kernel(Partial(regeneration.score, target, proposal), step)


def _moved(
    key: PRNGKeyArray, target: Target, how: suffix.Method, plan: Plan, x: regeneration.State
) -> tuple[regeneration.State, MoveInfo]:
    return suffix.moves(key, target, how, x, plan)


def suffix_moves(
    num_moves: int = 1, *, cut: Cut = uniform, log_phi_max: float | Float[Array, ""] | None = None
) -> SuffixMoves:
    """Suffix Metropolis-Hastings for every replica, `num_moves` between two sweeps, which do not
    wait for each other; arguments as in `suffix.method`.

    Raises:
        ValueError: unless `num_moves` is at least 1.
    """
    check_count("num_moves", num_moves)
    return SuffixMoves(as_pytree(cut), log_phi_max, num_moves)


# Swaps.


def log_swap_ratio(
    ladder: Float[Array, " K"],
    k: Int[Array, ""],
    log_p: Float[Array, "*R"],
    log_p_next: Float[Array, "*R"],
) -> Float[Array, "*R"]:
    """A, for strings of log-probability log_p at rung k and log_p_next at rung k + 1 (counted from
    0).
    """
    return (ladder[k + 1] - ladder[k]) * (log_p - log_p_next)


def sweep(
    keys: Key[Array, " C"],
    ladder: Float[Array, " K"],
    log_prob: Float[Array, "C K"],
    rung: Int[Array, "C K"],
) -> tuple[Int[Array, "C K"], Float[Array, "C K-1"], Bool[Array, "C K-1"]]:
    """Swaps of neighbours from the hottest up, each of which sees those before it.

    `log_prob` is log p of the replicas' strings.  Returns the replicas' rungs, every A, and which
    were accepted.
    """

    def one(key: Array, log_prob: Array, rung: Array) -> tuple[Array, Array, Array]:
        def swap(replica: Array, inputs: tuple) -> tuple[Array, tuple]:
            k, log_u = inputs
            low, high = replica[k], replica[k + 1]
            log_ratio = log_swap_ratio(ladder, k, log_prob[low], log_prob[high])
            # Of two impossible strings, A is NaN: not accepted.
            swapped = log_u < log_ratio
            exchanged = replica.at[k].set(high).at[k + 1].set(low)
            return jnp.where(swapped, exchanged, replica), (log_ratio, swapped)

        pairs = jnp.arange(len(ladder) - 1, dtype=jnp.int32)
        log_u = jnp.log(jax.random.uniform(key, pairs.shape, jnp.float32))
        replica, (log_ratio, swapped) = jax.lax.scan(swap, jnp.argsort(rung), (pairs, log_u))
        return jnp.argsort(replica).astype(jnp.int32), log_ratio, swapped

    return jax.vmap(one)(keys, log_prob, rung)


def exchange(
    key: PRNGKeyArray, target: Target, ladder: Float[Array, " K"], state: State
) -> tuple[State, Float[Array, "C K-1"], Bool[Array, "C K-1"]]:
    """`sweep`, and log q of every row at its new rung; the model is not asked."""
    keys = jax.random.split(key, state.rung.shape[0])
    rung, log_ratio, swapped = sweep(
        keys, ladder, state.rows.log_prob.reshape(state.rung.shape), state.rung
    )
    rows = at_rung(at_rungs(target, ladder, rung), state.rows, rung.reshape(-1))
    return State(rung, rows), log_ratio, swapped


def at_rungs(target: Target, ladder: Float[Array, " K"], rung: Int[Array, "C K"]) -> Target:
    """The target whose row c K + i has the power of replica i of chain c."""
    return dataclasses.replace(target, alpha=ladder[rung].reshape(-1))


# Chains.


@sampler(Guarantee.EXACT, proof="tests/samplers/mcmc/test_parallel_tempering.py")
def kernel(target: Target, ladder: Ladder, *, make: Make | None = None) -> Kernel:
    """Parallel tempering along powers of p: chains of K replicas that leave the product of all
    rungs invariant.

        kernel(p**4 * potential, ladders.geometric(1, 4, 5))

    Args:
        target: p^alpha Phi.
        ladder: powers of p, the hottest first; the last one is the target's alpha.
        make: the kernel of the replicas, by default `suffix_moves(1)`; e.g. a conditional-SMC
            suffix kernel gives particle Gibbs within parallel tempering.

    Returns:
        `Kernel`: `init` takes `Sequences` of C strings, at each of which all replicas of a chain
        start (`init` of this module takes C K of them), and makes a `State`; `step` returns the
        replicas' `MoveInfo`, leaves [C, K, ...] in the order of the rungs, whose `details` have
        besides: `swapped` [C, K-1] whether rungs k and k + 1 exchanged their strings,
        `swap_acceptance` [C, K-1] the probability with which they did, and `rung` [C, K] where
        every replica is afterwards (`chain_diagnostics.round_trips`).

    Raises:
        ValueError: unless the ladder has at least two powers above 0, increases strictly and ends
            at the target's alpha; by `init`, if the strings are not the target's, or one has
            density zero.
    """
    ladder, bound = (
        check_powers(target, ladder),
        as_pytree(suffix_moves(1) if make is None else make),
    )
    return Kernel(Partial(_together, target, ladder), holding(step, target, ladder, bound))


def _together(target: Target, ladder: Float[Array, " K"], x: Sequences) -> State:
    """All replicas of a chain at its string."""
    rows = jnp.repeat(jnp.arange(x.length.shape[0], dtype=jnp.int32), len(ladder))
    return init(target, ladder, take_rows(x, rows))


def init(target: Target, ladder: Ladder, x: Sequences) -> State:
    """Chains whose replica k, at rung k, has the string in row c K + k of `x`; errors as in
    `kernel`.
    """
    ladder = check_powers(target, ladder)
    rung = jnp.tile(jnp.arange(len(ladder), dtype=jnp.int32), (x.length.shape[0] // len(ladder), 1))
    return State(
        rung, regeneration.init(at_rungs(target, ladder, rung), Powered(ladder, lookahead=True), x)
    )


@jax.jit
def step(
    key: Any, target: Target, ladder: Float[Array, " K"], make: Any, state: State
) -> tuple[State, MoveInfo]:
    """Moves of all replicas by the kernel of `make`, a pytree function, and a sweep of swaps."""
    move_key, swap_key = jax.random.split(key)
    inner = make(at_rungs(target, ladder, state.rung), Powered(ladder, lookahead=True))
    rows, found = inner.step(move_key, state.rows)
    return _swapped(swap_key, target, ladder, state, rows, found)


def _swapped(
    key: Array,
    target: Target,
    ladder: Array,
    state: State,
    rows: regeneration.State,
    found: MoveInfo,
) -> tuple[State, MoveInfo]:
    """The chains of `state`, whose rows became `rows`, after a sweep."""
    moved = State(state.rung, rows)
    after, log_ratio, swapped = exchange(key, target, ladder, moved)
    shape, order = state.rung.shape, moved.replica

    def by_rung(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf.reshape(*shape, -1), order[..., None], axis=1).reshape(
            *shape, *leaf.shape[1:]
        )

    info = jax.tree.map(by_rung, dataclasses.replace(found, cost=None))
    possible = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    swaps = {
        "swapped": swapped,
        "swap_acceptance": jnp.exp(jnp.minimum(possible, 0.0)),
        "rung": after.rung,
    }
    details = (info.details or {}) | swaps
    return after, dataclasses.replace(info, cost=found.cost, details=details)


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/mcmc/test_parallel_tempering.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    ladder: Ladder,
    *,
    num_chains: int = 4,
    block_size: int = 32,
    sweeps_per_block: int = 5,
    moves_per_sweep: int = 2,
    cut: Cut = uniform,
    log_phi_max: float | Float[Array, ""] | None = None,
) -> Chains:
    """Power sampling with tempering, in one jit: the law of every chain's string tends to the
    target's.

        parallel_tempering.run(key, p**4, ladders.geometric(1, 4, 5))

    As in `power.run` strings grow by blocks, the same for all replicas: stage m extends them to m B
    tokens, and then leaves the product of all p(x_1:mB)^alpha_k Phi_m invariant.  A stage is
    `sweeps_per_block` rounds, and a round `moves_per_sweep` suffix moves of every replica, the
    first of which is the stage's extension, and a sweep.

    Args:
        key: typed key.
        target, ladder: as in `kernel`.
        num_chains: C, of K replicas each.
        block_size: B, tokens by which a stage is longer than the one before.
        sweeps_per_block, moves_per_sweep: see above; both 1 would leave no move.
        cut, log_phi_max: as in `suffix.method`.

    Returns:
        `Chains` with one draw, the last state, which the kernel takes on from here; of the R rounds
        that led there `info` is that of `kernel`, leaves [1, R, C, K, moves_per_sweep] and of swaps
        [1, R, C, ...], the extensions included.

    Raises:
        ValueError: unless the counts are at least 1 and leave a move in a stage, or as in `kernel`.
    """
    check_counts(num_chains=num_chains, block_size=block_size)
    check_counts(sweeps_per_block=sweeps_per_block, moves_per_sweep=moves_per_sweep)
    if sweeps_per_block * moves_per_sweep < 2:
        raise ValueError(
            "expected moves in every block, got one sweep of one move, which is the block's"
            " extension; raise"
            " sweeps_per_block or moves_per_sweep"
        )
    plan = power.schedule(target.max_tokens, block_size, sweeps_per_block * moves_per_sweep - 1)
    plan = jax.tree.map(lambda leaf: leaf.reshape(-1, moves_per_sweep), plan)
    return _run(
        key, target, check_powers(target, ladder), as_pytree(cut), log_phi_max, plan, num_chains
    )


@functools.partial(jax.jit, static_argnums=6)
def _run(
    key: Any,
    target: Target,
    ladder: Array,
    cut: Cut,
    log_phi_max: Any,
    rounds: Plan,
    num_chains: int,
) -> Chains:
    move_key, swap_key = jax.random.split(key)
    rung = jnp.tile(jnp.arange(len(ladder), dtype=jnp.int32), (num_chains, 1))
    proposal = Powered(ladder, lookahead=True)

    def round(state: State, inputs: tuple) -> tuple[State, MoveInfo]:
        key, plan = inputs
        here = at_rungs(target, ladder, state.rung)
        how = suffix.method(here, proposal=proposal, cut=cut, log_phi_max=log_phi_max)
        rows, found = suffix.moves(
            move_key, here, how, state.rows, plan
        )  # the plan's numbers choose the moves' keys
        return _swapped(key, target, ladder, state, rows, found)

    start = State(rung, regeneration.no_strings(target, proposal, rung.size))
    keys = jax.random.split(swap_key, len(rounds.number))
    state, info = jax.lax.scan(round, start, (keys, rounds))
    own = jax.tree.map(lambda leaf: leaf[None], dataclasses.replace(info, cost=None))
    return Chains(
        draws=power.one_draw(state),
        info=own,
        state=state,
        cost=costs.prompt(target, proposal)
        + jax.tree.map(lambda count: count.sum(dtype=count.dtype), info.cost),
        steps=len(keys),
        thin=len(keys),
    )
