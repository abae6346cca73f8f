"""Stein's identities hold for draws from the posterior of a model, and for no other's."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array

from experiments.posterior_tasks import TASKS, stein, two_moons
from experiments.posterior_tasks.task import Task

NUM = 10_000


def bounded(scale: float) -> Task:
    """theta ~ U(-1, 2), x ~ N(theta, scale^2)."""

    def model() -> None:
        theta = numpyro.sample("theta", dist.Uniform(-1.0, 2.0).expand([1]).to_event(1))
        numpyro.sample("x", dist.Normal(theta, scale).to_event(1))

    return Task("bounded", model, 1, 1, "", "")


BOUNDED = bounded(0.3)


def truncated() -> tuple[np.ndarray, np.ndarray]:
    """x, and draws from its posterior, which the lower bound cuts."""
    x = np.array([-0.9], np.float32)
    draws = np.random.default_rng(0).normal(x, 0.3, (3 * NUM, 1))
    return x, draws[draws > -1][:NUM, None].astype(np.float32)


def moons(num: int = NUM) -> tuple[np.ndarray, np.ndarray]:
    """x, and draws from its posterior, by turning a crescent around: exact, for the box cuts
    none.
    """
    x = jnp.array([-0.2, 0.1])
    shift = x - two_moons.Crescent(jnp.array([0.25, 0.0])).sample(jax.random.key(0), (num,))
    sign = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (num,)), 1, -1)
    along, across = -sign * shift[:, 0], shift[:, 1]
    theta = jnp.stack([along - across, along + across], 1) * math.sqrt(0.5)
    return np.asarray(x), np.asarray(theta)


def worst(task: Task, x: np.ndarray, theta: np.ndarray) -> float:
    return float(np.abs(stein.z_scores(task, x, theta)).max())


def test_draws_cut_by_a_bound_are_of_their_model_and_of_no_other():
    x, theta = truncated()
    assert worst(BOUNDED, x, theta) < 4.5
    assert worst(bounded(0.32), x, theta) > 5


def bare_moons() -> None:
    """Two moons as the benchmark's own density has them."""

    class Bare(two_moons.Crescent):
        def log_prob(self, value: Array, intermediates: None = None) -> Array:
            radius = jnp.linalg.norm(value - self.center, axis=-1)
            return super().log_prob(value) + jnp.log(radius)

    theta = numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("x", Bare(two_moons.center(theta)))


@pytest.mark.slow
def test_moons_need_their_jacobian_and_their_edge():
    x, theta = moons()
    task = TASKS["two_moons"]
    assert worst(task, x, theta) < 4.5
    assert worst(dataclasses.replace(task, model=bare_moons), x, theta) > 5
    assert worst(dataclasses.replace(task, edge=None), x, theta) > 5


def test_draws_without_a_density_are_refused():
    x, theta = truncated()
    with pytest.raises(ValueError, match="support of the prior of bounded, got 1 of 10000 outside"):
        stein.z_scores(BOUNDED, x, np.r_[theta[1:], [[-1.5]]].astype(np.float32))
    with pytest.raises(ValueError, match="bounded has a density and a score, got 10000 of 10000"):
        stein.z_scores(BOUNDED, np.full_like(x, np.nan), theta)


def test_a_p_value_knows_how_many_there_are():
    z = np.array([0.1, -3.0])
    assert stein.p_value(z) == pytest.approx(2 * 0.0026998, rel=1e-3)
    assert stein.p_value(np.zeros((3, 4))) == 1.0
