"""The language-model interface: weights as leaves, functions as static data.

An `LM` is a frozen pytree.  Its only leaves are the weights, so `jax.jit`, `jax.grad`, sharding and
donation act on the model itself; everything else (architecture, functions, vocabulary) is hashable
static data, so wrapping the same model again never recompiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from .checks import check_count, check_prompt
from .pytrees import register_dataclass
from .rows import take_rows
from .showing import Words, shown
from .space import Space

if TYPE_CHECKING:
    from .target import Target

Cache = Any
"""A model's running state: any pytree in which every leaf has the particle axis N first."""

MIN_BUCKET = 16


@shown
class Features(NamedTuple):
    """What gives a model's hidden states, D numbers per position, and scores them.

    The first three are the functions of these names in `LMFunctions`, with hidden states (float32)
    in the place of logits and the same caches.

        prefill(static, params, tokens[S], length)            -> (data, hidden[D])
        step(static, params, prefix, cache, token[N])         -> (cache, hidden[N, D])
        advance(static, params, prefix, cache, tokens[N, K])  -> (cache, hidden[N, K, D])
        logits(static, params, hidden[..., D])                -> logits[..., V]
    """

    prefill: Callable[..., Any]
    step: Callable[..., Any]
    advance: Callable[..., Any]
    logits: Callable[..., Any]


