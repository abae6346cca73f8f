"""Moving particles by Markov kernels that leave their target invariant: `blackjax` algorithms over
populations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc.random_walk import normal_random_walk
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import take_rows

from ..base import Kernel, Move, Particles, Resampler, holding
from ..diagnostics import normalise
from .posterior import LogDensity

FixedKernel = Callable[[LogDensity, Float[Array, ""]], blackjax.SamplingAlgorithm]
"""(log density of pi_beta, beta) -> a blackjax algorithm; it sees no particle, which is what keeps
`run` exact.
"""

AdaptiveKernel = Callable[[LogDensity, Particles], blackjax.SamplingAlgorithm]
"""(log density of pi_beta, the weighted `Population` about to be moved) -> a blackjax algorithm
tuned to it.
"""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Population:
    """Positions and their log likelihoods; acceptance rate and likelihood evaluations of the last
    rejuvenation.
    """

    position: Float[Array, "N D"]
    log_likelihood: Float[Array, " N"]
    acceptance: Float[Array, " N"]
    evaluations: Int[Array, " N"]


def chains(
    algorithm: blackjax.SamplingAlgorithm | Callable[[], blackjax.SamplingAlgorithm],
) -> Kernel:
    """A blackjax algorithm over one position as a kernel over N chains, one key per chain.

    blackjax's algorithms are closures, so a kernel of one is compiled for itself (`base.Kernel`).
    What makes the algorithm may be given in its place, a pytree such as `Partial(f, scale)` with
    `f` a function of a module: then the kernel holds its arrays.
    """
    made = isinstance(algorithm, blackjax.SamplingAlgorithm)
    make = as_pytree((lambda: algorithm) if made else algorithm)
    return Kernel(Partial(_started, make), holding(_stepped, make))


def _started(make: Any, positions: Float[Array, "N D"]) -> Any:
    algorithm = make()
    return jax.vmap(lambda position: algorithm.init(position, None))(positions)


def _stepped(key: PRNGKeyArray, make: Any, state: Any) -> tuple[Any, Any]:
    return jax.vmap(make().step)(jax.random.split(key, state.position.shape[0]), state)


def rejuvenate(kernel: Kernel, log_likelihood: LogDensity, num_steps: int) -> Move:
    """The move by `num_steps` steps of an invariant kernel; it changes no weight.

    A position whose likelihood is NaN or +inf is none: its weight says so (NaN).
    """

    def sample(key: PRNGKeyArray, x: Population) -> tuple[Population, Float[Array, " N"]]:
        positions, acceptance, evaluations = _walk(key, x.position, kernel, num_steps)
        likelihood = jax.vmap(log_likelihood)(positions[-1]).astype(jnp.float32)
        # One evaluation starts the chain, and one is that of the last position.
        y = Population(
            positions[-1], likelihood, acceptance.mean(0), evaluations.sum(0, dtype=jnp.int32) + 2
        )
        return y, validity(y)

    return Move(sample)


def waste_free(kernel: Kernel, log_likelihood: LogDensity, num_steps: int) -> Move:
    """The move from N / (K + 1) ancestors to all K + 1 states of each one's chain, K = num_steps.

    For populations whose rows are so many copies of these ancestors, one after another
    (`copies`); it changes no weight.
    """

    def sample(key: PRNGKeyArray, x: Population) -> tuple[Population, Float[Array, " N"]]:
        num, length = x.log_likelihood.shape[0], num_steps + 1
        first = take_rows(x, jnp.arange(num // length, dtype=jnp.int32))
        positions, rates, evaluations = _walk(key, first.position, kernel, num_steps)
        likelihoods = jax.vmap(jax.vmap(log_likelihood))(positions).astype(jnp.float32)

        def joined(head: Array, tail: Array) -> Array:
            return jnp.concatenate([head[None], tail]).reshape(num, *tail.shape[2:])

        y = Population(
            joined(first.position, positions),
            joined(first.log_likelihood, likelihoods),
            jnp.tile(rates.mean(0), length),
            joined(jnp.ones_like(evaluations[0]), evaluations + 1),
        )
        return y, validity(y)

    return Move(sample)


@functools.cache  # equal schemes give one function, so that nothing is compiled twice
def copies(resampler: Resampler, each: int) -> Resampler:
    """num / each draws of `resampler`, `each` times one after another; as unbiased as it."""

    def draw(key: PRNGKeyArray, log_probs: Float[Array, " N"], num: int) -> Any:
        drawn = resampler(key, log_probs, num // each)
        return jax.tree.map(lambda leaf: jnp.tile(leaf, each), drawn)

    return draw


def validity(x: Population) -> Float[Array, " N"]:
    """The weight 0 of a position, NaN where its likelihood is NaN or +inf."""
    return jnp.where(x.log_likelihood < jnp.inf, 0.0, jnp.nan).astype(jnp.float32)


def random_walk(scale: float = 2.38) -> AdaptiveKernel:
    """Random-walk Metropolis with covariance scale^2 / D times the population's (Gelman, Roberts
    and Gilks 1996).
    """
    return jax.tree_util.Partial(_random_walk, jnp.float32(scale))


def hmc(step_size: float = 0.3, num_integration_steps: int = 8) -> AdaptiveKernel:
    """Hamiltonian Monte Carlo with the population's covariance as inverse mass matrix, so steps are
    in its scale.
    """
    return jax.tree_util.Partial(_hmc, jnp.float32(step_size), jnp.int32(num_integration_steps))


# Functions of the module and not closures: jit must find them equal from one call to the next.
def _random_walk(scale: Array, log_density: LogDensity, p: Particles) -> blackjax.SamplingAlgorithm:
    covariance = _covariance(p)
    root = jnp.linalg.cholesky(covariance) * scale / covariance.shape[0] ** 0.5
    return normal_random_walk(log_density, root)


def _hmc(
    step_size: Array, num_steps: Array, log_density: LogDensity, p: Particles
) -> blackjax.SamplingAlgorithm:
    return blackjax.hmc(log_density, step_size, _covariance(p), num_steps)  # pyright: ignore[reportArgumentType]


def _walk(
    key: PRNGKeyArray, position: Float[Array, "N D"], kernel: Kernel, num_steps: int
) -> tuple:
    """The path of N chains: positions [K, N, D], acceptance rates [K, N] and evaluations [K, N]."""
    num = position.shape[0]

    def one(state: Any, step_key: PRNGKeyArray) -> tuple[Any, tuple]:
        state, info = kernel.step(step_key, state)
        # Not every blackjax algorithm reports both.
        rate = jnp.broadcast_to(getattr(info, "acceptance_rate", jnp.nan), (num,)).astype(
            jnp.float32
        )
        evaluations = jnp.broadcast_to(getattr(info, "num_integration_steps", 1), (num,)).astype(
            jnp.int32
        )
        return state, (state.position, rate, evaluations)

    return jax.lax.scan(one, kernel.init(position), jax.random.split(key, num_steps))[1]


def _covariance(p: Particles) -> Float[Array, "D D"]:
    """The weighted covariance, kept positive definite where few particles are left."""
    weights = normalise(p.log_weights)
    x = jnp.where(weights[:, None] > 0, p.state.position, 0.0)
    centred = x - weights @ x
    covariance = (weights[:, None] * centred).T @ centred
    scale = jnp.trace(covariance) / x.shape[1]
    return covariance + (1e-5 * scale + 1e-10) * jnp.eye(x.shape[1], dtype=x.dtype)
