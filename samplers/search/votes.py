"""Votes on a pool: one answer of many strings.

    votes.majority(key, pool)      votes.best_of(key, pool, k=8)      votes.pass_at_k(correct, ks)

A vote gives every answer the mass of its strings, mass_a = sum_i w_i 1{answer_i = a}, and takes the
heaviest.  Where the w are proper for some density (LAW 1), that is the mode of its answers,
estimated without bias:

| w_i, times exp(log_weights) | whose answers |
| --- | --- |
| 1 (`majority`) | p's, or the target's |
| s_i >= 0 (`weighted`) | those of p s |
| `order_weights(scores, k)` | those of the best of k draws, any k <= N, from one pool |
| exp(scores / temperature) (`soft_best_of`) | those of p exp(r / temperature) |

Ties are drawn with the key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.showing import shown

from ..base import Guarantee
from ..diagnostics import normalise
from ..registry import sampler
from .order_statistics import Number, check_degree, order_weights, pass_at_k
from .pools import Pool, check_independent, check_one

__all__ = [
    "Picked",
    "Vote",
    "best_of",
    "best_of_majority",
    "majority",
    "majority_of_bests",
    "order_weights",
    "pass_at_k",
    "pick",
    "soft_best_of",
    "vote",
    "weighted",
]

ROUNDING = 1e-6
"""Masses that differ by less, relatively, are tied: sums in another order differ by as much."""


@shown
class Vote(NamedTuple):
    """What a vote found.

    answer [] the id, and index [] the row that stands for it; both -1 if nothing could be voted
    for, the id alone where a row was drawn that answers nothing (`best_of`).  mass [N] of every
    answer by its id, as shares of the weight of all strings, those without an answer included.
    confidence [] the answer's part of what the answers have together.  tied [] whether another has
    as much.
    """

    answer: Int[Array, ""]
    index: Int[Array, ""]
    mass: Float[Array, " N"]
    confidence: Float[Array, ""]
    tied: Bool[Array, ""]


@shown
class Picked(NamedTuple):
    """A row [] that was drawn, -1 if none can be, and its log-weight [] (LAW 1)."""

    index: Int[Array, ""]
    log_weight: Float[Array, ""]


# The two primitives.


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def vote(key: PRNGKeyArray, pool: Pool, weights: Any = None) -> Vote:
    """The answer with the greatest mass, mass_a = sum_i W_i 1{answer_i = a}, sum_i W_i = 1.

    There is no target; of weights that are proper for a density the mass is an estimate of its
    answers' law, for E[Z-hat mass_a] = sum_x gamma(x) 1{a(x) = a}.  Ties are uniform.  Of the
    strings that have the answer and some weight, that of the highest score stands for it.

    Args:
        key: typed key.
        pool: N strings; their exp(log_weights) count.
        weights: [N] >= 0, times these; by default 1.

    Raises:
        ValueError: unless there is a weight of at least 0, and not NaN, for each string.
    """
    check_one(pool)
    weights = _checked(weights, pool.num)
    return _voted(key, pool, pool.log_weights, weights)


@jax.jit
def _voted(key: Any, pool: Pool, log_weights: Any, weights: Any) -> Vote:
    """A vote by exp(log_weights) weights, normalised."""
    # In units of the greatest weight, counts of equal ones are whole numbers, and ties exact.
    weights = _scaled(log_weights) * weights
    total = weights.sum()
    mass = masses(pool, weights) / jnp.where(total > 0, total, 1.0)
    return decided(key, pool, mass, weights > 0, pool.scores)


def _scaled(log_weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """exp(log_weights), the greatest 1; zeros if all are -inf."""
    top = log_weights.max()
    return jnp.exp(log_weights - jnp.where(jnp.isneginf(top), 0.0, top))


def masses(pool: Pool, weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """sum_i w_i 1{answer_i = a} for every id."""
    slots = jnp.where(pool.answer < 0, pool.num, pool.answer)
    return jnp.zeros(pool.num, jnp.float32).at[slots].add(weights, mode="drop")


def decided(
    key: PRNGKeyArray,
    pool: Pool,
    mass: Float[Array, " N"],
    eligible: Bool[Array, " N"],
    scores: Float[Array, " N"],
) -> Vote:
    """The heaviest of the answers of eligible rows, and its eligible row of the highest score, ties
    at random.
    """
    answer_key, row_key = jax.random.split(key)
    stands = jnp.zeros(pool.num, bool)
    rows = eligible & (pool.answer >= 0)
    stands = stands.at[jnp.where(rows, pool.answer, pool.num)].set(True, mode="drop")
    top = jnp.max(jnp.where(stands, mass, -jnp.inf))
    first = stands & (mass >= top - ROUNDING * jnp.abs(top))
    answer = _any_of(answer_key, first)
    rows = rows & (pool.answer == answer)
    best = jnp.max(jnp.where(rows, scores, -jnp.inf))
    index = _any_of(row_key, rows & (scores >= best))
    return Vote(
        answer=answer,
        index=index,
        mass=mass,
        confidence=_part(mass, answer),
        tied=first.sum(dtype=jnp.int32) > 1,
    )


def _any_of(key: PRNGKeyArray, flags: Bool[Array, " N"]) -> Int[Array, ""]:
    """One of the places where a flag holds; -1 if none does."""
    # Bits, for uniforms are often equal among 10^5, and the first of equals would be preferred.
    bits = jax.random.bits(key, flags.shape, jnp.uint32) >> 1
    place = jnp.argmax(jnp.where(flags, bits.astype(jnp.int32), -1))
    return jnp.where(flags.any(), place, -1).astype(jnp.int32)


def _part(mass: Float[Array, " N"], answer: Int[Array, ""]) -> Float[Array, ""]:
    """The answer's part of the whole mass; 0 of none."""
    total = mass.sum()
    part = mass[answer] / jnp.where(total > 0, total, 1.0)
    return jnp.where(answer < 0, 0.0, part)


