"""Experiments made of cells: each is measured once and saved at once, so that an interrupted run
goes on later.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .showing import saving

Pending = tuple[str, Callable[[], Sequence[Any]]]
"""What is still to be measured: its label, and a function that makes its cells (dataclasses)."""


INTERRUPTED = 130
"""The exit status of a run that was stopped, as shells have it."""


class Report(Protocol):
    """A module that shows cells."""

    def show(self, console: Console, cells: Sequence[Any]) -> None: ...
    def draw(self, cells: Sequence[Any]) -> Figure: ...
    def markdown(self, cells: Sequence[Any]) -> str: ...


def main(
    console: Console,
    out: Path,
    config: Any,
    kind: Callable[..., Any],
    which: Collection[str],
    run: Callable[[list[Any]], None],
    report: Report,
) -> int:
    """Go on from what an earlier run left in `out`, and show and save all there is; returns the
    exit status.

    `run` measures what is missing, appends it to the cells and saves it (`fill`).  An interrupt
    keeps what there is. The other arguments are those of `load`.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells, status = load(out / saving.RESULTS, config, kind, which), 0
    if cells:
        console.print(
            f"{len(cells)} results of an earlier run in {out} are kept",
            style="dim",
            highlight=False,
        )
    try:
        run(cells)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", style="yellow")
        status = INTERRUPTED
    if cells:
        report.show(console, cells)
        report.draw(cells).savefig(out / "figure.png", dpi=160)
        (out / "table.md").write_text(report.markdown(cells), encoding="utf-8")
        console.print(
            f"saved in {out}: {saving.RESULTS}, table.md, figure.png", style="dim", highlight=False
        )
    return status


def fill(
    console: Console, path: Path, config: Any, cells: list[Any], pending: Sequence[Pending]
) -> None:
    """Measure whatever is pending, append its cells, and save all cells after each; shows a
    progress bar.
    """
    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(pending))
        for label, measure in pending:
            progress.update(bar, description=label)
            cells += measure()
            save(path, config, cells)
            progress.advance(bar)


def save(path: Path, config: Any, cells: Sequence[Any]) -> None:
    """Write all cells, with what they depend on; `config` is a dataclass with a `seed`."""
    document = {
        "config": dataclasses.asdict(config),
        "versions": saving.versions(),
        "device": saving.device(),
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist(),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path, config: Any, kind: Callable[..., Any], which: Collection[str]) -> list[Any]:
    """The cells of an earlier run, if all that a single cell depends on is the same; else none.

    `which` names the entries of the config that only say which cells there are.
    """
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    # As JSON has it: lists for tuples.
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    same = all(
        document["config"].get(name) == value for name, value in mine.items() if name not in which
    )
    return [kind(**cell) for cell in document["cells"]] if same else []
