"""Twists: other intermediate targets for the same density, so that SMC sees what a prefix is worth
(arXiv 2404.17546).

A twist psi_t(x_1:t) > 0 estimates what the rest of a string will contribute.  The twisted
intermediate targets are

    pi_t(x_1:t) = p(x_1:t)^alpha psi_t(x_1:t)                      terminal
    pi_t(x_1:t) = p(x_1:t)^alpha Phi_t(x_1:t) psi_t(x_1:t)         per step

with Phi_t the potential's factors so far, and at the end of a string pi is gamma in both.  So the
scale of psi matters: strings that go on are weighed by psi beside those that have ended, which are
weighed by Phi.  A run starts from pi_0 = 1, and the first token pays all of psi_1; what a twist
itself says of the empty string, psi_0, is banked with it (see `twisted`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from .checks import numbers
from .potential import Potential, State, Trusted
from .pytrees import register_dataclass
from .sequences import Sequences
from .space import Space, bound
from .target import Target


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Twisted(Potential):
    """The Phi of `base`, paid out in the increments of `twist` (see `twisted`).

    State = (base's, twist's, owed [N]): the end pays what was lent, log Phi_t - log psi_t in the
    terminal form and -log psi_t in the other, times the base's last factor.
    """

    base: Potential
    twist: Potential
    space: Space = dataclasses.field(metadata={"static": True})
    terminal: bool = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> Twisted:
        space.check_same(self.space, "a twisted potential", "twist the product as a whole")
        return self

    def init(self, num: int) -> State:
        return self.base.init(num), self.twist.init(num), jnp.zeros(num, jnp.float32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        base, twist, owed = state
        base, log_phi = self.base.step(base, token)
        twist, log_psi = self.twist.step(twist, token)
        paid = self._pay(log_phi, log_psi)
        owed = _unless_dead(owed, _unless_dead(paid, owed + log_phi - paid))
        return (base, twist, owed), paid

    def final(self, state: State) -> Float[Array, " N"]:
        return self.final_where(state, jnp.ones(state[2].shape[0], bool))

    def final_where(self, state: State, needed: Bool[Array, " N"]) -> Float[Array, " N"]:
        base, _, owed = state
        return _unless_dead(owed, owed + self.base.final_where(base, needed))

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        base, twist, _ = state
        # A twist's last factor is never paid.
        nowhere = jnp.zeros_like(ends)
        return self.base.judged(base, token, ends) + self.twist.judged(twist, token, nowhere)

    @property
    def trusted(self) -> bool:
        return self.twist.trusted

    @property
    def constraint(self) -> Potential:
        return self.base

    def lookahead(self, state: State) -> Float[Array, "N V"] | None:
        """The next factors as far as base and twist know theirs; None if neither does.

        The EOS column is exact if the base knows its last factor.  Else the twist guesses it by its
        own `final`, where the base does not forbid the end.
        """
        base, twist, owed = state
        log_phi, log_psi = self.base.lookahead(base), self.twist.lookahead(twist)
        exact = log_psi is None or _knows_all(self.base, base)
        eos = self.space.eos
        if log_phi is None:
            if log_psi is None:
                return None
            log_phi = jnp.zeros_like(log_psi)
        log_psi = jnp.zeros_like(log_phi) if log_psi is None else log_psi
        log_end = log_phi[:, eos]
        end = (
            _unless_dead(owed, owed + log_end) if exact else _unless_dead(log_end, log_psi[:, eos])
        )
        return self._pay(log_phi, log_psi).at[:, eos].set(end)

    def _pay(self, log_phi: Array, log_psi: Array) -> Array:
        """The factor of a token; what the base forbids is dropped at once, and NaN reported at
        once.
        """
        return (
            jnp.where(jnp.isfinite(log_phi), log_psi, log_phi)
            if self.terminal
            else log_phi + log_psi
        )


def _unless_dead(log_mass: Array, value: Array) -> Array:
    return jnp.where(jnp.isneginf(log_mass), -jnp.inf, value)


def _knows_all(potential: Potential, state: State) -> bool:
    """Whether the look-ahead is the whole factor; a product's has only what its factors know."""
    pairs = zip(potential.parts, potential.part_states(state), strict=True)
    return all(part.lookahead(s) is not None for part, s in pairs)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Banked(Potential):
    """A twist whose increments start from psi_0, which the first token pays besides, EOS too.

    State = (the twist's, log psi_0 until it is paid, then 0 [N]).
    """

    twist: Potential
    log_psi_0: Float[Array, ""]

    @property
    def trusted(self) -> bool:
        return self.twist.trusted

    def init(self, num: int) -> State:
        return self.twist.init(num), jnp.broadcast_to(self.log_psi_0, (num,))

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        twist, unpaid = state
        twist, log_psi = self.twist.step(twist, token)
        return (twist, jnp.zeros_like(unpaid)), log_psi + unpaid

    def judged(
        self, state: State, token: Int[Array, " N"], ends: Bool[Array, " N"]
    ) -> Int[Array, " N"] | int:
        return self.twist.judged(state[0], token, ends)

    def lookahead(self, state: State) -> Float[Array, "N V"] | None:
        known = self.twist.lookahead(state[0])
        return None if known is None else known + state[1][:, None]


