"""Are the ten tasks of the benchmark, as NumPyro models, those of its reference posteriors?

    python -m experiments.posterior_tasks

Each model's density is compared with 10,000 draws from the posterior of each of ten observations,
by Stein's identities (`stein`), and 10,000 simulations are timed.  The first run fetches the
benchmark's wheel (19 MB).  Every finished task is saved, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from numpyro.infer import Predictive
from rich.console import Console

from .. import grid
from . import report, stein
from .catalogue import TASKS
from .report import Cell
from .task import NUM_OBSERVATIONS, Task


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: which tasks, and how many observations and simulations of each."""

    tasks: tuple[str, ...] = tuple(TASKS)
    num_observations: int = NUM_OBSERVATIONS
    num_simulations: int = 10_000
    seed: int = 0


QUICK = Config(tasks=("gaussian_mixture", "two_moons"), num_observations=2)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure the tasks that are not there yet, and append and save each."""
    done = {cell.task for cell in cells}
    pending = [
        (name, functools.partial(measure, TASKS[name], config))
        for name in config.tasks
        if name not in done
    ]
    grid.fill(console, out, config, cells, pending)


def measure(task: Task, config: Config) -> list[Cell]:
    """One task: its time and its z-scores."""
    z = [
        stein.z_scores(task, task.observation(num), task.reference(num)).ravel().tolist()
        for num in range(1, config.num_observations + 1)
    ]
    words = {name: getattr(task, name) for name in ("prior", "simulator", "density")}
    cell = Cell(task.name, task.dim_theta, task.dim_x, **words, seconds=seconds(task, config), z=z)
    return [cell]


def seconds(task: Task, config: Config) -> float:
    """Of the simulations, without compilation."""
    predictive = Predictive(task.model, num_samples=config.num_simulations, parallel=True)
    simulate = jax.jit(lambda key: predictive(key))
    keys = jax.random.split(jax.random.key(config.seed))
    jax.block_until_ready(simulate(keys[0]))
    start = time.perf_counter()
    jax.block_until_ready(simulate(keys[1]))
    return time.perf_counter() - start


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="some of the ten (all)"
    )


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    return config if args.tasks is None else dataclasses.replace(config, tasks=tuple(args.tasks))


EXPERIMENT = grid.Experiment(
    name="posterior_tasks",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("tasks",),
    configure=_configure,
    run=run,
    quick="two tasks, two observations",
    options=_options,
    model=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
