"""Tokens drawn and taken away again, row by row, in blocks of a large vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.draw import BLOCK, categorical
from ppl.showing import shown


@shown
class Rest(NamedTuple):
    """The tokens that can still be drawn, in blocks: log p [N, B, K], -inf where removed, and the
    blocks' log-masses.

    A draw costs O(B + K) and so does a removal: one pass over [N, V] serves all tests, and no mass
    is ever the difference of two.
    """

    log_probs: Float[Array, "N B K"]
    log_mass: Float[Array, "N B"]


def everything(log_probs: Float[Array, "N V"]) -> Rest:
    num, vocab_size = log_probs.shape
    width = min(vocab_size, BLOCK)
    blocks = -(-vocab_size // width)
    padding = ((0, 0), (0, blocks * width - vocab_size))
    padded = jnp.pad(log_probs.astype(jnp.float32), padding, constant_values=-jnp.inf).reshape(
        num, blocks, width
    )
    return Rest(padded, jax.nn.logsumexp(padded, axis=2))


def pick(keys: Key[Array, "N 2"], rest: Rest) -> Int[Array, " N"]:
    """A token of every row by its mass."""
    block, _ = categorical(keys[:, 0], rest.log_mass)
    inside = jnp.take_along_axis(rest.log_probs, block[:, None, None], axis=1)[:, 0]
    local, _ = categorical(keys[:, 1], inside)
    return block * rest.log_probs.shape[2] + local


def remove(rest: Rest, token: Int[Array, " N"], where: Bool[Array, " N"]) -> Rest:
    rows, width = jnp.arange(token.shape[0], dtype=jnp.int32), rest.log_probs.shape[2]
    block, local = token // width, token % width
    inside = jnp.take_along_axis(rest.log_probs, block[:, None, None], axis=1)[:, 0]
    inside = jnp.where(where[:, None] & (jnp.arange(width) == local[:, None]), -jnp.inf, inside)
    log_mass = rest.log_mass.at[rows, block].set(jax.nn.logsumexp(inside, axis=1))
    return Rest(rest.log_probs.at[rows, block].set(inside), log_mass)
