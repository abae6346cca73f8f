"""Potentials: nonnegative functions Phi(x) of a string, evaluated one token at a time.

A potential is a pytree (its tables and weights are leaves) with four functions:

    init(num) -> state                               every leaf has the particle axis N first
    step(state, token[N]) -> (state, log_factor[N])  the factor of one more token, never EOS
    final(state) -> log_factor[N]                    once, at the end by EOS or by the horizon
    lookahead(state) -> log_factor[N, V] | None      of every next token; column EOS is `final`'s

The increments of a string sum to log Phi.  A factor of -inf forbids the string.  `step` may be
called with EOS for strings that have ended: its result is then ignored, so it must not raise.

At the horizon a string pays `final` besides the `step` of its last token, which is not told that it
is the last.  So no column of a look-ahead but that of EOS holds `final`, there either.

Only proposals read `lookahead`; weights are made of `step` and `final`.  So what cannot be known
may be guessed (`twists.twisted` guesses the end's factor), at the price of variance, but -inf must
stand for the factor -inf.  NaN and +inf, in a factor or a look-ahead, count as -inf, for the token
that they are of, and samplers count them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .pytrees import register_dataclass
from .sequences import Sequences
from .space import Space

State = Any


class Potential:
    """Base class: subclasses, under `ppl.register_dataclass`, define `init`, `step` and `final`
    (see the module).
    """

    def within(self, space: Space) -> Potential:
        """This potential over the strings of a space; a target calls it once.

        Potentials that depend on what strings are keep the space; impossible ones raise
        `ValueError`.
        """
        return self

    @property
    def parts(self) -> tuple[Potential, ...]:
        """What this is a product of; powers are drawn into the product."""
        return (self,)

    def part_states(self, state: State) -> tuple[State, ...]:
        """The states of `parts`, in their order, out of this potential's state."""
        return (state,)

    def init(self, num: int) -> State:
        raise NotImplementedError

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        raise NotImplementedError

    def final(self, state: State) -> Float[Array, " N"]:
        raise NotImplementedError

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        """`final` for the rows that end now, anything elsewhere: what is dear to evaluate spares
        the other rows.
        """
        return self.final(state)

    def lookahead(self, state: State) -> Float[Array, "N V"] | None:
        return None

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        """How many tokens judges inside of it read for the factor of the next token; `ends` says
        which rows pay their last factor with it.
        """
        return 0

    @property
    def trusted(self) -> bool:
        """Whether proposals may follow the look-ahead wherever it leads: it says which tokens are
        allowed, or what every token is worth with all that comes after it.

        Of other look-aheads they do not follow one that knows what the end pays and little else,
        for a string that goes on pays its own end later (`samplers.strings.foresight`).
        """
        return False

    @property
    def constraint(self) -> Potential | None:
        """The potential whose look-ahead tells what this one forbids (`ppl.support`); None if none
        does, or if it costs as much as a model.
        """
        return self

    def log_phi(self, x: Sequences) -> Float[Array, " N"] | None:
        """log Phi of whole strings, if there is a quicker way to it than token by token;
        else None.
        """
        return None

    def __mul__(self, other: Potential) -> Potential:
        if not isinstance(other, Potential):
            return NotImplemented
        return Product(_factors(self) + _factors(other))

    def __pow__(self, power: float | int | Float[Array, ""]) -> Potential:
        return Power(self, jnp.asarray(power, jnp.float32))


class Trusted(Potential):
    """Base class of potentials whose look-ahead is `trusted`."""

    @property
    def trusted(self) -> bool:
        return True


