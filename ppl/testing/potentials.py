"""Is it a potential?  Look-aheads, whole strings and resampled states against single steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..potential import Potential, State
from ..rows import take_rows
from ..sequences import Sequences
from ..space import Space
from .laws import check_rows, check_same_structure, generator, require, uniform

MAX_COLUMNS = 256
"""Columns of a look-ahead that are compared with `step`; a larger vocabulary has as many chosen at
random.
"""


def check_potential(
    potential: Potential,
    *,
    vocab_size: int,
    eos: int,
    max_tokens: int,
    key: PRNGKeyArray,
    num: int = 8,
    atol: float = 1e-4,
) -> None:
    """Assert that `potential` is a potential over strings of at most `max_tokens` tokens.

    Half of the random strings follow the look-ahead (if there is one), the others are uniform.
    Checked: increments are finite or -inf; states have N first, keep their structure, and belong to
    their rows alone, also when rows are taken midway as resampling does; `log_phi`, if there is
    one, is the sum of a string's factors; the look-ahead is `step`'s factor for every token and
    `final`'s for EOS; `step` with EOS does not raise; jit equals no jit.

    Who pays what: `step` is not told that a token is the last; at the horizon `final` is paid on
    top, and is in no column of a look-ahead but EOS's.  That a string has ended, by EOS or the
    horizon, is told by `final` being asked: a score of steps pays its last ratio there, not twice.

    Args:
        potential: as a user writes it, before `within`.
        vocab_size: V >= 2.
        eos: the token that ends a string.
        max_tokens: T >= 1.
        key: the random strings come from it.
        num: N >= 2 rows.
        atol: greatest difference of two log-factors that counts as equal.

    Raises:
        AssertionError: naming the law that does not hold, and where.
        ValueError: if num < 2, or from the potential itself.
    """
    if num < 2:
        raise ValueError(f"expected num of at least 2, so that rows can be mixed up, got {num}")
    bound = potential.within(Space(vocab_size, eos, max_tokens))
    checks = _PotentialChecks(bound, vocab_size, eos, max_tokens, atol, generator(key))
    tokens = checks.strings(num)
    factors = checks.run(tokens)
    checks.compare(checks.run(tokens, jit=False), factors, tokens, "without jit, step and final")
    rows = np.asarray([num - 1, 0, 0])
    what = (
        "with other rows in the population (a row's factors must not depend on its neighbours),"
        " step and final"
    )
    checks.compare(checks.run(tokens[rows]), factors[rows], tokens[rows], what)
    checks.resampled(tokens, rows)
    checks.whole(tokens, factors)
    # A product's look-ahead has only the factors that are known in advance; a part's has all.
    for part in bound.parts:
        dataclasses.replace(checks, potential=part).lookaheads(tokens)
    require(
        checks.traces == len({num, len(rows)}),
        f"step was traced {checks.traces} times for {len({num, len(rows)})} shapes; keep the"
        " state's dtypes, weak types"
        " too, and static data comparable by value",
    )


@dataclasses.dataclass
class _PotentialChecks:
    """The laws of `check_potential` over one potential, bound to its vocabulary and horizon."""

    potential: Potential
    vocab_size: int
    eos: int
    max_tokens: int
    atol: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.traces = 0
        self.step = jax.jit(self._step)
        self.final = jax.jit(lambda potential, state: potential.final(state))
        self.lookahead = jax.jit(lambda potential, state: potential.lookahead(state))

    def _step(self, potential: Potential, state: State, token: Array) -> tuple[State, Array]:
        self.traces += 1
        return potential.step(state, token)

    def strings(self, num: int) -> np.ndarray:
        """Random tokens [num, T] without EOS; every other row is uniform over what the look-ahead
        allows.
        """
        state = self.potential.init(num)
        check_rows(state, num, "init")
        columns = []
        for _ in range(self.max_tokens):
            support = np.tile(np.arange(self.vocab_size) != self.eos, (num, 1))
            known = self.lookahead(self.potential, state)
            if known is not None:
                _check_factors(known, (num, self.vocab_size), "lookahead")
                allowed = support & (np.asarray(known) > -np.inf)
                support[::2] = np.where(allowed.any(1, keepdims=True), allowed, support)[::2]
            columns.append(uniform(self.rng, support))
            stepped, _ = self._advance(state, columns[-1])
            check_same_structure(state, stepped, "step")
            state = stepped
        return np.stack(columns, axis=1)

    def run(self, tokens: np.ndarray, *, jit: bool = True) -> np.ndarray:
        """Factors [N, T+1, 2] from scratch: of token t (the first row is 0), and of the end after t
        tokens.
        """
        state = self.potential.init(tokens.shape[0])
        step_factor, rows = jnp.zeros(tokens.shape[0]), []
        for t in range(self.max_tokens + 1):
            if t:
                state, step_factor = self._advance(state, tokens[:, t - 1], jit)
            final = self.final(self.potential, state) if jit else self.potential.final(state)
            _check_factors(step_factor, tokens.shape[:1], f"step at token {t - 1}")
            _check_factors(final, tokens.shape[:1], f"final after {t} tokens")
            rows.append(np.stack([np.asarray(step_factor), np.asarray(final)], axis=-1))
        self._advance(state, np.full(tokens.shape[0], self.eos), jit)  # ignored, but must not raise
        return np.stack(rows, axis=1)

    def _advance(self, state: State, token: np.ndarray, jit: bool = True) -> tuple[State, Array]:
        tokens = jnp.asarray(token, jnp.int32)
        return (
            self.step(self.potential, state, tokens) if jit else self.potential.step(state, tokens)
        )

    def compare(self, got: np.ndarray, expected: np.ndarray, tokens: np.ndarray, what: str) -> None:
        """Assert equal factors, as far as the string was possible: what follows a factor of -inf
        has no meaning.
        """
        dead = (
            np.cumsum(np.isneginf(expected[:, :, 0]), axis=1) - np.isneginf(expected[:, :, 0]) > 0
        )
        far = ~np.isclose(got, expected, rtol=1e-4, atol=self.atol) & ~dead[:, :, None]
        far[:, :, 1] &= ~np.isneginf(expected[:, :, 0])
        if far.any():
            row, t, which = np.argwhere(far)[0]
            raise AssertionError(
                f"{what} must give the same factors: {('step', 'final')[which]} after"
                f" {tokens[row, :t].tolist()} gave"
                f" {got[row, t, which]:.6g}, expected {expected[row, t, which]:.6g}"
            )

    def resampled(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Rows of a state taken midway go on like the strings that they stand for."""
        half = self.max_tokens // 2
        state = self.potential.init(tokens.shape[0])
        for t in range(half):
            state, _ = self._advance(state, tokens[:, t])
        state = take_rows(state, jnp.asarray(rows))
        joined = np.concatenate(
            [tokens[rows, :half], tokens[np.arange(len(rows)) % len(tokens), half:]], axis=1
        )
        expected = self.run(joined)
        got = expected.copy()
        got[:, half, 1] = np.asarray(self.final(self.potential, state))
        for t in range(half, self.max_tokens):
            state, log_factor = self._advance(state, joined[:, t])
            got[:, t + 1, 0] = np.asarray(log_factor)
            got[:, t + 1, 1] = np.asarray(self.final(self.potential, state))
        self.compare(
            got, expected, joined, "after rows of the state were taken (resampling), step and final"
        )

    def whole(self, tokens: np.ndarray, factors: np.ndarray) -> None:
        """`log_phi` of strings of every length is the sum of their factors."""
        for length in range(self.max_tokens + 1):
            written = np.where(np.arange(self.max_tokens) < length, tokens, self.eos)
            lengths = np.full(len(tokens), length, np.int32)
            log_phi = self.potential.log_phi(
                Sequences(jnp.asarray(written, jnp.int32), jnp.asarray(lengths))
            )
            if log_phi is None:
                return
            expected = factors[:, : length + 1, 0].sum(1) + factors[:, length, 1]
            far = ~np.isclose(np.asarray(log_phi), expected, rtol=1e-4, atol=self.atol)
            row = int(far.argmax())
            require(
                not far.any(),
                f"log_phi must be the sum of the factors: of {tokens[row, :length].tolist()} it is"
                f" {log_phi[row]:.6g},"
                f" but they sum to {expected[row]:.6g}"
                + ("" if length < self.max_tokens else "; at the horizon too the end is `final`'s"),
            )

    def lookaheads(self, tokens: np.ndarray) -> None:
        """Column v of the look-ahead is step(state, v)'s factor; column EOS is final's."""
        num = tokens.shape[0]
        columns = self.rng.permutation(self.vocab_size)[:MAX_COLUMNS]
        state, alive = self.potential.init(num), np.ones(num, bool)
        for t in range(self.max_tokens):
            known = self.lookahead(self.potential, state)
            if known is None:
                return
            _check_factors(known, (num, self.vocab_size), f"lookahead after {t} tokens")
            known = np.asarray(known)
            for v in sorted({*columns.tolist(), *tokens[:, t].tolist(), self.eos}):
                if v == self.eos:
                    name, expected = "final", self.final(self.potential, state)
                else:
                    name, expected = f"step({v})", self._advance(state, np.full(num, v))[1]
                far = alive & ~np.isclose(
                    known[:, v], np.asarray(expected), rtol=1e-4, atol=self.atol
                )
                row = int(far.argmax())
                require(
                    not far.any(),
                    "lookahead must be the factor of the next token: after"
                    f" {tokens[row, :t].tolist()} column {v} is"
                    f" {known[row, v]:.6g}, but {name} gives {np.asarray(expected)[row]:.6g}"
                    + self._about_the_horizon(t, v),
                )
            state, log_factor = self._advance(state, tokens[:, t])
            alive &= np.asarray(log_factor) > -np.inf

    def _about_the_horizon(self, t: int, v: int) -> str:
        """What may have gone wrong, and is not seen in the numbers."""
        if v == self.eos or t < self.max_tokens - 1:
            return ""
        return (
            f"; {t + 1} tokens are the horizon, where `final` is paid on top of the last token's"
            " step: leave it out of every column but that of EOS"
        )


def _check_factors(factors: Array, shape: tuple[int, ...], what: str) -> None:
    require(
        factors.shape == shape,
        f"the log-factors of {what} must have shape {shape}, got {factors.shape}",
    )
    require(
        jnp.issubdtype(factors.dtype, jnp.floating),
        f"the log-factors of {what} must be floats: {factors.dtype}",
    )
    values = np.asarray(factors)
    bad = np.isnan(values) | np.isposinf(values)
    require(
        not bad.any(), f"the log-factors of {what} must be finite or -inf, got {values[bad][:1]}"
    )
