"""Steps of text: where a process reward is asked for, and where particles are resampled."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .checks import check_count, check_ids
from .pytrees import register_dataclass
from .space import Space, bound


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Where the steps of a text end: after certain tokens, or after every so many.

    `Steps(delimiters=[13])` ends a step with each token 13, `Steps(every=8)` with every eighth
    token.  The end of the string ends its last step and is not a boundary itself, so a delimiter
    that never comes makes one step of the whole string.

    Attributes:
        delimiters: [K] token ids that end a step, or None.
        every: a step is this many tokens, or None.
        eos: the token that ends the string; None before `within`.
        max_tokens: the horizon, which ends a string too; None before `within`.

    Raises:
        ValueError: unless exactly one of `delimiters` (at least one id) and `every` (at least 1) is
            given.
    """

    delimiters: Int[Array, " K"] | None = None
    every: int | None = dataclasses.field(default=None, metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if (self.delimiters is None) == (self.every is None):
            raise ValueError(
                f"expected either delimiters or every, got delimiters={self.delimiters},"
                f" every={self.every}; pass the"
                " one that marks your steps"
            )
        if self.every is not None:
            check_count("every", self.every)
        elif not isinstance(self.delimiters, Tracer):
            ids = np.asarray(self.delimiters)
            if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
                raise ValueError(
                    "expected delimiters as a list of token ids, at least one, got"
                    f" {self.delimiters!r}; encode the"
                    " delimiter with the tokenizer, or mark steps by every=8"
                )
            object.__setattr__(self, "delimiters", jnp.asarray(ids, jnp.int32))

    def within(self, space: Space) -> Steps:
        """These steps over the strings of a space; needed once, before any call.

        Raises:
            ValueError: if a delimiter is outside of the vocabulary or is EOS.
        """
        if self.delimiters is not None and not isinstance(self.delimiters, Tracer):
            check_ids(self.delimiters, space.vocab_size, space.eos, "delimiter")
        return dataclasses.replace(self, space=space)

    def __call__(self, token: Int[Array, " N"], used: Int[Array, " N"]) -> Bool[Array, " N"]:
        """Whether a boundary follows `token`, the string's `used`-th: none does where the string
        ends.
        """
        space = bound(self.space, "steps")
        ends = (
            used % self.every == 0
            if self.every is not None
            else (token[:, None] == self.delimiters).any(1)
        )
        return ends & (token != space.eos) & (used != space.max_tokens)

    def max_rounds(self, max_tokens: int) -> int:
        """The greatest number of steps that a string of `max_tokens` tokens can have."""
        return max_tokens if self.every is None else -(-max_tokens // self.every)

    def max_step_tokens(self, max_tokens: int) -> int:
        """The greatest number of tokens that one step can have."""
        return max_tokens if self.every is None else min(self.every, max_tokens)
