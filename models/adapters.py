"""Any flax or equinox module that maps tokens to next-token logits, as a language model.

    from_nnx(module, vocab_size=V, eos=eos)
        module(tokens[N, S]) -> logits[N, S, V]
    from_linen(module, variables, vocab_size=V, eos=eos)
        module.apply(variables, tokens[N, S]) -> logits[N, S, V]
    from_equinox(module, vocab_size=V, eos=eos)
        module(tokens[S]) -> logits[S, V], one sequence

logits[:, t] score the token after position t and must not depend on later positions: the module has
to be causal.  A module that is called otherwise (other arguments, other outputs, a batch where one
sequence is expected) comes with an `apply` function, defined at module level so that wrapping again
compiles nothing new:

    def apply(module, tokens):                # from_linen: apply(module, variables, tokens)
        return module(tokens, deterministic=True).logits

No cache of the module's own is used: the LM keeps the tokens and runs the whole module at every
step, O(T) passes over O(S + T) positions.  Cost O(T^2) is fine for small models and for trying out.

**A module with a cache** becomes an LM without an adapter: write its `LMFunctions`, with the
graphdef (linen: the module, equinox: its static part) as `static`.  A recurrent module, whose cache
is the history of its states:

    def prefill(graphdef, params, tokens, length):
        states, logits = nnx.merge(graphdef, params).scan(tokens)            # [S, H], [S, V]
        return states[length - 1], logits[length - 1]

    def init(graphdef, params, prefix, num, max_tokens):
        states = jnp.zeros((num, max_tokens + 1, prefix.data.shape[-1]))
        return states.at[:, 0].set(prefix.data), jnp.zeros(num, jnp.int32)

    def step(graphdef, params, prefix, cache, token):
        (states, length), rows = cache, jnp.arange(token.shape[0])
        state, logits = nnx.merge(graphdef, params).one(states[rows, length], token)
        return (states.at[rows, length + 1].set(state), length + 1), logits

    def truncate(graphdef, params, cache, length):
        return cache[0], length

    graphdef, params = nnx.split(module)
    lm = LM(params, graphdef, LMFunctions(prefill, init, step, truncate, reorder_rows),
    vocab_size=V, eos=eos)

`ppl.testing.check_lm` tells whether the result is a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ppl.lm import LM, Cache, LMFunctions, Prefix, reorder_rows
from ppl.showing import shown

if TYPE_CHECKING:
    import equinox as eqx
    from flax import linen, nnx


@shown
class Wrapped(NamedTuple):
    """The static part of a wrapped module; compared by value, so that wrapping again never
    recompiles.

    forward(module, params, apply, tokens[N, S]) -> logits[N, S, V] puts the module together and
    calls it.
    """

    forward: Callable[..., Array]
    module: Hashable
    apply: Callable[..., Array] | None
    context: int | None


def from_nnx(
    module: nnx.Module,
    *,
    vocab_size: int,
    eos: int,
    context: int | None = None,
    apply: Callable[..., Array] | None = None,
) -> LM:
    """A flax nnx module as an LM; `params` is its state, `static` its graphdef.

    Args:
        module: causal, module(tokens[N, S] int32) -> logits [N, S, V]; call `module.eval()` first
            if it has dropout.
        vocab_size: V.
        eos: the token that ends a string.
        context: greatest number of positions, e.g. of a learned position embedding; None if there
            is no limit.
        apply: apply(module, tokens[N, S]) -> logits [N, S, V], for modules that are called
            otherwise.

    Raises:
        ValueError: if the logits are not [N, S, V], or the module's static part is not hashable.
    """
    from flax import nnx

    graphdef, params = nnx.split(module)
    return _wrap(Wrapped(_nnx_forward, graphdef, apply, context), params, vocab_size, eos)


def from_linen(
    module: linen.Module,
    variables: PyTree,
    *,
    vocab_size: int,
    eos: int,
    context: int | None = None,
    apply: Callable[..., Array] | None = None,
) -> LM:
    """A flax linen module and its variables as an LM; `params` is `variables`, `static` the module.

    Args:
        module: causal, module.apply(variables, tokens[N, S] int32) -> logits [N, S, V].
        variables: all collections, `{"params": ...}`.
        vocab_size: V.
        eos: the token that ends a string.
        context: greatest number of positions; None if there is no limit.
        apply: apply(module, variables, tokens[N, S]) -> logits [N, S, V], for modules that are
            called otherwise.

    Raises:
        ValueError: if the logits are not [N, S, V], or the module is not hashable (fields that are
            lists or dicts).
    """
    return _wrap(Wrapped(_linen_forward, module, apply, context), variables, vocab_size, eos)


def from_equinox(
    module: eqx.Module,
    *,
    vocab_size: int,
    eos: int,
    context: int | None = None,
    apply: Callable[..., Array] | None = None,
) -> LM:
    """An equinox module as an LM; `params` is its arrays, `static` everything else.

    Args:
        module: causal, module(tokens[S] int32) -> logits [S, V]: one sequence, as equinox modules
            are written; it is mapped over the particles.
        vocab_size: V.
        eos: the token that ends a string.
        context: greatest number of positions; None if there is no limit.
        apply: apply(module, tokens[N, S]) -> logits [N, S, V], for modules that are called
            otherwise.

    Raises:
        ValueError: if the logits are not [N, S, V], or the module's static part is not hashable.
    """
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_array)
    return _wrap(Wrapped(_equinox_forward, static, apply, context), params, vocab_size, eos)


def _nnx_forward(
    graphdef: Any, params: PyTree, apply: Callable[..., Array] | None, tokens: Array
) -> Array:
    from flax import nnx

    module = nnx.merge(graphdef, params)
    return module(tokens) if apply is None else apply(module, tokens)


def _linen_forward(
    module: Any, params: PyTree, apply: Callable[..., Array] | None, tokens: Array
) -> Array:
    return module.apply(params, tokens) if apply is None else apply(module, params, tokens)


def _equinox_forward(
    static: Any, params: PyTree, apply: Callable[..., Array] | None, tokens: Array
) -> Array:
    import equinox as eqx

    module = eqx.combine(params, static)
    return jax.vmap(module)(tokens) if apply is None else apply(module, tokens)


def _wrap(wrapped: Wrapped, params: PyTree, vocab_size: int, eos: int) -> LM:
    try:
        hash(wrapped)
    except TypeError as error:
        raise ValueError(
            f"expected a module whose static part is hashable, got {error}; use tuples and frozen"
            " dataclasses for its fields instead of lists and dicts, and a module-level function as"
            " apply"
        ) from error
    num, length = 2, min(3, wrapped.context or 3)
    tokens = jax.ShapeDtypeStruct((num, length), jnp.int32)
    logits = jax.eval_shape(
        lambda p, t: wrapped.forward(wrapped.module, p, wrapped.apply, t), params, tokens
    )
    shape = getattr(logits, "shape", type(logits).__name__)
    if shape != (num, length, vocab_size):
        raise ValueError(
            f"expected logits {(num, length, vocab_size)} for {num} sequences of {length} tokens,"
            f" got {shape}; pass apply=, a function that calls the module and returns its logits"
            " [N, S, V]"
        )
    return LM(params, wrapped, FUNCTIONS, vocab_size, eos, wrapped.context)


# The LM: the cache holds tokens only.


def _logits_at(
    wrapped: Wrapped, params: PyTree, tokens: Int[Array, "N S"], position: Int[Array, " N"]
) -> Float[Array, "N V"]:
    """Logits after `position` [N]; whatever stands behind it is invisible to a causal module."""
    return _forward(wrapped, params, tokens)[jnp.arange(tokens.shape[0]), position]


def _forward(wrapped: Wrapped, params: PyTree, tokens: Int[Array, "N S"]) -> Float[Array, "N S V"]:
    return wrapped.forward(wrapped.module, params, wrapped.apply, tokens).astype(jnp.float32)


def _prefill(
    wrapped: Wrapped, params: PyTree, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[PyTree, Float[Array, " V"]]:
    return None, _logits_at(wrapped, params, tokens[None], length[None] - 1)[0]


def _init(wrapped: Wrapped, params: PyTree, prefix: Prefix, num: int, max_tokens: int) -> Cache:
    return jnp.zeros((num, max_tokens), jnp.int32), jnp.zeros(num, jnp.int32)


def _joined(wrapped: Wrapped, prefix: Prefix, suffix: Int[Array, "N T"]) -> Int[Array, "N P"]:
    """Each row's whole string: the suffix starts right after the true prompt, over its padding.

    Positions beyond the context do not exist for the module (an embedding would give NaN), and none
    is ever used.
    """
    num, max_tokens = suffix.shape
    size = prefix.tokens.shape[0] + max_tokens
    size = size if wrapped.context is None else min(size, wrapped.context)
    tokens = jnp.zeros((num, size), jnp.int32).at[:, : prefix.tokens.shape[0]].set(prefix.tokens)
    return tokens.at[:, prefix.length + jnp.arange(max_tokens)].set(suffix, mode="drop")


def _step(
    wrapped: Wrapped, params: PyTree, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
) -> tuple[Cache, Float[Array, "N V"]]:
    suffix, length = cache
    suffix = suffix.at[jnp.arange(suffix.shape[0]), length].set(token)
    logits = _logits_at(wrapped, params, _joined(wrapped, prefix, suffix), prefix.length + length)
    return (suffix, length + 1), logits


def _advance(
    wrapped: Wrapped,
    params: PyTree,
    prefix: Prefix,
    cache: Cache | None,
    tokens: Int[Array, "N K"],
) -> tuple[Cache | None, Float[Array, "N K V"]]:
    num, count = tokens.shape
    if cache is None:
        logits = _forward(wrapped, params, _joined(wrapped, prefix, tokens))
        return None, jax.lax.dynamic_slice_in_dim(logits, prefix.length, count, axis=1)
    suffix, length = cache
    rows, slots = jnp.arange(num)[:, None], length[:, None] + jnp.arange(count)
    suffix = suffix.at[rows, slots].set(tokens)
    logits = _forward(wrapped, params, _joined(wrapped, prefix, suffix))
    return (suffix, length + count), logits[rows, prefix.length + slots]


def _truncate(wrapped: Wrapped, params: PyTree, cache: Cache, length: Int[Array, " N"]) -> Cache:
    return cache[0], length.astype(jnp.int32)


FUNCTIONS = LMFunctions(_prefill, _init, _step, _truncate, reorder_rows, _advance)
