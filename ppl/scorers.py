"""Scorers: what gives the log-score of a growing string, whether a jax function, a Python function
or a model.

A scorer is a pytree with three functions; `used` [N] counts the tokens of each string:

    init(num) -> state                         every leaf has the particle axis N first
    push(state, token[N], used[N]) -> state    token number `used`; EOS must change nothing
    score(state, used[N], needed[N]) -> [N]    log-scores so far, anything in rows not needed

Functions of strings are scorers whose state is the tokens (`as_scorer`); a language model keeps its
cache.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .failures import Tally, interrupted, report
from .lm import LM, Prefix
from .potential import State
from .pytrees import as_pytree, register_dataclass
from .sequences import Sequences
from .showing import inline, shown
from .space import Space, bound

SHOWN = 120
"""Characters of a string on which a Python function failed that are said."""
MIN_PROBABILITY = 1e-7
"""`log_odds` clips rewards to [1e-7, 1 - 1e-7], as published process-reward code does."""


class Scorer:
    """Base class: subclasses, under `ppl.register_dataclass`, define `init`, `push` and `score`
    (see the module).
    """

    def within(self, space: Space) -> Scorer:
        """This scorer for the strings of a space; raises ValueError if unfit."""
        return self

    @property
    def tokens_read(self) -> tuple[int, int]:
        """How many tokens a judge reads for a token pushed, and to score a string."""
        return 0, 0

    def init(self, num: int) -> State:
        raise NotImplementedError

    def push(self, state: State, token: Int[Array, " N"], used: Int[Array, " N"]) -> State:
        raise NotImplementedError

    def score(
        self, state: State, used: Int[Array, " N"], needed: Bool[Array, " N"]
    ) -> Float[Array, " N"]:
        raise NotImplementedError


LogScore = Callable[..., Any] | Scorer
"""A function (tokens [N, T], length [N]) -> [N], a pytree callable, `ppl.python(f)`, or a `Scorer`.
"""


class DearFunction:
    """Base of our own functions of strings that are dear to evaluate, and so are told which rows
    are needed.
    """

    def within(self, space: Space) -> DearFunction:
        """As `Scorer.within`."""
        return self

    def __call__(
        self,
        tokens: Int[Array, "N T"],
        length: Int[Array, " N"],
        needed: Bool[Array, " N"] | None = None,
    ) -> Float[Array, " N"]:
        """Log-scores of the strings so far, anything in rows not needed; None: all are."""
        raise NotImplementedError


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Strings(Scorer):
    """The scorer of a function of strings; state = tokens [N, T], EOS from the string's end on."""

    function: Callable[..., Float[Array, " N"]]
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Strings:
        function = self.function
        if isinstance(function, DearFunction):
            function = function.within(space)
        return Strings(function, space)

    def init(self, num: int) -> State:
        space = bound(self.space, "a scorer")
        return jnp.full((num, space.max_tokens), space.eos, jnp.int32)

    def push(self, state: State, token: Int[Array, " N"], used: Int[Array, " N"]) -> State:
        return jnp.where(jnp.arange(state.shape[1]) == used[:, None], token[:, None], state)

    def score(
        self, state: State, used: Int[Array, " N"], needed: Bool[Array, " N"]
    ) -> Float[Array, " N"]:
        dear = isinstance(self.function, DearFunction)
        return self.function(state, used, needed) if dear else self.function(state, used)

    def whole(self, x: Sequences) -> Float[Array, " N"]:
        """Log-scores of whole strings, all rows at once."""
        return self.function(x.tokens, x.length)


def as_scorer(log_score: LogScore) -> Scorer:
    """A scorer from whatever gives a log-score.

    Raises:
        ValueError: if it is no function of (tokens, length), as a Python function of the text.
    """
    if isinstance(log_score, Scorer):
        return log_score
    check_of_strings(log_score)
    return Strings(as_pytree(log_score))


