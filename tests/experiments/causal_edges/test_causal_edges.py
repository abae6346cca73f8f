"""The world of causal edges is what its score says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.causal_edges import world
from experiments.causal_edges.__main__ import Config, measured

KEY = jax.random.key(8)


def test_the_score_is_the_evidence_of_the_prior_and_knows_no_direction():
    assert [len(world.graphs(d)) for d in (1, 2, 3)] == [1, 3, 25]
    x = np.random.default_rng(1).normal(size=(9, 2)).cumsum(1)
    is_set = np.arange(9)[:, None] - 5 == np.arange(2)
    rows = np.stack([x, is_set], 2)
    none, there, back = np.zeros((2, 2), bool), np.eye(2, k=1) > 0, np.eye(2, k=-1) > 0
    seen = rows[:5]
    assert abs(world.score(seen, there) - world.score(seen, back)) < 1e-10
    assert abs(world.score(rows, there) - world.score(rows, back)) > 1e-3
    # Over parameters drawn from the prior, of three rows.
    keys = jax.random.split(KEY, 100_000)
    x = seen[:3, :, 0]
    alone = world.log_evidence(x[:, :1])
    for parents, graph in ((jnp.array([True, False]), there), (jnp.zeros(2, bool), none)):
        drawn = jax.jit(jax.vmap(lambda k, p=parents: world.parameters(k, p, jnp.int32(1))))(keys)
        weights, bias, sd = (np.asarray(leaf, np.float64) for leaf in drawn)
        z = (x[:, 1, None] - bias - x @ weights.T) / sd
        density = (np.exp(-(z**2) / 2) / sd / (2 * np.pi) ** 0.5).prod(0)
        truth = np.exp(world.score(seen[:3], graph) - alone)
        assert abs(density.mean() - truth) < 5 * density.std() / len(keys) ** 0.5


@pytest.mark.slow
@pytest.mark.optimised
def test_a_network_that_saw_interventions_tells_directions_apart():
    found = measured(Config(num_steps=2_000, num_data=100), 2, 16)
    assert found.exact_asymmetry > 0.5
    assert found.asymmetry > 0.8 * found.exact_asymmetry
    assert found.excess < 0.1, "nats for each edge"
