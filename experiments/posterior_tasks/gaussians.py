"""Three tasks with a posterior in closed form: Gaussian noise around theta.

gaussian_linear          N(x / 2, 0.05 I)
gaussian_linear_uniform  N(x, 0.1 I) within the box
gaussian_mixture         N(x, I) / 2 + N(x, 0.01 I) / 2 within the box
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from .task import Task, latent

VARIANCE = 0.1
"""Of the prior and of the noise."""
SCALES = (1.0, 0.1)
"""Of the two components of the mixture."""
BOUND = 10.0


def linear() -> None:
    scale = VARIANCE**0.5
    theta = latent(dist.Normal(0.0, scale).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, scale).to_event(1))


def linear_uniform() -> None:
    theta = latent(dist.Uniform(-1.0, 1.0).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, VARIANCE**0.5).to_event(1))


def mixture() -> None:
    theta = latent(dist.Uniform(-BOUND, BOUND).expand([2]).to_event(1))
    parts = dist.Normal(theta[..., None, :], jnp.array(SCALES)[:, None]).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), parts))


GAUSSIAN_LINEAR = Task(
    name="gaussian_linear",
    model=linear,
    dim_theta=10,
    dim_x=10,
    prior="N(0, 0.1 I)",
    simulator="N(theta, 0.1 I)",
)
GAUSSIAN_LINEAR_UNIFORM = Task(
    name="gaussian_linear_uniform",
    model=linear_uniform,
    dim_theta=10,
    dim_x=10,
    prior="U(-1, 1)",
    simulator="N(theta, 0.1 I)",
)
GAUSSIAN_MIXTURE = Task(
    name="gaussian_mixture",
    model=mixture,
    dim_theta=2,
    dim_x=2,
    prior="U(-10, 10)",
    simulator="N(theta, I) or N(theta, 0.01 I)",
)
