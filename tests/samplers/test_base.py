"""Particles, moves and resampling as data: nothing is lost when evidence is banked, weights move or
rows are taken.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import base, resampling
from samplers.base import Cost, Move, Particles
from tests.samplers.problems import applied

WEIGHTS = jnp.array([-1.0, 0.5, -jnp.inf, 2.0])


def population(log_weights: Any = WEIGHTS, log_z: float = 0.7) -> Particles:
    num = log_weights.shape[0]
    return Particles(
        {"x": jnp.arange(num), "rows": jnp.arange(2.0 * num).reshape(num, 2)},
        log_weights,
        jnp.float32(log_z),
    )


def evidence(p: Particles) -> float:
    """log of exp(log_z) mean_i exp(w_i)."""
    return float(p.log_z + jax.nn.logsumexp(p.log_weights) - jnp.log(p.log_weights.shape[0]))


def test_fresh_particles_have_weight_one():
    fresh = base.particles(jnp.zeros((3, 2)), 3)
    assert fresh.log_weights.dtype == fresh.log_z.dtype == jnp.float32
    assert evidence(fresh) == 0


def test_bank_moves_the_mean_weight():
    banked = base.bank(population())
    np.testing.assert_allclose(banked.log_z, evidence(population()), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(banked.log_weights).mean(), 1, rtol=1e-6)
    ratio = jnp.exp(banked.log_weights - banked.log_weights[3])
    np.testing.assert_allclose(ratio, jnp.exp(WEIGHTS - WEIGHTS[3]), rtol=1e-6)
    assert banked.log_weights[2] == -jnp.inf


def test_bank_of_the_dead_is_dead_and_not_nan():
    banked = base.bank(population(jnp.full(4, -jnp.inf)))
    assert banked.log_z == -jnp.inf
    assert (banked.log_weights == -jnp.inf).all()


def test_death_is_absorbing():
    move = Move(lambda key, x: (x, jnp.array([0.1, 0.2, jnp.inf, -jnp.inf])))
    moved = applied(jax.random.key(0), population(), move)
    np.testing.assert_allclose(moved.log_weights, [-0.9, 0.7, -jnp.inf, -jnp.inf], rtol=1e-6)


def jump(key: Any, x: Any) -> Any:
    """A proposal for one particle with its own weight: y = x + 1 with probability 0.3, weighed for
    even odds.
    """
    up = jax.random.bernoulli(key, 0.3)
    return x + up, jnp.log(0.5) - jnp.log(jnp.where(up, 0.3, 0.7))


def test_each_gives_every_particle_its_own_key():
    x = jnp.zeros(5, jnp.int32)
    y, dw = base.each(jump).sample(jax.random.key(1), x)
    keys = jax.random.split(jax.random.key(1), 5)
    single = [jump(key, 0) for key in keys]
    np.testing.assert_array_equal(y, [int(a) for a, _ in single])
    np.testing.assert_allclose(dw, [float(b) for _, b in single], rtol=1e-6)


def test_a_sequence_of_moves_adds_their_weights_and_obeys_law_2():
    """After three moves x is Binomial(3, 1/2): every count against its mass, weights from LAW 2
    alone.
    """
    move = base.sequence(base.each(jump), base.each(jump), base.each(jump))
    num = 40_000
    p = applied(jax.random.key(2), base.particles(jnp.zeros(num, jnp.int32), num), move)
    weights = np.exp(np.asarray(p.log_weights, np.float64))
    for value, truth in enumerate([1 / 8, 3 / 8, 3 / 8, 1 / 8]):
        f = weights * (np.asarray(p.state) == value)
        assert abs(f.mean() - truth) < 5 * f.std() / np.sqrt(num) < 0.03


@pytest.mark.parametrize("threshold", [False, True])
def test_resample_keeps_the_evidence(threshold: bool):
    before = population()
    after, ancestors = base.resample(
        jax.random.key(3), before, resampling.systematic, jnp.bool_(threshold)
    )
    np.testing.assert_allclose(evidence(after), evidence(before), rtol=1e-6)
    np.testing.assert_array_equal(after.state["x"], ancestors)
    np.testing.assert_array_equal(after.state["rows"], before.state["rows"][ancestors])
    if threshold:
        assert (after.log_weights == 0).all() and 2 not in ancestors
    else:
        np.testing.assert_array_equal(ancestors, np.arange(4))
        np.testing.assert_array_equal(after.log_weights, before.log_weights)
        assert after.log_z == before.log_z


def test_resample_obeys_law_1():
    """E[exp(log_z) mean_i exp(w_i) 1{x_i = x}] is unchanged for every x, whether weights were reset
    or not.
    """
    before = population()
    keys = jax.random.split(jax.random.key(4), 20_000)

    def mass(key: Any) -> Any:
        when_key, key = jax.random.split(key)
        after, _ = base.resample(
            key, before, resampling.multinomial, jax.random.bernoulli(when_key)
        )
        weights = jnp.exp(after.log_z + after.log_weights) / 4
        return jnp.zeros(4).at[after.state["x"]].add(weights)

    found = np.asarray(jax.jit(jax.vmap(mass))(keys), np.float64)
    truth = np.exp(0.7 + np.asarray(WEIGHTS, np.float64)) / 4
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - truth) <= 5 * error + 1e-9).all()
    assert (error < 0.02).all()


def test_the_dead_are_never_resampled():
    dead = population(jnp.full(4, -jnp.inf))
    after, ancestors = base.resample(
        jax.random.key(5), dead, resampling.systematic, jnp.bool_(True)
    )
    np.testing.assert_array_equal(ancestors, np.arange(4))
    assert evidence(after) == -np.inf and (after.log_weights == -jnp.inf).all()


def test_costs_add():
    counts = dict(tokens=1, forwards=2, potential_calls=3, depth=4, judge_tokens=5, kv_read=6)
    one = Cost(**{name: jnp.int32(count) for name, count in counts.items()})
    total = one + one + base.Cost()
    assert (int(total.tokens), int(total.forwards), int(total.potential_calls)) == (2, 4, 6)
    assert (int(total.depth), int(total.judge_tokens), int(total.kv_read)) == (8, 10, 12)


def test_costs_in_parallel_add_but_for_the_depth():
    one, other = (Cost(tokens=jnp.int32(3), depth=jnp.int32(d)) for d in (4, 7))
    both = one | other
    assert (int(both.tokens), int(both.depth), int(both.forwards)) == (6, 7, 0)
    kinds = [[leaf.dtype for leaf in jax.tree.leaves(cost)] for cost in (both, Cost())]
    assert kinds[0] == kinds[1] and both.kv_read.dtype == jnp.float32


def test_the_total_of_costs_side_by_side():
    each = jax.vmap(lambda n: Cost(tokens=n, depth=n))(jnp.array([2, 5, 1], jnp.int32))
    total = each.total()
    assert (int(total.tokens), int(total.depth), int(total.forwards)) == (8, 5, 0)


def test_costs_are_by_name():
    with pytest.raises(TypeError, match="positional"):
        Cost(jnp.int32(1))  # pyright: ignore[reportCallIssue]
