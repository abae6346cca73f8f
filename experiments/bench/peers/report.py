"""Sides that take turns in one process, and how many times slower than ours the others were."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

OURS = "tiltlm"

Outcome = TypeVar("Outcome")
Times = dict[str, list[float]]


def take_turns(
    sides: Mapping[str, Callable[[int], Outcome]], rounds: int, title: str
) -> tuple[Times, dict[str, list[Outcome]]]:
    """Seconds and outcomes of every side in each round, after one run of each that is not timed (it
    compiles).

    A side is a function of a seed that returns when its work is done.
    """
    for side in sides.values():
        side(0)
    seconds: Times = {name: [] for name in sides}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in sides}
    names = list(sides)
    for i in track(range(rounds), title, console=Console(stderr=True), transient=True):
        # The order turns, so that whoever follows a neighbour's burst is not always the same.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            outcome = sides[name](i + 1)
            seconds[name].append(time.perf_counter() - start)
            outcomes[name].append(outcome)
    return seconds, outcomes


def time_ratio(seconds: Times, name: str, ours: str = OURS) -> float:
    """The median over rounds of seconds over our seconds, within the round."""
    return statistics.median(t / own for t, own in zip(seconds[name], seconds[ours], strict=True))


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print one comparison; the first column names the sides."""
    view = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        view.add_column(column, justify="right" if i else "left")
    for row in rows:
        view.add_row(*row)
    Console().print(view)
