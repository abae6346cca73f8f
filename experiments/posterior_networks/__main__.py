"""How good are learned posteriors on the ten tasks of the public benchmark?

    python -m experiments.posterior_networks

NPE learns each task once, from 1,000 and from 10,000 simulations, and draws 10,000 times for each
of ten observations; truncated NPE learns in ten rounds for each observation.  Their draws are
compared with those of the reference posteriors by C2ST, as the benchmark does, and stand beside its
numbers (Lueckmann et al. 2021, arXiv 2101.04653); what is learned for all observations is also
tested on fresh simulations.  The first run fetches the benchmark's wheel (19 MB).  Every finished
cell is saved, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from amortized.calibration import c2st

from .. import grid
from ..posterior_tasks import TASKS, Task
from ..posterior_tasks.task import NUM_OBSERVATIONS
from . import methods, report
from .methods import Learned
from .report import PUBLISHED, Cell

AMORTIZED, IN_ROUNDS = PUBLISHED


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: which methods, tasks, budgets and observations; and for each posterior how many
    draws are compared, and how many simulations test its calibration.
    """

    methods: tuple[str, ...] = (AMORTIZED,)
    tasks: tuple[str, ...] = tuple(TASKS)
    budgets: tuple[int, ...] = (10_000, 1_000)
    num_observations: int = NUM_OBSERVATIONS
    num_samples: int = 10_000
    num_simulations: int = 1_000
    seed: int = 0


WHICH = ("methods", "tasks", "budgets", "num_observations")
QUICK = Config(
    methods=(AMORTIZED, IN_ROUNDS),
    tasks=("gaussian_mixture",),
    budgets=(1_000,),
    num_observations=1,
    num_samples=500,
    num_simulations=50,
)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Learn and measure what is not there yet, and append and save each cell."""
    done = {(cell.method, cell.budget, cell.task, tuple(cell.observations)) for cell in cells}
    pending = [
        (f"{task}, {method}, {budget:,}", functools.partial(measure, config, *parts))
        for parts in wanted(config)
        if parts not in done
        for method, budget, task, _ in [parts]
    ]
    grid.fill(console, out, config, cells, pending)


def wanted(config: Config) -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
    """Method, budget, task and observations of all cells: of the amortized method all observations
    are in one.
    """
    numbers = tuple(range(1, config.num_observations + 1))
    for method in config.methods:
        for budget in config.budgets:
            for task in config.tasks:
                for part in [numbers] if method == AMORTIZED else [(n,) for n in numbers]:
                    yield method, budget, task, part


def measure(
    config: Config, method: str, budget: int, name: str, observations: tuple[int, ...]
) -> list[Cell]:
    """One posterior."""
    task, calibration = TASKS[name], {}
    words = f"{method}, {budget}, {name}"
    task_key, key = (
        jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(text.encode()))
        for text in (words, f"{words}, {observations[0]}")
    )
    learn_key, compare_key, test_key = jax.random.split(key, 3)
    if method == AMORTIZED:
        learned = methods.amortized(learn_key, task, budget)
        found = methods.calibration(
            test_key, learned.posterior, config.num_simulations, num_samples=199
        )
        calibration = found._asdict()
    else:
        (number,) = observations
        learned = methods.in_rounds((learn_key, task_key), task, budget, number)
    return [
        Cell(
            *(name, method, budget, list(observations)),
            **compared(compare_key, config, learned, task, observations),
            **calibration,
            steps=learned.steps,
            seconds_training=learned.seconds,
            family=learned.density.family,
            decay=learned.density.decay,
        )
    ]


def compared(
    key: jax.Array, config: Config, learned: Learned, task: Task, observations: Sequence[int]
) -> dict[str, Any]:
    """What a cell says of the posterior of each observation."""
    draw_key, test_key, attack_key = jax.random.split(key, 3)
    draws, seconds = drawn(draw_key, learned, task, config.num_samples, observations)
    start = time.perf_counter()
    references = [task.reference(number)[: config.num_samples] for number in observations]
    found = c2st.run(test_key, draws, np.stack(references))
    testing = (time.perf_counter() - start) / len(observations)
    xs = [task.observation(number) for number in observations]
    keys = jax.random.split(attack_key, len(xs))
    worst = [
        methods.worst_change(key, learned.posterior, x) for key, x in zip(keys, xs, strict=True)
    ]
    return {
        "accuracies": found.accuracy.tolist(),
        "std_errors": found.std_error.tolist(),
        "worst": [value for value in worst if value is not None],
        "far": [learned.posterior.far(x) for x in xs],
        "seconds_drawing": seconds,
        "seconds_testing": testing,
    }


def drawn(
    key: jax.Array, learned: Learned, task: Task, num_samples: int, observations: Sequence[int]
) -> tuple[np.ndarray, float]:
    """Draws [B, N, D] for every observation, and the median of their seconds once compiled."""
    draws, seconds = [], []
    learned.posterior.sample(jax.random.fold_in(key, 0), task.observation(1), num_samples)
    for number in observations:
        start, x = time.perf_counter(), task.observation(number)
        sites = learned.posterior.sample(jax.random.fold_in(key, number), x, num_samples)
        draws.append(np.asarray(sites["theta"]))
        seconds.append(time.perf_counter() - start)
    return np.stack(draws), float(np.median(seconds))


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="some of the ten (all)")
    add("--budgets", nargs="+", type=int, metavar="N", help="of simulations (10000 1000)")
    add(
        "--in-rounds",
        action="store_true",
        help="truncated NPE in ten rounds too, for each observation",
    )
    add("--observations", type=int, metavar="B", help="the first so many of the ten (10)")


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    given = {"num_observations": args.observations}
    given |= {name: tuple(v) for name in ("tasks", "budgets") if (v := getattr(args, name))}
    if args.in_rounds:
        given["methods"] = (AMORTIZED, IN_ROUNDS)
    return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


EXPERIMENT = grid.Experiment(
    name="posterior_networks",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=WHICH,
    configure=_configure,
    run=run,
    quick="one task, one observation, 1,000 simulations",
    options=_options,
    model=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
