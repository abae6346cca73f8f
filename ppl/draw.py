"""Draws from categorical laws over large vocabularies, by inverting the distribution function in
two levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 256


def categorical(
    keys: Key[Array, " N"], log_weights: Float[Array, "N V"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Draw one token per row from softmax(log_weights), with the log-probability of the law it was
    drawn from.

    The V weights are cut into blocks: b ~ sum of the block's weights, then the token inside block
    b.  That takes two uniforms per row where the Gumbel trick takes V, and each level keeps
    float32's resolution to itself.

    Args:
        keys: one typed key per row [N], so that row i's draw does not depend on N.
        log_weights: unnormalised log-probabilities [N, V]; -inf is never drawn.

    Returns:
        token [N] int32 and log_prob [N] float32, log w_token - log sum_v w_v.  A row without mass
        gives token 0 with log_prob -inf.
    """
    vocab_size = log_weights.shape[-1]
    width = min(vocab_size, BLOCK)
    blocks = -(-vocab_size // width)
    log_weights = log_weights.astype(jnp.float32)
    padding = ((0, 0), (0, blocks * width - vocab_size))
    levels = jnp.pad(log_weights, padding, constant_values=-jnp.inf).reshape(-1, blocks, width)
    top = jnp.max(log_weights, axis=-1)
    shift = jnp.where(top > -jnp.inf, top, 0.0)

    u = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    mass = jnp.sum(jnp.exp(levels - shift[:, None, None]), axis=-1)
    block = _invert(u[:, 0], mass)
    # The chosen block's weights are computed again rather than kept: keeping them would write out
    # all [N, V] of them.
    inside = jnp.take_along_axis(levels, block[:, None, None], axis=1)[:, 0]
    local = _invert(u[:, 1], jnp.exp(inside - shift[:, None]))

    alive = top > -jnp.inf
    token = jnp.where(alive, block * width + local, 0).astype(jnp.int32)
    chosen = jnp.take_along_axis(inside, local[:, None], axis=1)[:, 0]
    log_prob = chosen - shift - jnp.log(jnp.sum(mass, axis=-1))
    return token, jnp.where(alive, log_prob, -jnp.inf)


def uniforms(keys: Key[Array, " N"]) -> Float[Array, " N"]:
    """A number in [0, 1) for every key [N], float32."""
    return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)


def _invert(u: Float[Array, " N"], weights: Float[Array, "N K"]) -> Int[Array, " N"]:
    """First index with positive weight whose cumulative weight exceeds u * total.

    A parallel cumulative sum need not be monotone in float32, so "positive weight" is asked for
    explicitly, and the last positive index stands in where rounding leaves none.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    reached = positive & (cumulative > (u * cumulative[:, -1])[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), last)
