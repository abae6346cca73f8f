"""What the tests of particle filtering share: a reward, its log-odds at every step, and the laws of
populations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ppl
from samplers.results import Choice
from tests import helpers
from tests.helpers import MAX_TOKENS, MODELS, PROMPT, String
from tests.samplers import problems
from tests.samplers.problems import VOCAB_SIZE

SHARPNESS = 1.6
STEPS = {
    "every_1": ppl.Steps(every=1),
    "every_2": ppl.Steps(every=2),
    "delimiters": ppl.Steps(delimiters=[3, 2]),
}
"""Where a step ends; `ends` says the same of one string."""


def reward(tokens: Any, length: Any) -> Any:
    """A process reward in (0, 1), asymmetric in tokens, positions and length."""
    return jax.nn.sigmoid(SHARPNESS * problems.score_arrays(tokens, length) - 0.3)


def log_odds(x: String) -> float:
    """The log-odds of `reward` of one string or prefix."""
    return SHARPNESS * problems.score(x) - 0.3


def ends(x: String, steps: str) -> bool:
    """Whether a step of text ends with the last token of x."""
    if steps == "delimiters":
        return x[-1] in (3, 2)
    return len(x) % int(steps[-1]) == 0


def scores(x: String, steps: str) -> list[float]:
    """The log-odds of x after each of the rounds that the longest run has; an ended string keeps
    its last.
    """
    found, prefix = [], 0
    while prefix < len(x):
        prefix += 1
        while prefix < len(x) and not ends(x[:prefix], steps):
            prefix += 1
        found.append(log_odds(x[:prefix]))
    rounds = MAX_TOKENS if steps == "delimiters" else math.ceil(MAX_TOKENS / int(steps[-1]))
    last = found[-1] if found else log_odds(())
    return found + [last] * (rounds - len(found))


@functools.cache
def plain_law(model: str) -> dict[String, float]:
    return helpers.brute_force_law(MODELS[model](), PROMPT, MAX_TOKENS)[0]


def exact(model: str) -> dict[String, float]:
    """p(x) odds(r(x)), not normalised: the target."""
    return {x: p * math.exp(log_odds(x)) for x, p in plain_law(model).items()}


def normalised(law: dict[String, float]) -> dict[String, float]:
    total = sum(law.values())
    return {x: value / total for x, value in law.items()}


def shares(out: Choice) -> jax.Array:
    """The law of a population by its log_weights, over codes."""
    assert out.details is not None
    weights = jax.nn.softmax(out.details["log_weights"])
    return jnp.zeros(VOCAB_SIZE**MAX_TOKENS).at[problems.code(out.sequences.tokens)].add(weights)


def populations(run: Callable[[Any], Choice], key: Any, runs: int) -> np.ndarray:
    """`shares` of independent populations [runs, codes]."""
    return np.asarray(
        jax.jit(jax.vmap(lambda k: shares(run(k))))(jax.random.split(key, runs)), np.float64
    )
