"""From GGUF's names and conventions to Hugging Face's: metadata to a config dict, tensors to
checkpoint tensors.

Converters change weights on the way into GGUF; this module undoes each change:

    llama, smollm3   rows of q and k are reordered within each head, from rotary halves to pairs
    gemma2, gemma3   1 is added to every norm weight
    gpt2             linear weights are transposed from [in, out] to [out, in]
    llama3 scaling   the rotary frequency divisors are stored as a tensor instead of four numbers
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from .config import MOST, MOST_LAYERS
from .gguf_file import GGUFFile

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_TOP = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_ROTARY_DIVISORS = "rope_freqs.weight"
_HALF_TO_PAIR = ("llama", "smollm3")
_GEMMA = ("gemma2", "gemma3")
ARCHITECTURES = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")


class _Metadata:
    """Metadata of one architecture, with its types checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.architecture = file, architecture(file)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._one(key, float, default))

    def optional(self, key: str) -> float | None:
        return self.number(key) if f"{self.architecture}.{key}" in self.file.metadata else None

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number from 1 to `most`, as sizes are."""
        value = self._one(key, int, default)
        if not 1 <= value <= most:
            raise ValueError(
                f"{self.file.path}: expected {self.architecture}.{key} from 1 to {most}, got"
                f" {value}; the file is damaged: fetch or convert it again"
            )
        return value

    def _one(self, key: str, kind: type, default: Any) -> Any:
        """The entry, of which files may have one for every layer."""
        key = f"{self.architecture}.{key}"
        value = self.file.metadata.get(key)
        if not isinstance(value, list) or not value:
            return self.file.entry(key, kind, default)
        if len(set(value)) > 1:
            raise ValueError(
                f"{self.file.path}: expected {key} to be alike in all layers, got {value};"
                " choose a model whose layers are of one size"
            )
        return GGUFFile(self.file.path, {key: value[0]}, {}).entry(key, kind)


def architecture(file: GGUFFile) -> str:
    """The file's architecture name.

    Raises:
        ValueError: if it is none of `ARCHITECTURES`.
    """
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES or file.metadata.get(f"{name}.expert_count"):
        kind = "a mixture of experts" if name in ARCHITECTURES else f"{name!r}"
        raise ValueError(
            f"{file.path}: expected a dense decoder of architecture {', '.join(ARCHITECTURES)}, got"
            f" {kind};"
            " choose a model of one of these"
        )
    return name


def config_dict(file: GGUFFile) -> dict[str, Any]:
    """The model's configuration with the keys of a Hugging Face config.json.

    Raises:
        ValueError: if the architecture is unknown, an entry is missing, or rotary scaling cannot be
            expressed.
    """
    metadata = _Metadata(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(
            f"{file.path}: expected a tensor token_embd.weight, got none; convert the model again"
        )
    vocab_size = embedding.shape[0]
    tied = "output.weight" not in file.tensors
    if metadata.architecture == "gpt2":
        return _gpt2_config(metadata, vocab_size, tied)
    heads = metadata.count("attention.head_count")
    head_dim = metadata.count(
        "attention.key_length", max(1, metadata.count("embedding_length") // heads)
    )
    rotary = metadata.count("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(
            f"{file.path}: expected rotary embeddings over the whole head of {head_dim}"
            f" coordinates, got {rotary} of them; use another model"
        )
    config = {
        "model_type": metadata.architecture,
        "vocab_size": vocab_size,
        "hidden_size": metadata.count("embedding_length"),
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if metadata.architecture == "smollm3":
        # The file does not say which layers have no rotary embedding: every fourth, as in the
        # published models.
        config["no_rope_layers"] = [
            int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])
        ]
    if metadata.architecture in _GEMMA:
        config |= _gemma_config(metadata, config)
    return config


def _gpt2_config(metadata: _Metadata, vocab_size: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": metadata.count("embedding_length"),
        "n_inner": metadata.count("feed_forward_length"),
        "n_layer": metadata.count("block_count", most=MOST_LAYERS),
        "n_head": metadata.count("attention.head_count"),
        "n_positions": metadata.count("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": tied,
    }


def _gemma_config(metadata: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    gemma2 = metadata.architecture == "gemma2"
    layers = config["num_hidden_layers"]
    # Attention scale and layer pattern are not in the file; only the 27B models scale by the width
    # per head.
    largest = layers == (46 if gemma2 else 62)
    scale = (
        config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    )
    every = 2 if gemma2 else 6
    kinds = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(layers)
    ]
    extra = {
        "model_type": "gemma2" if gemma2 else "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": metadata.count("attention.sliding_window"),
        "layer_types": kinds,
        "attn_logit_softcapping": metadata.optional("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.optional("final_logit_softcapping"),
    }
    if not gemma2:
        extra["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", 10000.0)
        extra["rope_theta"] = metadata.number("rope.freq_base", 1000000.0)
    return extra


def _rope_scaling(metadata: _Metadata) -> dict[str, Any] | None:
    """The entry rope_scaling; a factor alone, or under its older name, is linear scaling."""
    kind = metadata.file.metadata.get(f"{metadata.architecture}.rope.scaling.type", "linear")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0))
    stored = _ROTARY_DIVISORS in metadata.file.tensors
    plain = kind == "none" or (kind == "linear" and factor in (0.0, 1.0))
    if kind not in ("none", "linear", "yarn") or (stored and not plain):
        with_divisors = f" with {_ROTARY_DIVISORS}" if stored else ""
        raise ValueError(
            f"{metadata.file.path}: expected rotary scaling none, linear, yarn or llama3, got"
            f" {kind!r}{with_divisors}; use the model's safetensors files or another model"
        )
    if plain:
        return _llama3_scaling(metadata) if stored else None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    attention = metadata.optional("rope.scaling.attn_factor")
    return {
        "rope_type": "yarn",
        "factor": factor or None,
        "original_max_position_embeddings": metadata.count(
            "rope.scaling.original_context_length", metadata.count("context_length")
        ),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        # The file's factor comes on top of the one that yarn itself has.
        "attention_factor": None
        if attention is None
        else attention * (1.0 + 0.1 * math.log(max(factor, 1.0))),
    }


def _llama3_scaling(metadata: _Metadata) -> dict[str, Any]:
    """The llama3 scaling whose divisors the file stores.

    With wavelength l = 2 pi theta^(2i/d), the divisor is 1 where l < 8192/4, `factor` where l >
    8192, and between them 1 / ((1 - s)/factor + s) with s = (8192/l - 1) / 3.  Every published
    Llama 3 has these three constants, so only `factor`, the largest divisor, is read off; the
    others are checked.
    """
    divisors = metadata.file.dequantised_tensor(_ROTARY_DIVISORS)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    exponent = np.arange(divisors.size) / divisors.size
    wavelength = 2 * np.pi * metadata.number("rope.freq_base", 10000.0) ** exponent
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{metadata.file.path}: expected {_ROTARY_DIVISORS} of llama3 scaling (low_freq_factor"
            f" {low},"
            f" high_freq_factor {high}, original context {original}), got {divisors.tolist()};"
            " use the model's safetensors files"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def hf_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights under their Hugging Face names, before one is dequantised."""
    kind = architecture(file)
    return {
        _hf_name(kind, name): tensor.shape[::-1]
        if _transposed(kind, name, len(tensor.shape))
        else tensor.shape
        for name, tensor in file.tensors.items()
        if name != _ROTARY_DIVISORS
    }


