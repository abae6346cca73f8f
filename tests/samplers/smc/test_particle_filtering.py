"""Particle filtering: the exact form obeys LAW 1 for p odds(r), the published one has the law that
it says.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers import resampling
from samplers.results import Choice, Weighted
from samplers.smc import particle_filtering
from samplers.strings.selection import next_step
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS
from tests.samplers.problems import check_law, masses, plain
from tests.samplers.process_rewards import (
    STEPS,
    exact,
    log_odds,
    normalised,
    plain_law,
    populations,
    reward,
    scores,
)

NUM_PARTICLES, RUNS = (
    1 << 12,
    100,
)  # large enough for the bias of 1 / N to vanish beside the noise of all runs


def limit(model: str, steps: str) -> dict[helpers.String, float]:
    """p(x) prod_t odds(r(x_1:min(t, |x|))), normalised, as the docstring of `published` has it."""
    return normalised({x: p * math.exp(sum(scores(x, steps))) for x, p in plain_law(model).items()})


def published(model: str, steps: str) -> np.ndarray:
    p = plain(model)

    def run(key: Any) -> Choice:
        return particle_filtering.published(
            key, p, reward, STEPS[steps], num_particles=NUM_PARTICLES
        )

    return populations(run, jax.random.key(1), RUNS)


def exact_masses(model: str, steps: str, **options: Any) -> np.ndarray:
    p = plain(model)

    def run(key: Any) -> Weighted:
        return particle_filtering.run(key, p, reward, STEPS[steps], num_particles=4, **options)

    return masses(run, jax.random.split(jax.random.key(2), 20_000))


CASES = [("markov", "every_1"), ("table", "delimiters"), ("hmm", "every_2")]
LANES = [pytest.param(*case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("model", "steps"), LANES)
def test_the_exact_form_obeys_law_1(model: str, steps: str):
    check_law(exact_masses(model, steps), exact(model), resolution=0.02)


@pytest.mark.slow
def test_options_do_not_break_law_1():
    options = {
        "threshold": 2.0,
        "resampler": resampling.multinomial,
        "selection": next_step(STEPS["every_2"]),
    }
    check_law(exact_masses("table", "every_2", **options), exact("table"), resolution=0.02)


@pytest.mark.slow
def test_weights_that_are_kept_fail():
    kept = particle_filtering.keeping_weights(resampling.systematic)
    with pytest.raises(AssertionError, match="z = "):
        check_law(
            exact_masses("markov", "every_1", resampler=kept), exact("markov"), resolution=0.02
        )


@pytest.mark.slow
def test_the_published_form_has_the_limit_that_it_says():
    model, steps = "hmm", "every_2"
    found = published(model, steps)
    check_law(found, limit(model, steps), resolution=1e-3)
    # ... which is not the target: the distance is fifty times what the noise allows.
    assert helpers.total_variation(limit(model, steps), normalised(exact(model))) > 0.1
    with pytest.raises(AssertionError, match="z = "):
        check_law(found, normalised(exact(model)), resolution=1e-3)


@pytest.mark.slow
def test_the_check_of_the_limit_can_fail(monkeypatch: pytest.MonkeyPatch):
    """Weights set back, as in the exact form: then the law is another one."""

    def set_back(scheme: Any) -> Any:
        return lambda key, log_probs, num: (scheme(key, log_probs, num), jnp.zeros(num))

    monkeypatch.setattr(particle_filtering, "keeping_weights", set_back)
    with pytest.raises(AssertionError, match="z = "):
        check_law(published("markov", "every_1"), limit("markov", "every_1"), resolution=1e-3)


@pytest.mark.slow
def test_scores_are_the_log_odds_and_the_best_survives():
    out = particle_filtering.published(
        jax.random.key(3),
        plain("table"),
        reward,
        STEPS["delimiters"],
        num_particles=64,
        history=True,
    )
    strings = helpers.as_strings(out.sequences.tokens, out.sequences.length)
    found = out.details or {}
    scores = found["log_weights"]
    np.testing.assert_allclose(scores, [log_odds(x) for x in strings], atol=1e-4)
    assert scores[out.best] == out.scores.max() >= np.median(scores)
    kept = ~np.isneginf(out.scores)
    assert 1 < kept.sum() < 64 and (np.asarray(out.scores) == scores)[kept].all()
    assert found["history"].drawn.shape == (MAX_TOKENS, 64, MAX_TOKENS)
    assert int(found["rounds"]) <= MAX_TOKENS and int(found["num_invalid"]) == 0


@pytest.mark.slow
def test_rewards_that_are_no_probability_kill_their_particles():
    def broken(tokens: Any, length: Any) -> Any:
        return jnp.where(tokens[:, 0] == 3, 1.5, jnp.where(tokens[:, 0] == 2, jnp.nan, 0.5))

    steps = STEPS["every_1"]
    out = particle_filtering.published(
        jax.random.key(4), plain("table"), broken, steps, num_particles=64
    )
    found = out.details or {}
    assert int(found["num_invalid"]) > 0
    first = np.asarray(out.sequences.tokens[:, 0])
    alive = np.isfinite(np.asarray(found["log_weights"]))
    assert alive.any() and not np.isin(first[alive], [2, 3]).any() and first[out.best] in (0, EOS)
    exact_form = particle_filtering.run(
        jax.random.key(4), plain("table"), broken, steps, num_particles=64
    )
    assert int(exact_form.num_invalid) > 0 and np.isfinite(exact_form.log_z)
    # Nothing survives: flagged, not NaN.
    args = (plain("table"), lambda tokens, length: jnp.full(length.shape, jnp.nan), steps)
    dead = particle_filtering.published(jax.random.key(5), *args, num_particles=8)
    found = dead.details or {}
    assert np.isneginf(np.asarray(found["log_weights"])).all() and int(found["num_invalid"]) == 8


@pytest.mark.bad_input
def test_bad_input():
    steps = STEPS["every_1"]
    with pytest.raises(
        ValueError, match="expected a plain language model, got a target with a power"
    ):
        particle_filtering.published(jax.random.key(0), plain("hmm") ** 2, reward, steps)
    with pytest.raises(ValueError, match=r"expected log-scores \[N\] = \(32,\)"):
        particle_filtering.run(
            jax.random.key(0), plain("hmm"), lambda tokens, length: tokens / 4.0, steps
        )
    with pytest.raises(
        ValueError, match="expected num_particles to be a whole number of at least 1, got 0"
    ):
        particle_filtering.published(
            jax.random.key(0), plain("hmm"), reward, steps, num_particles=0
        )


@pytest.mark.slow
def test_a_python_reward_is_the_same():
    host = ppl.python(lambda ids: 1 / (1 + math.exp(-log_odds(tuple(ids)))))
    args = (STEPS["every_2"],)
    a = particle_filtering.run(jax.random.key(6), plain("hmm"), reward, *args, num_particles=16)
    b = particle_filtering.run(jax.random.key(6), plain("hmm"), host, *args, num_particles=16)
    np.testing.assert_array_equal(a.sequences.tokens, b.sequences.tokens)
    np.testing.assert_allclose(a.log_z, b.log_z, rtol=1e-5)
