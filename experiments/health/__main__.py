"""Does a run of SMC know when its log Z is wrong?  Six constrained targets at powers 1, 2 and 4.

    python -m experiments.health

`smc.run` as it is by default, and with independent particles from the locally optimal law (the
default before, and still that of alpha = 1), N = 32, ten keys each.  A run is right within 1 nat of
what log Z is (`reference`), flagged if `diagnostics.health` says that it cannot be trusted, and
silently wrong otherwise.  Every finished cell is saved, so an interrupted run goes on where it
stopped.
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
import numpy as np
from rich.console import Console

import models
from ppl.target import Target
from samplers import diagnostics, smc
from samplers.results import Weighted
from samplers.strings import proposals

from .. import grid
from . import report
from .reference import bounds
from .report import REFERENCE, Cell
from .targets import KINDS, target

OPTIONS = {"default": {}, "independent": {"proposal": proposals.locally_optimal}}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: the targets, the powers, how many keys, and how many particles the reference
    has.
    """

    targets: tuple[str, ...] = tuple(KINDS)
    alphas: tuple[float, ...] = (4.0, 2.0, 1.0)
    num_keys: int = 10
    num_particles: int = 32
    width: int = 128
    model: str = "smollm2-135m"
    seed: int = 0


QUICK = Config(targets=("number",), alphas=(4.0, 1.0), num_keys=2, width=48)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure all cells that are not there yet, and append and save each."""
    load = functools.cache(lambda: models.load(config.model))
    of = functools.cache(lambda name, alpha: target(name, alpha, *load()))
    done = {(cell.target, cell.alpha, cell.method) for cell in cells}

    def measure(name: str, alpha: float, method: str) -> list[Cell]:
        if method == REFERENCE:
            return [reference(of(name, alpha), name, alpha, config)]
        return [measured(of(name, alpha), name, alpha, method, config)]

    ways = [
        (alpha, method)
        for alpha in config.alphas
        for method in (REFERENCE, *OPTIONS)
        # At alpha = 1 the two are one.
        if (alpha, method) != (1.0, "independent")
    ]
    wanted = [(name, alpha, method) for alpha, method in ways for name in config.targets]
    pending = [
        (f"{name}, alpha = {alpha:g}, {method}", functools.partial(measure, name, alpha, method))
        for name, alpha, method in wanted
        if (name, alpha, method) not in done
    ]
    grid.fill(console, out, config, cells, pending)


def reference(gamma: Target, name: str, alpha: float, config: Config) -> Cell:
    """What log Z is, of two: the lower bound of a beam, and a long run."""
    start = time.perf_counter()
    lower, upper = (float(x) for x in bounds(gamma, config.width))
    long = smc.run(jax.random.key(config.seed), gamma, num_particles=config.width)
    found = [lower, upper, float(long.log_z)]
    floors = [floor_of(long)]
    return Cell(name, alpha, REFERENCE, found, [], floors, [], [time.perf_counter() - start])


def measured(gamma: Target, name: str, alpha: float, method: str, config: Config) -> Cell:
    """Runs with as many keys; the time of each is that of the program, without its compilation."""
    how = OPTIONS[method]
    keys = jax.random.split(jax.random.key(config.seed), config.num_keys + 1)
    log_z, error, floor, words, seconds = [], [], [], [], []
    for i, key in enumerate(keys):
        start = time.perf_counter()
        out = jax.block_until_ready(smc.run(key, gamma, num_particles=config.num_particles, **how))
        if i:  # the first compiles
            seconds.append(time.perf_counter() - start)
            log_z.append(float(out.log_z))
            error.append(float(out.log_z_std_error))
            floor.append(floor_of(out))
            words.append("; ".join(diagnostics.health(out).words))
    return Cell(name, alpha, method, log_z, error, floor, words, seconds)


def floor_of(out: Weighted) -> float:
    """A lower bound of log Z: what the different strings in hand weigh."""
    assert out.log_density is not None
    rows = np.column_stack([np.asarray(leaf) for leaf in jax.tree.leaves(out.sequences)])
    first = np.unique(rows, axis=0, return_index=True)[1]
    return float(np.logaddexp.reduce(np.asarray(out.log_density)[first]))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=int, metavar="K", help=f"of each cell ({Config.num_keys})")


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    return config if args.keys is None else dataclasses.replace(config, num_keys=args.keys)


EXPERIMENT = grid.Experiment(
    name="health",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("targets", "alphas"),
    configure=_configure,
    run=run,
    quick="one target, two keys",
    options=_options,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
