"""GGUF conversions of the reference checkpoints: the same model as through safetensors, and
transformers' logits.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from models import gguf_file, gguf_to_hf, transformer
from models.config import DecoderConfig, Rope
from ppl.lm import LM

from .fixtures_io import builders

ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
# What GGUF does not store is what its readers assume, so these checkpoints are changed to what they
# assume.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smollm2": ("llama", {}, {}),
    "llama2": ("llama", {}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
    "qwen3": ("qwen3", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "layer_types": None}, {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1]}, {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16},
        {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "attention__sliding_window": 5,
        },
    ),
    "gemma3": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3},
        {
            "attention__sliding_window": 5,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
}
UNCHANGED = [name for name, (_, changes, _) in CASES.items() if not changes]


def both(tmp_path: Path, name: str) -> tuple[LM, LM]:
    """One checkpoint through safetensors and through GGUF."""
    architecture, changes, extra = CASES[name]
    source = builders.directory(tmp_path / name, name, **changes)
    path = builders.gguf_of(tmp_path / f"{name}.gguf", architecture, source, **extra)
    return models.load(source)[0], models.load(path)[0]


def config_of(lm: LM) -> DecoderConfig:
    assert isinstance(lm.static, DecoderConfig)
    return lm.static


@pytest.mark.parametrize("name", CASES)
def test_gguf_and_safetensors_give_the_same_model(tmp_path: Path, name: str):
    expected, got = both(tmp_path, name)
    want, have = config_of(expected), config_of(got)
    assert have.norm_eps == pytest.approx(want.norm_eps)
    assert dataclasses.replace(have, norm_eps=want.norm_eps, eos=want.eos) == want
    assert got.eos == expected.eos == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected.params, got.params
    )


@pytest.mark.parametrize("name", UNCHANGED)
def test_logits_of_the_gguf_model_are_those_of_transformers(tmp_path: Path, name: str):
    _, got = both(tmp_path, name)
    reference = load_file(builders.FIXTURES / name / "expected.safetensors")
    logits = transformer.forward(config_of(got), got.params, jnp.asarray(reference["ids"]))
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)


def test_without_undoing_the_rotary_order_the_logits_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_to_hf, "pairs_to_halves", lambda weight, heads: weight)
    _, got = both(tmp_path, "smollm2")
    reference = load_file(builders.FIXTURES / "smollm2" / "expected.safetensors")
    logits = transformer.forward(config_of(got), got.params, jnp.asarray(reference["ids"]))
    assert np.abs(logits - reference["logits"]).max() > 0.1


@pytest.mark.parametrize(("heads", "rows"), [(1, 2), (2, 16), (3, 24)])
def test_pairs_to_halves_undoes_the_converters_order(heads: int, rows: int):
    weight = np.arange(rows * 5, dtype=np.float32).reshape(rows, 5)
    pairs = builders.halves_to_pairs(weight, heads)
    np.testing.assert_array_equal(gguf_to_hf.pairs_to_halves(pairs, heads), weight)
    np.testing.assert_array_equal(gguf_to_hf.pairs_to_halves(pairs[:, 0], heads), weight[:, 0])


def llama3_file(tmp_path: Path, divisors: np.ndarray) -> Path:
    source = builders.directory(tmp_path / "llama3", "llama3")
    config = json.loads((source / "config.json").read_text())
    tensors = builders.converted("llama", config, load_file(source / "model.safetensors"))
    tensors["rope_freqs.weight"] = divisors.astype(np.float32)
    metadata = builders.gguf_metadata("llama", config, rope__freq_base=500000.0)
    return builders.write_gguf(tmp_path / "llama3.gguf", "llama", metadata, tensors)


def llama3_divisors(low: float = 1.0) -> np.ndarray:
    """The loop of transformers' llama3 frequencies, one frequency at a time."""
    divisors = []
    for index in range(4):
        wavelength = 2 * np.pi * 500000.0 ** (index / 4)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / low:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - low) / (4 - low)
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    return np.array(divisors)


def test_llama3_scaling_is_read_off_its_divisors(tmp_path: Path):
    lm, _ = models.load(llama3_file(tmp_path, llama3_divisors()))
    rope = config_of(lm).layers[0].rope
    assert rope is not None
    assert (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context) == (
        32.0,
        1.0,
        4.0,
        8192,
    )


def test_other_divisors_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"expected rope_freqs\.weight of llama3 scaling .*, got \[1\.0, 2\.0, 3\.0",
    ):
        models.load(llama3_file(tmp_path, np.array([1.0, 2.0, 3.0, 4.0])))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope__scale_linear": 4.0}, Rope(10000.0, 4.0)),
        ({"rope__scaling__factor": 4.0}, Rope(10000.0, 4.0)),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0}, Rope(10000.0, 2.0)),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, Rope(10000.0)),
        ({"rope__scale_linear": 0.0}, Rope(10000.0)),
        ({"rope__freq_base": 5000}, Rope(5000.0)),
    ],
)
def test_linear_scaling_of_either_name(tmp_path: Path, entries: dict[str, Any], expected: Rope):
    lm, _ = models.load(smollm2(tmp_path, **entries))
    assert config_of(lm).layers[0].rope == expected


