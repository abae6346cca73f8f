"""Rows of pytrees whose leaves have the particle axis N first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

PROMPTS = "prompts"
"""The axis over which runs of several prompts are mapped (`samplers.strings.prompts`)."""


def greatest(counts: Int[Array, " *N"]) -> Int[Array, ""]:
    """The greatest count of all rows; where several prompts run together, of theirs too.

    What decides about loops and conditions: one answer for all prompts keeps them loops and
    conditions under the map over prompts, where they would otherwise become selects of both sides.
    So the turn or branch that it decides about must leave rows that have no use for it as they are.
    """
    most = counts.max()
    try:
        return jax.lax.pmax(most, PROMPTS)
    except NameError:  # there is no such axis: a prompt by itself
        return most


def anywhere(flags: Bool[Array, " *N"]) -> Bool[Array, ""]:
    """Whether a flag holds in any row; where several prompts run together, in any of theirs."""
    return greatest(flags.astype(jnp.int32)) > 0


def take_rows(tree: PyTree, rows: Int[Array, " N"]) -> PyTree:
    """Rows `rows` of every leaf: what resampling does to a pytree whose leaves have the particle
    axis first.
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), tree)


def weighted_rows(result: Any) -> tuple[Any, Float[Array, " N"]]:
    """The rows of anything that holds samples, and their log-weights [N], which need not be
    normalised.

    Of a result with `draws` [S, C, ...], all N = S C of them, equally weighted unless they have
    `log_weights`; otherwise its `samples` or `sequences`, equally weighted without `log_weights`.

    Raises:
        ValueError: if the result has `scores`, and so is a choice and no sample.
    """
    if hasattr(result, "scores"):
        raise ValueError(
            f"expected weighted samples or draws of a law, got a {type(result).__name__} with"
            " `scores`, which is a choice; take its `best`"
        )
    if hasattr(result, "draws"):
        rows = jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), result.draws)
        weights, rows = rows.get("log_weights"), rows.get("sequences", rows)
    else:
        rows = result.samples if hasattr(result, "samples") else result.sequences
        weights = getattr(result, "log_weights", None)
    num = jax.tree.leaves(rows)[0].shape[0]
    return rows, jnp.zeros(num, jnp.float32) if weights is None else jnp.asarray(weights)


def where_rows(rows: Bool[Array, " N"], new: Any, old: Any) -> Any:
    """The rows `rows` of `new`, the others of `old`; for pytrees whose leaves have N first."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


def valid(
    log_masses: Float[Array, "*N V"],
) -> tuple[Float[Array, "*N V"], Bool[Array, "*N"]]:
    """Log-masses, in which NaN and +inf, which are none, become -inf; and which rows had some."""
    good = log_masses < jnp.inf  # NaN is not
    # The greatest of floats is found sooner than whether all are true; a NaN might get lost in it.
    wrong = jnp.max(jnp.where(good, jnp.float32(0), jnp.float32(1)), axis=-1) > 0
    return jnp.where(good, log_masses, -jnp.inf), wrong


def log_normalised(log_masses: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """log softmax of every row's valid log-masses; -inf, and not NaN, where there is no mass."""
    log_masses, _ = valid(log_masses)
    living = (log_masses > -jnp.inf).any(axis=-1, keepdims=True)
    return jnp.where(
        living, jax.nn.log_softmax(jnp.where(living, log_masses, 0.0), axis=-1), -jnp.inf
    )


def at(rows: Array, index: Int[Array, " N"]) -> Array:
    """Entry `index` of every row: rows[i, index[i]]."""
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]
