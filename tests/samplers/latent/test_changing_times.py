"""Filters and smoothers of models whose laws change with time, against all paths: bootstrap,
guided, auxiliary and both, run as they are run.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

from samplers.latent import filtering, smoothing
from samplers.latent.filtering import StateSpace
from samplers.results import History
from tests.helpers import assert_z

START = np.array([0.65, 0.35])
MOVES = np.array(
    [
        [[0.5, 0.5], [0.5, 0.5]],  # into time 0: never asked for
        [[0.9, 0.1], [0.3, 0.7]],
        [[0.2, 0.8], [0.75, 0.25]],
        [[0.6, 0.4], [0.05, 0.95]],
    ]
)
"""[t, before, after]: the transition into time t, another one at each time."""
LEVEL = np.array([[0.0, 1.0], [0.5, -1.0], [-0.5, 0.7], [1.2, -0.3]])
SCALE = np.array([0.8, 0.5, 1.0, 0.6])
Y = np.array([0.7, -0.6, np.nan, 0.4])
GUESS = np.array([[0.4, -0.5], [-0.8, 0.6], [0.9, -0.2], [-0.3, 0.7]])
"""[t, state]: what look-ahead and guide expect, rightly or not."""
TIMES, NUM, RUNS = len(Y), 3, 6000
PATHS = np.array(list(itertools.product(range(2), repeat=TIMES)))


def transition(t: Any, x: Any) -> Any:
    return dist.Categorical(jnp.asarray(MOVES)[t, x])


def observation(t: Any, x: Any) -> Any:
    return dist.Normal(jnp.asarray(LEVEL)[t, x], jnp.asarray(SCALE)[t])


CHANGING = StateSpace(lambda: dist.Categorical(jnp.asarray(START)), transition, observation)


def joint() -> np.ndarray:
    """p(x_0..x_T-1, y) of all paths."""
    found = START[PATHS[:, 0]]
    for t in range(TIMES):
        if t:
            found = found * MOVES[t, PATHS[:, t - 1], PATHS[:, t]]
        if np.isfinite(Y[t]):
            z = (Y[t] - LEVEL[t, PATHS[:, t]]) / SCALE[t]
            found = found * np.exp(-0.5 * z**2) / (SCALE[t] * np.sqrt(2 * np.pi))
    return found


def guide(strength: Any, t: Any, x: Any, y: Any) -> Any:
    """The transition, bent by what is guessed and seen."""
    bent = jnp.asarray(GUESS)[t] * jnp.where(jnp.isnan(y), 1.0, 1 + y)
    return dist.Categorical(logits=jnp.log(jnp.asarray(MOVES)[t, x]) + strength * bent)


def initial(strength: Any, y: Any) -> Any:
    bent = jnp.asarray(GUESS)[0] * (1 + y)
    return dist.Categorical(logits=jnp.log(jnp.asarray(START)) + strength * bent)


def ahead(strength: Any, t: Any, x: Any, y: Any) -> Any:
    return strength * (jnp.asarray(GUESS)[t, x] + 0.3 * jnp.where(x == 1, y, -y))


@pytest.fixture(scope="module")
def masses() -> Any:
    """(guide's strength, look-ahead's, threshold) -> exp(log Z-hat) mean_i exp(w_i) 1{path} of
    every path [R, paths]; one program for all.
    """

    @jax.jit
    def run(keys: Any, guided: Any, looks: Any, threshold: Any) -> Any:
        def one(key: Any) -> Any:
            found = filtering.run(
                key,
                CHANGING,
                jnp.asarray(Y, jnp.float32),
                num_particles=NUM,
                proposal=Partial(guide, guided),
                initial_proposal=Partial(initial, guided),
                lookahead=Partial(ahead, looks),
                threshold=threshold,
            )
            path = smoothing.trajectories(found.history)
            place = (path * 2 ** jnp.arange(TIMES)[::-1, None]).sum(0)
            weights = jnp.exp(found.log_z + found.log_weights) / NUM
            return jnp.zeros(len(PATHS)).at[place].add(weights), found.trace.resampled

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(1), RUNS)
    return lambda *how: [np.asarray(x) for x in run(keys, *map(jnp.float32, how))]


@pytest.mark.parametrize(
    ("guided", "looks", "threshold"),
    [(0.0, 0.0, 0.8), (0.9, 0.0, 0.8), (0.0, 0.9, 0.8), (0.9, 0.9, 1.1), (0.9, 0.9, 0.8)],
)
def test_every_path_has_its_mass(masses: Any, guided: float, looks: float, threshold: float):
    found, resampled = masses(guided, looks, threshold)
    truth = joint()
    assert_z(found.sum(1), truth.sum(), resolution=0.02 * truth.sum())
    for path, mass in enumerate(truth):
        if mass > 0.02 * truth.sum():
            assert_z(found[:, path], mass, resolution=0.1 * mass)
    often = resampled[:, 1:].mean()
    assert often == 1 if threshold > 1 else 0.1 < often < 0.95


def seen_next(t: Any, x: Any, y: Any) -> Any:
    """log p(x_t | x_{t-1}) p(y_t | x_t) for both values of x_t [N, 2]."""
    seen = dist.Normal(jnp.asarray(LEVEL)[t], jnp.asarray(SCALE)[t]).log_prob(y)
    return jnp.log(jnp.asarray(MOVES)[t, x]) + seen


def test_full_adaptation_leaves_even_weights_at_every_time():
    """Ancestors by p(y_{t+1} | x_t), states by p(x_{t+1} | x_t, y_{t+1}): so proposal and
    look-ahead are asked about the times that they should be.
    """
    found = filtering.run(
        jax.random.key(4),
        CHANGING,
        jnp.asarray(Y, jnp.float32),
        num_particles=50,
        proposal=lambda t, x, y: dist.Categorical(logits=seen_next(t, x, y)),
        lookahead=lambda t, x, y: jax.nn.logsumexp(seen_next(t + 1, x, y), axis=1),
        threshold=1.1,
    )
    assert found.trace.resampled[1:].all() and (np.asarray(found.history.log_weights[0]) != 0).all()
    for t in (1, 3):  # at time 2 nothing was seen, at 3 all is as it should be again
        np.testing.assert_allclose(found.history.log_weights[t], 0, atol=1e-5)


def test_backward_draws_of_exact_filters_are_exact():
    """With both states as particles and the filter's own law as their weights nothing is
    approximate.
    """
    law, weights = START, []
    for t in range(TIMES):
        law = law @ MOVES[t] if t else law
        if np.isfinite(Y[t]):
            law = law * np.exp(-0.5 * ((Y[t] - LEVEL[t]) / SCALE[t]) ** 2)
        weights.append(np.log(law / law.mean()))
    states = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (TIMES, 2))
    history = History(
        drawn=states, log_weights=jnp.asarray(np.array(weights), jnp.float32), ancestors=states
    )
    drawn = smoothing.backward_sample(jax.random.key(2), CHANGING, history, 20_000)
    place = np.asarray((drawn * 2 ** jnp.arange(TIMES)[::-1, None]).sum(0))
    truth = joint() / joint().sum()
    for path, p in enumerate(truth):
        if p > 0.005:
            assert_z(place == path, p, resolution=0.004)


def test_the_filter_of_a_changing_model_is_the_forward_law():
    """Weights of the history at every time, with many particles."""
    found = filtering.run(
        jax.random.key(3), CHANGING, jnp.asarray(Y, jnp.float32), num_particles=20_000
    )
    law = START
    for t in range(TIMES):
        law = law @ MOVES[t] if t else law
        if np.isfinite(Y[t]):
            law = law * np.exp(-0.5 * ((Y[t] - LEVEL[t]) / SCALE[t]) ** 2)
            law = law / law.sum()
        weights = np.exp(np.asarray(found.history.log_weights[t], np.float64))
        first = np.asarray(found.history.drawn[t]) == 0
        assert (weights * first).sum() / weights.sum() == pytest.approx(law[0], abs=0.02)
