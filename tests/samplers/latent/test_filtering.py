"""Filters and smoothers against a Kalman filter, the forward algorithm and the package
`particles`.
"""

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
from jax.tree_util import Partial

from samplers import base, population, resampling
from samplers.latent import filtering, smoothing
from samplers.latent.filtering import StateSpace
from tests.helpers import TraceCounter, assert_z
from tests.samplers.state_spaces import (
    HMM,
    LINEAR,
    SWITCHING,
    SYMBOLS,
    Y_MISSING,
    Y,
    forward_backward,
    initial_optimal,
    kalman,
    locally_optimal,
    poor_guide,
    predictive,
    rough,
    switching_evidence,
    twisted,
)

FILTERS: dict[str, dict[str, Any]] = {
    "bootstrap": {},
    "guided": {"proposal": locally_optimal, "initial_proposal": initial_optimal},
    "poorly guided": {"proposal": poor_guide},
    "auxiliary": {"lookahead": predictive},
    "auxiliary, guided, rough": {"lookahead": rough, "proposal": locally_optimal},
}
THRESHOLDS = (0.0, 0.5, 1.1)


def replicas(
    observations: Any, num: int, options: dict[str, Any], *, particles: int = 16
) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """threshold -> Z-hat / Z [num], and Z-hat / Z E[x_0 | its paths] [num, 2], by one compiled
    program.
    """
    truth = kalman(np.asarray(observations))[0]

    def one(key: Any, threshold: Any) -> Any:
        found = filtering.run(
            key,
            LINEAR,
            observations,
            num_particles=particles,
            threshold=threshold,
            **{"proposal": None, **options},
        )
        ratio = jnp.exp(found.log_z - truth)
        first = smoothing.trajectories(found.history)[0]
        return ratio, ratio * jnp.mean(jnp.exp(found.log_weights)[:, None] * first, 0)

    compiled = jax.jit(jax.vmap(one, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(1), num)

    def at(threshold: float) -> tuple[np.ndarray, np.ndarray]:
        ratio, first = compiled(keys, threshold)
        return np.asarray(ratio), np.asarray(first)

    return at


def check_law_1(
    options: dict[str, Any], observations: Any = Y, *, resolution: float = 0.02
) -> None:
    """E[Z-hat] = Z, and E[Z-hat mean_i w_i x_0^i] = Z E[x_0 | y], by z-tests."""
    at = replicas(observations, 20_000, options)
    smoothed = kalman(np.asarray(observations))[3][0]
    for threshold in THRESHOLDS:
        ratio, first = at(threshold)
        assert_z(ratio, 1.0, resolution=resolution)
        for axis in range(2):
            assert_z(first[:, axis], smoothed[axis], resolution=resolution)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "resampler"),
    [
        ("bootstrap", resampling.multinomial),
        ("poorly guided", resampling.killing),
        ("auxiliary, guided, rough", resampling.optimal),
    ],
)
def test_the_evidence_and_the_paths_are_unbiased(name: str, resampler: Any):
    """With resamplers that are coarse, leave particles where they are, and give weights; what each
    draws is tested by itself.
    """
    check_law_1({**FILTERS[name], "resampler": resampler})


@pytest.mark.slow
def test_missing_observations_have_factor_one():
    check_law_1(FILTERS["auxiliary, guided, rough"], Y_MISSING)


@pytest.mark.slow
def test_full_adaptation_has_no_weight_variance():
    """Look-ahead p(y_{t+1} | x_t) with the locally optimal proposal: after selecting, all weights
    are equal.
    """
    options = {**FILTERS["guided"], "lookahead": predictive}
    found = filtering.run(jax.random.key(0), LINEAR, Y, num_particles=50, threshold=1.1, **options)
    np.testing.assert_allclose(found.history.log_weights[1:], 0, atol=1e-5)
    assert found.trace.resampled[1:].all() and not found.trace.resampled[0]


