"""Variational objectives against expectations by enumeration: all batches of K draws, each as
probable as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.objectives import balance, variational

STATES, LOG_Z = 5, 0.7
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=STATES)
LOG_GAMMA = rng.normal(size=STATES)
LOG_GAMMA += LOG_Z - np.log(np.exp(LOG_GAMMA).sum())


def batches(num: int) -> np.ndarray:
    return np.array(list(itertools.product(range(STATES), repeat=num)))


def expected(loss: Callable, num: int, log_gamma: np.ndarray = LOG_GAMMA) -> np.ndarray:
    """E of the gradient of loss(log_q, log_weights) over batches of `num` draws of q."""
    with jax.enable_x64(True):

        def one(logits: jax.Array, batch: jax.Array) -> jax.Array:
            log_q = jax.nn.log_softmax(logits)[batch]
            return loss(log_q, jnp.asarray(log_gamma)[batch] - log_q)

        @jax.jit
        def run(logits: jax.Array) -> jax.Array:
            prob = jnp.exp(jax.nn.log_softmax(logits)[batches(num)].sum(1))
            return (prob[:, None] * jax.vmap(jax.grad(one), (None, 0))(logits, batches(num))).sum(0)

        return np.asarray(run(jnp.asarray(LOGITS)))


def exact(function: Callable) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(function))(jnp.asarray(LOGITS)))


def reverse(logits: jax.Array) -> jax.Array:
    log_q = jax.nn.log_softmax(logits)
    return (jnp.exp(log_q) * (log_q - LOG_GAMMA)).sum()


def negative_bound(logits: jax.Array, num: int) -> jax.Array:
    log_q = jax.nn.log_softmax(logits)[batches(num)]
    bound = jax.nn.logsumexp(jnp.asarray(LOG_GAMMA)[batches(num)] - log_q, axis=1) - jnp.log(num)
    return -(jnp.exp(log_q.sum(1)) * bound).sum()


@pytest.mark.parametrize("num", [2, 3])
def test_reverse_kl_has_the_gradient_of_the_divergence(num: int):
    truth = exact(reverse)
    assert np.abs(truth).max() > 0.05
    np.testing.assert_allclose(expected(variational.reverse_kl, num), truth, atol=1e-12)


def test_reverse_kl_and_the_variance_of_log_weights_have_one_gradient():
    with jax.enable_x64(True):
        log_q, log_gamma = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=6))
        zeros = jnp.zeros((6, 1))

        def vargrad(log_q: jax.Array) -> jax.Array:
            log_reward = jnp.broadcast_to(log_gamma[:, None], (6, 2))
            stop = jnp.concatenate([zeros, zeros], axis=1)
            length, weight = jnp.ones(6, jnp.int32), jnp.ones(6)
            return balance.vargrad(
                balance.Trajectories(log_q[:, None], zeros, stop, log_reward, length, weight)
            )

        ours, theirs = jax.jit(
            lambda: (
                jax.grad(lambda v: variational.reverse_kl(v, log_gamma - jax.lax.stop_gradient(v)))(
                    log_q
                ),
                jax.grad(vargrad)(log_q),
            )
        )()
    np.testing.assert_allclose(ours, np.asarray(theirs) * 6 / 5, atol=1e-12)


def test_forward_kl_and_sleep_have_the_gradient_of_the_other_divergence():
    with jax.enable_x64(True):
        p = jax.nn.softmax(jnp.asarray(LOG_GAMMA))
    truth = exact(lambda logits: -(p * jax.nn.log_softmax(logits)).sum())
    # Every string once, weighed by gamma: draws of a uniform proposal without their noise.
    weighted = exact(
        lambda logits: variational.forward_kl(jax.nn.log_softmax(logits), jnp.asarray(LOG_GAMMA))
    )
    np.testing.assert_allclose(weighted, truth, atol=1e-12)

    def asleep(logits: jax.Array) -> jax.Array:
        log_q = jax.nn.log_softmax(logits)[batches(2)]
        return (p[batches(2)].prod(1) * jax.vmap(variational.sleep)(log_q)).sum()

    np.testing.assert_allclose(exact(asleep), truth, atol=1e-12)


@pytest.mark.parametrize("num", [2, 3])
def test_vimco_has_the_gradient_of_the_bound(num: int):
    truth = exact(lambda logits: negative_bound(logits, num))
    np.testing.assert_allclose(expected(variational.vimco, num), truth, atol=1e-12)


def test_strings_of_weight_zero_are_unlearned_by_the_bound():
    log_gamma = np.where(np.arange(STATES) == 3, -np.inf, LOG_GAMMA)
    gradient = expected(variational.vimco, 3, log_gamma)
    assert np.isfinite(gradient).all() and gradient[3] == gradient.max() > 0.01


def test_a_wrong_baseline_would_be_seen():
    """The planted fault: a baseline of all draws, the string's own included."""

    def own(log_q: jax.Array, log_weights: jax.Array) -> jax.Array:
        signal = jax.lax.stop_gradient(log_weights.mean() - log_weights)
        return (signal * log_q).mean()

    assert np.abs(expected(own, 3) - exact(reverse)).max() > 1e-2


