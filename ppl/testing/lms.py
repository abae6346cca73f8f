"""Is it a language model?  Cached steps against full passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from ..lm import LM, Cache, Prefix, bucket
from .laws import check_rows, check_same_structure, generator, require, uniform

MIN_TOKENS = 3
"""Rows cut to different lengths and two tokens on top need three."""


def check_lm(
    lm: LM,
    prompt: Sequence[int] | Int[Array, " S"],
    *,
    key: PRNGKeyArray,
    num: int = 4,
    max_tokens: int = 5,
    atol: float = 1e-3,
) -> None:
    """Assert that `lm` is a language model: its cached steps are its own full passes, whatever was
    undone or reordered.

    The reference is `prefill` of the longer prompt.  Strings are drawn uniformly from what that
    gives positive probability.  Checked: shapes, dtypes, normalisation; `step` after `step`;
    `truncate` to different lengths and two steps on; `reorder`, alone and after a truncation;
    `advance`, from the empty cache, without one and after each of these, and a step after it; the
    logits of `features`, if there are any; another prompt in the same bucket; other paddings; no
    jit; one trace of `step` per shape.

    Args:
        lm: the model.
        prompt: token ids [S]; S + max_tokens must fit the model's context.
        key: the random strings come from it.
        num: N >= 2 rows.
        max_tokens: T >= 3 tokens.
        atol: greatest difference of two log-probabilities that counts as equal; raise it for
            bfloat16.

    Raises:
        AssertionError: naming the law that does not hold, where, and by how much.
        ValueError: if num < 2, max_tokens < 3, or the prompt is unusable.
    """
    if num < 2 or max_tokens < MIN_TOKENS:
        raise ValueError(
            f"expected num of at least 2 and max_tokens of at least {MIN_TOKENS}, so that rows can"
            f" differ in length, got num={num} and max_tokens={max_tokens}"
        )
    _check_static(lm)
    lm.given(prompt, max_tokens=max_tokens)  # for its errors
    checks = _LMChecks(lm, np.asarray(prompt).tolist(), num, max_tokens, atol, generator(key))
    checks.steps()
    checks.moves(truncate=True, reorder=False)
    checks.moves(truncate=False, reorder=True)
    checks.moves(truncate=True, reorder=True)
    require(
        checks.traces == 1,
        f"step was traced {checks.traces} times for one shape; make the caches that step, truncate"
        " and reorder return equal in dtype (weak types too) to the one from init, and static data"
        " comparable by value",
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
        # Room for one more, to prefill another prompt.
        self.size = bucket(len(self.prompt) + 1, self.lm.context)
        self.longest = bucket(len(self.prompt) + self.max_tokens, self.lm.context)
        self.laws: dict[tuple[int, ...], np.ndarray] = {}
        self.step = jax.jit(self._step)
        self.advance = jax.jit(LM.advance)

    def _step(self, lm: LM, prefix: Prefix, cache: Cache, token: Array) -> tuple[Cache, Array]:
        self.traces += 1
        return lm.step(prefix, cache, token)

    def law(self, suffix: Sequence[int]) -> np.ndarray:
        """The reference: log-probabilities [V] after prompt and suffix, by a full pass."""
        suffix = tuple(int(token) for token in suffix)
        if suffix not in self.laws:
            logits = self.lm.prefill([*self.prompt, *suffix], pad_to=self.longest).logits
            _check_logits(
                logits, (self.lm.vocab_size,), f"prefill's logits after {len(suffix)} tokens"
            )
            self.laws[suffix] = _log_softmax(logits)
        return self.laws[suffix]

    def draw(self, suffixes: Sequence[Sequence[int]]) -> list[int]:
        """One token per suffix, uniform over what may follow it, EOS excepted (any token if nothing
        else may).
        """
        support = np.stack([np.isfinite(self.law(suffix)) for suffix in suffixes])
        support[:, self.lm.eos] = False
        support |= ~support.any(1, keepdims=True) & (np.arange(self.lm.vocab_size) != self.lm.eos)
        return uniform(self.rng, support).tolist()

    def agree(self, logits: Array, suffixes: Sequence[Sequence[int]], what: str) -> None:
        """Assert that logits [N, V] are the reference's for these suffixes."""
        _check_logits(logits, (len(suffixes), self.lm.vocab_size), f"the logits of {what}")
        for row, (got, suffix) in enumerate(zip(_log_softmax(logits), suffixes, strict=True)):
            far = ~np.isclose(got, self.law(suffix), rtol=0.0, atol=self.atol)
            token = int(far.argmax())
            require(
                not far.any(),
                f"{what} disagrees with a full pass: row {row}, {len(suffix)} tokens after the"
                f" prompt, token {token}: log-probability {got[token]:.6g}, full pass"
                f" {self.law(suffix)[token]:.6g}",
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
        return (
            prefix,
            self.lm.init(prefix, self.num, self.max_tokens),
            [[] for _ in range(self.num)],
        )

    def steps(self) -> None:
        """prefill + step + step ... is prefill of the longer prompt, with and without jit, and for
        two prompts.
        """
        prefix, cache, suffixes = self.start()
        self.agree(prefix.logits[None], [()], "prefill with another padding")
        check_rows(cache, self.num, "init")
        tokens = self.draw(suffixes)
        stepped, logits = self.lm.step(prefix, cache, jnp.asarray(tokens, jnp.int32))
        check_same_structure(cache, stepped, "step")
        self.agree(logits, [[token] for token in tokens], "step without jit")
        for _ in range(self.max_tokens):
            cache, suffixes = self.append(prefix, cache, suffixes, "step")
        self.whole(prefix, suffixes)
        longer = self.draw([()])
        prefix = self.lm.prefill([*self.prompt, *longer], pad_to=self.size)
        cache = self.lm.init(prefix, self.num, self.max_tokens)
        self.append(
            prefix, cache, [longer] * self.num, "step after another prompt of the same bucket"
        )

    def whole(self, prefix: Prefix, strings: list[list[int]]) -> None:
        """Whole strings, without a cache and from an empty one; from features too, if there are
        any.
        """
        tokens, nothing = jnp.asarray(strings, jnp.int32), [[] for _ in range(self.num)]
        self.agree_each(jax.jit(LM.extend)(self.lm, prefix, tokens), nothing, strings, "extend")
        empty = self.lm.init(prefix, self.num, self.max_tokens)
        advanced, logits = self.advance(self.lm, prefix, empty, tokens)
        check_same_structure(empty, advanced, "advance")
        self.agree_each(logits, nothing, strings, "advance")
        if self.lm.functions.features is not None:
            self.features(strings)

    def agree_each(
        self, logits: Array, before: list[list[int]], tokens: list[list[int]], what: str
    ) -> None:
        """Assert that logits [N, K, V] are the reference's after each of K tokens behind
        `before`.
        """
        shape = (self.num, len(tokens[0]), self.lm.vocab_size)
        require(
            logits.shape == shape,
            f"the logits of {what} must have shape {shape}, got {logits.shape}",
        )
        for k in range(shape[1]):
            suffixes = [
                [*suffix, *new[: k + 1]] for suffix, new in zip(before, tokens, strict=True)
            ]
            self.agree(logits[:, k], suffixes, what)

    def features(self, strings: list[list[int]]) -> None:
        """The hidden states of prompt, steps and `advance` have the model's logits, and its
        caches.
        """
        lm, logits = self.lm.features, jax.jit(LM.logits)
        prefix = lm.prefill(self.prompt, pad_to=self.size)
        self.agree(logits(self.lm, prefix.logits[None]), [()], "the features of prefill")
        empty = lm.init(prefix, self.num, self.max_tokens)
        tokens = jnp.asarray(strings, jnp.int32)
        stepped, hidden = jax.jit(LM.step)(lm, prefix, empty, tokens[:, 0])
        check_same_structure(empty, stepped, "the features of step")
        first = [string[:1] for string in strings]
        self.agree(logits(self.lm, hidden), first, "the features of step")
        advanced, hidden = self.advance(lm, prefix, stepped, tokens[:, 1:])
        check_same_structure(stepped, advanced, "the features of advance")
        rest = [string[1:] for string in strings]
        what = "the features of advance"
        self.agree_each(logits(self.lm, hidden), first, rest, what)

    def advances(self, prefix: Prefix, cache: Cache, suffixes: list[list[int]], after: str) -> None:
        """Behind rows of different lengths two tokens at once; and one, with a step after it."""
        first = self.draw(suffixes)
        longer = [[*suffix, token] for suffix, token in zip(suffixes, first, strict=True)]
        pairs = [list(pair) for pair in zip(first, self.draw(longer), strict=True)]
        for tokens in (pairs, [pair[:1] for pair in pairs]):
            new = jnp.asarray(tokens, jnp.int32)
            advanced, logits = self.advance(self.lm, prefix, cache, new)
            check_same_structure(cache, advanced, "advance")
            self.agree_each(logits, suffixes, tokens, f"advance after {after}")
        self.append(prefix, advanced, longer, "step after advance")

    def moves(self, *, truncate: bool, reorder: bool) -> None:
        """After rows were cut to different lengths or taken from other rows, two steps are still
        full passes.
        """
        prefix, cache, suffixes = self.start()
        for _ in range(self.max_tokens - 2):
            cache, suffixes = self.append(prefix, cache, suffixes, "step")
        done = []
        if truncate:
            length = np.arange(self.num)[::-1] % (self.max_tokens - 1)
            moved = jax.jit(LM.truncate)(self.lm, cache, jnp.asarray(length, jnp.int32))
            check_same_structure(cache, moved, "truncate")
            cache, suffixes = moved, [s[:n] for s, n in zip(suffixes, length, strict=True)]
            done.append("truncate")
        if reorder:
            ancestors = (np.arange(self.num) + 1) % self.num
            # A row with two children and one with none, as resampling makes them.
            ancestors[-1] = ancestors[0]
            moved = jax.jit(LM.reorder)(self.lm, cache, jnp.asarray(ancestors, jnp.int32))
            check_same_structure(cache, moved, "reorder")
            cache, suffixes = moved, [suffixes[a] for a in ancestors]
            done.append("reorder")
        after = " and ".join(done)
        stepped, longer = cache, suffixes
        for _ in range(2):
            stepped, longer = self.append(prefix, stepped, longer, f"step after {after}")
        if self.lm.functions.advance is not None:  # else it is steps
            self.advances(prefix, cache, suffixes, after)

    def paddings(self) -> None:
        """How far the prompt is padded changes nothing."""
        wide = 2 * self.size if self.lm.context is None else min(2 * self.size, self.lm.context)
        for size in sorted({len(self.prompt), wide} - {self.size}):
            prefix = self.lm.prefill(self.prompt, pad_to=size)
            what = f"with the prompt padded to {size} positions"
            self.agree(prefix.logits[None], [()], f"prefill {what}")
            cache, suffixes = (
                self.lm.init(prefix, self.num, self.max_tokens),
                [[] for _ in range(self.num)],
            )
            for _ in range(2):
                cache, suffixes = self.append(prefix, cache, suffixes, f"step {what}")


def _log_softmax(logits: Array) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def _check_static(lm: LM) -> None:
    try:
        hash((lm.static, lm.functions))
    except TypeError as error:
        raise AssertionError(
            f"static and functions must be hashable, so that jit can compare them: {error}"
        ) from error
    require(0 <= lm.eos < lm.vocab_size, f"eos must be in [0, {lm.vocab_size}), got {lm.eos}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        require(
            isinstance(leaf, jax.Array | np.ndarray),
            f"every leaf of params must be an array, params{jax.tree_util.keystr(path)} is"
            f" {type(leaf).__name__}; put what is not an array into static",
        )


def _check_logits(logits: Array, shape: tuple[int, ...], what: str) -> None:
    require(logits.shape == shape, f"{what} must have shape {shape}, got {logits.shape}")
    require(logits.dtype == jnp.float32, f"{what} must be float32, got {logits.dtype}")
    values = np.asarray(logits)
    require(not np.isnan(values).any(), f"{what} must not be NaN")
    require(not np.isposinf(values).any(), f"{what} must not be +inf")
    require(
        np.isfinite(values).any(-1).all(),
        f"{what} must leave some token possible, got -inf for all of a row",
    )
