"""The network of edges: its symmetries, the radius that sees cycles, and its loss against the
posterior over graphs of a world that can be enumerated.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.maps import causal
from experiments.causal_edges import world

KEY = jax.random.key(8)


def some(num, d):
    """Variables that depend on each other, of which each is set in one of the late rows."""
    x = np.random.default_rng(1).normal(size=(num, d)).cumsum(1)
    is_set = np.arange(num)[:, None] - num + 4 == np.arange(d)
    return jnp.asarray(np.stack([x, is_set], 2), jnp.float32)


@pytest.fixture(scope="module")
def network():
    return causal.Network(KEY, 1, 8, 2)


def test_the_order_of_rows_does_not_matter_and_variables_keep_theirs(network):
    logits = jax.jit(lambda data: network(data))
    data = jax.random.normal(KEY, (6, 3, 2), jnp.float32)
    found, order = logits(data), jnp.array([2, 0, 1])
    np.testing.assert_allclose(logits(data[::-1]), found, atol=1e-5)
    np.testing.assert_allclose(logits(data[:, order]), found[order][:, order], atol=1e-5)
    assert np.abs(found - found.T).max() > 1e-3
    assert np.abs(logits(data.at[..., 1].set(0)) - found).max() > 1e-4


def test_the_radius_is_that_of_the_eigenvalues():
    radius = jax.jit(jax.value_and_grad(lambda g: causal.spectral_radius(g, num_iterations=200)))
    rng = np.random.default_rng(0)
    swap = np.array([[0, 0.9], [0.3, 0]])
    ring = np.array([[0, 0.2, 0], [0, 0, 0.5], [0.9, 0, 0]])
    for matrix in (swap, ring, rng.uniform(size=(3, 3)) * (1 - np.eye(3))):
        values, vectors = np.linalg.eig(matrix)
        values = np.real(values)
        best = values.argmax()
        found, slope = radius(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(found, values[best], rtol=1e-4)
        v = np.abs(vectors[:, best])
        u = np.abs(np.linalg.inv(vectors)[best])
        np.testing.assert_allclose(slope, np.outer(u, v) / (u @ v), rtol=1e-3)
    # Without a cycle there is nothing to divide by.
    for matrix in (np.triu(np.ones((3, 3)), 1), np.zeros((2, 2))):
        found, slope = radius(jnp.asarray(matrix, jnp.float32))
        assert found == 0 and not slope.any()


def test_the_generator_sets_what_it_says_and_follows_its_graph():
    sample = causal.LinearGaussian(4, num_observed=200, num_intervened=100)
    data, edges = jax.jit(sample)(KEY)
    x, is_set = data[..., 0], data[..., 1]
    assert not is_set[:200].any() and (is_set[200:].sum(1) == 1).all()
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-4)
    assert edges.any() and not np.trace(np.linalg.matrix_power(np.eye(4) + edges, 4) - np.eye(4))
    weights = jnp.array([[0, 2.0, -1.0], [0, 0, 3.0], [0, 0, 0]])
    rows, _ = causal.propagated(
        weights, jnp.ones((2, 3)), jnp.array([[0, 0, 0], [0, 1, 0]], bool), jnp.full((2, 3), 7.0)
    )
    np.testing.assert_allclose(rows, [[1, 3, 9], [1, 7, 21]])


def test_the_loss_over_the_posterior_is_the_cross_entropy_of_the_marginals(network):
    data = some(9, 3)
    graphs, law = world.graphs(3), world.posterior(np.asarray(data))
    assert abs(law.sum() - 1) < 1e-12
    rows = jnp.broadcast_to(data, (1, *data.shape))

    @jax.jit
    def losses(edges, dual):
        return causal.edge_loss(network, KEY, causal.Graphs(rows, edges[None], dual))

    each = jnp.stack([losses(edges, jnp.float32(0))[0] for edges in jnp.asarray(graphs)])
    q, p = np.asarray(jax.nn.sigmoid(network(data)), np.float64), world.marginals(np.asarray(data))
    off = ~np.eye(3, dtype=bool)
    truth = -(p * np.log(q) + (1 - p) * np.log1p(-q))[off].mean()
    np.testing.assert_allclose(each @ law, truth, rtol=1e-5)
    value, metrics = losses(jnp.asarray(graphs[3]), jnp.float32(2))
    np.testing.assert_allclose(value, metrics["log_loss"] + 2 * metrics["radius"], rtol=1e-6)
    matrix = np.where(off, q, 0)
    assert abs(metrics["radius"] - np.abs(np.linalg.eigvals(matrix)).max()) < 2e-2


def test_the_dual_rises_with_the_cycles():
    def sample(key):
        return jax.random.normal(key, (3, 2, 2)), jnp.zeros((2, 2), bool)

    options = {"num_blocks": 1, "width": 8, "batch_size": 2}
    training = causal.training(KEY, sample, **options, dual_rate=0.5, decay=0.5)
    draw = eqx.filter_jit(training.draw)
    batch, dual = draw(KEY, training.params, training.data)
    radius = eqx.filter_jit(causal.edge_loss)(training.params, KEY, batch)[1]["radius"]
    np.testing.assert_allclose(dual.radius, radius / 2, rtol=1e-4)
    np.testing.assert_allclose(dual.weight, radius / 4, rtol=1e-4)
    again, _ = draw(KEY, training.params, dual)
    assert again.dual > dual.weight == batch.dual


def test_bad_input():
    sample = world.World(2, 3, 0)
    with pytest.raises(ValueError, match="3 heads share evenly, got 8"):
        causal.training(KEY, sample, width=8, num_heads=3)
    with pytest.raises(ValueError, match=r"\[N, D, 2\].*got \(3, 2\) and \(2, 2\)"):
        causal.training(KEY, lambda key: (sample(key)[0][..., 0], sample(key)[1]))
