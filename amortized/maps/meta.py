"""Amortized Bayesian meta-learning: a law of weights that a few steps turn into the posterior of a
new task's weights (Ravi and Beatson 2019; over adapters ABMLL, arXiv 2508.14285).

    start, base = lora.split(lora.attach(key, lm))
    training = meta.training(key, meta.Strings(p), start, tasks)      # Sequences [tasks, n, T]
    posterior = meta.posterior(fit.run(key, training, ...), training)
    q = posterior(key, task)                                          # K steps from the prior
    lm = lora.join(q.mean, base)                                      # or q.sample(key)

All tasks share theta = (mu, sigma), weights of task i are phi ~ N(mu, sigma^2), and its data have
log likelihood log p(D_i | phi).  From theta on, K gradient steps on

    -E_q log p(D_i | phi) + beta KL(q(phi) || p(phi | theta))

give q_i, and theta is what minimises the mean of that at q_i, less log p(theta) / tasks, through
the steps.  At beta = 1 this is a bound on the log posterior of theta, and q_i approximates the
posterior of phi; at any other it is HEURISTIC: where all is Gaussian q_i has beta times the
variance and beta times the prior's weight, so that at 1e-7 it is a point without a prior.

Of every matrix the mean is start + B A, and sigma = softplus(c + B' A'), of low rank each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from paramax import NonTrainable, unwrap

from models import lora
from ppl.checks import check_counts, check_key
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target

from ..fit import Fitted
from ..training import Training, trained_part

LogLikelihood = Callable[[PyTree, PyTree], Float[Array, ""]]
"""(weights, data of a task) -> log p(data | weights), the sum over the data."""


class LowRank(eqx.Module):
    """An array that starts as zero: as a matrix left @ right; if it is none, or too small, `left`
    alone.
    """

    left: Float[Array, "..."]
    right: Float[Array, "R N"] | None

    def __init__(self, key: PRNGKeyArray, shape: tuple[int, ...], rank: int):
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
        if rank >= min(rows, columns):
            self.left, self.right = jnp.zeros(shape, jnp.float32), None
            return
        # Columns of length one: a step in `right` moves the array as far.
        self.left = jax.random.normal(key, (rows, rank), jnp.float32) / jnp.float32(rows**0.5)
        self.right = jnp.zeros((rank, columns), jnp.float32)

    def of(self, shape: tuple[int, ...]) -> Array:
        """The whole array."""
        return self.left if self.right is None else (self.left @ self.right).reshape(shape)


class Normal(eqx.Module):
    """N(mean, diag(scale^2)) over weights, any pytree of arrays.

    Attributes:
        start: weights; fixed.
        means, offsets: for each of its arrays.
        spread: every standard deviation at first.
    """

    start: NonTrainable[PyTree]
    means: list[LowRank]
    offsets: list[LowRank]
    spread: float = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, start: PyTree, rank: int, spread: float):
        leaves = jax.tree.leaves(start)
        first, second = (jax.random.split(k, len(leaves)) for k in jax.random.split(key))
        self.start, self.spread = NonTrainable(start), spread
        self.means = [
            LowRank(k, jnp.shape(leaf), rank) for k, leaf in zip(first, leaves, strict=True)
        ]
        self.offsets = [
            LowRank(k, jnp.shape(leaf), rank) for k, leaf in zip(second, leaves, strict=True)
        ]

    @property
    def mean(self) -> PyTree:
        """The middle weights."""
        leaves, tree = jax.tree.flatten(unwrap(self.start))
        pairs = zip(leaves, self.means, strict=True)
        return tree.unflatten([leaf + part.of(jnp.shape(leaf)) for leaf, part in pairs])

    @property
    def scale(self) -> PyTree:
        """Standard deviations of all weights."""
        leaves, tree = jax.tree.flatten(unwrap(self.start))
        # softplus(c) = spread
        c = math.log(math.expm1(self.spread))
        pairs = zip(leaves, self.offsets, strict=True)
        return tree.unflatten(
            [jax.nn.softplus(c + part.of(jnp.shape(leaf))) for leaf, part in pairs]
        )

    def at(self, noise: PyTree) -> PyTree:
        """mean + scale * noise."""
        return jax.tree.map(lambda m, s, e: m + s * e, self.mean, self.scale, noise)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Weights."""
        return self.at(_noise(key, unwrap(self.start)))


