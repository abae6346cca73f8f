"""Runs that take turns in one process, and the ratio of each to one of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from samplers.saving import device

Runs = dict[str, Callable[[jax.Array], Any]]
"""Label -> a function of a key that makes one whole compiled run."""


def measure(of: Runs, repeats: int, count: Callable[[Any], int]) -> dict[str, list[float]]:
    """Label -> milliseconds per step in each repetition, in turn; `count` is the steps that a run's
    result took.
    """
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
    return {
        label: [a / b for a, b in zip(times[label], times[base], strict=True)] for label in others
    }


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


def show_growth(
    rows: list[dict[str, float]],
    title: str,
    axes: Mapping[str, tuple[str, float]],
    lines: Sequence[str],
    out: Path,
) -> None:
    """Print a table of `rows`, and save a figure: `lines` against each of two sizes while the other
    is held.

    `axes` names the two sizes: column -> (what it is, the value at which it is held).
    """
    view = Table(title=title)
    for name in rows[0]:
        view.add_column(name, justify="right")
    for row in rows:
        view.add_row(*(f"{value:.3g}" for value in row.values()))
    Console().print(view)
    figure, (first, second) = Figure(figsize=(9, 3.6), layout="constrained"), axes
    for panel, name, other in zip(
        figure.subplots(1, 2, sharey=True), axes, (second, first), strict=True
    ):
        held = axes[other][1]
        of = sorted((row for row in rows if row[other] == held), key=lambda row: row[name])
        for line, marker in zip(lines, "os^", strict=False):
            panel.plot(
                [row[name] for row in of], [row[line] for row in of], marker=marker, label=line
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
        panel.set_xlabel(f"{axes[name][0]} {name}  ({other} = {held:g})")
        panel.legend(frameon=False)
        panel.grid(alpha=0.25)
    figure.axes[0].set_ylabel(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    Console().print(f"figure: {out}")


def last_line(name: str, medians: dict[str, float]) -> None:
    """The JSON line that ends a benchmark."""
    rounded = {label: round(value, 4) for label, value in medians.items()}
    print(json.dumps({"name": name, "ratios": rounded, "device": device()}))
