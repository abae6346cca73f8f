"""What `experiments.particle_filtering` shows: a table, a figure, and a verdict on what the papers
claim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..showing import tables

SEARCHES = ("best-of-n", "beam search", "DVTS")
FILTERS = ("PF exact", "PF published")
ENTROPIC = (
    ("ePF exact", "PF exact each step"),
    ("ePF exact, vote", "PF exact each step, vote"),
    ("ePF published", "PF published"),
)
"""Pairs that differ in annealing only: with the trigger ESS < N / 2, two particles are never
resampled at all.
"""
SMALL_N = 8
CLAIMED_RATIO = 4.0
BOOTSTRAP = 2000
STYLES = {
    "best-of-n": ("0.35", "o", "-"),
    "weighted best-of-n": ("0.6", "s", "-"),
    "majority": ("0.8", "v", "-"),
    "beam search": ("C2", "^", "-"),
    "DVTS": ("C8", "D", "-"),
    "PF exact": ("C0", "o", "-"),
    "PF exact each step": ("C0", "v", "--"),
    "PF published": ("C0", "o", ":"),
    "ePF exact": ("C3", "s", "-"),
    "ePF published": ("C3", "s", ":"),
    "ePF exact + look-ahead": ("C4", "P", "-"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measured point: accuracy with its standard error, and mean costs per problem."""

    reward: str
    family: str
    method: str
    num: int
    accuracy: float
    std_error: float
    tokens: float
    forwards: float
    reward_calls: float
    seconds: float


def curve(cells: Sequence[Cell], reward: str, method: str) -> list[Cell]:
    """A method's cells by N."""
    found = [cell for cell in cells if cell.reward == reward and cell.method == method]
    return sorted(found, key=lambda cell: cell.num)


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def budget_ratio(
    ours: Sequence[Cell], theirs: Sequence[Cell], rng: np.random.Generator
) -> tuple[float, float, float]:
    """How many times fewer tokens we need for the accuracy that they reach with their largest
    budget.

    Our curve is made monotone and interpolated in the logarithm of tokens.  Returns the ratio and
    its 90 % interval over 2000 draws of all accuracies from their normal errors.  Where our
    smallest budget does better the ratio is a lower bound, where our largest does worse it is too
    large: the ends of the curves are what there is.
    """
    log_tokens = np.log([cell.tokens for cell in ours])

    def ratio(mine: Float[np.ndarray, " K"], other: Float[np.ndarray, " L"]) -> float:
        # Strictly increasing, as the interpolation needs it.
        rising = np.maximum.accumulate(mine) + 1e-9 * np.arange(len(mine))
        return float(
            theirs[int(np.argmax(other))].tokens
            / np.exp(np.interp(other.max(), rising, log_tokens))
        )

    (mine, mine_error), (other, other_error) = (
        np.array([[cell.accuracy, cell.std_error] for cell in cells]).T for cells in (ours, theirs)
    )
    draws = [
        ratio(
            mine + mine_error * rng.normal(size=mine.shape),
            other + other_error * rng.normal(size=other.shape),
        )
        for _ in range(BOOTSTRAP)
    ]
    low, high = np.quantile(draws, [0.05, 0.95])
    return ratio(mine, other), float(low), float(high)


def verdict(cells: Sequence[Cell]) -> list[str]:
    """The papers' two claims, in plain words, as far as the cells go."""
    lines = []
    for reward in _unique([cell.reward for cell in cells]):
        lines += [
            f"{reward} reward: {line}"
            for line in [*_scaling(cells, reward), *_annealing(cells, reward)]
        ]
    return lines


def _scaling(cells: Sequence[Cell], reward: str) -> list[str]:
    """Claim 1: particle filtering scales 4 to 16 times better than search."""
    lines = []
    for ours, theirs in itertools.product(FILTERS, SEARCHES):
        mine, other = curve(cells, reward, ours), curve(cells, reward, theirs)
        if len(mine) < 2 or len(other) < 2:
            continue
        ratio, low, high = budget_ratio(mine, other, np.random.default_rng(0))
        word = (
            "holds"
            if low >= CLAIMED_RATIO
            else "does not hold"
            if high < CLAIMED_RATIO
            else "is undecided"
        )
        lines.append(
            f"{ours} needs {ratio:.2g} times fewer tokens [{low:.2g}, {high:.2g}] for the best"
            f" accuracy of {theirs};"
            f" the claim of 4 to 16 times {word} here"
        )
    return lines


