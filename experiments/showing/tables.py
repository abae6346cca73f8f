"""What reports of experiments are made of: means with errors, tables, points with error bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, 0 of a single value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """The mean and its standard error: "0.50 ± 0.10"."""
    value, error = mean(values)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def compared(gain: float, error: float) -> str:
    """Whether a difference is one, at 95 % of a normal error: more, less, or undecided."""
    return "more" if gain > 1.96 * error else "less" if gain < -1.96 * error else "undecided"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], **how: Any) -> Table:
    """A table for the terminal: the first column to the left, numbers to the right."""
    view = Table(title=title, title_justify="left", **{"box": box.SIMPLE_HEAD, **how})
    for i, name in enumerate(columns):
        view.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        view.add_row(*row)
    return view


def show_list(console: Console, lines: Iterable[str]) -> None:
    """A list in the terminal."""
    for line in lines:
        console.print(f"- {line}", highlight=False)


def markdown(
    columns: Sequence[str], rows: Iterable[Sequence[str]], lines: Iterable[str] = (), left: int = 2
) -> str:
    """A table, of which the first `left` columns are words, and a list under it."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    head, *body = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    listed = [f"- {line}" for line in lines]
    return "\n".join([head, rule, *body, *(["", *listed] if listed else []), ""])


def points(axes: Axes, x: Any, found: Sequence[tuple[float, float]], **style: Any) -> None:
    """Means with their errors at x; the style is matplotlib's."""
    y, error = zip(*found, strict=True)
    axes.errorbar(x, y, error, **{"marker": "o", "markersize": 5, "capsize": 2, **style})
