"""Bars: for a training run (the loss, whatever else it reports, tokens per second), and for loops
on the host.
"""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

HIDDEN = ("skipped", "tokens")


class Bar:
    """A bar in a terminal or a notebook, nothing elsewhere; a context manager."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        console = Console()
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        hidden = not (shown and (console.is_terminal or console.is_jupyter))
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=hidden
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, step: int, rows: dict[str, np.ndarray], seconds: float) -> None:
        """After `step` steps, the last of which reported `rows` and took `seconds`."""
        self._progress.update(self._task, completed=step, description=summary(rows, seconds))


def summary(rows: dict[str, np.ndarray], seconds: float) -> str:
    """The means of some steps in a line: "loss 0.123  elbo -4.56  1,234 tokens/s"."""
    kept = ~rows["skipped"]
    means = {
        name: float(values[kept].mean())
        for name, values in rows.items()
        if name not in HIDDEN and kept.any()
    }
    parts = [f"{name} {value:.4g}" for name, value in means.items()]
    if "tokens" in rows:
        parts.append(f"{rows['tokens'].sum() / max(seconds, 1e-9):,.0f} tokens/s")
    if not kept.all():
        parts.append(f"{(~kept).sum()} skipped")
    return "  ".join(parts)


PATIENCE = 2.0
"""Seconds that a loop on the host runs before its bar appears."""


class Count:
    """A bar for a loop on the host, in a terminal or a notebook, if it takes longer than two
    seconds; a context manager.
    """

    def __init__(self, what: str, total: int) -> None:
        console = Console()
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        hidden = not (console.is_terminal or console.is_jupyter)
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=hidden
        )
        self._task = self._progress.add_task(what, total=total)
        self._start = time.perf_counter()

    def __enter__(self) -> Count:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int) -> None:
        """After `done` turns."""
        if not self._progress.live.is_started and time.perf_counter() - self._start > PATIENCE:
            self._progress.start()
        self._progress.update(self._task, completed=done)
