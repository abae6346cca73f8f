"""Worlds where the truth is known: prompts whose answers have given probabilities.

| world | what it asks |
| --- | --- |
| `mode` | the right answer is the likeliest of three, often by little: votes help |
| `popular error` | a wrong answer is likelier, and rare wrong ones may please the verifier more |
| `mixed` | success rates from hopeless to easy: coverage, and where draws should go |

Answer 0 is right.  The verifier errs in all of them (`banks.CORRECT_SCORE`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from samplers.search import laws

from .banks import CORRECT_SCORE, Bank, numbered

SHORTEST, LONGEST = 4, 11
RARE = 300
"""Rare wrong answers of `popular error`."""
HOPELESS = 0.1
"""Share of prompts of `mixed` that are never solved."""


@dataclasses.dataclass(frozen=True)
class World:
    """P prompts with K answers each.

    probs: [P, K] of the answers of one draw, the right one first.  scores: [P, K] the verifier's.
    """

    probs: Float[np.ndarray, "P K"]
    scores: Float[np.ndarray, "P K"]

    @property
    def p(self) -> Float[np.ndarray, " P"]:
        """The success rates."""
        return self.probs[:, 0]

    def bank(self, rng: np.random.Generator, num: int) -> Bank:
        """`num` draws of each prompt; their lengths say nothing about them."""
        shape = (len(self.probs), num)
        last = self.probs.shape[1] - 1
        each = zip(np.cumsum(self.probs, 1), rng.random(shape), strict=True)
        said = np.stack([np.minimum(np.searchsorted(cdf, u, "right"), last) for cdf, u in each])
        return Bank(
            answer=numbered(said),
            correct=said == 0,
            scores=np.take_along_axis(self.scores, said, 1),
            length=rng.integers(SHORTEST, LONGEST + 1, shape),
        )


def _verified(rng: np.random.Generator, probs: Float[np.ndarray, "P K"]) -> World:
    """With the scores of a verifier that errs about answers."""
    scores = rng.random(probs.shape)
    scores[:, 0] = CORRECT_SCORE
    return World(probs, scores)


def _mode(rng: np.random.Generator, num: int) -> World:
    right = rng.uniform(0.36, 0.6, num)
    second = np.minimum(rng.uniform(0.5, 0.8, num) * (1 - right), right - 0.02)
    return _verified(rng, np.stack([right, second, 1 - right - second], 1))


def _popular_error(rng: np.random.Generator, num: int) -> World:
    right = rng.uniform(0.15, 0.25, (num, 1))
    popular = np.full((num, 1), 0.5)
    rare = np.broadcast_to((1 - right - popular) / RARE, (num, RARE))
    world = _verified(rng, np.concatenate([right, popular, rare], 1))
    world.scores[:, 1] = 0.5
    return world


def _mixed(rng: np.random.Generator, num: int) -> World:
    right = np.where(rng.random(num) < HOPELESS, 0.0, rng.beta(0.35, 1.0, num))[:, None]
    wrong = rng.dirichlet(np.full(8, 0.5), num) * (1 - right)
    return _verified(rng, np.concatenate([right, wrong], 1))


WORLDS: dict[str, Callable[[np.random.Generator, int], World]] = {
    "mode": _mode,
    "popular error": _popular_error,
    "mixed": _mixed,
}


def exact(world: World, method: str, num: int) -> Float[np.ndarray, " P"] | None:
    """The accuracy of a method at `num` draws on each prompt, where a law says it."""
    law = LAWS.get(method)
    return None if law is None else law(world, num)


def _single(world: World, num: int) -> np.ndarray:
    return world.p


def _coverage(world: World, num: int) -> np.ndarray:
    return 1 - (1 - world.p) ** num


def _best_of(world: World, num: int) -> np.ndarray:
    return _each(world, lambda p, scores: laws.best_of_n(np.log(p), scores, num)[0])


def _soft_best_of(world: World, num: int) -> np.ndarray:
    return _each(
        world, lambda p, scores: laws.soft_best_of_n(np.log(p), scores, num, TEMPERATURE)[0]
    )


def _each(world: World, law: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    with np.errstate(divide="ignore"):  # an answer that never comes
        return np.array([law(*row) for row in zip(world.probs, world.scores, strict=True)])


def _majority(world: World, num: int) -> np.ndarray | None:
    if world.probs.shape[1] > MOST_ANSWERS or num > MOST_VOTES:
        return None
    return np.array([laws.majority(p, num)[0] for p in world.probs])


TEMPERATURE = 0.1
"""Of soft best of n."""
MOST_ANSWERS, MOST_VOTES = 10, 64
"""The majority's law, which takes K n^2 log n, is computed up to there."""
LAWS: dict[str, Callable[[World, int], np.ndarray | None]] = {
    "single draw": _single,
    "pass@n": _coverage,
    "best of n": _best_of,
    "soft best of n": _soft_best_of,
    "majority": _majority,
    "uniform": _coverage,
}
