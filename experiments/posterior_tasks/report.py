"""What `experiments.posterior_tasks` shows: a row for each task, and whether its model is that of
the reference draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from .stein import p_value

LEVEL = 1e-3
"""Of the test that draws and model agree, for a task."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task in words; seconds for 10,000 simulations once compiled; z-scores of all of Stein's
    identities, for each observation.
    """

    task: str
    dim_theta: int
    dim_x: int
    prior: str
    simulator: str
    density: str
    seconds: float
    z: list[list[float]]

    @property
    def p(self) -> float:
        """Of the greatest |z|, corrected for their number."""
        return p_value(np.array(self.z))


COLUMNS = ("task", "prior", "simulator", "density", "theta", "x", "s per 10^4", "greatest z", "p")


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A row for each task."""
    return [
        (
            cell.task, cell.prior, cell.simulator, cell.density, str(cell.dim_theta),
            str(cell.dim_x), f"{cell.seconds:.3f}", f"{np.abs(cell.z).max():.1f}", f"{cell.p:.2g}",
        )
        for cell in cells
    ]  # fmt: skip


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Which tasks are not what the benchmark's draws come from."""
    wrong = [cell.task for cell in cells if cell.p < LEVEL]
    num = sum(np.array(cell.z).size for cell in cells)
    found = f"not of these models: {', '.join(wrong)}" if wrong else "all of these models"
    return [f"reference draws, by {num:,} of Stein's identities at level {LEVEL:g}: {found}"]


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The table and the verdict."""
    console.print(tables.table("", COLUMNS, rows(cells)), crop=False)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The table and the verdict as text."""
    return tables.markdown(COLUMNS, rows(cells), verdict(cells), left=4)


def draw(cells: Sequence[Cell]) -> Figure:
    """All z-scores; one in 370 is beyond the lines by chance."""
    figure = Figure(figsize=(7, 0.35 * max(len(cells), 4) + 1.2), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for y, cell in enumerate(cells):
        z = np.ravel(cell.z)
        axes.scatter(z, y + rng.uniform(-0.3, 0.3, z.size), 3, color="C0", alpha=0.5)
    axes.set(
        xlabel="z of Stein's identities",
        yticks=range(len(cells)),
        yticklabels=[c.task for c in cells],
    )
    for x in (-3, 3):
        axes.axvline(x, color="0.8", zorder=0)
    axes.invert_yaxis()
    return figure
