"""How good a weighted population is."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ess(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """Effective sample size 1 / sum_i W_i^2 of normalised weights W, in [1, N]; 0 if all particles are dead."""
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
            f"expected the log-weights [N] of one population, got shape {log_weights.shape}; use jax.vmap for several"
        )
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isneginf(top), 0.0, top))
    return weights / jnp.where(jnp.isneginf(top), 1.0, jnp.sum(weights))


def log_z_std_error(log_weights: Float[Array, " N"], roots: Int[Array, " N"]) -> Float[Array, ""]:
    """Standard error of log Z-hat from one run: sqrt( sum_e (sum_{i from e} W_i - 1/N)^2 ).

    `roots` [N] is each particle's ancestor in the first generation; particles with one root are dependent, so the
    weights are summed by root (Chan and Lai 2013).  Without resampling it is the usual standard error of an importance
    sampling estimate.  It saturates at sqrt(1 - 1/N) once a single root is left, when it says only "large".  Infinite
    if all are dead, and for a single particle, which knows nothing of its spread.
    """
    num = log_weights.shape[0]
    shares = jnp.zeros(num).at[roots].add(normalise(log_weights))
    error = jnp.sqrt(jnp.sum((shares - 1 / num) ** 2)) if num > 1 else jnp.float32(jnp.inf)
    return jnp.where(jnp.isneginf(jnp.max(log_weights)), jnp.inf, error)