@pytest.mark.parametrize(
    ("name", "observations"),
    [("bootstrap", Y_MISSING), pytest.param("auxiliary", Y, marks=pytest.mark.slow)],
)
def test_filter_and_smoother_match_kalman(name: str, observations: np.ndarray):
    num = 10_000
    log_z, means, covariances, smooth_means, smooth_covariances = kalman(observations)
    found = filtering.run(
        jax.random.key(3), LINEAR, observations, num_particles=num, **FILTERS[name]
    )
    assert abs(found.log_z - log_z) < 5 * found.log_z_std_error < 0.2
    np.testing.assert_allclose(found.trace.log_z[-1], found.log_z)
    mean, variance = filtering.moments(found.history.drawn, found.history.log_weights)
    np.testing.assert_allclose(mean, means, atol=0.05)
    np.testing.assert_allclose(variance, np.diagonal(covariances, axis1=1, axis2=2), rtol=0.1)

    last = jnp.broadcast_to(found.log_weights, found.history.log_weights.shape)
    mean, variance = filtering.moments(smoothing.trajectories(found.history), last)
    np.testing.assert_allclose(mean, smooth_means, atol=0.06)
    np.testing.assert_allclose(
        variance, np.diagonal(smooth_covariances, axis1=1, axis2=2), rtol=0.15
    )

    if name == "bootstrap":
        found = filtering.run(jax.random.key(3), LINEAR, observations, num_particles=1000)
        drawn = smoothing.backward_sample(jax.random.key(4), LINEAR, found.history, 1000)
        mean, variance = filtering.moments(drawn, jnp.zeros(drawn.shape[:2]))
        np.testing.assert_allclose(mean, smooth_means, atol=0.15)
        np.testing.assert_allclose(
            variance, np.diagonal(smooth_covariances, axis1=1, axis2=2), rtol=0.25
        )


@pytest.mark.slow
def test_backward_sampling_forgets_coalescence():
    """Twelve particles, many times: the genealogy keeps one root, backward draws several."""
    y = jnp.tile(Y, (8, 1))
    found = filtering.run(jax.random.key(5), LINEAR, y, num_particles=12, threshold=1.1)
    assert len(np.unique(smoothing.trajectories(found.history)[0, :, 0])) == 1
    drawn = smoothing.backward_sample(jax.random.key(6), LINEAR, found.history, 50)
    assert drawn.shape == (40, 50, 2)
    assert len(np.unique(drawn[0, :, 0])) > 3
    states = np.asarray(found.history.drawn)
    assert all(np.isin(np.asarray(drawn)[t], states[t]).all() for t in range(40))


def test_trace_back_by_hand():
    ancestors = jnp.array([[0, 1, 2], [2, 2, 0], [1, 2, 1]])
    np.testing.assert_array_equal(
        smoothing.trace_back(ancestors), [[2, 0, 2], [1, 2, 1], [0, 1, 2]]
    )


# --- a hidden Markov model: the forward algorithm knows all ---


def check_exact(**changes: Any) -> None:
    """Every run's log Z-hat is log Z, whatever the trigger."""
    for threshold in THRESHOLDS:
        options = {**twisted(), **changes}
        found = filtering.run(
            jax.random.key(7), HMM, SYMBOLS, num_particles=7, threshold=threshold, **options
        )
        np.testing.assert_allclose(found.log_z, forward_backward()[0], atol=2e-5)
        np.testing.assert_allclose(found.log_weights, 0, atol=2e-5)
        assert found.trace.resampled[1:].all() == (
            threshold > 1
        ) and found.trace.resampled.any() == (threshold > 1)


@pytest.mark.slow
def test_exact_twists_give_log_z_exactly():
    check_exact()


def test_discrete_states_match_the_forward_algorithm():
    log_z, filtered, messages = forward_backward()
    found = filtering.run(jax.random.key(8), HMM, SYMBOLS, num_particles=4000)
    assert abs(found.log_z - log_z) < 5 * found.log_z_std_error < 0.2
    np.testing.assert_allclose(
        filtering.moments(found.history.drawn, found.history.log_weights)[0],
        filtered[:, 1],
        atol=0.04,
    )
    smooth = filtered * messages
    smooth /= smooth.sum(1, keepdims=True)
    drawn = smoothing.backward_sample(jax.random.key(9), HMM, found.history, 500)
    np.testing.assert_allclose(drawn.mean(1), smooth[:, 1], atol=0.1)


