"""Regular expressions and JSON schemas as potentials: Phi(x) = 1 if x's bytes match, else 0."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from . import byte_dfa, token_tables
from .potential import Trusted, log_mask
from .pytrees import register_dataclass
from .rows import anywhere
from .schemas import schema_regex
from .space import Space, bound
from .token_tables import EOS_CLASS, FORBIDDEN, UNREACHABLE, TokenTables, Vocabulary

WORD = 32


@runtime_checkable
class Tokenizer(Protocol):
    """What an automaton asks of a tokenizer: the bytes of every token (None for control tokens) and
    EOS.
    """

    @property
    def token_bytes(self) -> Sequence[bytes | None]: ...

    @property
    def eos(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def check_tokenizer(space: Space, num_tokens: int, eos: int) -> None:
    """Raise ValueError unless a tokenizer of so many tokens, with this EOS, fits a space."""
    if space.vocab_size < num_tokens or space.eos != eos:
        raise ValueError(
            f"expected a tokenizer that fits the model (at most {space.vocab_size} tokens, EOS"
            f" {space.eos}), got one with {num_tokens} tokens and EOS {eos}; build the potential"
            " with the tokenizer that models.load returned"
        )


AutomatonState = tuple[Int[Array, " N"], Int[Array, " N"]]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAutomaton(Trusted):
    """Phi(x) = 1 if a token automaton accepts x within the horizon T, else 0.

    A state is (automaton state [N], tokens used [N]), both int32.  A token is allowed only if

        used + 1 + distance[next state] <= T,

    so no string is ever led to where it can no longer be completed.  The tables are
    `token_tables.TokenTables`.
    """

    classes: Int[Array, " V"]
    transitions: Int[Array, "S C"]
    distance: Int[Array, " S"]
    eos: int = dataclasses.field(metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> TokenAutomaton:
        """This automaton over the strings of a space; ids that the tokenizer lacks are forbidden.

        Raises:
            ValueError: if the tokenizer does not fit the model, or no string within the horizon can
                match.
        """
        known = self.classes.shape[0]
        check_tokenizer(space, known, self.eos)
        least = 0 if isinstance(self.distance, Tracer) else int(self.distance[0])
        if least > space.max_tokens:
            raise ValueError(
                f"expected max_tokens of at least {least}, the fewest tokens of any string that"
                f" matches, got {space.max_tokens}; raise max_tokens or allow shorter strings"
            )
        classes = jnp.pad(self.classes, (0, space.vocab_size - known), constant_values=FORBIDDEN)
        return dataclasses.replace(self, classes=classes, space=space)

    def init(self, num: int) -> AutomatonState:
        bound(self.space)
        return jnp.zeros(num, jnp.int32), jnp.zeros(num, jnp.int32)

    def step(
        self, state: AutomatonState, token: Int[Array, " N"]
    ) -> tuple[AutomatonState, Float[Array, " N"]]:
        at, used = state
        following = self.transitions[at, self.classes[token]].astype(jnp.int32)
        allowed = self._fits(following, used)
        return (jnp.where(allowed, following, self.distance.shape[0] - 1), used + 1), log_mask(
            allowed
        )

    def final(self, state: AutomatonState) -> Float[Array, " N"]:
        return log_mask(self.distance[state[0]] == 0)

    def lookahead(self, state: AutomatonState) -> Float[Array, "N V"]:
        """The factors of every next token.

        Decided per class, then spread over the vocabulary with the answers of 32 particles in the
        bits of one word: V gathers instead of N V.
        """
        at, used = state
        num = at.shape[0]
        allowed = self._fits(self.transitions[at].astype(jnp.int32), used[:, None])
        allowed = allowed.at[:, EOS_CLASS].set(self.distance[at] == 0)
        width = min(num, WORD)
        groups = -(-num // width)
        padded = jnp.pad(allowed, ((0, groups * width - num), (0, 0))).reshape(groups, width, -1)
        bits = jnp.uint32(1) << jnp.arange(width, dtype=jnp.uint32)
        words = jnp.sum(jnp.where(padded, bits[:, None], 0), axis=1, dtype=jnp.uint32)
        # A conditional is a fusion boundary: without it XLA gathers again for every particle and
        # for every consumer.
        spread = jax.lax.cond(
            anywhere(allowed),
            lambda: words.at[:, self.classes].get(mode="promise_in_bounds"),
            lambda: jnp.zeros((groups, self.classes.shape[0]), jnp.uint32),
        )
        return log_mask(spread[:, None] & bits[:, None] != 0).reshape(groups * width, -1)[:num]

    def _fits(
        self, following: Int[Array, "N *C"], used: Int[Array, "N *#C"]
    ) -> Bool[Array, "N *C"]:
        return used + 1 + self.distance[following] <= bound(self.space).max_tokens


def regex(pattern: str, tokenizer: Tokenizer) -> TokenAutomaton:
    r"""Strings whose text matches all of a regular expression.

    Phi(x) = 1 if the concatenated bytes of x's tokens are UTF-8 that matches `pattern` from the
    first byte to the last, else 0; so must a string that is cut by the horizon.  Tokens without
    bytes (control tokens) never occur.  The syntax is that of Rust's regex crate: no look-around,
    back-references or word boundaries, `\d` and `\w` are Unicode, `.` is any character but a
    newline.  ^ in front and $ at the end are allowed and say nothing.  Which alternative comes
    first and laziness do not matter.  The character U+10FFFF is reserved and never matches.

    A pattern is built once per vocabulary and process.

    Raises:
        ValueError: if the pattern is invalid, uses an unsupported feature, matches no string of
            this vocabulary, or needs too large an automaton.
    """
    vocab = token_tables.vocabulary(tokenizer.token_bytes, tokenizer.eos)
    tables = _tables(pattern, vocab)
    arrays = (jnp.asarray(table) for table in tables)
    return TokenAutomaton(*arrays, eos=int(tokenizer.eos))


def json_schema(schema: str | dict[str, Any], tokenizer: Tokenizer) -> TokenAutomaton:
    r"""Strings that are JSON texts valid under a schema.

    Phi(x) = 1 if x's text is such a JSON text, of the following form, else 0.  The properties of an
    object come in the order of the schema; between two symbols of an object or array there is one
    space or none, and no newline; numbers have no leading zeros and integers no fraction; of the
    escapes, strings have \" \\ \/ \b \f \n \r \t.  Properties beyond those named in `properties`
    and items beyond `prefixItems` never occur, and a schema {} nests to a fixed depth.  A `pattern`
    must match all of the text between the quotes; `format` is one of `schemas.FORMATS`; `oneOf` is
    read as `anyOf`.

    Args:
        schema: a schema as a dict, or as JSON text.
        tokenizer: as in `regex`.

    Raises:
        ValueError: if the schema is invalid, has keywords that cannot be enforced (such as minimum,
            uniqueItems, not), or as in `regex`.
    """
    return regex(schema_regex(schema), tokenizer)


@functools.lru_cache(maxsize=64)
def _tables(pattern: str, vocab: Vocabulary) -> TokenTables:
    """Cached as NumPy arrays: device arrays made under a trace would leak from it."""
    tables = token_tables.build(byte_dfa.compile_regex(pattern), vocab)
    if tables.distance[0] == UNREACHABLE:
        raise ValueError(
            f"expected a pattern that some string of this tokenizer's {len(tables.classes)} tokens"
            f" matches, got {pattern!r}, which none does; loosen the pattern"
        )
    return tables
