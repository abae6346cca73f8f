"""Rewards with a head over the vocabulary: one evaluation scores every next token (Saffron-1,
arXiv 2506.06444).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .potential import State, Trusted
from .pytrees import as_pytree, register_dataclass
from .rows import at
from .scorers import check_of_strings
from .space import Space, bound


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NextScores(Trusted):
    """Phi(x) = exp(the score of x's last token, EOS included), paid out token by token; see
    `next_scores`.

    State = (tokens [N, T], their number [N], log-score so far [N], those of every next token
    [N, V]).
    """

    head: Callable[..., Float[Array, "N V"]]
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> NextScores:
        return NextScores(self.head, space)

    def init(self, num: int) -> State:
        space = bound(self.space)
        tokens = jnp.full((num, space.max_tokens), space.eos, jnp.int32)
        used = jnp.zeros(num, jnp.int32)
        return tokens, used, jnp.zeros(num, jnp.float32), self._scores(tokens, used)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        tokens, used, paid, ahead = state
        score = at(ahead, token)
        here = jnp.arange(tokens.shape[1]) == used[:, None]
        tokens = jnp.where(here, token[:, None], tokens)
        used = used + (token != bound(self.space).eos)
        reached = jnp.nan_to_num(score, nan=-jnp.inf, neginf=-jnp.inf)
        return (tokens, used, reached, self._scores(tokens, used)), _ratio(score, paid)

    def final(self, state: State) -> Float[Array, " N"]:
        _, used, paid, ahead = state
        space = bound(self.space)
        # A string that the horizon cuts has been paid for with its last token.
        return jnp.where(used < space.max_tokens, _ratio(ahead[:, space.eos], paid), 0.0)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        _, _, paid, ahead = state
        eos = bound(self.space).eos
        return _ratio(ahead, paid[:, None]).at[:, eos].set(self.final(state))

    def _scores(self, tokens: Int[Array, "N T"], used: Int[Array, " N"]) -> Float[Array, "N V"]:
        scores, shape = self.head(tokens, used), (used.shape[0], bound(self.space).vocab_size)
        if jnp.shape(scores) != shape:
            raise ValueError(
                f"expected log-scores [N, V] = {shape} of every next token of {shape[0]} strings,"
                f" got shape {jnp.shape(scores)}; a score of strings is for ppl.step_scores"
            )
        return jnp.asarray(scores, jnp.float32)


def _ratio(score: Array, paid: Array) -> Array:
    """The log-ratio to what has been paid; what is dead stays so, and NaN is told."""
    return jnp.where(jnp.isneginf(paid), -jnp.inf, score - paid)


def next_scores(head: Callable[..., Any]) -> NextScores:
    """Phi(x) = exp(M(x_<t)[x_t]), t the last token of x, from a reward model M with a head over the
    vocabulary; paid out token by token, as by `step_scores` with steps of one token.

    One evaluation for each prefix gives the factors of all V next tokens, which a score of strings
    would take V evaluations for: so proposals see them (`lookahead`), and `smc.run` is twisted SMC
    with psi = exp M, exact for p Phi.  A language model as the head is
    `amortized.strings.twists.LMTwist`.

        target = p * ppl.next_scores(head)

    Args:
        head: a jax function (tokens [N, T], length [N]) -> [N, V], or a pytree callable: the
            log-score of every string so far with token v behind it; column EOS is that of the
            string as it is, ended.  A string that the horizon cuts has its last token's.

    Raises:
        ValueError: if it is no function of (tokens, length), or, when traced, gives another shape.

    The published search keeps the N best prefixes; there unfinished ones count for nothing beside
    any that has ended.
    """
    check_of_strings(head)
    return NextScores(as_pytree(head))
