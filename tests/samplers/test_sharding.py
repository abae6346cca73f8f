"""Two devices: where the arrays lie changes nothing about a run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samplers import smc
from tests.samplers.problems import target_of

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.sequences.tokens, b.sequences.tokens)
    np.testing.assert_array_equal(a.trace.resampled, b.trace.resampled)
    np.testing.assert_allclose(a.log_weights, b.log_weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a.log_z, b.log_z, rtol=1e-5)


def test_a_target_on_two_devices_gives_the_same_run(mesh: Mesh):
    """Weights, prompt and key replicated over the mesh."""
    target, key = target_of("table", "every_1"), jax.random.key(0)
    everywhere = NamedSharding(mesh, PartitionSpec())
    options = {"num_particles": 6, "threshold": 0.9, "history": True}
    out = smc.run(*jax.device_put((key, target), everywhere), **options)
    assert len(out.log_weights.sharding.device_set) == 2
    assert_same(out, smc.run(key, target, **options))


@pytest.mark.slow
def test_replicas_split_over_two_devices(mesh: Mesh):
    """Eight runs in one vmap, four on each device."""
    target, keys = target_of("table", "every_1"), jax.random.split(jax.random.key(1), 8)
    split = NamedSharding(mesh, PartitionSpec("data"))
    runs = jax.jit(jax.vmap(lambda key: smc.run(key, target, num_particles=6)))
    out = runs(jax.device_put(keys, split))
    assert out.log_z.sharding.is_equivalent_to(split, 1)
    assert_same(out, runs(keys))


@pytest.mark.slow
def test_particles_split_over_two_devices(mesh: Mesh):
    """One population whose rows lie on both devices from its first step on: resampling crosses between them."""
    target, keys = target_of("table", "every_1"), jax.random.split(jax.random.key(2), 4)
    split = NamedSharding(mesh, PartitionSpec("data"))

    def place(leaf: Any) -> Any:
        rows = jnp.ndim(leaf) and leaf.shape[0] == 6
        return jax.device_put(leaf, split if rows else NamedSharding(mesh, PartitionSpec()))

    how = smc.method(target, num_particles=6, threshold=1.1)

    def run(carry: Any) -> Any:
        for t, key in enumerate(keys):
            carry = jax.jit(smc.step, static_argnames="first")(key, target, carry, how, first=t == 0)
        return carry

    start = smc.init(target, how, 6)
    out = run(jax.tree.map(place, start))
    assert out.particles.log_weights.sharding.device_set == set(mesh.devices.flat)
    assert_same(smc.result(out), smc.result(run(start)))
