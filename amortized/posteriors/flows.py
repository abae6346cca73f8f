"""Conditional densities on R^D: what a posterior, likelihood or proposal network can be.

    flow = flows.spline_coupling(num_layers=5)
    density = flow(key, dim=2, context_dim=4)      # a flowjax distribution
    density.log_prob(theta, context)               # [..., D], [..., C] -> [...]
    density.sample(key, (1000,), context)

A family is a function (key, dim, context_dim) -> density.  Normalizing flows are flowjax's; the
mixture and the linear Gaussian here have its interface, so that they go wherever a flow goes.
Spline flows (Durkan et al. 2019, arXiv 1906.04032), masked autoregressive ones (Papamakarios et al.
2017, arXiv 1705.07057), mixture density networks (Bishop 1994).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax import flows
from flowjax.bijections import AbstractBijection
from flowjax.distributions import AbstractDistribution, Normal
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import non_trainable

from ppl.checks import check_counts

from .gaussians import Gaussians, log_normal
from .splines import Spline

LEAST_SCALE = 1e-4
"""What is added to standard deviations: standardised data have 1."""


Family = Callable[[PRNGKeyArray, int, int], AbstractDistribution]
"""(key, dim, context_dim) -> a conditional density of D coordinates given C."""


def spline_coupling(
    *, num_layers: int = 5, width: int = 50, depth: int = 2, knots: int = 10, interval: float = 5.0
) -> Family:
    """Coupling layers of rational quadratic splines on [-interval, interval], the identity outside:
    fast to draw from and to evaluate.

    Of one coordinate it is a spline whose knots the context gives.

    Args:
        num_layers: coupling layers, with a permutation between two.
        width, depth: of the hidden layers of a conditioner.
        knots: of a spline.
        interval: in standard deviations of what is learned.
    """
    check_counts(num_layers=num_layers, width=width, depth=depth, knots=knots)
    spline = Spline(knots=knots, interval=interval)
    return _family(flows.coupling_flow, num_layers, width, depth, spline)


def spline_autoregressive(
    *, num_layers: int = 5, width: int = 50, depth: int = 2, knots: int = 10, interval: float = 5.0
) -> Family:
    """Masked autoregressive layers of rational quadratic splines: more flexible than coupling, and
    D times as long to draw from.

    Arguments as in `spline_coupling`.
    """
    check_counts(num_layers=num_layers, width=width, depth=depth, knots=knots)
    spline = Spline(knots=knots, interval=interval)
    return _family(flows.masked_autoregressive_flow, num_layers, width, depth, spline)


def affine_autoregressive(*, num_layers: int = 5, width: int = 50, depth: int = 2) -> Family:
    """Masked autoregressive layers of affine maps (MAF).

    Arguments as in `spline_coupling`.
    """
    check_counts(num_layers=num_layers, width=width, depth=depth)
    return _family(flows.masked_autoregressive_flow, num_layers, width, depth, None)


def mixture(*, num_components: int = 8, width: int = 50, depth: int = 2) -> Family:
    """A mixture density network: Gaussians with full covariances, all given by the context."""
    check_counts(num_components=num_components, width=width, depth=depth)

    def build(key: PRNGKeyArray, dim: int, context_dim: int) -> Mixture:
        size = num_components * (1 + dim + dim + dim * (dim - 1) // 2)
        network = eqx.nn.MLP(context_dim, size, width, depth, jax.nn.relu, key=key)
        return Mixture((dim,), (context_dim,), network, num_components)

    return build


def gaussian() -> Family:
    """A Gaussian whose mean is affine in the context and whose covariance is the same everywhere.

    Its best parameters are those of a linear regression, in closed form (`Gaussian.fitted`).
    """

    def build(key: PRNGKeyArray, dim: int, context_dim: int) -> Gaussian:
        del key
        zeros = jnp.zeros((dim, context_dim)), jnp.zeros(dim), jnp.zeros(dim)
        return Gaussian((dim,), (context_dim,), *zeros, jnp.zeros((dim, dim)))

    return build


class Mixture(AbstractDistribution):
    """sum_k w_k N(mu_k, L_k L_k'), all functions of the context (`mixture`)."""

    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)
    network: eqx.nn.MLP
    num_components: int = eqx.field(static=True)

    def given(self, context: Float[Array, " C"]) -> Gaussians:
        """The mixture of a context."""
        dim, num = self.shape[0], self.num_components
        logits, means, log_scales, below = jnp.split(
            self.network(context), [num, num * (1 + dim), num * (1 + 2 * dim)]
        )
        factors = jax.vmap(lower)(log_scales.reshape(num, dim), below.reshape(num, -1))
        return Gaussians(jax.nn.log_softmax(logits), means.reshape(num, dim), factors)

    def _log_prob(self, x: Array, condition: Array | None = None) -> Array:
        assert condition is not None
        return self.given(condition).log_prob(x)

    def _sample(self, key: PRNGKeyArray, condition: Array | None = None) -> Array:
        assert condition is not None
        return self.given(condition).sample(key)


class Gaussian(AbstractDistribution):
    """N(A c + b, L L'), L the same for every context (`gaussian`)."""

    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)
    weight: Float[Array, "D C"]
    bias: Float[Array, " D"]
    log_scale: Float[Array, " D"]
    below: Float[Array, "D D"]

    @property
    def factor(self) -> Float[Array, "D D"]:
        """L."""
        return jnp.tril(self.below, -1) + jnp.diag(jnp.exp(self.log_scale) + LEAST_SCALE)

    def fitted(self, theta: Float[Array, "N D"], context: Float[Array, "N C"]) -> Gaussian:
        """The one that maximises the likelihood of N pairs."""
        ones = jnp.ones((len(context), 1), context.dtype)
        joined = jnp.concatenate([context, ones], axis=1)
        found, *_ = jnp.linalg.lstsq(joined, theta)
        rest = theta - joined @ found
        factor = jnp.linalg.cholesky(rest.T @ rest / len(theta))
        scale = jnp.maximum(jnp.diag(factor) - LEAST_SCALE, 1e-12)
        parts = found[:-1].T, found[-1], jnp.log(scale), jnp.tril(factor, -1)
        return Gaussian(self.shape, self.cond_shape, *parts)

    def _log_prob(self, x: Array, condition: Array | None = None) -> Array:
        return log_normal(x - self._mean(condition), self.factor)

    def _sample(self, key: PRNGKeyArray, condition: Array | None = None) -> Array:
        return self._mean(condition) + self.factor @ jax.random.normal(key, self.shape)

    def _mean(self, condition: Array | None) -> Array:
        assert condition is not None
        return self.weight @ condition + self.bias


def _family(
    make: Callable[..., AbstractDistribution],
    num_layers: int,
    width: int,
    depth: int,
    transformer: AbstractBijection | None,
) -> Family:
    """Flows of flowjax over a standard normal that is not trained."""

    def build(key: PRNGKeyArray, dim: int, context_dim: int) -> AbstractDistribution:
        return make(
            key,
            base_dist=non_trainable(Normal(jnp.zeros(dim))),
            transformer=transformer,
            cond_dim=context_dim,
            flow_layers=num_layers,
            nn_width=width,
            nn_depth=depth,
        )

    return build


def lower(log_scale: Float[Array, " D"], below: Float[Array, " B"]) -> Float[Array, "D D"]:
    """A Cholesky factor of the logarithms of its diagonal and of what is below."""
    factor = jnp.diag(jnp.exp(log_scale) + LEAST_SCALE)
    return factor.at[jnp.tril_indices(len(log_scale), -1)].set(below)
