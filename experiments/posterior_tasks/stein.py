"""Are draws from a posterior those of a model?  Stein's identity, exact and cheap.

For a density p that is smooth and vanishes at infinity, its score s = grad log p, and any function
f that grows slowly and is zero where p jumps,

    E_p[ f(z) s_j(z) + d f / d z_j ] = 0     for every j

The functions are 1, which sees where p is, and the coordinates, standardised, which see how wide it
is and how coordinates go together.  All of it is in the unconstrained space of the prior, in which
no boundary of a support is left.  A model with another noise, prior or Jacobian than that of the
draws breaks it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro import handlers
from numpyro.distributions import biject_to

from samplers.latent import posterior

from .task import Task

BATCH = 500


def z_scores(
    task: Task, x: Float[Array | np.ndarray, " K"], theta: Float[Array | np.ndarray, "S D"]
) -> Float[np.ndarray, "1+D D"]:
    """Mean over standard error of every identity, for draws theta from the posterior of x.

    Row 0 is of f = 1, row i of coordinate i; column j of the derivative by z_j.

    Raises:
        ValueError: if a draw is outside of the prior's support, or has no density.
    """
    inside, log_density, found = jax.device_get(_terms(task, jnp.asarray(x), jnp.asarray(theta)))
    terms = found.astype(np.float64)
    if not inside.all():
        raise ValueError(
            f"expected draws in the support of the prior of {task.name}, got"
            f" {(~inside).sum()} of {len(inside)} outside"
        )
    lost = ~(np.isfinite(log_density) & np.isfinite(terms).all((1, 2)))
    if lost.any():
        raise ValueError(
            f"expected draws at which {task.name} has a density and a score, got"
            f" {lost.sum()} of {len(lost)} without"
        )
    return terms.mean(0) / (terms.std(0, ddof=1) / math.sqrt(len(terms)))


def p_value(z: Float[np.ndarray, "..."]) -> float:
    """Of the greatest |z|, with a correction for their number (Bonferroni)."""
    return min(1.0, z.size * math.erfc(float(np.abs(z).max()) / math.sqrt(2)))


@functools.partial(jax.jit, static_argnums=0)
def _terms(
    task: Task, x: Float[Array, " K"], theta: Float[Array, "S D"]
) -> tuple[Bool[Array, " S"], Float[Array, " S"], Float[Array, "S 1+D D"]]:
    """Which draws are in the support; log p; and what has mean zero: w (f s_j + d f / d z_j) +
    f d w / d z_j, where w is the task's edge.
    """
    z = biject_to(task.support).inv(theta)
    density = posterior.density(handlers.condition(task.model, {"x": x}))
    center, scale = z.mean(0), z.std(0)
    # d f_i / d z_j
    slope = jnp.concatenate([jnp.zeros((1, task.dim_theta)), jnp.diag(1 / scale)])

    def edge(position: Float[Array, " D"]) -> Array:
        if task.edge is None:
            return jnp.ones((), position.dtype)
        return task.edge(density.constrain(position)["theta"], x)

    def of(position: Float[Array, " D"]) -> tuple[Array, Array]:
        log_density, score = jax.value_and_grad(density.at(jnp.ones(())))(position)
        f = jnp.concatenate([jnp.ones(1), (position - center) / scale])
        weight, bend = jax.value_and_grad(edge)(position)
        return log_density, f[:, None] * (weight * score + bend) + weight * slope

    # Backwards: forwards, jit of a triangular solve is wrong beyond 32,768 numbers (jaxlib 0.10 on
    # CPUs).  In batches, for a solver that is derived backwards keeps every step of every row.
    return jnp.asarray(task.support(theta)), *jax.lax.map(of, z, batch_size=BATCH)
