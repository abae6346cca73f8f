"""Simple likelihood, complex posterior: four points of a Gaussian in the plane, whose five
parameters are its mean, roots of its scales, and the arctanh of its correlation.

    s1 = theta_3^2,  s2 = theta_4^2,  rho = tanh(theta_5)

There are four modes, by the signs of theta_3 and theta_4.
With distractors the eight numbers are hidden among 92 that say nothing, heavy-tailed noise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .task import Task, latent

NUM_POINTS, BOUND, JITTER = 4, 3.0, 1e-6
NUM_NOISE, NUM_PARTS, SEED = 92, 20, 42


def points(theta: Float[Array, "*B 5"]) -> dist.Distribution:
    """The law of the four points, as eight numbers."""
    first, second = jnp.square(theta[..., 2]), jnp.square(theta[..., 3])
    correlation = jnp.tanh(theta[..., 4])
    apart = 1 / jnp.square(jnp.cosh(theta[..., 4]))  # 1 - rho^2 without a cancellation
    # The Cholesky factor of [[s1^2 + e, rho s1 s2], [., s2^2 + e]].
    variance = jnp.square(first) + JITTER
    corner = jnp.sqrt(variance)
    rest = jnp.square(second) * (jnp.square(first) * apart + JITTER) / variance + JITTER
    rows = [
        jnp.stack([corner, jnp.zeros_like(corner)], -1),
        jnp.stack([correlation * first * second / corner, jnp.sqrt(rest)], -1),
    ]
    law = dist.MultivariateNormal(
        theta[..., None, :2], scale_tril=jnp.stack(rows, -2)[..., None, :, :]
    )
    law = law.expand((*theta.shape[:-1], NUM_POINTS)).to_event(1)
    flat = dist.transforms.ReshapeTransform((2 * NUM_POINTS,), (NUM_POINTS, 2))
    return dist.TransformedDistribution(law, flat)


class Noise(NamedTuple):
    """A mixture of multivariate Student laws with two degrees of freedom, and where what goes."""

    loc: Float[np.ndarray, "20 92"]
    scale_tril: Float[np.ndarray, "20 92 92"]
    order: Int[np.ndarray, " 100"]


@functools.cache
def noise() -> Noise:
    """From the benchmark's recipe: NumPy's legacy generator at its seed, whose stream never
    changes.
    """
    rng = np.random.RandomState(SEED)
    loc = np.array([15 * rng.normal(size=NUM_NOISE) for _ in range(NUM_PARTS)])
    tril = [
        np.tril(rng.normal(size=(NUM_NOISE, NUM_NOISE)))
        + np.diag(np.exp(rng.normal(size=NUM_NOISE)))
        for _ in range(NUM_PARTS)
    ]
    order = rng.permutation(NUM_NOISE + 2 * NUM_POINTS)
    return Noise(loc.astype(np.float32), 3 * np.array(tril, np.float32), order)


class Distracted(dist.Distribution):
    """The points and the noise, in the fixed order.

    `log_prob` is that of the points: what the noise adds does not depend on theta, and cannot be
    had, for the condition numbers of its scales are 1e12 to 5e18 and their diagonals have negative
    entries.
    """

    arg_constraints = {"theta": dist.constraints.real_vector}
    support = dist.constraints.real_vector  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("theta",)

    def __init__(self, theta: Float[Array, "*B 5"], *, validate_args: bool | None = None) -> None:
        self.theta = theta
        event = (NUM_NOISE + 2 * NUM_POINTS,)
        super().__init__(jnp.shape(theta)[:-1], event, validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        keys = jax.random.split(key, 4)
        found = points(self.theta).sample(keys[0], sample_shape)
        shape, law = (*sample_shape, *self.batch_shape), noise()
        part = jax.random.randint(keys[1], shape, 0, NUM_PARTS)
        normal = jax.random.normal(keys[2], (*shape, NUM_NOISE))
        # A chi-squared variable with two degrees of freedom over two.
        student = normal / jnp.sqrt(jax.random.exponential(keys[3], (*shape, 1)))
        loc, scale_tril = jnp.asarray(law.loc), jnp.asarray(law.scale_tril)

        def add(i: Array, value: Array) -> Array:
            """One product of matrices for all rows, in the place of a matrix for each."""
            return jnp.where((part == i)[..., None], loc[i] + student @ scale_tril[i].T, value)

        value = jax.lax.fori_loop(0, NUM_PARTS, add, jnp.zeros_like(student))
        return jnp.concatenate([found, value], -1)[..., law.order]

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        places = np.argsort(noise().order)[: 2 * NUM_POINTS]
        return jnp.asarray(points(self.theta).log_prob(value[..., places]))


def prior() -> dist.Distribution:
    return dist.Uniform(-BOUND, BOUND).expand([5]).to_event(1)


def slcp() -> None:
    numpyro.sample("x", points(latent(prior())))


def distractors() -> None:
    numpyro.sample("x", Distracted(latent(prior())))


SLCP = Task(
    name="slcp",
    model=slcp,
    dim_theta=5,
    dim_x=8,
    prior="U(-3, 3)",
    simulator="four points of N(m, S)",
)
SLCP_DISTRACTORS = Task(
    name="slcp_distractors",
    model=distractors,
    dim_theta=5,
    dim_x=100,
    prior="U(-3, 3)",
    simulator="the same and 92 of noise",
    density="but for the noise",
    folder="slcp",
    file="observation_distractors.csv",
)
