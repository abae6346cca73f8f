"""What objects look like: shapes and a summary, never arrays or weights, and always short.

    Weighted(
        sequences=Sequences(N=32, T=64, length=int32[32] (3 to 64, mean 21)),
        log_weights=float32[32] (-4.1 to 1.2, mean -0.7, 2 at -inf),
        log_z=-12.31,
        ...

`repr` is called where nobody asked for it: in error messages, by pytest, by debuggers, inside of
`jit`.  So it never raises, never waits for what is traced, and reads no large array.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import html
import itertools
import types
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T", bound=type)

LIMIT = 1900
"""The most characters of a repr."""
WIDTH, PART, CELL = 88, 400, 160
"""Characters of a record that stays on one line, of a field, and of a cell of the HTML table."""
DEPTH, ITEMS, FIELDS = 3, 6, 24
"""How deep records are shown inside of each other, and how much of a container and of a record."""
READ = 2**16
"""The most numbers that are read to summarise an array; of greater ones only the shape is shown."""


class Words(str):
    """Text that is shown without quotation marks."""

    __slots__ = ()


def shown(cls: T) -> T:
    """Give a class `__repr__` and `_repr_html_` that show a summary of its fields.

    For dataclasses and named tuples, and for any class with a method `_shown_() -> dict`, which
    says what is to be shown instead.  `ppl.register_dataclass` does it by itself.
    """
    cls.__repr__ = text  # pyright: ignore[reportAttributeAccessIssue]
    cls._repr_html_ = page  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def text(x: Any) -> str:
    """A summary of any object, below 2,000 characters: as deep as that allows."""
    found = inline(x, 0)
    for depth in range(DEPTH, 0, -1):
        found = _record(x, depth, WIDTH) if _is_record(x) else inline(x, depth)
        if len(found) <= LIMIT:
            break
    return _cut(found, LIMIT)


def page(x: Any) -> str:
    """The summary of a record as an HTML table, in the notebook's own colours."""
    cell = '<td style="text-align:left;vertical-align:top;padding:1px 12px 1px 0">'
    rows = "".join(
        f"<tr>{cell}{html.escape(str(name))}</td>"
        f"{cell}<code>{html.escape(_cut(inline(value, 1), CELL))}</code></td></tr>"
        for name, value in itertools.islice(_fields(x), FIELDS)
    )
    return (
        '<table style="border-collapse:collapse;border:none">'
        f'<caption style="text-align:left"><b>{html.escape(type(x).__name__)}</b></caption>'
        f"<tbody>{rows}</tbody></table>"
    )


def inline(x: Any, depth: int = DEPTH) -> str:
    """A summary of any object in one line; records inside of it to `depth`."""
    try:
        return _inline(x, depth)
    except Exception:  # what is asked for a repr is often half made, deleted or strange
        return f"{type(x).__name__}(...)"


def _inline(x: Any, depth: int) -> str:
    if _is_array(x):
        return array(x)
    if isinstance(x, float):
        return f"{x:.4g}"
    if x is None or isinstance(x, bool | int | complex):
        return _cut(str(x), CELL)
    if isinstance(x, str | bytes):
        return _cut(str(x), CELL) if isinstance(x, Words) else _cut(repr(x[:80]), 80)
    if isinstance(x, enum.Enum):
        return f"{type(x).__name__}.{x.name}"
    if isinstance(x, functools.partial):
        return f"partial({inline(x.func, 0)})"
    if isinstance(x, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return x.__qualname__
    if _is_record(x):
        return _record(x, depth, None)
    return _container(x, depth)


def _container(x: Any, depth: int) -> str:
    if not isinstance(x, Mapping | list | tuple | Set):
        # Another library's object: its own repr may be of any length, and take any time.
        return type(x).__name__
    left, right = ("[", "]") if isinstance(x, list) else ("(", ")")
    left, right = ("{", "}") if isinstance(x, Mapping | Set) else (left, right)
    if depth <= 0 and len(x):
        return f"{left}{len(x)} items{right}"
    some = itertools.islice(x.items() if isinstance(x, Mapping) else x, ITEMS)
    parts = (
        [f"{_cut(str(key), 40)}: {inline(value, depth - 1)}" for key, value in some]
        if isinstance(x, Mapping)
        else [inline(value, depth - 1) for value in some]
    )
    rest = [f"... {len(x) - ITEMS} more"] if len(x) > ITEMS else []
    return left + ", ".join(parts + rest) + right


def array(x: Any) -> str:
    """dtype[shape] and how its numbers are spread; of a scalar the value.

    What is traced, large, donated or on other hosts has a shape only.
    """
    shape = f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, jax.Array) and (
        isinstance(x, Tracer) or x.is_deleted() or not x.is_fully_addressable
    ):
        return shape
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    if is_key or not isinstance(x, jax.Array | np.ndarray | np.generic) or not 0 < x.size <= READ:
        return shape
    values = np.asarray(x)
    if values.dtype.kind in "OSUcM":
        return shape
    if values.dtype.kind == "b":
        return str(bool(values)) if not x.shape else f"{shape} ({values.sum()} of {x.size} true)"
    whole = values.dtype.kind in "iu"
    values = values.astype(np.int64 if whole else np.float64)
    if not x.shape:
        return str(int(values)) if whole else f"{float(values):.4g}"
    return f"{shape} ({_spread(values)})"


def _spread(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    parts = []
    if finite.size:
        low, high = finite.min(), finite.max()
        parts.append(f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}")
        parts += [] if low == high else [f"mean {finite.mean():.4g}"]
    odd = {
        "nan": np.isnan(values).sum(),
        "-inf": np.isneginf(values).sum(),
        "inf": np.isposinf(values).sum(),
    }
    return ", ".join(parts + [f"{count} at {name}" for name, count in odd.items() if count])


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and isinstance(x.shape, tuple)


def _is_record(x: Any) -> bool:
    kind = type(x)
    return (
        hasattr(kind, "_shown_")
        or dataclasses.is_dataclass(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def _fields(x: Any) -> Iterator[tuple[str, Any]]:
    """What there is to show of a record."""
    kind = type(x)
    if hasattr(kind, "_shown_"):
        try:
            found = dict(x._shown_())
        except Exception:  # of placeholders and tracers little can be said; the fields will do
            found = {}
        if found:
            yield from found.items()
            return
    names = (
        [field.name for field in dataclasses.fields(kind) if field.repr]
        if dataclasses.is_dataclass(kind)
        else getattr(kind, "_fields", ())
    )
    for name in names:
        yield name, getattr(x, name, Words("..."))  # a half made object may lack a field


def _record(x: Any, depth: int, width: int | None) -> str:
    """On one line, or, where that is longer than `width`, one line for each field."""
    name = type(x).__name__
    pairs = list(itertools.islice(_fields(x), FIELDS + 1))
    if depth <= 0 and width is None:
        return f"{name}(...)" if pairs else f"{name}()"
    parts = [f"{key}={_cut(inline(value, depth - 1), PART)}" for key, value in pairs[:FIELDS]]
    parts += ["..."] if len(pairs) > FIELDS else []
    line = f"{name}({', '.join(parts)})"
    if width is None or len(line) <= width:
        return line
    return f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 3] + "..."
