"""Votes in which strings count by what else is known of them: their probabilities, a utility, the
model's confidence.

    reweighted.horvitz_thompson(key, pool)          reweighted.deep_conf(key, pool, confidences)

| w_i | what its masses are |
| --- | --- |
| p_i / (1 - (1 - q_i)^N), of unique strings (`horvitz_thompson`) | the law of answers, unbiased |
| p_i, of unique strings (`perplexity_consistency`) | too small by sum p (1 - p)^N |
| sum_i w_i u(x, x_i) (`expected_utility`) | expected utilities of strings |
| confidence_i, above a quantile (`deep_conf`) | nothing's: a choice |
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_function

from ..base import Guarantee, X
from ..diagnostics import normalise
from ..registry import sampler
from .order_statistics import Number
from .pools import Pool, check_one
from .votes import Vote, decided, masses, vote


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_reweighted.py")
def horvitz_thompson(key: PRNGKeyArray, pool: Pool) -> Vote:
    """A vote of unique strings by p_i / (1 - (1 - q_i)^N), q the law that they were drawn from.

    A choice, with no target, but its masses are unbiased: E mass_a = sum_x p(x) 1{a(x) = a}, as
    1 - (1 - q)^N is the probability that a string is in the pool.  Where few strings carry the
    answers it knows their probabilities, where all strings differ it is majority.  The masses do
    not sum to 1.

    Args:
        key: typed key.
        pool: N independent draws with `log_prob` and `log_q` of whole strings, whose log_weights
            are not used; rows with log_q -inf were not drawn, and do not count.

    Raises:
        ValueError: if probabilities are not known, or the weights are not those of independent
            draws, where they are concrete.
    """
    _check_known(pool, "log_prob", "log_q")
    _check_drawn(pool)
    # What no law draws was not drawn.
    num = jnp.sum(~jnp.isneginf(pool.log_q), dtype=jnp.float32)
    log_in = _log_inclusion(pool.log_q, num)
    return _unique(key, pool, jnp.where(jnp.isneginf(pool.log_q), -jnp.inf, pool.log_prob - log_in))


def _log_inclusion(log_q: Float[Array, " N"], num: Float[Array, ""]) -> Float[Array, " N"]:
    """log(1 - (1 - q)^n) for any log q <= 0."""
    q = jnp.minimum(jnp.exp(log_q), 1.0)
    # Below, n q is the whole of it, and q itself would be no normal number.
    small = log_q < -60
    inside = -jnp.expm1(num * jnp.log1p(-jnp.where(small, 0.5, q)))
    return jnp.where(small, jnp.log(num) + log_q, jnp.log(inside))


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_reweighted.py")
def perplexity_consistency(key: PRNGKeyArray, pool: Pool) -> Vote:
    """The published vote of unique strings by their probabilities, mass_a = sum p_i.

    A choice, with no target.  It is biased, by - sum_x p(x) (1 - p(x))^N: an answer that is spread
    over many strings hardly counts, and one likely wrong string wins.  `horvitz_thompson` mends it.
    The public code takes exp(mean log-probability of a token), which is the probability of nothing:
    that is `votes.vote(key, pool, jnp.exp(pool.log_prob / pool.length))`, a vote by confidence.

    Raises:
        ValueError: if probabilities are not known, where they are concrete.

    arXiv 2502.00511.
    """
    _check_known(pool, "log_prob")
    return _unique(key, pool, pool.log_prob)


@jax.jit
def _unique(key: Any, pool: Pool, log_weights: Any) -> Vote:
    """A vote of each string's first copy by exp(log_weights), whose masses are not normalised."""
    log_weights = jnp.where(first_copies(pool.samples), log_weights, -jnp.inf)
    top = log_weights.max()
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    # Decided in units of the greatest: probabilities of long strings are below float32's least.
    scaled = jnp.exp(log_weights - top)
    found = decided(key, pool, masses(pool, scaled), scaled > 0, pool.scores)
    return found._replace(mass=found.mass * jnp.exp(top))


def first_copies(samples: X) -> Bool[Array, " N"]:
    """Which rows are the first of their equals; of pytrees whose leaves have N first."""
    leaves = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(samples)]
    words = jnp.concatenate([_bits(leaf) for leaf in leaves], axis=1)
    place = jnp.arange(words.shape[1], dtype=jnp.uint32)
    hashed = [_mixed(words ^ _mixed(place * 2 + seed)).sum(1, dtype=jnp.uint32) for seed in (0, 1)]
    one, two = hashed
    # Equal rows lie side by side in the order of their hashes; there they are compared in full.
    order = jnp.lexsort((jnp.arange(len(one)), two, one))
    ranked = words[order]
    new = (ranked[1:] != ranked[:-1]).any(1)
    new = jnp.concatenate([jnp.ones(1, bool), new])
    return jnp.zeros(len(one), bool).at[order].set(new)


