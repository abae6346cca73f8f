"""Laws of the cut from which a suffix move draws a string anew.

A law is a function (cut, length, horizon) -> log c(cut | a string of that length), elementwise, over 0..horizon - 1.
Whatever it is, suffix moves make up for it, by c(r | y) / c(r | x); left out, they would favour short or long strings.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Cut = Callable[[Int[Array, "..."], Int[Array, "..."], Int[Array, ""]], Float[Array, "..."]]


def uniform(cut: Int[Array, "*#S"], length: Int[Array, "*#S"], horizon: Int[Array, ""]) -> Float[Array, "*#S"]:
    """c = 1 / horizon: independent of the string, so that nothing is to be made up for."""
    return jnp.where(cut < horizon, -jnp.log(horizon), -jnp.inf)


def uniform_in_length(
    cut: Int[Array, "*#S"], length: Int[Array, "*#S"], horizon: Int[Array, ""]
) -> Float[Array, "*#S"]:
    """c = 1 / (positions of the string, its EOS included): no cut is in vain."""
    positions = jnp.minimum(length + 1, horizon)
    return jnp.where(cut < positions, -jnp.log(positions), -jnp.inf)
