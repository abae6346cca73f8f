"""SMC^2 against the forward algorithm on a hidden Markov model with an unknown emission."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from samplers import base, resampling
from samplers.latent import filtering, pmmh, smc2
from samplers.results import Weighted
from tests.helpers import TraceCounter, assert_z
from tests.samplers.state_spaces import (
    GRID_PRIOR,
    GRID_STEPS,
    SYMBOLS,
    emission_hmm,
    emission_posterior,
)

PRIOR = dist.Categorical(probs=jnp.asarray(GRID_PRIOR))
PROPOSAL = pmmh.propose(lambda theta: dist.Categorical(probs=jnp.asarray(GRID_STEPS)[theta]))
OPTIONS: dict[str, Any] = {
    "num_particles": 4,
    "num_states": 2,
    "num_moves": 2,
    "proposal": PROPOSAL,
}


RECORD = SYMBOLS[:4]


def estimates(run: Callable[[Any], Weighted], symbols: np.ndarray, num: int) -> np.ndarray:
    """Z-hat mean_i( w_i 1[theta_i = g] ) / Z [num, 5], of runs with keys of their own."""
    log_z = np.log((GRID_PRIOR * np.exp(emission_posterior(symbols)[1])).sum())

    @jax.jit
    @jax.vmap
    def one(key: Any) -> Any:
        found = run(key)
        at = jax.nn.one_hot(found.samples, 5)
        return jnp.exp(found.log_z - log_z) * (jnp.exp(found.log_weights)[:, None] * at).mean(0)

    return np.asarray(one(jax.random.split(jax.random.key(0), num)), np.float64)


def fixed(key: Any, times: Any = (0, 2), symbols: np.ndarray = RECORD, **changes: Any) -> Weighted:
    return smc2.run(key, emission_hmm, PRIOR, symbols, times=list(times), **{**OPTIONS, **changes})


def check_law_1(
    run: Callable[[Any], Weighted], num: int, resolution: float, symbols: np.ndarray = RECORD
) -> None:
    """E[Z-hat] = Z, and E[Z-hat mean_i( w_i 1[theta_i = g] )] = Z p(g | y) for every g."""
    posterior, _ = emission_posterior(symbols)
    found = estimates(run, symbols, num)
    assert_z(found.sum(1), 1.0, resolution=resolution)
    for g in range(5):
        assert_z(found[:, g], posterior[g], resolution=resolution)


def test_weights_obey_law_1_when_the_times_are_fixed():
    check_law_1(fixed, 8000, 0.01)


@pytest.mark.slow
def test_with_moves_at_all_times():
    check_law_1(
        functools.partial(fixed, times=range(4), resampler=resampling.multinomial), 8000, 0.01
    )


@pytest.mark.slow
def test_moving_by_the_ess_is_not_unbiased():
    """Which is why `adaptive` is only consistent; at times that do not depend on the particles
    nothing is lost.
    """
    symbols = np.array([0, 0])
    options = {**OPTIONS, "num_particles": 2, "num_moves": 4}
    check_law_1(
        functools.partial(fixed, times=[0], symbols=symbols, **options), 8000, 0.01, symbols
    )
    with pytest.raises(AssertionError, match="z = "):
        check_law_1(
            lambda key: smc2.adaptive(key, emission_hmm, PRIOR, symbols, threshold=0.75, **options),
            8000,
            0.01,
            symbols,
        )


@pytest.mark.slow
def test_large_populations_find_the_posterior():
    """`adaptive`, and `run` at the times that it found; running evidence at every time, and the
    filters' states.
    """
    posterior, _ = emission_posterior(SYMBOLS)
    options = {**OPTIONS, "num_particles": 2000, "num_states": 20}
    tuned = smc2.adaptive(jax.random.key(1), emission_hmm, PRIOR, SYMBOLS, threshold=0.8, **options)
    times = np.flatnonzero(tuned.trace.resampled)
    assert 1 <= len(times) < 6
    found = smc2.run(jax.random.key(2), emission_hmm, PRIOR, SYMBOLS, times=times, **options)
    for out in (tuned, found):
        weights = np.exp(np.asarray(out.log_weights, np.float64)) / 2000
        np.testing.assert_allclose(
            np.bincount(out.samples, weights, minlength=5), posterior, atol=0.06
        )
        for t in range(6):
            log_z = np.log((GRID_PRIOR * np.exp(emission_posterior(SYMBOLS[: t + 1])[1])).sum())
            assert abs(out.trace.log_z[t] - log_z) < 0.05
        np.testing.assert_allclose(out.log_z, out.trace.log_z[-1], atol=1e-5)
        assert 0 < out.log_z_std_error < 0.05
        filters = (out.details or {})["filters"]
        assert filters.state.shape == (2000, 20)
        assert (
            np.abs(np.asarray(filters.log_z) - emission_posterior(SYMBOLS)[1][out.samples]).mean()
            < 0.5
        )
        assert ((out.trace.ess <= 2000.1) & (out.trace.ess > 100)).all()
        assert ((out.trace.acceptance > 0.2) == out.trace.resampled).all()
    assert found.trace.resampled.sum() == len(times)
    rounds = 6 + 2 * (times + 1).sum()
    assert int(found.cost.forwards) == rounds and int(found.cost.tokens) == rounds * 2000 * 20


# --- planted faults ---


def filters_kept(patch: pytest.MonkeyPatch) -> None:
    """Theta moves, and goes on with the filter of the one before."""
    move = pmmh.particle_move

    def stale(*args: Any) -> base.Move:
        def sample(key: Any, x: Any) -> Any:
            y, dw = move(*args).sample(key, x)
            return dataclasses.replace(y, rest=x.rest), dw

        return base.Move(sample)

    patch.setattr(pmmh, "particle_move", stale)


def last_observation_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Moves leave the posterior of the time before invariant."""
    move = smc2.rejuvenation
    patch.setattr(
        smc2,
        "rejuvenation",
        lambda m, p, q, y, t, *sizes: move(m, p, q, y, jnp.maximum(t - 1, 0), *sizes),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [filters_kept, last_observation_forgotten], ids=lambda f: f.__name__
)
def test_a_planted_fault_fails(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch)
    fresh = functools.partial(resampling.systematic)  # a new static argument, hence a new trace
    with pytest.raises(AssertionError, match="z = "):
        check_law_1(functools.partial(fixed, resampler=fresh), 8000, jnp.inf)


