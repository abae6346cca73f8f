"""A bank: the draws of many prompts, made once, from which every method and budget is replayed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from samplers.base import Cost
from samplers.search import pools
from samplers.search.answers import ids_of

CORRECT_SCORE = 0.8
"""What the verifier gives to a right answer; wrong ones have anything from 0 to 1, so that it
prefers one wrong answer in five.
"""


@dataclasses.dataclass(frozen=True)
class Bank:
    """N independent draws of each of P prompts.

    answer: [P, N] ids as in a `Pool`.  correct: [P, N].  scores: [P, N] a verifier's, in 0..1, -inf
    of a string without an answer; they are of answers: equal answers score alike.  length: [P, N]
    tokens.
    """

    answer: Int[np.ndarray, "P N"]
    correct: Bool[np.ndarray, "P N"]
    scores: Float[np.ndarray, "P N"]
    length: Int[np.ndarray, "P N"]

    @property
    def num(self) -> int:
        """N."""
        return self.answer.shape[1]

    @property
    def mean_length(self) -> Float[np.ndarray, " P"]:
        """Tokens of a string of each prompt."""
        return self.length.mean(1)

    def strings(self, budget: int) -> int:
        """How many strings a budget of tokens for each prompt buys on average, of all prompts."""
        return int(budget // self.mean_length.mean())

    @property
    def pools(self) -> pools.Pool:
        """As pools with the prompts first; the samples say which are correct."""
        longest = jnp.asarray(self.length.max(1), jnp.int32)
        spent = Cost(tokens=jnp.asarray(self.length.sum(1), jnp.int32), depth=longest)
        # Every prompt's own, as `jax.vmap` takes them.
        cost = jax.tree.map(lambda count: jnp.broadcast_to(count, longest.shape), spent)
        known = {"scores": self.scores, "length": self.length, "cost": cost}
        return pools.pool(self.answer, samples=self.correct, **known)

    @property
    def is_right(self) -> Bool[np.ndarray, "P N"]:
        """Whether the answer of an id is right."""
        out = np.zeros((len(self.answer), self.num), bool)
        rows, columns = np.nonzero(self.correct & (self.answer >= 0))
        out[rows, self.answer[rows, columns]] = True
        return out


def numbered(said: Int[np.ndarray, "P N"]) -> Int[np.ndarray, "P N"]:
    """Any whole numbers as the ids that a pool has."""
    return np.stack([ids_of(row.tolist(), lambda answer: answer)[0] for row in said])
