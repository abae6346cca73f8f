"""What `experiments.budgets` shows: for each world accuracies at budgets and what they cost, a
figure, and verdicts on what is claimed of these methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich.console import Console

from ..showing import tables
from .methods import ALL

BOOTSTRAP = 2000
MARGIN = 0.02
"""Accuracies that differ by less are as good as equal, where draws are to be saved."""
ROUNDING = 1e-6
"""An error below it is none."""
PARTS = {
    "choices": (0, "an answer chosen from n draws"),
    "steps": (0, "with a process reward"),
    "stopping": (1, "majorities of as many as a rule wants"),
    "allocation": (2, "prompts solved: a perfect checker"),
}
"""Of the figure, the column of each and its title."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one budget of tokens for each prompt of a world.

    num: strings that the budget buys.  accuracies, tokens: [P] of each prompt, means over draws;
    empty where nothing could be run, and then `why` says it.  reward_calls, depth: of a prompt.
    exact: the mean accuracy on these prompts by a law, where there is one.
    """

    world: str
    part: str
    method: str
    budget: int
    num: int
    accuracies: list[float]
    tokens: list[float]
    reward_calls: float
    depth: float
    exact: float | None = None
    why: str = ""


def std_error(values: Float[np.ndarray, " P"]) -> float:
    """Of the mean over prompts, by the bootstrap; prompts are drawn alike for all methods."""
    return float(_resampled(values).std())


def _resampled(values: Float[np.ndarray, " P"]) -> Float[np.ndarray, " B"]:
    rows = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAP, len(values)))
    return values[rows].mean(1)


def curve(cells: Sequence[Cell], world: str, method: str) -> list[Cell]:
    """What was run of a method, by budget."""
    found = [c for c in cells if (c.world, c.method) == (world, method) and c.accuracies]
    return sorted(found, key=lambda cell: cell.budget)


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def worlds(cells: Sequence[Cell]) -> list[str]:
    """In the order in which they were run."""
    return _unique([cell.world for cell in cells])


# Verdicts.


def verdicts(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of what is claimed: for each world yes, no or undecided at 95 %, with the
    difference and its standard error.

    Differences are of the same prompts.  No is that the opposite holds.
    """
    names = worlds(cells)
    found = {world: _claims(cells, world) for world in names}
    claims = _unique([claim for world in names for claim in found[world]])
    return ["claim", *names], [(c, *(found[w].get(c, "") for w in names)) for c in claims]


def _claims(cells: Sequence[Cell], world: str) -> dict[str, str]:
    coverage, majority = (curve(cells, world, method) for method in ("pass@n", "majority"))
    best, found = curve(cells, world, "best of n"), dict[str, str]()
    if len(coverage) > 1:
        gains = (_gain(run[-1], run[-2]) for run in (coverage, majority))
        found["pass@n still grows, more than majority"] = _said(next(gains) - next(gains))
    if len(best) > 1:
        found["best of n falls with n"] = _said(_gain(best[0], best[-1]))
    for middle in ("majority of bests", "best of majority"):
        for end in ("majority", "best of n"):
            for ours, theirs in _at_last(cells, world, middle, end):
                found[f"{middle} beats {end}"] = _said(_gain(ours, theirs))
    rules = _unique([c.method for c in cells if c.part == "stopping" and c.method != ALL])
    for rule in rules:
        for ours, theirs in _at_last(cells, world, rule, ALL):
            saved = 1 - np.mean(ours.tokens) / np.mean(theirs.tokens)
            kept = _said(_gain(ours, theirs), -MARGIN) if saved >= 0.01 else "no"
            found[f"{rule} saves draws at equal accuracy"] = f"{kept}, {saved:.0%} saved"
    for ours, theirs in ALLOCATIONS:
        gain = _over_budgets(cells, world, ours, theirs)
        if gain is not None:
            found[f"{ours} beats {theirs}"] = _said(gain)
    return found


ALLOCATIONS = (
    ("greedy", "uniform"),
    ("greedy", "IAS"),
    ("greedy, p known", "uniform"),
    ("greedy, p known", "IAS, p known"),
    ("unsolved alike", "uniform"),
)


def _said(gain: Float[np.ndarray, " P"], least: float = 0.0) -> str:
    """Whether a mean over prompts is above `least`."""
    mean, error = float(gain.mean()), std_error(gain)
    # Means over subsets are float32.
    compared = tables.compared(mean - least, max(error, ROUNDING))
    word = {"more": "yes", "less": "no"}.get(compared, compared)
    return f"{word}, {mean:+.3f} ± {error:.3f}"