def pick(key: PRNGKeyArray, weights: Float[Array, " N"]) -> Int[Array, ""]:
    """A row drawn in proportion to weights [N] >= 0; -1 if all are 0.

    Raises:
        ValueError: if a weight is NaN, infinite or below 0.
    """
    return _picked(key, _checked(weights, weights.shape[0]))


@jax.jit
def _picked(key: Any, weights: Any) -> Any:
    row = jax.random.categorical(key, jnp.log(weights))
    return jnp.where(weights.max() > 0, row, -1).astype(jnp.int32)


def _finite_from_0(weights: np.ndarray) -> bool:
    return bool((np.isfinite(weights) & (weights >= 0)).all())


def _checked(weights: Any, num: int) -> Float[Array, " N"]:
    """Weights [N], ones if there are none."""
    if weights is None:
        return jnp.ones(num, jnp.float32)
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (num,):
        raise ValueError(
            f"expected a weight for each of {num} strings, got shape {list(weights.shape)}"
        )
    if not isinstance(weights, Tracer) and not _finite_from_0(np.asarray(weights)):
        raise ValueError(
            "expected weights of at least 0, got some that are below, NaN or infinite; give"
            " exp(scores) of log-scores, and 0 to a string that is rejected"
        )
    return weights


# By the names of the papers.


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def majority(key: PRNGKeyArray, pool: Pool) -> Vote:
    """The answer that most of the pool gives, by weight: self-consistency.

    A choice, with no target; its mass estimates the law of answers of p, or of the target that the
    pool has weights for.  Scores only say which string stands for the answer.

    Wang et al. (2023), arXiv 2203.11171.
    """
    return vote(key, pool)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def weighted(key: PRNGKeyArray, pool: Pool) -> Vote:
    """The answer of the greatest sum of scores: a vote weighted by a verifier.

    A choice, with no target; its mass is that of the answers of p s.  -inf counts as 0.

    Raises:
        ValueError: if a score is below 0: of log-scores take `vote(key, pool, jnp.exp(scores))`.
    """
    scores = jnp.where(jnp.isneginf(pool.scores), 0.0, pool.scores)
    return vote(key, pool, scores)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def best_of(key: PRNGKeyArray, pool: Pool, k: Number) -> Vote:
    """A string that has exactly the law of the best of k draws, from a pool of N >= k.

        P(x) = p(x) (F(r)^k - F^-(r)^k) / (F(r) - F^-(r)),   F the distribution function of the
        score

    A choice, with no target.  The row is drawn by `pick` from `order_weights`, tied scores alike;
    with k = N it is the best of all.  `mass` is the unbiased estimate of the answers' law under
    that choice, and one pool gives it for every k.

    Args:
        key: typed key.
        pool: N independent draws; rows with log-weight -inf were not drawn, and do not count.
        k: 1..N; within jit the best of all stands for more.

    Raises:
        ValueError: for k outside 1..N, or weights that are not equal, where they are concrete.
    """
    weights = _best_weights(pool, k)
    index = pick(key, weights)
    return _of_row(pool, weights, index)


@jax.jit
def _of_row(pool: Pool, weights: Any, index: Any) -> Vote:
    mass = masses(pool, weights)
    answer = jnp.where(index < 0, -1, pool.answer[index])
    as_much = jnp.abs(mass - mass[answer]) <= ROUNDING * mass[answer]
    others = jnp.where(jnp.arange(pool.num) == answer, False, as_much)
    tied = (answer >= 0) & others.any()
    return Vote(answer, index, mass, _part(mass, answer), tied)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def majority_of_bests(key: PRNGKeyArray, pool: Pool, k: Number | None = None) -> Vote:
    """The answer that the best of k draws gives most often, estimated from all subsets of the pool.

    A choice, with no target: the mode of the answers of best-of-k.  Between majority (k = 1) and
    best-of-n (k = N), and better than both where a verifier is wrong about rare answers.

    Args:
        key: typed key.
        pool: N independent draws.
        k: 1..N; by default floor(sqrt(N)).

    Raises:
        ValueError: as `best_of`.

    arXiv 2511.18630, whose bootstrap weights are here those of subsets, which are unbiased.
    """
    return vote(key, pool, _best_weights(pool, k))


