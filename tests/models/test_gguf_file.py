"""The GGUF reader against the `gguf` package's own, and on damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from models import gguf_file

from .fixtures_io import builders

RANDOM = np.random.default_rng(0)
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    metadata = builders.gguf_metadata(
        "llama",
        {
            "max_position_embeddings": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        rope__freq_base=5e5,
    )
    tensors = {
        "token_embd.weight": RANDOM.normal(size=(52, 32)),
        "output_norm.weight": RANDOM.normal(size=32),
    }
    return builders.write_gguf(
        tmp_path / "tiny.gguf",
        "llama",
        metadata,
        {name: array.astype(np.float32) for name, array in tensors.items()},
    )


def test_metadata_and_tensors_equal_those_of_the_gguf_package(path: Path):
    file, reference = gguf_file.read(path), gguf.GGUFReader(path)
    expected = {
        key: field.contents()
        for key, field in reference.fields.items()
        if not key.startswith("GGUF.")
    }
    assert dict(file.metadata) == expected
    arrays = file.dequantised()
    assert list(sorted(arrays)) == sorted(tensor.name for tensor in reference.tensors)
    for tensor in reference.tensors:
        np.testing.assert_array_equal(arrays[tensor.name], tensor.data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32), (256,)])
def test_every_block_format_dequantises_as_the_gguf_package_does(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
):
    format = gguf.GGMLQuantizationType[kind]
    weights = RANDOM.normal(size=shape).astype(np.float32)
    stored = quantize(weights, format)
    path = builders.write_gguf(tmp_path / "q.gguf", "llama", {}, {"w": stored}, kinds={"w": format})
    array = gguf_file.read(path).dequantised()["w"]
    assert array.shape == shape and array.dtype == np.float32
    np.testing.assert_array_equal(array, dequantize(stored, format))
    assert np.abs(array - weights).max() < 0.5  # a block in the wrong place would be off by more


def test_every_truncation_is_refused(path: Path, tmp_path: Path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    data_start = gguf_file.read(path).tensors["token_embd.weight"].offset
    for length in (*range(0, data_start, 31), data_start, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(
            ValueError,
            match="damaged, truncated or not GGUF: delete it and fetch or convert it again",
        ):
            gguf_file.read(cut)


def test_a_truncated_file_names_what_is_missing(path: Path, tmp_path: Path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-4])
    with pytest.raises(
        ValueError,
        match=r"cut\.gguf: expected 128 more bytes for tensor 'output_norm\.weight'.*124",
    ):
        gguf_file.read(cut)


def test_a_flipped_bit_in_the_header_is_refused_or_harmless(path: Path, tmp_path: Path):
    whole = bytearray(path.read_bytes())
    end = gguf_file.read(path).tensors["token_embd.weight"].offset
    flipped, refused = tmp_path / "flipped.gguf", 0
    for offset in RANDOM.integers(0, end, 200):
        bit = 1 << int(RANDOM.integers(8))
        whole[offset] ^= bit
        flipped.write_bytes(whole)
        whole[offset] ^= bit
        try:
            gguf_file.read(flipped).dequantised()
        except ValueError as error:
            refused += str(flipped) in str(error)
    assert refused > 10


def damaged(path: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    whole = path.read_bytes()
    assert whole.count(old) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(whole.replace(old, new))
    return other


def test_other_file_types_are_refused(tmp_path: Path):
    for content in (b"PK\x03\x04 a zip file", b"", b"<html>not found</html>", b"GGU"):
        path = tmp_path / "wrong.gguf"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="expected a file that begins with the four bytes 'GGUF', got"
        ):
            gguf_file.read(path)
    with pytest.raises(
        FileNotFoundError, match=r"expected a GGUF file, got .*absent\.gguf, which does not exist"
    ):
        gguf_file.read(tmp_path / "absent.gguf")


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused(path: Path, tmp_path: Path, version: int):
    other = damaged(
        path, tmp_path, b"GGUF\x03\x00\x00\x00", b"GGUF" + version.to_bytes(4, "little")
    )
    with pytest.raises(
        ValueError, match=rf"expected little-endian GGUF version 2 or 3, got {version:#x}"
    ):
        gguf_file.read(other)


NAME = b"\x12\x00\x00\x00\x00\x00\x00\x00output_norm.weight"
INFO = NAME + (1).to_bytes(4, "little") + (32).to_bytes(8, "little") + (0).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("rank", "size", "kind", "message"),
    [
        (9, 32, 0, "expected a rank of 1 to 4 for tensor 'output_norm.weight', got 9"),
        (
            1,
            0,
            0,
            r"expected a shape of positive numbers for tensor 'output_norm.weight', got \(0,\)",
        ),
        (
            1,
            32,
            999,
            "expected a known block format for tensor 'output_norm.weight', got format code 999",
        ),
        (
            1,
            33,
            8,
            "expected rows of a multiple of 32 values for Q8_0 tensor 'output_norm.weight', got"
            " rows of 33",
        ),
        (1, 1 << 62, 0, "more bytes for tensor 'output_norm.weight'"),
    ],
)
def test_a_damaged_tensor_entry_is_named(
    path: Path, tmp_path: Path, rank: int, size: int, kind: int, message: str
):
    entry = (
        NAME + rank.to_bytes(4, "little") + size.to_bytes(8, "little") + kind.to_bytes(4, "little")
    )
    with pytest.raises(ValueError, match=message):
        gguf_file.read(damaged(path, tmp_path, INFO, entry))


def test_a_block_format_that_cannot_be_dequantised_is_named(tmp_path: Path):
    kind = gguf.GGMLQuantizationType.Q8_K
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = builders.write_gguf(tmp_path / "q8k.gguf", "llama", {}, {"w": block}, kinds={"w": kind})
    with pytest.raises(
        ValueError, match="got Q8_K for tensor 'w' in .*q8k.gguf; use a Q4, Q5, Q6, Q8, F16 or BF16"
    ):
        gguf_file.read(path).dequantised()


def test_a_part_of_a_split_model_is_refused(tmp_path: Path):
    path = builders.write_gguf(
        tmp_path / "m-00001-of-00003.gguf", "llama", {"split.count": 3}, {"w": np.zeros(4)}
    )
    with pytest.raises(
        ValueError, match=r"expected a whole model in one file, got one of 3 parts; merge them with"
    ):
        gguf_file.read(path)


def test_entries_of_the_wrong_type_are_named(path: Path):
    file = gguf_file.read(path)
    with pytest.raises(
        ValueError,
        match=r"tiny\.gguf: expected metadata entry llama\.block_count of type str, got 1",
    ):
        file.entry("llama.block_count", str)
    with pytest.raises(
        ValueError, match=r"expected metadata entry llama\.absent of type int, got None"
    ):
        file.entry("llama.absent", int)
    with pytest.raises(
        ValueError, match=r"expected metadata entry tokenizer\.ggml\.tokens to hold only int"
    ):
        file.entries("tokenizer.ggml.tokens", int)
