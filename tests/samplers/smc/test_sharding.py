"""Four devices: where the arrays lie changes nothing about a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import models
import ppl
from samplers import resampling, smc
from samplers.results import Weighted
from samplers.smc import sequential
from samplers.strings import proposals, selection
from tests.experiments import tiny
from tests.samplers.problems import second, target_of

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]), ("particles",))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def assert_same(a: Weighted, b: Weighted) -> None:
    """The same strings and ancestors, and log_z within 1e-4."""
    np.testing.assert_array_equal(a.sequences.tokens, b.sequences.tokens)
    np.testing.assert_array_equal(a.trace.resampled, b.trace.resampled)
    assert a.trace.resampled.any()
    if a.history is not None and b.history is not None:
        np.testing.assert_array_equal(a.history.ancestors, b.history.ancestors)
        np.testing.assert_array_equal(a.history.drawn, b.history.drawn)
    np.testing.assert_allclose(a.log_weights, b.log_weights, atol=1e-4)
    np.testing.assert_allclose(a.log_z, b.log_z, atol=1e-4)


def tabular() -> Any:
    return target_of("table", "every_1")


@pytest.mark.parametrize(
    "options",
    [
        slow({}),
        slow({"resampler": resampling.residual, "steps": ppl.Steps(delimiters=[3, 2])}),
        slow(
            {
                "selection": selection.next_token,
                "proposal": proposals.LanguageModel(second(tabular())),
            }
        ),
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_a_tabular_run_on_four_devices(mesh: Mesh, options: dict[str, Any]):
    key, run = (
        jax.random.key(0),
        {"num_particles": 16, "threshold": 0.9, "history": True, **options},
    )
    assert_same(smc.run(key, tabular(), mesh=mesh, **run), smc.run(key, tabular(), **run))


def test_rows_lie_on_all_devices(mesh: Mesh):
    """From the first round to the last, and a quarter on each."""
    target = tabular()
    how = smc.method(target, num_particles=16, threshold=1.1, mesh=mesh)
    run = jax.jit(lambda: smc.init(target, how, 16))()
    for one, key in zip(
        (sequential.first, smc.step), jax.random.split(jax.random.key(2), 2), strict=True
    ):
        run = jax.jit(one)(key, target, run, how)
        for leaf in jax.tree.leaves((run.particles.state.cache, run.particles.state.sequences)):
            assert leaf.sharding.device_set == set(mesh.devices.flat)
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {4}


@pytest.mark.slow
def test_a_transformer_on_four_devices(mesh: Mesh, tmp_path: Path):
    lm, _ = models.load(tiny.write(tmp_path / "model"))
    score = ppl.reward(lambda tokens, length: 0.2 * (tokens % 3 == 1).sum(1))
    target = lm.given([5, 9, 2, 7], max_tokens=12) ** 1.5 * score
    key, run = (
        jax.random.key(3),
        {"num_particles": 16, "threshold": 0.95, "history": True},
    )
    assert_same(smc.run(key, target, mesh=mesh, **run), smc.run(key, target, **run))


@pytest.mark.slow
def test_a_target_on_four_devices_gives_the_same_run(mesh: Mesh):
    """Weights, prompt and key replicated over the mesh."""
    key, everywhere = jax.random.key(0), NamedSharding(mesh, PartitionSpec())
    options = {"num_particles": 6, "threshold": 0.9, "history": True}
    out = smc.run(*jax.device_put((key, tabular()), everywhere), **options)
    assert len(out.log_weights.sharding.device_set) == 4
    assert_same(out, smc.run(key, tabular(), **options))


@pytest.mark.slow
def test_replicas_split_over_four_devices(mesh: Mesh):
    """Eight runs in one vmap, two on each device."""
    keys, split = (
        jax.random.split(jax.random.key(1), 8),
        NamedSharding(mesh, PartitionSpec("particles")),
    )
    runs = jax.jit(jax.vmap(lambda key: smc.run(key, tabular(), num_particles=6, threshold=0.9)))
    out = runs(jax.device_put(keys, split))
    assert out.log_z.sharding.is_equivalent_to(split, 1)
    assert_same(out, runs(keys))


def test_a_fault_is_seen(mesh: Mesh):
    """Another key gives other strings: what is compared can differ."""
    run = {"num_particles": 16, "threshold": 0.9, "history": True}
    a = smc.run(jax.random.key(0), tabular(), **run)
    with pytest.raises(AssertionError):
        assert_same(a, smc.run(jax.random.key(1), tabular(), **run))
    assert dataclasses.replace(a, log_z=a.log_z + 1e-3).log_z != a.log_z and jnp.isfinite(a.log_z)