def _best_weights(pool: Pool, k: Number | None) -> Float[Array, " N"]:
    """`order_weights` of the draws that there are, by default of k = floor(sqrt(N))."""
    check_independent(pool)
    there = ~jnp.isneginf(pool.log_weights)
    num = there.sum(dtype=jnp.int32)
    if k is None:
        k = jnp.floor(jnp.sqrt(num + jnp.float32(0.5)))
    else:
        known = 0 if isinstance(num, Tracer) else int(num)
        check_degree(k, known or pool.num)
        k = jnp.minimum(k, num)
    # Where nothing was drawn there is no best one, and nothing weighs.
    weights = order_weights(pool.scores, jnp.maximum(k, 1), there | (num < 1))
    return jnp.where(there, weights, 0.0)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_votes.py")
def best_of_majority(
    key: PRNGKeyArray, pool: Pool, share: Number, num: int = 1
) -> Int[Array, " k"]:
    """Of the answers with at least a `share` of the pool, the `num` of the highest score.

    A choice, with no target.  An answer has the score of its best string, which stands for it.  A
    share of 0 is best-of-n.

    Args:
        key: typed key, for ties.
        pool: N strings; shares are by weight.
        share: alpha, the least share; in theory 3/4 of the right answer's probability, in practice
            .003 to .015.
        num: k, how many.

    Returns:
        k rows of the pool, the best first; -1 where there are no more answers.

    Raises:
        ValueError: unless 1 <= num <= N.

    arXiv 2510.03199.
    """
    check_one(pool)
    check_count("num", num)
    check_degree(num, pool.num, "num")
    return _gated(key, pool, jnp.asarray(share, jnp.float32))[:num]


@jax.jit
def _gated(key: Any, pool: Pool, share: Any) -> Any:
    """All rows that stand for answers with the share, the best first, then -1."""
    weights = _scaled(pool.log_weights)
    mass = masses(pool, weights) / jnp.where(weights.max() > 0, weights.sum(), 1.0)
    slots = jnp.arange(pool.num, dtype=jnp.int32)
    alive = (weights > 0) & (pool.answer >= 0)
    kept = alive & (mass[pool.answer] >= share * (1 - ROUNDING))
    # In a random order, so that the first of equals is any; kept ones first, by falling scores.
    order = jax.random.permutation(key, slots)
    order = order[jnp.lexsort((-pool.scores[order], ~kept[order]))].astype(jnp.int32)
    # The first row of each answer stands for it.
    place = jnp.zeros(pool.num, jnp.int32).at[order].set(slots)
    first = jnp.full(pool.num, pool.num, jnp.int32)
    first = first.at[jnp.where(kept, pool.answer, pool.num)].min(place, mode="drop")
    stands = kept & (place == first[pool.answer])
    found = jnp.argsort(~stands[order], stable=True)
    return jnp.where(stands[order][found], order[found], -1).astype(jnp.int32)


@sampler(Guarantee.EXACT, proof="tests/samplers/search/test_votes.py")
def soft_best_of(key: PRNGKeyArray, pool: Pool, temperature: Number) -> Picked:
    """A string drawn in proportion to exp(score / temperature), with its weight: best-of-n as a
    sampler of p exp(r / temperature).

        log_weight = log mean_i exp(log_weights_i + r_i / temperature)

    E[exp(log_weight) f(x)] = sum_x gamma(x) exp(r(x) / temperature) f(x) at any N, where the pool's
    weights are proper for gamma: of draws from p, p; of `smc.run`, its target.  So it is a move by
    its weight, and a proposal of Metropolis-Hastings (`kernels.collapse`, `smc.pimh`).  Without the
    weight the string is biased at every N; KL(target || its law) <= log(1 + CV^2 / N) of the
    weights exp(r / temperature).

    Raises:
        ValueError: unless temperature > 0.

    Compare arXiv 2505.03156, which keeps no weight.
    """
    check_one(pool)
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"expected a temperature above 0, got {temperature}; near 0 it is `best_of`, at"
            " infinity a draw of the pool"
        )
    return _soft(key, pool, jnp.asarray(temperature, jnp.float32))


@jax.jit
def _soft(key: Any, pool: Pool, temperature: Any) -> Picked:
    tilted = pool.log_weights + pool.scores / temperature
    log_weight = jax.nn.logsumexp(tilted) - jnp.log(jnp.float32(pool.num))
    return Picked(pick(key, normalise(tilted)), log_weight)
