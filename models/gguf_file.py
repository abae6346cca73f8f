"""Reading GGUF files: a bounds-checked header parser and parallel dequantisation.

The header is parsed here rather than by `gguf.GGUFReader`, which takes seconds for a vocabulary of
50,000 strings (each command that loads a model would pay that) and fails on damaged files with
errors that do not name the damage.  Types, block sizes and dequantisation come from the `gguf`
package.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from ppl.showing import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
BLOCKS_PER_ROW = 4096

_SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}


@shown
@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in the file: numpy `shape`, block format `kind`, and its bytes [offset,
    offset + size).
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


@shown
@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A parsed GGUF header: metadata values by key, tensor places by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def entry(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata value of `key`, or `default`; raises ValueError if it is absent without
        default or no `kind`.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(
                f"{self.path}: expected metadata entry {key} of type {kind.__name__}, got"
                f" {value!r};"
                " the file is incomplete or damaged: fetch or convert it again"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The metadata value of `key`, written as a truth value or as a number 0 or 1, or
        `default`; raises ValueError if it is neither.
        """
        value = self.entry(key, int, default)
        if value not in (0, 1):
            raise ValueError(
                f"{self.path}: expected metadata entry {key} to be true or false, got {value};"
                " the file is damaged: fetch or convert it again"
            )
        return bool(value)

    def entries(self, key: str, kind: type) -> list[Any]:
        """The metadata list of `key`, empty if absent; raises ValueError if it is no list of
        `kind`.
        """
        values = self.entry(key, list, [])
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(
                f"{self.path}: expected metadata entry {key} to hold only {kind.__name__}, got"
                " other values;"
                " the file is damaged: fetch or convert it again"
            )
        return values

    def dequantised(self) -> dict[str, np.ndarray]:
        """All tensors as float32 arrays, by GGUF name.

        Raises:
            ValueError: if a tensor has a block format which the `gguf` package cannot dequantise.
        """
        # numpy releases the interpreter lock inside its loops, so threads shorten the wait on every
        # core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            largest_first = sorted(self.tensors, key=lambda name: -self.tensors[name].size)
            return dict(
                zip(largest_first, pool.map(self.dequantised_tensor, largest_first), strict=True)
            )

    def dequantised_tensor(self, name: str) -> np.ndarray:
        """One tensor as a float32 array; raises as `dequantised` does."""
        tensor = self.tensors[name]
        data = np.memmap(self.path, mode="r", dtype=np.uint8)
        _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        # Blocks are independent and `dequantize` takes 16 rows at a time: long rows make it three
        # times faster.
        row = block_bytes * math.gcd(tensor.size // block_bytes, BLOCKS_PER_ROW)
        rows = data[tensor.offset : tensor.offset + tensor.size].reshape(-1, row)
        try:
            return np.asarray(dequantize(rows, tensor.kind), np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(
                "expected a block format that the gguf package can dequantise, got"
                f" {tensor.kind.name} for tensor"
                f" {name!r} in {self.path}; use a Q4, Q5, Q6, Q8, F16 or BF16 conversion of the"
                " model"
            ) from error


class _Cursor:
    """Reads the header from front to back and refuses to run past the end of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.offset = path, data, 0

    def require(self, size: int, what: str) -> int:
        """Advance by `size` bytes; returns where they begin."""
        start, self.offset = self.offset, self.offset + size
        if self.offset > len(self.data):
            raise damaged(
                self.path,
                f"{size} more bytes for {what} at offset {start}",
                f"a file that ends {len(self.data) - start} bytes later",
            )
        return start

    def numbers(self, code: str, count: int, what: str) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(
            layout, self.data, self.require(count * struct.calcsize("<" + code), what)
        )

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def string(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.require(size, what)
        try:
            return bytes(self.data[start : start + size]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(
                self.path, f"UTF-8 text for {what} at offset {start}", str(error)
            ) from error

    def value_type(self, what: str) -> gguf.GGUFValueType:
        code = self.number("I", what)
        try:
            return gguf.GGUFValueType(code)
        except ValueError as error:
            raise damaged(
                self.path, f"a GGUF value type (0 to 12) for {what}", f"{code}"
            ) from error

    def value(self, kind: gguf.GGUFValueType, what: str) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string(what)
        if kind != gguf.GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind], what)
        element = self.value_type(what)
        if element == gguf.GGUFValueType.ARRAY:
            raise damaged(
                self.path, f"an array of scalars or strings for {what}", "an array of arrays"
            )
        count = self.number("Q", what)
        if element in _SCALARS:
            return list(self.numbers(_SCALARS[element], count, what))
        return [self.string(what) for _ in range(count)]


def read(path: str | Path) -> GGUFFile:
    """Parse the header of a GGUF file and check that all the data it announces is there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not GGUF, is truncated, or its header is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a GGUF file, got {path}, which does not exist; check the path"
        )
    if path.stat().st_size < len(MAGIC):
        raise damaged(
            path,
            "a file that begins with the four bytes 'GGUF'",
            f"{path.stat().st_size} bytes in all",
        )
    cursor = _Cursor(path, memoryview(np.memmap(path, mode="r", dtype=np.uint8).data))
    _check_start(cursor)
    num_tensors, num_entries = cursor.numbers("Q", 2, "the numbers of tensors and metadata entries")
    metadata: dict[str, Any] = {}
    for index in range(num_entries):
        key = cursor.string(f"the name of metadata entry {index}")
        metadata[key] = cursor.value(
            cursor.value_type(f"metadata entry {key!r}"), f"metadata entry {key!r}"
        )
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"{path}: expected a whole model in one file, got one of {parts} parts;"
            " merge them with llama.cpp's llama-gguf-split --merge"
        )
    infos = [_tensor_info(cursor, index) for index in range(num_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(path, "a positive whole number for general.alignment", repr(alignment))
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, code, offset in infos:
        if name in tensors:
            raise damaged(path, "each tensor once", f"{name!r} twice")
        tensors[name] = _placed(cursor, name, shape, code, start + offset)
    announced = sum(tensor.size for tensor in tensors.values())
    if announced > len(cursor.data) - start:
        raise damaged(
            path,
            f"{announced} bytes behind the header for {len(tensors)} tensors",
            f"{len(cursor.data) - start}",
        )
    return GGUFFile(path, metadata, tensors)


def _check_start(cursor: _Cursor) -> None:
    start = cursor.require(len(MAGIC), "the file's first bytes")
    magic = bytes(cursor.data[start : start + len(MAGIC)])
    if magic != MAGIC:
        raise damaged(cursor.path, "a file that begins with the four bytes 'GGUF'", repr(magic))
    version = cursor.number("I", "the format version")
    if version not in VERSIONS:
        raise damaged(
            cursor.path,
            f"little-endian GGUF version {' or '.join(map(str, VERSIONS))}",
            f"{version:#x}",
        )


def _tensor_info(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {index}")
    num_dimensions = cursor.number("I", f"the rank of tensor {name!r}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise damaged(
            cursor.path, f"a rank of 1 to {MAX_DIMENSIONS} for tensor {name!r}", f"{num_dimensions}"
        )
    shape = cursor.numbers("Q", num_dimensions, f"the shape of tensor {name!r}")
    code = cursor.number("I", f"the block format of tensor {name!r}")
    offset = cursor.number("Q", f"the offset of tensor {name!r}")
    return name, shape[::-1], code, offset  # GGUF writes the fastest axis first


def _placed(
    cursor: _Cursor, name: str, shape: tuple[int, ...], code: int, offset: int
) -> StoredTensor:
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError as error:
        raise damaged(
            cursor.path, f"a known block format for tensor {name!r}", f"format code {code}"
        ) from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape:
        raise damaged(cursor.path, f"a shape of positive numbers for tensor {name!r}", f"{shape}")
    if shape[-1] % block:
        raise damaged(
            cursor.path,
            f"rows of a multiple of {block} values for {kind.name} tensor {name!r}",
            f"rows of {shape[-1]}",
        )
    # math.prod is exact where numpy's would wrap around to a plausible size.
    size = math.prod(shape) // block * block_bytes
    cursor.offset = offset
    cursor.require(size, f"tensor {name!r}")
    return StoredTensor(shape, kind, offset, size)


def damaged(path: Path, expected: str, received: str) -> ValueError:
    """The error for a file which is not GGUF, truncated or corrupted."""
    return ValueError(
        f"{path}: expected {expected}, got {received}; the file is damaged, truncated or not GGUF:"
        " delete it and fetch or convert it again"
    )
