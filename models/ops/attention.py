"""Softmax attention: over a full sequence, and of one token or whole strings over a shared prompt
and their own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppl.showing import shown

HIDDEN = -1e30
"""A score whose weight is zero next to any other; finite, so that a part with nothing visible has
no inf - inf.
"""

QUERY_BLOCK = 512


@shown
class Score(NamedTuple):
    """How q.k becomes a score: scale * q.k, then c tanh(score / c) if `softcap` is c."""

    scale: float
    softcap: float | None

    def __call__(self, products: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        scores = products * self.scale
        return scores if self.softcap is None else jnp.tanh(scores / self.softcap) * self.softcap


def causal(
    query: Float[Array, "N S H d"],
    key: Float[Array, "N S K d"],
    value: Float[Array, "N S K d"],
    window: int | None,
    score: Score,
) -> Float[Array, "N S H d"]:
    """Attention of every position over itself and those before it, with a window only over the last
    `window`.

    The H query heads share K key/value heads in groups.  Long sequences are taken QUERY_BLOCK
    queries at a time, so that scores need QUERY_BLOCK * S numbers per head rather than S * S.
    """
    num, length, heads, width = query.shape
    grouped = query.reshape(num, length, key.shape[2], -1, width)
    positions = jnp.arange(length)

    def attend(block: tuple[Array, Array]) -> Array:
        rows, query = block
        distance = rows[:, None] - positions[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        products = jnp.einsum("nqkgd,nskd->nkgqs", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, score(products), HIDDEN)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.einsum("nkgqs,nskd->nqkgd", weights.astype(value.dtype), value)

    blocks, rest = divmod(length, QUERY_BLOCK)
    if blocks < 2 or rest:
        return attend((positions, grouped)).reshape(query.shape)
    split = grouped.reshape(num, blocks, QUERY_BLOCK, *grouped.shape[2:])
    mixed = jax.lax.map(attend, (positions.reshape(blocks, QUERY_BLOCK), jnp.moveaxis(split, 1, 0)))
    return jnp.moveaxis(mixed, 0, 1).reshape(query.shape)


@shown
class Prompt(NamedTuple):
    """Keys and values of the prompt in one layer, stored once for all particles."""

    key: Float[Array, "K d S"]
    value: Float[Array, "K S d"]


@shown
class Suffix(NamedTuple):
    """Keys and values of each particle's own tokens in one layer.

    Keys are kept transposed: that is the orientation in which XLA multiplies many small matrices on
    CPU without copying them first.
    """

    key: Float[Array, "N K d T"]
    value: Float[Array, "N K T d"]


@shown
class Bias(NamedTuple):
    """Added to a new token's scores: 0 where it sees the prompt's position or its own suffix's,
    HIDDEN elsewhere.
    """

    prompt: Float[Array, "#N S"]
    suffix: Float[Array, "N T"]


def append(
    suffix: Suffix,
    key: Float[Array, "N K d"],
    value: Float[Array, "N K d"],
    length: Int[Array, " N"],
) -> Suffix:
    """Write one key and value per particle at its own position `length`, in place inside a compiled
    loop.
    """

    return write(suffix, Suffix(key[:, :, :, None], value[:, :, None]), length)


def write(suffix: Suffix, new: Suffix, length: Int[Array, " N"]) -> Suffix:
    """Write all slots of `new` behind the first `length` of each row; they must fit."""

    def row(old: Suffix, new: Suffix, position: Array) -> Suffix:
        return Suffix(
            jax.lax.dynamic_update_slice_in_dim(old.key, new.key, position, axis=2),
            jax.lax.dynamic_update_slice_in_dim(old.value, new.value, position, axis=1),
        )

    return jax.vmap(row)(suffix, new, length)


def bias(
    prompt_size: int,
    prompt_length: Int[Array, ""],
    capacity: int,
    length: Int[Array, " N"],
    window: int | None,
) -> Bias:
    """What a new token sees that sits at position prompt_length + length[n] and in slot length[n]
    of its suffix.

    The prompt's padding and the slots after its own are hidden; with a window, so is what lies
    `window` or more back.
    """
    position = jnp.arange(prompt_size)
    slot = jnp.arange(capacity)
    prompt = (position < prompt_length)[None]
    suffix = slot <= length[:, None]
    if window is not None:
        prompt = prompt & (position > (prompt_length + length - window)[:, None])
        suffix = suffix & (slot > (length - window)[:, None])
    return Bias(_bias(prompt), _bias(suffix))


def _bias(seen: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(seen, jnp.float32(0), jnp.float32(HIDDEN))


class _Part(NamedTuple):
    """Softmax over a part of the keys, not normalised: greatest score, sum of exp(score - top),
    mixed values.
    """

    top: Float[Array, "*rows 1"]
    mass: Float[Array, "*rows 1"]
    mixed: Float[Array, "*rows d"]


def shared_prompt(
    query: Float[Array, "N H d"], prompt: Prompt, suffix: Suffix, bias: Bias, score: Score
) -> Float[Array, "N H d"]:
    """Attention of one new token per particle over the shared prompt and its own suffix (which
    holds the token itself).

    All queries of a key/value head meet the prompt's keys in one matrix product, so the prompt is
    read once per step however many particles there are.  The two parts make one softmax: with tops
    a, b and masses A, B each part counts exp(top - max(a, b)) / (A exp(a - max) + B exp(b - max)).
    """
    num, heads, width = query.shape
    groups = suffix.key.shape[1]
    grouped = query.reshape(num, groups, heads // groups, width)
    gathered = jnp.swapaxes(grouped, 0, 1)

    def part(weights: Array, bias: Array, mix: str, value: Array) -> _Part:
        scores = score(weights) + bias
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        mixed = jnp.einsum(
            mix, weights.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return _Part(top, jnp.sum(weights, axis=-1, keepdims=True), mixed)

    products = jnp.einsum(
        "kngd,kds->kngs", gathered, prompt.key, preferred_element_type=jnp.float32
    )
    shared = part(products, bias.prompt[None, :, None], "kngs,ksd->kngd", prompt.value)
    shared = _Part(*(jnp.swapaxes(leaf, 0, 1) for leaf in shared))
    products = jnp.einsum(
        "nkgd,nkdt->nkgt", grouped, suffix.key, preferred_element_type=jnp.float32
    )
    own = part(products, bias.suffix[:, None, None], "nkgt,nktd->nkgd", suffix.value)

    top = jnp.maximum(shared.top, own.top)
    shared_weight, own_weight = jnp.exp(shared.top - top), jnp.exp(own.top - top)
    mixed = shared.mixed * shared_weight + own.mixed * own_weight
    mixed = mixed / (shared.mass * shared_weight + own.mass * own_weight)
    return mixed.astype(query.dtype).reshape(num, heads, width)


def of_new(key: Float[Array, "N U K d"], value: Float[Array, "N U K d"]) -> Suffix:
    """The suffixes of U new tokens alone."""
    return Suffix(jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3)))


def advanced(
    query: Float[Array, "N U H d"],
    prompt: Prompt,
    suffix: Suffix,
    seen: Bool[Array, "#N U P"],
    score: Score,
) -> Float[Array, "N U H d"]:
    """Attention of U new tokens per particle over the shared prompt and its own suffix, which holds
    the tokens themselves.

    `seen` (of `sights`) says which of P = S + T positions each of them sees.  One softmax over all
    scores; the prompt is not copied.
    """
    num, length, heads, width = query.shape
    grouped = query.reshape(num, length, suffix.key.shape[1], -1, width)
    size = prompt.key.shape[-1]
    shared = _product("nukgd,kds->nkgus", grouped, prompt.key)
    own = _product("nukgd,nkdt->nkgut", grouped, suffix.key)
    scores = score(jnp.concatenate([shared, own], axis=-1))
    scores = jnp.where(seen[:, None, None], scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(suffix.value.dtype)
    shared = _product("nkgus,ksd->nukgd", weights[..., :size], prompt.value)
    own = _product("nkgut,nktd->nukgd", weights[..., size:], suffix.value)
    return (shared + own).astype(query.dtype).reshape(query.shape)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """`einsum`, accumulated in float32."""
    # XLA for CPUs ends with an error at products of bfloat16 arrays with so many axes.
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def sights(
    prompt_size: int,
    prompt_length: Int[Array, ""],
    capacity: int,
    length: Int[Array, " #N"],
    num_new: int,
    window: int | None,
) -> Bool[Array, "#N U P"]:
    """Which positions, the prompt's S and the suffix's T, U new tokens see behind `length` others.

    New token u sits at position prompt_length + length[n] + u, in slot length[n] + u.  The prompt's
    padding and later slots are hidden; with a window, so is what lies `window` or more back.
    """
    slot = jnp.arange(capacity)
    position = jnp.concatenate([jnp.arange(prompt_size), prompt_length + slot])
    exists = jnp.concatenate([jnp.arange(prompt_size) < prompt_length, jnp.full(capacity, True)])
    own = prompt_length + length[:, None] + jnp.arange(num_new)
    distance = own[:, :, None] - position
    seen = exists & (distance >= 0)
    return seen if window is None else seen & (distance < window)
