"""What `experiments.health` shows: which runs were right, flagged, or silently wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables

REFERENCE = "reference"
RIGHT = 1.0
"""Nats of log Z."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way of running one target at one alpha; every list has one entry per key.

    log_z, error: the estimate and its standard error.  floor: what its different strings weigh, a
    lower bound of log Z.  words: what speaks against it, "" for
    nothing.  seconds: of a run.  Of the reference log_z holds a lower bound, an upper bound, and
    the estimate of a long run.
    """

    target: str
    alpha: float
    method: str
    log_z: list[float]
    error: list[float]
    floor: list[float]
    words: list[str]
    seconds: list[float]


def truth(cells: Sequence[Cell], target: str, alpha: float) -> float:
    """What log Z is, as well as is known: the long run's, or the highest lower bound if that is
    more.
    """
    of = [c for c in cells if (c.target, c.alpha) == (target, alpha)]
    [(lower, upper, long)] = [c.log_z for c in of if c.method == REFERENCE]
    floor = max([lower, *(value for c in of for value in c.floor)])
    return lower if upper - lower < 0.1 else max(floor, long)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of the runs of a cell: right ones, those of them that are flagged all the same, flagged ones
    that are wrong, and silently wrong ones; and the greatest error without a flag, in nats.
    """

    right: int
    doubted: int
    flagged: int
    silent: int
    worst: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            right=self.right + other.right,
            doubted=self.doubted + other.doubted,
            flagged=self.flagged + other.flagged,
            silent=self.silent + other.silent,
            worst=max(self.worst, other.worst),
        )


def counts(cell: Cell, log_z: float) -> Counts:
    """How the runs of a cell are judged."""
    off = np.abs(np.array(cell.log_z) - log_z)
    right, said = off <= RIGHT, np.array([word != "" for word in cell.words])
    return Counts(
        int(right.sum()),
        int((right & said).sum()),
        int((~right & said).sum()),
        int((~right & ~said).sum()),
        float(off[~said].max(initial=0.0)),
    )


COLUMNS = ("alpha", "way", "log Z", "runs", "right", "(doubted)", "flagged", "silent", "worst", "s")


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A row for each cell, and for all targets together."""
    found = []
    for cell in _measured(cells):
        log_z = truth(cells, cell.target, cell.alpha)
        spread = f"{np.median(cell.log_z):.1f} of {log_z:.1f}"
        found.append(
            (cell.target, *_row(cell.alpha, cell.method, spread, counts(cell, log_z), cell))
        )
    for alpha, method in _ways(cells):
        of = [c for c in _measured(cells) if (c.alpha, c.method) == (alpha, method)]
        total = total_of(cells, alpha, method)
        found.append(("all", *_row(alpha, method, "", total, *of)))
    return found


def total_of(cells: Sequence[Cell], alpha: float, method: str) -> Counts:
    """All targets together."""
    of = [c for c in _measured(cells) if (c.alpha, c.method) == (alpha, method)]
    total = Counts(0, 0, 0, 0, 0.0)
    for cell in of:
        total = total + counts(cell, truth(cells, cell.target, cell.alpha))
    return total


def _measured(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose truth is known."""
    known = {(c.target, c.alpha) for c in cells if c.method == REFERENCE}
    return [c for c in cells if c.method != REFERENCE and (c.target, c.alpha) in known]


def _ways(cells: Sequence[Cell]) -> list[tuple[float, str]]:
    return sorted({(c.alpha, c.method) for c in _measured(cells)})


def _row(alpha: float, method: str, log_z: str, of: Counts, *cells: Cell) -> tuple[str, ...]:
    seconds = np.median([s for cell in cells for s in cell.seconds])
    numbers = (sum(len(c.log_z) for c in cells), of.right, of.doubted, of.flagged, of.silent)
    return (
        f"{alpha:g}", method, log_z, *map(str, numbers), f"{of.worst:.1f}", f"{seconds:.2f}",
    )  # fmt: skip


def verdict(cells: Sequence[Cell]) -> list[str]:
    """In words, and against what was asked for."""
    lines = []
    for alpha, method in _ways(cells):
        of = total_of(cells, alpha, method)
        num = of.right + of.flagged + of.silent
        lines.append(
            f"alpha = {alpha:g}, {method}: {of.right + of.flagged} of {num} right or flagged"
            f" ({of.right} right), at most {of.worst:.1f} nats off without a flag"
        )
    return lines


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The table and the verdict."""
    console.print(tables.table("", ("target", *COLUMNS), rows(cells), width=110), crop=False)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The table and the verdict as text."""
    return tables.markdown(("target", *COLUMNS), rows(cells), verdict(cells), left=4)


def draw(cells: Sequence[Cell]) -> Figure:
    """log Z of every run less what it is; open circles are flagged."""
    found = _measured(cells)
    figure = Figure(figsize=(7.5, 0.32 * max(len(found), 4) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = []
    for y, cell in enumerate(found):
        off = np.array(cell.log_z) - truth(cells, cell.target, cell.alpha)
        said = np.array([word != "" for word in cell.words])
        for chosen, face in ((~said, "C0"), (said, "none")):
            axes.scatter(
                off[chosen], np.full(chosen.sum(), y), 18, facecolors=face, edgecolors="C0"
            )
        names.append(f"{cell.target}, {cell.alpha:g}, {cell.method}")
    axes.axvspan(-RIGHT, RIGHT, color="0.9", zorder=0)
    axes.set(xlabel="log Z - reference (nats)", yticks=range(len(names)), yticklabels=names)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.invert_yaxis()
    return figure
