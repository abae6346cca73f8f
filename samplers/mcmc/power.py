"""Power sampling: p(x)^alpha by Metropolis-Hastings over suffixes, block by block (Algorithm 1 of
arXiv 2510.14901).

Stage k extends every chain's string to (k + 1) B tokens with the proposal, and then makes moves
that leave p(y_1:(k+1)B)^alpha invariant, with cuts anywhere in what there is.  EOS is absorbing,
and a string that has ended may get longer again: the published code cuts a proposal at the present
string's length, which is not invariant.

Exact: the kernel of the last stage leaves p^alpha Phi invariant.  Approximate: how far the chains
have come in a finite number of moves; the other stages are there to give the last one a good start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ppl.checks import check_count
from ppl.target import Target

from ..base import Cost, Guarantee, holding
from ..registry import sampler
from ..results import Chains, MoveInfo
from ..strings.cuts import Plan
from ..strings.prompts import first_of, run_each
from ..strings.regeneration import State, no_strings
from . import chains, suffix
from .suffix import Method


def schedule(max_tokens: int, block_size: int, num_moves: int) -> Plan:
    """K = ceil(T / B) stages, each an extension and M moves; leaves [K (1 + M)]."""
    stage = np.arange(-(-max_tokens // block_size), dtype=np.int32).repeat(1 + num_moves)
    number = np.arange(stage.size, dtype=np.int32)
    horizon = np.minimum((stage + 1) * np.int32(block_size), np.int32(max_tokens))
    return Plan(
        *map(
            jnp.asarray,
            (horizon, number % (1 + num_moves) == 0, stage * np.int32(block_size), number),
        )
    )


def init(target: Target, how: Method, num_chains: int) -> State:
    """C empty strings."""
    return no_strings(target, how.proposal, num_chains)


def step(
    key: PRNGKeyArray, target: Target, how: Method, x: State, plan: Plan, stage: int
) -> tuple[State, MoveInfo]:
    """Stage number `stage` of a plan with its extension; all stages, each with the run's key, are
    the run.

    Returns the chains and `MoveInfo`, leaves [C, 1 + M].
    """
    size = int(np.flatnonzero(np.append(np.asarray(plan.extends)[1:], True))[0]) + 1
    rows = jax.tree.map(lambda leaf: leaf[stage * size : (stage + 1) * size], plan)
    return suffix.moves(key, target, how, x, rows)


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/mcmc/test_power.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_chains: int = 8,
    block_size: int = 32,
    moves_per_block: int = 10,
    **options: Unpack[suffix.Options],
) -> Chains:
    """Power sampling of p^alpha Phi, in one jit: the law of every chain's string tends to it as
    moves are added.

        power.run(key, p**4)

    Args:
        key: typed key.
        target: p^alpha, tilted or not; the paper takes alpha = 4.  Or a list of targets over one
            model, whose chains run side by side as in `smc.run`; then every leaf of the result has
            the list's axis first.
        num_chains: C, independent chains with keys of their own.
        block_size: B, tokens by which a stage is longer than the one before; the last one ends at
            max_tokens.
        moves_per_block: M, moves of every chain in each of the K = ceil(T / B) stages.
        options: as in `suffix.method`.

    Returns:
        `Chains` with one draw, the last state, which the kernel of `suffix` takes on from here; of
        the K M steps that led there `info` has [1, K M, C], stage by stage, without the extensions,
        which are in the cost.  A chain whose string has density zero in the end (constraints only)
        is flagged by `info.outside_support[0, -1]`.

    Raises:
        ValueError: unless the counts are at least 1 and alpha > 0, or as in `suffix.method`.
    """
    for name, count in (
        ("num_chains", num_chains),
        ("block_size", block_size),
        ("moves_per_block", moves_per_block),
    ):
        check_count(name, count)
    how = suffix.method(first_of(target), **options)
    counts = {"num_chains": num_chains, "block_size": block_size, "num_moves": moves_per_block}
    return run_each(key, holding(_run, how, **counts), target, num_rows=num_chains)


@functools.partial(jax.jit, static_argnames=("num_chains", "block_size", "num_moves"))
def _run(
    key: Any, how: Method, target: Target, *, num_chains: int, block_size: int, num_moves: int
) -> Chains:
    plan = schedule(target.max_tokens, block_size, num_moves)
    # No barrier between stages: a chain that is done with one goes on to the next.
    x, info = suffix.moves(key, target, how, init(target, how, num_chains), plan)
    cost = info.cost + Cost(forwards=jnp.int32(1))  # the prompt

    def steps_first(leaf: Array) -> Array:
        stages = leaf.reshape(num_chains, -1, 1 + num_moves, *leaf.shape[2:])[:, :, 1:]
        return jnp.swapaxes(stages.reshape(num_chains, -1, *leaf.shape[2:]), 0, 1)[None]

    steps = len(plan.number) // (1 + num_moves) * num_moves
    return Chains(
        draws=one_draw(x),
        info=jax.tree.map(steps_first, dataclasses.replace(info, cost=None)),
        state=x,
        cost=cost,
        steps=steps,
        thin=steps,
    )


def one_draw(state: Any) -> dict[str, Any]:
    """What `Chains` keeps of a state that is its only draw."""
    return jax.tree.map(lambda leaf: leaf[None], chains.collected(state))
