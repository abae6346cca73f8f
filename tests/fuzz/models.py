"""What is corrupted: tiny models, as files in memory, and GGUF files by their parts."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.fixtures_io import builders

FAMILIES = ("llama3", "qwen3", "smollm3", "gemma3", "gpt2")
GGUF_KINDS = {"llama3": "llama", "qwen2": "qwen2", "gemma2": "gemma2", "gpt2": "gpt2"}
TURNS = [2, 3]
"""EOS of the directories: two, so that the template says which ends a turn."""


@functools.cache
def directories() -> tuple[dict[str, bytes], ...]:
    """Directories in the Hugging Face layout, as contents by name; the last one is sharded."""
    found = []
    for family in (*FAMILIES, "smollm2"):
        with tempfile.TemporaryDirectory() as folder:
            path = builders.directory(Path(folder) / "model", family)
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": TURNS}))
            if family == "smollm2":
                builders.shard(path, 2)
                (path / "chat_template.jinja").write_text(builders.TEMPLATE)
            found.append({file.name: file.read_bytes() for file in path.iterdir()})
    return tuple(found)


TYPES: dict[type, int] = {bool: 7, int: 4, float: 6, str: 8}
"""The codes of GGUF's value types."""


@dataclasses.dataclass
class Parts:
    """A GGUF file by its parts: metadata (key, value), tensors (name, shape, kind, offset) and
    their bytes.  Values are Python's, `Raw` ones as they are.
    """

    metadata: list[tuple[str, Any]]
    tensors: list[tuple[str, tuple[int, ...], int, int]]
    data: bytes

    def joined(self) -> bytes:
        head = b"".join(_text(key) + _value(value) for key, value in self.metadata)
        for name, shape, kind, offset in self.tensors:
            sizes = b"".join(_whole("Q", size) for size in shape)
            head += _text(name) + _whole("I", len(shape)) + sizes
            head += _whole("I", kind) + _whole("Q", offset)
        start = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.metadata)) + head
        return start + bytes(-len(start) % 32) + self.data


@dataclasses.dataclass(frozen=True)
class Raw:
    """The bytes of a value, its type's code included."""

    content: bytes


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _whole(code: str, value: int) -> bytes:
    return struct.pack("<" + code, value % (1 << 8 * struct.calcsize("<" + code)))


def _scalar(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    return bytes([value]) if isinstance(value, bool) else _whole("I", value)


def _value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.content
    if not isinstance(value, list):
        return _whole("I", TYPES[type(value)]) + _scalar(value)
    kind = TYPES[type(value[0])] if value else 4
    items = b"".join(_scalar(item) for item in value)
    return _whole("I", 9) + _whole("I", kind) + _whole("Q", len(value)) + items


@functools.cache
def gguf_files() -> tuple[Parts, ...]:
    """GGUF files with a byte-level tokenizer, and one with sentencepiece's."""
    found = []
    for family, architecture in GGUF_KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = builders.directory(Path(folder) / "model", family)
            config = json.loads((source / "config.json").read_text())
            tensors = builders.converted(
                architecture, config, builders.load_file(source / "model.safetensors")
            )
        if "sliding_window" in config and architecture == "gemma2":
            config_extra = {"attention__sliding_window": config["sliding_window"]}
        else:
            config_extra = {}
        metadata: dict[str, Any] = {"general.architecture": architecture}
        metadata |= builders.gguf_metadata(architecture, config, **config_extra)
        metadata["tokenizer.ggml.eot_token_id"] = TURNS[1]
        found.append(_parts(metadata, tensors))
    sentencepiece = {**dict(found[0].metadata), "tokenizer.ggml.model": "llama"}
    tokens = sentencepiece["tokenizer.ggml.tokens"]
    sentencepiece["tokenizer.ggml.scores"] = [-float(rank) for rank in range(len(tokens))]
    return (*found, Parts(list(sentencepiece.items()), found[0].tensors, found[0].data))


def _parts(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Parts:
    entries, data = [], b""
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.F32
        entries.append((name, array.shape[::-1], int(kind), len(data)))
        data += np.ascontiguousarray(array, "<f4").tobytes()
        data += bytes(-len(data) % 32)
    return Parts(list(metadata.items()), entries, data)