def test_yarn_scaling_is_that_of_the_same_config_json(tmp_path: Path):
    entries = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 8.0}
    entries = {f"rope__scaling__{name}": value for name, value in entries.items()}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    raw = json.loads((builders.FIXTURES / "smollm2" / "config.json").read_text())
    raw["rope_parameters"] = {**scaling, "rope_theta": 10000.0, "beta_fast": 8.0}
    expected = DecoderConfig.from_hf(raw).layers[0].rope
    assert expected is not None and expected.magnitude > 1
    assert config_of(models.load(smollm2(tmp_path, **entries))[0]).layers[0].rope == expected
    louder = smollm2(tmp_path, **entries, rope__scaling__attn_factor=2.0)
    found = config_of(models.load(louder)[0]).layers[0].rope
    assert found == dataclasses.replace(expected, magnitude=2 * expected.magnitude)


def test_entries_per_layer_that_are_alike_are_one(tmp_path: Path):
    entries = {"attention__head_count_kv": [2, 2, 2], "feed_forward_length": [48, 48, 48]}
    assert config_of(models.load(smollm2(tmp_path, **entries))[0]).num_kv_heads == 2


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [("gemma2", 46, 24), ("gemma3", 62, 24), ("gemma3", 26, 8)],
)
def test_only_the_largest_gemma_scales_by_the_width_per_head(
    tmp_path: Path, architecture: str, layers: int, scalar: int
):
    metadata = {
        f"{architecture}.{key}": value
        for key, value in {
            "context_length": 64,
            "embedding_length": 48,
            "feed_forward_length": 64,
            "block_count": layers,
            "attention.head_count": 2,
            "attention.key_length": 8,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.sliding_window": 16,
        }.items()
    }
    path = builders.write_gguf(
        tmp_path / "g.gguf",
        architecture,
        metadata,
        {"token_embd.weight": np.zeros((4, 48), np.float32)},
    )
    config = gguf_to_hf.config_dict(gguf_file.read(path))
    assert config["query_pre_attn_scalar"] == scalar
    every = 2 if architecture == "gemma2" else 6
    assert [
        index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"
    ] == list(range(every - 1, layers, every))


def smollm2(tmp_path: Path, drop: str = "", **entries: Any) -> Path:
    """The GGUF of the tiny SmolLM2 with metadata changed, and without the tensor or
    entry `drop`.
    """
    source = builders.directory(tmp_path / "smollm2", "smollm2")
    config = json.loads((source / "config.json").read_text())
    tensors = builders.converted("llama", config, load_file(source / "model.safetensors"))
    metadata = builders.gguf_metadata("llama", config)
    metadata |= {f"llama.{key.replace('__', '.')}": value for key, value in entries.items()}
    tensors.pop(drop, None)
    metadata.pop(drop, None)
    return builders.write_gguf(tmp_path / "smollm2.gguf", "llama", metadata, tensors)


def test_an_unknown_architecture_is_refused(tmp_path: Path):
    path = builders.write_gguf(
        tmp_path / "m.gguf", "mamba", {}, {"token_embd.weight": np.zeros((4, 8), np.float32)}
    )
    with pytest.raises(
        ValueError,
        match=r"m\.gguf: expected a dense decoder of architecture llama, .*, got 'mamba'",
    ):
        models.load(path)


@pytest.mark.parametrize(
    ("drop", "entries", "message"),
    [
        (
            "",
            {"expert_count": 8},
            "expected a dense decoder .* got a mixture of experts; choose a model",
        ),
        (
            "llama.block_count",
            {},
            r"expected metadata entry llama\.block_count of type int, got None",
        ),
        (
            "",
            {"block_count": "three"},
            r"expected metadata entry llama\.block_count of type int, got 'three'",
        ),
        (
            "",
            {"attention__head_count": 0},
            r"expected llama\.attention\.head_count from 1 to 2147483647, got 0",
        ),
        (
            "",  # some architectures list their layers
            {"block_count": 1 << 31},
            r"expected llama\.block_count from 1 to 16384, got 2147483648",
        ),
        (
            "",
            {"rope__scaling__type": "longrope"},
            "scaling none, linear, yarn or llama3, got 'long",
        ),
        ("", {"rope__scaling__type": "yarn"}, "expected yarn rope scaling with factor"),
        (
            "",
            {"rope__dimension_count": 4},
            "expected rotary embeddings over the whole head of 8 coordinates, got 4 of them",
        ),
        (
            "",
            {"attention__head_count_kv": [2, 2, 1]},
            r"expected llama.attention.head_count_kv to be alike in all layers, got \[2, 2, 1\]",
        ),
        (
            "token_embd.weight",
            {},
            r"expected a tensor token_embd\.weight, got none; convert the model again",
        ),
        ("blk.1.attn_q.weight", {}, r"missing: .*layers\.1\.self_attn\.q_proj\.weight"),
        ("", {"attention__head_count": 3}, "key/value heads that divides the 3 heads, got 2"),
        (
            "",
            {"attention__head_count": 6, "attention__head_count_kv": 3},
            r"misshapen: .*q_proj\.weight",
        ),
    ],
)
def test_a_file_that_does_not_describe_a_model_is_refused(
    tmp_path: Path, drop: str, entries: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        models.load(smollm2(tmp_path, drop, **entries))
