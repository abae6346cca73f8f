"""Does particle filtering with a process reward scale better than search, and does entropic
annealing help?

    python -m experiments.particle_filtering --world tabular
    python -m experiments.particle_filtering --world arithmetic

Accuracy against budget (tokens, forward passes, calls of the reward) for particle filtering (arXiv
2502.01618) and its entropic form (2510.05825), exact and as published, best-of-n, weighted
best-of-n, majority, beam search and DVTS. Every finished cell is saved, so an interrupted run goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jaxtyping import PRNGKeyArray
from rich.console import Console

from .. import grid
from . import report, tabular_world
from .methods import FAMILIES, Measured
from .report import Cell

REWARDS = ("calibrated", "overconfident")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the world, the families of methods, the numbers of strings, and how much of it;
    whether programs are optimised.
    """

    world: str = "tabular"
    nums: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    families: tuple[str, ...] = tuple(FAMILIES)
    rewards: tuple[str, ...] = REWARDS
    num_problems: int = 16
    replicas: int = 128
    noise: float = 1.0
    model: str = "smollm2-135m"
    seed: int = 0
    optimised: bool = True


QUICK = ("independent draws", "PF exact", "DVTS")
WORLDS = {
    "tabular": (Config(), Config(nums=(4, 16), families=QUICK, replicas=32, optimised=False)),
    "arithmetic": (
        Config(world="arithmetic", nums=(2, 8), rewards=("noisy",), num_problems=10, replicas=1),
        Config(
            world="arithmetic",
            nums=(4,),
            families=QUICK[:2],
            rewards=("noisy",),
            num_problems=3,
            replicas=1,
            optimised=False,
        ),
    ),
}
"""For each world the full and the quick run."""

Measure = Callable[[PRNGKeyArray, str, int, str], dict[str, Measured]]


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "enumerable problems, or arithmetic (%(default)s)"
    add("--world", choices=list(WORLDS), default="tabular", help=text)
    text = "of the step checker of the arithmetic world (%(default)s)"
    add("--noise", type=float, default=Config.noise, help=text)


def _configure(args: argparse.Namespace) -> Config:
    return dataclasses.replace(WORLDS[args.world][args.quick], noise=args.noise)


@contextlib.contextmanager
def _compilation(optimised: bool) -> Iterator[None]:
    """A quick run is mostly compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or not optimised)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure all cells that are not there yet, and append and save each."""
    done = {(cell.family, cell.num, cell.reward) for cell in cells}
    world = functools.cache(lambda: _measure(config))

    def measure(family: str, num: int, reward: str) -> list[Cell]:
        # A cell's draws do not depend on which cells were run before.
        name = zlib.crc32(f"{family} {num}".encode())
        start = time.perf_counter()
        found = world()(jax.random.fold_in(jax.random.key(config.seed), name), family, num, reward)
        seconds = time.perf_counter() - start
        return [Cell(reward, family, method, num, *of, seconds) for method, of in found.items()]

    which = [(f, n, r) for n in config.nums for f in config.families for r in config.rewards]
    pending = [
        (f"{f}, N = {n}, {r}", functools.partial(measure, f, n, r))
        for f, n, r in which
        if (f, n, r) not in done
    ]
    with _compilation(config.optimised):
        grid.fill(console, out, config, cells, pending)


def _measure(config: Config) -> Measure:
    """How a cell of the world is measured."""
    if config.world == "arithmetic":
        from . import arithmetic_world  # needs the package reasoning-gym

        tasks = arithmetic_world.Tasks.make(
            config.model, config.num_problems, config.noise, config.seed
        )
        return lambda key, family, num, reward: tasks.cell(key, family, num)
    problems = tabular_world.problems(config.seed, config.num_problems)
    return lambda key, family, num, reward: tabular_world.cell(
        key, family, num, problems, config.replicas, reward == "overconfident"
    )


EXPERIMENT = grid.Experiment(
    name="particle_filtering",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("nums", "families", "rewards"),
    configure=_configure,
    run=run,
    quick="fewer methods and strings",
    options=_options,
    model=(Config.model, "of the arithmetic world"),
    part=lambda config: config.world,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