def twisted(
    target: Target,
    twist: Potential,
    *,
    terminal: bool = True,
    log_psi_0: float | int | Float[Array, ""] | None = None,
) -> Target:
    """The same density with the intermediate targets pi_t of a twist (see the module).

    Every sampler stays exact with every twist that is positive where the density is; the better the
    twist, the smaller the variance, and `exact.optimal_twist` leaves none.  The weights are made of
    true factors only: a terminal twist is divided out where a string ends, and Phi paid in full.

    Args:
        target: p^alpha Phi.
        twist: a potential whose increments are log psi_t / psi_{t-1}: a table, `lm_potential(q)`, a
            learned head, or `step_scores(log_psi, Steps(every=1))` for a function of strings.  Its
            `final` is never paid; if the twist has a look-ahead, it is the proposal's guess of the
            end's factor wherever the target's potential does not know that.  A prefix with psi_t =
            0 is lost: where Phi is positive later, the result is biased.
        terminal: Phi is paid at the end only, psi replacing it on the way (what Phi forbids is
            dropped at once all the same); False: Phi is paid as it comes, and psi on top of it.
        log_psi_0: log psi of the empty string, where that is what the twist's first increment, log
            psi_1 / psi_0, is over: for a twist that estimates what is to come, log Z.  It is paid
            with the first token.  None is 0: so it is for language models and learned twists, for
            `step_scores`, whose first increment is all of log psi_1, and for the tables of `exact`,
            which pay it by themselves.  Left out where it is not 0, every string that ends weighs
            psi_0 times what it should beside those that go on, until all have ended: the result is
            exact, and its variance may be huge.

    Raises:
        ValueError: if the twist is not a potential, or does not fit the target's strings.
    """
    if not isinstance(twist, Potential):
        raise ValueError(
            f"expected a potential as twist, got {type(twist).__name__}; use ppl.lm_potential(q)"
            " for a language model, ppl.step_scores(log_psi, ppl.Steps(every=1)) for a function of"
            " strings"
        )
    twist = twist.within(target.space)
    if log_psi_0 is not None:
        twist = _Banked(twist, jnp.asarray(log_psi_0, jnp.float32))
    potential = Twisted(target.potential, twist, target.space, terminal)
    return dataclasses.replace(target, potential=potential)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLength(Trusted):
    """A twist that is a function of the number of tokens: log_psi [T], of 0 to T - 1 of them; its
    first increment is all of log psi_1.  State = tokens so far [N].
    """

    log_psi: Float[Array, " T"]
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> ByLength:
        if self.log_psi.shape != (space.max_tokens,):
            raise ValueError(
                f"expected log psi of 0 to {space.max_tokens - 1} tokens, got shape"
                f" {list(self.log_psi.shape)}; give one for each of max_tokens={space.max_tokens}"
            )
        return dataclasses.replace(self, space=space)

    def init(self, num: int) -> State:
        bound(self.space)
        return jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state + 1, self._psi(state + 1) - self._psi(state)

    def final(self, state: State) -> Float[Array, " N"]:
        return -self._psi(state)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        space = bound(self.space)
        _, increment = self.step(state, state)
        is_eos = jnp.arange(space.vocab_size) == space.eos
        return jnp.where(is_eos, self.final(state)[:, None], increment[:, None])

    def _psi(self, length: Int[Array, " N"]) -> Float[Array, " N"]:
        """0 of the empty string, and at the horizon, where there is nothing to come."""
        inside = (length > 0) & (length < len(self.log_psi))
        return jnp.where(inside, self.log_psi[jnp.minimum(length, len(self.log_psi) - 1)], 0.0)


def by_length(log_psi: Num[ArrayLike, " T"]) -> ByLength:
    """A twist that knows how many tokens there are: log_psi [T], of strings of 0 to T - 1 tokens.

    Where it is the log-probability that a string of so many tokens ends within the T, and that does
    not depend on the tokens, it is the optimal one of p * ppl.must_end().

    Raises:
        ValueError: unless they are finite, and one for each of max_tokens (when a target is
            twisted).
    """
    row = numbers("log_psi", log_psi)
    if np.isinf(row).any():
        raise ValueError(
            f"expected log_psi to be finite, got {row.tolist()}; a psi of 0 loses what is behind it"
        )
    return ByLength(jnp.asarray(row, jnp.float32))


def ends_in_time(x: Sequences) -> ByLength:
    """The twist that says what share of strings as long as this one still end within the horizon,
    from N strings of p (a pilot run): with lengths L,

        psi_t = (#{t <= L < T} + 1) / (#{L >= t} + 2)

    For p * ppl.must_end(), p of the same horizon: a string that goes on weighs what it is likely to
    come to, beside those that have ended.  Exact whatever the pilot was.
    """
    length, horizon = x.length, x.tokens.shape[1]
    so_far = jnp.arange(horizon)[:, None]
    reached = (length >= so_far).sum(1)
    in_time = ((length >= so_far) & (length < horizon)).sum(1)
    return ByLength(jnp.log((in_time + 1.0) / (reached + 2.0)).astype(jnp.float32))
