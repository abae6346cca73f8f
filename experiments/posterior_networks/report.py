"""What `experiments.posterior_networks` shows: accuracies of two-sample tests beside the published
ones, calibration, robustness, and times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..posterior_tasks import TASKS
from ..showing import tables

PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "NPE": {
        "gaussian_linear": {1_000: 0.694, 10_000: 0.552},
        "gaussian_linear_uniform": {1_000: 0.696, 10_000: 0.553},
        "slcp": {1_000: 0.975, 10_000: 0.901},
        "slcp_distractors": {1_000: 0.982, 10_000: 0.970},
        "bernoulli_glm": {1_000: 0.863, 10_000: 0.678},
        "bernoulli_glm_raw": {1_000: 0.900, 10_000: 0.765},
        "gaussian_mixture": {1_000: 0.731, 10_000: 0.661},
        "two_moons": {1_000: 0.725, 10_000: 0.606},
        "sir": {1_000: 0.815, 10_000: 0.680},
        "lotka_volterra": {1_000: 0.999, 10_000: 0.997},
    },
    "in rounds": {
        "gaussian_linear": {1_000: 0.652, 10_000: 0.544},
        "gaussian_linear_uniform": {1_000: 0.631, 10_000: 0.527},
        "slcp": {1_000: 0.965, 10_000: 0.845},
        "slcp_distractors": {1_000: 0.978, 10_000: 0.931},
        "bernoulli_glm": {1_000: 0.855, 10_000: 0.614},
        "bernoulli_glm_raw": {1_000: 0.906, 10_000: 0.658},
        "gaussian_mixture": {1_000: 0.697, 10_000: 0.583},
        "two_moons": {1_000: 0.643, 10_000: 0.554},
        "sir": {1_000: 0.638, 10_000: 0.561},
        "lotka_volterra": {1_000: 0.990, 10_000: 0.953},
    },
}
"""Mean C2ST of the benchmark's NPE and SNPE (Lueckmann et al. 2021, arXiv 2101.04653), both with
neural spline flows.
"""
COLUMNS = (
    "task", "method", "density", "simulations", "C2ST", "published", "loss", "in 50 %", "in 90 %",
    "worst KL", "s to train", "s to draw", "s to test",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One posterior: of one method and budget for a task, and for these observations.

    accuracies, std_errors: of C2ST, for each observation.  family, decay: the density that was
    chosen, and its weight decay.  loss, covered, p_value: calibration of an amortized one.  worst:
    KL of the worst change, for each observation; nothing of counts.  far: how far observations are
    from the simulations.  seconds_...: of training with compilation, of the draws for an
    observation once compiled, and of its two-sample test.
    """

    task: str
    method: str
    budget: int
    observations: list[int]
    accuracies: list[float]
    std_errors: list[float]
    worst: list[float]
    far: list[float]
    steps: int
    seconds_training: float
    seconds_drawing: float
    seconds_testing: float
    family: str
    decay: float
    loss: float | None = None
    covered: list[float] | None = None
    p_value: float | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """All cells of one method and budget for a task."""

    cells: list[Cell]

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def accuracies(self) -> list[float]:
        return [value for cell in self.cells for value in cell.accuracies]

    @property
    def published(self) -> float:
        return PUBLISHED[self.first.method][self.first.task].get(self.first.budget, np.nan)

    @property
    def better(self) -> bool:
        """Whether the mean is no worse than what was published."""
        return float(np.mean(self.accuracies)) <= self.published

    def mean(self, name: str) -> float:
        """Of a number of every cell."""
        return float(np.mean([getattr(cell, name) for cell in self.cells]))


def groups(cells: Sequence[Cell]) -> list[Group]:
    """In the order of the benchmark's tasks."""
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.method, cell.budget, cell.task), []).append(cell)
    order = list(TASKS)
    return [
        Group(found[key]) for key in sorted(found, key=lambda k: (order.index(k[2]), k[0], k[1]))
    ]


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """A row for each group: means over observations ± their standard error."""
    out = []
    for group in groups(cells):
        cell = group.first
        worst = [value for other in group.cells for value in other.worst]
        loss = "" if cell.loss is None else f"{cell.loss:.3f}"
        covered = [f"{share:.2f}" for share in cell.covered] if cell.covered else ["", ""]
        seconds = (
            f"{group.mean('seconds_training'):.0f}",
            f"{group.mean('seconds_drawing'):.3f}",
            f"{group.mean('seconds_testing'):.0f}",
        )
        accuracy = tables.plus_minus(group.accuracies, 3)
        number = f"{np.median(worst):.2f}" if worst else ""
        out.append(
            (
                cell.task,
                cell.method,
                cell.family,
                f"{cell.budget:,}",
                accuracy,
                f"{group.published:.3f}",
                loss,
                *covered,
                number,
                *seconds,
            )  # fmt: skip
        )
    return out


def verdict(cells: Sequence[Cell]) -> list[str]:
    """On how many tasks a method is no worse than what was published."""
    lines = []
    for method in PUBLISHED:
        for budget in sorted({cell.budget for cell in cells if cell.method == method}):
            own = [g for g in groups(cells) if (g.first.method, g.first.budget) == (method, budget)]
            num = len(own[0].accuracies)
            lines.append(
                f"{method}, {budget:,} simulations: mean C2ST over {num} observations no worse than"
                f" published on {sum(g.better for g in own)} of {len(own)} tasks"
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
    """Accuracies of all observations and their means beside the published ones: 0.5 is a posterior
    that cannot be told from the reference.
    """
    budgets = sorted({cell.budget for cell in cells})
    names = [name for name in TASKS if name in {cell.task for cell in cells}]
    size = (4.2 * len(budgets) + 1.5, 0.42 * max(len(names), 4) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(budgets), sharey=True))
    methods = list(PUBLISHED)
    for axes, budget in zip(panels, budgets, strict=True):
        for group in (g for g in groups(cells) if g.first.budget == budget):
            place = methods.index(group.first.method)
            y = names.index(group.first.task) + 0.3 * (place - 0.5)
            color = f"C{place}"
            values = group.accuracies
            axes.plot(values, np.full(len(values), y), ".", color=color, alpha=0.3, markersize=4)
            axes.plot(np.mean(values), y, "o", color=color, markersize=6)
            axes.plot(group.published, y, "|", color="k", markersize=11, markeredgewidth=1.5)
        axes.axvline(0.5, color="0.8", zorder=0)
        axes.set(
            title=f"{budget:,} simulations",
            xlim=(0.48, 1.01),
            yticks=range(len(names)),
            yticklabels=names,
        )
        axes.set_xlabel("accuracy of a two-sample test (C2ST)")
    for place, method in enumerate(methods):
        if method in {cell.method for cell in cells}:
            panels[0].plot([], [], "o", color=f"C{place}", label=method)
    panels[0].plot([], [], "|", color="k", markersize=11, markeredgewidth=1.5, label="published")
    panels[0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
