"""Trees of arrays as safetensors files, with what they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import PyTree
from safetensors.numpy import save_file

from ppl.files import replacing


def names(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its path, `layers.0.qkv.a`."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf
        for path, leaf in pairs
    }


def fingerprint(tree: PyTree) -> str:
    """A hash of all paths and shapes: whether something made for one model fits another."""
    shapes = sorted(f"{name}{list(jnp.shape(leaf))}" for name, leaf in names(tree).items())
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


def save(path: str | Path, tree: PyTree, metadata: dict[str, str]) -> None:
    """Write a tree's arrays under their paths.  The file appears whole or not at all."""
    tensors = {
        name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in names(tree).items()
    }
    with replacing(path) as fresh:
        save_file(tensors, fresh, metadata=metadata)


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, or a damaged one.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got a damaged or truncated one ({error}); save"
            " it again"
        ) from error


def fill(path: str | Path, tree: PyTree, tensors: dict[str, np.ndarray]) -> PyTree:
    """The tree with the arrays of a file in place of its own.

    Raises:
        ValueError: if paths or shapes differ; all that do are listed.
    """
    mine = {name: jnp.shape(leaf) for name, leaf in names(tree).items()}
    theirs = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [
        f"{name} (expected {list(mine[name]) if name in mine else 'none'},"
        f" got {list(theirs[name]) if name in theirs else 'none'})"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{path}: expected the tensors of this model, got others: {', '.join(wrong)}; build the"
            " model as the one"
            " that was saved (rank, targets, sizes)"
        )
    leaves, structure = jax.tree.flatten(tree)
    order = names(tree)
    return jax.tree.unflatten(
        structure,
        [jnp.asarray(tensors[name], leaf.dtype) for name, leaf in zip(order, leaves, strict=True)],
    )
