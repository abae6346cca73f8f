"""What `experiments.latent_arithmetic` shows: a table, a figure, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ..showing import tables
from ..showing.tables import compared, mean, plus_minus

BASE, SUPERVISED, GFLOWNET = "base", "supervised", "GFlowNet"
STYLES = {BASE: "0.45", SUPERVISED: "C0", GFLOWNET: "C3"}
ACCURACIES = ("greedy", "sampled", "logmeanexp", "importance", "geomean_norm")
COLUMNS = ("rationales", *ACCURACIES, "log p(y|x)", "ESS")


@dataclasses.dataclass(frozen=True)
class Cell:
    """The rationales of one method for sums of so many terms; every list has one entry per
    question.

    greedy: whether the likeliest answer after the greedy rationale is right.  sampled: the
    probability of the right one of the ten answers, averaged over drawn rationales.  logmeanexp,
    importance, geomean_norm: whether the answer ranked first is right (`amortized.strings.latent`;
    only the base model's rationales make the first a likelihood).  log_likelihood: log p(right
    answer | question) by importance, a lower bound in expectation.  ess: of the right answer's
    posterior, over the number of rationales.  training_seconds: less what an interrupted run had
    made before.
    """

    method: str
    num_terms: int
    in_distribution: bool
    greedy: list[float]
    sampled: list[float]
    logmeanexp: list[float]
    importance: list[float]
    geomean_norm: list[float]
    log_likelihood: list[float]
    ess: list[float]
    training_seconds: float

    @property
    def sums(self) -> str:
        """Which sums these are, in words."""
        return f"{self.num_terms} terms, {'as trained' if self.in_distribution else 'longer'}"


def _sums(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.sums for cell in sorted(cells, key=lambda cell: cell.num_terms)))


def _of(cells: Sequence[Cell], sums: str) -> list[Cell]:
    return [
        cell for method in STYLES for cell in cells if (cell.method, cell.sums) == (method, sums)
    ]


def rows(cells: Sequence[Cell], sums: str) -> list[tuple[str, ...]]:
    """One row for each method."""
    return [
        (
            cell.method,
            *(plus_minus(getattr(cell, name)) for name in ACCURACIES),
            plus_minus(cell.log_likelihood),
            f"{mean(cell.ess)[0]:.2f}",
        )
        for cell in _of(cells, sums)
    ]


def verdict(cells: Sequence[Cell]) -> list[str]:
    """What is trained against the base model and against each other, on the same questions; at 95
    %, normal errors.
    """
    names = {
        "sampled": "sampled accuracy",
        "importance": "accuracy by importance",
        "log_likelihood": "log p(y | x)",
    }
    pairs = ((GFLOWNET, SUPERVISED), (GFLOWNET, BASE), (SUPERVISED, BASE))
    lines = []
    for sums in _sums(cells):
        by_method = {cell.method: cell for cell in _of(cells, sums)}
        for ours, theirs in pairs:
            if ours not in by_method or theirs not in by_method:
                continue
            parts = []
            for name, text in names.items():
                a, b = (getattr(by_method[method], name) for method in (ours, theirs))
                gain, error = mean([x - y for x, y in zip(a, b, strict=True)])
                parts.append(f"{text} {gain:+.2f} ± {error:.2f}, {compared(gain, error)}")
            lines.append(f"{sums}: {ours} against {theirs}: {'; '.join(parts)}")
    return lines


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The tables and the verdict."""
    for sums in _sums(cells):
        # The errors, for which a terminal is too narrow, are in the saved table.
        short = [[value.split(" ±")[0] for value in row] for row in rows(cells, sums)]
        console.print(tables.table(f"{sums}, means", COLUMNS, short, padding=0))
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The tables and the verdict as text."""
    found = [(sums, *row) for sums in _sums(cells) for row in rows(cells, sums)]
    return tables.markdown(("sums", *COLUMNS), found, verdict(cells))


def draw(cells: Sequence[Cell]) -> Figure:
    """Accuracies of every method, one panel for each length; then the right answer's log-likelihood
    and the ESS.
    """
    sums = _sums(cells)
    figure = Figure(figsize=(4.2 * len(sums) + 5.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(sums) + 2, width_ratios=[4.2] * len(sums) + [2.6, 2.6])
    for axes, which in zip(panels, sums, strict=False):
        _points(
            axes,
            [
                (cell, [mean(getattr(cell, name)) for name in ACCURACIES])
                for cell in _of(cells, which)
            ],
        )
        axes.set(title=which, ylim=(-0.03, 1.03))
        axes.set_xticks(range(len(ACCURACIES)), ACCURACIES, rotation=25, ha="right")
    panels[0].set_ylabel("accuracy (± standard error)")
    for axes, name, title in zip(
        panels[-2:], ("log_likelihood", "ess"), ("log p(y | x)", "ESS / N"), strict=True
    ):
        for method in STYLES:
            found = [cell for which in sums for cell in _of(cells, which) if cell.method == method]
            if found:
                _points(axes, [(found[0], [mean(getattr(cell, name)) for cell in found])])
        axes.set(title=title)
        axes.set_xticks(range(len(sums)), sums, rotation=25, ha="right")
        axes.margins(x=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _points(axes: Axes, found: Sequence[tuple[Cell, Sequence[tuple[float, float]]]]) -> None:
    """Means with their errors at 0, 1, ...; methods side by side, so that error bars can be told
    apart.
    """
    for cell, points in found:
        x = [i + 0.15 * (list(STYLES).index(cell.method) - 1) for i in range(len(points))]
        style = {"color": STYLES[cell.method], "linestyle": "", "label": cell.method}
        tables.points(axes, x, points, **style)
    axes.grid(alpha=0.25)
