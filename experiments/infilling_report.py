"""What `experiments.infilling` shows: a table, a figure, and some middles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

COLORS = {"trained on": "C0", "held out": "C1"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method on the stories of one kind; every list has one entry per story.

    ess: effective sample size of its weights, over N.  elbo: mean log-weight of independent draws; log Z - ELBO is how
    far the proposal is from the posterior, KL(q | posterior).  log_z: its estimate of log p(Y | X).  log_joint: mean
    log p(Z, Y | X) of its strings.  distinct: different strings, over N.  tokens: drawn.  middle: the heaviest string.
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


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean over stories and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def ess_ratio(cells: Sequence[Cell], stories: str, method: str = "GFlowNet", base: str = "prior") -> float:
    """How many times the mean effective sample size of another method."""
    of = {cell.method: float(np.mean(cell.ess)) for cell in cells if cell.stories == stories}
    return of[method] / of[base]


COLUMNS = ("stories", "method", "ESS / N", "ELBO", "log Z", "log p(Z, Y | X)", "distinct", "tokens", "seconds")


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each method and kind of stories; means over stories ± their standard error."""
    found = []
    for cell in cells:
        known = [value for value in cell.elbo if value is not None]
        numbers = (
            "{:.3f} ± {:.3f}".format(*mean(cell.ess)),
            "{:.1f} ± {:.1f}".format(*mean(known)) if known else "",
            *("{:.1f} ± {:.1f}".format(*mean(values)) for values in (cell.log_z, cell.log_joint)),
        )
        cost = f"{np.mean(cell.tokens):.0f}", f"{cell.seconds / len(cell.tokens):.0f}"
        found.append((cell.stories, cell.method, *numbers, f"{np.mean(cell.distinct):.2f}", *cost))
    return found


def markdown(cells: Sequence[Cell]) -> str:
    """The table as markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def show(console: Console, cells: Sequence[Cell]) -> None:
    """Print the table, the heaviest middle of one story by every method, and what the guide is worth."""
    view = Table(title="the missing middle of a story; means over stories ± their standard error")
    for column in COLUMNS:
        view.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    for row in rows(cells):
        view.add_row(*row)
    console.print(view)
    for cell in cells:
        console.print(f"{cell.stories}, {cell.method}: {cell.middle[0].strip()}", highlight=False)
    for stories in dict.fromkeys(cell.stories for cell in cells):
        methods = {cell.method for cell in cells if cell.stories == stories}
        if {"GFlowNet", "prior"} <= methods:
            ratio = ess_ratio(cells, stories)
            console.print(f"{stories}: the guide's effective sample is {ratio:.1f} times the base model's")


def draw(cells: Sequence[Cell]) -> Figure:
    """Effective sample sizes and log-likelihoods of every method."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for axes, name, title in ((left, "ess", "effective sample size / N"), (right, "log_joint", "log p(Z, Y | X)")):
        for cell in cells:
            shift = 0.12 * (1 if cell.stories == "held out" else -1)
            values = getattr(cell, name)
            middle, error = mean(values)
            x = methods.index(cell.method) + shift
            axes.plot(np.full(len(values), x), values, ".", color=COLORS[cell.stories], alpha=0.3)
            axes.errorbar(x, middle, error, fmt="o", color=COLORS[cell.stories], capsize=3)
        axes.set_xticks(range(len(methods)), methods, rotation=15)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.25)
    left.set_yscale("log")
    for stories, color in COLORS.items():
        left.plot([], [], "o", color=color, label=stories)
    left.legend(frameon=False)
    return figure