@pytest.mark.slow
def test_discrete_evidence_is_unbiased():
    log_z = forward_backward()[0]
    keys = jax.random.split(jax.random.key(10), 20_000)
    estimates = jax.vmap(
        lambda key: filtering.run(key, HMM, SYMBOLS, num_particles=4, threshold=0.8).log_z
    )(keys)
    assert_z(np.exp(np.asarray(estimates) - log_z), 1.0, resolution=0.01)


# --- another library ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_package_particles():
    """Stochastic volatility, which is neither linear nor Gaussian: the same log-likelihood within
    Monte Carlo error.
    """
    pytest.importorskip("particles")
    import particles
    from particles import distributions as law
    from particles import state_space_models as ssm

    mu, rho, sigma = -1.0, 0.95, 0.4

    class Volatility(ssm.StateSpaceModel):
        def PX0(self) -> Any:
            return law.Normal(loc=mu, scale=sigma / np.sqrt(1 - rho**2))

        def PX(self, t: int, xp: Any) -> Any:
            return law.Normal(loc=mu + rho * (xp - mu), scale=sigma)

        def PY(self, t: int, xp: Any, x: Any) -> Any:
            return law.Normal(loc=0.0, scale=np.exp(0.5 * x))

    ours = StateSpace(
        lambda: dist.Normal(mu, sigma / np.sqrt(1 - rho**2)),
        lambda t, x: dist.Normal(mu + rho * (x - mu), sigma),
        lambda t, x: dist.Normal(0.0, jnp.exp(0.5 * x)),
    )
    y = np.random.default_rng(0).normal(size=40) * np.exp(np.linspace(-1.5, 1.0, 40))
    num, runs = 5000, 8
    np.random.seed(0)  # the package draws from numpy's global state
    theirs = []
    for _ in range(runs):
        algorithm = particles.SMC(fk=ssm.Bootstrap(ssm=Volatility(), data=y), N=num, collect="off")
        algorithm.run()
        theirs.append(algorithm.logLt)
    keys = jax.random.split(jax.random.key(11), runs)
    found = np.asarray([filtering.run(key, ours, y, num_particles=num).log_z for key in keys])
    spread = np.hypot(np.std(theirs, ddof=1), np.std(found, ddof=1)) / np.sqrt(runs)
    assert spread < 0.03
    assert abs(np.mean(theirs) - found.mean()) < 5 * spread


# --- pytrees, parameters, structure ---


@pytest.mark.slow
def test_states_and_observations_may_be_pytrees():
    levels, counts = np.array([0.2, 1.1, -0.5, 1.4]), np.array([1, 4, 0, 2])
    truth = switching_evidence(levels, counts)
    found = filtering.run(jax.random.key(12), SWITCHING, (levels, counts), num_particles=20_000)
    assert found.history.drawn["regime"].dtype == jnp.int32 and found.history.drawn[
        "level"
    ].shape == (4, 20_000)
    assert abs(found.log_z - truth) < 5 * found.log_z_std_error < 0.15
    drawn = smoothing.backward_sample(jax.random.key(13), SWITCHING, found.history, 5)
    assert jax.tree.map(jnp.shape, drawn) == {"level": (4, 5), "regime": (4, 5)}
    assert set(filtering.moments(found.history.drawn, found.history.log_weights)[0]) == {
        "level",
        "regime",
    }


@pytest.mark.slow
def test_a_proposal_wider_than_the_support_is_exact():
    """NumPyro's Exponential continues its density below 0; a Normal proposal goes there."""
    positive = StateSpace(
        lambda: dist.Exponential(1.5),
        lambda t, x: dist.Exponential(1 / (0.5 + x)),
        lambda t, x: dist.Normal(x, 0.7),
    )
    options = {
        "proposal": lambda t, x, y: dist.Normal(y, 0.9),
        "initial_proposal": lambda y: dist.Normal(y, 0.9),
    }
    y = np.array([0.1, 0.4])
    grid = np.linspace(0, 30, 6001)
    width = grid[1] - grid[0]
    weight = np.full(6001, width)
    weight[[0, -1]] /= 2
    seen = [np.exp(-0.5 * ((v - grid) / 0.7) ** 2) / (0.7 * np.sqrt(2 * np.pi)) for v in y]
    first = 1.5 * np.exp(-1.5 * grid) * seen[0] * weight
    rates = 1 / (0.5 + grid)
    truth = float(np.sum((first * rates) @ np.exp(-np.outer(rates, grid)) * seen[1] * weight))
    keys = jax.random.split(jax.random.key(14), 4000)
    found = jax.vmap(
        lambda key: filtering.run(key, positive, y, num_particles=16, **options).log_z
    )(keys)
    assert_z(np.exp(np.asarray(found)) / truth, 1.0, resolution=0.01)