def _bits(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return x.astype(jnp.uint32)


def _mixed(x: Array) -> Array:
    """A permutation of 32-bit words without pattern (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_reweighted.py")
def expected_utility(key: PRNGKeyArray, pool: Pool, utility: Any) -> Vote:
    """The string of the greatest expected utility sum_i W_i u(x, x_i): minimum Bayes risk decoding.

    A choice, with no target; any weights of the pool are honoured.  u = 1{equal answers} is
    majority.

    Args:
        key: typed key, for ties.
        pool: N strings, which are what may be chosen, and, by weight, what may be true.  Strings
            without an answer are not chosen.
        utility: [N, N], of row i where row j is true; or a jax function (row, row) -> [] of
            `pool.samples`.

    Returns:
        `Vote`, in which `mass` is the greatest expected utility of an answer's strings, -inf of ids
        that there are not, and `confidence` that of the chosen one.

    Raises:
        ValueError: for a matrix of another shape, or one with NaN.

    Bickel and Doksum (1977); Eikema and Aziz (2020), arXiv 2005.10283.
    """
    check_one(pool)
    if callable(utility):
        check_function("utility", utility, "(one, other)", "jax.numpy.equal")
        rows = jax.vmap(jax.vmap(utility, (None, 0)), (0, None))
        utility = rows(pool.samples, pool.samples)
    matrix = jnp.asarray(utility, jnp.float32)
    if matrix.shape != (pool.num, pool.num):
        raise ValueError(
            f"expected utilities [{pool.num}, {pool.num}] of each string where each is true, got"
            f" shape {list(matrix.shape)}"
        )
    if not isinstance(matrix, Tracer) and not np.isfinite(matrix).all():
        raise ValueError("expected finite utilities, got NaN or infinite ones")
    return _useful(key, pool, matrix)


@jax.jit
def _useful(key: Any, pool: Pool, matrix: Any) -> Vote:
    gains = jnp.matmul(matrix, normalise(pool.log_weights), precision="highest")
    alive = ~jnp.isneginf(pool.log_weights)
    slots = jnp.where(alive & (pool.answer >= 0), pool.answer, pool.num)
    best = jnp.full(pool.num, -jnp.inf, jnp.float32).at[slots].max(gains, mode="drop")
    found = decided(key, pool, best, alive, gains)
    chosen = jnp.where(found.answer < 0, 0.0, best[found.answer])
    return found._replace(confidence=chosen)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_reweighted.py")
def deep_conf(
    key: PRNGKeyArray, pool: Pool, confidences: Float[Array, " N"], quantile: Number = 0.1
) -> Vote:
    """A vote by confidence of the strings whose confidence is not among the lowest `quantile`.

    A choice, with no target.

    Args:
        key: typed key, for ties.
        pool: N strings.
        confidences: [N] above 0, from `group_confidence`.
        quantile: the share of strings that is left out.

    Raises:
        ValueError: unless there is a confidence of each string, at least 0, and the quantile is in
            [0, 1].

    arXiv 2508.15260 (DeepConf), offline.
    """
    if not isinstance(quantile, Tracer) and not 0 <= quantile <= 1:
        raise ValueError(f"expected a quantile in [0, 1], got {quantile}; 0.1 is the paper's")
    confidences = jnp.asarray(confidences, jnp.float32)
    least = jnp.quantile(confidences, jnp.asarray(quantile, jnp.float32))
    return vote(key, pool, jnp.where(confidences >= least, confidences, 0.0))


def group_confidence(
    top_log_probs: Float[Array, "N T K"], length: Int[Array, " N"], window: int = 2048
) -> Float[Array, " N"]:
    """DeepConf's confidence of a string: the least mean over `window` tokens in a row of the
    tokens' confidences, which are minus the mean of their K greatest log-probabilities.

    Args:
        top_log_probs: [N, T, K] of the K likeliest tokens of each position, and only those: the
            token that was drawn, if it is none of them, would raise the confidence by being
            unlikely.
        length: [N] positions that count.  A shorter string than `window` is one group; an empty one
            has confidence 0.
        window: tokens of a group.

    Raises:
        ValueError: unless window >= 1.

    arXiv 2508.15260, K = 20.
    """
    check_count("window", window)
    own = -top_log_probs.astype(jnp.float32).mean(-1)
    places = jnp.arange(own.shape[1], dtype=jnp.int32)
    own = jnp.where(places < length[:, None], own, 0.0)
    before = jnp.pad(jnp.cumsum(own, axis=1), ((0, 0), (1, 0)))
    size = jnp.clip(length, 1, window)[:, None]
    start = jnp.maximum(places + 1 - size, 0)
    means = (before[:, 1:] - jnp.take_along_axis(before, start, axis=1)) / size
    whole = (places >= size - 1) & (places < length[:, None])
    least = jnp.where(whole, means, jnp.inf).min(1)
    return jnp.where(length > 0, least, 0.0)


def _check_known(pool: Pool, *names: str) -> None:
    check_one(pool)
    for name in names:
        values = getattr(pool, name)
        if not isinstance(values, Tracer) and np.isnan(values).any():
            raise ValueError(
                f"expected a pool with the {name} of each string, got some that are not known;"
                " draw the pool with pools.draw, or give pools.pool them"
            )


def _check_drawn(pool: Pool) -> None:
    """That the weights can be those of independent draws: all equal, or p / q."""
    if any(isinstance(x, Tracer) for x in (pool.log_weights, pool.log_prob, pool.log_q)):
        return
    weights = np.asarray(pool.log_weights, np.float64)
    ratio = np.asarray(pool.log_prob, np.float64) - np.asarray(pool.log_q, np.float64)
    with np.errstate(invalid="ignore"):  # -inf of both
        spread = [np.ptp(weights), np.ptp(weights - ratio)]
    if not min(np.nan_to_num(spread, nan=np.inf)) <= 1e-3:
        raise ValueError(
            "expected independent draws, whose weights are equal or p / q, got others, as of"
            " particles that were resampled; draw the pool with pools.draw, or take votes.majority,"
            " which honours weights"
        )
