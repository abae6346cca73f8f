"""Token automata as potentials: Phi(x) = 1 if an automaton accepts x's tokens, else 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt32

from .potential import Trusted, log_mask
from .pytrees import register_dataclass
from .rows import anywhere
from .space import Space, bound
from .token_tables import EOS_CLASS, FORBIDDEN

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


def token_bytes(tokenizer: Tokenizer) -> Sequence[bytes | None]:
    """The bytes [V] of every token.

    Raises:
        ValueError: if it is no tokenizer, as the model is none.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            "expected a tokenizer (with token_bytes, eos and vocab_size), got"
            f" {type(tokenizer).__name__}; pass the second of what models.load returns"
        )
    return tokenizer.token_bytes


def check_tokenizer(space: Space, num_tokens: int, eos: int) -> None:
    """Raise ValueError unless a tokenizer of so many tokens, with this EOS, fits a space."""
    if space.vocab_size < num_tokens or space.eos != eos:
        raise ValueError(
            f"expected a tokenizer that fits the model (at most {space.vocab_size} tokens, EOS"
            f" {space.eos}), got one with {num_tokens} tokens and EOS {eos}; build the potential"
            " with the tokenizer that models.load returned"
        )


def check_horizon(space: Space, distance: Int[Array, " S"]) -> None:
    """Raise ValueError if no string within the horizon gets from the start to an accepting
    state.
    """
    least = 0 if isinstance(distance, Tracer) else int(np.asarray(distance)[0])
    if least > space.max_tokens:
        raise ValueError(
            f"expected max_tokens of at least {least}, the fewest tokens of any string that"
            f" matches, got {space.max_tokens}; raise max_tokens or allow shorter strings"
        )


def packed(flags: Bool[Array, "N C"]) -> UInt32[Array, "G C"]:
    """The answers of 32 particles as the bits of one word."""
    num = flags.shape[0]
    width = min(num, WORD)
    groups = -(-num // width)
    padded = jnp.pad(flags, ((0, groups * width - num), (0, 0))).reshape(groups, width, -1)
    bits = jnp.uint32(1) << jnp.arange(width, dtype=jnp.uint32)
    return jnp.sum(jnp.where(padded, bits[:, None], 0), axis=1, dtype=jnp.uint32)


def unpacked(words: UInt32[Array, "G V"], num: int) -> Bool[Array, "N V"]:
    """The inverse of `packed`."""
    width = min(num, WORD)
    bits = jnp.uint32(1) << jnp.arange(width, dtype=jnp.uint32)
    return (words[:, None] & bits[:, None] != 0).reshape(-1, words.shape[1])[:num]


def where_any(
    some: Bool[Array, ""], words: Callable[[], UInt32[Array, "G V"]]
) -> UInt32[Array, "G V"]:
    """The words, or zeros if there is nothing in them.

    A conditional is a fusion boundary: without it XLA gathers again for every particle and for
    every consumer.
    """
    zeros = jax.eval_shape(words)
    return jax.lax.cond(anywhere(some), words, lambda: jnp.zeros(zeros.shape, zeros.dtype))


AutomatonState = tuple[Int[Array, " N"], Int[Array, " N"]]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAutomaton(Trusted):
    """Phi(x) = 1 if a token automaton accepts x within the horizon T, else 0.

    A state is (automaton state [N], tokens used [N]), both int32.  A token is allowed only if

        used + 1 + distance[next state] <= T,

    so no string is ever led to where it can no longer be completed.  The tables are
    `token_tables.TokenTables`.

    Attributes:
        segmentation: "all", with words on why it is not the tokenizer's own alone.
        way: "tables".
    """

    way: ClassVar[str] = "tables"

    classes: Int[Array, " V"]
    transitions: Int[Array, "S C"]
    distance: Int[Array, " S"]
    eos: int = dataclasses.field(metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})
    segmentation: str = dataclasses.field(default="all", metadata={"static": True})

    def within(self, space: Space) -> TokenAutomaton:
        """This automaton over the strings of a space; ids that the tokenizer lacks are forbidden.

        Raises:
            ValueError: if the tokenizer does not fit the model, or no string within the horizon can
                match.
        """
        known = self.classes.shape[0]
        check_tokenizer(space, known, self.eos)
        check_horizon(space, self.distance)
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
        allowed = self._fits(self.transitions[at].astype(jnp.int32), used[:, None])
        allowed = allowed.at[:, EOS_CLASS].set(self.distance[at] == 0)
        words = packed(allowed)
        seen = where_any(
            jnp.any(allowed), lambda: words.at[:, self.classes].get(mode="promise_in_bounds")
        )
        return log_mask(unpacked(seen, at.shape[0]))

    def _fits(
        self, following: Int[Array, "N *C"], used: Int[Array, "N *#C"]
    ) -> Bool[Array, "N *C"]:
        return used + 1 + self.distance[following] <= bound(self.space).max_tokens
