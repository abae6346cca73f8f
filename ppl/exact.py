"""Exact inference by enumeration: the oracle of every sampler, for small vocabularies and horizons.

All strings over V tokens (EOS among them) of at most T tokens are listed; there are sum_{t<T}
(V-1)^t + (V-1)^T.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .potential import State, Trusted
from .pytrees import register_dataclass
from .sequences import Sequences
from .showing import shown
from .space import Space
from .target import Target, check_target

MAX_STRINGS = 1_000_000


def strings(vocab_size: int, max_tokens: int, eos: int) -> Sequences:
    """Every string of at most `max_tokens` tokens, shorter ones first.

    Raises:
        ValueError: if there are more than a million.
    """
    count = sum((vocab_size - 1) ** t for t in range(max_tokens + 1))
    if count > MAX_STRINGS:
        raise ValueError(
            f"expected at most {MAX_STRINGS} strings to enumerate, got {count} (V={vocab_size},"
            f" T={max_tokens}); use a smaller model or horizon"
        )
    letters = [v for v in range(vocab_size) if v != eos]
    tokens = np.full((count, max_tokens), eos, np.int32)
    length = np.zeros(count, np.int32)
    rows = itertools.chain.from_iterable(
        itertools.product(letters, repeat=t) for t in range(max_tokens + 1)
    )
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        length[i] = len(row)
    return Sequences(jnp.asarray(tokens), jnp.asarray(length))


@shown
@dataclasses.dataclass(frozen=True)
class Enumeration:
    """All M strings of a target with their densities (float64 on the host).

    sequences [M, T]; log_gamma [M]; log_z = log sum_x gamma(x); probs [M], the normalised law.
    """

    sequences: Sequences
    log_gamma: np.ndarray
    vocab_size: int

    @property
    def log_z(self) -> float:
        return float(np.logaddexp.reduce(self.log_gamma))

    @property
    def probs(self) -> np.ndarray:
        if np.isneginf(self.log_gamma).all():
            raise ValueError(
                "expected a string of positive density, got none (Z = 0); loosen the potential"
            )
        return np.exp(self.log_gamma - self.log_z)

    def index(self, tokens: Int[Array, "N T"] | Int[np.ndarray, "N T"]) -> np.ndarray:
        """Which of the M strings each row is [N]; rows are padded with EOS after their end."""
        place = self.vocab_size ** np.arange(self.sequences.tokens.shape[1])
        lookup = np.full(self.vocab_size ** len(place), -1, np.int64)
        lookup[np.asarray(self.sequences.tokens) @ place] = np.arange(len(self.log_gamma))
        index = lookup[np.asarray(tokens) @ place]
        if (index < 0).any():
            raise ValueError(
                "expected strings padded with EOS after their end, got a token after EOS; see"
                " Sequences"
            )
        return index

    def law(self, tokens: Int[Array, "N T"], log_weights: Float[Array, " N"]) -> np.ndarray:
        """The normalised weighted law [M] of a population."""
        log_w = np.asarray(log_weights, np.float64)
        if np.isneginf(log_w).all():
            raise ValueError(
                "expected a living particle, got a population that is all dead; loosen the"
                " potential"
            )
        weights = np.exp(log_w - log_w.max())
        law = np.bincount(self.index(tokens), weights, minlength=len(self.log_gamma))
        return law / law.sum()

    def suffix(self, prefix: Sequence[int]) -> np.ndarray:
        """The conditional law [M] given that the string starts with the tokens `prefix` (none of
        them EOS).
        """
        starts = (
            np.asarray(self.sequences.tokens)[:, : len(prefix)] == np.asarray(prefix, np.int32)
        ).all(1)
        mass = np.where(starts, self.probs, 0.0)
        if mass.sum() == 0:
            raise ValueError(
                f"expected a prefix of positive probability, got {list(prefix)}; shorten it"
            )
        return mass / mass.sum()


def enumerate_strings(target: Target) -> Enumeration:
    """The exact law of a target over all its strings, by `target.log_density`.

    Raises:
        ValueError: if `target` is none, or has more than a million strings.
    """
    check_target(target)
    x = strings(target.lm.vocab_size, target.max_tokens, target.lm.eos)
    log_gamma = np.asarray(target.log_density(x.tokens, x.length), np.float64)
    return Enumeration(x, log_gamma, target.lm.vocab_size)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TabulatedPotential(Trusted):
    """A potential as a table over prefixes; state = the prefix's row [N].

    log_twist [R]: log psi of each prefix; the first row is the empty one's, whose psi, 1 or not, is
    paid with the first token.  log_final [R]: that of the prefix as a whole string.  children
    [R, V]: the row of each longer prefix; the last row stands for all that are longer than the
    horizon.
    """

    log_twist: Float[Array, " R"]
    log_final: Float[Array, " R"]
    children: Int[Array, "R V"]
    space: Space = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> TabulatedPotential:
        space.check_same(self.space, "a tabulated potential", "tabulate it for this target")
        return self

    def init(self, num: int) -> State:
        return jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        child = self.children[state, token]
        return child, self._ratio(self.log_twist[child], state)

    def final(self, state: State) -> Float[Array, " N"]:
        return self._ratio(self.log_final[state], state)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        factors = self._ratio(self.log_twist[self.children[state]].T, state).T
        return factors.at[:, self.space.eos].set(self.final(state))

    def _ratio(self, log_next: Array, state: Array) -> Array:
        so_far = jnp.where(state == 0, 0.0, self.log_twist[state])
        return jnp.where(jnp.isneginf(log_next), -jnp.inf, log_next - so_far)


def optimal_twist(target: Target, *, terminal: bool = True) -> TabulatedPotential:
    """The optimal twist of a target: what the rest of a string will contribute, summed over all of
    it.

        psi*_t(x_1:t) = sum_y gamma(x_1:t y) / p(x_1:t)^alpha

    (divided by Phi_t(x_1:t) if not terminal).

    SMC on `twists.twisted(target, optimal_twist(target))` with the locally optimal proposal has no
    weight variance: the first token's weight is Z, all others are 1 (arXiv 2404.17546).  In the
    other form that takes a Phi that knows its next factors, or pays at the end only: no proposal
    can make up for a factor that is not known when it draws.

    Args:
        target: with strings few enough to enumerate.
        terminal: the form of twisting that it is for; pass the same to `twists.twisted`.

    Returns:
        A potential whose increments are log psi*_t / psi*_{t-1}, with psi*_0 = 1, and whose `final`
        is what the end is worth, so that its look-ahead is known in full.
    """
    exact = enumerate_strings(target)
    x = exact.sequences
    tokens, lengths = np.asarray(x.tokens).tolist(), np.asarray(x.length)
    log_p = np.asarray(
        target.log_prob_factor(target.token_log_probs(x.tokens, x.length)), np.float64
    )
    in_prefix = np.arange(target.max_tokens) < lengths[:, None]
    paid = (
        np.zeros(len(lengths)) if terminal else np.asarray(_log_phi_so_far(target, x), np.float64)
    )
    log_prefix, log_whole = np.where(in_prefix, log_p, 0.0).sum(1) + paid, log_p.sum(1) + paid

    rows = {tuple(t[:n]): row for row, (t, n) in enumerate(zip(tokens, lengths, strict=True))}
    beyond = len(rows)
    children = np.full((beyond + 1, target.lm.vocab_size), beyond, np.int32)
    log_mass = exact.log_gamma.copy()
    for prefix, row in reversed(rows.items()):  # longer strings first
        if prefix:
            parent = rows[prefix[:-1]]
            children[parent, prefix[-1]] = row
            log_mass[parent] = np.logaddexp(log_mass[parent], log_mass[row])

    log_twist = np.append(_log_ratio(log_mass, log_prefix), -np.inf)
    log_twist[0] = 0.0  # the empty prefix carries no weight yet, so the first token's weight is Z
    log_final = np.append(_log_ratio(exact.log_gamma, log_whole), -np.inf)
    return TabulatedPotential(
        jnp.asarray(log_twist, jnp.float32),
        jnp.asarray(log_final, jnp.float32),
        jnp.asarray(children),
        target.space,
    )


@jax.jit
def _log_phi_so_far(target: Target, x: Sequences) -> Float[Array, " N"]:
    """log Phi_t of every string as a prefix: its tokens' factors, without the end's."""

    def body(state: State, t: Array) -> tuple[State, Array]:
        state, log_factor = target.potential.step(state, x.tokens[:, t])
        return state, jnp.where(t < x.length, log_factor, 0.0)

    start = target.potential.init(x.length.shape[0])
    return jax.lax.scan(body, start, jnp.arange(target.max_tokens, dtype=jnp.int32))[1].sum(0)


def _log_ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(numerator), -np.inf, numerator - denominator)
