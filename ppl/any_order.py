"""Any-order language models: masked diffusion models, and what else predicts masked sites.

A canvas has L sites, each a token or MASK.  The model gives d_i(v | canvas), the law of every
masked site; a masked diffusion model is that and nothing more, for time only says how many sites
are open (MDLM: arXiv 2406.07524; RADD: 2406.03736).  A string comes about by revealing the sites in
some order s, and each order has a law of its own,

    p_s(x) = prod_k d_{s_k}(x_{s_k} | x_{s_1}, ..., x_{s_{k-1}}),

equal for all orders only if all d come from one joint law.  Those of learned models do not, so it
must be said which law is meant: see `ppl.canvas`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .checks import check_count, check_prompt
from .lm import bucket
from .pytrees import register_dataclass
from .rows import log_normalised
from .showing import Words, shown
from .space import Space

if TYPE_CHECKING:
    from .canvas import CanvasTarget

Given = Mapping[int, int] | Iterable[tuple[int, int]]
"""Tokens at sites: {site: token}, or pairs of them."""


@shown
class AnyOrderFunctions(NamedTuple):
    """The functions of an any-order model; module-level, so that they hash and compare by identity.

        prefill(static, params, tokens[S], length)                        -> data
        denoise(static, params, prefix, tokens[N, L], masked[N, L], at)   -> logits[N, L or K, V]

    `data` is the model's own pytree of a prompt of `length` tokens.  `denoise` is given MASK in the
    sites that are `masked`, and gives the logits of all sites, or, if `at` [N, K] is not None, of
    these sites only: which spares the output head the others.
    """

    prefill: Callable[..., Any]
    denoise: Callable[..., Any]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as an any-order model keeps it: tokens [S], padded; length []; the model's data."""

    tokens: Int[Array, " S"]
    length: Int[Array, ""]
    data: PyTree


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AnyOrderLM:
    """An any-order language model as data: `params` are leaves, all else is static.

    Attributes:
        params: the weights, any pytree of arrays.
        static: what else the functions need; hashable, compared by value.
        functions: the model's `AnyOrderFunctions`.
        vocab_size: V, MASK included.
        mask: the id of MASK, which no string has.
        eos: the token that ends a string; `mask` for models whose canvases are always full.
        context: greatest number of positions (prompt and canvas), or None if there is no limit.
        length: L, if the model knows canvases of that length only; else None.
    """

    params: PyTree
    static: Hashable = dataclasses.field(metadata={"static": True})
    functions: AnyOrderFunctions = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})
    mask: int = dataclasses.field(metadata={"static": True})
    eos: int = dataclasses.field(metadata={"static": True})
    context: int | None = dataclasses.field(default=None, metadata={"static": True})
    length: int | None = dataclasses.field(default=None, metadata={"static": True})

    def _shown_(self) -> dict[str, Any]:
        denoise = self.functions.denoise
        return {
            "architecture": Words(f"{denoise.__module__}.{denoise.__qualname__}"),
            "vocab_size": self.vocab_size,
            "mask": self.mask,
            "eos": self.eos,
            "context": self.context,
            "length": self.length,
        }

    def prefill(self, tokens: Sequence[int] | Int[Array, " S"] = ()) -> Prompt:
        """Keep a prompt, which may be empty; padded to a bucket, so that another one of the same
        bucket compiles nothing.

        Raises:
            ValueError: if it is longer than the context, or has ids outside [0, V).
        """
        if len(tokens):
            tokens = check_prompt(tokens, self.vocab_size, self.context)
        ids = np.asarray(tokens, np.int32)
        room = bucket(max(ids.shape[0], 1), self.context) - ids.shape[0]
        padded, length = jnp.asarray(np.pad(ids, (0, room))), jnp.asarray(np.int32(ids.shape[0]))
        return Prompt(
            padded, length, self.functions.prefill(self.static, self.params, padded, length)
        )

    def denoise(
        self,
        prompt: Prompt,
        tokens: Int[Array, "N L"],
        masked: Bool[Array, "N L"],
        at: Int[Array, "N K"] | None = None,
    ) -> Float[Array, "N K V"]:
        """log d_i(v | canvas) of every site, or of the sites `at`; float32, normalised.

        What stands in masked sites has no effect, and MASK has no probability.  Of sites that are
        not masked nothing is promised.
        """
        given = jnp.where(masked, self.mask, tokens).astype(jnp.int32)
        logits = self.functions.denoise(self.static, self.params, prompt, given, masked, at)
        no_mask = jnp.arange(self.vocab_size) != self.mask
        return log_normalised(jnp.where(no_mask, logits.astype(jnp.float32), -jnp.inf))

    def space(self, length: int) -> Space:
        """The strings of canvases of `length` sites: the tokens before the first EOS."""
        return Space(self.vocab_size, self.eos, length)

    def canvas(
        self,
        prompt: Sequence[int] | Int[Array, " S"] = (),
        *,
        length: int | None = None,
        given: Given = (),
    ) -> CanvasTarget:
        """The canvases of L = `length` sites after a prompt, some of whose tokens may be `given`.

        The length is part of the model: with another number of sites every d is another one.

            lm.canvas(prompt, length=64)                    continue
            lm.canvas(prompt, length=64, given={63: dot})   fill the gap

        Raises:
            ValueError: if the length is not the model's, or, with the prompt, exceeds its context;
                or if a site is given twice, is outside of the canvas, holds no token, or none is
                left.
        """
        from .canvas import CanvasTarget

        length = self.length if length is None and self.length is not None else length
        check_count("length", length)  # pyright: ignore[reportArgumentType]
        assert length is not None
        if self.length not in (None, length):
            raise ValueError(
                f"expected length={self.length}, the only one that this model knows, got {length};"
                " leave it out"
            )
        used = len(prompt) + length
        if self.context is not None and used > self.context:
            raise ValueError(
                f"expected prompt and canvas within the model's context of {self.context} tokens,"
                f" got {len(prompt)} and {length}; shorten the prompt or the canvas"
            )
        sites = _given(given, length, self.vocab_size, self.mask)
        return CanvasTarget(self, self.prefill(prompt), jnp.asarray(sites))


