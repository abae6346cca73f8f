"""What `experiments.power_sampling` shows: a table, a figure, and a verdict on what the papers
claim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from math import comb

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

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


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(
        values
    ) > 1 else 0.0


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


def verdict(cells: Sequence[Cell]) -> list[str]:
    """The papers' claims in plain words, as far as the cells go; at 95 % of a normal error."""

    def accuracy(cell: Cell) -> list[float]:
        return cell.accuracy

    def last_pass(cell: Cell) -> list[float]:
        return [row[-1] for row in cell.pass_at]

    many = f"pass@{NUM}"
    alphas = sorted({cell.alpha for cell in cells} - {1.0})
    claims: list[
        tuple[str, tuple[str, float], tuple[str, float], str, Callable[[Cell], list[float]]]
    ] = []
    for alpha in alphas:
        base, cold, mh = ("base sampling", 1.0), ("low temperature", alpha), ("power MH", alpha)
        claims += [
            ("power sampling is more accurate than the base model", mh, base, "accuracy", accuracy),
            ("and than low temperature at the same power", mh, cold, "accuracy", accuracy),
            ("it keeps the base model's coverage", mh, base, many, last_pass),
            ("and has more than low temperature", mh, cold, many, last_pass),
            (
                "Power-SMC is at least as accurate as MH",
                ("Power-SMC", alpha),
                mh,
                "accuracy",
                accuracy,
            ),
            (
                "tempering is more accurate than one rung",
                ("tempering", alpha),
                mh,
                "accuracy",
                accuracy,
            ),
        ]
    if len(alphas) > 1:
        high, low = ("power MH", alphas[-1]), ("power MH", alphas[0])
        claims.append(
            (
                f"alpha = {alphas[-1]:g} is better than {alphas[0]:g}",
                high,
                low,
                "accuracy",
                accuracy,
            )
        )
    lines = []
    for text, ours, theirs, name, of in claims:
        if (found := difference(cells, ours, theirs, of)) is not None:
            gain, error = found
            word = (
                "more" if gain > 1.96 * error else "less" if gain < -1.96 * error else "undecided"
            )
            lines.append(f"alpha = {ours[1]:g}: {text}? {name} {gain:+.3f} ± {error:.3f}, {word}")
    return lines


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
    table: Table | None = None
    for task, *numbers in rows(cells):
        if table is None or table.title != task:
            if table is not None:
                console.print(table, crop=False)
            table = Table(title=task, title_justify="left", box=box.SIMPLE_HEAD, width=WIDTH)
            for i, name in enumerate(COLUMNS):
                table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        table.add_row(*numbers)
    if table is not None:
        console.print(table, crop=False)
    for line in verdict(cells):
        console.print(f"- {line}", highlight=False)


def markdown(cells: Sequence[Cell]) -> str:
    """The tables and the verdict as text."""
    lines = ["| task | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(cells)]
    return "\n".join([*lines, "", *(f"- {line}" for line in verdict(cells)), ""])


def draw(cells: Sequence[Cell]) -> Figure:
    """Accuracy of every method by alpha, one panel per task; and pass@k over all tasks."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = Figure(figsize=(3.1 * (len(tasks) + 1) + 1.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    alphas = sorted({cell.alpha for cell in cells})
    for axes, task in zip(panels, tasks, strict=False):
        for i, (method, (color, marker)) in enumerate(STYLES.items()):
            points = sorted(
                (c for c in cells if c.task == task and c.method == method), key=lambda c: c.alpha
            )
            if points:
                # Side by side, so that error bars can be told apart.
                x = [alphas.index(c.alpha) + 0.09 * (i - len(STYLES) / 2) for c in points]
                y, error = np.array([mean(c.accuracy) for c in points]).T
                axes.errorbar(
                    x,
                    y,
                    yerr=error,
                    color=color,
                    marker=marker,
                    markersize=5,
                    capsize=2,
                    label=method,
                )
        axes.set(
            title=task,
            xlabel="alpha",
            xticks=range(len(alphas)),
            xticklabels=[f"{a:g}" for a in alphas],
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy (± standard error)")
    for method, (color, marker) in STYLES.items():
        alpha = max((cell.alpha for cell in cells if cell.method == method), default=None)
        if alpha is not None:
            curve: Float[np.ndarray, " K"] = np.mean(
                [row for c in cells if (c.method, c.alpha) == (method, alpha) for row in c.pass_at],
                axis=0,
            )
            panels[-1].plot(
                range(1, NUM + 1),
                curve,
                color=color,
                marker=marker,
                label=f"{method}, alpha = {alpha:g}",
            )
    panels[-1].set(title="all tasks", xlabel="k", ylabel="pass@k", xticks=range(1, NUM + 1))
    panels[-1].grid(alpha=0.25)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure
