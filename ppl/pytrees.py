"""Dataclasses as pytrees whose structure says which class they are.

`jax.tree_util.register_dataclass` does not (jax 0.10): two classes with the same fields have equal
tree structures, and `jax.jit`, which finds its compiled programs by structure, now and then runs
the program of the one for the other. Two potentials with the same fields would silently swap their
densities.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from .showing import shown

T = TypeVar("T", bound=type)


def register_dataclass(cls: T) -> T:
    """Register a dataclass as a pytree; use it in place of jax's decorator of this name.

    Fields with `metadata={"static": True}` are part of the structure and must be hashable; all
    others are leaves or subtrees.  A rebuilt object gets its fields as they come, without the
    constructor's checks, for JAX also puts placeholders into leaves.

    Its repr is a summary (`showing`): shapes, never arrays.  A class with a `__repr__` of its own
    keeps it; one with a method `_shown_() -> dict` says what the summary shows.

        @ppl.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Mine(ppl.Potential):
            table: jax.Array
            width: int = dataclasses.field(metadata={"static": True})

    Raises:
        ValueError: if `cls` is not a dataclass.
    """
    if "__dataclass_fields__" not in vars(cls):
        raise ValueError(
            f"expected a dataclass, got {cls.__name__}; put @dataclasses.dataclass(frozen=True)"
            " below this decorator"
        )
    fields = dataclasses.fields(cls)
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    names = (*data, *static)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(x: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(x, name) for name in data), tuple(getattr(x, name) for name in static)

    def flatten_with_keys(x: Any) -> tuple[tuple, tuple]:
        leaves, structure = flatten(x)
        return tuple(zip(keys, leaves, strict=True)), structure

    def unflatten(structure: tuple, leaves: Any) -> Any:
        x = object.__new__(cls)
        for name, value in zip(names, (*leaves, *structure), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    # The repr that `dataclass` makes is wrapped, against recursion; one that was written is not.
    return shown(cls) if hasattr(cls.__repr__, "__wrapped__") else cls


def as_pytree(function: Any) -> Any:
    """`function` as a pytree: `tempered(...)` and the like already are; others become
    static data.
    """
    is_leaf = jax.tree.structure(function) == jax.tree.structure(0)
    return jax.tree_util.Partial(function) if is_leaf else function
