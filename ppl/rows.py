"""Rows of pytrees whose leaves have the particle axis N first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree


def take_rows(tree: PyTree, rows: Int[Array, " N"]) -> PyTree:
    """Rows `rows` of every leaf: what resampling does to a pytree whose leaves have the particle
    axis first.
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), tree)


def where_rows(rows: Bool[Array, " N"], new: Any, old: Any) -> Any:
    """The rows `rows` of `new`, the others of `old`; for pytrees whose leaves have N first."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


def at(rows: Array, index: Int[Array, " N"]) -> Array:
    """Entry `index` of every row: rows[i, index[i]]."""
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]
