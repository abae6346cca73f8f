"""How sure counts make it that the answer that leads is the most likely one.

a and b are the counts of the leading answer and of another one.  Tables over counts are made on the
host, in double precision; what is left is exact to float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import xlog1py
from jaxtyping import Array, Float, Int


def leader(counts: Int[Array, " K"]) -> tuple[Array, Array, Array]:
    """The first of the leading answers, its count, and the next one's (0 if there is none)."""
    best = jnp.argmax(counts).astype(jnp.int32)
    return best, *apart(counts, best)


def apart(counts: Int[Array, " K"], best: Array) -> tuple[Array, Array]:
    """The count of one answer and the greatest of the others."""
    others = jnp.where(jnp.arange(counts.shape[0], dtype=jnp.int32) == best, 0, counts)
    return counts[best], others.max()


def leads(counts: Int[Array, " K"], max_count: int) -> Float[Array, ""]:
    """P(the answer that leads is the most likely one), as in `dirichlet`; no count is above
    `max_count`.
    """
    log_pdf, log_cdf = (jnp.asarray(table) for table in _gammas(max_count))
    _, first, _ = leader(counts)
    how_many = jnp.zeros(max_count + 1, jnp.float32).at[counts].add(1.0)
    # Answers that never came are no rivals, but there is always one.
    how_many = how_many.at[0].set(jnp.where((counts > 0).sum() > 1, 0.0, 1.0))
    how_many = how_many.at[first].add(-1.0)
    below = jnp.matmul(how_many, log_cdf, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(first > 0, jnp.exp(log_pdf[first] + below).sum(), 0.0)


@functools.lru_cache
def _gammas(max_count: int) -> tuple[np.ndarray, np.ndarray]:
    """log of the density of Gamma(c + 1), times the weights of the nodes, and of its distribution
    function: [max_count + 1, Q] each, for c = 0..max_count.
    """
    width = 0.125
    root = (np.arange(np.ceil((max_count**0.5 + 6) / width)) + 0.5) * width
    shape, x = np.arange(max_count + 1)[:, None] + 1.0, root**2
    density = (shape - 1) * np.log(x) - x - scipy.special.gammaln(shape) + np.log(2 * root * width)
    density -= scipy.special.logsumexp(density, axis=1, keepdims=True)
    below = np.log(np.maximum(scipy.special.gammainc(shape, x), 1e-300))
    return density.astype(np.float32), below.astype(np.float32)


def log_evidence(first: Array, second: Array, max_count: int) -> Float[Array, ""]:
    """log M(a, b) for counts of at most `max_count` in all; -inf in place of what is below 0, where
    a < b.
    """
    least = jnp.minimum(first, second)
    in_favour = 2 * ahead(first, least, max_count) / (first + least + 1).astype(jnp.float32)
    log_m = jnp.log(in_favour) - _log_split(first, least, max_count)
    return jnp.where(first < second, -jnp.inf, log_m)


def ahead(first: Array, second: Array, max_count: int) -> Float[Array, ""]:
    """P(Beta(a+1, b+1) > 1/2) = I_1/2(b+1, a+1) for counts a >= b of at most `max_count` in all.

    As a sum over the tail of the binomial law of a + b + 1 coins.  (JAX's `betainc` in float32 is
    wrong by 1e-4 at counts of 200.)
    """
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    i = jnp.arange(1, max_count + 1, dtype=jnp.float32)
    terms = jnp.cumprod(jnp.maximum(b - i + 1, 0.0) / (a + 1 + i))
    split = jnp.exp(_log_split(first, second, max_count)) * (a + b + 1) / (2 * a + 2)
    return 1 - split * (1 + terms.sum())


def _log_split(first: Array, second: Array, max_count: int) -> Float[Array, ""]:
    """log of C(a + b, a) / 2^(a + b), in Stirling's form with what that lacks in a table: no large
    numbers cancel.
    """
    lacking = jnp.asarray(_stirling(max_count))
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    skew = (a - b) / jnp.maximum(a + b, 1.0)
    skewed = xlog1py(a, skew) + xlog1py(b, -skew)
    return lacking[first + second] - lacking[first] - lacking[second] - skewed


@functools.lru_cache
def _stirling(max_count: int) -> np.ndarray:
    """log k! - (k log k - k) for k = 0..max_count."""
    k = np.arange(max_count + 1)
    return (scipy.special.gammaln(k + 1) - scipy.special.xlogy(k, k) + k).astype(np.float32)
