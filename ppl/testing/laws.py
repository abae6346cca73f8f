"""What both kits ask: random rows, shapes, structures; an AssertionError names the law that does
not hold.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray


def require(holds: Any, message: str) -> None:
    # Not `assert`: these are the product, and `python -O` would drop them.
    if not holds:
        raise AssertionError(message)


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """Draws on the host: a compilation for every odd shape would take longer than the checks."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def uniform(rng: np.random.Generator, support: np.ndarray) -> np.ndarray:
    """One index per row [N] int32, uniform over where support [N, V] holds."""
    return np.argmax(np.where(support, rng.random(support.shape), -1.0), axis=1).astype(np.int32)


def check_rows(tree: Any, num: int, what: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        require(
            jnp.shape(leaf)[:1] == (num,),
            f"every leaf that {what}({num}) returns must have the particle axis of {num} first,"
            f" leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}",
        )


def check_same_structure(before: Any, after: Any, what: str) -> None:
    def describe(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            for path, leaf in leaves
        }

    old, new = describe(before), describe(after)
    for path in sorted({*old, *new}):
        require(
            old.get(path) == new.get(path),
            f"{what} must keep the structure of what it is given (a loop carries it): leaf"
            f" {path or 'itself'} was"
            f" {old.get(path, 'absent')} and is {new.get(path, 'absent')}",
        )
