"""Draws of a diffusion sampler, properly weighted: importance sampling over paths, or SMC where
states have flows.

    found = sampling.run(key, sampler, num_particles=2000)
    found.samples, found.log_z, diagnostics.ess(found.log_weights)

With flows F_i, F_T = R, a step weighs

    dw = log F_i+1(s_i+1) + log P_B(s_i | s_i+1) - log F_i(s_i) - log P_F(s_i+1 | s_i)

so LAW 1 holds for F_i after every step, for R at the end, whatever drift and flows have learned;
without selection the flows cancel, and it is annealed importance sampling with a learned path.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count
from ppl.showing import shown
from samplers import population
from samplers.base import Cost, Guarantee, Move, particles
from samplers.population import Run
from samplers.registry import sampler
from samplers.resampling import systematic
from samplers.results import Weighted

from . import paths
from .policy import LogDensity, Policy
from .processes import Process, log_normal


@shown
class Sampler(eqx.Module):
    """A process, a drift for it, and log R."""

    process: Process
    policy: Policy
    log_density: LogDensity


class States(eqx.Module):
    """N states and their log-flows."""

    s: Float[Array, "N D"]
    log_flow: Float[Array, " N"]


@sampler(Guarantee.EXACT, proof="tests/amortized/diffusion_samplers/test_sampling.py")
def run(
    key: PRNGKeyArray,
    sampler: Sampler,
    *,
    num_particles: int = 1000,
    threshold: float | Float[Array, ""] = 0.0,
) -> Weighted:
    """Draw from a diffusion sampler and weigh for R; EXACT however well it has learned.

    Args:
        key: typed key.
        sampler: of `learning.sampler`.
        num_particles: N.
        threshold: select when ESS < threshold * N: SMC with the flows as targets on the way.  0
            never selects.

    Returns:
        `Weighted`: points [N, D].  Rounds are the T steps.  Points whose log R is NaN or +inf are
            dead and counted; potential_calls are evaluations of log R, those for its gradient and
            for the flows included.

    Raises:
        ValueError: if num_particles < 1.
    """
    check_count("num_particles", num_particles)
    return _run(key, sampler, threshold, num_particles)


@eqx.filter_jit
def _run(key: PRNGKeyArray, of: Sampler, threshold: float | Array, num: int) -> Weighted:
    process = of.process
    first, second = jax.random.split(key)
    start = jax.vmap(process.start)(jax.random.split(first, num))
    states = States(start, jax.vmap(process.log_start)(start))
    calls = jnp.int32(num * (1 + (of.policy.pull is not None)))

    def one(key: PRNGKeyArray, run: Run) -> Run:
        select_key, move_key = jax.random.split(key)
        run = population.select(select_key, run, systematic, threshold)
        run = population.advance(move_key, run, move(of, run.rounds))
        cost = Cost(forwards=jnp.int32(1), potential_calls=calls, depth=jnp.int32(1))
        return population.end(population.record(run), cost)

    begin = population.start(particles(states, num), process.num_steps)
    run, _ = population.every_round(jax.random.split(second, process.num_steps), begin, one)
    return population.result(run, run.particles.state.s)


def move(of: Sampler, i: Array) -> Move:
    """Step i of the sampler, from F_i to F_i+1."""
    how = of.process, of.policy, of.log_density

    def one(key: PRNGKeyArray, s: Array, flow: Array) -> tuple[Array, Array, Array]:
        mean, variance = paths.ahead(*how, i, s)
        after = mean + jnp.sqrt(variance) * jax.random.normal(key, s.shape)
        later = paths.log_flow(*how, i + 1, after)
        back = paths.log_back(of.process, i, s, after)
        dw = later + back - flow - log_normal(after, mean, variance)
        return after, later, dw

    def sample(key: PRNGKeyArray, x: States) -> tuple[States, Float[Array, " N"]]:
        keys = jax.random.split(key, len(x.s))
        s, flow, dw = jax.vmap(one)(keys, x.s, x.log_flow)
        return States(s, flow), dw

    return Move(sample)


@eqx.filter_jit
def elbo(key: PRNGKeyArray, sampler: Sampler, num_samples: int = 2000) -> Float[Array, " N"]:
    """log w of paths that the sampler draws: their mean is at most log Z."""
    of = sampler
    how = of.process, of.policy, of.log_density
    return paths.log_weights(paths.evaluate(*how, paths.rollout(key, *how, num_samples)))


@eqx.filter_jit
def eubo(key: PRNGKeyArray, sampler: Sampler, x: Float[Array, "N D"]) -> Float[Array, " N"]:
    """log w of paths back from exact draws of R / Z: their mean is at least log Z, and tells modes
    that are missed (arXiv 2406.07423).
    """
    of = sampler
    states = paths.backward(key, of.process, x)
    return paths.log_weights(paths.evaluate(of.process, of.policy, of.log_density, states))
