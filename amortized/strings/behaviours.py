"""Behaviours: how the strings of a training batch come about, as arrays, so that changing it
compiles nothing.

Each row has its own temperature and share of uniform tokens; rows may be given (replayed strings,
references) and may be improved by Metropolis-Hastings moves on the target:

    b = behaviours.drawn(temperature=temperatures, epsilon=0.05)
    b = behaviours.varied(key, 32, low=0.5, high=2.0, share=0.5)
    b = behaviours.given(b, strings, rows)
    b = behaviours.searched(b, rows, num_moves=4)

Losses score the strings under the guide itself, so any behaviour will do; a broad one finds more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl.checks import check_count
from ppl.potential import State
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Cost
from samplers.mcmc import suffix
from samplers.strings import cuts, regeneration
from samplers.strings.proposals import LanguageModel, Proposal, locally_optimal


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How N strings come about.

    temperature, epsilon [N]: a token is drawn from softmax(logits / temperature) with probability 1
    - epsilon, else uniformly from the tokens whose logit is not -inf.  strings: what the rows
      `replaced` [N] hold instead of a draw.
    searched [N]: rows that are moved `num_moves` times by suffix Metropolis-Hastings on the target.
    """

    temperature: Float[Array, " N"]
    epsilon: Float[Array, " N"]
    strings: Sequences | None = None
    replaced: Bool[Array, " N"] | None = None
    searched: Bool[Array, " N"] | None = None
    num_moves: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def num(self) -> int:
        """N."""
        return self.temperature.shape[0]


def drawn(
    num: int | None = None,
    *,
    temperature: float | int | Float[Array, "*N"] = 1.0,
    epsilon: float | int | Float[Array, "*N"] = 0.0,
) -> Behaviour:
    """Strings drawn from the guide; on-policy unless told otherwise.

    Args:
        num: N; may be left out if temperature or epsilon is [N].
        temperature: above 0, one for all or [N].
        epsilon: share of uniform tokens in [0, 1], one for all or [N].

    Raises:
        ValueError: if N is not known or not one, a temperature is not above 0, or an epsilon is
            outside [0, 1].
    """
    temperature, epsilon = jnp.asarray(temperature, jnp.float32), jnp.asarray(epsilon, jnp.float32)
    shape = () if num is None else (num,)
    try:
        shape = jnp.broadcast_shapes(shape, temperature.shape, epsilon.shape)
    except ValueError:
        shape = ()
    if len(shape) != 1 or (num is not None and shape[0] != num):
        raise ValueError(
            f"expected one number of rows, got num={num}, temperature {temperature.shape} and"
            f" epsilon {epsilon.shape};"
            " pass num, or arrays [N] of one length"
        )
    if not isinstance(temperature, Tracer) and not (np.asarray(temperature) > 0).all():
        raise ValueError(
            f"expected temperatures above 0, got {temperature.min()}; 0.5 to 2 is usual"
        )
    if (
        not isinstance(epsilon, Tracer)
        and not ((np.asarray(epsilon) >= 0) & (np.asarray(epsilon) <= 1)).all()
    ):
        raise ValueError(
            f"expected epsilon in [0, 1], got {epsilon.min()} to {epsilon.max()}; 0.01 is usual"
        )
    return Behaviour(jnp.broadcast_to(temperature, shape), jnp.broadcast_to(epsilon, shape))


def varied(
    key: PRNGKeyArray, num: int, *, low: float, high: float, share: float | Float[Array, ""] = 1.0
) -> Behaviour:
    """A share of rows has a temperature uniform on [low, high], the others 1 (arXiv 2310.04363:
    0.5, 2, two thirds).

    Raises:
        ValueError: unless 0 < low <= high.
    """
    check_count("num", num)
    if not 0 < low <= high:
        raise ValueError(f"expected 0 < low <= high, got {low} and {high}; 0.5 and 2 are usual")
    which, how = jax.random.split(key)
    temperature = jax.random.uniform(how, (num,), jnp.float32, low, high)
    return drawn(
        temperature=jnp.where(jax.random.bernoulli(which, share, (num,)), temperature, 1.0)
    )


def given(behaviour: Behaviour, strings: Sequences, rows: Bool[Array, " N"]) -> Behaviour:
    """The rows `rows` hold `strings` instead of draws: replayed ones, or references.

    Raises:
        ValueError: unless there is a string for every row (those of other rows are ignored).
    """
    if strings.tokens.shape[0] != behaviour.num or rows.shape != (behaviour.num,):
        raise ValueError(
            f"expected strings and rows for {behaviour.num} rows, got {strings.tokens.shape[0]} and"
            f" {rows.shape[0]}"
        )
    return dataclasses.replace(behaviour, strings=strings, replaced=rows)


def searched(behaviour: Behaviour, rows: Bool[Array, " N"], *, num_moves: int) -> Behaviour:
    """The rows `rows`, drawn or given, are moved `num_moves` times on the target (local search,
    arXiv 2310.02710).

    Raises:
        ValueError: if num_moves < 1, or there is not a flag for every row.
    """
    check_count("num_moves", num_moves)
    if rows.shape != (behaviour.num,):
        raise ValueError(f"expected rows for {behaviour.num} rows, got {rows.shape[0]}")
    return dataclasses.replace(behaviour, searched=rows, num_moves=num_moves)


def law(behaviour: Behaviour, log_q: Float[Array, "N V"]) -> Float[Array, "N V"]:
    """log of (1 - epsilon) softmax(log_q / temperature) + epsilon uniform where log_q > -inf; -inf
    elsewhere.
    """
    possible = log_q > -jnp.inf
    uniform = -jnp.log(possible.sum(1, keepdims=True, dtype=jnp.float32))
    tempered = jax.nn.log_softmax(log_q / behaviour.temperature[:, None])
    share = behaviour.epsilon[:, None]
    return jnp.where(
        possible, jnp.logaddexp(tempered + jnp.log1p(-share), uniform + jnp.log(share)), -jnp.inf
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Exploring(Proposal):
    """`law` of the target's one-step law as it is known in advance, as a proposal."""

    behaviour: Behaviour

    @property
    def covers(self) -> bool:
        return True

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> Float[Array, "N V"]:
        return law(self.behaviour, locally_optimal(target, logits, potential))


def search(
    key: PRNGKeyArray, q: Target, target: Target, x: Sequences, num_moves: int
) -> tuple[Sequences, Cost]:
    """Strings after `num_moves` suffix moves each that leave the target invariant and draw from the
    guide `q`.

    A string outside of the target's support takes the first one inside.
    """
    how = suffix.method(target, proposal=LanguageModel(q))
    state = regeneration.score(target, how.proposal, x)
    state, info = suffix.moves(key, target, how, state, cuts.whole(target, num_moves))
    # Scoring steps the guide once per token; the model reads many tokens in a pass.
    steps = jnp.minimum(x.length.max() + 1, target.max_tokens).astype(jnp.int32)
    return state.sequences, info.cost + Cost(forwards=steps + 1, depth=steps + 1)
