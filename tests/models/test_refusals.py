"""Damaged files are refused by name, whatever they do to who reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import gguf_file
from models.refusals import LONGEST, reading
from tests.models.fixtures_io import builders


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return builders.directory(tmp_path / "model", "smollm2")


def raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (raises(KeyError("x")), "a thing, got KeyError: 'x'; fetch the file again"),
        (raises(RecursionError()), "a thing, got RecursionError; fetch"),
        (raises(ValueError("nonsense")), "a thing, got ValueError: nonsense; fetch"),
        (raises(ValueError("expected 1, got 2; count")), "expected 1, got 2; count$"),
        (raises(type("Panic", (BaseException,), {})("gone")), "a thing, got Panic: gone; fetch"),
        (raises(ValueError("expected " + "x" * LONGEST)), "expected x* [.]{3} x*$"),
    ],
)
def test_every_error_names_the_file(act: Callable[[], None], message: str):
    with pytest.raises(ValueError, match=rf"^a/b\.json: (expected )?{message}") as caught:
        with reading("a/b.json", "a thing"):
            act()
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), FileNotFoundError("a"), ImportError("b"), SystemExit(3)],
)
def test_interrupts_and_the_systems_errors_stay_what_they_are(error: BaseException):
    with pytest.raises(type(error)) as caught, reading("a/b.json", "a thing"):
        raise error
    assert caught.value is error


DEEP = "[" * 100_000 + "]" * 100_000
COUNTS = {
    "num_hidden_layers": [10**6, 10**9, 10**30, -1, 0, 2.5, "many", True, [2], float("nan")],
    "num_attention_heads": [10**6, 0, None, 3],
    "num_key_value_heads": [10**6, 3],
    "head_dim": [10**9, 7],
    "vocab_size": [10**9, -1],
    "hidden_size": [10**12],
    "rope_theta": [float("nan"), -1, "x"],
    "rms_norm_eps": [float("inf"), "x"],
    "rope_scaling": ["x", [1], {"rope_type": 3}, {"rope_type": "yarn", "factor": float("nan")}],
    "hidden_act": [["silu"], 3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in COUNTS.items() for value in values]
)
def test_a_configuration_of_wrong_counts_and_types(directory: Path, name: str, value: Any):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if config.get("rope_parameters") and name.startswith("rope_"):
        del config["rope_parameters"]
    path.write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=r"config\.json: expected .*(got|absent)"):
        models.load(directory)


@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' + DEEP + "}", '{"vocab_size": ' + "9" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_deep_nesting_and_endless_numbers(directory: Path, name: str, text: str):
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got .*; fetch the file again"):
        models.load(directory)


@pytest.mark.parametrize(
    "entries",
    [
        {"bos_token": 3},
        {"chat_template": 3},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [3]},
    ],
)
def test_settings_of_wrong_types(directory: Path, entries: dict[str, Any]):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected .*fetch"):
        models.load(directory)


def test_padding_changes_neither_the_end_nor_any_text(directory: Path):
    """What was encoded before padding was off took <s> in front for what ends a turn."""
    turns = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1, 3]}))
    (directory / "chat_template.jinja").write_text(turns)
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    pad = {"pad_id": 1, "pad_type_id": 0, "pad_token": "<s>", "pad_to_multiple_of": None}
    for strategy in ({"Fixed": 8}, {"Fixed": 10**9}, "BatchLongest"):
        document["padding"] = pad | {"strategy": strategy, "direction": "Left"}
        document["truncation"] = {
            **{"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
        }
        path.write_text(json.dumps(document))
        _, tokenizer = models.load(directory)
        assert tokenizer.eos == 3
        assert tokenizer.encode("abcd") == builders.backend().encode("abcd").ids


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(directory: Path, value: float):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"model: expected finite weights, got .* in .*1\.mlp\.down_proj.*\(1 of"
    ):
        models.load(directory)


def test_weights_beyond_a_type_are_named_and_large_ones_are_not(directory: Path):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = 3e38  # their sum is no number
    save_file(tensors, path)
    models.load(directory)
    with pytest.raises(ValueError, match=r"as float16\).*pass dtype=jnp\.float32"):
        models.load(directory, dtype=jnp.float16)


def gguf_with(path: Path, source: Path, **entries: Any) -> Path:
    """A GGUF file whose metadata has these entries in place of its own."""
    config = json.loads((source / "config.json").read_text())
    tensors = builders.converted("llama", config, load_file(source / "model.safetensors"))
    metadata = builders.gguf_metadata("llama", config)
    metadata |= {key.replace("__", "."): value for key, value in entries.items()}
    return builders.write_gguf(path, "llama", metadata, tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama__block_count", 10**6),
        ("llama__block_count", 2**32 - 1),
        ("llama__attention__head_count", 2**32 - 1),
        ("llama__embedding_length", 2**31),
        ("llama__rope__freq_base", float("nan")),
        ("llama__attention__layer_norm_rms_epsilon", float("nan")),
        ("tokenizer__ggml__merges", "x"),
        ("tokenizer__ggml__model", ["x"]),
        ("tokenizer__ggml__pre", ["x"]),
        ("general__architecture", 3),
    ],
)
def test_gguf_of_wrong_counts_and_types(tmp_path: Path, directory: Path, key: str, value: Any):
    path = gguf_with(tmp_path / "a.gguf", directory, **{key: value})
    with pytest.raises(ValueError, match=r"a\.gguf: expected .*got"):
        models.load(path)


def test_nothing_is_dequantised_before_its_name_is_known(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
):
    def read(self: Any, name: str) -> np.ndarray:
        raise AssertionError(name)

    monkeypatch.setattr(gguf_file.GGUFFile, "dequantised_tensor", read)
    config = json.loads((directory / "config.json").read_text())
    tensors = builders.converted("llama", config, load_file(directory / "model.safetensors"))
    tensors["more"] = np.zeros((2, 32), np.float32)
    path = tmp_path / "a.gguf"
    builders.write_gguf(path, "llama", builders.gguf_metadata("llama", config), tensors)
    with pytest.raises(ValueError, match=r"a\.gguf: expected the tensors .*\n.*unexpected: more"):
        models.load(path)


def test_tensors_may_not_share_their_bytes(tmp_path: Path):
    """A small file could hold any number of large tensors."""
    path = tmp_path / "a.gguf"
    builders.write_gguf(
        path, "llama", {}, {name: np.zeros(64, np.float32) for name in ("one", "two", "three")}
    )
    raw = path.read_bytes()
    places = [raw.index(name) + len(name) + 4 + 8 + 4 for name in (b"two", b"three")]
    for place in places:
        raw = raw[:place] + bytes(8) + raw[place + 8 :]
    path.write_bytes(raw[: len(raw) - 512])
    with pytest.raises(ValueError, match=r"a\.gguf: expected 768 bytes behind the header for 3"):
        gguf_file.read(path)


def test_a_long_token_of_sentencepiece_is_cut_where_tokens_end(tmp_path: Path, directory: Path):
    tokens = [*builders.TOKENS[:-1], "a" * 200_000]
    entries = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [0.0] * len(tokens),
    }
    _, tokenizer = models.load(gguf_with(tmp_path / "a.gguf", directory, **entries))
    assert tokenizer.encode("th")
