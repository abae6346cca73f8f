"""Which variational objective learns the best model of handwritten digits, and how loose is its
bound?

    python -m experiments.digits

One autoencoder with two latents is trained by every objective.  Pictures that none has seen tell
the ELBO and the importance-weighted bound of log p(x), whose difference is what the guide loses;
and how far draws of the guide are from the prior.  The first run fetches scikit-learn's wheel
(10 MB).  Every finished method is saved, so an interrupted run goes on.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro import handlers
from rich.console import Console

from amortized import fit
from amortized.variational import densities, losses, svi

from .. import grid
from . import report, world
from .report import Cell

SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run; `num_test` pictures are held out, and bounds take `num_samples` draws each."""

    methods: tuple[str, ...] = tuple(world.METHODS)
    num_steps: int = 2000
    batch_size: int = 128
    num_test: int = 360
    num_samples: int = 1000
    seed: int = 0


QUICK = Config(methods=("AEVB", "wake-sleep"), num_steps=20, num_test=40, num_samples=20)


def run(config: Config, cells: list[Cell], out: Path, console: Console) -> None:
    """Train by the methods that are not there yet, and append and save each."""
    done = {cell.method for cell in cells}
    pending = [
        (name, functools.partial(measure, name, config))
        for name in config.methods
        if name not in done
    ]
    grid.fill(console, out, config, cells, pending)


def measure(name: str, config: Config) -> list[Cell]:
    """One method: what it learns, and what that is worth on pictures that it has not seen."""
    pictures, labels = world.digits()
    test = pictures[-config.num_test :]
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
    fit_key, weight_key, draw_key = jax.random.split(key, 3)
    begin = time.perf_counter()
    call = _trained(fit_key, name, config, pictures[: -config.num_test])
    seconds = time.perf_counter() - begin
    call = call._replace(kwargs={"x": jnp.asarray(test)})
    what = call.model, call.guide, call.values, call.kwargs
    weights = svi.log_weights(weight_key, *what, num_samples=config.num_samples)
    z, mean, drawn = _drawn(draw_key, call)
    cell = Cell(
        method=name,
        elbo=_listed(weights.mean(0)),
        bound=_listed(jax.nn.logsumexp(weights, axis=0) - np.log(config.num_samples)),
        apart=float(losses.mmd(z, jax.random.normal(draw_key, z.shape))),
        seconds=seconds,
        latents=_listed(z),
        labels=labels[-config.num_test :].tolist(),
        originals=_listed(test[:SHOWN]),
        reconstructed=_listed(mean[:SHOWN]),
        drawn=_listed(drawn),
    )
    return [cell]


def _trained(key: jax.Array, name: str, config: Config, seen: np.ndarray) -> densities.Call:
    """Model and guide with the parameters that a method has learned."""
    net_key, start_key, run_key = jax.random.split(key, 3)
    method = world.METHODS[name]()
    model = world.autoencoder(net_key, len(seen))
    guide = world.encoder(net_key, model, seen, method)
    training = svi.training(
        start_key, model, guide, method.objective, data={"x": seen}, batch_size=config.batch_size
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, config.num_steps))
    how: dict[str, Any] = {"num_steps": config.num_steps, "progress": False}
    out = fit.run(run_key, training, optimizer=optimizer, **how)
    return densities.Call(model, guide, svi.values(training, out), (), {})


def _drawn(key: jax.Array, call: densities.Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A latent for every picture, the mean of the picture that it stands for, and means of new
    ones.
    """

    @jax.jit
    def both(values: Any) -> Any:
        given = call._replace(values=values)
        guide = densities.run(key, call.guide, values, given)
        old = densities.run(key, handlers.replay(call.model, guide), values, given)
        new = densities.run(key, call.model, values, given)
        return guide["z"]["value"], old["logits"]["value"], new["logits"]["value"][: 4 * SHOWN]

    z, old, new = both(call.values)
    return z, world.POINTS * jax.nn.sigmoid(old), world.POINTS * jax.nn.sigmoid(new)


def _listed(values: Any) -> list[Any]:
    return np.round(np.asarray(values, np.float64), 3).tolist()


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", nargs="+", choices=list(world.METHODS), metavar="METHOD", help="some (all)"
    )


def _configure(args: argparse.Namespace) -> Config:
    config = QUICK if args.quick else Config()
    if args.methods is None:
        return config
    return dataclasses.replace(config, methods=tuple(args.methods))


EXPERIMENT = grid.Experiment(
    name="digits",
    about=__doc__ or "",
    report=report,
    cell=Cell,
    which=("methods",),
    configure=_configure,
    run=run,
    quick="two methods, few steps",
    options=_options,
    model=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0, 130 if interrupted."""
    return grid.main(EXPERIMENT, argv)


if __name__ == "__main__":
    sys.exit(main())
