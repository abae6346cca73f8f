"""Pairwise judges: how many of N votes prefer the second of two strings.

A judge without a Bradley-Terry score (its preferences are not sigmoid(s(y) - s(x)) for any s, as
when they go round in a circle) can be asked, but stands for no target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from ppl.checks import check_count, check_prompt
from ppl.lm import LM, Prefix
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rewards import reward
from ppl.scorers import LogScore
from ppl.sequences import Sequences
from ppl.target import Target, log_potential_of

Votes = Callable[[Key[Array, " C"], Sequences, Sequences], Int[Array, " C"]]
LogOdds = Callable[[Sequences, Sequences], Float[Array, " C"]]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge that is asked `num_votes` times about each of C pairs; see `judge`."""

    votes: Votes
    num_votes: int = dataclasses.field(metadata={"static": True})

    def tokens_read(self, x: Sequences, y: Sequences) -> Int[Array, " C"]:
        """How many tokens it reads about each pair, as far as `votes` says."""
        return _read_by(self.votes, x, y)


def _read_by(asked: Any, x: Sequences, y: Sequences) -> Int[Array, " C"]:
    known = getattr(asked, "tokens_read", None)
    return jnp.zeros(x.length.shape, jnp.int32) if known is None else known(x, y)


def judge(votes: Votes, *, num_votes: int) -> Judge:
    """A judge from a function votes(keys [C], x, y) -> [C], the number of votes for y,
    0..num_votes.

    `x` and `y` are C strings each.  The votes of a row are to be independent, drawn with the row's
    key, and each is to show the two strings in an order of its own: `pairwise` does so.  For the
    cost, a method tokens_read(x, y) -> [C] may say how many tokens are read.

    Raises:
        ValueError: unless num_votes >= 1.
    """
    check_count("num_votes", num_votes)
    return Judge(as_pytree(votes), num_votes)


def bradley_terry(p: Target, score: LogScore, *, num_votes: int) -> Judge:
    """A judge that prefers y to x with probability sigmoid(s(y) - s(x)), s a known score: for
    simulations.

    Args:
        p: whose strings they are.
        score: s, as the log-score of `ppl.reward`.
        num_votes: N.

    Raises:
        ValueError: unless num_votes >= 1, or if the score does not fit p's strings.
    """
    alone = dataclasses.replace(p, potential=reward(score).within(p.space))
    return judge(Scored(alone, num_votes), num_votes=num_votes)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """The votes of `bradley_terry`; the target's potential is e^s."""

    target: Target
    num_votes: int = dataclasses.field(metadata={"static": True})

    def __call__(self, keys: Key[Array, " C"], x: Sequences, y: Sequences) -> Int[Array, " C"]:
        scores = [self.target.log_potential(some.tokens, some.length) for some in (x, y)]
        return _count(keys, jax.nn.sigmoid(scores[1] - scores[0])[:, None], self.num_votes)

    def tokens_read(self, x: Sequences, y: Sequences) -> Int[Array, " C"]:
        return log_potential_of(self.target, x)[1] + log_potential_of(self.target, y)[1]


def pairwise(log_odds: LogOdds, *, num_votes: int) -> Judge:
    """A judge that is shown both strings at once, the order drawn anew for every vote.

    Then P(y preferred to x) = 1 - P(x preferred to y) whatever the judge makes of the order.

    Args:
        log_odds: (first, second) -> [C], its log-odds for the second string shown against the
            first; evaluated once in each order for all N votes.  `pair_model` makes one of a
            language model.
        num_votes: N.

    Raises:
        ValueError: unless num_votes >= 1.
    """
    return judge(Shuffled(as_pytree(log_odds), num_votes), num_votes=num_votes)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Shuffled:
    """The votes of `pairwise`."""

    log_odds: LogOdds
    num_votes: int = dataclasses.field(metadata={"static": True})

    def __call__(self, keys: Key[Array, " C"], x: Sequences, y: Sequences) -> Int[Array, " C"]:
        own = jax.vmap(jax.random.split)(keys)
        last = jax.vmap(lambda key: jax.random.bernoulli(key, jnp.float32(0.5), (self.num_votes,)))(
            own[:, 0]
        )
        y_last, y_first = jax.nn.sigmoid(self.log_odds(x, y)), jax.nn.sigmoid(-self.log_odds(y, x))
        return _count(own[:, 1], jnp.where(last, y_last[:, None], y_first[:, None]), self.num_votes)

    def tokens_read(self, x: Sequences, y: Sequences) -> Int[Array, " C"]:
        return _read_by(self.log_odds, x, y) + _read_by(self.log_odds, y, x)


