"""What follows the string: Phi(x) = p(y | prompt, x), so that p * Phi is the posterior of x given
both its ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .checks import check_prompt
from .lm import LM, Prefix
from .pytrees import register_dataclass
from .rewards import Score
from .rows import anywhere
from .scorers import DearFunction, Strings
from .sequences import Sequences
from .space import Space
from .steps import Steps
from .target import Target, log_probs_of

BLOCKS = 4
MIN_ROWS = 8
"""Rows that are needed go through the model in at most so many blocks, of at least so many rows."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuation(DearFunction):
    """log p(y | prompt, x, EOS); without EOS if x fills the horizon, or `after_eos` is false.

    tokens [L], padded; length [] of them are y.
    """

    lm: LM
    prefix: Prefix
    tokens: Int[Array, " L"]
    length: Int[Array, ""]
    space: Space = dataclasses.field(metadata={"static": True})
    after_eos: bool = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> Continuation:
        space.check_same(self.space, "a continuation", "make it from the same lm.given(...)")
        return self

    def __call__(
        self,
        tokens: Int[Array, "N T"],
        length: Int[Array, " N"],
        needed: Bool[Array, " N"] | None = None,
    ) -> Float[Array, " N"]:
        x = Sequences(tokens, length)
        return self._log_prob(x) if needed is None else _of_needed(needed, self._log_prob, x)

    def _log_prob(self, x: Sequences) -> Float[Array, " N"]:
        """One pass over [x, EOS, y] after the prompt, each row as long as it is."""
        start = x.length + x.ended if self.after_eos else x.length
        horizon = self.space.max_tokens + 1 + self.tokens.shape[0]
        place = jnp.arange(horizon, dtype=jnp.int32) - start[:, None]
        written = jnp.pad(
            x.tokens, ((0, 0), (0, horizon - self.space.max_tokens)), constant_values=self.lm.eos
        )
        rows = jnp.where(
            place < 0, written, self.tokens[jnp.clip(place, 0, self.tokens.shape[0] - 1)]
        )
        log_probs = log_probs_of(Target(self.lm, self.prefix, horizon), rows)
        return jnp.where((place >= 0) & (place < self.length), log_probs, 0.0).sum(1)


def _of_needed(
    needed: Bool[Array, " N"], log_prob: Callable[[Sequences], Float[Array, " N"]], x: Sequences
) -> Float[Array, " N"]:
    """`log_prob` of the rows needed, a quarter of all rows at a time; anything in the others."""
    num = needed.shape[0]
    size = min(num, max(MIN_ROWS, -(-num // BLOCKS)))
    order = jnp.argsort(~needed)

    def block(found: Array, i: Array) -> tuple[Array, None]:
        # The last block starts earlier where it would not be full: some rows are computed twice.
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        return found.at[at].set(log_prob(Sequences(x.tokens[at], x.length[at]))), None

    def body(found: Array, i: Array) -> tuple[Array, None]:
        # A loop of as many blocks as there are would have no gradient.
        return jax.lax.cond(
            anywhere(i * size < needed.sum(dtype=jnp.int32)),
            block,
            lambda found, i: (found, None),
            found,
            i,
        )

    return jax.lax.scan(
        body, jnp.zeros(num, jnp.float32), jnp.arange(-(-num // size), dtype=jnp.int32)
    )[0]


@runtime_checkable
class Encoder(Protocol):
    """What a text's tokens are read with: `models.Tokenizer`, for one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


def continuation(
    p: Target,
    tokens: str | Sequence[int] | Int[Array, " L"],
    length: Int[Array, ""] | int | None = None,
    *,
    tokenizer: Encoder | None = None,
    steps: Steps | None = None,
    after_eos: bool = True,
) -> Score:
    """Phi(x) = p(y | prompt, x), the probability that the model goes on with the tokens y after the
    string.

    With it p * Phi is the joint law p(x, y | prompt), as a density of x: the posterior of a missing
    middle, or of a rationale between question and answer.

    Args:
        p: the law of the strings, `lm.given(prompt, max_tokens=T)`; its power and potential do not
            matter.
        tokens: y, [L] ids, or a text, in the tokenizer's own segmentation.
        length: [] how many of them are y, if they are padded, with ids of the vocabulary; not
            checked when traced.
        tokenizer: of p's model, for a text.
        steps: also asked for at these boundaries, as if the string ended there, and paid out as the
            ratio of successive values: particles see early where they are going
            (`ppl.step_scores`).  Phi is the same but for strings that could not have ended so at a
            boundary (-inf there): it is 0 for them.
        after_eos: whether a string's EOS is part of what y follows, like the end of a sentence; if
            not, y follows its last token, as where words in the middle of a text are missing.

    Raises:
        ValueError: if y is empty, a text without a tokenizer, or has ids outside the vocabulary,
            its length is not one of 1..L, or prompt, string and y exceed the model's context.
    """
    ids = check_prompt(_tokens_of(tokens, tokenizer), p.lm.vocab_size, None)
    size = ids.shape[0]
    if length is not None and not isinstance(length, Tracer):
        given = np.asarray(length)
        if given.shape != () or given.dtype.kind not in "iu" or not 1 <= given <= size:
            raise ValueError(
                f"expected length as one number from 1 to {size}, the number of tokens given, got"
                f" {length}; leave it"
                " out if none of them is padding"
            )
    prompt = p.prefix.length
    start = p.prefix.tokens.shape[0] if isinstance(prompt, Tracer) else int(prompt)
    needed = start + p.max_tokens + 1 + size
    if p.lm.context is not None and needed > p.lm.context:
        raise ValueError(
            f"expected prompt, string and continuation within the model's context of {p.lm.context}"
            " tokens, got"
            f" {needed}; shorten one of them"
        )
    length = jnp.asarray(size if length is None else length, jnp.int32)
    y = Continuation(p.lm, p.prefix, jnp.asarray(ids, jnp.int32), length, p.space, after_eos)
    return Score(Strings(y), steps)


def _tokens_of(y: str | Sequence[int] | Array, tokenizer: Encoder | None) -> Sequence[int] | Array:
    if not isinstance(y, str):
        return y
    if tokenizer is None:
        raise ValueError(
            f"expected the tokenizer of a continuation that is a text, got {y!r} alone; pass"
            " tokenizer=tok"
        )
    return tokenizer.encode(y, add_special_tokens=False)