def hf_tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " ..."]]:
    """All weights in float32 under their Hugging Face names, every converter's change undone.

    Tensors without a counterpart keep their GGUF names, so that the model lists them as unexpected.
    """
    kind = architecture(file)
    tensors = {}
    for name, array in file.dequantised().items():
        if name == _ROTARY_DIVISORS:
            continue
        if kind in _HALF_TO_PAIR and (".attn_q." in name or ".attn_k." in name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            if (
                array.shape[0] % (2 * heads) == 0
            ):  # otherwise the model's own check of shapes reports it
                array = pairs_to_halves(array, heads)
        elif kind in _GEMMA and name.endswith("norm.weight"):
            array = array - 1
        elif _transposed(kind, name, array.ndim):
            array = array.T
        tensors[_hf_name(kind, name)] = array
    return tensors


def _transposed(kind: str, name: str, rank: int) -> bool:
    """Whether the file has a matrix [out, in] that the checkpoint has [in, out]."""
    block = kind == "gpt2" and name.startswith("blk.")
    return block and name.endswith(".weight") and rank == 2


def pairs_to_halves(
    weight: Float[np.ndarray, "rows ..."], heads: int
) -> Float[np.ndarray, "rows ..."]:
    """Rows of a q or k projection, in each head from rotary pairs (2i, 2i+1) to rotary halves (i, i
    + d/2).
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _hf_name(kind: str, name: str) -> str:
    top, blocks, layers = _TOP, _GEMMA_BLOCK if kind in _GEMMA else _BLOCK, "model.layers"
    if kind == "gpt2":
        top, blocks, layers = _GPT2_TOP, _GPT2_BLOCK, "transformer.h"
    if name in top:
        return top[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in blocks:
        return f"{layers}.{parts[1]}.{blocks[parts[2]]}.{parts[3]}"
    return name
