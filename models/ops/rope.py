"""Rotary position embeddings (arXiv 2104.09864), with scaled frequencies."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import Rope

Angles = tuple[Float[Array, "... 1 half"], Float[Array, "... 1 half"]]
"""Cosine and sine of every position's angles, times the rope's magnitude, with an axis for the
heads.
"""


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequency per pair of coordinates [head_dim / 2], radians per position, after
    scaling.
    """
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.divisors:
        return (plain / np.array(rope.divisors)).astype(np.float32)
    if rope.original_context is None:
        return (plain / rope.factor).astype(np.float32)
    wavelength = 2 * np.pi / plain
    turns = rope.original_context / wavelength
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / rope.factor).astype(np.float32)


def angles(rope: Rope, head_dim: int, positions: Int[Array, "*shape"]) -> Angles:
    """Cosines and sines of position * frequency, each [..., 1, head_dim / 2], float32."""
    phase = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    if rope.magnitude == 1.0:
        return cos, sin
    return cos * jnp.float32(rope.magnitude), sin * jnp.float32(rope.magnitude)


def rotate(x: Float[Array, "... H d"], angles: Angles) -> Float[Array, "... H d"]:
    """Turn coordinate pairs (i, i + d/2) of every head by their position's angles."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
