"""Hint marginalisation: answers as hints for the next answers, a Markov chain on answers.

    p_{r+1}(b) = sum_a p_r(a) K(a, b)

K(a, .) is the law of answers when a is shown as a hint.  An answer gains exactly if more flows in
than out, and whatever the first answers were, the rounds end in K's stationary law.
arXiv 2412.13292.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ppl.checks import check_count


def iterate(
    law: Float[Any, " K"], matrix: Float[Any, "K K"], num_rounds: int
) -> Float[Array, "R K"]:
    """The laws of answers p_0, p_1, ..., p_num_rounds, row by row.

    Args:
        law: p_0 [K], for example the mass of a `votes.majority`.
        matrix: K [K, K], row a the law of answers given hint a.
        num_rounds: how often.

    Raises:
        ValueError: unless the rows of the matrix are laws, one for each answer.
    """
    check_count("num_rounds", num_rounds)
    law, matrix = jnp.asarray(law, jnp.float32), _checked(matrix)
    if law.shape != matrix.shape[:1]:
        raise ValueError(
            f"expected a law of {matrix.shape[0]} answers, got shape {list(law.shape)}"
        )

    def turn(p: Array, _: None) -> tuple[Array, Array]:
        after = jnp.matmul(p, matrix, precision="highest")
        return after, after

    _, laws = jax.lax.scan(turn, law, None, num_rounds)
    return jnp.concatenate([law[None], laws])


def stationary(matrix: Float[Any, "K K"]) -> Float[Array, " K"]:
    """The law that all rounds end in, pi = pi K; NaN or inf if there are several.

    Raises:
        ValueError: unless the rows of the matrix are laws, one for each answer.
    """
    matrix = _checked(matrix)
    num = matrix.shape[0]
    # pi (K - I) = 0, with one of these equations, which follows from the others, as sum pi = 1.
    system = (matrix.T - jnp.eye(num, dtype=jnp.float32)).at[-1].set(1.0)
    return jnp.linalg.solve(system, jnp.zeros(num, jnp.float32).at[-1].set(1.0))


def _checked(matrix: Any) -> Float[Array, "K K"]:
    if np.ndim(matrix) != 2 or np.shape(matrix)[0] != np.shape(matrix)[1]:
        raise ValueError(
            f"expected a matrix [K, K] of the K answers, got shape {list(np.shape(matrix))}"
        )
    if not isinstance(matrix, Tracer):
        rows = np.asarray(matrix, np.float64)
        if not (rows >= 0).all() or not np.allclose(rows.sum(1), 1, atol=1e-3):
            raise ValueError(
                "expected rows that are laws, at least 0 with sum 1, got others; row a is the mass"
                " of the answers that were given hint a"
            )
    return jnp.asarray(matrix, jnp.float32)
