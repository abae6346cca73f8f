"""Paths of a diffusion sampler: drawn ahead and back, and scored for the balance objectives.

The weight of a path, properly weighted for R whatever the drift is (LAW 1), is

    log w = log R(s_T) + sum_i log P_B(s_i | s_i+1) - log start(s_0) - sum_i log P_F(s_i+1 | s_i)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..objectives.balance import Scalar, Trajectories
from .policy import LogDensity, Policy
from .processes import Process, Step, log_normal


def ahead(
    process: Process,
    policy: Policy,
    log_density: LogDensity,
    i: Step,
    s: Float[Array, " D"],
    explore: Scalar = 0.0,
) -> tuple[Float[Array, " D"], Float[Array, ""]]:
    """Mean and variance of s_i+1 given s_i; `explore` is a standard deviation that is added."""
    keep, variance = process.ahead(i)
    out = policy(s, jnp.asarray(i) / process.num_steps, log_density)
    mean = keep * s + variance * out.drift
    return mean, variance * jnp.exp(out.log_variance) + jnp.asarray(explore) ** 2


def log_back(
    process: Process, i: Step, s: Float[Array, " D"], after: Float[Array, " D"]
) -> Float[Array, ""]:
    """log P_B(s_i | s_i+1)."""
    share, variance = process.back(i)
    sure = variance == 0
    return jnp.where(sure, 0.0, log_normal(s, share * after, jnp.where(sure, 1.0, variance)))


def rollout(
    key: PRNGKeyArray,
    process: Process,
    policy: Policy,
    log_density: LogDensity,
    num: int,
    explore: Scalar = 0.0,
) -> Float[Array, "N M D"]:
    """`num` paths, by reparametrisation: gradients pass through them."""
    first, second = jax.random.split(key)
    start = jax.vmap(process.start)(jax.random.split(first, num))

    def step(s: Array, inputs: tuple) -> tuple[Array, Array]:
        i, key = inputs
        mean, variance = jax.vmap(lambda s: ahead(process, policy, log_density, i, s, explore))(s)
        noise = jax.random.normal(key, s.shape)
        s = mean + jnp.sqrt(variance)[:, None] * noise
        return s, s

    steps = jnp.arange(process.num_steps), jax.random.split(second, process.num_steps)
    _, after = jax.lax.scan(step, start, steps)
    return jnp.concatenate([start[None], after]).swapaxes(0, 1)


def backward(key: PRNGKeyArray, process: Process, x: Float[Array, "N D"]) -> Float[Array, "N M D"]:
    """Paths that end in given points, drawn from P_B."""

    def step(s: Array, inputs: tuple) -> tuple[Array, Array]:
        i, key = inputs
        share, variance = process.back(i)
        before = share * s + jnp.sqrt(variance) * jax.random.normal(key, s.shape)
        return before, before

    steps = jnp.arange(process.num_steps)[::-1], jax.random.split(key, process.num_steps)
    _, before = jax.lax.scan(step, x, steps)
    return jnp.concatenate([before[::-1], x[None]]).swapaxes(0, 1)


def evaluate(
    process: Process, policy: Policy, log_density: LogDensity, states: Float[Array, "N M D"]
) -> Trajectories:
    """Paths as trajectories of the balance objectives: T moves, and a stop that is sure.

    The start is part of the first move, so the flow of the first state is Z.
    """
    num, length = states.shape[0], process.num_steps

    def move(i: Array, s: Array, after: Array) -> tuple[Array, Array]:
        mean, variance = ahead(process, policy, log_density, i, s)
        return log_normal(after, mean, variance), log_back(process, i, s, after)

    steps = jnp.arange(length)
    log_pf, log_pb = jax.vmap(jax.vmap(move), (None, 0, 0))(steps, states[:, :-1], states[:, 1:])
    log_start = jax.vmap(process.log_start)(states[:, 0])
    log_reward = jnp.full((num, length + 1), -jnp.inf)
    return Trajectories(
        log_pf=log_pf.at[:, 0].add(log_start),
        log_pb=log_pb,
        log_stop=jnp.zeros((num, length + 1)),
        log_reward=log_reward.at[:, -1].set(jax.vmap(log_density)(states[:, -1])),
        length=jnp.full(num, length, jnp.int32),
        weight=jnp.ones(num),
    )


def log_flow(
    process: Process, policy: Policy, log_density: LogDensity, i: Step, s: Float[Array, " D"]
) -> Float[Array, ""]:
    """log F_i(s) of a state, i > 0, forward-looking: what is learned, and on the way from noise to
    R the geometric mean (2402.05098)

        (1 - t) log N(s without a drift) + t log R(s),   t = i / T;   at T only log R

    Where R is zero on the way there is no second term: from there a path may well go on to where R
    is positive, and a flow of zero would lose it.
    """
    t = jnp.asarray(i) / process.num_steps
    log_r = log_density(s)
    learned = policy(s, t, log_density).log_flow
    seen = jnp.where(jnp.isfinite(log_r), log_r, 0.0)
    flow = (1 - t) * process.log_marginal(i, s) + t * seen + learned
    return jnp.where(jnp.asarray(i) == process.num_steps, log_r, flow)


def log_flows(
    process: Process, policy: Policy, log_density: LogDensity, states: Float[Array, "N M D"]
) -> Float[Array, "N L"]:
    """Those of s_1 to s_T."""
    steps = jnp.arange(1, process.num_steps + 1)
    each = lambda i, s: log_flow(process, policy, log_density, i, s)  # noqa: E731
    return jax.vmap(jax.vmap(each), (None, 0))(steps, states[:, 1:])


def log_weights(x: Trajectories) -> Float[Array, " N"]:
    """log w of every path."""
    return x.log_reward[:, -1] + x.log_pb.sum(axis=1) - x.log_pf.sum(axis=1)
