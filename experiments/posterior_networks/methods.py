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
from amortized.posteriors import flows, npe, robustness, sequential
from amortized.posteriors.posterior import Posterior

from ..posterior_tasks import Task

LATENTS, OBSERVED = ("theta",), ("x",)
FAMILIES = {
    "spline coupling": flows.spline_coupling(),
    "Gaussian network": flows.mixture(num_components=1),
    "affine Gaussian": flows.gaussian(),
}


class Density(NamedTuple):
    """One of `FAMILIES`, and the weight decay that it is learned with."""

    family: str
    decay: float


RATE, CLIP, EPOCHS = 1e-3, 5.0, 120
"""The rate falls to zero by a cosine; epochs of what is learned once."""
TRIED = (
    Density("spline coupling", 0.0),
    Density("spline coupling", 0.3),
    Density("spline coupling", 3.0),
    Density("Gaussian network", 0.0),
    Density("Gaussian network", 0.3),
    Density("affine Gaussian", 0.0),
)
"""What a sharp posterior of two parameters needs, a nearly Gaussian one of ten learns by heart."""
ROUNDS, STEPS = 10, 2_000
"""Of what is learned in rounds: so many steps in each."""
LEVELS = (0.5, 0.9)
"""Where coverage is read off."""
CHANGE = 0.1
"""The length of the worst change of an observation, over the spread of those simulated."""


class Learned(NamedTuple):
    """A posterior, what it has cost, optimiser steps and seconds with all compilation, and the
    density that was chosen.
    """

    posterior: Posterior
    steps: int
    seconds: float
    density: Density


class Calibration(NamedTuple):
    """Of a posterior on fresh simulations: `loss`, the mean -log q of the truth; at each of
    `LEVELS` the share of truths that TARP's regions of that level hold, and the p-value of all
    levels.
    """

    loss: float
    covered: list[float]
    p_value: float


def amortized(key: PRNGKeyArray, task: Task, budget: int) -> Learned:
    """NPE with the density, and as it was after the epoch, of the best held-out loss."""
    first, second = jax.random.split(key)
    start = time.perf_counter()
    fits, losses = {}, {}
    for density in TRIED:
        training = npe.training(
            first,  # all see the same simulations
            task.model,
            latents=LATENTS,
            observed=OBSERVED,
            flow=FAMILIES[density.family],
            num_simulations=budget,
            batch_size=batch_size(budget),
        )
        chunk = training.draw.steps
        rate = optax.cosine_decay_schedule(RATE, EPOCHS * chunk)
        fits[density] = fit.run(
            second,
            training,
            optimizer=optax.adamw(rate, weight_decay=density.decay),
            num_steps=EPOCHS * chunk,
            max_grad_norm=CLIP,
            chunk=chunk,
            patience=EPOCHS,  # to keep the best
            criterion=npe.held_out,
        )
        held_out = fits[density].history["held_out"].reshape(-1, chunk)
        losses[density] = float(held_out.mean(axis=1).min())
    best = min(TRIED, key=losses.__getitem__)
    steps = sum(out.steps for out in fits.values())
    return Learned(npe.posterior(fits[best]), steps, time.perf_counter() - start, best)


def in_rounds(
    keys: tuple[PRNGKeyArray, PRNGKeyArray], task: Task, budget: int, number: int
) -> Learned:
    """Ten rounds of a tenth of the budget each, for one observation: truncated NPE with the density
    that NPE chooses for the task, on simulations of its own.

    Rounds cannot choose: every density has drawn its own, and the less it holds possible the easier
    are they.  The second key is of the task, the same for all observations.
    """
    key, common = keys
    density = _chosen(task, budget, tuple(jax.random.key_data(common).tolist()))
    start = time.perf_counter()
    rate = optax.cosine_decay_schedule(RATE, STEPS)
    out = sequential.run(
        key,
        task.model,
        task.observation(number),
        latents=LATENTS,
        observed=OBSERVED,
        how=sequential.Truncated(),
        flow=FAMILIES[density.family],
        optimizer=optax.chain(
            optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=density.decay)
        ),
        num_rounds=ROUNDS,
        num_steps=STEPS,
        patience=STEPS,  # to keep the best
        num_simulations=budget // ROUNDS,
        batch_size=batch_size(budget // ROUNDS),
    )
    steps = sum(found.steps for found in out.fits)
    return Learned(out.posterior, steps, time.perf_counter() - start, density)


@functools.lru_cache
def _chosen(task: Task, budget: int, seed: tuple[int, ...]) -> Density:
    """The density of the best held-out loss."""
    key = jax.random.wrap_key_data(jnp.asarray(seed, jnp.uint32))
    return amortized(key, task, budget).density


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