def _annealing(cells: Sequence[Cell], reward: str) -> list[str]:
    """Claim 2: entropic annealing helps where rewards are overconfident and N is small."""
    lines = []
    for ours, theirs in ENTROPIC:
        both = itertools.product(curve(cells, reward, ours), curve(cells, reward, theirs))
        same = [(a, b) for a, b in both if a.num == b.num > 1]
        for small in (True, False):
            pairs = [(a, b) for a, b in same if (a.num <= SMALL_N) == small]
            if not pairs:
                continue
            gain = float(np.mean([a.accuracy - b.accuracy for a, b in pairs]))
            error = float(
                np.sqrt(sum(a.std_error**2 + b.std_error**2 for a, b in pairs)) / len(pairs)
            )
            word = (
                "better"
                if gain > 2 * error
                else "worse"
                if gain < -2 * error
                else "no difference of two errors"
            )
            sizes = f"N from {pairs[0][0].num} to {pairs[-1][0].num}"
            lines.append(
                f"{ours} less {theirs}, {sizes}: accuracy {gain:+.3f} ± {error:.3f}, {word}"
            )
    return lines


COLUMNS = ("method", "N", "accuracy", "tokens", "forwards", "reward calls")


def _rows(cells: Sequence[Cell], reward: str) -> list[tuple[str, ...]]:
    order = list(STYLES)
    chosen = [cell for cell in cells if cell.reward == reward]
    chosen.sort(key=lambda cell: (order.index(_plain(cell.method)), cell.method, cell.num))
    return [
        (
            cell.method,
            str(cell.num),
            f"{cell.accuracy:.3f} ± {cell.std_error:.3f}",
            f"{cell.tokens:.0f}",
            f"{cell.forwards:.1f}",
            f"{cell.reward_calls:.1f}",
        )
        for cell in chosen
    ]


def _plain(method: str) -> str:
    """Votes are listed beside the choice of the best."""
    return method.removesuffix(", vote")


def show(console: Console, cells: Sequence[Cell]) -> None:
    """The tables and the verdict."""
    for reward in _unique([cell.reward for cell in cells]):
        table = Table(
            title=f"{reward} process reward: accuracy and budget per problem", title_justify="left"
        )
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i < 3)
        last = ""
        for method, *numbers in _rows(cells, reward):
            if last and method != last:
                table.add_section()
            table.add_row("" if method == last else method, *numbers)
            last = method
        console.print(table)
    tables.show_list(console, verdict(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """The tables and the verdict as text."""
    parts = []
    for reward in _unique([cell.reward for cell in cells]):
        found = tables.markdown(COLUMNS, _rows(cells, reward), left=1)
        parts.append(f"{reward} process reward\n\n{found}\n")
    return "".join([*parts, *(f"- {line}\n" for line in verdict(cells))])


def draw(cells: Sequence[Cell]) -> Figure:
    """Accuracy against tokens and against calls of the reward, one row for each process reward."""
    rewards = _unique([cell.reward for cell in cells])
    figure = Figure(figsize=(11, 4.2 * len(rewards)), layout="constrained")
    grid = figure.subplots(len(rewards), 2, squeeze=False, sharey="row")
    budgets = {
        "tokens": lambda cell: cell.tokens,
        "calls of the process reward": lambda cell: cell.reward_calls,
    }
    for axes, reward in zip(grid, rewards, strict=True):
        for ax, (name, budget) in zip(axes, budgets.items(), strict=True):
            for method, (color, marker, line) in STYLES.items():
                points = [cell for cell in curve(cells, reward, method) if budget(cell) > 0]
                if points:
                    _line(
                        ax, points, budget, color=color, marker=marker, linestyle=line, label=method
                    )
            ax.set(xscale="log", xlabel=f"{name} per problem", title=f"{reward} process reward")
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("accuracy (± standard error)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _line(ax: Axes, points: Sequence[Cell], budget: Callable[[Cell], float], **style: Any) -> None:
    x = [budget(cell) for cell in points]
    found = [(cell.accuracy, cell.std_error) for cell in points]
    tables.points(ax, x, found, markersize=4.5, linewidth=1.4, **style)
