"""Thoughts of a limited length: strings whose first part is closed by given tokens in time.

    p * ppl.closed(tok.encode("</think>"), within=64)        # given that the thought was that short

That is the model's law *given* short thoughts.  What a model says when its thought is cut off is
another law, an intervention, which `samplers.draws.thinking` draws from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .checks import check_count, check_ids
from .potential import Trusted, log_mask
from .pytrees import register_dataclass
from .showing import shown
from .space import Space, bound


@shown
class Thought(NamedTuple):
    """Of N strings: tokens so far [N], and how many of the closing ones their last tokens are [N];
    L, all of them, for ever after.
    """

    length: Int[Array, " N"]
    matched: Int[Array, " N"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Closing:
    """The automaton that finds closing tokens in a string (Knuth, Morris and Pratt).

    Attributes:
        tokens: [L] that close.
        distinct: [U] different ones among them.
        table: [L + 1, U + 1] how many are matched after each of these, and after any other.
    """

    tokens: Int[Array, " L"]
    distinct: Int[Array, " U"]
    table: Int[Array, "K C"]

    @property
    def num(self) -> int:
        """L."""
        return self.tokens.shape[-1]

    def start(self, num: int) -> Thought:
        """Of empty strings."""
        return Thought(jnp.zeros(num, jnp.int32), jnp.zeros(num, jnp.int32))

    def after(self, thought: Thought, token: Int[Array, " N"]) -> Thought:
        """After one more token."""
        same = token[:, None] == self.distinct
        column = jnp.where(same.any(axis=1), jnp.argmax(same, axis=1), len(self.distinct))
        return Thought(thought.length + 1, self.table[thought.matched, column])

    def closed(self, thought: Thought) -> Bool[Array, " N"]:
        """Which are."""
        return thought.matched == self.num

    def next(self, thought: Thought) -> Int[Array, " N"]:
        """The closing token that is due; of closed ones any."""
        return self.tokens[jnp.minimum(thought.matched, self.num - 1)]


def closing(tokens: Sequence[int]) -> Closing:
    """The automaton of these tokens.

    Raises:
        ValueError: if there are none, or they are no list of ids.
    """
    given = np.asarray(tokens)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(
            f"expected closing tokens as a list of ids, got {tokens!r}; pass tok.encode('</think>')"
        )
    ids = given.tolist()
    check_count("the number of closing tokens", len(ids))
    distinct = sorted(set(ids))
    table = np.zeros((len(ids) + 1, len(distinct) + 1), np.int32)
    for matched in range(len(ids)):
        for column, token in enumerate(distinct):
            seen = [*ids[:matched], token]
            fits = (n for n in range(len(seen), 0, -1) if seen[len(seen) - n :] == ids[:n])
            table[matched, column] = next(fits, 0)
    table[-1] = len(ids)
    with jax.ensure_compile_time_eval():  # checked later, inside of jit too
        return Closing(*(jnp.asarray(x, jnp.int32) for x in (ids, distinct, table)))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Closed(Trusted):
    """Phi(x) = 1 if the closing tokens begin within the first `within` tokens of x."""

    automaton: Closing
    most: int = dataclasses.field(metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Closed:
        check_ids(self.automaton.tokens, space.vocab_size, space.eos, "closing")
        if self.most + self.automaton.num > space.max_tokens:
            raise ValueError(
                f"expected room for {self.most} tokens of thought and {self.automaton.num} that"
                f" close it, got max_tokens={space.max_tokens}; raise it, or shorten the thought"
            )
        return dataclasses.replace(self, space=space)

    def init(self, num: int) -> Thought:
        bound(self.space)
        return self.automaton.start(num)

    def step(self, state: Thought, token: Int[Array, " N"]) -> tuple[Thought, Float[Array, " N"]]:
        after = self.automaton.after(state, token)
        return after, log_mask(self._in_time(*after))

    def final(self, state: Thought) -> Float[Array, " N"]:
        return log_mask(self.automaton.closed(state))

    def lookahead(self, state: Thought) -> Float[Array, "N V"]:
        space, (length, matched) = bound(self.space), state
        after = self.automaton.table[matched]
        fits = self._in_time(jnp.broadcast_to(length[:, None] + 1, after.shape), after)
        others = jnp.broadcast_to(fits[:, -1:], (len(length), space.vocab_size))
        allowed = others.at[:, self.automaton.distinct].set(fits[:, :-1])
        return log_mask(allowed.at[:, space.eos].set(self.automaton.closed(state)))

    def _in_time(self, length: Int[Array, " *N"], matched: Int[Array, " *N"]) -> Bool[Array, " *N"]:
        """Whether the match that has begun, or one that begins now, begins soon enough."""
        return (matched == self.automaton.num) | (length - matched <= self.most)


def closed(tokens: Sequence[int], *, within: int) -> Closed:
    """Strings in which these tokens, as the end of a thought, begin after at most `within` others.

    Multiplied onto p it conditions: a thought is as probable as it is and as closing it there is.

    Raises:
        ValueError: if there are no tokens, or no ids, `within` < 1, an id is outside the vocabulary
            or is EOS, or there is no room for both within max_tokens (when multiplied onto a
            target).
    """
    check_count("within", within)
    return Closed(closing(tokens), within)
