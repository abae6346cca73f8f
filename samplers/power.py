"""Power sampling: p(x)^alpha by Metropolis-Hastings over suffixes, block by block (Algorithm 1 of arXiv 2510.14901).

Stage k extends every chain's string to (k + 1) B tokens with the proposal, and then makes moves that leave
p(y_1:(k+1)B)^alpha invariant, with cuts anywhere in what there is.  EOS is absorbing, and a string that has ended may
get longer again: the published code cuts a proposal at the present string's length, which is not invariant.

Exact: the kernel of the last stage leaves p^alpha Phi invariant.  Approximate: how far the chains have come in a finite
number of moves; the other stages are there to give the last one a good start.  Chains are independent, so their spread
(`samplers.diagnostics`) says how far that is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.lm import check_count
from ppl.potential import Product
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from . import suffix
from .base import Cost, Guarantee, no_cost
from .regeneration import Growth, State, grow, no_strings, start
from .registry import sampler
from .suffix import Info, Method


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """C chains after K stages of M moves.

    state: the chains, which the kernel of `suffix` takes on from here.  info: leaves [K, C, M], and its cost [K], the
    moves'.  cost: of the whole run.
    """

    state: State
    info: Info
    cost: Cost

    @property
    def sequences(self) -> Sequences:
        """The chains' strings."""
        return self.state.sequences

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p(x | prompt) of the chains' strings."""
        return self.state.log_prob


def init(target: Target, num_chains: int) -> State:
    """C empty strings."""
    return no_strings(target, num_chains)


def step(
    key: PRNGKeyArray,
    target: Target,
    how: Method,
    x: State,
    before: Int[Array, ""],
    horizon: Int[Array, ""],
    num_moves: int,
) -> tuple[State, Info, Cost]:
    """One stage: strings of `before` tokens are continued up to `horizon` tokens, then all make `num_moves` moves."""
    extend_key, move_key = jax.random.split(key)
    x, spent = _extend(extend_key, target, how, x, before, horizon)
    x, info = suffix.moves(move_key, target, how, x, horizon, num_moves)
    return x, info, spent + info.cost


def _extend(
    key: PRNGKeyArray, target: Target, how: Method, x: State, before: Int[Array, ""], horizon: Int[Array, ""]
) -> tuple[State, Cost]:
    keys = jax.random.split(key, x.log_p.shape[0])

    def body(carry: tuple) -> tuple:
        growth, ticks = carry
        at = jax.vmap(jax.random.fold_in)(keys, growth.y.sequences.length)
        return grow(at, target, how.proposal, growth, horizon), ticks + 1

    growth: Growth = start(target, how.proposal, x, x.sequences.length == before)
    carry = growth, jnp.int32(0)
    growth, ticks = jax.lax.while_loop(lambda c: c[0].active.any(), body, carry)
    drawn, stepped = growth.tokens.sum(), before * growth.tokens.any()
    passes = ticks * (1 + how.proposal.forwards) + stepped * how.proposal.forwards
    asked = drawn + stepped * (growth.tokens > 0).sum()
    return growth.y, Cost(drawn, passes, asked if target.potential != Product() else jnp.int32(0))


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/test_power.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    *,
    alpha: float | Float[Array, ""] = 4.0,
    num_chains: int = 8,
    block_size: int = 32,
    moves_per_block: int = 10,
    **options: Unpack[suffix.Options],
) -> Result:
    """Power sampling of p^alpha Phi, in one jit: the law of every chain's string tends to it as moves are added.

    Args:
        key: typed key.
        p: a conditioned language model without a power, `lm.given(...)`; a potential Phi is left as it is.
        alpha: the power; the paper takes 4.
        num_chains: C, independent chains with keys of their own.
        block_size: B, tokens by which a stage is longer than the one before; the last one ends at max_tokens.
        moves_per_block: M, moves of every chain in each of the K = ceil(T / B) stages.
        options: as in `suffix.method`.

    Returns:
        `Result`.  A chain whose string has density zero in the end (constraints only) is flagged by
        `info.outside_support[-1, :, -1]`.

    Raises:
        ValueError: unless alpha > 0 and the counts are at least 1, if p has a power already, or as in `suffix.method`.
    """
    for name, count in (("num_chains", num_chains), ("block_size", block_size), ("moves_per_block", moves_per_block)):
        check_count(name, count)
    if p.alpha is not None:
        raise ValueError("expected p without a power, got a target with one; pass it here, as alpha=...")
    target = dataclasses.replace(p, alpha=jnp.asarray(alpha, jnp.float32))
    return _run(key, target, suffix.method(target, **options), num_chains, block_size, moves_per_block)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _run(key: Any, target: Target, how: Method, num_chains: int, block_size: int, num_moves: int) -> Result:
    stages = -(-target.max_tokens // block_size)

    def body(carry: tuple, stage: tuple) -> tuple[tuple, Info]:
        x, cost = carry
        stage_key, k = stage
        before, horizon = k * block_size, jnp.minimum((k + 1) * block_size, target.max_tokens)
        x, info, spent = step(stage_key, target, how, x, before, horizon, num_moves)
        return (x, cost + spent), info

    prompt = dataclasses.replace(no_cost(), forwards=jnp.int32(1))
    rows = jax.random.split(key, stages), jnp.arange(stages)
    (x, cost), info = jax.lax.scan(body, (init(target, num_chains), prompt), rows)
    return Result(x, info, cost)
