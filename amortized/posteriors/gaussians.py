"""Mixtures of Gaussians as values: what a Distribution Transformer takes and gives.

prior = gaussians.Gaussians(log_weights, means, factors)     # [K], [K, D], [K, D, D]
exact = gaussians.updated(prior, y, design, noise)           # linear-Gaussian, in closed form
next = gaussians.predicted(exact, transition, noise)         # after a step of a random walk
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.pytrees import register_dataclass
from ppl.showing import shown


@shown
@register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians:
    """sum_k w_k N(mu_k, L_k L_k').

    Attributes:
        log_weights: [K], normalised.
        means: [K, D].
        factors: [K, D, D] lower triangular, with a positive diagonal.
    """

    log_weights: Float[Array, " K"]
    means: Float[Array, "K D"]
    factors: Float[Array, "K D D"]

    @property
    def covariances(self) -> Float[Array, "K D D"]:
        """L L'."""
        return self.factors @ jnp.swapaxes(self.factors, -1, -2)

    @property
    def mean(self) -> Float[Array, " D"]:
        """Of the mixture."""
        return jnp.exp(self.log_weights) @ self.means

    def log_prob(self, theta: Float[Array, " D"]) -> Float[Array, ""]:
        """log density of one theta."""
        each = jax.vmap(log_normal)(theta - self.means, self.factors)
        return jax.nn.logsumexp(self.log_weights + each)

    def sample(self, key: PRNGKeyArray) -> Float[Array, " D"]:
        """One draw."""
        which, noise = jax.random.split(key)
        k = jax.random.categorical(which, self.log_weights)
        return self.means[k] + self.factors[k] @ jax.random.normal(noise, self.means.shape[-1:])


def updated(
    prior: Gaussians,
    y: Float[Array, " P"],
    design: Float[Array, "P D"],
    noise: Float[Array, "P P"],
) -> Gaussians:
    """The posterior given y = H theta + e, e ~ N(0, R): a Kalman update of every component, and
    weights in proportion to w_k N(y; H mu_k, H S_k H' + R).

    Args:
        design: H.
        noise: R, a covariance.
    """

    def one(mean: Array, covariance: Array) -> tuple[Array, Array, Array]:
        spread = jnp.linalg.cholesky(design @ covariance @ design.T + noise)
        gain = jax.scipy.linalg.cho_solve((spread, True), design @ covariance).T
        rest = y - design @ mean
        # Joseph's form stays positive in single precision.
        left = jnp.eye(len(mean)) - gain @ design
        after = left @ covariance @ left.T + gain @ noise @ gain.T
        return log_normal(rest, spread), mean + gain @ rest, jnp.linalg.cholesky(after)

    log_evidence, means, factors = jax.vmap(one)(prior.means, prior.covariances)
    return Gaussians(jax.nn.log_softmax(prior.log_weights + log_evidence), means, factors)


def predicted(
    belief: Gaussians, transition: Float[Array, "D D"], noise: Float[Array, "D D"]
) -> Gaussians:
    """The law of F theta + e, e ~ N(0, Q), if theta has that of the belief: the step of a filter
    between two observations.

    Args:
        transition: F.
        noise: Q, a covariance.
    """
    covariances = transition @ belief.covariances @ transition.T + noise
    return Gaussians(
        belief.log_weights, belief.means @ transition.T, jnp.linalg.cholesky(covariances)
    )


def log_normal(rest: Float[Array, " D"], factor: Float[Array, "D D"]) -> Float[Array, ""]:
    """log N(rest; 0, L L')."""
    z = jax.scipy.linalg.solve_triangular(factor, rest, lower=True)
    log_det = jnp.sum(jnp.log(jnp.diag(factor)))
    return -0.5 * jnp.sum(z**2) - log_det - 0.5 * len(rest) * jnp.log(2 * jnp.pi)
