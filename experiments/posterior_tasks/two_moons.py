"""Two moons: a crescent around a point that two parameters out of two corners share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from .task import Task, latent

RADIUS, WIDTH, OFFSET = 0.1, 0.01, 0.25


class Crescent(dist.Distribution):
    """center + r (cos a, sin a) with r ~ N(0.1, 0.01^2) and a ~ U(-pi/2, pi/2).

    In the plane its density is N(r; 0.1, 0.01^2) / (pi r) to the right of the center and zero to
    its left: polar coordinates have the Jacobian r, which the benchmark's own density (never used
    for its reference draws) has not.
    """

    arg_constraints = {"center": dist.constraints.real_vector}
    support = dist.constraints.real_vector  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("center",)

    def __init__(self, center: Float[Array, "*B 2"], *, validate_args: bool | None = None) -> None:
        self.center = center
        super().__init__(jnp.shape(center)[:-1], (2,), validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        angle_key, radius_key = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        bound = math.pi / 2
        angle = jax.random.uniform(angle_key, shape, minval=-bound, maxval=bound)
        radius = RADIUS + WIDTH * jax.random.normal(radius_key, shape)
        return self.center + radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        point = value - self.center
        right = point[..., 0] > 0
        # Where the density is zero its gradient is too, not NaN.
        radius = jnp.sqrt(jnp.where(right, jnp.square(point).sum(-1), RADIUS**2))
        inside = dist.Normal(RADIUS, WIDTH).log_prob(radius) - jnp.log(math.pi * radius)
        return jnp.where(right, inside, -jnp.inf)


def center(theta: Float[Array, "*B 2"]) -> Float[Array, "*B 2"]:
    """Of the crescent; the same for (a, b) and (-b, -a)."""
    first, second = theta[..., 0], theta[..., 1]
    half = math.sqrt(0.5)
    return jnp.stack([OFFSET - half * jnp.abs(first + second), half * (second - first)], -1)


def two_moons() -> None:
    theta = latent(dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("x", Crescent(center(theta)))


def _right(theta: Float[Array, " 2"], x: Float[Array, " 2"]) -> Float[Array, ""]:
    """How far x is to the right of the center: the moons end at zero."""
    return x[0] - center(theta)[0]


TWO_MOONS = Task(
    name="two_moons",
    model=two_moons,
    dim_theta=2,
    dim_x=2,
    prior="U(-1, 1)",
    simulator="a crescent",
    edge=_right,
)
