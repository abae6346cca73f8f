"""Soft potentials from scores of strings: rewards at the end, process rewards at step boundaries, Python functions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .potential import Potential, State
from .steps import Steps

log = logging.getLogger(__name__)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HostFunction:
    """A Python function of one string, called on the host in one batch per step (see `python`)."""

    function: Callable[[Any], float]
    tokenizer: Any = None

    def __call__(
        self, tokens: Int[Array, "N T"], length: Int[Array, " N"], needed: Bool[Array, " N"]
    ) -> Float[Array, " N"]:
        shape = jax.ShapeDtypeStruct(length.shape, jnp.float32)
        return jax.pure_callback(self._evaluate, shape, tokens, length, needed, vmap_method="sequential")

    def _evaluate(self, tokens: Any, length: Any, needed: Any) -> np.ndarray:
        tokens, length, needed = np.asarray(tokens), np.asarray(length), np.asarray(needed)
        values = np.zeros(length.shape, np.float32)
        for i in np.flatnonzero(needed):
            ids = tokens[i, : length[i]].tolist()
            try:
                values[i] = self.function(ids if self.tokenizer is None else self.tokenizer.decode(ids))
            except Exception:
                # One bad string must not end the run: NaN kills its particle, and the sampler counts it.
                log.warning("Python potential raised on %r; its particle gets weight 0", ids, exc_info=True)
                values[i] = np.nan
        return values


def python(function: Callable[[Any], float], tokenizer: Any = None) -> HostFunction:
    """Any Python function as a log-score, for `reward` and `step_scores`.

    `function` gets the token ids (a list of int), or the decoded text if a tokenizer is given, and returns a float, the
    log-score.  If it raises or returns NaN, its particle dies (log-factor -inf) and is counted; the run goes on.  It
    must be a function of the string alone.  It is called on the host, once for each string and boundary, all particles
    of a step in one batch.

        target * ppl.reward(ppl.python(lambda text: -abs(len(text) - 40.0), tokenizer))
    """
    return HostFunction(function, tokenizer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score(Potential):
    """Phi(x) = exp(log_score(x)), paid out along the way: log s(x_1:t) - log s(x_1:t') at each step boundary.

    State = (tokens so far [N, T], their number [N], log-score at the last boundary [N]).  A string whose log-score is
    -inf at some boundary has Phi = 0.
    """

    log_score: Callable[..., Float[Array, " N"]]
    steps: Steps | None = None
    max_tokens: int | None = dataclasses.field(default=None, metadata={"static": True})
    eos: int | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, max_tokens: int, vocab_size: int, eos: int) -> Potential:
        steps = None if self.steps is None else self.steps.within(max_tokens, vocab_size, eos)
        return dataclasses.replace(self, steps=steps, max_tokens=max_tokens, eos=eos)

    def init(self, num: int) -> State:
        if self.max_tokens is None or self.eos is None:
            raise ValueError("expected a potential bound to a horizon, got a free one; multiply it onto a target first")
        tokens = jnp.full((num, self.max_tokens), self.eos, jnp.int32)
        return tokens, jnp.zeros(num, jnp.int32), jnp.zeros(num, jnp.float32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        tokens, used, previous = state
        tokens = jnp.where(jnp.arange(self.max_tokens) == used[:, None], token[:, None], tokens)
        used = used + 1
        zeros = jnp.zeros(token.shape[0], jnp.float32)
        if self.steps is None:
            return (tokens, used, previous), zeros
        boundary = self.steps(token, used)
        # The score may be a model: it runs only in steps in which some string reaches a boundary.
        current, log_factor = jax.lax.cond(
            boundary.any(),
            lambda: self._advance(tokens, used, previous, boundary),
            lambda: (previous, zeros),
        )
        return (tokens, used, current), log_factor

    def final(self, state: State) -> Float[Array, " N"]:
        return self.final_where(state, jnp.ones(state[1].shape[0], bool))

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        tokens, used, previous = state
        return self._advance(tokens, used, previous, needed)[1]

    def _advance(self, tokens: Array, used: Array, previous: Array, needed: Array) -> tuple[Array, Array]:
        """The log-score where it is needed, and the log-ratio to the previous one; NaN stays in the ratio only."""
        args = (tokens, used, needed) if isinstance(self.log_score, HostFunction) else (tokens, used)
        score = self.log_score(*args)
        if score.shape != used.shape:
            raise ValueError(
                f"expected log-scores [N] = {used.shape} of {used.shape[0]} strings, got shape {score.shape}"
            )
        ratio = jnp.where(jnp.isneginf(previous), -jnp.inf, score - previous)
        return jnp.where(needed, jnp.nan_to_num(score, nan=-jnp.inf, neginf=-jnp.inf), previous), jnp.where(
            needed, ratio, 0.0
        )


def _pytree(function: Callable) -> Callable:
    """`function` as a pytree: modules and `python` functions already are; others become static data."""
    is_leaf = jax.tree.structure(function) == jax.tree.structure(0)
    return jax.tree_util.Partial(function) if is_leaf else function


def reward(log_reward: Callable[[Int[Array, "N T"], Int[Array, " N"]], Float[Array, " N"]]) -> Score:
    """Phi(x) = exp(log_reward(x)), evaluated once, when the string ends.

    Args:
        log_reward: a jax function (tokens [N, T], length [N]) -> [N]; a pytree callable, such as a module with
            weights; or `ppl.python(f)`.
    """
    return Score(_pytree(log_reward))


def step_scores(log_score: Callable[[Int[Array, "N T"], Int[Array, " N"]], Float[Array, " N"]], steps: Steps) -> Score:
    """Phi(x) = exp(log_score(x)), paid out at step boundaries as the ratio of successive scores.

    The ratios telescope, so the target depends on the final score only while its intermediate targets follow the
    process reward; the empty string has log-score 0.  The formulas are those of a process reward model in exact form.

        target * ppl.step_scores(log_score, ppl.Steps(every=8))

    Args:
        log_score: as in `reward`; called on strings so far.
        steps: where it is asked for, besides the end.
    """
    return Score(_pytree(log_score), steps)
