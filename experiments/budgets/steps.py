"""The world where solutions are made of steps and a reward judges them while they grow: that of
`experiments.particle_filtering`, at the budgets of this experiment.
"""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ..particle_filtering import tabular_world
from ..particle_filtering.methods import WIDTH
from .methods import Found

FAMILIES = ("independent draws", "PF exact", "DVTS")


class World:
    """Problems, and how many replicas there are of each."""

    def __init__(self, seed: int, num_problems: int, replicas: int) -> None:
        self.problems = tabular_world.problems(seed, num_problems)
        self.key, self.replicas = jax.random.key(seed), replicas

    @functools.cached_property
    def mean_length(self) -> float:
        """Tokens of an independent draw."""
        return float(self._run(FAMILIES[0], 1)["majority"].tokens.mean())

    def strings(self, budget: int) -> int:
        """How many strings a budget buys on average, a whole number of beams where it is one."""
        num = int(budget // self.mean_length)
        return num - num % WIDTH if num > WIDTH else num

    def found(self, num: int) -> dict[str, Found]:
        """All methods at `num` strings."""
        return {k: v for family in FAMILIES for k, v in self._run(family, num).items()}

    def _run(self, family: str, num: int) -> dict[str, Found]:
        key = jax.random.fold_in(self.key, zlib.crc32(f"{family} {num}".encode()))
        keys = jax.random.split(key, self.problems.table.shape[0])
        args = (keys, self.problems, jnp.float32(0), family, num, self.replicas)
        right, spent = jax.device_get(tabular_world.simulate(*args))
        found = {}
        for name, of in right.items():
            tokens, passes, calls = (float(value) for value in spent[name])
            accuracy = of.mean(1).astype(np.float64)
            found[name] = Found(accuracy, np.full(len(of), tokens), calls, passes)
        return found
