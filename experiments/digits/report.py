"""What `experiments.digits` shows: a table, and for each method what its latents look like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from ..showing.tables import mean, plus_minus

COLUMNS = ("method", "ELBO", "log p(x) at least", "gap", "MMD^2", "s")
"""Nats per picture that was held out; gap: how much the ELBO loses."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method on pictures that it has not seen.

    elbo, bound: of each.  apart: squared MMD of the guide's draws and the prior.  seconds: of the
    training, compilation included.  latents: one of the guide's draws for each picture, [x, y].
    labels: its digit.  originals, reconstructed, drawn: pictures of 64 pixels.
    """

    method: str
    elbo: list[float]
    bound: list[float]
    apart: float
    seconds: float
    latents: list[list[float]]
    labels: list[int]
    originals: list[list[float]]
    reconstructed: list[list[float]]
    drawn: list[list[float]]

    @property
    def gap(self) -> list[float]:
        """bound - ELBO."""
        return (np.array(self.bound) - np.array(self.elbo)).tolist()


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A row for each method."""
    return [
        (
            cell.method, plus_minus(cell.elbo, 1), plus_minus(cell.bound, 1),
            plus_minus(cell.gap, 2), f"{cell.apart:.4f}", f"{cell.seconds:.0f}",
        )
        for cell in cells
    ]  # fmt: skip


def verdict(cells: Sequence[Cell]) -> list[str]:
    """The best bound, and whether others differ from it on the same pictures."""
    best = max(cells, key=lambda cell: mean(cell.bound)[0])
    lines = [f"the best model of new pictures: {best.method}"]
    for cell in cells:
        if cell is not best:
            gain, error = mean((np.array(cell.bound) - np.array(best.bound)).tolist())
            found = "undecided" if tables.compared(gain, error) == "undecided" else "less"
            lines.append(f"{cell.method}: {gain:.1f} ± {error:.1f} nats from it, {found}")
    return lines


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The table and the verdict, in the terminal."""
    title = "Nats per picture that was not seen (± standard error)"
    console.print(tables.table(title, COLUMNS, rows(cells)))
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The same as text."""
    return tables.markdown(COLUMNS, rows(cells), verdict(cells), left=1)


def draw(cells: Sequence[Cell]) -> Figure:
    """Of each method: latents by digit of pictures that it has not seen, some of these pictures and
    under them their reconstructions, and what the model draws.
    """
    figure = Figure(figsize=(2.4 * len(cells) + 0.9, 5.2), layout="constrained")
    axes = figure.subplots(3, len(cells), squeeze=False, height_ratios=(4, 1, 2))
    for column, cell in zip(axes.T, cells, strict=True):
        _latents(column[0], cell)
        _pictures(column[1], [*cell.originals, *cell.reconstructed], len(cell.originals))
        _pictures(column[2], cell.drawn, len(cell.originals))
    for axis, name in zip(axes[:, 0], ("latents", "new,\nagain", "drawn"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _latents(axes: Axes, cell: Cell) -> None:
    z, labels = np.array(cell.latents), np.array(cell.labels)
    for digit in range(10):
        own = labels == digit
        axes.scatter(*z[own].T, s=7, color=f"C{digit}", label=str(digit), linewidths=0)
    circle = np.linspace(0, 2 * np.pi, 100)
    # Half of the prior is within this circle.
    radius = np.sqrt(2 * np.log(2))
    axes.plot(radius * np.cos(circle), radius * np.sin(circle), color="0.6", linewidth=0.7)
    axes.set(title=cell.method, xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal")
    axes.tick_params(labelsize=7)


def _pictures(axes: Axes, pictures: Sequence[Sequence[float]], across: int) -> None:
    """Pictures in rows, with a line between."""
    tiles = np.pad(np.array(pictures).reshape(-1, across, 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)))
    joined = tiles.transpose(0, 2, 1, 3).reshape(9 * len(tiles), 9 * across)
    axes.imshow(joined, cmap="gray_r", vmin=0, vmax=16)
    axes.set(xticks=[], yticks=[])
