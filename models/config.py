"""The architecture of a decoder as one frozen, hashable value, read from a Hugging Face
`config.json`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ppl.checks import check_count
from ppl.showing import shown


@shown
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer: frequencies theta^(-2i/d), i < d/2, then scaled.

    `factor` divides every frequency (linear scaling; 1 leaves them).  With `original_context` set
    the division is Llama 3's: only wavelengths beyond `original_context / low_freq_factor` are
    divided by `factor`, those below `original_context / high_freq_factor` are kept, and what lies
    between is interpolated.  `divisors` (one for each frequency) divide instead of these, and
    cosine and sine are multiplied by `magnitude`.
    """

    theta: float
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    divisors: tuple[float, ...] = ()
    magnitude: float = 1.0


@shown
@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: the rotary embedding (or none) and the attention window
    (or none).
    """

    rope: Rope | None
    window: int | None


@shown
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything about a decoder that is not a weight.

    Attributes:
        family: the `model_type` it was read from; decides tensor names only.
        num_kv_heads: key/value heads; each serves num_heads / num_kv_heads query heads.
        context: greatest number of positions.
        layers: one `Layer` per block.
        norm: "rms" or "layer" (mean-centred, with bias); norm_offset is added to the RMS weight (1
            for Gemma).
        gated: the feed-forward part is act(gate x) * (up x) rather than act(up x).
        post_norms: norms also follow attention and feed-forward (Gemma).
        attention_scale: factor on q.k before the softmax.
        attention_softcap, final_softcap: c tanh(score / c) on attention scores and on logits, or
            None.
        learned_positions: positions are a learned table added to the embedding (GPT-2).
        tied: the output matrix is the embedding matrix.
        eos: the ids that end a string, as the checkpoint lists them (may be empty).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    layers: tuple[Layer, ...]
    activation: str
    norm_eps: float
    attention_scale: float
    tied: bool
    norm: str = "rms"
    norm_offset: float = 0.0
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    learned_positions: bool = False
    eos: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The config of a Hugging Face checkpoint, from its `config.json` as a dictionary.

        Reads the older layout (`rope_theta`, `rope_scaling`, `rope_local_base_freq`) and the newer
        one (`rope_parameters`, nested per layer type for Gemma 3); of a model of text and images
        (`gemma3`) the part for text.

        Raises:
            ValueError: if the architecture, the activation or the rope scaling is none of those
                supported, an entry that has no default is absent, or the weights are quantised.
        """
        from .families import FAMILIES, text_part

        _check_quantisation(config)
        config = text_part(config)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"expected a config whose model_type is one of {', '.join(sorted(FAMILIES))}, got"
                f" {family!r}"
                f" (architectures={config.get('architectures')}); load another checkpoint, or wrap"
                " the model with"
                " models.adapters"
            )
        absent = [name for name in FAMILIES[family].required if config.get(name) is None]
        if absent:
            raise ValueError(
                f"expected a {family} config with {', '.join(FAMILIES[family].required)}, but"
                f" {', '.join(absent)} is"
                " absent; use the checkpoint's complete config.json"
            )
        read = FAMILIES[family].read(config)
        _check_heads(read)
        return read


def _check_heads(config: DecoderConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"expected a number of key/value heads that divides the {config.num_heads} heads, got"
            f" {config.num_kv_heads}; use the checkpoint's own config.json"
        )
    if config.head_dim % 2 and any(layer.rope is not None for layer in config.layers):
        raise ValueError(
            "expected heads of even width, for rotary embeddings turn pairs of coordinates, got"
            f" {config.head_dim}; use the checkpoint's own config.json"
        )


def _check_quantisation(config: Mapping[str, Any]) -> None:
    entry = config.get("quantization_config")
    if not entry:
        return
    known = isinstance(entry, Mapping)
    details = [name for name in ("load_in_8bit", "load_in_4bit") if known and entry.get(name)]
    named = [str(entry.get(name)) for name in ("quant_method", "fmt") if known and entry.get(name)]
    raise ValueError(
        "expected weights in float32, float16 or bfloat16, got a checkpoint that is quantised"
        f" (quantization_config: {', '.join([*named, *details]) or entry}); load the unquantised"
        " checkpoint, or a GGUF conversion of it"
    )


MOST = (1 << 31) - 1
MOST_LAYERS = 1 << 14
WIDEST_HEAD = 1 << 14
"""More than any decoder has: sizes beyond are damage, and are not laid out."""


def size(config: Mapping[str, Any], name: str, default: int | None = None, most: int = MOST) -> int:
    """A size as the entry `name` gives it, or the default where that is absent or null.

    Raises:
        ValueError: if it is no whole number from 1 to `most`.
    """
    value: Any = default if config.get(name) is None else config[name]
    if not _is_number(value) or not 1 <= value <= most or value != int(value):
        raise ValueError(
            f"expected {name} to be a whole number from 1 to {most}, got {value!r}; use the"
            " checkpoint's own config.json"
        )
    return int(value)


def real(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number as the entry `name` gives it, or the default where that is absent or null.

    Raises:
        ValueError: if it is no finite number above 0.
    """
    value: Any = default if config.get(name) is None else config[name]
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"expected {name} to be a finite number above 0, got {value!r}; use the checkpoint's"
            " own config.json"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Token ids as configurations give them, one or a list.

    Raises:
        ValueError: if they are not whole numbers.
    """
    ids = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(
            f"expected {name} to be a token id or a list of token ids, got {value!r}; write whole"
            " numbers in config.json and generation_config.json"
        )
    return tuple(ids)


def small(
    vocab_size: int,
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    context: int = 128,
) -> DecoderConfig:
    """A small decoder of the Llama family, to be trained from scratch (`transformer.random`).

    Raises:
        ValueError: if a size is not at least 1, or the heads do not share the hidden size in even
            widths.
    """
    sizes = {
        "vocab_size": vocab_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "context": context,
    }
    for name, value in sizes.items():
        check_count(name, value)
    if hidden_size < 1 or hidden_size % (2 * num_heads):
        raise ValueError(
            f"expected a hidden_size that is a multiple of 2 * num_heads = {2 * num_heads}, got"
            f" {hidden_size}; rotary"
            " embeddings need heads of even width"
        )
    entries = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    }
    return DecoderConfig.from_hf(entries)