def _gain(more: Cell, less: Cell) -> Float[np.ndarray, " P"]:
    """Of each prompt, in accuracy."""
    return np.array(more.accuracies) - np.array(less.accuracies)


def _at_last(cells: Sequence[Cell], world: str, ours: str, theirs: str) -> list[tuple[Cell, Cell]]:
    """Both at the largest budget that both have."""
    other = {cell.budget: cell for cell in curve(cells, world, theirs)}
    return [(c, other[c.budget]) for c in curve(cells, world, ours) if c.budget in other][-1:]


def _over_budgets(
    cells: Sequence[Cell], world: str, ours: str, theirs: str
) -> Float[np.ndarray, " P"] | None:
    """The mean gain over the budgets that both have; None if there are none."""
    other = {cell.budget: cell for cell in curve(cells, world, theirs)}
    both = [(c, other[c.budget]) for c in curve(cells, world, ours) if c.budget in other]
    return np.mean([_gain(*pair) for pair in both], axis=0) if both else None


# Tables.


def table(cells: Sequence[Cell], world: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of a world: a row for each method, a column for each budget, and what the
    largest that was run costs.
    """
    ours = [cell for cell in cells if cell.world == world]
    budgets = sorted({cell.budget for cell in ours})
    columns = ["method", *(f"{b} tokens" for b in budgets), "exact", "tokens", "calls", "depth"]
    rows = []
    for method in _unique([cell.method for cell in ours]):
        at = {cell.budget: cell for cell in ours if cell.method == method}
        run = curve(cells, world, method)
        costs = ("", "", "", "")
        if run:
            last = run[-1]
            exact = "" if last.exact is None else f"{last.exact:.3f}"
            tokens = np.mean(last.tokens)
            costs = (exact, f"{tokens:.0f}", f"{last.reward_calls:.1f}", f"{last.depth:.0f}")
        rows.append((method, *(_point(at.get(b)) for b in budgets), *costs))
    return columns, rows


def _point(cell: Cell | None) -> str:
    if cell is None or not cell.accuracies:
        return "" if cell is None else cell.why
    values = np.array(cell.accuracies)
    return f"{values.mean():.3f} ± {std_error(values):.3f}"


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The tables, and what they say about the claims."""
    for world in worlds(cells):
        columns, rows = table(cells, world)
        console.print(tables.table(_title(cells, world), columns, rows))
    console.print(tables.table("claims", *verdicts(cells)))


def markdown(cells: Sequence[Cell]) -> str:
    """The same as text."""
    parts = []
    for world in worlds(cells):
        parts.append(f"{_title(cells, world)}\n\n{tables.markdown(*table(cells, world), left=1)}\n")
    return "\n".join([*parts, tables.markdown(*verdicts(cells), left=1)])


def _title(cells: Sequence[Cell], world: str) -> str:
    nums = sorted({(c.budget, c.num) for c in cells if c.world == world and c.accuracies})
    draws = ", ".join(dict.fromkeys(str(num) for _, num in nums))
    return f"{world}: {draws} draws; exact and costs are of the largest budget"


# The figure.


def draw(cells: Sequence[Cell]) -> Figure:
    """Accuracy against the tokens that were spent, with the 90 % bands of the bootstrap: a row for
    each world, a column for each kind of method.
    """
    names = worlds(cells)
    num = 1 + max(PARTS[cell.part][0] for cell in cells)
    figure = Figure(figsize=(4.6 * num, 3.1 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), num, squeeze=False)
    for axes, world in zip(grid, names, strict=True):
        for ax in axes:
            ax.set_axis_off()
        for part in _unique([cell.part for cell in cells if cell.world == world]):
            column, title = PARTS[part]
            ax = axes[column]
            _panel(ax, [cell for cell in cells if (cell.world, cell.part) == (world, part)], world)
            ax.set_axis_on()
            ax.set(xlabel="tokens per prompt", xscale="log", ylabel="accuracy")
            ax.set_title(f"{world}: {title}", fontsize=9)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.25)
            ax.legend(fontsize=6.5, frameon=False)
    return figure


def _panel(ax: Axes, cells: Sequence[Cell], world: str) -> None:
    for i, method in enumerate(_unique([cell.method for cell in cells])):
        run = curve(cells, world, method)
        if not run:
            continue
        tokens = [np.mean(cell.tokens) for cell in run]
        values = [_resampled(np.array(cell.accuracies)) for cell in run]
        low, high = np.quantile(values, [0.05, 0.95], axis=1)
        color = f"C{i % 10}"
        mean = [np.mean(cell.accuracies) for cell in run]
        ax.plot(tokens, mean, marker="o", markersize=3, linewidth=1.2, color=color, label=method)
        ax.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