def check_of_strings(function: Any) -> None:
    """Raise ValueError unless a function can be called with (tokens, length)."""
    remedy = "for a Python function of the text write ppl.python(function, tokenizer)"
    if not callable(function):
        raise ValueError(
            "expected a jax function (tokens [N, T], length [N]) -> [N], got"
            f" {inline(function)}; {remedy}"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(
            f"expected a jax function (tokens [N, T], length [N]) -> [N], got {name}{signature};"
            f" {remedy}"
        ) from None


@shown
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HostFunction(DearFunction):
    """A Python function of one string, called on the host in one batch per step (see `python`)."""

    function: Callable[[Any], float]
    tokenizer: Any = None

    def __call__(
        self,
        tokens: Int[Array, "N T"],
        length: Int[Array, " N"],
        needed: Bool[Array, " N"] | None = None,
    ) -> Float[Array, " N"]:
        needed = jnp.ones(length.shape, bool) if needed is None else needed
        shape = jax.ShapeDtypeStruct(length.shape, jnp.float32)
        return jax.pure_callback(
            self._evaluate, shape, tokens, length, needed, vmap_method="sequential"
        )

    def _evaluate(self, tokens: Any, length: Any, needed: Any) -> np.ndarray:
        tokens, length, needed = np.asarray(tokens), np.asarray(length), np.asarray(needed)
        values = np.zeros(length.shape, np.float32)
        tally = Tally(calls=int(needed.sum()))
        for i in np.flatnonzero(needed):
            if interrupted():
                return values
            ids = tokens[i, : length[i]].tolist()
            string: Any = ids
            error = None
            try:
                string = ids if self.tokenizer is None else self.tokenizer.decode(ids)
                values[i] = _scalar(self.function(string))
            except KeyboardInterrupt:
                if not interrupted(now=True):
                    raise
            except Exception as raised:
                # One bad string must not end the run: NaN kills its particle, and the sampler
                # counts it.
                error, values[i] = raised, np.nan
            if np.isnan(values[i]) or np.isposinf(values[i]):
                tally.add(Tally(failed=1, first=self._said(string, error, values[i]), error=error))
        report(self, tally)
        return values

    def _said(self, string: Any, error: Exception | None, value: Any) -> str:
        """What went wrong on a string."""
        function = getattr(self.function, "reward", self.function)
        name = getattr(function, "__qualname__", type(function).__name__)
        on = repr(string)
        on = on if len(on) <= SHOWN else f"{on[: SHOWN - 3]}..."
        if error is None:
            return f"the Python function {name} returned {value} for {on}"
        hint = "" if self.tokenizer is not None else " (token ids: it was given no tokenizer)"
        return f"the Python function {name} raised {type(error).__name__}: {error} on {on}{hint}"


def host_functions(tree: Any) -> set[HostFunction]:
    """The Python functions that a pytree, such as a target or a kernel, holds."""
    return {node for node in _scores(tree) if isinstance(node, HostFunction)}


def takes_log_odds(tree: Any) -> bool:
    """Whether a pytree, such as a target or a kernel, holds the log-odds of a jax function."""
    return any(isinstance(node, LogOdds) for node in _scores(tree))


def _scores(tree: Any) -> list[Any]:
    """What may hold functions of users; models and prompts, which have many leaves, do not."""
    whole = (HostFunction, LogOdds, LM, Prefix)
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, whole))


def _scalar(value: Any) -> Any:
    # numpy would take None for NaN, and texts of digits for numbers.
    if value is None or isinstance(value, str | bytes) or np.ndim(value):
        raise TypeError(f"expected a function that returns one float, got {value!r:.80}")
    return value


def python(function: Callable[[Any], float], tokenizer: Any = None) -> HostFunction:
    """Any Python function as a log-score, for `reward`, `step_scores` and `step_factors`.

    `function` gets the token ids (a list of int), or the decoded text if a tokenizer is given, and
    returns a float, the log-score.  If it raises or returns NaN, its particle dies (log-factor
    -inf) and is counted; the run goes on, and at its end says once what raised, on which text and
    how often (a warning of the logger `ppl.failures`).  It must be a function of the string alone.
    It is called on the host, once for each string and boundary, all particles of a step in one
    batch.

        target * ppl.reward(ppl.python(lambda text: -abs(len(text) - 40.0), tokenizer))
    """
    return HostFunction(function, tokenizer)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LogOdds:
    """The log-odds of a reward in [0, 1] (see `log_odds`)."""

    reward: Callable[..., Float[Array, " N"]]

    def __call__(self, tokens: Int[Array, "N T"], length: Int[Array, " N"]) -> Float[Array, " N"]:
        r = jnp.asarray(self.reward(tokens, length))
        possible = (r >= 0) & (r <= 1)  # NaN is not
        if not isinstance(possible, Tracer) and not possible.all():
            raise ValueError(_not_a_probability(r[~possible][0]))
        # 1 - r is exact near 1 where 1 - 1e-7 is not a float32: the clip is the same on both sides.
        odds = jnp.log(jnp.maximum(r, MIN_PROBABILITY)) - jnp.log(
            jnp.maximum(1 - r, MIN_PROBABILITY)
        )
        return jnp.where(possible, odds, jnp.nan)


@dataclasses.dataclass(frozen=True)
class _HostLogOdds:
    """The log-odds of a Python function's reward; hashable, as what `HostFunction` holds
    must be.
    """

    reward: Callable[[Any], float]

    def __call__(self, string: Any) -> float:
        r = float(self.reward(string))
        if not 0 <= r <= 1:
            raise ValueError(_not_a_probability(r))
        return float(np.log(max(r, MIN_PROBABILITY)) - np.log(max(1 - r, MIN_PROBABILITY)))


def _not_a_probability(value: Any) -> str:
    return (
        f"expected rewards in [0, 1] to take log-odds of, got {value}; give scores on another scale"
        " to ppl.reward or ppl.step_scores as they are"
    )


def log_odds(reward: Callable) -> Callable:
    """The log-score log(r / (1 - r)) of a reward r in (0, 1), such as a process reward model's
    probability.

    r is clipped to [1e-7, 1 - 1e-7], so Phi stays within [1e-7, 1e7]: a string whose reward is
    exactly 0 is improbable, not forbidden, and rewards closer to 1 than 1e-7 are not told apart.

        target * ppl.step_scores(ppl.log_odds(prm), ppl.Steps(delimiters=[13]))

    Args:
        reward: as the log-score of `ppl.reward`: a jax function (tokens [N, T], length [N]) -> [N],
            a pytree callable, or `ppl.python(f)`.

    Raises:
        ValueError: if it is no function of (tokens, length); when called on concrete arrays and a
            reward is outside [0, 1] or NaN.  In a traced call (all samplers), and in a Python
            function, such a reward kills its particle, and the sampler counts it and says so.
    """
    check_of_strings(reward)
    if isinstance(reward, HostFunction):
        return HostFunction(_HostLogOdds(reward.function), reward.tokenizer)
    return LogOdds(as_pytree(reward))
