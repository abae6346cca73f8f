"""Resamplers: E[copies of i] = num W_i, how far copies may stray, and float32's edges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import resampling
from tests.samplers.problems import RESAMPLERS

WEIGHTS = np.array([0.02, 0.31, 0.0, 0.17, 0.005, 0.095, 0.4])
RUNS = 20_000


def log_weights(weights: Any, shift: float = 0.0) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(weights) + shift, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw(resampler: Callable[..., Any], key: Any, rows: Any, num: int) -> Any:
    return resampler(key, rows, num)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw_many(resampler: Callable[..., Any], keys: Any, rows: Any, num: int) -> Any:
    return jax.vmap(lambda key: resampler(key, rows, num))(keys)


def copies(resampler: Callable[..., Any], weights: Any, num: int, seed: int = 0) -> np.ndarray:
    """How often each particle is chosen [RUNS, N]."""
    ancestors = draw_many(resampler, jax.random.split(jax.random.key(seed), RUNS), log_weights(weights), num)
    assert ancestors.shape == (RUNS, num) and ancestors.dtype == jnp.int32
    return np.stack([(np.asarray(ancestors) == i).sum(1) for i in range(len(weights))], axis=1)


def check_mean(counts: np.ndarray, weights: np.ndarray, num: int) -> None:
    """E[copies] = num W by z-tests; without spread the mean itself."""
    expected = num * weights / weights.sum()
    error = counts.std(0, ddof=1) / np.sqrt(len(counts))
    assert (error < 0.02).all()
    z = np.where(error > 0, (counts.mean(0) - expected) / np.where(error > 0, error, 1.0), 0.0)
    assert np.abs(z).max() < 5, f"z = {z}"
    assert np.allclose(counts.mean(0)[error == 0], expected[error == 0], atol=1e-5)


@pytest.mark.parametrize("num", [7, 3, 12])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_mean_copies(name: str, num: int):
    counts = copies(RESAMPLERS[name], WEIGHTS, num)
    check_mean(counts, WEIGHTS, num)
    assert (counts.sum(1) == num).all() and (counts[:, 2] == 0).all()


def systematic_off_by_one(key: Any, log_weights: Any, num: int) -> Any:
    return (resampling.systematic(key, log_weights, num) + 1) % log_weights.shape[0]


def squared(key: Any, log_weights: Any, num: int) -> Any:
    return resampling.multinomial(key, 1.1 * log_weights, num)


@pytest.mark.parametrize("faulty", [systematic_off_by_one, squared])
def test_the_check_of_means_can_fail(faulty: Callable[..., Any]):
    with pytest.raises(AssertionError, match="z = "):
        check_mean(copies(faulty, WEIGHTS, 7), WEIGHTS, 7)


@pytest.mark.parametrize("num", [7, 3, 12])
def test_counts_stay_close_to_their_means(num: int):
    """Systematic: floor or ceiling.  Stratified: less than 2 away.  Residual: at least the floor.  None varies more
    than multinomial."""
    counts = {name: copies(resampler, WEIGHTS, num, seed=1) for name, resampler in RESAMPLERS.items()}
    expected = num * WEIGHTS
    assert ((counts["systematic"] >= np.floor(expected)) & (counts["systematic"] <= np.ceil(expected))).all()
    assert (np.abs(counts["stratified"] - expected) < 2).all()
    assert (counts["residual"] >= np.floor(expected)).all()
    assert not (counts["multinomial"] >= np.floor(expected)).all()
    moments = num * WEIGHTS * (1 - WEIGHTS)
    np.testing.assert_allclose(counts["multinomial"].var(0), moments, rtol=0.06, atol=0.005)
    for name in ("stratified", "systematic", "residual"):
        assert (counts[name].var(0) <= 1.03 * moments + 0.005).all()
        assert counts[name].var(0).sum() < 0.7 * moments.sum()


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("shift", [-1e4, 0.0, 80.0])
def test_a_constant_factor_changes_nothing(name: str, shift: float):
    key = jax.random.key(2)
    shifted = draw(RESAMPLERS[name], key, log_weights(WEIGHTS, shift), 7)
    # float32 keeps few digits of a log-weight near -1e4, so the weights are only nearly the same.
    assert (np.asarray(shifted) == np.asarray(draw(RESAMPLERS[name], key, log_weights(WEIGHTS), 7))).all()


# float32.

BIG = 100_000


def big_weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "equal":
        return np.ones(BIG)
    if kind == "skewed":
        return np.exp(4 * rng.normal(size=BIG))
    if kind == "sparse":
        return np.where(rng.random(BIG) < 0.01, rng.random(BIG), 0.0)
    ends = np.full(BIG, 1e-30)  # weights that vanish beside the others, first and last
    ends[BIG // 2] = 1.0
    return ends


@pytest.mark.parametrize("kind", ["equal", "skewed", "sparse", "vanishing"])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_hundred_thousand_particles(name: str, kind: str):
    weights = big_weights(kind)
    ancestors = np.asarray(draw(RESAMPLERS[name], jax.random.key(4), log_weights(weights), BIG))
    assert ancestors.min() >= 0 and ancestors.max() < BIG
    counts, share = np.bincount(ancestors, minlength=BIG), weights / weights.sum()
    assert (weights[counts > 0] > 0).all()
    for part in np.array_split(np.arange(BIG), 20):
        expected = BIG * share[part].sum()
        slack = {"multinomial": 5 * np.sqrt(expected) + 5, "residual": 5 * np.sqrt(expected) + 5}.get(name, 8)
        assert abs(counts[part].sum() - expected) <= slack, (name, kind, expected, counts[part].sum())
    if name in ("systematic", "residual"):
        assert (counts[BIG * share > 2] >= np.floor(BIG * share[BIG * share > 2]) - 1).all()


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_zero_weight_is_never_chosen_at_adversarial_points(point: float):
    """Points on the very edges of the cumulative weights, zeros at both ends and in the middle."""
    for weights in ([0, 0, 0.5, 0, 0.5, 0, 0], [0, 1, 0], [1, 0], [0, 1], [0.1, 0, 0.2, 0, 0, 0.7, 0]):
        array = jnp.asarray(weights, jnp.float32)
        chosen = int(resampling._invert(array, jnp.float32([point]))[0])
        assert weights[chosen] > 0, (weights, point, chosen)


def test_cumulative_weights_that_fall_short_of_one():
    """Points are stretched to the weights' own sum: the last particles get their share, and no more."""
    weights = jnp.full(BIG, 0.9995 / BIG, jnp.float32).at[-1].set(0.0)
    assert float(jnp.cumsum(weights)[-1]) < 0.9999
    points = jnp.asarray((np.arange(BIG) + 0.5) / BIG, jnp.float32)
    chosen = np.asarray(resampling._invert(weights, points))
    assert chosen.max() == BIG - 2 and (np.diff(chosen) >= 0).all()
    assert (np.bincount(chosen, minlength=BIG) <= 2).all()


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("num", [5, 3, 8])
def test_all_dead_keeps_its_order(name: str, num: int):
    ancestors = draw(RESAMPLERS[name], jax.random.key(5), jnp.full(5, -jnp.inf), num)
    np.testing.assert_array_equal(ancestors, np.arange(num) % 5)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_single_survivor_takes_all(name: str):
    rows = jnp.full(6, -jnp.inf).at[4].set(-1000.0)
    np.testing.assert_array_equal(draw(RESAMPLERS[name], jax.random.key(6), rows, 6), np.full(6, 4))
