"""Strings of tokens in fixed-size arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .pytrees import register_dataclass
from .showing import READ, Words


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """N strings of at most T tokens.

    tokens [N, T] int32: the string, then EOS from position `length` on.  length [N] int32: tokens
    before EOS, so the string ended by EOS exactly if length < T; length == T is a string cut by the
    horizon (or still growing).
    """

    tokens: Int[Array, "N T"]
    length: Int[Array, " N"]

    @property
    def ended(self) -> Bool[Array, " N"]:
        """Whether the string ended by EOS (False: cut by the horizon)."""
        return self.length < self.tokens.shape[1]

    def _shown_(self) -> dict[str, Any]:
        *batch, num, horizon = self.tokens.shape
        known = {"batch": tuple(batch)} if batch else {}
        return known | {"N": num, "T": horizon, "length": self.length, "first": self._first()}

    def _first(self) -> list[Words]:
        """The beginnings of the first two strings; nothing of what is traced, large or batched."""
        if isinstance(self.tokens, Tracer) or self.tokens.ndim != 2 or self.tokens.size > READ:
            return []
        strings = zip(np.asarray(self.tokens[:2]), np.asarray(self.length[:2]), strict=True)
        return [Words(" ".join(map(str, tokens[:length]))) for tokens, length in strings]


def empty(num: int, max_tokens: int, eos: int) -> Sequences:
    """N strings without a token yet: every position holds EOS."""
    return Sequences(jnp.full((num, max_tokens), eos, jnp.int32), jnp.zeros(num, jnp.int32))


def from_tokens(tokens: Int[Array, "N T"], eos: int) -> Sequences:
    """Strings from an array in which the first EOS ends the string; whatever follows it is replaced
    by EOS.
    """
    is_eos = tokens == eos
    length = jnp.where(is_eos.any(1), is_eos.argmax(1), tokens.shape[1]).astype(jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return Sequences(
        jnp.where(positions < length[:, None], tokens, eos).astype(jnp.int32),
        length.astype(jnp.int32),
    )


def append(
    x: Sequences, token: Int[Array, " N"], active: Bool[Array, " N"], eos: int
) -> tuple[Sequences, Bool[Array, " N"]]:
    """Add `token` [N] to the active rows; returns the strings and which rows go on.

    A row goes on until its EOS, which is absorbing, or until it is full.  The others keep what they
    hold.
    """
    horizon = x.tokens.shape[1]
    here = (jnp.arange(horizon) == x.length[:, None]) & active[:, None]
    active = active & (token != eos)
    length = x.length + active
    return Sequences(jnp.where(here, token[:, None], x.tokens), length), active & (length < horizon)
