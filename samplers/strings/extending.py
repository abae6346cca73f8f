"""Moves of a population of strings, by a token or by a step of text, with their weights (LAW 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

from ppl.potential import State
from ppl.rows import anywhere, at, where_rows
from ppl.steps import Steps
from ppl.target import Target

from ..base import Move
from .growing import Follow, Growing, fresh, token
from .proposals import Proposal

Tick = Callable[[PRNGKeyArray, Growing, Bool[Array, " N"]], tuple[Growing, Float[Array, " N"]]]
"""(key, strings, moving) -> the strings a token longer, and what that adds to their log-weights."""


def extend(
    target: Target,
    proposal: Proposal,
    steps: Steps | None = None,
    *,
    follow: Follow | None = None,
    block_size: int | None = None,
) -> Move:
    """The move that extends every string by a token drawn from `proposal`, or by a step of text,
    with its weight (LAW 2).

    With `steps`, rows whose step is over wait for the others.  `block_size` rows go through the
    model at a time.
    """

    def weighed(
        keys: Key[Array, " N"], x: Growing, moving: Bool[Array, " N"], follow: Follow | None
    ) -> tuple[Growing, Float[Array, " N"]]:
        """A token and its log-weight; a row of weight zero does not go on."""
        longer, added = token(keys, target, proposal, x, moving, follow)
        dw = jnp.where(moving, added.log_weight(target), 0.0)
        return dataclasses.replace(longer, active=longer.active & ~jnp.isneginf(dw)), dw

    def one(
        key: PRNGKeyArray, x: Growing, moving: Bool[Array, " N"]
    ) -> tuple[Growing, Float[Array, " N"]]:
        num = x.active.shape[0]
        given = jax.random.split(key, num), x, moving, follow
        if block_size is None or block_size >= num:
            return weighed(*given)
        return _in_blocks(block_size, weighed, *given)

    def sample(key: PRNGKeyArray, x: Growing) -> tuple[Growing, Float[Array, " N"]]:
        if steps is None:
            return one(key, fresh(x), x.active)
        return _until(steps, key, fresh(x), one)

    return Move(sample)


def _in_blocks(
    block_size: int,
    weighed: Callable[..., tuple[Growing, Float[Array, " N"]]],
    keys: Key[Array, " N"],
    x: Growing,
    moving: Bool[Array, " N"],
    follow: Follow | None,
) -> tuple[Growing, Float[Array, " N"]]:
    """`weighed(keys, x, moving, follow)`, for `block_size` rows at a time: of what has a row per
    particle and token of the vocabulary, only one block exists at once.
    """
    given = (keys, x.logits, moving, follow)

    def body(b: Array, carry: tuple) -> tuple:
        place = b * block_size
        rows, (keys, logits, moving, follow) = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, block_size), (carry[0], given)
        )
        rows = dataclasses.replace(rows, logits=logits)
        done = weighed(keys, rows, moving, follow)
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, place, axis=0),
            carry,
            done,
        )

    num = moving.shape[0]
    carry = (dataclasses.replace(x, logits=None), jnp.zeros(num, jnp.float32))
    return jax.lax.fori_loop(0, num // block_size, body, carry)


def _until(steps: Steps, key: PRNGKeyArray, x: Growing, one: Tick) -> tuple[Growing, Array]:
    """Tokens until the step of every row is over."""
    # With steps of one size all rows arrive together, and nobody waits.
    waits = steps.every is None

    def tick(number: Array, x: Growing, place: State, moving: Array) -> tuple:
        y, dw = one(jax.random.fold_in(key, number), x, moving)
        y = _wait(x, y, moving) if waits else y
        last = at(y.sequences.tokens, jnp.maximum(y.sequences.length - 1, 0))
        # Rows that wait are not asked about any more in this round.
        place, ends = steps.step(place, last, y.sequences.length)
        return y, dw, place, moving & y.active & ~ends

    def body(carry: tuple) -> tuple:
        number, x, dw, place, moving = carry
        x, more, place, moving = tick(number, x, place, moving)
        return number + 1, x, dw + more, place, moving

    # The first token by itself: the pass for it may have been made.
    start = (jnp.int32(1), *tick(jnp.int32(0), x, steps.read(x.sequences), x.active))
    return jax.lax.while_loop(lambda c: anywhere(c[4]), body, start)[1:3]


def _wait(before: Growing, after: Growing, moving: Bool[Array, " N"]) -> Growing:
    """Rows that did not move keep their states."""
    states = (after.potential, after.proposal), (before.potential, before.proposal)
    potential, proposal = where_rows(moving, *states)
    return dataclasses.replace(after, potential=potential, proposal=proposal)