def test_parameters_bound_by_partial_do_not_compile_again():
    counter = TraceCounter(lambda slope, t, x: dist.Normal(slope * x, 1.0))

    def transition(slope: Any, t: Any, x: Any) -> Any:
        return counter(slope, t, x)

    def run(slope: float) -> Any:
        model = StateSpace(initial, Partial(transition, jnp.float32(slope)), observation)
        return filtering.run(jax.random.key(0), model, y, num_particles=10).log_z

    def initial() -> Any:
        return dist.Normal(0.0, 1.0)

    def observation(t: Any, x: Any) -> Any:
        return dist.Normal(x, 1.0)

    y = jnp.array([0.3, 0.1, -0.2])
    first = run(0.5)
    traces = counter.count
    assert run(0.9) != first and counter.count == traces


@pytest.mark.slow
def test_longer_runs_and_larger_populations_keep_their_prefix():
    run = functools.partial(filtering.run, jax.random.key(15), LINEAR, threshold=0.0)
    short, long, large = (
        run(Y[:3], num_particles=5),
        run(Y, num_particles=5),
        run(Y, num_particles=9),
    )
    np.testing.assert_array_equal(long.history.drawn[:3], short.history.drawn)
    np.testing.assert_allclose(large.history.drawn[:, :5], long.history.drawn, rtol=1e-5)


def test_the_dead_are_flagged_and_nan_is_counted():
    nowhere = LINEAR._replace(
        observation=lambda t, x: dist.Uniform(x[:, :1], x[:, :1] + 1e-6).to_event(1)
    )
    found = filtering.run(jax.random.key(16), nowhere, Y, num_particles=4)
    assert found.log_z == -jnp.inf and found.log_z_std_error == jnp.inf and found.num_invalid == 0
    assert jnp.isnan(filtering.moments(found.history.drawn, found.history.log_weights)[0]).all()
    broken = LINEAR._replace(
        observation=lambda t, x: dist.Normal(x[:, :1] * jnp.nan, 1.0).to_event(1)
    )
    found = filtering.run(jax.random.key(16), broken, Y[:1], num_particles=4)
    assert found.log_z == -jnp.inf and found.num_invalid == 4


def test_one_particle_and_one_time():
    found = filtering.run(jax.random.key(17), LINEAR, Y[:1], num_particles=1, threshold=1.1)
    assert found.history.drawn.shape == (1, 1, 2) and jnp.isfinite(found.log_z)
    assert smoothing.backward_sample(jax.random.key(18), LINEAR, found.history, 3).shape == (
        1,
        3,
        2,
    )


@pytest.mark.slow
def test_assess_gives_the_weight_that_sample_reports():
    x = jax.random.normal(jax.random.key(19), (6, 2))
    for proposal in (None, poor_guide):
        move = filtering.propagate(LINEAR, jnp.int32(1), jnp.asarray(Y[1]), proposal)
        new, dw = move.sample(jax.random.key(20), x)
        assert move.assess is not None
        np.testing.assert_allclose(move.assess(jax.random.key(21), x, new), dw, rtol=1e-5)


# --- planted faults ---


def lookahead_kept(patch: pytest.MonkeyPatch) -> None:
    """Ancestors are drawn by W eta, and weighed as if by W."""

    def resample(
        key: Any, p: Any, resampler: Any, when: Any, reorder: Any, log_selection: Any
    ) -> Any:
        after, ancestors = base.resample(key, p, resampler, when, reorder, log_selection)
        return dataclasses.replace(
            after, log_weights=jnp.where(when, 0.0, after.log_weights)
        ), ancestors

    patch.setattr(population, "resample", resample)


def proposal_density_dropped(patch: pytest.MonkeyPatch) -> None:
    increment = filtering._increment
    patch.setattr(
        filtering,
        "_increment",
        lambda model, t, law, guided, x, y: increment(model, t, law, None, x, y),
    )


