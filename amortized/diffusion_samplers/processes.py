"""What a diffusion sampler starts from: T steps from noise to x on R^D without a drift, and the law
of the way back, which is known.

    P_F(s_i+1 | s_i) = N(keep s_i + v u, v I)       u is learned, 0 at first
    P_B(s_i | s_i+1) = N(back_i s_i+1, w_i I)

Paths of both have densities, so a chain of any drift is an importance sampler.

| process | starts in | on the way back |
| --- | --- | --- |
| `Bridge` | 0 | a Brownian bridge to 0: 2111.15141 (PIS), 2301.12594, 2402.05098 |
| `OrnsteinUhlenbeck` | N(0, s^2 I) | noise is added: 2302.13834 (DDS) |
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts

Step = Int[Array, ""] | int


class Process(eqx.Module):
    """D = `dim`, T = `num_steps`; i in 0..T-1 goes from state i to state i + 1."""

    dim: eqx.AbstractVar[int]
    num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def start(self, key: PRNGKeyArray) -> Float[Array, " D"]:
        """s_0."""

    @abc.abstractmethod
    def log_start(self, s: Float[Array, " D"]) -> Float[Array, ""]:
        """Its log density; 0 if it is always the same."""

    @abc.abstractmethod
    def ahead(self, i: Step) -> tuple[Array, Array]:
        """keep and v."""

    @abc.abstractmethod
    def back(self, i: Step) -> tuple[Array, Array]:
        """back_i and w_i; w = 0 where s_i is sure."""

    @abc.abstractmethod
    def log_marginal(self, i: Step, s: Float[Array, " D"]) -> Float[Array, ""]:
        """Log density of s_i, i > 0, without a drift."""


class Bridge(Process):
    """Brownian motion from 0 that has variance `variance` at the end."""

    dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    variance: float = eqx.field(static=True)

    def __init__(self, dim: int, *, num_steps: int = 100, variance: float = 1.0):
        check_counts(dim=dim, num_steps=num_steps)
        _check(variance=variance)
        self.dim, self.num_steps, self.variance = dim, num_steps, float(variance)

    def start(self, key: PRNGKeyArray) -> Float[Array, " D"]:
        del key
        return jnp.zeros(self.dim)

    def log_start(self, s: Float[Array, " D"]) -> Float[Array, ""]:
        return jnp.zeros((), s.dtype)

    def ahead(self, i: Step) -> tuple[Array, Array]:
        del i
        return jnp.float32(1), jnp.float32(self.variance / self.num_steps)

    def back(self, i: Step) -> tuple[Array, Array]:
        i = jnp.asarray(i)
        share = i / (i + 1)
        return share, self.variance / self.num_steps * share

    def log_marginal(self, i: Step, s: Float[Array, " D"]) -> Float[Array, ""]:
        return log_normal(s, jnp.zeros_like(s), self.variance * jnp.asarray(i) / self.num_steps)


class OrnsteinUhlenbeck(Process):
    """Noise of standard deviation `scale` that stays what it is: (1 - a)^T = e^-rate of a state's
    square is left after all steps.
    """

    dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    rate: float = eqx.field(static=True)

    def __init__(self, dim: int, *, num_steps: int = 100, scale: float = 1.0, rate: float = 8.0):
        check_counts(dim=dim, num_steps=num_steps)
        _check(scale=scale, rate=rate)
        self.dim, self.num_steps = dim, num_steps
        self.scale, self.rate = float(scale), float(rate)

    def start(self, key: PRNGKeyArray) -> Float[Array, " D"]:
        return self.scale * jax.random.normal(key, (self.dim,))

    def log_start(self, s: Float[Array, " D"]) -> Float[Array, ""]:
        return log_normal(s, jnp.zeros_like(s), jnp.float32(self.scale**2))

    def ahead(self, i: Step) -> tuple[Array, Array]:
        del i
        kept = jnp.exp(jnp.float32(-self.rate / self.num_steps))
        return jnp.sqrt(kept), (1 - kept) * self.scale**2

    def back(self, i: Step) -> tuple[Array, Array]:
        return self.ahead(i)

    def log_marginal(self, i: Step, s: Float[Array, " D"]) -> Float[Array, ""]:
        del i
        return self.log_start(s)


def log_normal(
    x: Float[Array, " D"], mean: Float[Array, " D"], variance: Float[Array, ""]
) -> Float[Array, ""]:
    """Log density of N(mean, variance I)."""
    square = ((x - mean) ** 2).sum()
    return -0.5 * (square / variance + x.shape[0] * jnp.log(2 * jnp.pi * variance))


def _check(**sizes: float) -> None:
    for name, size in sizes.items():
        if not 0 < size < jnp.inf:
            raise ValueError(
                f"expected {name} to be a number above 0, got {size!r}; pass about the spread of"
                " the target"
            )
