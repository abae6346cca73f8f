"""A decoder-only transformer as a language model; one set of blocks for full passes, prompts and
single steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.lm import LM, Features, LMFunctions, Prefix, reorder_rows
from ppl.pytrees import register_dataclass

from .config import DecoderConfig, Layer
from .ops import attention, norm, rope
from .weights import Params, random_params

Attend = Callable[[int, Array, Array, Array], Array]
"""attend(layer index, query [..., H, d], key [..., K, d], value [..., K, d]) -> mixed values [...,
H, d].
"""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Each particle's own tokens: a `Suffix` of keys and values per layer, and the number of tokens
    `length` [N].
    """

    suffixes: tuple[attention.Suffix, ...]
    length: Int[Array, " N"]


def decoder(config: DecoderConfig, params: Params, eos: int) -> LM:
    """The language model with these weights; `eos` is the token that ends a string.

    Raises:
        ValueError: if `eos` is no token of the vocabulary.
    """
    if not 0 <= eos < config.vocab_size:
        raise ValueError(
            f"expected eos in [0, {config.vocab_size}), got {eos}; pass the tokenizer's"
            " end-of-text id"
        )
    return LM(params, config, FUNCTIONS, config.vocab_size, eos, config.context)


def random(key: PRNGKeyArray, config: DecoderConfig, eos: int) -> LM:
    """A decoder with random weights, to be trained from scratch; float32.  Raises as `decoder`
    does.
    """
    return decoder(config, random_params(key, config), eos)


def forward(
    config: DecoderConfig, params: Params, tokens: Int[Array, "N S"]
) -> Float[Array, "N S V"]:
    """Next-token logits after every position of N sequences, float32, from one full pass."""
    positions = jnp.arange(tokens.shape[1])

    def attend(index: int, query: Array, key: Array, value: Array) -> Array:
        return attention.causal(query, key, value, config.layers[index].window, _score(config))

    return logits(config, params, _run(config, params, tokens, positions, attend))


