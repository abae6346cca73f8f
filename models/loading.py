"""`models.load`: a language model and its tokenizer from a name, a directory, a GGUF file or the
Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike
from jaxtyping import Shaped

from ppl.lm import LM

from . import download, gguf_file, gguf_to_hf, gguf_tokenizer, transformer, weights
from .config import DecoderConfig
from .refusals import reading, shortened
from .tokenizer import Tokenizer, read_json

HUB_PREFIX = "hf:"
FLOATS = {"float64", "float32", "float16", "bfloat16"}
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
_HUB_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load(name_or_path: str | Path, *, dtype: DTypeLike | None = None) -> tuple[LM, Tokenizer]:
    """Load a language model and its tokenizer.

    Args:
        name_or_path: a registered name (`download.REGISTERED`), a directory in the Hugging Face
            layout, a `.gguf` file, or `hf:org/name` for a repository of the Hugging Face Hub.
        dtype: of the weights; by default float32 on CPU and bfloat16 on accelerators.

    Returns:
        The model as an `LM` whose EOS is the tokenizer's, and the tokenizer with as many ids as the
        model has.

    Raises:
        ValueError: if the name is unknown, a file is damaged, tensors are missing, unexpected or
            misshapen, the architecture is not supported, or the tokenizer does not fit the model.
        FileNotFoundError: if a path or one of the files it needs does not exist.
        ImportError: for `hf:` without the package huggingface_hub.
        ConnectionError: if a registered model cannot be downloaded.
    """
    found = _checkpoint(name_or_path)
    with reading(found.where, found.what):
        tokenizer = found.tokenizer()
    return _assemble(found, tokenizer.eos, dtype), tokenizer


def load_lm(
    name_or_path: str | Path, *, eos: int | None = None, dtype: DTypeLike | None = None
) -> LM:
    """Load a language model alone, from weights that came without a tokenizer or need none.

    Args:
        name_or_path, dtype: as in `load`.
        eos: the token that ends a string; by default the first that the configuration names.

    Raises:
        ValueError: as `load` does, and if no EOS is named or it is no id of the model.
        FileNotFoundError, ImportError, ConnectionError: as `load` does.
    """
    found = _checkpoint(name_or_path)
    eos = next(iter(found.config.eos), None) if eos is None else eos
    if eos is None or not 0 <= eos < found.config.vocab_size:
        raise ValueError(
            f"expected the id of the token that ends a string, in [0, {found.config.vocab_size}),"
            f" got {'none in the configuration' if eos is None else eos}; pass eos="
        )
    return _assemble(found, eos, dtype)


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A model's files: what they are, their configuration, and what is read when it is needed."""

    where: Path
    what: str
    config: DecoderConfig
    tokenizer: Callable[[], Tokenizer]
    tensors: Callable[[], Mapping[str, Shaped[np.ndarray, " ..."]]]


def _checkpoint(name_or_path: str | Path) -> _Checkpoint:
    name = str(name_or_path)
    if name in download.REGISTERED:
        return _gguf(download.fetch(name))
    if name.startswith(HUB_PREFIX):
        return _directory(_hub_snapshot(name.removeprefix(HUB_PREFIX)))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    received = (
        f"the file {path}"
        if path.is_file()
        else f"{name!r}, which is neither registered nor an existing path"
    )
    raise ValueError(
        f"expected a registered name ({', '.join(download.REGISTERED)}), a directory in the Hugging"
        f" Face layout, a .gguf file or hf:org/name, got {received}; check the spelling, or pass"
        " the directory that holds the file"
    )


def _default_dtype() -> DTypeLike:
    # On CPU a bfloat16 cache is copied whole at every step.
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _gguf(path: Path) -> _Checkpoint:
    what = "a language model in GGUF"
    with reading(path, what):
        file = gguf_file.read(path)
        entries = gguf_to_hf.config_dict(file)
        config = DecoderConfig.from_hf(entries)
        weights.check(config, gguf_to_hf.hf_shapes(file))
    return _Checkpoint(
        where=path,
        what=what,
        config=config,
        tokenizer=lambda: gguf_tokenizer.from_gguf(file, vocab_size=config.vocab_size),
        tensors=lambda: gguf_to_hf.hf_tensors(file, entries),
    )


def _directory(directory: Path) -> _Checkpoint:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path}, which does not exist; pass a directory in the Hugging Face layout"
            " (config.json, model.safetensors, tokenizer.json) or a .gguf file"
        )
    with reading(path, "the configuration of a decoder"):
        config = DecoderConfig.from_hf(read_json(path))
    files = tensor_files(directory)
    with reading(path, "the configuration that belongs to these weights"):
        weights.check(
            config, {name: shape for file in files for name, shape in shapes(file).items()}
        )
    return _Checkpoint(
        where=directory,
        what="the weights of a decoder",
        config=config,
        tokenizer=lambda: Tokenizer.from_directory(directory, vocab_size=config.vocab_size),
        tensors=lambda: read_tensors(directory),
    )


