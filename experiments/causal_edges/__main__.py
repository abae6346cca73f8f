"""Does a network of edges reach the exact posterior over graphs?

    python -m experiments.causal_edges            # --quick for a few minutes

Worlds of two and three variables, with and without interventions, in which the probability of every
edge is known by enumeration (`world`).  Of a pair that is connected, observations alone leave both
directions equally likely; interventions tell them apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from amortized import fit
from amortized.maps import causal

from .. import compilation
from . import world

NUM_SET = 16
"""Rows in which a variable is set, in the worlds that have some."""
SIZES = {"num_blocks": 2, "width": 16, "num_heads": 2, "batch_size": 32}
"""Of the network, and of a step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How long is trained, and on how much it is measured."""

    num_steps: int = 4_000
    num_data: int = 500
    num_observed: int = 10


class Found(NamedTuple):
    """Means over data sets and edges: the distance of probabilities from the exact ones, the
    log-loss beyond that of the exact ones (a KL), and the exact and learned difference between the
    directions of a true edge.
    """

    error: float
    excess: float
    exact_asymmetry: float
    asymmetry: float


def measured(config: Config, d: int, num_intervened: int) -> Found:
    """Train on one world, and compare with its enumerated posteriors."""
    sample = world.World(d, config.num_observed, num_intervened)
    key, train_key, data_key = jax.random.split(jax.random.key(d), 3)
    training = causal.training(key, sample, **SIZES, dual_rate=0.0)
    out = fit.run(
        train_key,
        training,
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, config.num_steps)),
        num_steps=config.num_steps,
        max_grad_norm=1.0,
    )
    data, graphs = jax.jit(jax.vmap(sample))(jax.random.split(data_key, config.num_data))
    read = eqx.filter_jit(lambda network, data: jax.vmap(network)(data))
    q = np.asarray(read(out.best, data), np.float64)
    off = ~np.eye(d, dtype=bool)
    q = 1 / (1 + np.exp(-q[:, off]))
    p = np.stack([world.marginals(np.asarray(rows))[off] for rows in data])
    kl = p * _log_ratio(p, q) + (1 - p) * _log_ratio(1 - p, 1 - q)
    there = np.asarray(graphs)[:, off]
    back = np.asarray(jnp.swapaxes(graphs, 1, 2))[:, off]
    num = max(there.sum(), 1)
    exact, learned = (float(((x * there).sum() - (x * back).sum()) / num) for x in (p, q))
    return Found(float(np.abs(p - q).mean()), float(kl.mean()), exact, learned)


def _log_ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """log p / q; 0 where p is."""
    return np.where(p > 0, np.log(np.where(p > 0, p, 1)) - np.log(q), 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.causal_edges")
    parser.add_argument("--quick", action="store_true", help="fewer steps, two variables")
    args = parser.parse_args()
    compilation.use_cache()
    config = Config(num_steps=2000, num_data=100) if args.quick else Config()
    table = Table("variables", "rows set", "mean |p - q|", "KL", "direction, exact", "learned")
    for d in (2,) if args.quick else (2, 3):
        for num_intervened in (0, NUM_SET):
            found = measured(config, d, num_intervened)
            table.add_row(str(d), str(num_intervened), *(f"{x:.3f}" for x in found))
    Console().print(table)


if __name__ == "__main__":
    main()
