"""Normalisation over the last axis, accumulated in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "... D"]:
    """Root-mean-square norm: x / sqrt(mean x^2 + eps) * (offset + scale), in x's dtype (arXiv
    1910.07467).
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def layer(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Layer norm: (x - mean x) / sqrt(var x + eps) * scale + bias, in x's dtype (arXiv
    1607.06450).
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
