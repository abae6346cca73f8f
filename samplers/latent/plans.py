"""How far a stage of tempered SMC goes, and which kernel moves it: fixed, or tuned to the
particles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppl.pytrees import register_dataclass

from ..base import Particles, dead
from ..diagnostics import ess
from .posterior import LogDensity
from .rejuvenation import AdaptiveKernel, FixedKernel


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A ladder and a kernel that see no particle."""

    ladder: Float[Array, " S"]
    kernel: FixedKernel

    def reachable(self, p: Particles, beta: Array, stage: Array) -> Float[Array, ""]:
        """The next beta."""
        return self.ladder[stage]

    def algorithm(self, f: LogDensity, beta: Array, p: Particles) -> blackjax.SamplingAlgorithm:
        """The kernel for pi_beta, of log density f."""
        return self.kernel(f, beta)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Both tuned to the particles of the moment; methods as those of `Fixed`."""

    fraction: Float[Array, ""]
    kernel: AdaptiveKernel

    def reachable(self, p: Particles, beta: Array, stage: Array) -> Float[Array, ""]:
        return next_beta(p.log_weights, p.state.log_likelihood, beta, self.fraction)

    def algorithm(self, f: LogDensity, beta: Array, p: Particles) -> blackjax.SamplingAlgorithm:
        return self.kernel(f, p)


def next_beta(
    log_weights: Float[Array, " N"],
    log_likelihood: Float[Array, " N"],
    beta: Float[Array, ""],
    fraction: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The greatest beta' <= 1 at which ESS(w + (beta' - beta) log likelihood) >= fraction * ESS, by
    bisection.

    The ESS on the right is that of the particles whose likelihood is positive: those without die at
    any beta' > beta. Exactly 1 where the ESS allows it; always above `beta`.
    """
    alive = ~dead(log_weights) & ~dead(log_likelihood)
    weights, likelihood = (
        jnp.where(alive, log_weights, -jnp.inf),
        jnp.where(alive, log_likelihood, 0.0),
    )
    target = fraction * ess(weights)

    def enough(delta: Array) -> Array:
        return ess(weights + delta * likelihood) >= target

    def halve(_: Any, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = 0.5 * (low + high)
        fits = enough(middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    # Halving to 2^-60: the first step from a vague prior can be that small, and float32 keeps its
    # digits near 0.
    low, _ = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(beta), 1.0 - beta))
    return jnp.where(
        enough(1.0 - beta), 1.0, jnp.maximum(beta + low, jnp.nextafter(beta, jnp.float32(2)))
    )
