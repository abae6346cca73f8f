"""Laws of the cut from which a suffix move draws a string anew, and plans of moves.

A law is a function (cut, length, horizon) -> log c(cut | a string of that length), elementwise,
over 0..horizon - 1. Whatever it is, suffix moves make up for it, by c(r | y) / c(r | x); left out,
they would favour short or long strings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.draw import categorical
from ppl.pytrees import register_dataclass
from ppl.target import Target

Cut = Callable[[Int[Array, "..."], Int[Array, "..."], Int[Array, "..."]], Float[Array, "..."]]


def uniform(
    cut: Int[Array, "*#S"], length: Int[Array, "*#S"], horizon: Int[Array, "*#S"]
) -> Float[Array, "*#S"]:
    """c = 1 / horizon: independent of the string, so that nothing is to be made up for."""
    cut, horizon, _ = jnp.broadcast_arrays(cut, horizon, length)
    return jnp.where(cut < horizon, -jnp.log(horizon), -jnp.inf)


def uniform_in_length(
    cut: Int[Array, "*#S"], length: Int[Array, "*#S"], horizon: Int[Array, "*#S"]
) -> Float[Array, "*#S"]:
    """c = 1 / (positions of the string, its EOS included): no cut is in vain."""
    positions = jnp.minimum(length + 1, horizon)
    return jnp.where(cut < positions, -jnp.log(positions), -jnp.inf)


def draw(
    keys: Key[Array, " C"],
    law: Cut,
    length: Int[Array, " C"],
    horizon: Int[Array, " C"],
    max_tokens: int,
) -> tuple[Int[Array, " C"], Float[Array, " C"]]:
    """A cut for every string, and log c of it."""
    positions = jnp.broadcast_to(
        jnp.arange(max_tokens, dtype=jnp.int32), (length.shape[0], max_tokens)
    )
    return categorical(keys, law(positions, length[:, None], horizon[:, None]))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What every chain is to do, in this order, M moves.

    horizon [M]: the most tokens of a string.  extends [M]: strings of `before` [M] tokens are
    continued up to the horizon, whatever that gives; the others stay.  number [M]: of the move; it
    chooses the move's keys.
    """

    horizon: Int[Array, " M"]
    extends: Bool[Array, " M"]
    before: Int[Array, " M"]
    number: Int[Array, " M"]


def whole(target: Target, num_moves: int) -> Plan:
    """`num_moves` moves over strings of at most max_tokens tokens."""
    zeros = jnp.zeros(num_moves, jnp.int32)
    return Plan(zeros + target.max_tokens, zeros > 0, zeros, jnp.arange(num_moves, dtype=jnp.int32))
