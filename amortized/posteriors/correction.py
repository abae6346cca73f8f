"""Importance sampling from a posterior network: exact where the model has a density.

    exact = correction.run(key, posterior, x_o, num_particles=1000)
    exact.log_z, exact.samples["theta"], diagnostics.ess(exact.log_weights)

A draw theta of q(. | x_o) weighs

    w = p(theta) p(x_o | theta) / q(theta | x_o)

so that LAW 1 holds for prior times likelihood, whatever the network has learned: its flow
reaches all of R^D.  The mean weight is an unbiased estimate of the evidence p(x_o), and the
effective sample size tells a bad network (Dax et al. 2023, arXiv 2210.05686).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count
from samplers import population
from samplers.base import Cost, Guarantee, particles
from samplers.registry import sampler
from samplers.results import Weighted

from .network import Network
from .posterior import Posterior


@sampler(Guarantee.EXACT, proof="tests/amortized/posteriors/test_correction.py")
def run(key: PRNGKeyArray, posterior: Posterior, x: Any, *, num_particles: int = 1000) -> Weighted:
    """Draws of a posterior network, weighed for prior times likelihood; EXACT.

    Args:
        key: typed key.
        posterior: of `npe.posterior` or a sibling.
        x: the observed sites by name, or of a single one the array.
        num_particles: N.

    Returns:
        `Weighted`: the latent sites by name, [N, ...], in their own supports; log_q and log_density
            are on R^D, Jacobian included.  Positions whose density was NaN or +inf are dead and
            counted; potential_calls are evaluations of the model's density.

    Raises:
        ValueError: for an observation of another shape or that is not finite, or if the model has
            latent sites that were not inferred: over them its density would have to be summed.
        NotImplementedError: from a site without a density.
    """
    check_count("num_particles", num_particles)
    context = posterior.context(x)
    return _run(key, posterior.network, context, posterior.simulator.observation(x), num_particles)


@eqx.filter_jit
def _run(
    key: PRNGKeyArray,
    network: Network,
    context: Float[Array, " C"],
    x: dict[str, Array],
    num: int,
) -> Weighted:
    simulator = network.simulator
    theta = network.sample(key, context, num)
    log_q = network.given(theta, context)

    def joint(theta: Float[Array, " D"]) -> Float[Array, ""]:
        return simulator.log_prior(theta) + simulator.log_likelihood(theta, x)

    log_density = jax.vmap(joint)(theta)
    run = population.start(particles(theta, num), 1)
    run = population.record(population.weigh(run, log_density - log_q))
    return population.result(
        population.end(run, Cost(potential_calls=jnp.int32(num))),
        jax.vmap(simulator.constrain)(theta),
        log_q=log_q.astype(jnp.float32),
        log_density=log_density.astype(jnp.float32),
    )
