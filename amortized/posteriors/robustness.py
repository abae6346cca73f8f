"""Posterior networks that change little when an observation changes a little, and how much they do.

    training = robustness.regularised(npe.training(...), beta=0.01)
    found = robustness.attack(key, posterior, x_o, radius=0.5)     # the worst change of that size
    robustness_report.run(key, {"plain": ..., "regularised": ...}, x, radii=[0.1, 0.5])

A change d of the observation changes the posterior by KL(q_x || q_{x+d}) ~ d' I_x d / 2, with the
Fisher information of the observation

    I_x = E_{theta ~ q_x}[ g g' ],    g = grad_x log q(theta | x)

and the loss gets beta E_x tr I_x (Gloeckler, Deistler and Macke 2023, arXiv 2305.14984).  What is
learned is then no longer the posterior but a smoother one; on a linear Gaussian model the optimum
is known, and with it what robustness costs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ppl.checks import check_counts, check_key
from ppl.showing import shown

from ..training import Draw, Training, trained_part
from .batches import Batch
from .network import Network
from .npe import Loss
from .posterior import Posterior
from .simulators import Observation, Simulations


def trace(
    network: Network, key: PRNGKeyArray, rows: Simulations, num_samples: int
) -> Float[Array, " B"]:
    """tr I_x of every observation, from so many latents each; differentiable, through the latents
    too.
    """
    size = len(rows.theta)

    def one(key: PRNGKeyArray, x: Observation) -> Float[Array, ""]:
        theta = network.sample(key, network.summary(x), num_samples)
        numbers, rest = eqx.partition(x, lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))

        def log_prob(numbers: Any, theta: Float[Array, " D"]) -> Float[Array, ""]:
            context = network.summary(eqx.combine(numbers, rest))
            return network.given(theta[None], context)[0]

        gradients = jax.vmap(jax.grad(log_prob), (None, 0))(numbers, theta)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients)]
        return jnp.stack(squares).sum() / num_samples

    return jax.vmap(one)(jax.random.split(key, size), rows.x)


class Regularised(eqx.Module):
    """-log q + beta tr I_x, the means over a batch."""

    beta: float = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        value, metrics = Loss()(network, key, batch)
        fisher = batch.mean(trace(network, key, batch.rows, self.num_samples))
        return value + self.beta * fisher, metrics | {"fisher": fisher}


@shown
class Averaged(NamedTuple):
    """A batch, and the gradient of the regulariser as it was of late."""

    batch: Batch
    gradient: PyTree


class AveragedDraw(eqx.Module):
    """Draws a batch, and moves the regulariser's averaged gradient towards that of the batch."""

    draw: Draw
    num_samples: int = eqx.field(static=True)
    decay: float = eqx.field(static=True)

    def __call__(
        self, key: PRNGKeyArray, network: Network, data: tuple[Any, PyTree, Array]
    ) -> tuple[Averaged, tuple[Any, PyTree, Array]]:
        first, second = jax.random.split(key)
        inner, total, weight = data
        batch, inner = self.draw(first, network, inner)
        trained, fixed = trained_part(network)

        def fisher(trained: PyTree) -> Float[Array, ""]:
            whole = eqx.combine(trained, fixed)
            return batch.mean(trace(whole, second, batch.rows, self.num_samples))

        new = jax.grad(fisher)(trained)
        total = jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, total, new)
        weight = self.decay * weight + (1 - self.decay)
        mean = jax.tree.map(lambda leaf: leaf / weight, total)
        return Averaged(batch, mean), (inner, total, weight)