def _factors(potential: Potential) -> tuple[Potential, ...]:
    return potential.factors if isinstance(potential, Product) else (potential,)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Product(Potential):
    """Phi(x) = prod_k Phi_k(x); the empty product is 1."""

    factors: tuple[Potential, ...] = ()

    def within(self, space: Space) -> Potential:
        return Product(tuple(f.within(space) for f in self.factors))

    @property
    def parts(self) -> tuple[Potential, ...]:
        return tuple(part for f in self.factors for part in f.parts)

    def part_states(self, state: State) -> tuple[State, ...]:
        pairs = zip(self.factors, state[1], strict=True)
        return tuple(part for f, s in pairs for part in f.part_states(s))

    @staticmethod
    def joined(pairs: Sequence[tuple[Potential, State]], num: int) -> tuple[Product, State]:
        """The product of potentials that are in these states, of N = `num` rows, and its state."""
        potentials, states = tuple(f for f, _ in pairs), tuple(s for _, s in pairs)
        # The zeros give the empty product its N.
        return Product(potentials), (jnp.zeros(num, jnp.float32), states)

    def init(self, num: int) -> State:
        return Product.joined([(f, f.init(num)) for f in self.factors], num)[1]

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        one, states = state
        pairs = [f.step(s, token) for f, s in zip(self.factors, states, strict=True)]
        return (one, tuple(s for s, _ in pairs)), sum((log_factor for _, log_factor in pairs), one)

    def final(self, state: State) -> Float[Array, " N"]:
        one, states = state
        return sum((f.final(s) for f, s in zip(self.factors, states, strict=True)), one)

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        one, states = state
        return sum(
            (f.final_where(s, needed) for f, s in zip(self.factors, states, strict=True)), one
        )

    def lookahead(self, state: State) -> Float[Array, "N V"] | None:
        """The product of the factors that are known in advance; None if none is."""
        known = [f.lookahead(s) for f, s in zip(self.factors, state[1], strict=True)]
        known = [k for k in known if k is not None]
        return sum(known[1:], known[0]) if known else None

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        pairs = zip(self.factors, state[1], strict=True)
        return sum(f.judged(s, token, ends) for f, s in pairs)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Power(Potential):
    """Phi(x)^power: tempering.  A forbidden string stays forbidden at every power, 0 included."""

    potential: Potential
    power: Float[Array, ""]

    def within(self, space: Space) -> Potential:
        return Power(self.potential.within(space), self.power)

    @property
    def parts(self) -> tuple[Potential, ...]:
        return tuple(Power(part, self.power) for part in self.potential.parts)

    def part_states(self, state: State) -> tuple[State, ...]:
        return self.potential.part_states(state)

    def init(self, num: int) -> State:
        return self.potential.init(num)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        state, log_factor = self.potential.step(state, token)
        return state, scale(self.power, log_factor)

    def final(self, state: State) -> Float[Array, " N"]:
        return scale(self.power, self.potential.final(state))

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        return scale(self.power, self.potential.final_where(state, needed))

    @property
    def trusted(self) -> bool:
        return self.potential.trusted

    @property
    def constraint(self) -> Potential | None:
        return self.potential.constraint

    def lookahead(self, state: State) -> Float[Array, "N V"] | None:
        known = self.potential.lookahead(state)
        return None if known is None else scale(self.power, known)

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        return self.potential.judged(state, token, ends)

    def log_phi(self, x: Sequences) -> Float[Array, " N"] | None:
        log_phi = self.potential.log_phi(x)
        return None if log_phi is None else scale(self.power, log_phi)


def log_mask(allowed: Bool[Array, " *shape"]) -> Float[Array, " *shape"]:
    """The log-factor of a condition: 0 where it holds, -inf elsewhere (float32)."""
    return jnp.where(allowed, jnp.float32(0), jnp.float32(-jnp.inf))


def scale(power: Float[Array, "..."] | float, log_factor: Array) -> Array:
    """power * log_factor in which -inf stays -inf (0 * -inf would be NaN), as do NaN and +inf; a
    power [N] goes with the rows.  The gradient by the power is 0 there.
    """
    power = jnp.asarray(power, jnp.float32)
    power = power.reshape(*power.shape, *[1] * (log_factor.ndim - power.ndim))
    finite = jnp.isfinite(log_factor)
    return jnp.where(finite, power * jnp.where(finite, log_factor, 0.0), log_factor)
