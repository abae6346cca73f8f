"""Any result in a file, and back: arrays as npz, what holds them as JSON, no pickle.

    saving.save(out, "run.npz")
    out = saving.load("run.npz")

`Weighted`, `Draws`, `Chains` and `Choice`, with their histories, costs and states, and any pytree
of records (tiltlm's, blackjax's, optax's, numpyro's), dicts, lists, tuples, numbers, text and
arrays; keys of JAX stay keys.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.files import replacing

# Whose records are kept as such: ours, and those that the states of chains and fits hold.
PACKAGES = ("ppl", "samplers", "amortized", "models", "experiments", "blackjax", "optax", "numpyro")
MANIFEST = "manifest"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("tiltlm", "jax", "jaxlib", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> str:
    """What the default device is, for example "cpu: cpu (x86_64)"."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind} ({platform.machine()})"


def save(result: Any, file: str | Path) -> None:
    """Write `result` to `file`, which is replaced as a whole or not at all.

    Raises:
        ValueError: for what is no data, such as a function or a model's kernel, naming where it is.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _written(result, "result", arrays)
    manifest = {"result": tree, "versions": versions(), "device": device()}
    with replacing(file) as fresh, fresh.open("wb") as stream:
        np.savez_compressed(
            stream, allow_pickle=False, **{MANIFEST: np.array(json.dumps(manifest)), **arrays}
        )


def load(file: str | Path) -> Any:
    """What `save` wrote, with arrays on the default device.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not one that `save` wrote, or holds records that this version lacks.
    """
    try:
        with np.load(Path(file), allow_pickle=False) as found:
            arrays = dict(found)
        tree = json.loads(str(arrays.pop(MANIFEST)))["result"]
        return _read(tree, arrays)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"expected {file} to be a result as samplers.saving.save writes it, got"
            f" {type(error).__name__}: {error}; save it anew, with this version of tiltlm"
        ) from error


def _written(node: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """A node as JSON: [kind, ...]; its arrays go to `arrays`, by number."""

    def keep(array: Any) -> str:
        arrays[name := f"a{len(arrays)}"] = np.asarray(array)
        return name

    def parts(names: Any, values: Any) -> list:
        return [
            [name, _written(value, f"{where}.{name}", arrays)]
            for name, value in zip(names, values, strict=True)
        ]

    if node is None or type(node) in (bool, int, float, str):
        return ["value", node]
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        return ["key", keep(jax.random.key_data(node)), str(jax.random.key_impl(node))]
    if isinstance(node, (jax.Array, np.ndarray, np.generic)):
        names = {jax.Array: "jax", np.ndarray: "numpy", np.generic: "scalar"}
        kind = next(name for of, name in names.items() if isinstance(node, of))
        name = str(node.dtype)
        # npz has no bfloat16 and the like: they are widened, which loses nothing.
        wide = np.asarray(node).dtype.kind == "V"
        return [kind, keep(np.asarray(node, np.float32) if wide else node), name]
    if type(node) is dict and all(isinstance(name, str) for name in node):
        return ["dict", parts(node.keys(), node.values())]
    own = type(node).__module__.partition(".")[0] in PACKAGES
    label = f"{type(node).__module__}:{type(node).__qualname__}"
    if own and dataclasses.is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node)]
        return ["record", label, parts(names, [getattr(node, name) for name in names])]
    if own and isinstance(node, tuple) and hasattr(node, "_fields"):
        return ["record", label, parts(node._fields, node)]  # pyright: ignore
    if type(node) in (list, tuple):
        return [type(node).__name__, parts(map(str, range(len(node))), node)]
    raise ValueError(
        f"expected a result of arrays, numbers, text and records of {', '.join(PACKAGES)}, got"
        f" {type(node).__module__}.{type(node).__qualname__} at {where}; save the parts that are"
        " data"
    )


def _read(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    kind, *rest = node
    if kind == "value":
        return rest[0]
    if kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(arrays[rest[0]]), impl=rest[1])
    if kind == "jax":
        return jnp.asarray(arrays[rest[0]], rest[1])
    if kind in ("numpy", "scalar"):
        array = arrays[rest[0]].astype(rest[1])
        return array[()] if kind == "scalar" else array
    parts = {name: _read(value, arrays) for name, value in rest[-1]}
    if kind == "record":
        return _record(rest[0])(**parts)
    return parts if kind == "dict" else [*parts.values()] if kind == "list" else (*parts.values(),)


def _record(label: str) -> Any:
    """The class of a record of `PACKAGES`: a file names no other."""
    module, _, name = label.partition(":")
    if module.partition(".")[0] not in PACKAGES:
        raise ValueError(f"a record of {module}, whose records are not read")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not (
        dataclasses.is_dataclass(found) or issubclass(found, tuple)
    ):
        raise ValueError(f"{label}, which is no record")
    return found
