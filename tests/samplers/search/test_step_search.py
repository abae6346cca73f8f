"""Searches have no target, but the law of their choice can be enumerated: all draws of all rounds,
in plain Python.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.target import Target
from samplers.search import step_search
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, String
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import code, plain
from tests.samplers.process_rewards import STEPS, ends, reward

VOCAB_SIZE, NUM, WIDTH = 3, 4, 2  # the smallest beam that both prunes and keeps two
SMALL_STEPS = {**STEPS, "delimiters": ppl.Steps(delimiters=[2])}  # the small vocabulary has no 3
SCORES = np.random.default_rng(0).normal(size=helpers.VOCAB_SIZE**MAX_TOKENS)
"""A log-odds for every string, without ties."""


def small() -> Target:
    return tabular.random_markov(jax.random.key(3), VOCAB_SIZE, eos=EOS).given(
        [2], max_tokens=MAX_TOKENS
    )


def tie_free(tokens: Any, length: Any) -> Any:
    return jax.nn.sigmoid(jnp.asarray(SCORES, jnp.float32)[code(tokens)])


@functools.cache
def score(x: String) -> float:
    tokens, _ = helpers.as_arrays([x], MAX_TOKENS, EOS)
    return SCORES[int(code(np.asarray(tokens))[0])]


Step = tuple[String, bool]
"""A string and whether it has ended."""


@functools.cache
def rows() -> np.ndarray:
    return np.exp(np.asarray(small().lm.params, np.float64))


@functools.cache
def next_steps(x: String, steps: str | None) -> dict[Step, float]:
    """The law of one more step of x; without `steps` it goes to the end."""
    row = rows()[x[-1] if x else 2]
    law: dict[Step, float] = defaultdict(float)
    for token, probability in enumerate(row):
        longer = (*x, token)
        if token == EOS:
            law[x, True] += probability
        elif len(longer) == MAX_TOKENS:
            law[longer, True] += probability
        elif steps is not None and ends(longer, steps):
            law[longer, False] += probability
        else:
            for step, rest in next_steps(longer, steps).items():
                law[step] += probability * rest
    return {step: probability for step, probability in law.items() if probability > 0}


@functools.cache
def beam_law(steps: str, max_steps: int) -> dict[String, float]:
    """State: the growing strings that are kept, best first, and the best one that has ended."""
    states: dict[tuple, float] = {(((),), None): 1.0}
    for r in range(max_steps):
        after: dict[tuple, float] = defaultdict(float)
        for (kept, best), mass in states.items():
            if not kept:
                after[kept, best] += mass
                continue
            drawn: dict[tuple, float] = {((), best): mass}
            for i in range(NUM):
                law = next_steps(kept[i % len(kept)], steps if r < max_steps - 1 else None)
                drawn = with_one_more(drawn, law)
            for state, weight in drawn.items():
                after[state] += weight
        states = after
    law: dict[String, float] = defaultdict(float)
    for (_, best), mass in states.items():
        law[best] += mass
    return law


def with_one_more(states: dict[tuple, float], law: dict[Step, float]) -> dict[tuple, float]:
    """States after another step is drawn: what will not be kept is forgotten at once."""
    after: dict[tuple, float] = defaultdict(float)
    for ((growing, best), mass), ((x, is_over), prob) in itertools.product(
        states.items(), law.items()
    ):
        if is_over:
            after[growing, x if best is None else max(x, best, key=score)] += mass * prob
        else:
            kept = sorted((*growing, x), key=score, reverse=True)[: NUM // WIDTH]
            after[tuple(kept), best] += mass * prob
    return after


@functools.cache
def dvts_law(steps: str, max_steps: int) -> dict[String, float]:
    """Greedy best of m per step, and the best of n / m such searches."""
    states: dict[Step, float] = {((), False): 1.0}
    for r in range(max_steps):
        after: dict[Step, float] = defaultdict(float)
        for (x, is_over), mass in states.items():
            if is_over:
                after[x, True] += mass
                continue
            law = next_steps(x, steps if r < max_steps - 1 else None)
            for drawn in itertools.product(law, repeat=WIDTH):
                after[max(drawn, key=lambda step: score(step[0]))] += mass * math.prod(
                    law[step] for step in drawn
                )
        states = after
    result: dict[String, float] = defaultdict(float)
    for searches in itertools.product(states, repeat=NUM // WIDTH):
        best = max((x for x, _ in searches), key=score)
        result[best] += math.prod(states[step] for step in searches)
    return result


def choices(search: Any, steps: str, max_steps: int, runs: int = 20_000) -> Any:
    """The strings that many searches choose [runs, T]."""
    p = small()

    def one(key: Any) -> Any:
        out = search(
            key, p, tie_free, SMALL_STEPS[steps], num_beams=NUM, width=WIDTH, max_steps=max_steps
        )
        return out.sequences.tokens[out.best]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), runs))


CASES = [
    ("beam", "every_1", 2),
    ("beam", "delimiters", 40),
    ("beam", "every_2", 1),
    ("dvts", "delimiters", 40),
    ("dvts", "every_2", 2),
]
LAWS = {"beam": (step_search.beam, beam_law), "dvts": (step_search.dvts, dvts_law)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "max_steps"), CASES)
def test_the_choice_has_the_enumerated_law(name: str, steps: str, max_steps: int):
    search, law = LAWS[name]
    expected = law(steps, min(max_steps, MAX_TOKENS))
    assert abs(sum(expected.values()) - 1) < 1e-6
    found = choices(search, steps, max_steps)
    check_frequencies(found, expected)
    # The other search and another number of rounds have other laws.
    other = dvts_law if law is beam_law else beam_law
    with pytest.raises(AssertionError):
        check_frequencies(
            found, other(steps, 1 if max_steps > 1 and law is dvts_law else MAX_TOKENS)
        )


@pytest.mark.slow
def test_one_round_of_either_is_best_of_n():
    """With one round all candidates run to their end; so the enumeration has to give F(s_x)^n -
    F(s_x^-)^n.
    """
    law, _ = helpers.brute_force_law(small().lm, [2], MAX_TOKENS)
    ranked = sorted(law, key=score)
    below = np.concatenate([[0], np.cumsum([law[x] for x in ranked])])
    best_of_n = {x: float(p) for x, p in zip(ranked, np.diff(below**NUM), strict=True)}
    assert helpers.total_variation(best_of_n, beam_law("every_1", 1)) < 1e-6
    assert helpers.total_variation(best_of_n, dvts_law("every_1", 1)) < 1e-6


@pytest.mark.slow
def test_a_beam_of_the_lowest_scores_fails(monkeypatch: pytest.MonkeyPatch):
    """Planted fault: the beam goes on from the lowest scores."""
    argsort = jnp.argsort
    monkeypatch.setattr(jnp, "argsort", lambda x: argsort(jnp.where(jnp.isposinf(x), x, -x)))
    # Three rounds occur in no other test, so nothing that was compiled without the fault is used.
    with pytest.raises(AssertionError, match="z = "):
        check_frequencies(choices(step_search.beam, "every_1", 3, 10_000), beam_law("every_1", 3))


@pytest.mark.slow
def test_what_a_search_returns():
    args = (jax.random.key(5), plain("table"), reward, STEPS["every_1"])
    for search in (step_search.beam, step_search.dvts):
        out = search(*args, num_beams=8, width=4)
        scores, ended = np.asarray(out.scores), np.asarray(out.details["ended"])
        assert ended[out.best] and scores[out.best] == scores.max()
        x = out.sequences
        r = reward(x.tokens, x.length)
        np.testing.assert_allclose(scores[ended], np.log(r / (1 - r))[ended], atol=1e-4)
        assert int(out.details["num_scored"]) == int(out.cost.tokens)  # steps are tokens
        assert int(out.details["rounds"]) == int(out.cost.forwards) <= MAX_TOKENS
    assert not ended.all()  # DVTS has siblings that it did not keep


def test_each_search_keeps_the_best_of_its_own():
    """Strings 0 0 and 2 2, whose first token has probability a half: of two candidates a search
    keeps 2, the better one, with probability 3 / 4, and goes on with it in both places.
    """
    rows = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0.5, 0, 0.5, 0]])
    p, num = tabular.markov(rows, eos=EOS).given([3], max_tokens=2), 1000
    out = step_search.dvts(
        jax.random.key(7),
        p,
        lambda tokens, length: 0.5 + 0.1 * tokens[:, 0],
        STEPS["every_1"],
        num_beams=2 * num,
        width=2,
    )
    tokens = np.asarray(out.sequences.tokens).reshape(num, 4)
    assert (tokens == tokens[:, :1]).all() and out.details["ended"].all()
    helpers.assert_z(tokens[:, 0] == 2, 0.75, resolution=0.02)


@pytest.mark.slow
def test_rewards_that_are_no_probability_lose():
    def broken(tokens: Any, length: Any) -> Any:
        return jnp.where(tokens[:, 0] == 3, jnp.nan, jnp.where(tokens[:, 0] == 0, 0.9, 0.6))

    for search in (step_search.beam, step_search.dvts):
        out = search(
            jax.random.key(6), plain("table"), broken, STEPS["every_1"], num_beams=16, width=4
        )
        assert out.scores[out.best] > -jnp.inf and not jnp.isnan(out.scores).any()
        assert out.sequences.tokens[out.best, 0] != 3


@pytest.mark.bad_input
def test_bad_input():
    args = (jax.random.key(0), plain("hmm"), reward, STEPS["every_1"])
    with pytest.raises(
        ValueError, match="expected width to divide num_beams, got 4 and 6; pass num_beams=8"
    ):
        step_search.beam(*args, num_beams=6)
    with pytest.raises(
        ValueError, match="expected max_steps to be a whole number of at least 1, got 0"
    ):
        step_search.dvts(*args, max_steps=0)
    with pytest.raises(ValueError, match="expected a plain language model"):
        step_search.dvts(args[0], ppl.banned([2]) * plain("hmm"), *args[2:])
