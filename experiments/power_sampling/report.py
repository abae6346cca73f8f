"""What `experiments.power_sampling` shows: a table, a figure, and a verdict on what the papers
claim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from math import comb

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from ..showing.tables import compared, mean
from .methods import FACTOR, NUM

STYLES = {
    "base sampling": ("0.35", "o"),
    "low temperature": ("C2", "^"),
    f"likeliest of {FACTOR}": ("0.6", "s"),
    "power MH": ("C0", "o"),
    "Power-SMC": ("C3", "s"),
    "tempering": ("C4", "P"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one alpha on one task; every list has one entry per problem.

    accuracy: probability that an answer is right.  vote: whether the answer with the most weight
    is.  pass_at: that one of k drawn answers is right, for k = 1..NUM.  distinct: different answers
    among NUM, over NUM.  log_prob: mean log p of the strings.  tokens, forwards: drawn, and
    sequential passes.
    """

    task: str
    method: str
    alpha: float
    accuracy: list[float]
    vote: list[float]
    pass_at: list[list[float]]
    distinct: list[float]
    log_prob: list[float]
    tokens: list[float]
    forwards: list[float]
    seconds: float


def pass_at(k: int, right: int, num: int) -> float:
    """The probability that one of k answers, drawn from `num` without putting back, is among the
    `right` ones.
    """
    return 1.0 - comb(num - right, k) / comb(num, k)


def pooled(
    cells: Sequence[Cell], method: str, alpha: float, of: Callable[[Cell], list[float]]
) -> list[float]:
    """The entries of all problems of all tasks, in the order of the tasks."""
    found = sorted(
        (c for c in cells if c.method == method and c.alpha == alpha), key=lambda cell: cell.task
    )
    return [value for cell in found for value in of(cell)]


def difference(
    cells: Sequence[Cell],
    ours: tuple[str, float],
    theirs: tuple[str, float],
    of: Callable[[Cell], list[float]],
) -> tuple[float, float] | None:
    """Mean difference over the same problems, with its standard error; None unless both were run on
    all of them.
    """
    a, b = pooled(cells, *ours, of), pooled(cells, *theirs, of)
    return mean([x - y for x, y in zip(a, b, strict=True)]) if a and len(a) == len(b) else None


Way = tuple[str, float]
"""A method at an alpha."""


def verdict(cells: Sequence[Cell]) -> list[str]:
    """The papers' claims in plain words, as far as the cells go; at 95 % of a normal error."""
    alphas = sorted({cell.alpha for cell in cells} - {1.0})
    claims = [claim for alpha in alphas for claim in _claims(alpha)]
    if len(alphas) > 1:
        text = f"alpha = {alphas[-1]:g} is better than {alphas[0]:g}"
        claims.append((text, ("power MH", alphas[-1]), ("power MH", alphas[0]), "accuracy"))
    lines = []
    for text, ours, theirs, name in claims:
        of = _entries("accuracy" if name == "accuracy" else "pass_at")
        if (found := difference(cells, ours, theirs, of)) is not None:
            gain, error = found
            outcome = f"{name} {gain:+.3f} ± {error:.3f}, {compared(gain, error)}"
            lines.append(f"alpha = {ours[1]:g}: {text}? {outcome}")
    return lines


def _claims(alpha: float) -> list[tuple[str, Way, Way, str]]:
    """What is claimed, of which method, over which other one, in which number."""
    base, cold, mh = ("base sampling", 1.0), ("low temperature", alpha), ("power MH", alpha)
    smc, tempering = ("Power-SMC", alpha), ("tempering", alpha)
    many = f"pass@{NUM}"
    return [
        ("power sampling is more accurate than the base model", mh, base, "accuracy"),
        ("and than low temperature at the same power", mh, cold, "accuracy"),
        ("it keeps the base model's coverage", mh, base, many),
        ("and has more than low temperature", mh, cold, many),
        ("Power-SMC is at least as accurate as MH", smc, mh, "accuracy"),
        ("tempering is more accurate than one rung", tempering, mh, "accuracy"),
    ]


