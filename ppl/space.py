"""What strings are: a vocabulary, the token that ends a string, and the horizon."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from .sequences import Sequences
from .showing import shown

ONE_TOKENIZER = "use models with one tokenizer and give both the same max_tokens"


@shown
@dataclasses.dataclass(frozen=True)
class Space:
    """All strings of at most `max_tokens` tokens out of `vocab_size`, which `eos` ends.

    `Target.space` is a target's.  What is bound to strings (potentials, scorers, steps) keeps its
    space as static data, and None as long as it is free.
    """

    vocab_size: int
    eos: int
    max_tokens: int

    def check_same(self, other: Space, what: str, remedy: str = ONE_TOKENIZER) -> None:
        """Raise ValueError unless `other`, which is where `what` lives, is this space, a
        target's.
        """
        if self != other:
            raise ValueError(
                f"expected {what} over the target's strings, (vocab_size, eos, max_tokens) ="
                f" {dataclasses.astuple(self)}, got {dataclasses.astuple(other)}; {remedy}"
            )

    def check(self, x: Sequences) -> None:
        """Raise ValueError unless `x` has the shapes of strings of this space."""
        tokens, length = x.tokens, x.length
        if (
            tokens.ndim != 2
            or tokens.shape[1] != self.max_tokens
            or length.shape != tokens.shape[:1]
        ):
            raise ValueError(
                f"expected strings with tokens [C, {self.max_tokens}] and length [C], got"
                f" {tokens.shape} and {length.shape}; pad shorter strings with EOS up to max_tokens"
            )

    def strings(self, tokens: Any, length: Any) -> tuple[Sequences, Bool[Array, " N"]]:
        """Strings tokens [N, T], length [N], with EOS in every position from `length` on; and which
        rows are strings [N].

        A row is none if an id or its length is out of range, or EOS stands inside of it.  That is
        an error, and where the values are traced and cannot be read, the row is the empty string.

        Raises:
            ValueError: if their shapes are not those of strings, or a row that can be read is none.
        """
        tokens, length = (
            x if isinstance(x, jax.Array) else jnp.asarray(x) for x in (tokens, length)
        )
        self.check(Sequences(tokens, length))
        written = jnp.arange(self.max_tokens) < length[:, None]
        if isinstance(tokens, Tracer) or isinstance(length, Tracer):
            known = (tokens >= 0) & (tokens < self.vocab_size) & (tokens != self.eos)
            good = (length >= 0) & (length <= self.max_tokens) & (known | ~written).all(1)
        else:
            self._check_values(np.asarray(tokens), np.asarray(length))
            good = jnp.ones(length.shape, bool)
        tokens = jnp.where(written & good[:, None], tokens, self.eos).astype(jnp.int32)
        return Sequences(tokens, jnp.where(good, length, 0).astype(jnp.int32)), good

    def _check_values(self, tokens: np.ndarray, length: np.ndarray) -> None:
        outside = length[(length < 0) | (length > self.max_tokens)]
        if outside.size:
            raise ValueError(
                f"expected lengths in [0, {self.max_tokens}], got {outside[0]}; a length counts the"
                " tokens before EOS"
            )
        written = tokens[np.arange(self.max_tokens) < length[:, None]]
        unknown = written[(written < 0) | (written >= self.vocab_size)]
        if unknown.size:
            raise ValueError(
                f"expected token ids in [0, {self.vocab_size}), got {unknown[0]}; encode with this"
                " model's own tokenizer"
            )
        if (written == self.eos).any():
            raise ValueError(
                f"expected EOS ({self.eos}) only from a string's length on, got one before it; let"
                " the first EOS end the string, as ppl.sequences.from_tokens does"
            )


def bound(space: Space | None, what: str = "a potential") -> Space:
    """The space that `what` is bound to; raises ValueError if it is still free."""
    if space is None:
        raise ValueError(
            f"expected {what} bound to a space of strings, got a free one; multiply it onto a"
            " target first, or call within(target.space)"
        )
    return space