def missing_counted(patch: pytest.MonkeyPatch) -> None:
    """A missing observation is filled with 0 and weighed."""
    increment = filtering._increment
    patch.setattr(
        filtering, "_increment", lambda *args: increment(*args[:-1], jnp.nan_to_num(args[-1]))
    )


FAULTS = {
    "look-ahead not divided out": (lookahead_kept, "auxiliary", Y),
    "proposal density dropped": (proposal_density_dropped, "poorly guided", Y),
    "missing observations weighed": (missing_counted, "bootstrap", Y_MISSING),
}

LANES = [
    pytest.param(name, marks=() if name.startswith("look-ahead") else pytest.mark.slow)
    for name in FAULTS
]


@pytest.mark.slow
@pytest.mark.parametrize("name", LANES)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, which, observations = FAULTS[name]
    plant(monkeypatch)
    fresh = functools.partial(resampling.systematic)  # a new static argument, hence a new trace
    with pytest.raises(AssertionError, match="z = "):
        check_law_1({**FILTERS[which], "resampler": fresh}, observations, resolution=jnp.inf)


# --- bad input ---

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no time axis": (
        lambda: filtering.run(jax.random.key(0), LINEAR, 1.0),
        r"expected observations \[T, \.\.\.\] with one leading time axis",
    ),
    "no times": (
        lambda: filtering.run(jax.random.key(0), LINEAR, jnp.zeros((0, 1))),
        r"T >= 1, got shapes \[\(0, 1\)\]; put time first",
    ),
    "two lengths": (
        lambda: filtering.run(
            jax.random.key(0), SWITCHING, (jnp.zeros(3), jnp.zeros(4, jnp.int32))
        ),
        r"got shapes \[\(3,\), \(4,\)\]",
    ),
    "time is not first": (
        lambda: filtering.run(jax.random.key(0), LINEAR, Y.T),
        r"the events \[\(1,\)\] of the observation law, got \[\(5,\)\]; put time first",
    ),
    "no event axis": (
        lambda: filtering.run(
            jax.random.key(0),
            LINEAR._replace(transition=lambda t, x: dist.Normal(x, 1.0)),
            Y,
            num_particles=4,
        ),
        r"expected transition .* batch shape \(4,\)"
        r".*got batch shape \(4, 2\), event shape \(\); .*\.to_event",
    ),
    "proposal of another batch": (
        lambda: filtering.run(
            jax.random.key(0),
            LINEAR,
            Y,
            num_particles=4,
            proposal=lambda t, x, y: locally_optimal(t, x[:3], y),
        ),
        r"expected proposal .* batch shape \(4,\), .* got batch shape \(3,\)",
    ),
    "proposal of another event": (
        lambda: filtering.run(
            jax.random.key(0),
            LINEAR,
            Y,
            num_particles=4,
            proposal=lambda t, x, y: dist.Normal(x[:, 0], 1.0),
        ),
        r"expected the proposal's draws to be shaped like the model's,"
        r" float(32|64)\[4, 2\], got float(32|64)\[4\]",
    ),
    "transition of another event": (
        lambda: filtering.run(
            jax.random.key(0),
            LINEAR._replace(transition=lambda t, x: dist.Normal(x[:, 0], 1.0)),
            Y,
            num_particles=4,
        ),
        r"expected the transition's draws to be shaped like the states it was given",
    ),
    "not a law": (
        lambda: filtering.run(
            jax.random.key(0), LINEAR._replace(observation=lambda t, x: x), Y, num_particles=4
        ),
        r"expected observation to return NumPyro distributions",
    ),
    "look-ahead of another shape": (
        lambda: filtering.run(
            jax.random.key(0), LINEAR, Y, num_particles=4, lookahead=lambda t, x, y: x
        ),
        r"log eta of shape \(4,\), got \(4, 2\)",
    ),
    "no particles": (
        lambda: filtering.run(jax.random.key(0), LINEAR, Y, num_particles=0),
        "expected num_particles to be a whole number",
    ),
    "no draws": (
        lambda: smoothing.backward_sample(
            jax.random.key(0),
            LINEAR,
            filtering.run(jax.random.key(0), LINEAR, Y, num_particles=2).history,
            0,
        ),
        "expected num to be a whole number",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