@shown
class LMFunctions(NamedTuple):
    """The functions of a language model; module-level, so that they hash and compare by identity.

    Shapes: S prompt (padded), N particles, K or T tokens, V vocabulary.  `static` is hashable,
    `params` a pytree of arrays.  Tokens of a prompt beyond `length` are padding; `init` gives empty
    suffixes with room for max_tokens, `truncate` keeps the first `length` suffix tokens, `reorder`
    gives rows `ancestors`.

        prefill(static, params, tokens[S], length)            -> (data, logits[V])
        init(static, params, prefix, num, max_tokens)         -> cache
        step(static, params, prefix, cache, token[N])         -> (cache, logits[N, V])
        truncate(static, params, cache, length[N])            -> cache
        reorder(static, params, cache, ancestors[N])          -> cache

    Optional: K tokens in one pass (None takes K steps), and hidden states (None: there are none).

        advance(static, params, prefix, cache, tokens[N, K])  -> (cache, logits[N, K, V])
        features                                              `Features`

    `advance` may be given None as cache: N empty suffixes, of which no cache is wanted back.
    """

    prefill: Callable[..., Any]
    init: Callable[..., Any]
    step: Callable[..., Any]
    truncate: Callable[..., Any]
    reorder: Callable[..., Any]
    advance: Callable[..., Any] | None = None
    features: Features | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt after one forward pass, shared by all particles (no particle axis).

    tokens [S] int32, padded to a bucket; length [] int32, the true prompt length; logits [V]
    float32, unnormalised next-token scores after the prompt; data, the model's own pytree (keys and
    values, or nothing).
    """

    tokens: Int[Array, " S"]
    length: Int[Array, ""]
    logits: Float[Array, " V"]
    data: PyTree

    def _shown_(self) -> dict[str, Any]:
        return {"length": self.length, "padded": self.tokens.shape[-1], "logits": self.logits}


def bucket(length: int, context: int | None = None) -> int:
    """Smallest power of two >= `length` (at least 16), capped by the model's context: the padded
    prompt length.
    """
    size = MIN_BUCKET
    while size < length:
        size *= 2
    return size if context is None else max(length, min(size, context))


def reorder_rows(
    static: Hashable, params: PyTree, cache: Cache, ancestors: Int[Array, " N"]
) -> Cache:
    """The `reorder` of any model whose particles share no storage."""
    return take_rows(cache, ancestors)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LM:
    """A language model as data: `params` are leaves, all else is static.

    Attributes:
        params: the weights, any pytree of arrays.
        static: what else the functions need; hashable, compared by value.
        functions: the model's `LMFunctions`.
        vocab_size: V.
        eos: the token that ends a string.
        context: greatest number of positions (prompt plus generated), or None if there is no limit.
    """

    params: PyTree
    static: Hashable = dataclasses.field(metadata={"static": True})
    functions: LMFunctions = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})
    eos: int = dataclasses.field(metadata={"static": True})
    context: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __mul__(self, other: Any) -> Any:
        """A model without a prompt is no density over strings: raises ValueError."""
        raise ValueError(
            "expected a target in a product or a power, got an LM, which has no prompt and no"
            " horizon; write lm.given(prompt, max_tokens=64) in its place"
        )

    __rmul__ = __pow__ = __mul__

    @property
    def architecture(self) -> str:
        """What its functions are called, for people: "tabular.markov", "transformer"."""
        prefill = self.functions.prefill
        name = prefill.__name__.removesuffix("prefill").strip("_")
        return ".".join(part for part in (prefill.__module__.rsplit(".")[-1], name) if part)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(int(getattr(leaf, "size", 0)) for leaf in jax.tree.leaves(self.params))

    def _shown_(self) -> dict[str, Any]:
        dtypes = {str(getattr(leaf, "dtype", "?")) for leaf in jax.tree.leaves(self.params)}
        return {
            "architecture": Words(self.architecture),
            "vocab_size": self.vocab_size,
            "eos": self.eos,
            "context": self.context,
            "parameters": Words(f"{self.num_parameters:,} {'/'.join(sorted(dtypes)[:4])}"),
        }

    def prefill(
        self, tokens: Sequence[int] | Int[Array, " S"], *, pad_to: int | None = None
    ) -> Prefix:
        """Process a prompt once.

        Prompts are padded to a bucket (`bucket`), so another prompt of the same bucket compiles
        nothing new.

        Args:
            tokens: prompt token ids [S], S >= 1.
            pad_to: padded length, at least S; by default the prompt's own bucket.  Prompts that are
                to run together need equal padded lengths.

        Raises:
            ValueError: if the prompt is empty, longer than the context, or has ids outside [0, V).
        """
        ids = check_prompt(tokens, self.vocab_size, self.context)
        size = bucket(ids.shape[0], self.context) if pad_to is None else pad_to
        if size < ids.shape[0] or (self.context is not None and size > self.context):
            raise ValueError(
                f"expected pad_to between the prompt's {ids.shape[0]} tokens and the model's"
                f" context ({self.context or 'no limit'}), got {pad_to};"
                " leave it out for the prompt's own"
                " bucket"
            )
        # On the host where possible: an eager jnp.pad would compile once for every prompt length.
        pad = jnp.pad if isinstance(ids, Tracer) else np.pad
        padded = jnp.asarray(pad(ids, (0, size - ids.shape[0])), jnp.int32)
        return self.read(padded, jnp.asarray(np.int32(ids.shape[0])))

    def read(self, tokens: Int[Array, " S"], length: Int[Array, ""]) -> Prefix:
        """`prefill` of a prompt that is padded already, its first `length` tokens: for inside jit,
        and for gradients.

        The prefix is a differentiable function of the weights.  Padding beyond the model's context
        is cut off; the logits after a prompt that is itself too long are NaN.
        """
        return _read(self, tokens[: self.context], length)

    def init(self, prefix: Prefix, num: int, max_tokens: int) -> Cache:
        """A cache of `num` empty suffixes with room for `max_tokens` tokens each."""
        return self.functions.init(self.static, self.params, prefix, num, max_tokens)

    def step(
        self, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
    ) -> tuple[Cache, Float[Array, "N V"]]:
        """Append one token to every row; returns the cache and the unnormalised next-token logits
        [N, V] (float32).
        """
        return self.functions.step(self.static, self.params, prefix, cache, token)

    def advance(
        self, prefix: Prefix, cache: Cache, tokens: Int[Array, "N K"]
    ) -> tuple[Cache, Float[Array, "N K V"]]:
        """Append K tokens to every row, at the row's own length; the cache, and the unnormalised
        logits (float32) after each of them: what K steps give.

        Position k sees tokens up to k, so padding at the end of a row changes nothing before it;
        `truncate` takes it away again.  A row's length and K together must not exceed the room that
        `init` made.
        """
        if self.functions.advance is not None:
            return self.functions.advance(self.static, self.params, prefix, cache, tokens)
        cache, logits = jax.lax.scan(
            lambda cache, token: self.step(prefix, cache, token), cache, tokens.T
        )
        return cache, jnp.swapaxes(logits, 0, 1)

    def extend(self, prefix: Prefix, tokens: Int[Array, "N T"]) -> Float[Array, "N T V"]:
        """`advance` of whole strings, from empty suffixes: logits after each of T tokens (float32),
        differentiable.

        No cache is made where the model has an `advance` of its own.
        """
        if self.functions.advance is not None:
            return self.functions.advance(self.static, self.params, prefix, None, tokens)[1]
        return self.advance(prefix, self.init(prefix, *tokens.shape), tokens)[1]

    def logits_at(
        self, prefix: Prefix, cache: Cache, tokens: Int[Array, "N K"], last: Int[Array, " N"]
    ) -> tuple[Cache, Float[Array, "N V"]]:
        """`advance` with the logits after token number `last` [N], from 0, of each row only.

        A model with features, or without an `advance` of its own, makes no array [N, K, V].
        """
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        if self.functions.features is not None:
            cache, hidden = self.features.advance(prefix, cache, tokens)
            return cache, self.logits(hidden[rows, last])
        if self.functions.advance is not None:
            cache, logits = self.advance(prefix, cache, tokens)
            return cache, logits[rows, last]

        def body(carry: tuple[Cache, Array], at: tuple[Array, Array]) -> tuple[tuple, None]:
            (cache, kept), (token, k) = carry, at
            cache, logits = self.step(prefix, cache, token)
            return (cache, jnp.where((k == last)[:, None], logits, kept)), None

        nothing = jnp.zeros((tokens.shape[0], self.vocab_size), jnp.float32)
        steps = (tokens.T, jnp.arange(tokens.shape[1], dtype=jnp.int32))
        return jax.lax.scan(body, (cache, nothing), steps)[0]

    @property
    def features(self) -> LM:
        """This model with hidden states (float32) in the place of all logits, and the same caches.

        Raises:
            ValueError: if the model gives none.
        """
        functions, features = self.functions, self._features
        hidden = LMFunctions(
            features.prefill,
            functions.init,
            features.step,
            functions.truncate,
            functions.reorder,
            features.advance,
        )
        return dataclasses.replace(self, functions=hidden)

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Unnormalised logits (float32) of hidden states that `features` gave; raises as it
        does.
        """
        return self._features.logits(self.static, self.params, hidden)

    @property
    def _features(self) -> Features:
        if self.functions.features is None:
            raise ValueError(
                "expected a model that gives hidden states, got one without features; use a decoder"
                " of models.transformer, or give its LMFunctions `features`"
            )
        return self.functions.features

    def truncate(self, cache: Cache, length: Int[Array, " N"]) -> Cache:
        """Undo: keep the first `length` [N] suffix tokens of every row.  The next `step` writes at
        that position.
        """
        return self.functions.truncate(self.static, self.params, cache, length)

    def reorder(self, cache: Cache, ancestors: Int[Array, " N"]) -> Cache:
        """Row i of the result is row `ancestors[i]`: what resampling does to a cache."""
        return self.functions.reorder(self.static, self.params, cache, ancestors)

    def space(self, max_tokens: int) -> Space:
        """The strings of at most `max_tokens` tokens of this model."""
        return Space(self.vocab_size, self.eos, max_tokens)

    def given(
        self,
        prompt: Sequence[int] | Int[Array, " S"],
        *,
        max_tokens: int,
        pad_to: int | None = None,
    ) -> Target:
        """The distribution over continuations of `prompt` of at most `max_tokens` tokens, as a
        `Target`.

        Raises:
            ValueError: if `max_tokens` < 1, the prompt is unusable (see `prefill`), or prompt and
                continuation together exceed the model's context.
        """
        from .target import Target

        check_count("max_tokens", max_tokens)
        ids = check_prompt(prompt, self.vocab_size, self.context)
        if self.context is not None and ids.shape[0] + max_tokens > self.context:
            raise ValueError(
                f"expected prompt and continuation within the model's context of {self.context}"
                f" tokens, got a prompt of {ids.shape[0]} tokens with max_tokens={max_tokens};"
                f" shorten the prompt or lower max_tokens to {max(self.context - ids.shape[0], 0)}"
            )
        return Target(self, self.prefill(prompt, pad_to=pad_to), max_tokens)

    def given_each(
        self, prompts: Sequence[Sequence[int] | Int[Array, " S"]], *, max_tokens: int
    ) -> list[Target]:
        """`given` for several prompts of any lengths, padded alike, so that a sampler takes them
        together.

        Raises:
            ValueError: if there is no prompt, or one of them does not suit `given`.
        """
        check_count("the number of prompts", len(prompts))
        pad_to = bucket(max(len(prompt) for prompt in prompts), self.context)
        return [self.given(prompt, max_tokens=max_tokens, pad_to=pad_to) for prompt in prompts]


@jax.jit
def _read(lm: LM, tokens: Int[Array, " S"], length: Int[Array, ""]) -> Prefix:
    data, logits = lm.functions.prefill(lm.static, lm.params, tokens, length)
    known = jnp.where(length <= tokens.shape[0], logits.astype(jnp.float32), jnp.nan)
    return Prefix(tokens, length, known, data)
