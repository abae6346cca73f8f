"""REBASE: its allocation by hand, the law of its choice enumerated, and LAW 1 of its exact twin."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers.search import rebase
from samplers.testing import check_resampler
from tests.helpers import MAX_TOKENS, String
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import check_law, masses, plain
from tests.samplers.process_rewards import STEPS, exact, reward
from tests.samplers.search.test_step_search import SMALL_STEPS, next_steps, score, small, tie_free

NUM, TEMPERATURE = 3, 0.3
SHARES = [0.9, 0.8, 0.7, 0.2]


def by_hand(log_shares: list[float], num: int) -> list[int]:
    """The published loop."""
    weights = [math.exp(share) for share in log_shares]
    places, rest = [0] * len(weights), sum(weights)
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        places[i] = min(num, math.ceil(num * weights[i] / rest - 1e-9)) if num else 0
        num, rest = num - places[i], rest - weights[i]
    return places


def test_the_published_example():
    """Rewards .9, .8, .7, .2, T = .2: ideal shares of 16 are 7.98, 4.84, 2.94, .24."""
    log_shares = jnp.asarray(SHARES) / 0.2
    np.testing.assert_array_equal(rebase.allocate(log_shares, 16), [8, 5, 3, 0])
    np.testing.assert_array_equal(rebase.allocate(log_shares[::-1], 16), [0, 3, 5, 8])
    # Equal shares are whole numbers; what is dead gets nothing, and among the dead nobody does.
    np.testing.assert_array_equal(rebase.allocate(jnp.full(5, -700.0), 15), [3] * 5)
    np.testing.assert_array_equal(rebase.allocate(jnp.array([0, -jnp.inf, 0.0]), 4), [2, 0, 2])


def test_the_allocation_is_the_published_loop():
    shares = 2 * np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    numbers = np.arange(50, dtype=np.int32) % 12
    found = jax.vmap(rebase.allocate)(jnp.asarray(shares), jnp.asarray(numbers))
    expected = [by_hand(row.tolist(), int(n)) for row, n in zip(shares, numbers, strict=True)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found.sum(1), numbers)


def test_it_is_no_resampler_that_a_weight_could_repair():
    with pytest.raises(AssertionError):
        check_resampler(
            lambda key, log_probs, num: jnp.repeat(
                jnp.arange(len(log_probs)), rebase.allocate(log_probs, num), total_repeat_length=num
            ),
            key=jax.random.key(0),
            num_draws=100,
        )


def rebase_law(steps: str, max_steps: int) -> dict[String, float]:
    """State: the growing strings in their places, and the best one that has ended."""
    states: dict[tuple, float] = {(((),) * NUM, None): 1.0}
    law: dict[String, float] = defaultdict(float)
    for r in range(max_steps):
        after: dict[tuple, float] = defaultdict(float)
        for (growing, best), mass in states.items():
            laws = [next_steps(x, steps if r < max_steps - 1 else None) for x in growing]
            for drawn in itertools.product(*laws):
                weight = math.prod(found[step] for found, step in zip(laws, drawn, strict=True))
                ended = [x for x, over in drawn if over] + [best] * (best is not None)
                first = max(ended, key=score) if ended else None
                left = [x for x, over in drawn if not over]
                if not left:
                    law[first] += mass * weight
                    continue
                shares = [1 / (1 + math.exp(-score(x))) / TEMPERATURE for x in left]
                places = by_hand(shares, len(left))
                kept = [x for x, n in zip(left, places, strict=True) for _ in range(n)]
                after[tuple(sorted(kept)), first] += mass * weight
        states = after
    return law


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "max_steps"), [("every_1", 40), ("every_2", 2)])
def test_the_choice_has_the_enumerated_law(steps: str, max_steps: int):
    p = small()

    def one(key: Any) -> Any:
        out = rebase.run(
            key,
            p,
            tie_free,
            SMALL_STEPS[steps],
            width=NUM,
            temperature=TEMPERATURE,
            max_steps=max_steps,
        )
        return out.chosen.tokens[0]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    expected = rebase_law(steps, min(max_steps, MAX_TOKENS))
    assert abs(sum(expected.values()) - 1) < 1e-6
    check_frequencies(found, expected)
    if steps == "every_1":  # best of n
        with pytest.raises(AssertionError):
            check_frequencies(found, rebase_law(steps, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [("markov", "every_1"), ("table", "delimiters")])
def test_the_twin_obeys_law_1(model: str, steps: str):
    p = plain(model)

    def run(key: Any) -> Any:
        return rebase.exact(key, p, reward, STEPS[steps], num_particles=4, temperature=0.5)

    found = masses(run, jax.random.split(jax.random.key(2), 20_000))
    check_law(found, exact(model), resolution=0.02)


@pytest.mark.slow
def test_a_twin_that_forgets_its_selection_fails():
    """Planted fault: the copies weigh the same."""
    p = plain("markov")

    def run(key: Any) -> Any:
        def forget(key: Any, log_probs: Any, num: int) -> Any:
            drawn = jax.random.categorical(key, log_probs, shape=(num,)).astype(jnp.int32)
            return drawn, jax.nn.log_softmax(log_probs)[drawn] + jnp.log(num)

        return rebase.exact(
            key, p, reward, STEPS["every_1"], num_particles=4, temperature=0.5, resampler=forget
        )

    found = masses(run, jax.random.split(jax.random.key(2), 5_000))
    with pytest.raises(AssertionError):
        check_law(found, exact("markov"), resolution=0.1)


@pytest.mark.bad_input
def test_bad_input():
    args = (jax.random.key(0), plain("hmm"), reward, STEPS["every_1"])
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0"):
        rebase.run(*args, temperature=0)
    with pytest.raises(ValueError, match="expected a temperature above 0, got -1"):
        rebase.exact(*args, temperature=-1.0)
    with pytest.raises(ValueError, match="expected a plain language model"):
        rebase.run(args[0], plain("hmm") ** 2, *args[2:])
    with pytest.raises(ValueError, match="expected width to be a whole number of at least 1"):
        rebase.run(*args, width=0)
