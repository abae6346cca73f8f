"""Resampling schemes: (key, log_weights[N], num) -> ancestors[num] with E[copies of i] = num * W_i.

All invert the cumulative weights at `num` points.  They are safe for float32: a cumulative sum that ends below 1 is
rescaled, a particle of weight zero is never chosen, and an all-dead population keeps its order.
Survey: Douc, Cappe and Moulines (2005); Gerber, Chopin and Whiteley (2019).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .diagnostics import normalise


def multinomial(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """Independent draws: u_j uniform."""
    return _invert(normalise(log_weights), jax.random.uniform(key, (num,)))


def stratified(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """One draw in each of `num` equal strata: u_j = (j + U_j) / num."""
    return _invert(normalise(log_weights), (jnp.arange(num) + jax.random.uniform(key, (num,))) / num)


def systematic(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """One uniform for all: u_j = (j + U) / num; copies of i are floor or ceil of num * W_i."""
    return _invert(normalise(log_weights), (jnp.arange(num) + jax.random.uniform(key, ())) / num)


def residual(key: PRNGKeyArray, log_weights: Float[Array, " N"], num: int) -> Int[Array, " M"]:
    """floor(num * W_i) copies of i, and independent draws for the rest."""
    expected = normalise(log_weights) * num
    copies = jnp.floor(expected).astype(jnp.int32)
    kept = jnp.sum(copies)
    slots = jnp.arange(num)
    sure = jnp.minimum(jnp.searchsorted(jnp.cumsum(copies), slots, side="right"), log_weights.shape[0] - 1)
    rest = _invert(expected - copies, jax.random.uniform(key, (num,)))
    return jnp.where(slots < kept, sure, rest).astype(jnp.int32)


def _invert(weights: Float[Array, " N"], points: Float[Array, " M"]) -> Int[Array, " M"]:
    """The particle in whose stretch of the cumulative weights each point in [0, 1) falls."""
    num = weights.shape[0]
    # A parallel cumulative sum need not be monotone in float32, and a weight of zero must not widen it.
    cumulative = jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    total = cumulative[-1]
    # Rounding can push a point onto the total: the last particle of positive weight is the greatest legal answer.
    last = num - 1 - jnp.argmax(weights[::-1] > 0)
    found = jnp.searchsorted(cumulative, points * total, side="right")
    in_order = jnp.arange(points.shape[0]) % num
    return jnp.where(total > 0, jnp.minimum(found, last), in_order).astype(jnp.int32)
