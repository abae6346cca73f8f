"""Tiny model files written on the fly: Hugging Face directories and GGUF files of the same weights.

GGUF's conventions are restated here independently of the code under test: tensor names come from
the `gguf` package's own map, the changes that converters make to weights are written out as
llama.cpp makes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

FIXTURES = Path(__file__).parent.parent / "fixtures"

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "in")]
TOKENS = [
    *SPECIAL,
    *"abcdefghijklmnopqrstuvwxyz0123456789ĠĊ.,:?!",
    *("".join(pair) for pair in MERGES),
]
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor"
    " %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)


def backend(
    tokens: Sequence[str] = TOKENS, special: Sequence[str] = SPECIAL
) -> tokenizers.Tokenizer:
    """A byte-level BPE over a handful of characters."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def directory(path: Path, family: str, **changes: Any) -> Path:
    """A checkpoint of `fixtures/` with a tokenizer; `changes` are made to its config.json, None
    deletes an entry.
    """
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / family / "model.safetensors", path)
    config = json.loads((FIXTURES / family / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    backend().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    return path


def shard(path: Path, parts: int) -> list[Path]:
    """Split a directory's model.safetensors into shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, files = sorted(tensors), []
    places = {}
    for part in range(parts):
        files.append(path / f"model-{part + 1:05}-of-{parts:05}.safetensors")
        own = names[part::parts]
        save_file({name: tensors[name] for name in own}, files[-1])
        places |= dict.fromkeys(own, files[-1].name)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return files


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file; `kinds` are the block formats of tensors that are already quantised."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_metadata(
    tokens: Sequence[str] = TOKENS, special: Sequence[str] = SPECIAL
) -> dict[str, Any]:
    """The same tokenizer as `backend`, as GGUF metadata."""
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [control if token in special else normal for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def halves_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What converters do to q and k of llama: in each head, row 2i + b is row i + b d/2 of the
    checkpoint.
    """
    size = weight.shape[0] // heads
    order = [
        head * size + index + half * size // 2
        for head in range(heads)
        for index in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def converted(
    architecture: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A checkpoint's tensors with the names and the changes of a converter to GGUF."""
    enum = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(enum, config.get("num_hidden_layers") or config["n_layer"])
    out = {}
    for name, array in tensors.items():
        stem = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stem is not None, name
        if architecture in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            array = halves_to_pairs(
                array,
                config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"],
            )
        elif architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            array = array + 1
        elif architecture == "gpt2" and name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            array = array.T
        out[stem] = array
    return out


def gguf_metadata(architecture: str, config: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """A checkpoint's config as GGUF metadata, with the tokenizer; `extra` entries get the
    architecture's prefix.
    """
    if architecture == "gpt2":
        entries = {
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "block_count": config["n_layer"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    else:
        entries = {
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "block_count": config["num_hidden_layers"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        }
        if config.get("head_dim"):
            entries["attention.key_length"] = config["head_dim"]
    entries |= {key.replace("__", "."): value for key, value in extra.items()}
    return {f"{architecture}.{key}": value for key, value in entries.items()} | tokenizer_metadata()


def gguf_of(path: Path, architecture: str, source: Path, **extra: Any) -> Path:
    """The GGUF conversion of a directory made by `directory`."""
    config = json.loads((source / "config.json").read_text())
    tensors = converted(architecture, config, load_file(source / "model.safetensors"))
    return write_gguf(path, architecture, gguf_metadata(architecture, config, **extra), tensors)
