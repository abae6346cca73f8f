"""`samplers.tempered.adaptive` beside `blackjax.adaptive_tempered_smc` on one density, at equal
effective sample size.

The density is a Bayesian linear regression with ten correlated coefficients, whose posterior N(m,
S) is known in closed form; both sides call the same two compiled functions (log prior, log
likelihood of the NumPyro model), with the same number of particles, the same HMC kernel with the
same parameters and number of steps, systematic resampling and the same ESS target.  Each side is
one jit.  The effective sample size of a side is that of independent posterior draws whose mean
would miss m by as much, D = 10 coefficients over all rounds:

    ESS = D / mean over rounds of (m-hat - m)' S^-1 (m-hat - m)

so that the ratio, of seconds per effective sample, counts time and accuracy; its standard error
from the ESS alone is about 2 / sqrt(D rounds), 6 % at 100 rounds.  The two are not one algorithm:
blackjax moves before it raises beta and returns weighted particles, ours after, so that its last
move is at beta = 1; and blackjax solves for the next beta on the particles before they are selected
and moved, without their weights, which takes more and smaller stages at the same ESS target.
Smaller stages help log Z more than the means, so the ratio of seconds at equal mean squared error
of log Z is given as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import blackjax.smc.resampling
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from blackjax.smc import extend_params

from samplers.latent import tempered
from samplers.latent.posterior import density

from .report import OURS, table, take_turns, time_ratio

NUM, STEPS, FRACTION = 1000, 5, 0.5
DIM, ROWS, NOISE = 10, 200, 1.0
STEP_SIZE, LEAPFROGS = 0.04, 8
PEER = "blackjax"


class Estimate(NamedTuple):
    """What one run says of the posterior: mean [D], log evidence, and the stages it took."""

    mean: np.ndarray
    log_z: float
    stages: int


def regression(design: Any, seen: Any) -> None:
    """Prior N(0, 1) for every coefficient; known noise."""
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
    with numpyro.plate("data", ROWS):
        numpyro.sample("seen", dist.Normal(design @ weights, NOISE), obs=seen)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Columns with pairwise correlation 1/2."""
    rng = np.random.default_rng(0)
    design = (rng.normal(size=(ROWS, DIM)) + rng.normal(size=(ROWS, 1))) / np.sqrt(2)
    seen = design @ rng.normal(size=DIM) + NOISE * rng.normal(size=ROWS)
    return design.astype(np.float32), seen.astype(np.float32)


def truth(design: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior mean, posterior precision and log evidence, in float64."""
    x, y = design.astype(np.float64), seen.astype(np.float64)
    precision = x.T @ x / NOISE**2 + np.eye(DIM)
    mean = np.linalg.solve(precision, x.T @ y) / NOISE**2
    marginal = x @ x.T + NOISE**2 * np.eye(ROWS)
    log_z = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    return mean, precision, float(log_z)


def leapfrog(log_density: Any, population: Any) -> blackjax.SamplingAlgorithm:
    """The kernel of both sides; it does not look at the population."""
    return blackjax.hmc(log_density, STEP_SIZE, jnp.ones(DIM), LEAPFROGS)


def ours(design: np.ndarray, seen: np.ndarray) -> Callable[[int], Estimate]:
    options: dict[str, Any] = {"num_particles": NUM, "num_steps": STEPS, "ess_fraction": FRACTION}

    def run(seed: int) -> Estimate:
        out = tempered.adaptive(
            jax.random.key(seed), regression, design, seen, kernel=leapfrog, **options
        )
        weights = np.exp(np.asarray(out.log_weights, np.float64)) / NUM
        return Estimate(
            weights @ np.asarray(out.samples["weights"]), float(out.log_z), int(out.rounds)
        )

    return run


def theirs(design: np.ndarray, seen: np.ndarray) -> Callable[[int], Estimate]:
    @jax.jit
    def whole(key: Any, design: Any, seen: Any) -> Any:
        of = density(regression, design, seen)
        algorithm = blackjax.adaptive_tempered_smc(
            of.log_prior,
            of.log_likelihood,
            blackjax.hmc.build_kernel(),
            blackjax.hmc.init,
            extend_params(
                {
                    "step_size": STEP_SIZE,
                    "inverse_mass_matrix": jnp.ones(DIM),
                    "num_integration_steps": LEAPFROGS,
                }
            ),
            blackjax.smc.resampling.systematic,
            FRACTION,
            num_mcmc_steps=STEPS,
        )
        prior_key, key = jax.random.split(key)
        particles = jax.vmap(of.sample_prior)(jax.random.split(prior_key, NUM))

        def stage(carry: tuple) -> tuple:
            key, state, log_z, stages = carry
            key, stage_key = jax.random.split(key)
            state, info = algorithm.step(stage_key, state)
            return key, state, log_z + info.log_likelihood_increment, stages + 1

        start = algorithm.init(particles)
        start = start._replace(tempering_param=jnp.float32(start.tempering_param))
        carry = key, start, jnp.float32(0), jnp.int32(0)
        _, state, log_z, stages = jax.lax.while_loop(
            lambda c: c[1].tempering_param < 1, stage, carry
        )
        return state.particles, state.weights, log_z, stages

    def run(seed: int) -> Estimate:
        positions, weights, log_z, stages = whole(jax.random.key(seed), design, seen)
        return Estimate(
            np.asarray(weights, np.float64) @ np.asarray(positions), float(log_z), int(stages)
        )

    return run


def compare(rounds: int) -> dict[str, float]:
    """Print both sides; the ratios of seconds at equal ESS and at equal error of log Z, theirs over
    ours.
    """
    design, seen = data()
    mean, precision, log_z = truth(design, seen)
    sides = {OURS: ours(design, seen), PEER: theirs(design, seen)}
    seconds, found = take_turns(sides, rounds, "Timing tempered SMC")

    def effective(name: str) -> float:
        errors = np.stack([estimate.mean for estimate in found[name]]) - mean
        return DIM / float(np.einsum("rd,de,re->r", errors, precision, errors).mean())

    size = {name: effective(name) for name in sides}
    error = {
        name: float(np.mean([(run.log_z - log_z) ** 2 for run in found[name]])) for name in sides
    }
    slower = time_ratio(seconds, PEER)
    ratios = {
        "blackjax-tempered": slower * size[OURS] / size[PEER],
        "blackjax-tempered-log-z": slower * error[PEER] / error[OURS],
    }

    def row(name: str) -> tuple[str, ...]:
        milliseconds = 1000 * statistics.median(seconds[name])
        return (
            name,
            f"{milliseconds:.0f}",
            f"{statistics.mean(run.stages for run in found[name]):.1f}",
            f"{error[name] ** 0.5:.3f}",
            f"{size[name]:.0f}",
            f"{milliseconds / size[name]:.3f}",
            "" if name == OURS else f"{ratios['blackjax-tempered']:.2f}",
        )

    rows = [row(name) for name in sides]
    title = f"tempered SMC, D = {DIM}, N = {NUM}, {STEPS} HMC steps, {rounds} runs each"
    table(title, ("side", "ms", "stages", "RMSE of log Z", "ESS", "ms per ESS", "faster by"), rows)
    return ratios
