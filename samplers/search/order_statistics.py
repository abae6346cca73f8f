"""Order statistics of a pool: what the best of k draws would be, from N >= k of them, without bias.

One set of weights gives best-of-n and its curve, majority-of-the-bests, majority and pass@k.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ppl.rows import valid

Number = int | float | Int[Any, ""] | Float[Any, ""]


def order_weights(
    scores: Float[Array, " N"], k: Number, there: Bool[Array, " N"] | None = None
) -> Float[Array, " N"]:
    """Weights w [N] with E[sum_i w_i f(x_i)] = E f(the best of k draws), for every f, of N >= k
    independent draws.

    Of the t-th highest score w is C(N-1-t, k-1) / C(N, k), and tied scores share theirs: the mean
    over all subsets of k, unbiased and of least variance.  So f = reward gives the best-of-n curve,
    scores = f = correct pass@k; k = 1 counts all alike (majority), k = N the best only.

        w_0 = k / N,   w_{t+1} / w_t = max(N - t - k, 0) / (N - 1 - t)

    Args:
        scores: [N]; NaN and +inf count as -inf where they are traced.
        k: 1..N, traced or not; NaN comes of a traced one outside.
        there: [N] the rows that were drawn, which N counts; others have weight 0.  By default all.

    Raises:
        ValueError: for k outside 1..N, without scores, or for a score that is NaN or +inf.
    """
    check_degree(k, scores.shape[0])
    if not isinstance(scores, Tracer) and not (np.asarray(scores) < np.inf).all():
        raise ValueError(
            "expected scores below +inf, got NaN or +inf; a string that is rejected has -inf"
        )
    there = jnp.ones(scores.shape, bool) if there is None else there
    return _order_weights(scores, there, jnp.asarray(k, jnp.float32))


@jax.jit
def _order_weights(scores: Any, there: Any, k: Any) -> Any:
    scores, _ = valid(scores.astype(jnp.float32)[:, None])
    scores, size = scores[:, 0], scores.shape[0]
    num = there.sum(dtype=jnp.float32)
    # What is not there comes last, after scores of -inf that are.
    order = jnp.lexsort((-scores, ~there))
    ranked, drawn = scores[order], there[order]
    left = num - 1 - jnp.arange(size - 1, dtype=jnp.float32)  # N - 1 - t
    log_ratio = jnp.log1p(-jnp.minimum((k - 1) / jnp.maximum(left, 1.0), 1.0))
    steps = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(log_ratio)])
    weights = jnp.where(drawn, k / jnp.maximum(num, 1.0) * jnp.exp(steps), 0.0)
    weights = jnp.where((k >= 1) & (k <= num), weights, jnp.nan)
    new = (ranked[1:] != ranked[:-1]) | (drawn[1:] != drawn[:-1])
    new = jnp.concatenate([jnp.zeros(1, bool), new])
    group = jnp.cumsum(new, dtype=jnp.int32)
    both = jnp.stack([weights, jnp.ones_like(weights)])
    sums = jnp.zeros((2, size), jnp.float32).at[:, group].add(both)
    shared = (sums[0] / jnp.maximum(sums[1], 1))[group]
    return jnp.zeros(size, jnp.float32).at[order].set(shared)


def check_degree(k: Any, num: int, name: str = "k") -> None:
    if num < 1:
        raise ValueError("expected the scores of at least one string, got none; draw some")
    if isinstance(k, Tracer):
        return
    whole = np.asarray(k) == np.floor(k)
    if np.ndim(k) or not whole or not 1 <= k <= num:
        raise ValueError(
            f"expected {name} to be a whole number in 1..{num}, the strings that there are, got"
            f" {k}; draw more strings"
        )


def pass_at_k(
    correct: Any, ks: Int[Any, " J"] | list[int], *, num: int | Int[Any, "*P"] | None = None
) -> Float[Array, "*P J"]:
    """pass@k without bias: the probability that one of k of the draws is correct, for P problems
    and J sizes.

        votes.pass_at_k(pool.scores > 0, [1, 4, 16])
        votes.pass_at_k([3, 0, 17], [1, 4, 16], num=64)      # counts of three problems

        1 - C(N - c, k) / C(N, k) = 1 - exp sum_{i=N-c+1}^{N} log1p(-k / i)

    Args:
        correct: [*P, N] of booleans, which draws are correct; or c [*P], how many are.
        ks: [J] sizes, 1..N.
        num: N of counts, of each problem or of all.

    Raises:
        ValueError: for booleans with `num` or counts without it, for c outside 0..N, or k outside
            1..N, where they are concrete.

    Chen et al. (2021), arXiv 2107.03374, in a form that float32 can compute; differences of its
    log-gammas are wrong in the third digit at N = 10^4.
    """
    correct, num = _counted(correct, num)
    if isinstance(num, Tracer):
        raise ValueError("expected num as numbers, got a traced array; it decides about shapes")
    counts = np.broadcast_to(np.asarray(num, np.int32), np.shape(correct))
    fewest, most = (int(counts.min()), int(counts.max())) if counts.size else (1, 1)
    if np.ndim(ks) != 1:
        raise ValueError(f"expected a list of sizes k, got {ks!r}; pass e.g. [1, 8]")
    if not isinstance(ks, Tracer):
        for k in np.asarray(ks):
            check_degree(k, fewest, "every k")
    if not isinstance(correct, Tracer):
        given = np.asarray(correct)
        if ((given < 0) | (given > counts)).any():
            raise ValueError(
                f"expected counts of correct draws in 0..{most}, the draws that there are, got"
                f" {given.min()} to {given.max()}; count them in the same pools"
            )
    return _passes(jnp.asarray(correct), jnp.asarray(counts), jnp.asarray(ks), most)


def _counted(correct: Any, num: Any) -> tuple[Any, Any]:
    """Counts of correct draws, and of draws."""
    correct = correct if isinstance(correct, Tracer) else np.asarray(correct)
    which = correct.dtype == bool
    if which != (num is None) or (which and not correct.ndim):
        raise ValueError(
            "expected booleans [N], whether each draw is correct, or counts of correct draws with"
            f" num=N, got {correct.dtype} {list(correct.shape)} with num={num}; pass e.g."
            " pool.scores > 0"
        )
    return (correct.sum(-1), correct.shape[-1]) if which else (correct, num)


def _passes(correct: Any, num: Any, ks: Any, most: int) -> Any:
    i = jnp.arange(1, most + 1, dtype=jnp.float32)
    factors = (i > (num - correct)[..., None]) & (i <= num[..., None])

    def one(k: Array) -> Array:
        # Where i <= k, k draws cannot all be wrong.
        terms = jnp.where(i > k, jnp.log1p(-jnp.where(i > k, k / i, 0.0)), -jnp.inf)
        return -jnp.expm1(jnp.where(factors, terms, 0.0).sum(-1))

    return jnp.moveaxis(jax.lax.map(one, ks.astype(jnp.float32)), 0, -1)
