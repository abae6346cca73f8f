"""Weights of a decoder from tensors under their Hugging Face names."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ppl.showing import shown

from .config import DecoderConfig

Params = dict[str, Any]
"""embed [V, D]; positions [P, D] (GPT-2); head [V, D] unless tied; final_norm; layers: a tuple
with, per block,

    attention_norm, mlp_norm (and attention_post_norm, mlp_post_norm): {scale [D], bias [D]}
    qkv {kernel [D, (H + 2K) d], bias}, q_norm, k_norm {scale [d]}, out {kernel [H d, D], bias}
    up {kernel [D, 2F] (gate, then up) or [D, F], bias}, down {kernel [F, D], bias}

Kernels are [in, out]: a few rows times such a matrix is what XLA multiplies fastest on CPU.
"""

# Buffers that older checkpoints carry along: rotary frequencies and GPT-2's causal masks.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
# What a model of text and images has beside its language model.
_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?(transformer\.)?")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint: its name, its shape there, and whether its matrix is stored [out,
    in].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def from_hf(config: DecoderConfig, tensors: Mapping[str, Any]) -> Params:
    """The decoder's parameters, in the dtype of `tensors`.

    Args:
        config: the architecture.
        tensors: Hugging Face tensor name -> array; with or without the base model's prefix
            (`model.`, `transformer.`).  Rotary frequencies, causal masks and the second copy of
            tied embeddings are ignored.

    Raises:
        ValueError: if tensors are missing, unexpected or misshapen; all of them are listed.  If a
            head that the configuration ties to the embedding differs from it.
    """
    check(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    layout = _layout(config)
    found = {plain_name(name): name for name in tensors if not ignored(name)}
    if config.tied and "lm_head.weight" in found:
        _check_tied(layout, found, tensors)
        del found["lm_head.weight"]
    return _fill(layout, {plain: tensors[name] for plain, name in found.items()})


def check(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether tensors of these names and shapes are a decoder's: all before one of them is read.

    Raises:
        ValueError: if tensors are missing, unexpected or misshapen, or there are fewer than layers.
    """
    if len(config.layers) > len(shapes):
        raise ValueError(
            f"expected tensors of {len(config.layers)} layers, got {len(shapes)} tensors in all;"
            " use the config.json that belongs to these weights"
        )
    found = {plain_name(name): name for name in shapes if not ignored(name)}
    if config.tied:
        found.pop("lm_head.weight", None)
    _check(config, _layout(config), found, shapes)


@functools.partial(jax.jit, static_argnums=1)
def random_params(key: PRNGKeyArray, config: DecoderConfig) -> Params:
    """Random parameters, float32: norms that only normalise, biases 0, embeddings and output of
    variance 0.02^2.

    Kernels have variance 1 / in; those that write into the residual stream 1 / (2 L in), L the
    number of layers.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(
        _layout(config), is_leaf=lambda x: isinstance(x, list)
    )
    keys = jax.random.split(key, len(flat))

    def fill(path: tuple, parts: list[_Tensor], key: PRNGKeyArray) -> Array:
        shapes = [part.shape[::-1] if part.transposed else part.shape for part in parts]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        *_, owner, name = [None, *(getattr(entry, "key", None) for entry in path)]
        if name == "scale":
            return jnp.full(shape, 1.0 - config.norm_offset, jnp.float32)
        if name == "bias":
            return jnp.zeros(shape, jnp.float32)
        if name == "kernel":
            depth = 2 * len(config.layers) if owner in ("out", "down") else 1
            return jax.random.normal(key, shape, jnp.float32) / np.float32(
                np.sqrt(shape[0] * depth)
            )
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    return jax.tree.unflatten(
        structure, [fill(path, leaf, k) for (path, leaf), k in zip(flat, keys, strict=True)]
    )


@shown
class Matrix(NamedTuple):
    """One matrix of a checkpoint: its name, without `.weight`, and its sizes."""

    name: str
    inputs: int
    outputs: int


def matrices(config: DecoderConfig) -> tuple[dict[str, tuple[Matrix, ...]], ...]:
    """For every layer and kernel ("qkv", "out", "up", "down") the checkpoint's matrices that stand
    side by side in it, names as in `plain_name`.
    """

    def of(part: _Tensor) -> Matrix:
        inputs, outputs = part.shape[::-1] if part.transposed else part.shape
        return Matrix(part.name.removesuffix(".weight"), inputs, outputs)

    return tuple(
        {
            name: tuple(of(part) for part in tree["kernel"])
            for name, tree in layer.items()
            if "kernel" in tree
        }
        for layer in _layout(config)["layers"]
    )


def ignored(name: str) -> bool:
    """Whether a checkpoint's tensor is no part of the decoder."""
    return bool(_BUFFERS.search(name) or _IMAGES.match(name))


def plain_name(name: str) -> str:
    """A tensor's name without the base model's prefix."""
    return _PREFIX.sub("", name)


def _check_tied(layout: Params, found: dict[str, str], tensors: Mapping[str, Any]) -> None:
    [embedding] = layout["embed"]
    head, embed = found["lm_head.weight"], found.get(embedding.name)
    if embed is not None and not np.array_equal(tensors[head], tensors[embed]):
        raise ValueError(
            "expected an output matrix that is the embedding, as tie_word_embeddings says, got"
            f" another one ({head}); set tie_word_embeddings to false in config.json if the model"
            " was trained with its own, or remove it from the file"
        )


