"""Whether another draw is worth its price: the value of computation (after ZIP-RC, arXiv
2512.01457).

    rule = worth.rule([0.0, 0.4, 1.0], [0.5, 0.3, 0.2], price=0.02)      # a rule, see `stopping`
    worth.planned(probs, values, prices)                                  # before the first draw

The utility of what is drawn is its best score less the price of all draws.  With F_i the law of the
score of draw i, all independent, and scores v_1 < ... < v_B,

    E[max of n] = sum_b v_b (prod_i F_i(v_b) - prod_i F_i(v_b-1))

(`laws.expected_max`), and given the best score s so far another draw gains E[(X - s)+] in
expectation.  Scores of one thought's branches are not independent: then these are too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Num

from ppl.checks import numbers, probabilities

from . import laws
from .laws import Row
from .rules import Parameters, Rule, Seen


def rule(values: Row, probs: Row, *, price: float | int) -> Rule:
    """Stop when E[(X - s)+] <= price, s the best score so far, which is kept.

    For draws of one known law no rule does better: what a draw gains falls with s, so that where
    one is not worth its price none after it is.  It is meant for a `select` that takes the
    best score.

    Args:
        values, probs: the scores that a draw may have, and their probabilities.
        price: of a draw, in units of the score: tokens of a draw times what a token is worth.

    Raises:
        ValueError: unless probs are probabilities of as many values, and price is at least 0.
    """
    scores, law = numbers("values", values), probabilities("probs", probs)
    if len(scores) != len(law) or not price >= 0:
        raise ValueError(
            f"expected a probability for each of {len(scores)} values and a price from 0, got"
            f" {len(law)} and {price}; price is in units of the score"
        )
    return Rule(
        decision=_not_worth,
        parameters={
            "values": jnp.asarray(scores, jnp.float32),
            "probs": jnp.asarray(law, jnp.float32),
            "price": jnp.float32(price),
        },
        start=_nothing_yet,
        advance=_best,
        reads_scores=True,
    )


def _nothing_yet(num_answers: int) -> Array:
    return jnp.float32(-jnp.inf)


def _best(parameters: Parameters, seen: Seen, answer: Array, score: Array) -> Array:
    return jnp.maximum(seen.more, score).astype(jnp.float32)


def _not_worth(parameters: Parameters, seen: Seen) -> Bool[Array, ""]:
    gain = parameters["probs"] @ jnp.maximum(parameters["values"] - seen.more, 0.0)
    return gain <= parameters["price"]


def planned(
    probs: Num[ArrayLike, "N B"], values: Row, prices: Num[ArrayLike, " N"] | Sequence[float]
) -> int:
    """How many of N independent draws, in their order, to buy before any is seen: those up to the
    first whose expected gain E[max of n + 1] - E[max of n] does not exceed its price.

    The first draw is made in any case.  Of draws of one law and price that number is the best.

    Raises:
        ValueError: unless there is a price for each draw, and as `laws.expected_max`.
    """
    rows, costs = np.atleast_2d(np.asarray(probs, np.float64)), numbers("prices", prices)
    if len(rows) != len(costs):
        raise ValueError(
            f"expected a price for each of {len(rows)} draws, got {len(costs)}; give the tokens of"
            " each times what a token is worth"
        )
    best = [laws.expected_max(rows[: n + 1], values) for n in range(len(rows))]
    over = np.flatnonzero(np.diff(best) <= costs[1:])
    return int(over[0]) + 1 if over.size else len(rows)
