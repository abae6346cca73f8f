"""Entropic particle filtering: exact by the carry, and the published form by its recursion of
temperatures.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from samplers.results import Choice, Weighted
from samplers.smc import entropic
from samplers.strings import selection
from tests import helpers
from tests.samplers.problems import check_law, masses, plain
from tests.samplers.process_rewards import (
    STEPS,
    exact,
    normalised,
    plain_law,
    populations,
    reward,
    scores,
)
from tests.samplers.smc.test_particle_filtering import NUM_PARTICLES, RUNS
from tests.samplers.smc.test_particle_filtering import limit as limit_without_annealing

MAX_STEPS = 6
"""More than there are, so that annealing lasts for more than one step; rewards are sharpened so
that it is needed.
"""


def limit(model: str, steps: str) -> tuple[dict[helpers.String, float], list[float]]:
    """The law that the docstring of `published` says, and the temperatures T_1, T_2, ..."""
    law = dict(plain_law(model))
    after = {x: [SHARP * score for score in scores(x, steps)] for x in law}
    rounds = len(next(iter(after.values())))
    temperatures = []
    for t in range(rounds - 1):
        total = sum(law.values())
        mean = sum(law[x] * math.exp(after[x][t]) for x in law) / total
        square = sum(law[x] * math.exp(2 * after[x][t]) for x in law) / total
        rho, tau = mean**2 / square, (t + 1) / MAX_STEPS
        temperatures.append(max(1.0, (1 - tau) / rho) if rho < 0.5 and tau < 0.5 else 1.0)
        law = {x: law[x] * math.exp(after[x][t] / temperatures[-1]) for x in law}
    return normalised({x: law[x] * math.exp(after[x][-1]) for x in law}), temperatures


SHARP = 2.5


def sharp(tokens: Any, length: Any) -> Any:
    """Overconfident: `reward` with its log-odds times SHARP."""
    r = reward(tokens, length)
    return r**SHARP / (r**SHARP + (1 - r) ** SHARP)


def sharp_target(model: str) -> dict[helpers.String, float]:
    law = plain_law(model)
    return {x: p * (exact(model)[x] / p) ** SHARP for x, p in law.items()}


def exact_masses(model: str, steps: str, **options: Any) -> np.ndarray:
    p = plain(model)

    def run(key: Any) -> Weighted:
        return entropic.run(
            key, p, sharp, STEPS[steps], num_particles=8, max_steps=MAX_STEPS, **options
        )

    return masses(run, jax.random.split(jax.random.key(2), 20_000))


def published(model: str, steps: str) -> np.ndarray:
    p = plain(model)

    def run(key: Any) -> Choice:
        return entropic.published(
            key, p, sharp, STEPS[steps], num_particles=NUM_PARTICLES, max_steps=MAX_STEPS
        )

    return populations(run, jax.random.key(1), RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "lookahead"), [("hmm", False), ("table", True)])
def test_the_exact_form_obeys_law_1(model: str, lookahead: bool):
    found = exact_masses(model, "every_1", lookahead=lookahead)
    check_law(found, sharp_target(model), resolution=0.02)


@pytest.mark.slow
def test_without_the_carry_it_fails(monkeypatch: pytest.MonkeyPatch):
    """Draw from the annealed law and set all weights to 1: unbiased for nothing."""

    def forgotten(*args: Any) -> Any:
        p, log_selection, spent = selection._entropic(*args)
        return selection.dataclasses.replace(p, log_weights=log_selection), None, spent

    monkeypatch.setattr(
        entropic, "entropic", lambda n: jax.tree_util.Partial(forgotten, np.float32(n))
    )
    with pytest.raises(AssertionError, match="z = "):
        check_law(exact_masses("hmm", "every_1"), sharp_target("hmm"), resolution=0.02)


@pytest.mark.slow
def test_the_published_form_has_the_limit_that_it_says():
    model, steps = "hmm", "every_1"
    law, temperatures = limit(model, steps)
    assert max(temperatures) > 1.2, temperatures  # else this would test nothing new
    found = published(model, steps)
    check_law(found, law, resolution=1e-3)
    assert helpers.total_variation(law, normalised(sharp_target(model))) > 0.1
    with pytest.raises(AssertionError, match="z = "):
        check_law(found, normalised(sharp_target(model)), resolution=1e-3)


@pytest.mark.slow
def test_without_annealing_the_limit_is_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entropic, "entropic", lambda n: selection.by_weight)
    law, _ = limit("hmm", "every_1")
    with pytest.raises(AssertionError, match="z = "):
        check_law(published("hmm", "every_1"), law, resolution=1e-3)
    assert limit_without_annealing("hmm", "every_1") != law


@pytest.mark.slow
def test_systematic_draws_keep_the_best():
    out = entropic.published(
        jax.random.key(3), plain("table"), sharp, STEPS["every_1"], num_particles=32
    )
    assert out.scores[out.best] == (out.details or {})["log_weights"].max()


@pytest.mark.slow
def test_look_ahead_is_counted():
    args = (jax.random.key(4), plain("table"), reward, STEPS["every_2"])
    without = entropic.run(*args, num_particles=16)
    ahead = entropic.run(*args, num_particles=16, lookahead=True)
    assert int(ahead.cost.tokens) > int(without.cost.tokens)
