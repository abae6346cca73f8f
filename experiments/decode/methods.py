"""The methods of `experiments.decode`: each yields the population after every round, or only the
last one.

A method is called with (key, target, config, steps of text).  Chains are populations of equal
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, PRNGKeyArray

import ppl
from ppl.sequences import Sequences
from ppl.target import Target
from samplers import smc
from samplers.base import Cost
from samplers.draws import ancestral
from samplers.mcmc import parallel_tempering, power, suffix
from samplers.search import best_of_n
from samplers.smc import power_smc
from samplers.strings import ladders

from ..showing import saving
from ..showing.saving import Config, Population

RUNGS = 4


def _smc(
    key: PRNGKeyArray, target: Target, config: Config, steps: ppl.Steps | None, **options: Any
) -> Iterator[Population]:
    how = {"num_particles": config.num_particles, "steps": steps, "history": True, **options}
    return map(saving.population, smc.iterate(key, target, **how))


def _importance(
    key: PRNGKeyArray, target: Target, config: Config, steps: ppl.Steps | None
) -> Iterator[Population]:
    # Importance sampling is SMC that never resamples, and shares its compiled step.
    return _smc(key, target, config, steps, threshold=0.0)


def _power_smc(
    key: PRNGKeyArray, target: Target, config: Config, steps: ppl.Steps | None
) -> Iterator[Population]:
    bridge: Any = power_smc.options(config.max_tokens / 2)
    return _smc(key, target, config, steps, **bridge)


def _ancestral(
    key: PRNGKeyArray, target: Target, config: Config, steps: None
) -> Iterator[Population]:
    num = config.num_particles
    out = ancestral.run(key, target, num_samples=num)
    weights = np.zeros(num, np.float32)
    yield Population(_trim(out.sequences), weights, 0.0, 0.0, 0, _counts(out.cost))


def _best_of_n(
    key: PRNGKeyArray, target: Target, config: Config, steps: None
) -> Iterator[Population]:
    num = config.num_particles
    out = best_of_n.run(key, target, num_samples=num)
    chosen = (np.arange(num) == int(out.best)) & np.isfinite(np.asarray(out.scores))
    log_weights = np.where(chosen, np.log(np.float32(num)), -np.inf).astype(np.float32)
    yield Population(_trim(out.sequences), log_weights, None, None, 0, _counts(out.cost))


def _power_mh(
    key: PRNGKeyArray, target: Target, config: Config, steps: None
) -> Iterator[Population]:
    how = suffix.method(target)
    x, cost = power.init(target, how, config.num_particles), Cost()
    plan = power.schedule(target.max_tokens, config.block_size, config.moves_per_block)
    for stage in range(int(plan.extends.sum())):
        x, info = power.step(key, target, how, x, plan, stage)
        cost = cost + info.cost
        yield _chains(x.sequences, info.outside_support[:, -1], info.invalid.sum(), cost)


def _tempering(
    key: PRNGKeyArray, target: Target, config: Config, steps: None
) -> Iterator[Population]:
    out = parallel_tempering.run(
        key,
        target,
        ladders.geometric(1, config.alpha, RUNGS),
        num_chains=config.num_particles,
        block_size=config.block_size,
        sweeps_per_block=1 + config.moves_per_block,
        moves_per_sweep=1,
    )
    assert out.cost is not None
    moves = out.info
    outside_support = moves.outside_support[0, -1, :, -1, -1]
    yield _chains(out.sequences, outside_support, moves.invalid.sum(), out.cost)


def _chains(
    x: Sequences, outside_support: Bool[Any, " C"], num_invalid: Any, cost: Cost
) -> Population:
    """Chains as a population: those that have not found the support yet have no weight."""
    log_weights = np.where(np.asarray(outside_support), -np.inf, 0.0).astype(np.float32)
    return Population(
        _trim(jax.device_get(x)), log_weights, None, None, int(num_invalid), _counts(cost)
    )


def _trim(x: Sequences) -> Sequences:
    """The strings up to the last position that any of them uses, its EOS included."""
    return Sequences(x.tokens[:, : int(x.length.max()) + 1], x.length)


def _counts(cost: Cost) -> dict[str, int]:
    return {name: int(value) for name, value in vars(cost).items()}


METHODS: dict[str, Callable[..., Iterator[Population]]] = {
    "smc": _smc,
    "power-smc": _power_smc,
    "power-mh": _power_mh,
    "tempering": _tempering,
    "importance": _importance,
    "ancestral": _ancestral,
    "best-of-n": _best_of_n,
}
STEPWISE = ("smc", "power-smc", "importance")
