"""What `experiments.energy_samplers` shows: bounds and estimates of log Z, and where 25GMM's draws
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from .targets import ENERGIES

COLUMNS = (
    "energy", "method", "ELBO", "EUBO", "error of ELBO", "published", "error, weighted", "ESS",
    "modes", "s",
)  # fmt: skip
PUBLISHED = {
    ("25GMM", "reverse KL"): 1.769,
    ("25GMM", "TB"): 1.176,
    ("25GMM", "TB, explored"): 0.560,
    ("25GMM", "TB, searched"): 0.171,
}
"""log Z - ELBO of Sendera et al. 2024 (arXiv 2402.05098), 100 steps of 300 paths, 25,000 times."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a sampler has learned of an energy.

    elbo, eubo: means of log w over paths ahead and paths back from exact draws.  log_z: of the
    importance weights.  ess: of those, as a share.  modes: of 25GMM's that hold at least a quarter
    of their share.  points: some of its draws [x, y].
    """

    energy: str
    method: str
    elbo: float
    eubo: float
    log_z: float
    ess: float
    modes: int | None
    seconds: float
    points: list[list[float]]


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A row for each."""
    out = []
    for cell in cells:
        truth = ENERGIES[cell.energy].log_z
        published = PUBLISHED.get((cell.energy, cell.method))
        out.append(
            (
                cell.energy,
                cell.method,
                f"{cell.elbo:.3f}",
                f"{cell.eubo:.3f}",
                f"{truth - cell.elbo:.3f}",
                "" if published is None else f"{published:.3f}",
                f"{cell.log_z - truth:+.3f}",
                f"{cell.ess:.2f}",
                "" if cell.modes is None else f"{cell.modes} of 25",
                f"{cell.seconds:.0f}",
            )
        )
    return out


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Which bound is the tightest of each energy."""
    lines = []
    for name in dict.fromkeys(cell.energy for cell in cells):
        own = [cell for cell in cells if cell.energy == name]
        best = max(own, key=lambda cell: cell.elbo)
        lines.append(
            f"{name}: the tightest lower bound is that of {best.method},"
            f" {ENERGIES[name].log_z - best.elbo:.3f} below log Z"
        )
    return lines


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The table and the verdict."""
    console.print(tables.table("", COLUMNS, rows(cells), padding=(0, 1)), crop=False)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The table and the verdict as text."""
    return tables.markdown(COLUMNS, rows(cells), verdict(cells))


def draw(cells: Sequence[Cell]) -> Figure:
    """Draws of every method, first two coordinates."""
    names = list(dict.fromkeys(cell.energy for cell in cells))
    width = max(sum(cell.energy == name for cell in cells) for name in names)
    figure = Figure(figsize=(2.6 * width, 2.8 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), width, squeeze=False)
    for name, row in zip(names, panels, strict=True):
        own = [cell for cell in cells if cell.energy == name]
        for axes, cell in zip(row, own, strict=False):
            points = np.array(cell.points)
            axes.plot(points[:, 0], points[:, 1], ".", markersize=2, alpha=0.5)
            axes.set_title(f"{name}, {cell.method}", fontsize=9)
            axes.set(xlabel="x0", ylabel="x1")
        for axes in row[len(own) :]:
            axes.set_axis_off()
    return figure
