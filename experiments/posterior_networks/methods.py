"""What learns the posterior of a task from a budget of simulations: once for all observations, or
in rounds for each.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray
from paramax import unwrap

from amortized import fit
from amortized.calibration import joint, tarp
from amortized.posteriors import npe, robustness, sequential
from amortized.posteriors.posterior import Posterior

from ..posterior_tasks import Task

LATENTS, OBSERVED = ("theta",), ("x",)
RATE, CLIP, EPOCHS = 1e-3, 5.0, 120
"""The rate falls to zero by a cosine; epochs of what is learned once."""
DECAYS = 0.0, 0.3, 3.0
"""Weight decays that are tried: what a sharp posterior of two parameters needs, a nearly Gaussian
one of ten learns by heart.
"""
ROUNDS, STEPS = 10, 2_000
"""Of what is learned in rounds: so many steps in each."""
LEVELS = (0.5, 0.9)
"""Where coverage is read off."""
CHANGE = 0.1
"""The length of the worst change of an observation, over the spread of those simulated."""


class Learned(NamedTuple):
    """A posterior, and what it has cost: optimiser steps, and seconds with all compilation; the
    weight decay that was chosen, if any was.
    """

    posterior: Posterior
    steps: int
    seconds: float
    decay: float | None = None


class Calibration(NamedTuple):
    """Of a posterior on fresh simulations: `loss`, the mean -log q of the truth; at each of
    `LEVELS` the share of truths that TARP's regions of that level hold, and the p-value of all
    levels.
    """

    loss: float
    covered: list[float]
    p_value: float


def amortized(key: PRNGKeyArray, task: Task, budget: int) -> Learned:
    """NPE with a spline coupling flow, as it was after the epoch, and with the weight decay, of the
    best held-out loss.
    """
    first, second = jax.random.split(key)
    start = time.perf_counter()
    training = npe.training(
        first,
        task.model,
        latents=LATENTS,
        observed=OBSERVED,
        num_simulations=budget,
        batch_size=batch_size(budget),
    )
    num_steps = EPOCHS * training.draw.steps
    rate, chunk = optax.cosine_decay_schedule(RATE, num_steps), training.draw.steps
    fits: dict[float, fit.Fitted] = {}
    for decay in DECAYS:
        fits[decay] = fit.run(
            second,  # all see the same batches
            training,
            optimizer=optax.adamw(rate, weight_decay=decay),
            num_steps=num_steps,
            max_grad_norm=CLIP,
            chunk=chunk,
            patience=EPOCHS,  # to keep the best
            criterion=npe.held_out,
        )
    best = min(fits, key=lambda decay: _least(fits[decay], chunk))
    steps = sum(out.steps for out in fits.values())
    return Learned(npe.posterior(fits[best]), steps, time.perf_counter() - start, best)


def _least(out: fit.Fitted, chunk: int) -> float:
    """The held-out loss of its best epoch."""
    return float(out.history["held_out"].reshape(-1, chunk).mean(axis=1).min())


def in_rounds(
    keys: tuple[PRNGKeyArray, PRNGKeyArray], task: Task, budget: int, number: int
) -> Learned:
    """Ten rounds of a tenth of the budget each, for one observation: truncated NPE, with the
    weight decay that gave the best held-out loss for the first observation.

    The second key is of the task, the same for all observations.
    """
    own, common = keys
    decay, learned = _first(task, budget, tuple(jax.random.key_data(common).tolist()))
    return learned if number == 1 else _rounds(own, task, budget, number, decay)[1]


@functools.lru_cache
def _first(task: Task, budget: int, seed: tuple[int, ...]) -> tuple[float, Learned]:
    """The best decay for the first observation, and what was learned with it."""
    key = jax.random.wrap_key_data(jnp.asarray(seed, jnp.uint32))
    tried = {decay: _rounds(key, task, budget, 1, decay) for decay in DECAYS}
    best = min(tried, key=lambda decay: tried[decay][0])
    return best, tried[best][1]


def _rounds(
    key: PRNGKeyArray, task: Task, budget: int, number: int, decay: float
) -> tuple[float, Learned]:
    """The last round's held-out loss, and what was learned."""
    start = time.perf_counter()
    rate = optax.cosine_decay_schedule(RATE, STEPS)
    out = sequential.run(
        key,
        task.model,
        task.observation(number),
        latents=LATENTS,
        observed=OBSERVED,
        how=sequential.Truncated(),
        optimizer=optax.chain(
            optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=decay)
        ),
        num_rounds=ROUNDS,
        num_steps=STEPS,
        patience=STEPS,  # to keep the best
        num_simulations=budget // ROUNDS,
        batch_size=batch_size(budget // ROUNDS),
    )
    steps = sum(found.steps for found in out.fits)
    learned = Learned(out.posterior, steps, time.perf_counter() - start, decay)
    return _least(out.fits[-1], sequential.CHUNK), learned


def batch_size(budget: int) -> int:
    """200, the usual; of small budgets a tenth."""
    return min(200, budget // 10)


def calibration(
    key: PRNGKeyArray, posterior: Posterior, num_simulations: int, num_samples: int
) -> Calibration:
    """How a posterior fares on simulations that it has not seen."""
    first, second = jax.random.split(key)
    them = joint.draw(
        first,
        posterior.simulator.draw,
        posterior.draws,
        num_simulations=num_simulations,
        num_samples=num_samples,
    )
    out = tarp.run(second, them)
    covered = [float(share) for share in out.at(np.asarray(LEVELS))[:, 0]]
    log_q = eqx.filter_jit(posterior.network.log_prob)(jnp.asarray(them.theta), them.x)
    return Calibration(-float(log_q.mean()), covered, out.p_value)


def worst_change(key: PRNGKeyArray, posterior: Posterior, x: np.ndarray) -> float | None:
    """KL from the posterior to that of the worst change of the observation by a tenth of what
    simulations spread, in nats; None of observations that are counts.
    """
    (pilot,) = unwrap(posterior.network.pilot).values()
    if not jnp.issubdtype(pilot.dtype, jnp.inexact):
        return None
    radius = CHANGE * float(jnp.sqrt(pilot.var(axis=0).sum()))
    return float(robustness.attack(key, posterior, x, radius=radius, num_samples=1_000).kl)
