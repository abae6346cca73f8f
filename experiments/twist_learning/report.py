"""What `experiments.twist_learning` shows: a table, a figure, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables

NONE = "no twist"
STYLES = {NONE: "0.45", "CTL": "C0", "DPG": "C1", "SIXO": "C2", "FUDGE": "C3", "SoftQ": "C4"}
COLUMNS = ("twist", "steps", "N", "lower", "upper", "gap", "share")
"""share: of the gap without a twist."""
WIDTH = 92


@dataclasses.dataclass(frozen=True)
class Cell:
    """Bounds on log Z, with standard errors, at N particles after some steps of an objective.

    log_z: the truth where it is known.  seconds: of training until then.
    """

    world: str
    objective: str
    steps: int
    num_particles: int
    lower: float
    lower_std_error: float
    upper: float
    upper_std_error: float
    log_z: float | None
    seconds: float

    @property
    def gap(self) -> float:
        return self.upper - self.lower


def last(cells: Sequence[Cell], world: str, objective: str, num: int) -> Cell | None:
    """The cell with the most steps."""
    found = [c for c in cells if (c.world, c.objective, c.num_particles) == (world, objective, num)]
    return max(found, key=lambda cell: cell.steps, default=None)


def _worlds(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.world for cell in cells))


def _sizes(cells: Sequence[Cell], world: str) -> list[int]:
    return sorted({cell.num_particles for cell in cells if cell.world == world})


def _objectives(cells: Sequence[Cell], world: str) -> list[str]:
    return [name for name in STYLES if any((c.world, c.objective) == (world, name) for c in cells)]


def rows(cells: Sequence[Cell], world: str) -> list[tuple[str, ...]]:
    """After all steps, one row for each N and objective."""
    found = []
    for num in _sizes(cells, world):
        plain = last(cells, world, NONE, num)
        for objective in _objectives(cells, world):
            cell = last(cells, world, objective, num)
            if cell is not None:
                share = "" if plain is None or plain.gap <= 0 else f"{cell.gap / plain.gap:.3f}"
                sides = (
                    f"{cell.lower:.3f} ± {cell.lower_std_error:.3f}",
                    f"{cell.upper:.3f} ± {cell.upper_std_error:.3f}",
                )
                found.append(
                    (objective, str(cell.steps), str(num), *sides, f"{cell.gap:.3f}", share)
                )
    return found


def verdict(cells: Sequence[Cell]) -> list[str]:
    """Of each world, at its smallest N: which twist leaves the least gap, and which make
    it worse.
    """
    lines = []
    for world in _worlds(cells):
        num = _sizes(cells, world)[0]
        plain = last(cells, world, NONE, num)
        learned = [
            last(cells, world, name, num) for name in _objectives(cells, world) if name != NONE
        ]
        learned = [cell for cell in learned if cell is not None]
        if plain is None or not learned:
            continue
        best = min(learned, key=lambda cell: cell.gap)
        truth = "" if plain.log_z is None else f"; log Z is {plain.log_z:.3f}"
        lines.append(
            f"{world}, N = {num}: without a twist log Z is within [{plain.lower:.3f},"
            f" {plain.upper:.3f}], with that of"
            f" {best.objective} within [{best.lower:.3f}, {best.upper:.3f}]{truth}"
        )
        if worse := [cell.objective for cell in learned if cell.gap >= plain.gap]:
            lines.append(f"{world}, N = {num}: no gain from {', '.join(worse)}")
    return lines


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The tables and the verdict."""
    for world in _worlds(cells):
        view = tables.table(world, COLUMNS, rows(cells, world), width=WIDTH)
        console.print(view, crop=False)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The tables and the verdict as text."""
    found = [(world, *row) for world in _worlds(cells) for row in rows(cells, world)]
    return tables.markdown(("problem", *COLUMNS), found, verdict(cells))


def draw(cells: Sequence[Cell]) -> Figure:
    """Of each world: both bounds by training steps at the smallest N, and the gap by N after all
    steps.
    """
    worlds = _worlds(cells)
    figure = Figure(figsize=(11, 3.8 * len(worlds)), layout="constrained")
    for (left, right), world in zip(
        figure.subplots(len(worlds), 2, squeeze=False), worlds, strict=True
    ):
        _by_steps(left, cells, world)
        _by_particles(right, cells, world)
    return figure


def _by_steps(axes: Axes, cells: Sequence[Cell], world: str) -> None:
    num = _sizes(cells, world)[0]
    for objective in _objectives(cells, world):
        found = [
            c for c in cells if (c.world, c.objective, c.num_particles) == (world, objective, num)
        ]
        found.sort(key=lambda cell: cell.steps)
        color = STYLES[objective]
        if objective == NONE:
            axes.axhspan(found[0].lower, found[0].upper, color=color, alpha=0.15, label=NONE)
            continue
        steps, style = [c.steps for c in found], {"color": color, "markersize": 4, "capsize": 0}
        lower = [(c.lower, c.lower_std_error) for c in found]
        upper = [(c.upper, c.upper_std_error) for c in found]
        tables.points(axes, steps, lower, **style, marker="^", label=objective)
        tables.points(axes, steps, upper, **style, marker="v")
        axes.set_xscale("symlog", linthresh=max(min((s for s in steps if s), default=1), 1))
    if (truth := next((c.log_z for c in cells if c.world == world), None)) is not None:
        axes.axhline(truth, color="0.2", linewidth=0.8, linestyle="--", label="log Z")
    axes.set(
        title=f"{world}, N = {num}",
        xlabel="training steps",
        ylabel="lower (▲) and upper (▼) bound on log Z",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)


def _by_particles(axes: Axes, cells: Sequence[Cell], world: str) -> None:
    sizes = _sizes(cells, world)
    for objective in _objectives(cells, world):
        found = [last(cells, world, objective, num) for num in sizes]
        gaps = [
            (np.nan, 0.0)
            if cell is None
            else (cell.gap, float(np.hypot(cell.lower_std_error, cell.upper_std_error)))
            for cell in found
        ]
        style = {"color": STYLES[objective], "markersize": 4, "label": objective}
        tables.points(axes, sizes, gaps, **style)
    # Gaps near zero may come out negative.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set(
        title=f"{world}, after all steps",
        xlabel="particles N",
        ylabel="gap of the bounds",
        xticks=sizes,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(num) for num in sizes])
    axes.grid(alpha=0.25)