def kl(q: Normal, p: Normal) -> Float[Array, ""]:
    """KL(q || p), at least in float32."""

    def one(*leaves: Array) -> Array:
        m, s, mean, scale = (
            jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)) for x in leaves
        )
        return jnp.sum(jnp.log(scale / s) + (s**2 + (m - mean) ** 2) / (2 * scale**2) - 0.5)

    each = jax.tree.map(one, q.mean, q.scale, p.mean, p.scale)
    return jnp.stack(jax.tree.leaves(each)).sum()


def log_prior(theta: Normal) -> Float[Array, ""]:
    """log p(theta): means are N(0, 1), and log standard deviations N(log spread, 1)."""

    def one(mean: Array, scale: Array) -> Array:
        z = jnp.log(scale) - math.log(theta.spread)
        return -0.5 * jnp.sum(mean**2 + z**2 + 2 * math.log(2 * math.pi))

    each = jax.tree.map(one, theta.mean, theta.scale)
    return jnp.stack(jax.tree.leaves(each)).sum()


class Strings(eqx.Module):
    """log p(strings | prompt) by a decoder with an adapter: the likelihood of a task of strings.

    target: the plain law p of the base model, whose prompt and horizon are those of all tasks.
    """

    target: Target

    def __call__(self, adapter: lora.Adapter, task: Sequences) -> Float[Array, ""]:
        law = self.target.under(lora.join(adapter, self.target.lm))
        return law.log_density(task.tokens, task.length).sum()


