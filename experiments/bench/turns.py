"""Runs that take turns in one process, and the ratio of each to one of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from .. import saving

Runs = dict[str, Callable[[jax.Array], Any]]
"""Label -> a function of a key that makes one whole compiled run."""


def measure(of: Runs, repeats: int, count: Callable[[Any], int]) -> dict[str, list[float]]:
    """Label -> milliseconds per step in each repetition, in turn; `count` is the steps that a run's result took."""
    for run in of.values():
        jax.block_until_ready(run(jax.random.key(0)))  # compiles
    times: dict[str, list[float]] = {label: [] for label in of}
    for r in range(repeats):
        # The order turns, so that whoever follows a neighbour's burst is not always the same.
        labels = list(of)[r % len(of) :] + list(of)[: r % len(of)]
        for label in labels:
            start = time.perf_counter()
            out = jax.block_until_ready(of[label](jax.random.key(r + 1)))
            times[label].append(1000 * (time.perf_counter() - start) / count(out))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Label -> the ratio to the first label within each repetition."""
    base, *others = times
    return {label: [a / b for a, b in zip(times[label], times[base], strict=True)] for label in others}


def report(name: str, times: dict[str, list[float]], title: str) -> None:
    """Print a table of medians and, last, one JSON line."""
    base, over = next(iter(times)), ratios(times)
    view = Table(title=title, title_justify="left")
    for column in ("", "ms / step", f"over {base}", "quartiles"):
        view.add_column(column, justify="left" if not column else "right")
    for label, row in times.items():
        cells = ["1", ""]
        if label != base:
            low, middle, high = statistics.quantiles(over[label], n=4)
            cells = [f"{middle:.3f}", f"{low:.3f} .. {high:.3f}"]
        view.add_row(label, f"{statistics.median(row):.1f}", *cells)
    Console().print(view)
    last_line(name, {label: statistics.median(row) for label, row in over.items()})


def last_line(name: str, medians: dict[str, float]) -> None:
    """The JSON line that ends a benchmark."""
    rounded = {label: round(value, 4) for label, value in medians.items()}
    print(json.dumps({"name": name, "ratios": rounded, "device": saving.device()}))
