"""Variance of Z-hat from one run: unbiased by enumeration, and against the spread of independent
runs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from samplers import diagnostics, resampling, smc
from samplers.results import Weighted
from samplers.strings import selection
from tests.samplers.problems import target_of
from tests.samplers.tape import Runs, enumerate_runs, small_target


def lee_whiteley(out: Weighted) -> jax.Array:
    roots = diagnostics.roots(out.history.ancestors)
    return diagnostics.lee_whiteley(out.log_weights, roots, out.trace.resampled.sum())


def olsson_douc(out: Weighted, lag: int) -> jax.Array:
    history = out.history
    return diagnostics.olsson_douc(
        history.log_weights, history.ancestors, out.trace.resampled, out.rounds, lag=lag
    )


def relative_second_moment(runs: Runs, variance: np.ndarray) -> float:
    """E[ (Z-hat / Z)^2 (1 - V) ], which is 1 for an unbiased V."""
    log_z = np.asarray(runs.out.log_z, np.float64)
    return float(runs.probs @ (np.exp(2 * (log_z - runs.exact.log_z)) * (1 - variance)))


@pytest.mark.slow
def test_lee_whiteley_is_unbiased():
    """E[Z-hat^2 V] = Var(Z-hat) over all runs of SMC: never, sometimes and always resampled.

    Planted: the factor N / (N - 1) = 2 left out, or applied for the first generation only."""
    options = {"selection": selection.annealed(2.0), "history": True}
    found = enumerate_runs(small_target(3), thresholds=(0.0, 0.85, 1.1), pinned=False, **options)
    for threshold, runs in found.items():
        variance = np.asarray(jax.vmap(lee_whiteley)(runs.out), np.float64)
        np.testing.assert_allclose(relative_second_moment(runs, variance), 1, atol=2e-6)
        once = 1 - (1 - variance) / 2 ** np.asarray(runs.out.trace.resampled.sum(1))
        without = 1 - (1 - variance) / 2 ** (1 + np.asarray(runs.out.trace.resampled.sum(1)))
        assert threshold == 0 or abs(relative_second_moment(runs, once) - 1) > 0.05
        assert abs(relative_second_moment(runs, without) - 1) > 0.05
        roots = jax.vmap(diagnostics.roots)(runs.out.history.ancestors)
        chan_lai = (
            np.asarray(jax.vmap(diagnostics.log_z_std_error)(runs.out.log_weights, roots)) ** 2
        )
        np.testing.assert_allclose(without - 1 / 2, chan_lai, atol=1e-5)
        np.testing.assert_allclose(runs.out.log_z_std_error**2, chan_lai, atol=1e-5)


def brute_force(out: Weighted, lag: int) -> float:
    """The sum of differences, with lineages followed one by one."""
    ancestors, log_weights = (
        np.asarray(out.history.ancestors),
        np.asarray(out.history.log_weights, np.float64),
    )
    resampled, last, num = np.asarray(out.trace.resampled), int(out.rounds) - 1, ancestors.shape[1]

    def variance(p: int, m: int) -> float:
        if p > m:
            return 0.0
        weights = np.exp(log_weights[m]) / np.exp(log_weights[m]).sum()
        shares = np.zeros(num)
        for i in range(num):
            slot = i
            for r in range(m, p, -1):
                slot = ancestors[r, slot]
            shares[slot] += weights[i]
        factor = (num / (num - 1)) ** (resampled[p + 1 : m + 1].sum() + 1)
        return 1 - factor * (1 - (shares**2).sum())

    total = 0.0
    for p in range(last + 1):
        m = min(p + lag, last)
        if p == last or resampled[p + 1]:
            total += variance(p, m) - variance(p + 1, m)
    return total


@pytest.mark.slow
def test_olsson_douc_is_its_formula():
    """Every lag, with resamplings now and then; from the length of the run on it is Lee and
    Whiteley's.
    """
    target, seen = target_of("hmm", "every_1"), 0
    runs = jax.jit(
        jax.vmap(lambda key: smc.run(key, target, num_particles=6, threshold=0.95, history=True))
    )
    many = runs(jax.random.split(jax.random.key(3), 8))
    host = jax.device_get(many)
    for lag in (0, 1, 9):
        found = jax.jit(jax.vmap(lambda out, lag=lag: olsson_douc(out, lag)))(many)
        for i in range(8):
            out = jax.tree.map(lambda leaf, i=i: leaf[i], host)
            seen += int(out.trace.resampled.sum())
            np.testing.assert_allclose(found[i], brute_force(out, lag), atol=2e-6)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(lee_whiteley))(many), atol=2e-6)
    assert 0 < seen < 3 * 8 * 3


def test_a_lag_follows_lineages():
    """Five rounds of a run that may have seven, of which three began with a resampling."""
    rng, resampled = np.random.default_rng(0), np.isin(np.arange(7), [1, 3, 4])
    ancestors = np.where(resampled[:, None], rng.integers(0, 4, (7, 4)), np.arange(4))
    log_weights = rng.normal(size=(7, 4)).astype(np.float32)
    out: Any = SimpleNamespace(
        history=SimpleNamespace(
            log_weights=jnp.asarray(log_weights), ancestors=jnp.asarray(ancestors, jnp.int32)
        ),
        trace=SimpleNamespace(resampled=jnp.asarray(resampled)),
        rounds=jnp.int32(5),
    )
    found = jax.jit(lambda: olsson_douc(out, 2))()
    np.testing.assert_allclose(found, brute_force(out, 2), atol=2e-6)


@pytest.mark.optimised
@pytest.mark.slow
def test_calibrated_on_long_runs():
    """60 tokens, 64 particles: the fixed lag has the variance of log Z-hat to 15 %, and less noise
    than all roots.
    """
    lm = tabular.random_markov(jax.random.key(11), 4, eos=1)
    p = lm.given((2, 0), max_tokens=60) * ppl.min_tokens(60)

    def score(tokens: Any, length: Any) -> Any:
        return jnp.sin(3.0 * (tokens * (tokens != 1)).sum(1))

    target = p * ppl.step_scores(score, ppl.Steps(every=1))
    options = {
        "num_particles": 64,
        "threshold": 0.65,
        "resampler": resampling.multinomial,
        "history": True,
    }

    def one(key: Any) -> tuple[jax.Array, ...]:
        out = smc.run(key, target, **options)
        return (
            out.log_z,
            lee_whiteley(out),
            olsson_douc(out, 8),
            olsson_douc(out, 0),
            out.trace.resampled.sum(),
        )

    log_z, whole, lagged, short, often = (
        np.asarray(x, np.float64)
        for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 2000))
    )
    truth = log_z.var()
    assert 10 < often.mean() <= 59
    assert abs(lagged.mean() / truth - 1) < 0.15, (lagged.mean(), whole.mean(), short.mean(), truth)
    assert lagged.std() < 0.7 * whole.std()
    assert abs(short.mean() / truth - 1) > 0.3  # planted: no lag at all, where it matters


def test_without_an_answer_it_is_infinite():
    dead = jnp.full(4, -jnp.inf)
    slots = jnp.arange(4, dtype=jnp.int32)
    assert np.isposinf(diagnostics.lee_whiteley(dead, slots, jnp.int32(0)))
    assert np.isposinf(diagnostics.lee_whiteley(jnp.zeros(1), slots[:1], jnp.int32(0)))
    weights, ancestors = jnp.stack([jnp.zeros(4), dead]), jnp.stack([slots, slots])
    assert np.isposinf(
        diagnostics.olsson_douc(weights, ancestors, jnp.asarray([False, True]), jnp.int32(2), lag=1)
    )
    one = diagnostics.olsson_douc(
        jnp.zeros((2, 1)), ancestors[:, :1], jnp.zeros(2, bool), jnp.int32(2), lag=1
    )
    assert np.isposinf(one)
    with pytest.raises(ValueError, match="expected a lag of at least 0"):
        diagnostics.olsson_douc(weights, ancestors, jnp.zeros(2, bool), jnp.int32(2), lag=-1)
