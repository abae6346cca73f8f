"""Flow matching posterior estimation: a vector field that carries noise to the posterior (Lipman et
al. 2023, arXiv 2210.02747; Wildberger et al. 2023, arXiv 2305.17161).

    training = flow_matching.training(key, model, latents=["theta"], observed=["x"])
    posterior = npe.posterior(fit.run(key, training, ...))

Between a latent (t = 0) and noise (t = 1) lies theta_t = (1 - t) theta + (t + s) e, and the network
regresses e - theta on theta_t, t and the context: no Jacobian in training, any architecture, and a
density in the end, by the ordinary differential equation

    log q(theta | x) = log N(theta_1; 0, (1 + s)^2) + int_0^1 div v(theta_t, t, x) dt

whose divergence is exact (D columns of the Jacobian) and which diffrax solves to a tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_counts

from ..training import Training
from . import flows, npe
from .batches import Batch
from .discrete import Mixed
from .network import Network
from .simulators import Simulations

LEAST = 1e-3
"""s: the noise that is left at t = 0, in standard deviations of the latents."""
FREQUENCIES = 4
"""How many sines and cosines tell the network the time."""

Field = Callable[[Float[Array, " D"], Float[Array, ""], Float[Array, " C"]], Float[Array, " D"]]
"""(theta_t, t, context) -> d theta_t / dt."""


class Dense(eqx.Module):
    """A field by an MLP of position, time and context."""

    network: eqx.nn.MLP

    def __call__(
        self, theta: Float[Array, " D"], t: Float[Array, ""], context: Float[Array, " C"]
    ) -> Float[Array, " D"]:
        angles = jnp.pi * t * jnp.arange(1, FREQUENCIES + 1)
        return self.network(jnp.concatenate([theta, jnp.sin(angles), jnp.cos(angles), context]))


class Transported(AbstractDistribution):
    """What a field makes of noise (`family`); the tolerance is that of its solver."""

    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)
    field: Field
    tolerance: float = eqx.field(static=True, default=1e-5)

    def _log_prob(self, x: Array, condition: Array | None = None) -> Array:
        def moving(t: Array, y: tuple[Array, Array], context: Array) -> tuple[Array, Array]:
            velocity = self.field(y[0], t, context)
            jacobian = jax.jacfwd(lambda theta: self.field(theta, t, context))(y[0])
            return velocity, jnp.trace(jacobian)

        end, total = self._solved(moving, 0.0, 1.0, (x, jnp.zeros((), x.dtype)), condition)
        scale = 1 + LEAST
        density = -0.5 * jnp.sum((end / scale) ** 2) - end.size * jnp.log(
            scale * jnp.sqrt(2 * jnp.pi)
        )
        return density + total

    def _sample(self, key: PRNGKeyArray, condition: Array | None = None) -> Array:
        noise = (1 + LEAST) * jax.random.normal(key, self.shape)
        return self._solved(
            lambda t, y, context: self.field(y, t, context), 1.0, 0.0, noise, condition
        )

    def _solved(
        self, moving: Callable[..., Any], t0: float, t1: float, start: Any, context: Any
    ) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(moving),
            diffrax.Tsit5(),
            t0=t0,
            t1=t1,
            dt0=0.05 if t1 > t0 else -0.05,
            y0=start,
            args=context,
            stepsize_controller=diffrax.PIDController(rtol=self.tolerance, atol=self.tolerance),
            saveat=diffrax.SaveAt(t1=True),
        )
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)


class Loss(eqx.Module):
    """|v(theta_t, t, x) - (e - theta)|^2 at a random time: the mean over coordinates and rows; and
    -log q of the discrete latents, if there are some.
    """

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        density, mixed = network.density, network.density
        if isinstance(mixed, Mixed):
            density = mixed.flow
        assert isinstance(density, Transported)

        def each(rows: Simulations) -> Float[Array, " B"]:
            times, noise = jax.random.split(key)
            theta, context = (
                jax.vmap(network.standard)(rows.theta),
                jax.vmap(network.summary)(rows.x),
            )
            log_head = jnp.zeros(len(theta))
            if isinstance(mixed, Mixed):
                theta, context, log_head = jax.vmap(mixed.read)(theta, context)
            t = jax.random.uniform(times, (len(theta),))
            e = jax.random.normal(noise, theta.shape)
            between = (1 - t)[:, None] * theta + (t + LEAST)[:, None] * e
            velocity = jax.vmap(density.field)(between, t, context)
            return jnp.mean((velocity - (e - theta)) ** 2, axis=1) - log_head

        return batch.losses(each)


def family(*, width: int = 100, depth: int = 4, tolerance: float = 1e-5) -> flows.Family:
    """Densities whose field is an MLP of this width and depth."""
    check_counts(width=width, depth=depth)

    def build(key: PRNGKeyArray, dim: int, context_dim: int) -> Transported:
        size = dim + 2 * FREQUENCIES + context_dim
        field = Dense(eqx.nn.MLP(size, dim, width, depth, jax.nn.gelu, key=key))
        return Transported((dim,), (context_dim,), field, tolerance)

    return build


def training(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    flow: flows.Family | None = None,
    **options: Unpack[npe.Options],
) -> Training:
    """What `fit.run` minimises to learn the field; the result is a posterior by `npe.posterior`.

    Args:
        flow: `family(...)` of this module; `family()` if None.
        Others and errors as in `npe.training`.

    Raises:
        ValueError: if `flow` is no family of this module, or no latent is continuous.
    """
    names = {"latents": latents, "observed": observed}
    chosen = family() if flow is None else flow
    start = npe.training(key, model, flow=chosen, **names, **options)
    density = start.params.density
    density = density.flow if isinstance(density, Mixed) else density
    if not isinstance(density, Transported):
        got = "no continuous latent" if density is None else type(density).__name__
        raise ValueError(
            "expected continuous latents and a density of flow_matching.family for them, got"
            f" {got}; learn it by npe.training"
        )
    return dataclasses.replace(start, loss=Loss())
