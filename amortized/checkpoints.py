"""A training run on disk: what is needed to go on with it to the same bits, written by Orbax.

A checkpoint is a folder `directory/<step>` of named arrays (`params.w`, `opt_state.0.mu.w`,
`history.loss`, ...) with a record of what they belong to.  Orbax writes it under another name and
renames it when it is whole, so a process that is killed leaves the checkpoints before it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

KEPT = 2
PACKAGES = ("tiltlm", "jax", "jaxlib", "optax", "equinox", "numpy")


class Checkpoints:
    """The checkpoints of one run in a folder, the last two of them; a context manager.

    Args:
        directory: of the run; made where there is none.
        config: what the run depends on besides its arrays; saved with every checkpoint, and
            compared when one is read.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any]) -> None:
        import orbax.checkpoint as ocp  # takes seconds: only those who save wait for it

        self._ocp, self._directory = ocp, Path(directory).absolute()
        self._config = json.loads(json.dumps(config))  # as it is read back: lists for tuples
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, step: int, state: PyTree) -> None:
        """Write the state after `step` steps; typed keys are written as their data."""
        if step in self._manager.all_steps():
            return
        arrays = _flat(state)
        record = {
            "config": self._config,
            "versions": _versions(),
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "leaves": {name: _kind(array) for name, array in arrays.items()},
        }
        # Orbax does not write arrays without entries; the record says that they were there.
        stored = {name: _plain(array) for name, array in arrays.items() if np.size(array)}
        args = self._ocp.args
        self._manager.save(
            step, args=args.Composite(state=args.StandardSave(stored), record=args.JsonSave(record))
        )

    def load(self, like: Callable[[int], PyTree]) -> tuple[int, PyTree] | None:
        """The latest checkpoint: after how many steps, and the state; None if there is none.

        Damaged ones are put aside, with a warning, where there is a good one before them.

        Args:
            like: step -> a state of the shapes and dtypes that the run has then.

        Raises:
            ValueError: if the checkpoint has other leaves, or is of a run with another config; if
                all that there are are damaged.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = self._record(step)
            except Exception as error:  # of whatever reads a part of it
                damaged[step] = error
                continue
            wanted = like(step)
            self._check(record, wanted, self._directory / str(step))
            try:
                state = self._state(step, wanted)
            except Exception as error:
                damaged[step] = error
                continue
            self._put_aside(damaged, step)
            return step, state
        if damaged:
            step, error = next(iter(damaged.items()))
            raise ValueError(
                f"expected a whole checkpoint in {self._directory}, got damaged ones of steps"
                f" {', '.join(map(str, damaged))} ({step}: {type(error).__name__}: {error!s:.300});"
                " restore the folder, or start anew in another one"
            ) from error
        return None

    def _put_aside(self, damaged: Mapping[int, Exception], good: int) -> None:
        for step, error in damaged.items():
            where = self._directory / str(step)
            aside = where.with_name(f"{step}.damaged-{time.time_ns()}")
            where.rename(aside)
            warnings.warn(
                f"expected a whole checkpoint in {where}, got a damaged one"
                f" ({type(error).__name__}: {error!s:.300}); it is now {aside.name}, and the run goes on from step {good}",
                stacklevel=4,
            )
        if damaged:
            self._manager.reload()

    def _record(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        restored = self._manager.restore(step, args=args.Composite(record=args.JsonRestore()))
        record = restored["record"]
        if not all(isinstance(record[name], dict) for name in ("config", "leaves")):
            raise ValueError("expected a record with config and leaves, got others")
        return record

    def _state(self, step: int, wanted: PyTree) -> PyTree:
        args = self._ocp.args
        shapes = {
            name: jax.ShapeDtypeStruct(*_stored_as(leaf))
            for name, leaf in _named(wanted).items()
            if np.size(leaf)
        }
        as_numpy = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        stored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(as_numpy))
        )["state"]
        leaves = [_typed(stored.get(name), leaf) for name, leaf in _named(wanted).items()]
        return jax.tree.unflatten(jax.tree.structure(wanted), leaves)

    def _check(self, record: dict[str, Any], wanted: PyTree, where: Path) -> None:
        for name in [*self._config, *record["config"]]:
            mine, theirs = self._config.get(name), record["config"].get(name)
            if mine != theirs:
                raise ValueError(
                    f"expected to go on with a run of {name} = {mine!r}, got one of {theirs!r} in"
                    f" {where}; pass that"
                    " run's, or another directory"
                )
        found, expected = (
            record["leaves"],
            {name: _kind(leaf) for name, leaf in _named(wanted).items()},
        )
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"expected {name} to be {expected.get(name, 'absent')} in {where}, got"
                    f" {found.get(name, 'nothing of that name')}; it is the checkpoint of another"
                    " model, optimiser or"
                    " loss: pass those, or another directory"
                )


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, on the host but for typed keys."""
    return {
        name: leaf if _is_key(leaf) else np.asarray(leaf) for name, leaf in _named(tree).items()
    }


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> str:
    """Dtype and shape, as float32[3, 4]; of a key also its kind."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else leaf


def _stored_as(leaf: Any) -> tuple[tuple[int, ...], Any]:
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return plain.shape, plain.dtype


def _typed(stored: np.ndarray | None, like: Any) -> Any:
    """A leaf as it was: a key, a device array, or numpy's."""
    if stored is None:
        return like
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(like))
    return jnp.asarray(stored) if isinstance(like, jax.Array) else stored


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