def prefill(
    config: DecoderConfig, params: Params, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[tuple[attention.Prompt, ...], Float[Array, " V"]]:
    """Keys and values of the prompt's first `length` tokens, per layer, and the logits after
    them.
    """
    data, hidden = prefill_features(config, params, tokens, length)
    return data, logits(config, params, hidden[None])[0]


def prefill_features(
    config: DecoderConfig, params: Params, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[tuple[attention.Prompt, ...], Float[Array, " D"]]:
    """`prefill` with the hidden state."""
    positions = jnp.arange(tokens.shape[0])
    prompts = []

    def attend(index: int, query: Array, key: Array, value: Array) -> Array:
        prompts.append(
            attention.Prompt(jnp.transpose(key[0], (1, 2, 0)), jnp.transpose(value[0], (1, 0, 2)))
        )
        return attention.causal(query, key, value, config.layers[index].window, _score(config))

    hidden = _run(config, params, tokens[None], positions, attend)
    return tuple(prompts), jax.lax.dynamic_index_in_dim(hidden[0], length - 1, keepdims=False)


def init(config: DecoderConfig, params: Params, prefix: Prefix, num: int, max_tokens: int) -> Cache:
    """Empty suffixes: N * T rows of keys and values per layer, beside the prompt's S rows in
    `prefix`.
    """
    shape = (num, config.num_kv_heads, config.head_dim, max_tokens)
    dtype = params["embed"].dtype
    suffixes = (
        attention.Suffix(jnp.zeros(shape, dtype), jnp.zeros((*shape[:2], *shape[:1:-1]), dtype))
        for _ in config.layers
    )
    return Cache(tuple(suffixes), jnp.zeros(num, jnp.int32))


def step(
    config: DecoderConfig, params: Params, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
) -> tuple[Cache, Float[Array, "N V"]]:
    """Append token[n] to row n at its own length; the cache with it, and the logits after it."""
    cache, hidden = step_features(config, params, prefix, cache, token)
    return cache, logits(config, params, hidden)


def step_features(
    config: DecoderConfig, params: Params, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
) -> tuple[Cache, Float[Array, "N D"]]:
    """`step` with hidden states."""
    capacity = cache.suffixes[0].key.shape[-1]
    biases = {
        window: attention.bias(
            prefix.tokens.shape[0], prefix.length, capacity, cache.length, window
        )
        for window in {layer.window for layer in config.layers}
    }
    positions = prefix.length + cache.length
    suffixes = []

    def attend(index: int, query: Array, key: Array, value: Array) -> Array:
        # Written before it is read: a write after the reads would make XLA copy the whole cache
        # every step.
        suffixes.append(attention.append(cache.suffixes[index], key, value, cache.length))
        bias = biases[config.layers[index].window]
        return attention.shared_prompt(
            query, prefix.data[index], suffixes[index], bias, _score(config)
        )

    hidden = _run(config, params, token, positions, attend)
    return Cache(tuple(suffixes), cache.length + 1), hidden


def truncate(
    config: DecoderConfig, params: Params, cache: Cache, length: Int[Array, " N"]
) -> Cache:
    """Keep the first `length` tokens of each row; what lies beyond is hidden and will be
    overwritten.
    """
    return dataclasses.replace(cache, length=jnp.minimum(cache.length, length))


def advance(
    config: DecoderConfig,
    params: Params,
    prefix: Prefix,
    cache: Cache | None,
    tokens: Int[Array, "N K"],
) -> tuple[Cache | None, Float[Array, "N K V"]]:
    """Append tokens[n] to row n at its own length, in one pass; the cache with them, and the logits
    after each.

    Without a cache the rows are empty, and none is made.
    """
    cache, hidden = advance_features(config, params, prefix, cache, tokens)
    return cache, logits(config, params, hidden)


def advance_features(
    config: DecoderConfig,
    params: Params,
    prefix: Prefix,
    cache: Cache | None,
    tokens: Int[Array, "N K"],
) -> tuple[Cache | None, Float[Array, "N K D"]]:
    """`advance` with hidden states."""
    count = tokens.shape[1]
    start = jnp.zeros(1, jnp.int32) if cache is None else cache.length
    capacity = count if cache is None else cache.suffixes[0].key.shape[-1]
    sights = {
        window: attention.sights(
            prefix.tokens.shape[0], prefix.length, capacity, start, count, window
        )
        for window in {layer.window for layer in config.layers}
    }
    suffixes = []

    def attend(index: int, query: Array, key: Array, value: Array) -> Array:
        new = attention.of_new(key, value)
        suffixes.append(
            new if cache is None else attention.write(cache.suffixes[index], new, cache.length)
        )
        seen = sights[config.layers[index].window]
        return attention.advanced(query, prefix.data[index], suffixes[index], seen, _score(config))

    positions = prefix.length + start[:, None] + jnp.arange(count)
    hidden = _run(config, params, tokens, positions, attend)
    return None if cache is None else Cache(tuple(suffixes), cache.length + count), hidden


def logits(
    config: DecoderConfig, params: Params, hidden: Float[Array, "*N D"]
) -> Float[Array, "*N V"]:
    """Scores of the whole vocabulary, float32; the output matrix stays [V, D], so tied embeddings
    need one copy.
    """
    hidden = hidden.astype(params["embed"].dtype)
    head = params["embed"] if config.tied else params["head"]
    if isinstance(head, dict):  # of low rank, `models.heads`
        hidden = jnp.einsum("...d,rd->...r", hidden, head["right"].astype(hidden.dtype))
        head = head["left"]
    scores = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    cap = config.final_softcap
    return scores if cap is None else jnp.tanh(scores / cap) * cap


FEATURES = Features(prefill_features, step_features, advance_features, logits)
FUNCTIONS = LMFunctions(prefill, init, step, truncate, reorder_rows, advance, FEATURES)


def _score(config: DecoderConfig) -> attention.Score:
    return attention.Score(config.attention_scale, config.attention_softcap)


def _embed(config: DecoderConfig, params: Params, tokens: Array, positions: Array) -> Array:
    hidden = jnp.take(params["embed"], tokens, axis=0)
    if config.embedding_scale != 1.0:
        hidden = hidden * jnp.asarray(config.embedding_scale, hidden.dtype)
    return (
        hidden + jnp.take(params["positions"], positions, axis=0)
        if config.learned_positions
        else hidden
    )


def _run(
    config: DecoderConfig, params: Params, tokens: Array, positions: Array, attend: Attend
) -> Array:
    """The hidden states [..., D] of tokens [...], float32, ready for the output matrix.

    All layers are unrolled: a scan over stacked weights copies each layer's out of the stack every
    step on CPU.
    """
    hidden = _embed(config, params, tokens, positions)
    turns = {
        layer.rope: rope.angles(layer.rope, config.head_dim, positions)
        for layer in config.layers
        if layer.rope is not None
    }
    for index, (layer, weights) in enumerate(zip(config.layers, params["layers"], strict=True)):
        normed = _norm(config, weights["attention_norm"], hidden)
        mixed = _attention(config, layer, weights, normed, turns, index, attend)
        if config.post_norms:
            mixed = _norm(config, weights["attention_post_norm"], mixed)
        hidden = hidden + mixed
        update = _feed_forward(config, weights, _norm(config, weights["mlp_norm"], hidden))
        if config.post_norms:
            update = _norm(config, weights["mlp_post_norm"], update)
        hidden = hidden + update
    return _norm(config, params["final_norm"], hidden).astype(jnp.float32)


def _attention(
    config: DecoderConfig,
    layer: Layer,
    weights: Params,
    x: Array,
    turns: dict[Any, Any],
    index: int,
    attend: Attend,
) -> Array:
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    joint = _linear(weights["qkv"], x).reshape(*x.shape[:-1], heads + 2 * groups, width)
    query, key, value = (
        joint[..., :heads, :],
        joint[..., heads : heads + groups, :],
        joint[..., heads + groups :, :],
    )
    if config.qk_norm:
        query, key = _norm(config, weights["q_norm"], query), _norm(config, weights["k_norm"], key)
    if layer.rope is not None:
        query, key = rope.rotate(query, turns[layer.rope]), rope.rotate(key, turns[layer.rope])
    mixed = attend(index, query, key, value)
    return _linear(weights["out"], mixed.reshape(*x.shape[:-1], heads * width))


def _feed_forward(config: DecoderConfig, weights: Params, x: Array) -> Array:
    inner = _linear(weights["up"], x)
    if config.gated:
        gate, up = jnp.split(inner, 2, axis=-1)
        inner = ACTIVATIONS[config.activation](gate) * up
    else:
        inner = ACTIVATIONS[config.activation](inner)
    return _linear(weights["down"], inner)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def _linear(weights: Params, x: Array) -> Array:
    product = x @ weights["kernel"]
    if "lora" in weights:
        product = product + _low_rank(weights["lora"], x)
    return product + weights["bias"] if "bias" in weights else product


def _low_rank(lora: Params, x: Array) -> Array:
    """scale x A B (`models.lora`), of an x some of whose numbers are dropped if there is a dropout
    key.
    """
    if "key" in lora:
        # Passes of other shapes, as the prompt's and the strings', drop other numbers.
        kept = jax.random.bernoulli(
            jax.random.fold_in(lora["key"], x.size), 1 - lora["rate"], x.shape
        )
        x = jnp.where(kept, x / (1 - lora["rate"]).astype(x.dtype), 0)
    return (x @ lora["a"].astype(x.dtype)) @ (lora["b"] * lora["scale"]).astype(x.dtype)


def _norm(config: DecoderConfig, weights: Params, x: Array) -> Array:
    if config.norm == "layer":
        return norm.layer(x, weights["scale"], weights["bias"], config.norm_eps)
    return norm.rms(x, weights["scale"], config.norm_eps, config.norm_offset)
