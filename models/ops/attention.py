"""Softmax attention: over a full sequence, and of one new token per particle over a shared prompt and a suffix."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Score(NamedTuple):
    """How q.k becomes a score: scale * q.k, then c tanh(score / c) if `softcap` is c."""

    scale: float
    softcap: float | None

    def __call__(self, products: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        scores = products * self.scale
        return scores if self.softcap is None else jnp.tanh(scores / self.softcap) * self.softcap


def causal_mask(queries: Int[Array, " Q"], keys: Int[Array, " S"], window: int | None) -> Bool[Array, "Q S"]:
    """Which key positions a query position sees: none after itself, and with a window only the last `window`."""
    distance = queries[:, None] - keys[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def full(
    query: Float[Array, "N Q H d"],
    key: Float[Array, "N S K d"],
    value: Float[Array, "N S K d"],
    mask: Bool[Array, "Q S"],
    score: Score,
) -> Float[Array, "N Q H d"]:
    """Attention of every position over a sequence; the H query heads share K key/value heads in groups."""
    num, queries, heads, width = query.shape
    grouped = query.reshape(num, queries, key.shape[2], -1, width)
    products = jnp.einsum("nqkgd,nskd->nkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, score(products), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("nkgqs,nskd->nqkgd", weights.astype(value.dtype), value)
    return mixed.reshape(num, queries, heads, width)


class Prompt(NamedTuple):
    """Keys and values of the prompt in one layer, stored once for all particles."""

    key: Float[Array, "K d S"]
    value: Float[Array, "K S d"]


class Suffix(NamedTuple):
    """Keys and values of each particle's own tokens in one layer."""

    key: Float[Array, "N T K d"]
    value: Float[Array, "N T K d"]


class Visible(NamedTuple):
    """What each particle's new token sees of the prompt and of its own suffix."""

    prompt: Bool[Array, "N S"]
    suffix: Bool[Array, "N T"]


def visible(
    prompt_size: int, prompt_length: Int[Array, ""], capacity: int, length: Int[Array, " N"], window: int | None
) -> Visible:
    """Masks of a new token at position prompt_length + length[n]: padding hides, and so does distance >= window."""
    position = jnp.arange(prompt_size)
    slot = jnp.arange(capacity)
    prompt = jnp.broadcast_to(position < prompt_length, (length.shape[0], prompt_size))
    suffix = slot < length[:, None]
    if window is not None:
        prompt &= position > (prompt_length + length - window)[:, None]
        suffix &= slot > (length - window)[:, None]
    return Visible(prompt, suffix)


def shared_prompt(
    query: Float[Array, "N H d"],
    key: Float[Array, "N K d"],
    value: Float[Array, "N K d"],
    prompt: Prompt,
    suffix: Suffix,
    visible: Visible,
    score: Score,
) -> Float[Array, "N H d"]:
    """Attention of one new token per particle over the shared prompt, its own suffix and itself, in one softmax.

    All N * H queries meet the prompt's keys in one matrix product per key/value head, so the prompt is read once per
    step however many particles there are.  The three parts are joined by their common maximum and summed masses.
    """
    num, heads, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(num, groups, heads // groups, width)

    prompt_scores = score(jnp.einsum("nkgd,kds->nkgs", grouped, prompt.key, preferred_element_type=jnp.float32))
    prompt_scores = jnp.where(visible.prompt[:, None, None], prompt_scores, -jnp.inf)
    suffix_scores = score(jnp.einsum("nkgd,ntkd->nkgt", grouped, suffix.key, preferred_element_type=jnp.float32))
    suffix_scores = jnp.where(visible.suffix[:, None, None], suffix_scores, -jnp.inf)
    own_score = score(jnp.einsum("nkgd,nkd->nkg", grouped, key, preferred_element_type=jnp.float32))[..., None]

    top = jnp.maximum(jnp.max(prompt_scores, axis=-1, keepdims=True), jnp.max(suffix_scores, axis=-1, keepdims=True))
    top = jnp.maximum(top, own_score)
    prompt_weights = jnp.exp(prompt_scores - top)
    suffix_weights = jnp.exp(suffix_scores - top)
    own_weight = jnp.exp(own_score - top)
    total = jnp.sum(prompt_weights, axis=-1, keepdims=True) + jnp.sum(suffix_weights, axis=-1, keepdims=True)
    total = total + own_weight

    mixed = jnp.einsum("nkgs,ksd->nkgd", prompt_weights.astype(value.dtype), prompt.value).astype(jnp.float32)
    mixed = mixed + jnp.einsum("nkgt,ntkd->nkgd", suffix_weights.astype(value.dtype), suffix.value)
    mixed = mixed + own_weight * value[:, :, None]
    return (mixed / total).astype(query.dtype).reshape(num, heads, width)
