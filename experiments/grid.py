"""Experiments made of cells: each is measured once and saved at once, so that an interrupted run
goes on later.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from models.refusals import reading
from ppl.files import replacing, together
from samplers.saving import device, versions

from . import compilation
from .showing import saving

Pending = tuple[str, Callable[[], Sequence[Any]]]
"""What is still to be measured: its label, and a function that makes its cells (dataclasses)."""


INTERRUPTED = 130
"""The exit status of a run that was stopped, as shells have it."""


class Report(Protocol):
    """A module that shows cells."""

    def show(self, console: Console, cells: Sequence[Any]) -> None: ...
    def draw(self, cells: Sequence[Any]) -> Figure: ...
    def markdown(self, cells: Sequence[Any]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `main` runs.

    Attributes:
        name: of its folder in `experiments`.
        about: the first paragraph says what is asked: the module's docstring.
        report: shows its cells.
        cell: a dataclass, one result.
        which: the entries of the config that only say which cells there are.
        configure: the options of the command line -> a config, a dataclass with a `seed` and, if
            there is a model, a `model`, which `main` sets after `configure`.
        run: (config, cells, folder, console) measures what is missing, appends it to the cells and
            saves it (`fill`).
        quick: what `--quick` means.
        options: adds options of its own to the parser.
        model: the default, and what it is for; None where there is none.
        part: of a config, the folder within the results'.
    """

    name: str
    about: str
    report: Report
    cell: Callable[..., Any]
    which: Collection[str]
    configure: Callable[[argparse.Namespace], Any]
    run: Callable[[Any, list[Any], Path, Console], None]
    quick: str
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    model: tuple[str, str] | None = ("smollm2-135m", "a name or a directory")
    part: Callable[[Any], str] = lambda config: ""


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Go on from what an earlier run left, and show and save all there is; returns the exit status:
    0, 130 if interrupted.

    An interrupt keeps what there is.
    """
    args, console = _parse(experiment, argv), Console()
    compilation.use_cache()
    config = experiment.configure(args)
    given = {name: getattr(args, name) for name in ("model", "seed") if hasattr(args, name)}
    config = dataclasses.replace(config, **given)
    out = args.out / experiment.part(config)
    out.mkdir(parents=True, exist_ok=True)
    cells, status = load(out / saving.RESULTS, config, experiment.cell, experiment.which), 0
    say = functools.partial(console.print, style="dim", highlight=False)
    if cells:
        say(f"{len(cells)} results of an earlier run in {out} are kept")
    try:
        experiment.run(config, cells, out, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", style="yellow")
        status = INTERRUPTED
    if cells:
        experiment.report.show(console, cells)
        with together(out) as fresh:
            experiment.report.draw(cells).savefig(fresh / "figure.png", dpi=160)
            (fresh / "table.md").write_text(experiment.report.markdown(cells), encoding="utf-8")
        say(f"saved in {out}: {saving.RESULTS}, table.md, figure.png")
    return status


def _parse(experiment: Experiment, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of all experiments, and its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}", description=summary(experiment.about)
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=experiment.quick)
    experiment.options(parser)
    if experiment.model is not None:
        model, text = experiment.model
        add("--model", default=model, help=f"{text} ({model or 'none'})")
    add("--seed", type=int, default=0, help="of the random key and the problems (%(default)s)")
    out = Path("results") / experiment.name
    add("--out", type=Path, default=out, metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def summary(about: str) -> str:
    """The first paragraph of a docstring, in a line."""
    return " ".join(about.split("\n\n")[0].split())


def fill(
    console: Console, out: Path, config: Any, cells: list[Any], pending: Sequence[Pending]
) -> None:
    """Measure whatever is pending, append its cells, and save all cells in the folder `out` after
    each; shows a progress bar.
    """
    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(pending))
        for label, measure in pending:
            progress.update(bar, description=label)
            cells += measure()
            save(out / saving.RESULTS, config, cells)
            progress.advance(bar)


def save(path: Path, config: Any, cells: Sequence[Any]) -> None:
    """Write all cells, with what they depend on; `config` is a dataclass with a `seed`."""
    document = {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "device": device(),
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist(),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(path: Path, config: Any, kind: Callable[..., Any], which: Collection[str]) -> list[Any]:
    """The cells of an earlier run, if all that a single cell depends on is the same; else none.

    `which` names the entries of the config that only say which cells there are.
    """
    if not path.exists():
        return []
    with reading(path, "the results of an earlier run, or none"):
        document = json.loads(path.read_text(encoding="utf-8"))
    # As JSON has it: lists for tuples.
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    same = all(
        document["config"].get(name) == value for name, value in mine.items() if name not in which
    )
    return [kind(**cell) for cell in document["cells"]] if same else []