def _layout(config: DecoderConfig) -> Params:
    """The parameter tree with, at every leaf, the checkpoint's tensors that are joined
    to make it.
    """
    names = _gpt2_block if config.family == "gpt2" else _rope_block
    hidden, gpt2 = config.hidden_size, config.family == "gpt2"
    tree: Params = {
        "embed": [
            _Tensor("wte.weight" if gpt2 else "embed_tokens.weight", (config.vocab_size, hidden))
        ],
        "final_norm": _norm(config, "ln_f" if gpt2 else "norm"),
        "layers": tuple(names(config, index) for index in range(len(config.layers))),
    }
    if config.learned_positions:
        tree["positions"] = [_Tensor("wpe.weight", (config.context, hidden))]
    if not config.tied:
        tree["head"] = [_Tensor("lm_head.weight", (config.vocab_size, hidden))]
    return tree


def _norm(config: DecoderConfig, name: str, size: int | None = None) -> Params:
    shape = (size or config.hidden_size,)
    tree = {"scale": [_Tensor(f"{name}.weight", shape)]}
    return tree | {"bias": [_Tensor(f"{name}.bias", shape)]} if config.norm == "layer" else tree


def _linear(names: list[str], inputs: int, outputs: list[int], bias: bool) -> Params:
    """Matrices [out, in] side by side, as one kernel [in, sum of out]."""
    pairs = list(zip(names, outputs, strict=True))
    tree = {
        "kernel": [
            _Tensor(f"{name}.weight", (size, inputs), transposed=True) for name, size in pairs
        ]
    }
    return (
        tree | {"bias": [_Tensor(f"{name}.bias", (size,)) for name, size in pairs]}
        if bias
        else tree
    )


def _rope_block(config: DecoderConfig, index: int) -> Params:
    block, hidden, inner = f"layers.{index}.", config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [f"{block}self_attn.{name}_proj" for name in "qkv"]
    up = [
        f"{block}mlp.{name}"
        for name in (("gate_proj", "up_proj") if config.gated else ("up_proj",))
    ]
    tree = {
        "attention_norm": _norm(config, f"{block}input_layernorm"),
        "qkv": _linear(qkv, hidden, [queries, keys, keys], config.qkv_bias),
        "out": _linear([f"{block}self_attn.o_proj"], queries, [hidden], config.out_bias),
        "up": _linear(up, hidden, [inner] * len(up), config.mlp_bias),
        "down": _linear([f"{block}mlp.down_proj"], inner, [hidden], config.mlp_bias),
    }
    if config.qk_norm:
        tree["q_norm"] = _norm(config, f"{block}self_attn.q_norm", config.head_dim)
        tree["k_norm"] = _norm(config, f"{block}self_attn.k_norm", config.head_dim)
    if config.post_norms:
        tree["attention_post_norm"] = _norm(config, f"{block}post_attention_layernorm")
        tree["mlp_norm"] = _norm(config, f"{block}pre_feedforward_layernorm")
        tree["mlp_post_norm"] = _norm(config, f"{block}post_feedforward_layernorm")
    else:
        tree["mlp_norm"] = _norm(config, f"{block}post_attention_layernorm")
    return tree


def _gpt2_block(config: DecoderConfig, index: int) -> Params:
    block, hidden, inner = f"h.{index}.", config.hidden_size, config.intermediate_size

    def conv(name: str, inputs: int, outputs: int) -> Params:
        """GPT-2 stores its matrices [in, out]."""
        return {
            "kernel": [_Tensor(f"{block}{name}.weight", (inputs, outputs))],
            "bias": [_Tensor(f"{block}{name}.bias", (outputs,))],
        }

    return {
        "attention_norm": _norm(config, f"{block}ln_1"),
        "qkv": conv("attn.c_attn", hidden, 3 * hidden),
        "out": conv("attn.c_proj", hidden, hidden),
        "mlp_norm": _norm(config, f"{block}ln_2"),
        "up": conv("mlp.c_fc", hidden, inner),
        "down": conv("mlp.c_proj", inner, hidden),
    }


def _leaves(tree: Any) -> list[_Tensor]:
    if isinstance(tree, list):
        return tree
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in _leaves(child)]


def _check(
    config: DecoderConfig,
    layout: Params,
    found: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    expected = {leaf.name: leaf.shape for leaf in _leaves(layout)}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found[name] for name in found.keys() - expected.keys())
    misshapen = [
        f"{name} (expected {list(expected[name])}, got {list(shapes[found[name]])})"
        for name in sorted(expected.keys() & found.keys())
        if shapes[found[name]] != expected[name]
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        listed = "\n".join(
            f"  {kind}: {', '.join(names)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"expected the tensors of a {config.family} decoder with {len(config.layers)} layers,"
            f" got\n{listed}\n"
            f"use the config.json that belongs to these weights{_untied(missing)}"
        )


def _untied(missing: list[str]) -> str:
    if "lm_head.weight" not in missing:
        return ""
    return (
        "; a model whose output matrix is its embedding says so: tie_word_embeddings must be true"
        " in config.json"
    )


def _fill(tree: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(tree, dict):
        return {name: _fill(child, tensors) for name, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_fill(child, tensors) for child in tree)
    parts = [
        np.asarray(tensors[leaf.name]).T if leaf.transposed else np.asarray(tensors[leaf.name])
        for leaf in tree
    ]
    return jnp.asarray(
        np.concatenate(parts, axis=-1) if len(parts) > 1 else np.ascontiguousarray(parts[0])
    )
