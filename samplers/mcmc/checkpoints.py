"""Runs of chains on disk: stopped, and gone on with, to the same bits.

    def watch(result, total):
        chain_checkpoints.save("run.npz", result)

    resume = chain_checkpoints.load("run.npz", kernel, x) if Path("run.npz").exists() else None
    chains.run(key, kernel, x, num_samples=1000, watch=watch, resume=resume)

A file is a plain npz, without pickle: `numpy.load("run.npz")["draws.log_prob"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl.files import replacing

from ..base import Kernel
from ..results import Chains
from .chains import Collect, Keep, Record, collected, draws_of, kept, started

PARTS = ("draws", "info", "state", "cost")
COUNTS = ("steps", "thin", "warmup")


def save(path: str | Path, result: Chains) -> None:
    """Write a run; whatever happens meanwhile, the file is either the old one or the new one.

    Raises:
        ValueError: if the run has no key, as those of other samplers than `chains.run`.
    """
    if result.key is None:
        raise ValueError(
            "expected a run that can go on, got one without a key; save what chains.run returns"
        )
    arrays = _flat({name: getattr(result, name) for name in PARTS})
    arrays |= {name: np.asarray(getattr(result, name)) for name in COUNTS}
    arrays["key"] = np.asarray(jax.random.key_data(result.key))
    arrays["key_impl"] = np.asarray(str(jax.random.key_impl(result.key)))
    with replacing(path) as fresh, fresh.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: _bits(array) for name, array in arrays.items()})


def load(
    path: str | Path,
    kernel: Kernel | Sequence[Kernel],
    x: Any,
    *,
    collect: Collect = collected,
    record: Record | None = None,
) -> Chains:
    """The run that `save` wrote.

    Args:
        path: of the file.
        kernel, x, collect, record: as they were given to `chains.run`; only their shapes are looked
            at.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file's arrays are not those that such a run has.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    key = jax.random.wrap_key_data(jnp.asarray(arrays["key"]), impl=str(arrays["key_impl"]))
    steps, thin, warmup = (int(arrays[name]) for name in COUNTS)
    # Called, not traced: a kernel may look at numbers when it starts.
    step, init = started(kernel)
    state = jax.eval_shape(lambda state: state, init(x))
    *row, cost = kept(step, state, key, Keep(collect, record, thin))
    draws, info = draws_of(row, key, max(steps - warmup, 0) // thin)
    cost = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.int64), cost)
    found = _unflat({"draws": draws, "info": info, "state": state, "cost": cost}, arrays, path)
    found["state"] = jax.tree.map(jnp.asarray, found["state"])
    return Chains(**found, steps=steps, key=key, thin=thin, warmup=warmup)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def _bits(array: np.ndarray) -> np.ndarray:
    """The array, or its bits if its dtype is not numpy's own (bfloat16), which a file would need
    pickle for.
    """
    return array if array.dtype.kind in "biufU" else array.view(f"u{array.dtype.itemsize}")


def _unflat(wanted: Any, arrays: dict[str, np.ndarray], path: Any) -> Any:
    def read(name: str, leaf: Any) -> np.ndarray:
        array = arrays.get(name)
        if array is not None and array.shape == leaf.shape:
            dtype = np.dtype(leaf.dtype)
            if array.dtype == dtype or (
                dtype.kind not in "biuf" and array.dtype.itemsize == dtype.itemsize
            ):
                return array.view(dtype)
        got = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(
            f"expected {name} of {leaf.dtype}{list(leaf.shape)} in {path}, got {got}; load it with"
            " the kernel, positions, collect and record of the run that was saved"
        )

    leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
    names = [
        (jax.tree_util.keystr(where, simple=True, separator="."), leaf) for where, leaf in leaves
    ]
    return jax.tree.unflatten(tree, [read(name, leaf) for name, leaf in names])