def _count(
    keys: Key[Array, " C"], chance: Float[Array, "C *N"], num_votes: int
) -> Int[Array, " C"]:
    """Votes for y, given the chance of each."""
    u = jax.vmap(lambda key: jax.random.uniform(key, (num_votes,), jnp.float32))(keys)
    return (u < chance).sum(1, dtype=jnp.int32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PairModel:
    """The log-odds of `pair_model`; `texts` are the fixed tokens between and after the strings."""

    lm: LM
    prefix: Prefix
    texts: tuple[Int[Array, " B"], Int[Array, " A"]]
    first: int = dataclasses.field(metadata={"static": True})
    second: int = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Sequences, y: Sequences) -> Float[Array, " C"]:
        (num, horizon), length = x.tokens.shape, self.prefix.length
        room = 2 * horizon + sum(text.shape[0] for text in self.texts)
        context = None if isinstance(length, Tracer) else self.lm.context
        if context is not None and int(length) + room > context:
            raise ValueError(
                "expected the judge's texts and two strings within its context of"
                f" {context} tokens, got {int(length)} + {room}; shorten the texts or lower"
                " max_tokens"
            )
        between, after = (
            Sequences(
                jnp.broadcast_to(text, (num, text.shape[0])),
                jnp.full(num, text.shape[0], jnp.int32),
            )
            for text in self.texts
        )
        cache, used = self.lm.init(self.prefix, num, room), jnp.zeros(num, jnp.int32)
        for part in (x, between, y, after):
            last = jnp.maximum(part.length - 1, 0)
            cache, logits = self.lm.logits_at(self.prefix, cache, part.tokens, last)
            # What follows a string's end is taken away again.
            used = used + part.length
            cache = self.lm.truncate(cache, used)
        return logits[:, self.second] - logits[:, self.first]

    def tokens_read(self, x: Sequences, y: Sequences) -> Int[Array, " C"]:
        return x.length + y.length + sum(text.shape[0] for text in self.texts)


def pair_model(
    lm: LM,
    before: Sequence[int] | Int[Array, " S"],
    between: Sequence[int] | Int[Array, " B"],
    after: Sequence[int] | Int[Array, " A"],
    *,
    first: int,
    second: int,
) -> PairModel:
    """A language model as a pairwise judge, for `pairwise`.

    Its log-odds are log p(second | before x between y after) - log p(first | before x between y
    after), the tokens `first` and `second` being the two answers, such as A and B.

    Args:
        lm: the judge, with the vocabulary of the strings that it judges.
        before, between, after: token ids around the two strings; `after` ends where the answer is
            to come.
        first, second: token ids of the two answers.

    Raises:
        ValueError: if a text is empty or has ids outside of the vocabulary, or the answers are the
            same or outside of it; when traced, if both strings do not fit into the judge's context.
    """
    answers = (first, second)
    if first == second or not all(0 <= answer < lm.vocab_size for answer in answers):
        raise ValueError(
            f"expected two different answers with ids in [0, {lm.vocab_size}), got {answers}; take"
            " the tokens with"
            " which the judge's answers begin"
        )
    texts = tuple(
        jnp.asarray(np.asarray(check_prompt(t, lm.vocab_size, lm.context)), jnp.int32)
        for t in (between, after)
    )
    return PairModel(lm, lm.prefill(before), (texts[0], texts[1]), first, second)