def test_bounds_tighten_to_log_z():
    def bound(num: int) -> float:
        with jax.enable_x64(True):
            log_q = jnp.asarray(LOGITS - np.log(np.exp(LOGITS).sum()))[batches(num)]
            values = jax.jit(jax.vmap(variational.iwae))(
                jnp.asarray(LOG_GAMMA)[batches(num)] - log_q
            )
            return float(np.exp(np.asarray(log_q).sum(1)) @ np.asarray(values))

    one, three = bound(1), bound(3)
    log_q = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(one, np.exp(log_q) @ (LOG_GAMMA - log_q), rtol=1e-12)  # the ELBO
    assert one < three < LOG_Z
    np.testing.assert_allclose(variational.iwae(jnp.full(3, LOG_Z)), LOG_Z, rtol=1e-6)
    np.testing.assert_allclose(
        variational.iwae(jnp.asarray([0.0, -jnp.inf, jnp.nan, 0.0])), np.log(2 / 3), rtol=1e-6
    )


def test_groups_are_averaged_and_bad_weights_left_out():
    log_q, log_weights = jnp.asarray(rng.normal(size=8)), jnp.asarray(2 * rng.normal(size=8))
    groups = jnp.asarray([4, 1, 4, 4, 1, 1, 4, 1])  # any names below N
    bad = jnp.asarray([jnp.nan, jnp.inf])
    more = [
        jnp.append(log_q, bad),
        jnp.append(log_weights, bad),
        jnp.append(groups, jnp.asarray([1, 7])),
    ]

    @jax.jit
    def values() -> dict[str, tuple]:
        out = {}
        for function in (variational.reverse_kl, variational.forward_kl, variational.vimco):
            rows = (np.array([1, 4, 5, 7]), np.array([0, 2, 3, 6]))
            alone = [function(log_q[row], log_weights[row]) for row in rows]
            value_and_grad = jax.value_and_grad(function)
            out[function.__name__] = (
                alone,
                value_and_grad(log_q, log_weights, groups),
                value_and_grad(*more),
            )
        return out

    for name, (alone, (value, gradient), with_bad) in values().items():
        np.testing.assert_allclose(value, np.mean(alone), rtol=1e-5, err_msg=name)
        # Rows 8 and 9 have no valid weight; the group of row 9 is left out of the average.
        np.testing.assert_allclose(with_bad[0], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            with_bad[1], jnp.append(gradient, jnp.zeros(2)), atol=1e-6, err_msg=name
        )
    counts = variational.flags(jnp.asarray([0.0, -jnp.inf, jnp.nan, jnp.inf]))
    assert int(counts["dead"]) == 1 and int(counts["invalid"]) == 2


def test_a_sharp_weight_gives_finite_gradients():
    log_weights = jnp.asarray([500.0, -500.0, 0.0])
    gradient = jax.jit(jax.grad(variational.vimco))(jnp.zeros(3), log_weights)
    assert np.isfinite(np.asarray(gradient)).all() and gradient[0] < -400
