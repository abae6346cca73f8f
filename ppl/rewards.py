"""Soft potentials from scores of strings: rewards at the end, and process rewards at step
boundaries.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .potential import Potential, State
from .pytrees import register_dataclass
from .rows import anywhere
from .scorers import LogScore, Scorer, Strings, as_scorer
from .sequences import Sequences
from .space import Space, bound
from .steps import Steps


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Score(Potential):
    """Phi(x) = exp(log_score(x)), paid out along the way: log s(x_1:t) - log s(x_1:t') at each step
    boundary.

    State = (the scorer's, tokens so far [N], log-score at the last boundary [N], the steps').  A
    string whose log-score is -inf at some boundary has Phi = 0.
    """

    scorer: Scorer
    steps: Steps | None = None
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Potential:
        steps = None if self.steps is None else self.steps.within(space)
        return type(self)(self.scorer.within(space), steps, space)

    def init(self, num: int) -> State:
        bound(self.space)
        place = () if self.steps is None else self.steps.init(num)
        return self.scorer.init(num), jnp.zeros(num, jnp.int32), self._unpaid(num), place

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        text, used, paid, place = state
        text = self.scorer.push(text, token, used)
        used = used + (token != bound(self.space).eos)
        zeros = jnp.zeros(token.shape[0], jnp.float32)
        if self.steps is None:
            return (text, used, paid, place), zeros
        place, boundary = self.steps.step(place, token, used)
        # The score may be a model: it runs only in steps in which some string reaches a boundary.
        paid, log_factor = jax.lax.cond(
            anywhere(boundary),
            lambda: self._pay(text, used, paid, boundary),
            lambda: (paid, zeros),
        )
        return (text, used, paid, place), log_factor

    def final(self, state: State) -> Float[Array, " N"]:
        return self.final_where(state, jnp.ones(state[1].shape[0], bool))

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        text, used, paid, _ = state
        return self._pay(text, used, paid, needed)[1]

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        pushed, asked = self.scorer.tokens_read
        if not pushed and not asked:
            return 0
        drawn = token != bound(self.space).eos
        used = state[1] + drawn
        boundary = ends
        if self.steps is not None:
            boundary = ends | self.steps.step(state[3], token, used)[1]
        return pushed * drawn + asked * self._due(boundary, used, state[2])

    def log_phi(self, x: Sequences) -> Float[Array, " N"] | None:
        if self.steps is not None or not isinstance(self.scorer, Strings):
            return None
        return self._checked(self.scorer.whole(x), x.length)

    def _unpaid(self, num: int) -> Array:
        return jnp.zeros(num, jnp.float32)

    def _due(self, needed: Array, used: Array, paid: Array) -> Array:
        """Where the score is asked for, of where a step or the string ends."""
        return needed

    def _pay(self, text: State, used: Array, paid: Array, needed: Array) -> tuple[Array, Array]:
        """The log-score where it is needed, and the log-ratio to the previous one; NaN stays in the
        ratio only.
        """
        score = self._score(text, used, needed)
        ratio = jnp.where(jnp.isneginf(paid), -jnp.inf, score - paid)
        score = jnp.nan_to_num(score, nan=-jnp.inf, neginf=-jnp.inf)
        return jnp.where(needed, score, paid), jnp.where(needed, ratio, 0.0)

    def _score(self, text: State, used: Array, needed: Array) -> Array:
        return self._checked(self.scorer.score(text, used, needed), used)

    def _checked(self, score: Array, used: Array) -> Array:
        if jnp.shape(score) != used.shape:
            raise ValueError(
                f"expected log-scores [N] = {used.shape} of {used.shape[0]} strings, got shape"
                f" {jnp.shape(score)}; return one number for each row of tokens [N, T]"
            )
        return jnp.asarray(score, jnp.float32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors(Score):
    """Phi(x) = the product of exp(log_factor(x_1:t)) over the boundaries t and the end, each
    position once.

    State = (the scorer's, tokens so far [N], their number when last paid [N], -1 for never, the
    steps').
    """

    def _unpaid(self, num: int) -> Array:
        return jnp.full(num, -1, jnp.int32)

    def _due(self, needed: Array, used: Array, paid: Array) -> Array:
        # A string that ends right after a boundary has no further step.
        return needed & (paid != used)

    def _pay(self, text: State, used: Array, paid: Array, needed: Array) -> tuple[Array, Array]:
        needed = self._due(needed, used, paid)
        score = self._score(text, used, needed)
        return jnp.where(needed, used, paid), jnp.where(needed, score, 0.0)


def reward(log_reward: LogScore) -> Score:
    """Phi(x) = exp(log_reward(x)), evaluated once, when the string ends.

    Args:
        log_reward: a jax function (tokens [N, T], length [N]) -> [N]; a pytree callable, such as a
            module with weights; `ppl.python(f)`; `ppl.log_odds(f)`; or `ppl.judge(...)`.  NaN kills
            its particle and is counted.

    Raises:
        ValueError: when traced, if it does not return one number per string.
    """
    return Score(as_scorer(log_reward))


def step_scores(log_score: LogScore, steps: Steps) -> Score:
    """Phi(x) = exp(log_score(x)), paid out at step boundaries as the ratio of successive scores.

    The ratios telescope, so the target depends on the final score only while its intermediate
    targets follow the process reward; the empty string has log-score 0.  A string without a
    boundary is paid for at its end.  With `log_odds` this is the particle filtering of arXiv
    2502.01618 in exact form.

        target * ppl.step_scores(ppl.log_odds(prm), ppl.Steps(every=8))

    Args:
        log_score: as in `reward`; called on strings so far and on whole ones, which look alike:
            EOS from `length` on.  That a string has ended is known to `final` alone; what only
            ended strings are to pay is a `reward` beside this.
        steps: where it is asked for, besides the end.  The end is no boundary, by EOS or by the
            horizon: the last ratio is paid there, once.

    Raises:
        ValueError: when traced, if it does not return one number per string.
    """
    return Score(as_scorer(log_score), steps)


def step_factors(log_factor: LogScore, steps: Steps) -> Factors:
    """Phi(x) = prod_t exp(log_factor(x_1:t)) over the step boundaries t of x and its end, each
    position once.

    The product form of a process reward: with log_factor = log r the target is p(x) prod_t
    r(x_1:t), each step judged right (the acceptance model of arXiv 2502.01618).  Longer strings pay
    more factors; `step_scores` pays for the last score only.

    Arguments and errors as in `step_scores`.
    """
    return Factors(as_scorer(log_factor), steps)