# --- structure ---


@pytest.mark.slow
def test_one_compilation_for_all_times_and_data():
    counter = TraceCounter(emission_hmm)

    def model(theta: Any) -> filtering.StateSpace:
        return counter(theta)

    def run(times: list[int], symbols: Any) -> Any:
        return smc2.run(jax.random.key(3), model, PRIOR, symbols, times=times, **OPTIONS).log_z

    first = run([1, 3], SYMBOLS[:4])
    traces = counter.count
    assert run([0, 2], SYMBOLS[1:5]) != first and counter.count == traces


@pytest.mark.slow
def test_impossible_data_is_flagged():
    nowhere = filtering.StateSpace(
        lambda: dist.Normal(0.0, 1.0),
        lambda t, x: dist.Normal(x, 1.0),
        lambda t, x: dist.Uniform(x + 50, x + 51),
    )
    found = smc2.run(
        jax.random.key(5),
        lambda theta: nowhere,
        PRIOR,
        np.zeros(3),
        times=[1],
        **{**OPTIONS, "num_moves": 1},
    )
    assert (
        found.log_z == -jnp.inf
        and np.isneginf(found.log_weights).all()
        and not np.isnan(found.trace.ess).any()
    )


@pytest.mark.bad_input
def test_bad_input():
    for times in ([4], [-1], [[1]]):
        with pytest.raises(ValueError, match=r"expected times in 0\.\.3, one for each stop"):
            fixed(jax.random.key(0), times)
    for name in ("num_particles", "num_states", "num_moves"):
        with pytest.raises(ValueError, match=f"expected {name}"):
            fixed(jax.random.key(0), **{name: 0})
    with pytest.raises(ValueError, match="put time first"):
        smc2.run(jax.random.key(0), emission_hmm, PRIOR, np.zeros(()), times=[], **OPTIONS)
