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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray
from rich.console import Console

from .. import compilation, grid
from ..showing import saving
from . import report, tabular_world
from .methods import FAMILIES, Measured
from .report import Cell

REWARDS = ("calibrated", "overconfident")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the world, the families of methods, the numbers of strings, and how
    much of it.
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


QUICK = ("independent draws", "PF exact", "DVTS")
WORLDS = {
    "tabular": (Config(), Config(nums=(4, 16), families=QUICK, replicas=32)),
    "arithmetic": (
        Config(world="arithmetic", nums=(2, 8), rewards=("noisy",), num_problems=10, replicas=1),
        Config(
            world="arithmetic",
            nums=(4,),
            families=QUICK[:2],
            rewards=("noisy",),
            num_problems=3,
            replicas=1,
        ),
    ),
}
"""For each world the full and the quick run."""

Measure = Callable[[PRNGKeyArray, str, int, str], dict[str, Measured]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    args, console = _parse(argv), Console()
    compilation.use_cache()
    config = dataclasses.replace(
        WORLDS[args.world][args.quick], noise=args.noise, seed=args.seed, model=args.model
    )
    out = args.out / args.world
    out.mkdir(parents=True, exist_ok=True)

    def missing(cells: list[Cell]) -> None:
        with _faster_compilation(args.quick):
            run(config, cells, out, console)

    return grid.main(console, out, config, Cell, ("nums", "families", "rewards"), missing, report)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.particle_filtering", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--world",
        choices=list(WORLDS),
        default="tabular",
        help="enumerable problems, or arithmetic (%(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("results/particle_filtering"),
        metavar="DIR",
        help="(%(default)s)",
    )
    add("--quick", action="store_true", help="fewer methods and strings")
    add(
        "--noise",
        type=float,
        default=Config.noise,
        help="of the step checker of the arithmetic world (%(default)s)",
    )
    add("--model", default=Config.model, help="of the arithmetic world (%(default)s)")
    add("--seed", type=int, default=Config.seed, help="of the random key (%(default)s)")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _faster_compilation(quick: bool) -> Any:
    """A quick run is mostly compilation."""
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


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
    grid.fill(console, out / saving.RESULTS, config, cells, pending)


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


if __name__ == "__main__":
    sys.exit(main())
