"""Hard constraints on tokens and length: potentials whose factors are 0 or 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .checks import check_count, check_ids
from .potential import Potential, State
from .pytrees import register_dataclass


def _log(allowed: Bool[Array, " *shape"]) -> Float[Array, " *shape"]:
    return jnp.where(allowed, 0.0, -jnp.inf)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Banned(Potential):
    """Phi(x) = 1 if no token of x is in `ids`; state = zeros [N], the log-factor of the end."""

    ids: Int[Array, " K"]
    log_allowed: Float[Array, " V"] | None = None

    def within(self, max_tokens: int, vocab_size: int, eos: int) -> Potential:
        check_ids(self.ids, vocab_size, eos, "banned")
        return Banned(self.ids, jnp.zeros(vocab_size).at[self.ids].set(-jnp.inf))

    def init(self, num: int) -> State:
        return jnp.zeros(num, jnp.float32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state, _table(self.log_allowed)[token]

    def final(self, state: State) -> Float[Array, " N"]:
        return state

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        return jnp.broadcast_to(
            _table(self.log_allowed), (state.shape[0], _table(self.log_allowed).shape[0])
        )


def _table(table: Array | None) -> Array:
    if table is None:
        raise ValueError(
            "expected a potential bound to a vocabulary, got a free one; multiply it onto a target"
            " first"
        )
    return table


def banned(tokens: Sequence[int]) -> Banned:
    """Strings in which none of `tokens` occurs.

    Raises:
        ValueError: if an id is outside the vocabulary or is EOS (when multiplied onto a target).
    """
    return Banned(jnp.asarray(list(tokens), jnp.int32))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced(Potential):
    """Phi(x) = 1 if x starts with `ids` [K]; state = tokens so far [N]."""

    ids: Int[Array, " K"]
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    eos: int | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, max_tokens: int, vocab_size: int, eos: int) -> Potential:
        check_ids(self.ids, vocab_size, eos, "forced")
        if self.ids.shape[0] > max_tokens:
            raise ValueError(
                f"expected at most max_tokens={max_tokens} forced tokens, got {self.ids.shape[0]};"
                " raise max_tokens"
            )
        return Forced(self.ids, vocab_size, eos)

    def init(self, num: int) -> State:
        return jnp.zeros(num, jnp.int32)

    def _next(self, used: Int[Array, " N"]) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
        """The forced next token, and whether the next token is forced at all."""
        return self.ids[jnp.minimum(used, self.ids.shape[0] - 1)], used < self.ids.shape[0]

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        expected, forced = self._next(state)
        return state + 1, _log(~forced | (token == expected))

    def final(self, state: State) -> Float[Array, " N"]:
        return _log(state >= self.ids.shape[0])

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        expected, forced = self._next(state)
        return _log(~forced[:, None] | (jnp.arange(self.vocab_size) == expected[:, None]))


def forced(tokens: Sequence[int]) -> Forced:
    """Strings that start with `tokens`.

    Raises:
        ValueError: if there are none, more than max_tokens, or an id is outside the vocabulary or
            is EOS.
    """
    check_count("the number of forced tokens", len(tokens))
    return Forced(jnp.asarray(list(tokens), jnp.int32))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Length(Potential):
    """Phi(x) = 1 if length(x) >= at_least and, with `ends`, length(x) < T; state = tokens so far
    [N].
    """

    at_least: int = dataclasses.field(default=0, metadata={"static": True})
    ends: bool = dataclasses.field(default=False, metadata={"static": True})
    max_tokens: int | None = dataclasses.field(default=None, metadata={"static": True})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    eos: int | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, max_tokens: int, vocab_size: int, eos: int) -> Potential:
        if self.at_least > max_tokens - self.ends:
            raise ValueError(
                f"expected a minimum length of at most {max_tokens - self.ends}"
                f" (max_tokens={max_tokens}), got"
                f" {self.at_least}; raise max_tokens"
            )
        return dataclasses.replace(self, max_tokens=max_tokens, vocab_size=vocab_size, eos=eos)

    @property
    def _longest(self) -> int:
        """Greatest legal length."""
        if self.max_tokens is None:
            raise ValueError(
                "expected a potential bound to a horizon, got a free one; multiply it onto a target"
                " first"
            )
        return self.max_tokens - self.ends

    def init(self, num: int) -> State:
        return jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state + 1, _log(state < self._longest)

    def final(self, state: State) -> Float[Array, " N"]:
        return _log((state >= self.at_least) & (state <= self._longest))

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        is_eos = jnp.arange(self.vocab_size) == self.eos
        return _log(
            jnp.where(is_eos, (state >= self.at_least)[:, None], (state < self._longest)[:, None])
        )


def must_end() -> Length:
    """Strings that end by EOS within the horizon (at most T - 1 tokens before it)."""
    return Length(ends=True)


def min_tokens(num: int) -> Length:
    """Strings of at least `num` tokens before EOS.

    Raises:
        ValueError: if `num` < 1, or above max_tokens (when multiplied onto a target).
    """
    check_count("the minimum length", num)
    return Length(at_least=num)
