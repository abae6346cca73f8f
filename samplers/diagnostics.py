"""How good a weighted population is, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppl.rows import weighted_rows

from .health import Health, health

__all__ = [
    "Health",
    "ess",
    "health",
    "lee_whiteley",
    "log_z_std_error",
    "mean",
    "normalise",
    "olsson_douc",
    "roots",
]


def ess(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """Effective sample size 1 / sum_i W_i^2 of normalised weights W, in [1, N]; 0 if all particles
    are dead.
    """
    weights = normalise(log_weights)
    total = jnp.sum(weights**2)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)


def normalise(log_weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """softmax(log_weights), with all zeros instead of NaN if every weight is -inf.

    Raises:
        ValueError: if `log_weights` is not one population [N].
    """
    if log_weights.ndim != 1:
        raise ValueError(
            f"expected the log-weights [N] of one population, got shape {log_weights.shape}; use"
            " jax.vmap for several"
        )
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isneginf(top), 0.0, top))
    return weights / jnp.where(jnp.isneginf(top), 1.0, jnp.sum(weights))


def mean(result: Any, f: Callable[[Any], Array]) -> Float[Array, ""]:
    """The estimate of E f under the law that a result is a sample of, sum_i W_i f(x_i).

        diagnostics.mean(smc.run(key, target), lambda x: x.length)

    Args:
        result: `Weighted`, `Draws` or `Chains` of `results`; of chains all draws count.
        f: rows [N, ...] -> [N]; of chains over strings `Sequences`, of others their `draws`.

    Returns:
        [], NaN if all particles are dead.

    Raises:
        ValueError: of a `Choice`, which is no sample.
    """
    rows, log_weights = weighted_rows(result)
    weights = normalise(log_weights)
    # A dead row counts for nothing, whatever f is there.
    total = jnp.sum(jnp.where(weights > 0, weights * f(rows), 0.0))
    return jnp.where(weights.sum() > 0, total, jnp.nan)


def log_z_std_error(log_weights: Float[Array, " N"], roots: Int[Array, " N"]) -> Float[Array, ""]:
    """Standard error of log Z-hat from one run: sqrt( sum_e (sum_{i from e} W_i - 1/N)^2 ).

    `roots` [N] is each particle's ancestor in the first generation; particles with one root are
    dependent, so the weights are summed by root (Chan and Lai 2013).  Without resampling it is the
    usual standard error of an importance sampling estimate.  It saturates at sqrt(1 - 1/N) once a
    single root is left, when it says only "large".  Infinite if all are dead, and for a single
    particle, which knows nothing of its spread.
    """
    num = log_weights.shape[0]
    shares = _summed(roots, normalise(log_weights))
    error = jnp.sqrt(jnp.sum((shares - 1 / num) ** 2)) if num > 1 else jnp.float32(jnp.inf)
    return jnp.where(jnp.isneginf(jnp.max(log_weights)), jnp.inf, error)


def roots(ancestors: Int[Array, "R N"]) -> Int[Array, " N"]:
    """Which slot of the first round each final particle descends from; of
    `History.ancestors`.
    """
    return ancestors[0][trace_back(ancestors)[0]]


def trace_back(ancestors: Int[Array, "R N"]) -> Int[Array, "R N"]:
    """The slots that each last particle's path went through: [r, i] is the slot in round r of the
    ancestor of i.
    """

    def back(slots: Array, row: Array) -> tuple[Array, Array]:
        return row[slots], slots

    last = jnp.arange(ancestors.shape[1], dtype=ancestors.dtype)
    return jax.lax.scan(back, last, ancestors, reverse=True)[1]


def lee_whiteley(
    log_weights: Float[Array, " N"], roots: Int[Array, " N"], num_resamplings: Int[Array, ""]
) -> Float[Array, ""]:
    """Variance of Z-hat / Z from one run, without bias on the scale of Z-hat^2:

        V = 1 - (N / (N - 1))^(R + 1) (1 - sum_e S_e^2),    E[Z-hat^2 V] = Var(Z-hat)

    with S_e the normalised weight of all that descends from slot e of the first round, and R
    resamplings.  Two lineages without a common ancestor are independent, and a multinomial
    resampling keeps a share 1 - 1/N of such pairs; hence the factor, which Chan and Lai's estimate
    (`log_z_std_error`) leaves out.  With resampling by ESS, count the resamplings that happened: as
    each costs its factor in expectation whenever it comes, the estimate stays unbiased, also where
    ancestors are drawn from other probabilities than the weights.  It is for multinomial resampling
    only: schemes that spread their draws have less variance than V says.

    For small V it is the variance of log Z-hat.  It may be negative, and says nothing but "large"
    once few roots are left; `olsson_douc` then does better.  Infinite for a single particle, and if
    all are dead.

    Args:
        log_weights: [N] of the final population.
        roots: [N], from `roots(out.history.ancestors)`.
        num_resamplings: R, `out.trace.resampled.sum()`.

    Lee and Whiteley (arXiv 1509.00394).
    """
    num = log_weights.shape[0]
    shares = _summed(roots, normalise(log_weights))
    known = (num > 1) & (log_weights > -jnp.inf).any()
    return jnp.where(known, _relative_variance(shares, num_resamplings), jnp.inf)


def _relative_variance(
    shares: Float[Array, "*R N"], num_resamplings: Int[Array, "*R"]
) -> Float[Array, "*R"]:
    """1 - c^(R + 1) (1 - sum S^2), as a difference of small numbers."""
    num = shares.shape[-1]
    growth = (num_resamplings + 1) * jnp.log1p(1 / max(num - 1, 1))
    squares = jnp.sum(shares**2, axis=-1)
    return squares - jnp.expm1(growth) * (1 - squares)


def olsson_douc(
    log_weights: Float[Array, "R N"],
    ancestors: Int[Array, "R N"],
    resampled: Bool[Array, " R"],
    rounds: Int[Array, ""],
    *,
    lag: int,
) -> Float[Array, ""]:
    """Variance of log Z-hat from one run, for runs so long that all particles have one root.

        V = sum_p V(p, m) - V(p + 1, m),    m = min(p + lag, last round)

    where V(p, m) is Lee and Whiteley's estimate from the weights of round m, summed by ancestors in
    round p.  The p-th difference is what the draws of round p add to the variance; how they matter
    after `lag` more rounds is taken to be how they matter in the end.  So the lag trades bias (too
    short for what the target remembers) against noise (too few ancestors left); from the length of
    the run on, V is `lee_whiteley`.  Rounds that were not followed by a resampling count with the
    next that was.  On resamplers and triggers as there.

    Args:
        log_weights, ancestors: the `history` of a result.
        resampled: its `trace.resampled`.
        rounds: its number of rounds.
        lag: in rounds, at least 0.

    Returns:
        [], infinite for a single particle, or if all are dead in some round.

    Raises:
        ValueError: if lag < 0.

    The fixed lag is that of Olsson and Douc (arXiv 1701.00002), who estimate the variance of
    filtered means.
    """
    if lag < 0:
        raise ValueError(
            f"expected a lag of at least 0 rounds, got {lag}; how long the target remembers, e.g."
            " 20"
        )
    num_rounds, num = log_weights.shape
    generations, last = jnp.arange(num_rounds, dtype=jnp.int32), rounds - 1
    weights = jax.vmap(normalise)(log_weights)
    num_resamplings = jnp.cumsum(resampled, dtype=jnp.int32)

    def variance(slots: Int[Array, "R N"], m: Int[Array, " R"]) -> Float[Array, " R"]:
        """V(p, m) of every round p, from the ancestors in round p of what lives in round m."""
        shares = jax.vmap(_summed)(slots, weights[m])
        return _relative_variance(shares, num_resamplings[m] - num_resamplings)

    shorter, longer = _lagged(ancestors, rounds, lag)
    whole = variance(longer, jnp.minimum(generations + lag, last))
    after = variance(shorter, jnp.minimum(generations + lag - 1, last))
    gain = jnp.where(jnp.roll(resampled, -1), whole - (jnp.roll(after, -1) if lag else 0.0), 0.0)
    parts = jnp.where(generations < last, gain, whole)
    living = (log_weights > -jnp.inf).any(axis=1) | (generations > last)
    return jnp.where(
        (num > 1) & living.all(), jnp.sum(jnp.where(generations <= last, parts, 0.0)), jnp.inf
    )


def _lagged(
    ancestors: Int[Array, "R N"], rounds: Int[Array, ""], lag: int
) -> tuple[Int[Array, "R N"], Int[Array, "R N"]]:
    """Ancestors in round p of what lives in round p + lag - 1, and of what lives in round p + lag;
    at most in the last round.
    """
    num_rounds = ancestors.shape[0]

    def deeper(d: Array, slots: Array) -> Int[Array, "R N"]:
        """Ancestors in round p of what lives in round p + d + 1, from those of what lives in round
        p + d.
        """
        m = jnp.arange(num_rounds, dtype=jnp.int32) + d + 1
        older = jnp.take_along_axis(slots, ancestors[jnp.minimum(m, num_rounds - 1)], axis=1)
        return jnp.where((m < rounds)[:, None], older, slots)

    start = jnp.broadcast_to(jnp.arange(ancestors.shape[1], dtype=jnp.int32), ancestors.shape)
    shorter = jax.lax.fori_loop(0, max(lag - 1, 0), deeper, start)
    return shorter, deeper(jnp.int32(lag - 1), shorter) if lag else start


def _summed(slots: Int[Array, " N"], weights: Float[Array, " N"]) -> Float[Array, " N"]:
    """The weights of all that has one ancestor, at its slot."""
    return jnp.zeros_like(weights).at[slots].add(weights)