class AveragedLoss(eqx.Module):
    """-log q, and a linear function of the parameters whose gradient is the averaged one."""

    beta: float = eqx.field(static=True)

    def __call__(
        self, network: Network, key: PRNGKeyArray, batch: Averaged
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        value, metrics = Loss()(network, key, batch.batch)
        trained, _ = trained_part(network)
        products = jax.tree.map(
            lambda leaf, slope: jnp.sum((leaf - jax.lax.stop_gradient(leaf)) * slope),
            trained,
            batch.gradient,
        )
        return value + self.beta * jnp.stack(jax.tree.leaves(products)).sum(), metrics


def regularised(training: Training, *, beta: float, num_samples: int = 50) -> Training:
    """`npe.training(...)` with beta tr I_x in its loss.

    Args:
        training: of `npe.training`.
        beta: in units of the observation squared; 0.05 times the variance of its numbers is usual.
        num_samples: latents to an observation and step.
    """
    _check(training, beta, num_samples)
    return dataclasses.replace(training, loss=Regularised(beta, num_samples))


def averaged(
    training: Training, *, beta: float, num_samples: int = 5, decay: float = 0.85
) -> Training:
    """The same with few latents, and the regulariser's gradient averaged over the last steps, by
    exponential weights that sum to one.

    Args:
        decay: in [0, 1); 0 takes each step's own.
        Others as in `regularised`.
    """
    _check(training, beta, num_samples)
    if not 0 <= decay < 1:
        raise ValueError(f"expected decay in [0, 1), got {decay}; 0.85 is usual")
    trained, _ = trained_part(training.params)
    data = training.data, jax.tree.map(jnp.zeros_like, trained), jnp.float32(0)
    draw = AveragedDraw(training.draw, num_samples, decay)
    return dataclasses.replace(training, draw=draw, loss=AveragedLoss(beta), data=data)


@shown
class Attack(NamedTuple):
    """The change of an observation that changes the posterior most, as far as was found.

    x: the changed observation.  kl: KL(q_x || q of it), in nats, from its own draws.  size: the
    Euclidean length of the change.
    """

    x: Observation
    kl: Float[Array, ""]
    size: Float[Array, ""]


def attack(
    key: PRNGKeyArray,
    posterior: Posterior,
    x: Any,
    *,
    radius: float,
    num_steps: int = 50,
    num_samples: int = 100,
) -> Attack:
    """Projected gradient ascent of KL(q_x || q_{x+d}) over |d| <= radius (L2).

    Args:
        key: for the first direction, and for the latents of every step.
        x: the observation, of numbers.
        radius: in units of the observation.
        num_steps: of length radius / 10.
        num_samples: latents to a step; ten times as many say what was found.

    Raises:
        ValueError: for a radius that is not positive, or an observed site that is discrete.
    """
    check_key(key)
    check_counts(num_steps=num_steps, num_samples=num_samples)
    seen = checked(posterior, x, radius)
    return worst(key, posterior.network, seen, jnp.float32(radius), num_steps, num_samples)


def checked(posterior: Posterior, x: Any, radius: float) -> Observation:
    """An observation that can be changed by so much; raises as `attack` does."""
    seen = posterior.simulator.observation(x)
    if not radius > 0:
        raise ValueError(f"expected a radius above 0, in units of the observation, got {radius}")
    discrete = [name for name, v in seen.items() if not jnp.issubdtype(v.dtype, jnp.inexact)]
    if discrete:
        raise ValueError(f"expected observed sites that are numbers, got discrete {discrete}")
    return seen


def divergence(
    key: PRNGKeyArray,
    network: Network,
    context: Float[Array, " C"],
    other: Float[Array, " C"],
    num_samples: int,
) -> Float[Array, ""]:
    """KL(q of one context || q of another), from draws of the first."""
    theta = network.sample(key, context, num_samples)
    return (network.given(theta, context) - network.given(theta, other)).mean()


@eqx.filter_jit
def worst(
    key: PRNGKeyArray,
    network: Network,
    x: Observation,
    radius: Float[Array, ""],
    num_steps: int,
    num_samples: int,
) -> Attack:
    """`attack`, of what it has checked."""
    flat, unravel = ravel_pytree(x)
    context = network.summary(x)

    def kl(change: Float[Array, " P"], key: PRNGKeyArray, num: int) -> Float[Array, ""]:
        return divergence(key, network, context, network.summary(unravel(flat + change)), num)

    def step(change: Float[Array, " P"], key: PRNGKeyArray) -> tuple[Float[Array, " P"], None]:
        slope = jax.grad(kl)(change, key, num_samples)
        change = change + 0.1 * radius * unit(slope)
        return change * jnp.minimum(1, radius / jnp.linalg.norm(change)), None

    first, last, steps = jax.random.split(key, 3)
    start = 0.1 * radius * unit(jax.random.normal(first, flat.shape, flat.dtype))
    change, _ = jax.lax.scan(step, start, jax.random.split(steps, num_steps))
    found = kl(change, last, 10 * num_samples)
    return Attack(unravel(flat + change), found, jnp.linalg.norm(change))


def unit(values: Float[Array, " P"]) -> Float[Array, " P"]:
    """A vector of length 1."""
    return values / jnp.maximum(jnp.linalg.norm(values), 1e-12)


def _check(training: Training, beta: float, num_samples: int) -> None:
    check_counts(num_samples=num_samples)
    if not beta >= 0:
        raise ValueError(f"expected beta of at least 0, got {beta}")
    if not isinstance(training.params, Network) or not isinstance(training.loss, Loss):
        raise ValueError(
            "expected a training of npe.training, whose density is differentiable in the"
            f" observation, got one with loss {type(training.loss).__name__}"
        )
    if discrete := [site.name for site in training.params.simulator.discrete]:
        raise ValueError(
            f"expected continuous latents, through whose draws the regulariser is differentiated,"
            f" got discrete {discrete}; regularise without them (they are then nuisance)"
        )
