"""A pool: strings that were drawn once, with what votes and rules read of them.

    pool = pools.draw(key, p, num=256, answer=answers.last_number(tok))
    votes.majority(key, pool)

What a string answers is an id, equal for equal answers; a string that answers nothing has -1 and
votes for nothing.  All else is arrays [N], so that whatever reads a pool is one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppl.pytrees import register_dataclass

from ..base import Cost, X


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """N strings of one prompt.

    Attributes:
        samples: N rows, the strings or anything else with the axis N first.
        answer: [N] ids 0..N-1 of equal answers, in the order in which they first came; -1 is none.
        scores: [N] what the strings are judged by, the greater the better; -inf is rejected.
        log_weights: [N] of properly weighted strings (LAW 1, up to the pool's constant); 0 of
            independent draws from p.
        log_prob: [N] log p(x | prompt).
        log_q: [N] log-probability of the law that they were really drawn from.
        length: [N] tokens.
        cost: what drawing and judging them took.
    """

    samples: X
    answer: Int[Array, " N"]
    scores: Float[Array, " N"]
    log_weights: Float[Array, " N"]
    log_prob: Float[Array, " N"]
    log_q: Float[Array, " N"]
    length: Int[Array, " N"]
    cost: Cost

    @property
    def num(self) -> int:
        """N."""
        return self.answer.shape[-1]


def pool(answer: Any, *, samples: X = None, cost: Cost | None = None, **known: Any) -> Pool:
    """A pool of whose fields some are known: draws from p of score 0 and one token each, whose
    probabilities were not asked for (NaN).

    Raises:
        ValueError: for an empty pool, ids that are no integers in -1..N-1, another number of
            anything, or scores and weights that are NaN or +inf.
        TypeError: for a field that a pool does not have.
    """
    answer = jnp.asarray(answer, jnp.int32)
    zeros, unknown = jnp.zeros(answer.shape), jnp.full(answer.shape, jnp.nan)
    fields: dict[str, Any] = {
        "scores": zeros,
        "log_weights": zeros,
        "log_prob": unknown,
        "log_q": unknown,
        "length": jnp.ones(answer.shape, jnp.int32),
    }
    given = {name: jnp.asarray(x, fields[name].dtype) for name, x in known.items()}
    rows = jnp.arange(answer.shape[-1], dtype=jnp.int32) if samples is None else samples
    return Pool(
        samples=jax.tree.map(jnp.asarray, rows),
        answer=answer,
        cost=Cost() if cost is None else cost,
        **(fields | given),
    )
