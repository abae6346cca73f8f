"""Two tasks whose simulators solve differential equations: an epidemic, and predators and prey.

Both are solved in logarithms, in which populations stay positive, by Runge-Kutta steps of the
fourth order and fixed length: the same work for every parameter, so that they run side by side.
Over the prior the error is below 0.04 standard deviations of the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from .task import Task, latent

POPULATION, SAMPLE = 1e6, 1000
EPIDEMIC = (17.0, 10, 34)
"""Days between observations, their number, and steps from one to the next."""
PREY, PREDATORS, NOISE = 30.0, 1.0, 0.1
HUNT = (2.1, 10, 100)
LEAST, MOST = 1e-10, 1e4
"""Of what is observed of a population, as the benchmark has it."""


def trajectory(
    field: Callable[[Float[Array, " S"]], Float[Array, " S"]],
    start: Float[Array, " S"],
    grid: tuple[float, int, int],
) -> Float[Array, "T S"]:
    """The solution of u' = field(u) at times 0, spacing, ..., (T - 1) spacing.

    Args:
        grid: the spacing, T, and how many steps are taken from one of these times to the next.
    """
    spacing, num, substeps = grid
    h = spacing / substeps

    def step(u: Array, _: None) -> tuple[Array, None]:
        k1 = field(u)
        k2 = field(u + h / 2 * k1)
        k3 = field(u + h / 2 * k2)
        k4 = field(u + h * k3)
        return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def interval(u: Array, _: None) -> tuple[Array, Array]:
        return jax.lax.scan(step, u, None, substeps)[0], u

    # The last time is reached by the interval before it.
    last, found = jax.lax.scan(interval, start, None, num - 1)
    return jnp.concatenate([found, last[None]])


def infected(
    theta: Float[Array, " 2"], grid: tuple[float, int, int] = EPIDEMIC
) -> Float[Array, " T"]:
    """The share of the population that is infected.

    With the contact rate b, the recovery rate g, and c of those who ever were,

        c' = b (1 - c) i,   i' = b (1 - c) i - g i
    """
    contact, recovery = theta[0], theta[1]

    def field(u: Array) -> Array:
        force = contact * (1 - u[0])
        return jnp.stack([force * jnp.exp(u[1]), force - recovery])

    # Who ever was infected, and not who never was: 1 - 1e-6 has no digits left in single precision.
    start = jnp.array([1 / POPULATION, jnp.log(1 / POPULATION)], theta.dtype)
    return jnp.clip(jnp.exp(trajectory(field, start, grid)[:, 1]), max=1.0)


def populations(
    theta: Float[Array, " 4"], grid: tuple[float, int, int] = HUNT
) -> Float[Array, "T 2"]:
    """Logarithms of prey and predators: x' = a x - b x y, y' = -c y + d x y."""
    growth, kills, death, feeding = theta[0], theta[1], theta[2], theta[3]

    def field(u: Array) -> Array:
        return jnp.stack([growth - kills * jnp.exp(u[1]), feeding * jnp.exp(u[0]) - death])

    start = jnp.log(jnp.array([PREY, PREDATORS], theta.dtype))
    return trajectory(field, start, grid)


def sir() -> None:
    prior = dist.LogNormal(jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2])).to_event(1)
    theta = latent(prior)
    numpyro.sample("x", dist.Binomial(SAMPLE, probs=infected(theta)).to_event(1))


def lotka_volterra() -> None:
    loc = jnp.array([-0.125, -3.0, -0.125, -3.0])
    theta = latent(dist.LogNormal(loc, 0.5).to_event(1))
    seen = jnp.clip(populations(theta), jnp.log(LEAST), jnp.log(MOST))
    numpyro.sample("x", dist.LogNormal(seen.T.reshape(-1), NOISE).to_event(1))


SIR = Task(
    name="sir",
    model=sir,
    dim_theta=2,
    dim_x=10,
    prior="log-normal",
    simulator="infected of 1,000, ten days",
    density="mass of x",
)
LOTKA_VOLTERRA = Task(
    name="lotka_volterra",
    model=lotka_volterra,
    dim_theta=4,
    dim_x=20,
    prior="log-normal",
    simulator="log-normal counts, ten times",
)