def _given(given: Given, length: int, vocab_size: int, mask: int) -> Int[np.ndarray, " L"]:
    """The canvas [L] with what is given, MASK elsewhere."""
    pairs: list[Any] = list(given.items() if isinstance(given, Mapping) else given)
    sites = np.full(length, mask, np.int32)
    for site, token in pairs:
        if not 0 <= site < length:
            raise ValueError(
                f"expected given sites in [0, {length}), got {site}; sites count from the canvas's"
                " first, the prompt not included"
            )
        if sites[site] != mask:
            raise ValueError(
                f"expected every given site once, got site {site} twice; give it one token"
            )
        if not 0 <= token < vocab_size or token == mask:
            got = "MASK" if token == mask else str(token)
            raise ValueError(
                f"expected given tokens in [0, {vocab_size}) other than MASK ({mask}), got {got} at"
                f" site {site}; leave sites that are to be drawn out"
            )
        sites[site] = token
    if not (sites == mask).any():
        raise ValueError(
            f"expected a site that is not given, got all {length}; leave one to be drawn"
        )
    return sites


def no_data(
    static: Hashable, params: PyTree, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> None:
    """The `prefill` of models that read a prompt's tokens as they are, or none."""


def sites_at(logits: Float[Array, "N L V"], at: Int[Array, "N K"] | None) -> Float[Array, "N K V"]:
    """The logits of the sites `at`, of models whose output costs nothing."""
    return logits if at is None else jnp.take_along_axis(logits, at[:, :, None], axis=1)


def random_ranks(keys: Any, masked: Bool[Array, "N L"]) -> Int[Array, "N L"]:
    """A uniform order of the masked sites of every row, one key each: the rank at which each site
    is revealed, from 0; -1 of the others.
    """
    scores = jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:], jnp.float32))(keys)
    order = jnp.argsort(jnp.where(masked, scores, jnp.inf), axis=1)
    return jnp.where(masked, jnp.argsort(order, axis=1), -1).astype(jnp.int32)
