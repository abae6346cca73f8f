"""Hard constraints: potentials whose factors are 0 or 1; on tokens, on length, and what any other
potential forbids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .checks import check_count, check_ids
from .potential import Potential, Product, State, Trusted, log_mask
from .pytrees import register_dataclass
from .space import Space, bound
from .target import Target


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Banned(Trusted):
    """Phi(x) = 1 if no token of x is in `ids`; state = zeros [N], the log-factor of the end."""

    ids: Int[Array, " K"]
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Potential:
        check_ids(self.ids, space.vocab_size, space.eos, "banned")
        return Banned(self.ids, space)

    def init(self, num: int) -> State:
        bound(self.space)
        return jnp.zeros(num, jnp.float32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state, log_mask((token[:, None] != self.ids).all(1))

    def final(self, state: State) -> Float[Array, " N"]:
        return state

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        size = bound(self.space).vocab_size
        allowed = jnp.ones(size, bool).at[self.ids].set(False)
        return jnp.broadcast_to(log_mask(allowed), (state.shape[0], size))


def banned(tokens: Sequence[int]) -> Banned:
    """Strings in which none of `tokens` occurs.

    Raises:
        ValueError: if an id is outside the vocabulary or is EOS (when multiplied onto a target).
    """
    return Banned(jnp.asarray(list(tokens), jnp.int32))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced(Trusted):
    """Phi(x) = 1 if x starts with `ids` [K]; state = tokens so far [N]."""

    ids: Int[Array, " K"]
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Potential:
        check_ids(self.ids, space.vocab_size, space.eos, "forced")
        if self.ids.shape[0] > space.max_tokens:
            raise ValueError(
                f"expected at most max_tokens={space.max_tokens} forced tokens, got"
                f" {self.ids.shape[0]}; raise max_tokens"
            )
        return Forced(self.ids, space)

    def init(self, num: int) -> State:
        bound(self.space)
        return jnp.zeros(num, jnp.int32)

    def _next(self, used: Int[Array, " N"]) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
        """The forced next token, and whether the next token is forced at all."""
        return self.ids[jnp.minimum(used, self.ids.shape[0] - 1)], used < self.ids.shape[0]

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        expected, forced = self._next(state)
        return state + 1, log_mask(~forced | (token == expected))

    def final(self, state: State) -> Float[Array, " N"]:
        return log_mask(state >= self.ids.shape[0])

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        expected, forced = self._next(state)
        vocabulary = jnp.arange(bound(self.space).vocab_size, dtype=jnp.int32)
        return log_mask(~forced[:, None] | (vocabulary == expected[:, None]))


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
class Length(Trusted):
    """Phi(x) = 1 if length(x) >= at_least and, with `ends`, length(x) < T; state = tokens so far
    [N].
    """

    at_least: int = dataclasses.field(default=0, metadata={"static": True})
    ends: bool = dataclasses.field(default=False, metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Potential:
        within = dataclasses.replace(self, space=space)
        if self.at_least > within._longest:
            raise ValueError(
                f"expected a minimum length of at most {within._longest}"
                f" (max_tokens={space.max_tokens}), got {self.at_least}; raise max_tokens"
            )
        return within

    @property
    def _longest(self) -> int:
        """Greatest legal length."""
        return bound(self.space).max_tokens - self.ends

    def init(self, num: int) -> State:
        bound(self.space)
        return jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state + 1, log_mask(state < self._longest)

    def final(self, state: State) -> Float[Array, " N"]:
        return log_mask((state >= self.at_least) & (state <= self._longest))

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        space = bound(self.space)
        is_eos = jnp.arange(space.vocab_size) == space.eos
        may_end, may_go_on = state >= self.at_least, state < self._longest
        return log_mask(jnp.where(is_eos, may_end[:, None], may_go_on[:, None]))


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


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Support(Trusted):
    """Factor 1 wherever that of another potential is positive, else 0; the state is the other's."""

    potential: Potential
    space: Space = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> Support:
        space.check_same(self.space, "a support", "take that of this target")
        return self

    def init(self, num: int) -> State:
        return self.potential.init(num)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        state, log_factor = self.potential.step(state, token)
        return state, _positive(log_factor)

    def final(self, state: State) -> Float[Array, " N"]:
        return _positive(self.potential.final(state))

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        return _positive(self.potential.final_where(state, needed))

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        known = self.potential.lookahead(state)
        assert known is not None
        return _positive(known)


def support(target: Target) -> Potential:
    """What a target's look-ahead forbids, as a constraint: the law of a guide that is to draw no
    string of density zero is

        q = target.under(g.lm) * ppl.support(target)

    Each part of the potential that has a look-ahead gives a `Support`; one that has none, or whose
    look-ahead is a model's (`Potential.constraint`), gives nothing, and without any the result is
    the empty product.
    """
    return Product(tuple(Support(part, target.space) for part in _constraints(target.potential)))


def _constraints(potential: Potential) -> list[Potential]:
    found = []
    for part in potential.parts:
        constraint = part.constraint
        if constraint is part:
            # Nothing is computed.
            known = jax.eval_shape(lambda part: part.lookahead(part.init(1)), part)
            found += [] if known is None else [part]
        elif constraint is not None:
            found += _constraints(constraint)
    return found


def _positive(log_factor: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    return log_mask((log_factor > -jnp.inf) & (log_factor < jnp.inf))
