"""What `experiments.infilling` shows: a table, a figure, and some middles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from ..showing.tables import mean, plus_minus

COLORS = {"trained on": "C0", "held out": "C1"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method on the stories of one kind; every list has one entry per story.

    ess: effective sample size of its weights, over N (of SMC's after resampling, which hides that
    strings are related). elbo: mean log-weight of independent draws.  log_z: its estimate of log
    p(Y | X).  log_joint: mean log p(Z, Y | X) of its strings.  distinct: different strings, over N.
    tokens: drawn.  middle: the heaviest string.
    """

    stories: str
    method: str
    ess: list[float]
    elbo: list[float | None]
    log_z: list[float]
    log_joint: list[float]
    distinct: list[float]
    tokens: list[int]
    middle: list[str]
    seconds: float


def ess_ratio(
    cells: Sequence[Cell], stories: str, method: str = "GFlowNet", base: str = "prior"
) -> float:
    """How many times the mean effective sample size of another method."""
    of = {cell.method: float(np.mean(cell.ess)) for cell in cells if cell.stories == stories}
    return of[method] / of[base]


def divergence(cells: Sequence[Cell], cell: Cell) -> list[float]:
    """KL(q | posterior) = log Z - ELBO of a method's independent draws for each story; empty for
    SMC.

    log Z is that of the average of all methods' estimates, each of which is unbiased: in
    expectation a lower bound, and so is what is returned.
    """
    log_z = np.array([other.log_z for other in cells if other.stories == cell.stories])
    known = [elbo for elbo in cell.elbo if elbo is not None]
    return (
        [float(v) for v in np.logaddexp.reduce(log_z) - np.log(len(log_z)) - known] if known else []
    )


COLUMNS = ("stories", "method", "ESS / N", "KL", "log Z", "log joint", "distinct", "tokens", "s")


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each method and kind of stories; means over stories ± their standard error."""
    found = []
    for cell in cells:
        kl = divergence(cells, cell)
        numbers = (
            plus_minus(cell.ess, 3),
            plus_minus(kl, 1) if kl else "",
            f"{np.mean(cell.log_z):.1f}",
            plus_minus(cell.log_joint, 1),
        )
        cost = f"{np.mean(cell.tokens):.0f}", f"{cell.seconds / len(cell.tokens):.0f}"
        found.append((cell.stories, cell.method, *numbers, f"{np.mean(cell.distinct):.2f}", *cost))
    return found


def markdown(cells: Sequence[Cell]) -> str:
    """The table as markdown."""
    return tables.markdown(COLUMNS, rows(cells))


def show(console: Console, cells: Sequence[Cell]) -> None:
    """Print the tables, the heaviest middle of one story by every method, and what the guide is
    worth.
    """
    for stories in dict.fromkeys(cell.stories for cell in cells):
        title = f"stories {stories}: means ± standard errors, cost per story"
        own = [row[1:] for row in rows(cells) if row[0] == stories]
        console.print(tables.table(title, COLUMNS[1:], own, padding=0))
        for cell in cells:
            if cell.stories == stories:
                console.print(f"{cell.method}: {cell.middle[0].strip()}", highlight=False)
        if {"GFlowNet", "prior"} <= {cell.method for cell in cells if cell.stories == stories}:
            ratio = ess_ratio(cells, stories)
            console.print(
                f"- {stories}: the guide's effective sample is {ratio:.1f} times the base model's"
            )


def draw(cells: Sequence[Cell]) -> Figure:
    """Effective sample sizes, distances from the posterior, and log-likelihoods of every method."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(3, 3, 5))
    titles = ("effective sample size / N", "KL(q | posterior), nats", "log p(Z, Y | X)")
    values_of: tuple[Callable[[Cell], list[float]], ...] = (
        lambda cell: [] if None in cell.elbo else cell.ess,  # SMC's strings are not independent
        lambda cell: divergence(cells, cell),
        lambda cell: cell.log_joint,
    )
    for axes, title, of in zip(panels, titles, values_of, strict=True):
        methods = list(dict.fromkeys(cell.method for cell in cells if of(cell)))
        for cell in cells:
            if values := of(cell):
                middle, error = mean(values)
                x = methods.index(cell.method) + 0.12 * (1 if cell.stories == "held out" else -1)
                axes.plot(
                    np.full(len(values), x), values, ".", color=COLORS[cell.stories], alpha=0.3
                )
                axes.errorbar(x, middle, error, fmt="o", color=COLORS[cell.stories], capsize=3)
        axes.set_xticks(range(len(methods)), methods, rotation=15)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    for stories, color in COLORS.items():
        panels[0].plot([], [], "o", color=color, label=stories)
    panels[0].legend(frameon=False)
    return figure
