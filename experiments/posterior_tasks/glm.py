"""A Bernoulli GLM: spikes of a neuron driven by white noise through a filter of nine steps.

    y_t ~ Bernoulli(sigmoid(X_t theta)),   t = 1 .. 100,   X_t = (1, I_t, I_t-1, ..., I_t-8)

The prior N(0, B^-1) on an offset and the filter wants the filter smooth.  Observed is y itself
(raw), or its sufficient statistic X^T y: how many spikes, and their correlations with the stimulus.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from .task import Task, latent

NUM_BINS, NUM_LAGS, SEED = 100, 9, 42


@functools.cache
def design() -> Float[np.ndarray, "100 10"]:
    """X, from the benchmark's recipe for the stimulus: NumPy's legacy generator at its seed, whose
    stream never changes.
    """
    stimulus = np.random.RandomState(SEED).randn(NUM_BINS).astype(np.float32)
    lags = [np.pad(stimulus, (lag, 0))[:NUM_BINS] for lag in range(NUM_LAGS)]
    return np.stack([np.ones_like(stimulus), *lags], 1)


@functools.cache
def precision() -> Float[np.ndarray, "10 10"]:
    """B: 1/2 for the offset, F^T F for the filter, where F takes second differences."""
    difference = np.eye(NUM_LAGS) - np.eye(NUM_LAGS, k=-1)
    smooth = difference @ difference + np.diag(np.sqrt(np.arange(NUM_LAGS) / NUM_LAGS))
    found = np.zeros((NUM_LAGS + 1, NUM_LAGS + 1))
    found[0, 0], found[1:, 1:] = 0.5, smooth.T @ smooth
    return found.astype(np.float32)


class Statistic(dist.Distribution):
    """X^T y for Bernoulli spikes y with logits X theta.

    No two spike trains have the same statistic (but for a null set of stimuli), so that its
    log-probability is that of the train: theta . X^T y - sum_t log(1 + exp(X_t theta)).
    """

    arg_constraints = {"theta": dist.constraints.real_vector}
    support = dist.constraints.real_vector  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("theta",)

    def __init__(self, theta: Float[Array, "*B 10"], *, validate_args: bool | None = None) -> None:
        self.theta = theta
        super().__init__(jnp.shape(theta)[:-1], jnp.shape(theta)[-1:], validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        logits = self.theta @ design().T
        shape = (*sample_shape, *logits.shape)
        spikes = jax.random.uniform(key, shape) < jax.nn.sigmoid(logits)
        return spikes.astype(logits.dtype) @ design()

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        return (self.theta * value).sum(-1) - jax.nn.softplus(self.theta @ design().T).sum(-1)


def prior() -> dist.Distribution:
    return dist.MultivariateNormal(jnp.zeros(NUM_LAGS + 1), precision_matrix=precision())


def glm() -> None:
    numpyro.sample("x", Statistic(latent(prior())))


def raw() -> None:
    numpyro.sample("x", dist.Bernoulli(logits=latent(prior()) @ design().T).to_event(1))


BERNOULLI_GLM = Task(
    name="bernoulli_glm",
    model=glm,
    dim_theta=10,
    dim_x=10,
    prior="N(0, B^-1), smooth",
    simulator="X^T y of 100 spikes",
    density="mass of x",
)
BERNOULLI_GLM_RAW = Task(
    name="bernoulli_glm_raw",
    model=raw,
    dim_theta=10,
    dim_x=100,
    prior="N(0, B^-1), smooth",
    simulator="100 spikes y",
    density="mass of x",
    folder="bernoulli_glm",
    file="observation_raw.csv",
)