def _assemble(found: _Checkpoint, eos: int, dtype: DTypeLike | None) -> LM:
    wanted = jnp.dtype(_default_dtype() if dtype is None else dtype)
    with reading(found.where, found.what):
        params = weights.from_hf(found.config, _checked(found.tensors(), wanted))
    return transformer.decoder(found.config, params, eos=eos)


def _checked(
    tensors: Mapping[str, Shaped[np.ndarray, " ..."]], dtype: np.dtype
) -> dict[str, Shaped[np.ndarray, " ..."]]:
    """The weights of a decoder in their type, all finite."""
    kept = {name: array for name, array in tensors.items() if not weights.ignored(name)}
    odd = sorted({str(array.dtype) for array in kept.values()} - FLOATS)
    if odd:
        raise _quantised(odd)
    with np.errstate(over="ignore"):
        kept = {name: array.astype(dtype, copy=False) for name, array in kept.items()}
    for name, array in kept.items():
        _check_finite(name, array)
    return kept


def _check_finite(name: str, array: Shaped[np.ndarray, " ..."]) -> None:
    # A sum is quick, and no number if one of its terms is none; that of large numbers may overflow.
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all():
            return
    wrong = np.flatnonzero(~np.isfinite(array))
    raise ValueError(
        f"expected finite weights, got {array.reshape(-1)[wrong[0]]} in {name} ({wrong.size} of"
        f" {array.size} values, as {array.dtype}); the file is damaged: fetch it again, or, if the"
        " numbers are too large for this type, pass dtype=jnp.float32"
    )


def _quantised(kinds: list[str]) -> ValueError:
    return ValueError(
        f"expected weights in {', '.join(sorted(FLOATS))}, got {', '.join(kinds)}: the checkpoint"
        " is quantised; load the unquantised one, or a GGUF conversion of it"
    )


def _hub_snapshot(repository: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"expected the package huggingface_hub to load {HUB_PREFIX}{repository}, got none"
            " installed;"
            " run `pip install 'tiltlm[hub]'`"
        ) from error
    return Path(
        huggingface_hub.snapshot_download(
            repository, allow_patterns=[*_HUB_FILES, *_HUB_TOKENIZER_FILES]
        )
    )


def tensor_files(directory: Path) -> list[Path]:
    """A directory's model.safetensors, or the shards that its index lists.

    Raises:
        FileNotFoundError: if there is neither, or a shard is absent.
        ValueError: if a file is damaged, or a shard lacks tensors that the index places there.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
        )
        found = (
            f"only {', '.join(pickled)}, which are pickles and can run code when read"
            if pickled
            else "neither"
        )
        raise FileNotFoundError(
            f"expected model.safetensors or model.safetensors.index.json in {directory}, got"
            f" {found};"
            " save the model as safetensors (save_pretrained with safe_serialization=True)"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(
            f"{index}: expected an object weight_map with names of files, got {places!r}; fetch the"
            " file again"
        )
    present = {path.name: path for path in directory.iterdir()}
    shards = sorted(set(places.values()))
    for shard in shards:
        if shard not in present:
            raise FileNotFoundError(
                f"expected the shard {directory / shortened(shard)} that {index.name} lists, got no"
                " such file; fetch it"
            )
    files = [present[shard] for shard in shards]
    absent = sorted(places.keys() - {name for file in files for name in shapes(file)})
    if absent:
        raise ValueError(
            f"{index}: expected shards with all tensors it lists, got none of {', '.join(absent)};"
            " fetch the index and the shards of one and the same model"
        )
    return files


def read_tensors(directory: Path) -> dict[str, Shaped[np.ndarray, " ..."]]:
    """All tensors of a directory's safetensors files, by name; raises as `tensor_files` does."""
    tensors: dict[str, np.ndarray] = {}
    for path in tensor_files(directory):
        with _opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, none of which is read.

    Raises:
        ValueError: if the file is damaged, or quantised.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        kinds = {slice.get_dtype() for slice in slices.values()}
        if odd := sorted(kind for kind in kinds if kind.startswith(("F8", "F6", "F4"))):
            raise _quantised(odd)
        return {name: tuple(slice.get_shape()) for name, slice in slices.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with reading(path, "a safetensors file"):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                yield file
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: expected {_announced(path)}, got {path.stat().st_size} bytes ({error});"
                " the file is damaged or truncated: delete it and fetch it again"
            ) from error


def _announced(path: Path) -> str:
    """What a safetensors file says about its own size: an 8-byte header length, a JSON header, then
    the data.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends: list[Any] = [
                entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"
            ]
            return f"a safetensors file of {8 + length + max(ends, default=0)} bytes"
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return f"a safetensors file with a JSON header of {length} bytes"