class Loss(eqx.Module):
    """The bound after K steps, the mean over a batch of tasks, less log p(theta) / tasks.

    Attributes:
        log_likelihood: of a task.
        inner: the optimiser of the K steps.
        beta: the weight of KL; a posterior has 1.
        num_steps: K.
        num_pairs: of antithetic draws, which every expectation is taken over.
        num_tasks: of all tasks that theta is learned from.
    """

    log_likelihood: LogLikelihood
    inner: optax.GradientTransformation
    beta: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_pairs: int = eqx.field(static=True)
    num_tasks: int = eqx.field(static=True)

    def __call__(
        self, theta: Normal, key: PRNGKeyArray, tasks: PyTree
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        def one(key: PRNGKeyArray, task: PyTree) -> tuple[Array, Array]:
            first, second = jax.random.split(key)
            return self.terms(self.adapted(theta, first, task), theta, second, task)

        keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
        log_likelihood, divergence = (x.mean() for x in jax.vmap(one)(keys, tasks))
        value = self.beta * divergence - log_likelihood - log_prior(theta) / self.num_tasks
        return value, {"log_likelihood": log_likelihood, "kl": divergence}

    def adapted(self, theta: Normal, key: PRNGKeyArray, task: PyTree) -> Normal:
        """q(phi) of a task: K steps from theta."""
        trained, fixed = trained_part(theta)

        def bound(phi: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
            log_likelihood, divergence = self.terms(eqx.combine(phi, fixed), theta, key, task)
            return self.beta * divergence - log_likelihood

        def step(carry: tuple[PyTree, PyTree], key: PRNGKeyArray) -> tuple[Any, None]:
            phi, state = carry
            updates, state = self.inner.update(jax.grad(bound)(phi, key), state, phi)
            return (optax.apply_updates(phi, updates), state), None

        start = trained, self.inner.init(trained)
        (phi, _), _ = jax.lax.scan(step, start, jax.random.split(key, self.num_steps))
        return eqx.combine(phi, fixed)

    def terms(
        self, q: Normal, theta: Normal, key: PRNGKeyArray, task: PyTree
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """E_q log p(D | phi), and KL(q || p(phi | theta))."""

        def pair(key: PRNGKeyArray) -> Array:
            noise = _noise(key, unwrap(q.start))
            there, back = q.at(noise), q.at(jax.tree.map(jnp.negative, noise))
            return (self.log_likelihood(there, task) + self.log_likelihood(back, task)) / 2

        each = jax.vmap(pair)(jax.random.split(key, self.num_pairs))
        return each.mean().astype(jnp.float32), kl(q, theta)


class Draw(eqx.Module):
    """Some of the tasks."""

    tasks: PyTree
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray, params: Any, data: None) -> tuple[PyTree, None]:
        del params
        num = len(jax.tree.leaves(self.tasks)[0])
        return take_rows(self.tasks, jax.random.permutation(key, num)[: self.batch_size]), data


def training(
    key: PRNGKeyArray,
    log_likelihood: LogLikelihood,
    start: PyTree,
    tasks: PyTree,
    *,
    beta: float = 1.0,
    num_steps: int = 5,
    inner: optax.GradientTransformation | None = None,
    rank: int = 2,
    spread: float = 0.01,
    num_pairs: int = 1,
    batch_size: int = 4,
) -> Training:
    """What `fit.run` minimises to learn theta, a `Normal`.

    Args:
        key: for the start of theta.
        log_likelihood: (weights, data of a task) -> log p(data | weights); a pytree if it holds a
            model, as `Strings` does.
        start: weights that the means start at, for example an adapter of `models.lora`.
        tasks: the data, a row of every leaf for each task.
        beta: the weight of KL; only with 1 is what is learned a posterior.
        num_steps: K, from theta to the posterior of a task.
        inner: their optimiser; gradient descent with the rate spread^2 / 4 if None.  At rate
            spread^2 a step goes from theta to the posterior's mean where the likelihood is linear;
            beyond twice that it diverges.
        rank: of means and standard deviations, as matrices.
        spread: every standard deviation at first.
        num_pairs: antithetic pairs of draws in every expectation.
        batch_size: tasks to a step.

    Raises:
        ValueError: if a count is not positive, beta is negative, spread is not positive, a batch
            has more tasks than there are, or a log likelihood is no scalar.
    """
    check_key(key)
    check_counts(num_steps=num_steps, rank=rank, num_pairs=num_pairs, batch_size=batch_size)
    if beta < 0 or not spread > 0:
        raise ValueError(
            f"expected beta of at least 0, and spread above 0, got {beta} and {spread}; a posterior"
            " has beta=1"
        )
    num = len(jax.tree.leaves(tasks)[0])
    if batch_size > num:
        raise ValueError(f"expected at least {batch_size} tasks, a batch, got {num}; lower it")
    first = jax.tree.map(lambda leaf: leaf[0], tasks)
    found = eqx.filter_eval_shape(log_likelihood, start, first)
    if found.shape != ():
        raise ValueError(
            f"expected a scalar as the log likelihood of a task, got shape {found.shape}; sum it"
            " over the data"
        )
    theta = Normal(key, start, rank, spread)
    inner = optax.sgd(spread**2 / 4) if inner is None else inner
    loss = Loss(log_likelihood, inner, float(beta), num_steps, num_pairs, num)
    return Training(theta, Draw(tasks, batch_size), loss)


def posterior(out: Fitted, training: Training) -> Callable[[PRNGKeyArray, PyTree], Normal]:
    """What a run has learned: (key, data of a task) -> q(phi); compiled."""
    return eqx.Partial(_adapted, training.loss, out.best)


@eqx.filter_jit
def _adapted(loss: Loss, theta: Normal, key: PRNGKeyArray, task: PyTree) -> Normal:
    return loss.adapted(theta, key, task)


def _noise(key: PRNGKeyArray, like: PyTree) -> PyTree:
    """Standard normal, in the shapes of weights."""
    flat, restore = ravel_pytree(like)
    return restore(jax.random.normal(key, flat.shape, flat.dtype))
