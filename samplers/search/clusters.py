"""Estimates from values that come in clusters: answers to one thought, or branches of one string.

    correct = (pool.scores > 0).reshape(16, -1)    # [n, H m], `fractured.run`
    clusters.mean(correct)                         # coverage of a draw, and its standard error
    clusters.pass_at_k(correct, [1, 4, 16])

Of n clusters with B values each the sample size is n: with s^2 the variance of the n cluster means

    mean = (1 / n B) sum_ij v_ij,     SE = s / sqrt(n)

where sqrt(v (1 - v) / n B) would be of independent values, and usually too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from ppl.showing import shown

from . import pools, votes


@shown
class Estimate(NamedTuple):
    """value [], std_error [], and the effect [] of clusters: how many times the variance is that of
    as many independent values, from 1 to B; NaN where values do not vary.
    """

    value: Float[Array, ""]
    std_error: Float[Array, ""]
    effect: Float[Array, ""]


@shown
class Lead(NamedTuple):
    """A majority: `vote`, as `votes.majority` gives it, and by how much its answer leads the next
    one, as a share of all.
    """

    vote: votes.Vote
    lead: Estimate


def mean(values: Shaped[Array | np.ndarray, "n ..."]) -> Estimate:
    """The mean of values [n, ...] that are independent between the rows only.

    Coverage where they are booleans, whether each is correct.

    Raises:
        ValueError: if there are not two clusters.
    """
    rows = _clusters(values)
    n, size = rows.shape
    centre = rows.mean()
    variance = ((rows.mean(1) - centre) ** 2).sum() / (n - 1) / n
    apart = ((rows - centre) ** 2).sum() / (n * size - 1) / (n * size)
    return Estimate(centre, jnp.sqrt(variance), variance / apart)


def majority(key: PRNGKeyArray, answer: Int[Array | np.ndarray, "n ..."]) -> Lead:
    """The majority of answers [n, ...], by the ids of a pool (`answers.ids_of`; -1 is none), and
    its lead; ties are drawn with the key.

    The error is of these two answers, as if they had been named before: of a close race it says
    that it is close.

    Raises:
        ValueError: if there are not two clusters, or as `pools.pool` does.
    """
    rows = jnp.asarray(answer)
    _clusters(rows)
    found = votes.majority(key, pools.pool(rows.ravel()))
    others = jnp.where(jnp.arange(rows.size) == found.answer, -1.0, found.mass)
    # Without an answer nothing leads; where there is one answer only, the next one has no id here.
    second = jnp.where(others.max() > 0, jnp.argmax(others), -2)
    ahead = (rows == found.answer) & (found.answer >= 0)
    return Lead(found, mean(ahead.astype(jnp.float32) - (rows == second)))


def pass_at_k(correct: Bool[Array | np.ndarray, "n ..."], ks: Sequence[int]) -> Float[Array, " J"]:
    """The probability that k whole clusters have a correct value among them [J], unbiased.

    A submission is k H m answers then, not k: compare it with that many independent ones.  With q_h
    the chance that an answer at depth h is wrong, given the thought, one thought fails with

        P(fail) = E[ prod_h q_h^m ]

    which is usually above the product of the means.  `coverage.pass_at_k_variance` has the noise,
    of n draws.

    Raises:
        ValueError: as `votes.pass_at_k` does.
    """
    given = np.asarray(correct) if not isinstance(correct, jax.Array) else correct
    return votes.pass_at_k(given.reshape(given.shape[0], -1).any(1), ks)


def _clusters(values: Any) -> Float[Array, "n B"]:
    rows = jnp.asarray(values, jnp.float32)
    if rows.ndim < 2 or rows.shape[0] < 2 or rows.size == 0:
        raise ValueError(
            f"expected values [n, ...] of at least two clusters, got shape {list(rows.shape)}; give"
            " correct.reshape(num_thoughts, -1)"
        )
    return rows.reshape(rows.shape[0], -1)
