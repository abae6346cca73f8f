"""Energies whose constant is known, and exact draws of them.

| energy | D | log Z |
| --- | --- | --- |
| `25GMM` | 2 | 0: 25 Gaussians of variance 0.3 on the grid {-10, -5, 0, 5, 10}^2 |
| `funnel` | 10 | 0: x_0 ~ N(0, 1), the others N(0, e^x_0) |
| `ManyWell` | 32 | 164.69568: 16 pairs of a double well and a Gaussian, 65,536 modes |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

CENTRES = jnp.stack(jnp.meshgrid(*[jnp.linspace(-10.0, 10.0, 5)] * 2), axis=-1).reshape(25, 2)
VARIANCE = 0.3
PAIRS = 16
LOG_Z_WELL = math.log(11784.50927)
"""Of exp(-x^4 + 6 x^2 + x / 2)."""


@dataclasses.dataclass(frozen=True)
class Energy:
    """log R of a point [D], its constant, exact draws, and about the variance of a coordinate."""

    dim: int
    log_density: Callable[[Float[Array, " D"]], Float[Array, ""]]
    log_z: float
    draw: Callable[[PRNGKeyArray, int], Float[Array, "N D"]]
    variance: float


def _mixture(x: Float[Array, " 2"]) -> Float[Array, ""]:
    square = ((x - CENTRES) ** 2).sum(axis=1)
    return jax.nn.logsumexp(-0.5 * square / VARIANCE) - jnp.log(2 * jnp.pi * VARIANCE * 25)


def _draw_mixture(key: PRNGKeyArray, num: int) -> Float[Array, "N 2"]:
    first, second = jax.random.split(key)
    centre = jax.random.randint(first, (num,), 0, 25)
    return CENTRES[centre] + VARIANCE**0.5 * jax.random.normal(second, (num, 2))


def modes(x: Float[Array, "N 2"]) -> Float[Array, " 25"]:
    """The share of points of `25GMM` in each of its modes, within three standard deviations."""
    square = ((x[:, None] - CENTRES) ** 2).sum(axis=2)
    return (square < 9 * VARIANCE).mean(axis=0)


def _funnel(x: Float[Array, " 10"]) -> Float[Array, ""]:
    neck, rest = x[0], x[1:]
    first = -0.5 * (neck**2 + jnp.log(2 * jnp.pi))
    others = -0.5 * ((rest**2).sum() * jnp.exp(-neck) + len(rest) * (neck + jnp.log(2 * jnp.pi)))
    return first + others


def _draw_funnel(key: PRNGKeyArray, num: int) -> Float[Array, "N 10"]:
    x = jax.random.normal(key, (num, 10))
    return jnp.concatenate([x[:, :1], x[:, 1:] * jnp.exp(0.5 * x[:, :1])], axis=1)


def _wells(x: Float[Array, " 32"]) -> Float[Array, ""]:
    wells, flat = x[0::2], x[1::2]
    return (-(wells**4) + 6 * wells**2 + 0.5 * wells - 0.5 * flat**2).sum()


def _draw_wells(key: PRNGKeyArray, num: int) -> Float[Array, "N 32"]:
    """The wells by inversion on a fine grid."""
    first, second = jax.random.split(key)
    grid = jnp.linspace(-4.0, 4.0, 20_001)
    cdf = jnp.cumsum(jnp.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid - LOG_Z_WELL))
    u = jax.random.uniform(first, (num, PAIRS)) * cdf[-1]
    wells = jnp.interp(u, cdf, grid)
    flat = jax.random.normal(second, (num, PAIRS))
    return jnp.stack([wells, flat], axis=-1).reshape(num, 2 * PAIRS)


ENERGIES = {
    "25GMM": Energy(2, _mixture, 0.0, _draw_mixture, variance=50.0),
    "funnel": Energy(10, _funnel, 0.0, _draw_funnel, variance=1.0),
    "ManyWell": Energy(
        2 * PAIRS,
        _wells,
        PAIRS * (LOG_Z_WELL + 0.5 * math.log(2 * math.pi)),
        _draw_wells,
        variance=3.0,
    ),
}
