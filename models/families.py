"""Families of decoders: how each `model_type` of a Hugging Face `config.json` is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ppl.showing import shown

from . import rope_config
from .config import (
    MOST_LAYERS,
    WIDEST_HEAD,
    DecoderConfig,
    Layer,
    Rope,
    real,
    size,
    token_ids,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _rope(config: Mapping[str, Any], theta: float, layer_type: str | None = None) -> Rope:
    return rope_config.rope(config, theta, _head_dim(config), layer_type)


HEAD_DIMS = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
"""Where it does not follow from the sizes, a head's width if the config does not give it."""


def _head_dim(config: Mapping[str, Any]) -> int:
    default = HEAD_DIMS.get(config["model_type"])
    width = max(1, size(config, "hidden_size") // size(config, "num_attention_heads"))
    given = {"head_dim": config.get("head_dim") or default or width}
    return size(given, "head_dim", most=WIDEST_HEAD)


def _layers(config: Mapping[str, Any], name: str = "num_hidden_layers") -> int:
    return size(config, name, most=MOST_LAYERS)


def _window(config: Mapping[str, Any], default: int | None = None) -> int | None:
    given = _get(config, "sliding_window", default)
    return None if given is None else size(config, "sliding_window", default)


def _softcap(config: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """A null switches off what is there by default."""
    given = {name: config.get(name, default)}
    return None if given[name] is None else real(given, name)


def _eos(config: Mapping[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return () if eos is None else token_ids(eos, "eos_token_id")


GEMMA3_TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""What the text part of a gemma3 configuration leaves out."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model in a model of text and images (`gemma3`), or the
    configuration itself.
    """
    text = config.get("text_config")
    if config.get("model_type") != "gemma3" or not isinstance(text, Mapping):
        return config
    outer = {name: config[name] for name in ("eos_token_id",) if config.get(name) is not None}
    return GEMMA3_TEXT | {name: x for name, x in text.items() if x is not None} | outer


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"expected an activation out of {', '.join(sorted(ACTIVATIONS))}, got {name!r}"
        )
    return ACTIVATIONS[name]


def _get(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """The entry, or the family's default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def _rope_family(
    config: Mapping[str, Any], layers: tuple[Layer, ...], **overrides: Any
) -> DecoderConfig:
    """What all families with rotary embeddings have in common; `overrides` are the family's own
    fields.
    """
    num_heads = size(config, "num_attention_heads")
    head_dim = _head_dim(config)
    fields: dict[str, Any] = {
        "family": config["model_type"],
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": size(config, "hidden_size"),
        "intermediate_size": size(config, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": size(config, "num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "context": rope_config.context(config),
        "layers": layers,
        "norm_eps": real(config, "rms_norm_eps", 1e-6),
        "attention_scale": head_dim**-0.5,
        "tied": False,
        "eos": _eos(config),
    }
    fields.update(overrides)
    if "activation" not in overrides:
        fields["activation"] = _activation(_get(config, "hidden_act", "silu"))
    if "tie_word_embeddings" in config:
        fields["tied"] = bool(config["tie_word_embeddings"])
    return DecoderConfig(**fields)


def _layer_types(config: Mapping[str, Any], default: Callable[[int], bool]) -> list[bool]:
    """Which layers have a sliding window: as listed, else by the family's rule `default(index)`."""
    count = _layers(config)
    listed = config.get("layer_types")
    if listed is None:
        return [default(index) for index in range(count)]
    if len(listed) != count or set(listed) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"expected layer_types to hold {count} times sliding_attention or full_attention, got"
            f" {listed}"
        )
    return [name == "sliding_attention" for name in listed]


def _llama(config: Mapping[str, Any]) -> DecoderConfig:
    layers = (Layer(_rope(config, 10000.0), None),) * _layers(config)
    bias = bool(_get(config, "attention_bias", False))
    mlp_bias = bool(_get(config, "mlp_bias", False))
    return _rope_family(config, layers, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _mistral(config: Mapping[str, Any]) -> DecoderConfig:
    layers = (Layer(_rope(config, 10000.0), _window(config)),) * _layers(config)
    return _rope_family(config, layers)


def _qwen_layers(config: Mapping[str, Any]) -> tuple[Layer, ...]:
    window = _window(config) if config.get("use_sliding_window") else None
    first = int(_get(config, "max_window_layers", 28))
    rope = _rope(config, 10000.0)
    sliding = _layer_types(config, lambda index: window is not None and index >= first)
    return tuple(Layer(rope, window if slides else None) for slides in sliding)


def _qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    return _rope_family(config, _qwen_layers(config), qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(_get(config, "attention_bias", False))
    return _rope_family(config, _qwen_layers(config), qkv_bias=bias, out_bias=bias, qk_norm=True)


def _smollm3(config: Mapping[str, Any]) -> DecoderConfig:
    count = _layers(config)
    interval = size(config, "no_rope_layer_interval", 4)
    # The list says for each layer whether it HAS rope, in spite of its name.
    has_rope = _get(
        config, "no_rope_layers", [int((index + 1) % interval != 0) for index in range(count)]
    )
    window = _window(config) if config.get("use_sliding_window") else None
    sliding = _layer_types(config, lambda index: window is not None and not has_rope[index])
    rope = _rope(config, 2000000.0)
    layers = tuple(
        Layer(rope if has_rope[index] else None, window if sliding[index] else None)
        for index in range(count)
    )
    bias = bool(_get(config, "attention_bias", False))
    mlp_bias = bool(_get(config, "mlp_bias", False))
    return _rope_family(config, layers, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, tied=True)


def _gemma(config: Mapping[str, Any], layers: tuple[Layer, ...], **overrides: Any) -> DecoderConfig:
    """What Gemma 2 and 3 have in common."""
    bias = bool(_get(config, "attention_bias", False))
    return _rope_family(
        config,
        layers,
        activation=_activation(_get(config, "hidden_activation", "gelu_pytorch_tanh")),
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=size(config, "hidden_size") ** 0.5,
        attention_scale=real(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        qkv_bias=bias,
        out_bias=bias,
        **{"tied": True, **overrides},
    )


def _gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    window = _window(config, 4096)
    rope = _rope(config, 10000.0)
    sliding = _layer_types(config, lambda index: index % 2 == 0)
    return _gemma(
        config,
        tuple(Layer(rope, window if slides else None) for slides in sliding),
        attention_softcap=_softcap(config, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(config, "final_logit_softcapping", 30.0),
    )


def _gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    window = _window(config, 4096)
    pattern = size(config, "sliding_window_pattern", 6)
    far = _rope(config, 1000000.0, "full_attention")
    if config.get("rope_parameters"):
        near = _rope(config, 10000.0, "sliding_attention")
    else:
        # In the older layout the scaling is that of the global layers alone.
        near = Rope(real(config, "rope_local_base_freq", 10000.0))
    sliding = _layer_types(config, lambda index: (index + 1) % pattern != 0)
    return _gemma(
        config,
        tuple(Layer(near, window) if slides else Layer(far, None) for slides in sliding),
        attention_softcap=_softcap(config, "attn_logit_softcapping"),
        final_softcap=_softcap(config, "final_logit_softcapping"),
        qk_norm=True,
    )


def _gpt2(config: Mapping[str, Any]) -> DecoderConfig:
    hidden, num_heads = size(config, "n_embd"), size(config, "n_head")
    if hidden % num_heads:
        raise ValueError(
            f"expected a number of heads that divides the {hidden} coordinates of a position, got"
            f" {num_heads}; use the checkpoint's own config"
        )
    scaled = bool(_get(config, "scale_attn_weights", True))
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "expected GPT-2 without scale_attn_by_inverse_layer_idx, got a config that sets it"
        )
    return DecoderConfig(
        family="gpt2",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "n_inner", 4 * hidden),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=size({"head_dim": hidden // num_heads}, "head_dim", most=WIDEST_HEAD),
        context=size(config, "n_positions"),
        layers=(Layer(None, None),) * _layers(config, "n_layer"),
        activation=_activation(_get(config, "activation_function", "gelu_new")),
        norm_eps=real(config, "layer_norm_epsilon", 1e-5),
        attention_scale=(hidden // num_heads) ** -0.5 if scaled else 1.0,
        tied=bool(_get(config, "tie_word_embeddings", True)),
        norm="layer",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        eos=_eos(config),
    )


@shown
@dataclasses.dataclass(frozen=True)
class Family:
    """How to read one `model_type`: the entries without a default, and the reader."""

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], DecoderConfig]


_ROPE_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

FAMILIES: dict[str, Family] = {
    "gemma2": Family(_ROPE_REQUIRED, _gemma2),
    "gemma3_text": Family(_ROPE_REQUIRED, _gemma3),
    "gpt2": Family(("vocab_size", "n_embd", "n_head", "n_layer", "n_positions"), _gpt2),
    "llama": Family(_ROPE_REQUIRED, _llama),
    "mistral": Family(_ROPE_REQUIRED, _mistral),
    "qwen2": Family(_ROPE_REQUIRED, _qwen2),
    "qwen3": Family(_ROPE_REQUIRED, _qwen3),
    "smollm3": Family(_ROPE_REQUIRED, _smollm3),
}
