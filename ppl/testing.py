"""Conformance kits: run them on your own language model or potential before trusting what a sampler makes of it.

    check_lm(lm, prompt, key=jax.random.key(0))
    check_potential(potential, vocab_size=V, eos=eos, max_tokens=T, key=jax.random.key(0))

Both compare an object with its own definition (a cached step with a full pass, a look-ahead with a step) on random
strings, and raise an AssertionError that says which law does not hold and where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .lm import LM, Cache, Prefix, bucket, take_rows
from .potential import Potential, Power, Product, State
from .sequences import Sequences

MIN_TOKENS = 3
"""Rows cut to different lengths and two tokens on top need three."""

MAX_COLUMNS = 256
"""Columns of a look-ahead that are compared with `step`; a larger vocabulary has as many chosen at random."""


def check_lm(
    lm: LM,
    prompt: Sequence[int] | Int[Array, " S"],
    *,
    key: PRNGKeyArray,
    num: int = 4,
    max_tokens: int = 5,
    atol: float = 1e-3,
) -> None:
    """Assert that `lm` is a language model: its cached steps are its own full passes, whatever was undone or reordered.

    The reference is `prefill` of the longer prompt.  Strings are drawn uniformly from what that gives positive
    probability.  Checked: shapes, dtypes, normalisation; `step` after `step`; `extend`; `truncate` to different
    lengths and two steps on; `reorder`, alone and after a truncation; another prompt in the same bucket; other
    paddings; no jit; one trace of `step` per shape.

    Args:
        lm: the model.
        prompt: token ids [S]; S + max_tokens must fit the model's context.
        key: the random strings come from it.
        num: N >= 2 rows.
        max_tokens: T >= 3 tokens.
        atol: greatest difference of two log-probabilities that counts as equal; raise it for bfloat16.

    Raises:
        AssertionError: naming the law that does not hold, where, and by how much.
        ValueError: if num < 2, max_tokens < 3, or the prompt is unusable.
    """
    if num < 2 or max_tokens < MIN_TOKENS:
        raise ValueError(
            f"expected num of at least 2 and max_tokens of at least {MIN_TOKENS}, so that rows can differ in length,"
            f" got num={num} and max_tokens={max_tokens}"
        )
    _check_static(lm)
    lm.given(prompt, max_tokens=max_tokens)  # for its errors
    checks = _LMChecks(lm, np.asarray(prompt).tolist(), num, max_tokens, atol, _generator(key))
    checks.steps()
    checks.moves(truncate=True, reorder=False)
    checks.moves(truncate=False, reorder=True)
    checks.moves(truncate=True, reorder=True)
    _require(
        checks.traces == 1,
        f"step was traced {checks.traces} times for one shape; make the caches that step, truncate and reorder return"
        " equal in dtype (weak types too) to the one from init, and static data comparable by value",
    )
    checks.paddings()


@dataclasses.dataclass
class _LMChecks:
    """The laws of `check_lm` over one model and prompt."""

    lm: LM
    prompt: list[int]
    num: int
    max_tokens: int
    atol: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.traces = 0
        self.size = bucket(len(self.prompt) + 1, self.lm.context)  # room for one more, to prefill another prompt
        self.longest = bucket(len(self.prompt) + self.max_tokens, self.lm.context)
        self.laws: dict[tuple[int, ...], np.ndarray] = {}
        self.step = jax.jit(self._step)

    def _step(self, lm: LM, prefix: Prefix, cache: Cache, token: Array) -> tuple[Cache, Array]:
        self.traces += 1
        return lm.step(prefix, cache, token)

    def law(self, suffix: Sequence[int]) -> np.ndarray:
        """The reference: log-probabilities [V] after prompt and suffix, by a full pass."""
        suffix = tuple(int(token) for token in suffix)
        if suffix not in self.laws:
            logits = self.lm.prefill([*self.prompt, *suffix], pad_to=self.longest).logits
            _check_logits(logits, (self.lm.vocab_size,), f"prefill's logits after {len(suffix)} tokens")
            self.laws[suffix] = _log_softmax(logits)
        return self.laws[suffix]

    def draw(self, suffixes: Sequence[Sequence[int]]) -> list[int]:
        """One token per suffix, uniform over what may follow it, EOS excepted (any token if nothing else may)."""
        support = np.stack([np.isfinite(self.law(suffix)) for suffix in suffixes])
        support[:, self.lm.eos] = False
        support |= ~support.any(1, keepdims=True) & (np.arange(self.lm.vocab_size) != self.lm.eos)
        return _uniform(self.rng, support).tolist()

    def agree(self, logits: Array, suffixes: Sequence[Sequence[int]], what: str) -> None:
        """Assert that logits [N, V] are the reference's for these suffixes."""
        _check_logits(logits, (len(suffixes), self.lm.vocab_size), f"the logits of {what}")
        for row, (got, suffix) in enumerate(zip(_log_softmax(logits), suffixes, strict=True)):
            far = ~np.isclose(got, self.law(suffix), rtol=0.0, atol=self.atol)
            token = int(far.argmax())
            _require(
                not far.any(),
                f"{what} disagrees with a full pass: row {row}, {len(suffix)} tokens after the prompt, token {token}:"
                f" log-probability {got[token]:.6g}, full pass {self.law(suffix)[token]:.6g}",
            )

    def append(
        self, prefix: Prefix, cache: Cache, suffixes: list[list[int]], what: str
    ) -> tuple[Cache, list[list[int]]]:
        """Step every row by a token of its own and compare."""
        tokens = self.draw(suffixes)
        cache, logits = self.step(self.lm, prefix, cache, jnp.asarray(tokens, jnp.int32))
        suffixes = [[*suffix, token] for suffix, token in zip(suffixes, tokens, strict=True)]
        self.agree(logits, suffixes, what)
        return cache, suffixes

    def start(self) -> tuple[Prefix, Cache, list[list[int]]]:
        prefix = self.lm.prefill(self.prompt, pad_to=self.size)
        return prefix, self.lm.init(prefix, self.num, self.max_tokens), [[] for _ in range(self.num)]

    def steps(self) -> None:
        """prefill + step + step ... is prefill of the longer prompt, with and without jit, and for two prompts."""
        prefix, cache, suffixes = self.start()
        self.agree(prefix.logits[None], [()], "prefill with another padding")
        _check_rows(cache, self.num, "init")
        tokens = self.draw(suffixes)
        stepped, logits = self.lm.step(prefix, cache, jnp.asarray(tokens, jnp.int32))
        _check_same_structure(cache, stepped, "step")
        self.agree(logits, [[token] for token in tokens], "step without jit")
        for _ in range(self.max_tokens):
            cache, suffixes = self.append(prefix, cache, suffixes, "step")
        self.extends(prefix, suffixes)
        longer = self.draw([()])
        prefix = self.lm.prefill([*self.prompt, *longer], pad_to=self.size)
        cache = self.lm.init(prefix, self.num, self.max_tokens)
        self.append(prefix, cache, [longer] * self.num, "step after another prompt of the same bucket")

    def extends(self, prefix: Prefix, strings: list[list[int]]) -> None:
        """`extend` has the logits of every step, and reads no token before its time."""
        logits = jax.jit(LM.extend)(self.lm, prefix, jnp.asarray(strings, jnp.int32))
        shape = (self.num, self.max_tokens, self.lm.vocab_size)
        _require(logits.shape == shape, f"the logits of extend must have shape {shape}, got {logits.shape}")
        for t in range(self.max_tokens):
            self.agree(logits[:, t], [string[: t + 1] for string in strings], "extend")

    def moves(self, *, truncate: bool, reorder: bool) -> None:
        """After rows were cut to different lengths or taken from other rows, two steps are still full passes."""
        prefix, cache, suffixes = self.start()
        for _ in range(self.max_tokens - 2):
            cache, suffixes = self.append(prefix, cache, suffixes, "step")
        done = []
        if truncate:
            length = np.arange(self.num)[::-1] % (self.max_tokens - 1)
            moved = jax.jit(LM.truncate)(self.lm, cache, jnp.asarray(length, jnp.int32))
            _check_same_structure(cache, moved, "truncate")
            cache, suffixes = moved, [s[:n] for s, n in zip(suffixes, length, strict=True)]
            done.append("truncate")
        if reorder:
            ancestors = (np.arange(self.num) + 1) % self.num
            ancestors[-1] = ancestors[0]  # a row with two children and one with none, as resampling makes them
            moved = jax.jit(LM.reorder)(self.lm, cache, jnp.asarray(ancestors, jnp.int32))
            _check_same_structure(cache, moved, "reorder")
            cache, suffixes = moved, [suffixes[a] for a in ancestors]
            done.append("reorder")
        what = "step after " + " and ".join(done)
        for _ in range(2):
            cache, suffixes = self.append(prefix, cache, suffixes, what)

    def paddings(self) -> None:
        """How far the prompt is padded changes nothing."""
        wide = 2 * self.size if self.lm.context is None else min(2 * self.size, self.lm.context)
        for size in sorted({len(self.prompt), wide} - {self.size}):
            prefix = self.lm.prefill(self.prompt, pad_to=size)
            what = f"with the prompt padded to {size} positions"
            self.agree(prefix.logits[None], [()], f"prefill {what}")
            cache, suffixes = self.lm.init(prefix, self.num, self.max_tokens), [[] for _ in range(self.num)]
            for _ in range(2):
                cache, suffixes = self.append(prefix, cache, suffixes, f"step {what}")


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

    Half of the random strings follow the look-ahead (if there is one), the others are uniform.  Checked: increments
    are finite or -inf; states have N first, keep their structure, and belong to their rows alone, also when rows are
    taken midway as resampling does; `log_phi`, if there is one, is the sum of a string's factors; the look-ahead is
    `step`'s factor for every token and `final`'s for EOS; `step` with EOS does not raise; jit equals no jit.

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
    bound = potential.within(max_tokens, vocab_size, eos)
    checks = _PotentialChecks(bound, vocab_size, eos, max_tokens, atol, _generator(key))
    tokens = checks.strings(num)
    factors = checks.run(tokens)
    checks.compare(checks.run(tokens, jit=False), factors, tokens, "without jit, step and final")
    rows = np.asarray([num - 1, 0, 0])
    what = "with other rows in the population (a row's factors must not depend on its neighbours), step and final"
    checks.compare(checks.run(tokens[rows]), factors[rows], tokens[rows], what)
    checks.resampled(tokens, rows)
    checks.whole(tokens, factors)
    for part in _parts(bound):
        dataclasses.replace(checks, potential=part).lookaheads(tokens)
    _require(
        checks.traces == len({num, len(rows)}),
        f"step was traced {checks.traces} times for {len({num, len(rows)})} shapes; keep the state's dtypes, weak types"
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
        """Random tokens [num, T] without EOS; every other row is uniform over what the look-ahead allows."""
        state = self.potential.init(num)
        _check_rows(state, num, "init")
        columns = []
        for _ in range(self.max_tokens):
            support = np.tile(np.arange(self.vocab_size) != self.eos, (num, 1))
            known = self.lookahead(self.potential, state)
            if known is not None:
                _check_factors(known, (num, self.vocab_size), "lookahead")
                allowed = support & (np.asarray(known) > -np.inf)
                support[::2] = np.where(allowed.any(1, keepdims=True), allowed, support)[::2]
            columns.append(_uniform(self.rng, support))
            stepped, _ = self._advance(state, columns[-1])
            _check_same_structure(state, stepped, "step")
            state = stepped
        return np.stack(columns, axis=1)

    def run(self, tokens: np.ndarray, *, jit: bool = True) -> np.ndarray:
        """Factors [N, T+1, 2] from scratch: of token t (the first row is 0), and of the end after t tokens."""
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
        return self.step(self.potential, state, tokens) if jit else self.potential.step(state, tokens)

    def compare(self, got: np.ndarray, expected: np.ndarray, tokens: np.ndarray, what: str) -> None:
        """Assert equal factors, as far as the string was possible: what follows a factor of -inf has no meaning."""
        dead = np.cumsum(np.isneginf(expected[:, :, 0]), axis=1) - np.isneginf(expected[:, :, 0]) > 0
        far = ~np.isclose(got, expected, rtol=1e-4, atol=self.atol) & ~dead[:, :, None]
        far[:, :, 1] &= ~np.isneginf(expected[:, :, 0])
        if far.any():
            row, t, which = np.argwhere(far)[0]
            raise AssertionError(
                f"{what} must give the same factors: {('step', 'final')[which]} after {tokens[row, :t].tolist()} gave"
                f" {got[row, t, which]:.6g}, expected {expected[row, t, which]:.6g}"
            )

    def resampled(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Rows of a state taken midway go on like the strings that they stand for."""
        half = self.max_tokens // 2
        state = self.potential.init(tokens.shape[0])
        for t in range(half):
            state, _ = self._advance(state, tokens[:, t])
        state = take_rows(state, jnp.asarray(rows))
        joined = np.concatenate([tokens[rows, :half], tokens[np.arange(len(rows)) % len(tokens), half:]], axis=1)
        expected = self.run(joined)
        got = expected.copy()
        got[:, half, 1] = np.asarray(self.final(self.potential, state))
        for t in range(half, self.max_tokens):
            state, log_factor = self._advance(state, joined[:, t])
            got[:, t + 1, 0] = np.asarray(log_factor)
            got[:, t + 1, 1] = np.asarray(self.final(self.potential, state))
        self.compare(got, expected, joined, "after rows of the state were taken (resampling), step and final")

    def whole(self, tokens: np.ndarray, factors: np.ndarray) -> None:
        """`log_phi` of strings of every length is the sum of their factors."""
        for length in range(self.max_tokens + 1):
            written = np.where(np.arange(self.max_tokens) < length, tokens, self.eos)
            lengths = np.full(len(tokens), length, np.int32)
            log_phi = self.potential.log_phi(Sequences(jnp.asarray(written, jnp.int32), jnp.asarray(lengths)))
            if log_phi is None:
                return
            expected = factors[:, : length + 1, 0].sum(1) + factors[:, length, 1]
            far = ~np.isclose(np.asarray(log_phi), expected, rtol=1e-4, atol=self.atol)
            row = int(far.argmax())
            _require(
                not far.any(),
                f"log_phi must be the sum of the factors: of {tokens[row, :length].tolist()} it is {log_phi[row]:.6g},"
                f" but they sum to {expected[row]:.6g}",
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
                far = alive & ~np.isclose(known[:, v], np.asarray(expected), rtol=1e-4, atol=self.atol)
                row = int(far.argmax())
                _require(
                    not far.any(),
                    f"lookahead must be the factor of the next token: after {tokens[row, :t].tolist()} column {v} is"
                    f" {known[row, v]:.6g}, but {name} gives {np.asarray(expected)[row]:.6g}",
                )
            state, log_factor = self._advance(state, tokens[:, t])
            alive &= np.asarray(log_factor) > -np.inf


def _parts(potential: Potential) -> list[Potential]:
    """The potentials whose look-ahead is all or nothing; a product's has only the factors that are known in advance."""
    if isinstance(potential, Product):
        return [part for factor in potential.factors for part in _parts(factor)]
    if isinstance(potential, Power):
        return [Power(part, potential.power) for part in _parts(potential.potential)]
    return [potential]


def _require(holds: Any, message: str) -> None:
    # Not `assert`: these are the product, and `python -O` would drop them.
    if not holds:
        raise AssertionError(message)


def _log_softmax(logits: Array) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def _generator(key: PRNGKeyArray) -> np.random.Generator:
    """Draws on the host: a compilation for every odd shape would take longer than the checks."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _uniform(rng: np.random.Generator, support: np.ndarray) -> np.ndarray:
    """One index per row [N] int32, uniform over where support [N, V] holds."""
    return np.argmax(np.where(support, rng.random(support.shape), -1.0), axis=1).astype(np.int32)


def _check_static(lm: LM) -> None:
    try:
        hash((lm.static, lm.functions))
    except TypeError as error:
        raise AssertionError(f"static and functions must be hashable, so that jit can compare them: {error}") from error
    _require(0 <= lm.eos < lm.vocab_size, f"eos must be in [0, {lm.vocab_size}), got {lm.eos}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        _require(
            isinstance(leaf, jax.Array | np.ndarray),
            f"every leaf of params must be an array, params{jax.tree_util.keystr(path)} is {type(leaf).__name__};"
            " put what is not an array into static",
        )


def _check_logits(logits: Array, shape: tuple[int, ...], what: str) -> None:
    _require(logits.shape == shape, f"{what} must have shape {shape}, got {logits.shape}")
    _require(logits.dtype == jnp.float32, f"{what} must be float32, got {logits.dtype}")
    values = np.asarray(logits)
    _require(not np.isnan(values).any(), f"{what} must not be NaN")
    _require(not np.isposinf(values).any(), f"{what} must not be +inf")
    _require(np.isfinite(values).any(-1).all(), f"{what} must leave some token possible, got -inf for all of a row")


def _check_factors(factors: Array, shape: tuple[int, ...], what: str) -> None:
    _require(factors.shape == shape, f"the log-factors of {what} must have shape {shape}, got {factors.shape}")
    _require(jnp.issubdtype(factors.dtype, jnp.floating), f"the log-factors of {what} must be floats: {factors.dtype}")
    values = np.asarray(factors)
    bad = np.isnan(values) | np.isposinf(values)
    _require(not bad.any(), f"the log-factors of {what} must be finite or -inf, got {values[bad][:1]}")


def _check_rows(tree: Any, num: int, what: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _require(
            jnp.shape(leaf)[:1] == (num,),
            f"every leaf that {what}({num}) returns must have the particle axis of {num} first,"
            f" leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}",
        )


def _check_same_structure(before: Any, after: Any, what: str) -> None:
    def describe(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for path, leaf in leaves}

    old, new = describe(before), describe(after)
    for path in sorted({*old, *new}):
        _require(
            old.get(path) == new.get(path),
            f"{what} must keep the structure of what it is given (a loop carries it): leaf {path or 'itself'} was"
            f" {old.get(path, 'absent')} and is {new.get(path, 'absent')}",
        )
