"""Steps of text: where a process reward is asked for, and where particles are resampled.

Where steps end is read off a growing string, whose state every user keeps beside it:

    init(num) -> state
    step(state, token[N], used[N]) -> (state, ends[N])    after each token, the string's `used`-th
    read(x) -> state                                      of strings so far
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from . import delimiters as texts
from .checks import check_count, check_ids
from .potential import State
from .pytrees import register_dataclass
from .rows import at
from .sequences import Sequences
from .space import Space, bound
from .token_automaton import Tokenizer


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Where the steps of a text end: after certain tokens, after certain texts, or after every so
    many tokens.

    `Steps(delimiters=[13])` ends a step with each token 13, `Steps(every=8)` with every eighth
    token, `Steps.by_text("\\n\\n", tokenizer)` with the token in which a blank line is complete.
    The end of the string ends its last step and is not a boundary itself, so a delimiter that never
    comes makes one step of the whole string.

    Attributes:
        delimiters: [K] token ids that end a step, or None.
        every: a step is this many tokens, or None.
        table: [Q, V] where texts that end a step stand in tokens (`ppl.delimiters`), or None.
        window: how many tokens back such a text may begin.
        eos: the token that ends the string; None before `within`.
        max_tokens: the horizon, which ends a string too; None before `within`.

    Raises:
        ValueError: unless exactly one of `delimiters` (at least one id), `every` (at least 1) and
            `table` is given.
    """

    delimiters: Int[Array, " K"] | None = None
    every: int | None = dataclasses.field(default=None, metadata={"static": True})
    table: Int[Array, "Q V"] | None = None
    window: int = dataclasses.field(default=0, metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def by_text(cls, delimiters: str | Sequence[str], tokenizer: Tokenizer) -> Steps:
        """Steps that end with the token in which one of these texts is complete.

        It is found in the bytes of the tokens, wherever these are cut: "\\n\\n" ends in the second
        of two tokens "\\n", inside of ".\\n\\n", and in a token "\\nThen" behind "\\n".  What ends
        inside of one token ends one step.  Tokens without text, such as control tokens, interrupt
        a delimiter.

            target * ppl.step_scores(f, ppl.Steps.by_text(["\\n\\n", "."], tokenizer))

        Raises:
            ValueError: if there is no delimiter, or one is empty or no text, or the vocabulary
                cannot write it.
        """
        given = [delimiters] if isinstance(delimiters, str) else list(delimiters)
        if not given or not all(isinstance(text, str) and text for text in given):
            raise ValueError(
                f"expected delimiters as texts of at least one character, got {delimiters!r}; for"
                " token ids write Steps(delimiters=ids)"
            )
        wanted = [text.encode() for text in given]
        found = texts.table(wanted, tokenizer.token_bytes)
        for one in wanted:
            if not texts.ever_ends(texts.table([one], tokenizer.token_bytes)):
                raise ValueError(
                    "expected delimiters that this vocabulary can write, got"
                    f" {one.decode()!r}; name one that occurs in the model's texts"
                )
        return cls(table=jnp.asarray(found), window=max(map(len, wanted)) - 1)

    def __post_init__(self) -> None:
        given = (self.delimiters, self.every, self.table)
        if sum(one is not None for one in given) != 1:
            raise ValueError(
                f"expected either delimiters or every, got delimiters={self.delimiters},"
                f" every={self.every}; pass the"
                " one that marks your steps"
            )
        if self.every is not None:
            check_count("every", self.every)
        elif self.delimiters is not None and not isinstance(self.delimiters, Tracer):
            ids = np.asarray(self.delimiters)
            if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
                raise ValueError(
                    "expected delimiters as a list of token ids, at least one, got"
                    f" {self.delimiters!r}; encode the"
                    " delimiter with the tokenizer, or mark steps by every=8"
                )
            object.__setattr__(self, "delimiters", jnp.asarray(ids, jnp.int32))

    def within(self, space: Space) -> Steps:
        """These steps over the strings of a space; needed once, before any call.

        Raises:
            ValueError: if a delimiter is outside of the vocabulary or is EOS, or the tokenizer of
                texts has more tokens.
        """
        if self.delimiters is not None and not isinstance(self.delimiters, Tracer):
            check_ids(self.delimiters, space.vocab_size, space.eos, "delimiter")
        if self.table is None:
            return dataclasses.replace(self, space=space)
        rest = space.vocab_size - self.table.shape[1]
        if rest < 0:
            raise ValueError(
                f"expected a tokenizer of at most {space.vocab_size} tokens, got one of"
                f" {self.table.shape[1]}; build the steps with the tokenizer that models.load"
                " returned"
            )
        table = jnp.pad(self.table, ((0, 0), (0, rest)))
        return dataclasses.replace(self, table=table, space=space)

    def init(self, num: int) -> State:
        """The state of N empty strings."""
        return () if self.table is None else jnp.zeros(num, jnp.int32)

    def step(
        self, state: State, token: Int[Array, " N"], used: Int[Array, " N"]
    ) -> tuple[State, Bool[Array, " N"]]:
        """The state after `token`, the string's `used`-th, and whether a boundary follows it: none
        does where the string ends.
        """
        space = bound(self.space, "steps")
        if self.table is not None:
            found = self.table[state, token]
            state, ends = found // 2, found % 2 == 1
        elif self.every is not None:
            ends = used % self.every == 0
        else:
            ends = (token[:, None] == self.delimiters).any(1)
        return state, ends & (token != space.eos) & (used != space.max_tokens)

    def read(self, x: Sequences) -> State:
        """The state of strings so far: of their last tokens, for no text begins before these."""
        table, state = self.table, self.init(x.length.shape[0])
        if table is None:
            return state

        def body(i: Array, state: Array) -> Array:
            place = x.length - self.window + i
            after = table[state, at(x.tokens, jnp.maximum(place, 0))] // 2
            return jnp.where(place >= 0, after, state)

        return jax.lax.fori_loop(0, self.window, body, state)

    def max_rounds(self, max_tokens: int) -> int:
        """The greatest number of steps that a string of `max_tokens` tokens can have."""
        return max_tokens if self.every is None else -(-max_tokens // self.every)

    def max_step_tokens(self, max_tokens: int) -> int:
        """The greatest number of tokens that one step can have."""
        return max_tokens if self.every is None else min(self.every, max_tokens)
