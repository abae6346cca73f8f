"""Strings in the tokenizer's own segmentation: Phi(x) = 1 if encode(decode(x)) = x, else 0."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from . import canonical_tables
from .canonical_tables import CanonicalTables
from .potential import Trusted, log_mask
from .pytrees import register_dataclass
from .segmentation import Segmentation, Unsegmented
from .space import Space, bound
from .token_automaton import Tokenizer, check_horizon, check_tokenizer, packed, unpacked, where_any
from .token_tables import EOS_CLASS, FORBIDDEN

CanonicalState = tuple[Int[Array, " N"], Int[Array, " N"], Int[Array, " N"]]


@runtime_checkable
class Segmenting(Protocol):
    """A tokenizer that knows how it segments; see `segmentation.Segmentation`."""

    @property
    def segmentation(self) -> Segmentation: ...


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CanonicalAutomaton(Trusted):
    """Phi(x) = 1 if a token automaton accepts x within the horizon T and x is the tokenizer's own
    segmentation of its text, else 0.

    A state is (automaton state [N], tokens used [N], class of the last token [N]), all int32.  As
    with `TokenAutomaton`, no string is ever led to where it can no longer be completed.  The tables
    are `canonical_tables.CanonicalTables`.

    Attributes:
        segmentation: "own", or with words on which other strings are let through.
        way: "tables".
    """

    way: ClassVar[str] = "tables"

    tables: CanonicalTables
    eos: int = dataclasses.field(metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})
    segmentation: str = dataclasses.field(default="own", metadata={"static": True})

    def within(self, space: Space) -> CanonicalAutomaton:
        """This automaton over the strings of a space; ids that the tokenizer lacks are forbidden.

        Raises:
            ValueError: if the tokenizer does not fit the model, or no string within the horizon can
                match.
        """
        tables = self.tables
        check_tokenizer(space, len(tables.classes), self.eos)
        check_horizon(space, tables.distance)
        more = (0, space.vocab_size - len(tables.classes))
        tables = tables._replace(
            classes=jnp.pad(tables.classes, more, constant_values=FORBIDDEN),
            left=jnp.pad(tables.left, more),
            right=jnp.pad(tables.right, more),
        )
        return dataclasses.replace(self, tables=tables, space=space)

    def init(self, num: int) -> CanonicalState:
        bound(self.space)
        zeros = jnp.zeros(num, jnp.int32)
        return zeros, zeros, zeros

    def step(
        self, state: CanonicalState, token: Int[Array, " N"]
    ) -> tuple[CanonicalState, Float[Array, " N"]]:
        (at, used, last), tables = state, self.tables
        right = tables.right[token]
        beside = tables.beside[last, right // 32] >> (right % 32).astype(jnp.uint32) & 1
        row = tables.rows[beside.astype(jnp.int32), at]
        following = tables.transitions[row, tables.classes[token]].astype(jnp.int32)
        allowed = self._fits(following, used)
        at = jnp.where(allowed, following, tables.distance.shape[0] - 1)
        return (at, used + 1, tables.left[token]), log_mask(allowed)

    def final(self, state: CanonicalState) -> Float[Array, " N"]:
        return log_mask(self.tables.distance[state[0]] == 0)

    def lookahead(self, state: CanonicalState) -> Float[Array, "N V"]:
        """The factors of every next token, as `TokenAutomaton` has them: what is allowed behind a
        cut is allowed anyway, and more beside the last token.
        """
        (at, used, last), tables = state, self.tables
        cut, free = (
            self._fits(tables.transitions[row[at]].astype(jnp.int32), used[:, None])
            for row in tables.rows
        )
        cut = cut.at[:, EOS_CLASS].set(tables.distance[at] == 0)
        bits = tables.beside[last][:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        beside = packed(bits.reshape(len(last), -1) > 0)
        words = packed(cut), packed(free)

        def seen() -> UInt32[Array, "G V"]:
            behind, after = (w.at[:, tables.classes].get(mode="promise_in_bounds") for w in words)
            return behind | after & beside.at[:, tables.right].get(mode="promise_in_bounds")

        return log_mask(unpacked(where_any(jnp.any(cut) | jnp.any(free), seen), len(last)))

    def _fits(
        self, following: Int[Array, "N *C"], used: Int[Array, "N *#C"]
    ) -> Bool[Array, "N *C"]:
        return used + 1 + self.tables.distance[following] <= bound(self.space).max_tokens


def canonical(tokenizer: Tokenizer) -> CanonicalAutomaton:
    """Strings in the tokenizer's own segmentation.

    Phi(x) = 1 if x is what the tokenizer makes of x's text, encode(decode(x)) = x, else 0: on such
    strings alone a model was trained.  A string that begins or ends inside of a character, and one
    whose text has a control token's name, are none.  A space that a tokenizer puts in front of a
    text is left aside: a string goes on from a prompt.

    Byte-pair encodings with the pre-tokenizers ByteLevel, Digits and Split, and sentencepiece's.
    Built once per tokenizer.

    Raises:
        ValueError: for other tokenizers, naming why.
    """
    return own(None, tokenizer)


def own(pattern: str | None, tokenizer: Tokenizer) -> CanonicalAutomaton:
    """Strings in the tokenizer's own segmentation whose text matches all of a pattern, if any.

    Raises:
        ValueError: `Unsegmented` if that is not known, or else if there are no such strings.
    """
    if not isinstance(tokenizer, Segmenting):
        raise Unsegmented(
            "expected a tokenizer with merges (one with a `segmentation`, as models.load returns),"
            f" got {type(tokenizer).__name__}; leave ppl.canonical away"
        )
    segmentation = tokenizer.segmentation
    own = f"own; {segmentation.relaxed}" if segmentation.relaxed else "own"
    arrays = map(jnp.asarray, _tables(pattern, segmentation, int(tokenizer.eos)))
    return CanonicalAutomaton(CanonicalTables(*arrays), int(tokenizer.eos), segmentation=own)


@functools.lru_cache(maxsize=64)
def _tables(pattern: str | None, segmentation: Segmentation, eos: int) -> CanonicalTables:
    """Cached as NumPy arrays: device arrays made under a trace would leak from it."""
    return canonical_tables.build(pattern, segmentation, eos)