COLUMNS = (
    "method",
    "alpha",
    "accuracy",
    f"pass@{NUM}",
    "vote",
    "distinct",
    "log p",
    "tokens",
    "passes",
)


WIDTH = 100
"""Of the tables: numbers cut short would be worse than lines that a narrow terminal wraps."""


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each task, method and alpha, and for all tasks together."""
    order = list(STYLES)
    keys = sorted(
        {(c.method, c.alpha) for c in cells}, key=lambda key: (key[1], order.index(key[0]))
    )
    found = []
    for task in [*dict.fromkeys(cell.task for cell in cells), None]:
        chosen = [cell for cell in cells if task in (None, cell.task)]
        for method, alpha in keys:
            numbers = [
                mean(values)
                for name in (
                    "accuracy",
                    "pass_at",
                    "vote",
                    "distinct",
                    "log_prob",
                    "tokens",
                    "forwards",
                )
                if (values := pooled(chosen, method, alpha, _entries(name)))
            ]
            if numbers:
                shares = [f"{value:.2f} ± {error:.2f}" for value, error in numbers[:2]]
                rest = [f"{value:.2f}" for value, _ in numbers[2:5]] + [
                    f"{value:.0f}" for value, _ in numbers[5:]
                ]
                found.append((task or "all tasks", method, f"{alpha:g}", *shares, *rest))
    return found


def _entries(name: str) -> Callable[[Cell], list[float]]:
    if name == "pass_at":
        return lambda cell: [row[-1] for row in cell.pass_at]
    return lambda cell: getattr(cell, name)


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The tables and the verdict."""
    for task, found in itertools.groupby(rows(cells), key=lambda row: row[0]):
        numbers = [row[1:] for row in found]
        console.print(tables.table(task, COLUMNS, numbers, width=WIDTH), crop=False)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The tables and the verdict as text."""
    return tables.markdown(("task", *COLUMNS), rows(cells), verdict(cells))


def draw(cells: Sequence[Cell]) -> Figure:
    """Accuracy of every method by alpha, one panel per task; and pass@k over all tasks."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = Figure(figsize=(3.1 * (len(tasks) + 1) + 1.6, 3.6), layout="constrained")
    *panels, last = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    alphas = sorted({cell.alpha for cell in cells})
    for axes, task in zip(panels, tasks, strict=True):
        _accuracies(axes, [cell for cell in cells if cell.task == task], alphas)
        axes.set_title(task)
    panels[0].set_ylabel("accuracy (± standard error)")
    _coverage(last, cells)
    return figure


def _accuracies(axes: Axes, cells: Sequence[Cell], alphas: list[float]) -> None:
    for i, (method, (color, marker)) in enumerate(STYLES.items()):
        own = sorted((c for c in cells if c.method == method), key=lambda c: c.alpha)
        if own:
            # Side by side, so that error bars can be told apart.
            x = [alphas.index(c.alpha) + 0.09 * (i - len(STYLES) / 2) for c in own]
            style = {"color": color, "marker": marker, "label": method}
            tables.points(axes, x, [mean(c.accuracy) for c in own], **style)
    labels = [f"{alpha:g}" for alpha in alphas]
    axes.set(xlabel="alpha", xticks=range(len(alphas)), xticklabels=labels)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _coverage(axes: Axes, cells: Sequence[Cell]) -> None:
    for method, (color, marker) in STYLES.items():
        alpha = max((cell.alpha for cell in cells if cell.method == method), default=None)
        if alpha is not None:
            own = [
                row for c in cells if (c.method, c.alpha) == (method, alpha) for row in c.pass_at
            ]
            label = f"{method}, alpha = {alpha:g}"
            y = np.mean(own, axis=0)
            axes.plot(range(1, NUM + 1), y, color=color, marker=marker, label=label)
    axes.set(title="all tasks", xlabel="k", ylabel="pass@k", xticks=range(1, NUM + 1))
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
