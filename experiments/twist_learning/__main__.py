"""Do learned twists tighten what SMC knows of log Z, on both sides, and which objective learns
fastest?

    python -m experiments.twist_learning                      # a prefix table, where log Z is known
    python -m experiments.twist_learning --model smollm2-135m # and a gap in a story

Every objective of `amortized.objectives.twisting` trains a twist that starts as 1; now and then SMC
with the twist bounds log Z from below, and conditional SMC on exact draws from above (arXiv
2404.17546).  Every finished cell is saved, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from amortized import fit
from amortized.objectives.twisting import CTL, DPG, FUDGE, SIXO, SoftQ
from amortized.strings import twists
from amortized.strings.guide import Guide
from ppl.rows import take_rows
from ppl.target import Target
from ppl.twists import twisted
from samplers.smc import bounds

from .. import grid
from . import report, worlds
from .report import NONE, Cell
from .worlds import World

OBJECTIVES = {"CTL": CTL, "DPG": DPG, "SIXO": SIXO, "FUDGE": FUDGE, "SoftQ": SoftQ}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One world: the steps after which bounds are taken, N, runs of each bound, and strings of each
    kind per step.
    """

    objectives: tuple[str, ...]
    steps: tuple[int, ...]
    num_particles: tuple[int, ...]
    num_runs: int
    num_strings: int


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run; `model` is the language model of the second world, or "" to leave it out."""

    table: Setting = Setting(tuple(OBJECTIVES), (0, 30, 100, 300, 1000, 3000), (4, 16), 500, 64)
    continuation: Setting = Setting(("CTL",), (0, 10, 30), (8,), 8, 8)
    model: str = ""
    seed: int = 0


QUICK = Config(table=Setting(("CTL", "SoftQ"), (0, 20, 200), (4, 16), 200, 32))


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Measure all cells that are not there yet, and append and save each."""
    key = jax.random.key(config.seed)

    @functools.cache
    def world(name: str) -> World:
        world_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if name == "table":
            return worlds.table(world_key, config.table.num_runs)
        return worlds.continuation(world_key, config.model)

    def measured(name: str, objective: str, setting: Setting) -> list[Cell]:
        # A cell's draws do not depend on which cells were run before.
        cell_key = jax.random.fold_in(key, zlib.crc32(f"{name} {objective}".encode()))
        return measure(cell_key, name, world(name), objective, setting)

    settings = {"table": config.table} | (
        {"continuation": config.continuation} if config.model else {}
    )
    done = {(cell.world, cell.objective) for cell in cells}
    wanted = [
        (w, o, s) for w, s in settings.items() for o in (NONE, *s.objectives) if (w, o) not in done
    ]
    pending = [(f"{w}, {o}", functools.partial(measured, w, o, s)) for w, o, s in wanted]
    grid.fill(console, out, config, cells, pending)


def measure(
    key: jax.Array, name: str, world: World, objective: str, setting: Setting
) -> list[Cell]:
    """Train by one objective, and take both bounds on the way, at every N; without an objective,
    once.
    """
    fit_key, bound_key = jax.random.split(key)
    found: list[Cell] = []
    begin = time.perf_counter()
    for steps, twist in _trained(fit_key, world, objective, setting):
        seconds = time.perf_counter() - begin
        target = world.target
        target = target if twist is None else twisted(target, twists.of(twist.lm, target))
        for num in setting.num_particles:
            # The same key for all steps: what differs is the twist.
            out = _bounds(jax.random.fold_in(bound_key, num), target, world, num, setting.num_runs)
            lower, upper = (
                (float(out.lower), float(out.lower_std_error)),
                (float(out.upper), float(out.upper_std_error)),
            )
            found.append(Cell(name, objective, steps, num, *lower, *upper, world.log_z, seconds))
        begin = time.perf_counter() - seconds
    return found


def _trained(
    key: jax.Array, world: World, objective: str, setting: Setting
) -> Iterator[tuple[int, Guide | None]]:
    """The twist after each number of steps; a run that is stopped and goes on is the run that was
    not.
    """
    if objective == NONE:
        yield 0, None
        return
    twist, num = world.twist, setting.num_strings
    # As in practice, positive strings come from SMC with the twist, though exact ones are at hand.
    training = twists.training(
        twist, world.target, OBJECTIVES[objective](), num_positive=num, num_negative=num
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(world.learning_rate, setting.steps[-1]))
    with tempfile.TemporaryDirectory() as directory:
        for steps in setting.steps:
            if steps:
                options = {
                    "optimizer": optimizer,
                    "num_steps": steps,
                    "chunk": 10,
                    "progress": False,
                }
                out = fit.run(key, training, **options, directory=directory)
                yield steps, dataclasses.replace(twist, params=out.params)
            else:
                yield 0, twist


def _bounds(key: jax.Array, target: Target, world: World, num: int, num_runs: int) -> bounds.Bounds:
    available = world.exact.length.shape[0]
    draws = take_rows(world.exact, jnp.arange(num_runs) % available)
    # A single exact draw: its runs differ in what SMC draws, and their error does not know of other
    # draws.
    return bounds.run(
        key, target, draws, num_particles=num, batch_size=num_runs if available > 1 else 1
    )


EXPERIMENT = grid.Experiment(
    name="twist_learning",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("model",),
    configure=lambda args: QUICK if args.quick else Config(),
    run=run,
    quick="two objectives, few steps",
    model=("", "also a gap in a story told by this model"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
