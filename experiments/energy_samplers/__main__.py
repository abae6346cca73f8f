"""Which diffusion sampler finds all of an energy?

    python -m experiments.energy_samplers

Chains of 100 steps learn to end in energies whose constant is known: by the reverse KL (PIS), by
trajectory balance, the same with exploration, and with a local search as well; as in Sendera et al.
2024 (arXiv 2402.05098).  The mean log-weight of paths is a lower bound of log Z, that of paths back
from exact draws an upper one, and the weighted estimate is unbiased on the linear scale.  Every
finished cell is saved, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from amortized import fit
from amortized.diffusion_samplers import learning, sampling
from amortized.diffusion_samplers.processes import Bridge
from amortized.training import Training
from samplers import diagnostics

from .. import grid
from . import report
from .report import Cell
from .targets import ENERGIES, Energy, modes

METHODS = ("reverse KL", "TB", "TB, explored", "TB, searched", "SubTB, explored")
RATE, RATE_LOG_Z, CLIP = 1e-3, 1e-1, 100.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run: energies and methods; steps of training, paths to a step, steps of a path, and
    how many paths are measured.
    """

    energies: tuple[str, ...] = ("25GMM", "ManyWell")
    methods: tuple[str, ...] = METHODS
    num_steps: int = 5_000
    batch_size: int = 300
    path_steps: int = 100
    num_samples: int = 2_000
    seed: int = 0


QUICK = Config(
    energies=("25GMM",),
    methods=("TB, searched",),
    num_steps=20,
    batch_size=16,
    path_steps=10,
    num_samples=100,
)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Learn and measure what is not there yet, and append and save each cell."""
    done = {(cell.energy, cell.method) for cell in cells}
    pending = [
        (f"{energy}, {method}", functools.partial(measure, config, energy, method))
        for energy in config.energies
        for method in config.methods
        if (energy, method) not in done
    ]
    grid.fill(console, out, config, cells, pending)


def measure(config: Config, name: str, method: str) -> list[Cell]:
    """One sampler of one energy."""
    energy = ENERGIES[name]
    seed = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
    begin, learn, draw, bound, exact, back = jax.random.split(seed, 6)
    training = trained(begin, config, energy, method)
    falling = optax.cosine_decay_schedule(RATE, config.num_steps)
    rates = {"policy": optax.adam(falling), "log_z": optax.adam(RATE_LOG_Z)}
    start = time.perf_counter()
    out = fit.run(
        learn,
        training,
        optimizer=learning.optimizer(**rates),
        num_steps=config.num_steps,
        max_grad_norm=CLIP,
    )
    seconds = time.perf_counter() - start
    sampler = learning.sampler(training, out)
    found = sampling.run(draw, sampler, num_particles=config.num_samples)
    points = np.asarray(found.samples)
    known = energy.draw(exact, config.num_samples)
    return [
        Cell(
            energy=name,
            method=method,
            elbo=float(sampling.elbo(bound, sampler, config.num_samples).mean()),
            eubo=float(sampling.eubo(back, sampler, known).mean()),
            log_z=float(found.log_z),
            ess=float(diagnostics.ess(found.log_weights)) / config.num_samples,
            modes=int((modes(found.samples) > 0.01).sum()) if name == "25GMM" else None,
            seconds=seconds,
            points=points[:500, :2].tolist(),
        )
    ]


def trained(key: jax.Array, config: Config, energy: Energy, method: str) -> Training:
    """What is minimised."""
    process = Bridge(energy.dim, num_steps=config.path_steps, variance=energy.variance)
    if method == "reverse KL":
        return learning.reverse_kl(key, energy.log_density, process, batch_size=config.batch_size)
    width = 0.2 * (energy.variance / config.path_steps) ** 0.5 * 2

    def explore(step: jax.Array) -> jax.Array:
        return width * jnp.maximum(0.0, 1 - 2 * step / config.num_steps)

    return learning.training(
        key,
        energy.log_density,
        process,
        objective=learning.subtb if method.startswith("SubTB") else learning.tb,
        explore=0.0 if method == "TB" else explore,
        search=learning.Search() if method == "TB, searched" else None,
        batch_size=config.batch_size,
    )


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--energies", choices=ENERGIES, nargs="+", help=f"({' '.join(Config.energies)})")
    add("--methods", choices=METHODS, nargs="+", help="(all)")
    add("--steps", type=int, metavar="S", help=f"of training ({Config.num_steps})")


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    given = {"num_steps": args.steps}
    given |= {name: getattr(args, name) and tuple(getattr(args, name)) for name in WHICH}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


WHICH = ("energies", "methods")
EXPERIMENT = grid.Experiment(
    name="energy_samplers",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=WHICH,
    configure=_configure,
    run=run,
    quick="one sampler of one energy, a few steps",
    options=_options,
    model=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
