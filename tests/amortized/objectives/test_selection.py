"""Objectives of the best of k against expectations by enumeration: all groups of n draws, each as
probable as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortized.objectives import selection, variational
from samplers.search import laws

STATES = 4
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=STATES)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum()
CORRECT = np.array([0.0, 1.0, 0.0, 1.0])
REWARDS = np.array([0.3, -1.2, 0.3, 2.0])
weights_of = jax.jit(selection.pass_k_weights, static_argnums=1)


def groups_of(num: int) -> np.ndarray:
    return np.array(list(itertools.product(range(STATES), repeat=num)))


def score(batch: np.ndarray) -> np.ndarray:
    """grad log q of every draw of a softmax [..., S]."""
    return np.eye(STATES)[batch] - PROBS


def gradients(rewards: np.ndarray, num: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of -`pass_k` on every group of n draws [G, S], and the groups' probabilities."""
    batch = groups_of(num)
    with jax.enable_x64(True):
        weights = jax.jit(jax.vmap(lambda r: selection.pass_k_weights(r, k)))(rewards[batch])
    return (np.asarray(weights)[..., None] * score(batch)).sum(1), PROBS[batch].prod(1)


def exact(rewards: np.ndarray, k: int) -> np.ndarray:
    """grad E[highest of k], by all tuples of k draws."""
    batch = groups_of(k)
    best, prob = rewards[batch].max(1), PROBS[batch].prod(1)
    return ((prob * best)[:, None] * score(batch).sum(1)).sum(0)


@pytest.mark.parametrize(("num", "k"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("rewards", [CORRECT, REWARDS], ids=["correct", "rewards"])
def test_the_gradient_is_that_of_the_best_of_k(rewards: np.ndarray, num: int, k: int):
    """T13: the mean over all n-tuples."""
    values, prob = gradients(rewards, num, k)
    truth = exact(rewards, k)
    assert np.abs(truth).max() > 0.02
    np.testing.assert_allclose(prob @ values, truth, atol=1e-12)


def test_the_gradient_of_pass_k_needs_no_success_rate():
    """grad (1 - (1 - p)^k) = k (1 - p)^(k-1) grad p, in closed form."""
    p = PROBS @ CORRECT
    expected = 3 * (1 - p) ** 2 * PROBS * (CORRECT - p)
    np.testing.assert_allclose(exact(CORRECT, 3), expected, atol=1e-12)


def by_definition(rewards: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """u_i and b_i of one group, from all sets of k - 1 others."""
    n = rewards.size
    u, b = np.zeros(n), np.zeros(n)
    for i in range(n):
        others = itertools.combinations([j for j in range(n) if j != i], k - 1)
        sets = [rewards[list(o)] for o in others]
        u[i] = np.mean([max(rewards[i], *o) for o in sets])
        b[i] = np.mean([o.max() for o in sets])
    return u, b


@pytest.mark.parametrize("k", [2, 3, 5, 7])
def test_weights_are_means_over_sets_of_others(k: int):
    rewards = np.array([0.5, -1.0, 0.5, 2.0, 2.0, 0.1, -3.0])
    u, b = by_definition(rewards, k)
    found = weights_of(jnp.asarray(rewards, jnp.float32), k)
    np.testing.assert_allclose(found, k / 7 * (u - b), atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_baseline_takes_away_noise_and_no_mean(k: int):
    batch = groups_of(4)
    ours, prob = gradients(REWARDS, 4, k)
    u = np.stack([by_definition(REWARDS[group], k)[0] for group in batch])
    without = ((k / 4 * u)[..., None] * score(batch)).sum(1)
    truth = exact(REWARDS, k)
    np.testing.assert_allclose(prob @ without, truth, atol=1e-12)
    variance = [prob @ ((values - truth) ** 2).sum(1) for values in (ours, without)]
    assert variance[0] < 0.8 * variance[1]


def test_planted_faults_would_be_seen():
    """The baseline of all strings, the weight k / n forgotten, and the success rate estimated from
    the same draws: each is biased.
    """
    batch, truth = groups_of(4), exact(CORRECT, 3)
    prob = PROBS[batch].prod(1)
    right = CORRECT[batch]
    u, b = (np.stack(x) for x in zip(*[by_definition(r, 3) for r in right], strict=True))
    failures = (1 - right.mean(1, keepdims=True)) ** 2

    def bias(weights: np.ndarray) -> float:
        return float(np.abs(prob @ (weights[..., None] * score(batch)).sum(1) - truth).max())

    assert bias(3 / 4 * (u - b)) < 1e-12
    assert bias(3 / 4 * (u - u.mean(1, keepdims=True))) > 0.01
    assert bias(u - b) > 0.01
    assert bias(3 / 4 * right * failures) > 0.01
    # The identity of arXiv 2412.15287 has a plus: with a minus for failures it is biased.
    p = PROBS @ CORRECT
    miss = 1 - p
    plus, minus = 3 * miss**2 / (1 - miss**3), 3 * miss / p
    law = groups_of(3)
    best = CORRECT[law].max(1)
    # The best of three: the first that is right, or the first.
    chosen = law[np.arange(len(law)), CORRECT[law].argmax(1)]
    weight = PROBS[law].prod(1)

    def signed(sign: float) -> np.ndarray:
        return (weight * (best * plus + sign * (1 - best) * minus)) @ score(chosen)

    np.testing.assert_allclose(signed(1.0), truth, atol=1e-12)
    assert np.abs(signed(-1.0) - truth).max() > 0.01


def loss_gradient(
    function: Callable[..., jax.Array], log_q: jax.Array, *rest: jax.Array | int
) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(lambda x: function(x, *rest)))(log_q))


def test_groups_are_averaged_and_what_is_not_known_is_left_out():
    log_q = jnp.asarray(rng.normal(size=9), jnp.float32)
    rewards = jnp.asarray([1.0, 5.0, 0.0, 2.0, jnp.nan, 1.0, -jnp.inf, 4.0, 7.0])
    groups = jnp.asarray([0, 3, 0, 0, 0, 3, 3, 3, 8])  # one of three, one of three, one alone
    found = loss_gradient(selection.pass_k, log_q, rewards, 2, groups)
    one = weights_of(jnp.asarray([1.0, 0.0, 2.0]), 2)
    two = weights_of(jnp.asarray([5.0, 1.0, 4.0]), 2)
    expected = np.zeros(9)
    expected[[0, 2, 3]], expected[[1, 5, 7]] = -one / 2, -two / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    nothing = selection.pass_k(log_q, jnp.full(9, jnp.nan), 2, groups)
    assert nothing == 0 and np.isfinite(loss_gradient(selection.pass_k, log_q, rewards, 9)).all()


def test_many_groups_and_great_rewards_keep_their_digits():
    """Rewards near 1000 in 500 groups of 8, in float32, against float64 by definition."""
    rewards = (1000 + rng.normal(size=(500, 8))).astype(np.float32)
    groups = jnp.repeat(jnp.arange(500), 8)
    found = weights_of(jnp.asarray(rewards.ravel()), 4, groups)
    for row in (0, 499):
        u, b = by_definition(rewards[row].astype(np.float64), 4)
        np.testing.assert_allclose(found.reshape(500, 8)[row], 4 / 8 * (u - b), atol=2e-4)


def test_large_groups_have_the_binomial_weight():
    """N = 10^4, c = 37, k = 100: (k / n) C(n - c, k - 1) / C(n - 1, k - 1)."""
    correct = jnp.zeros(10_000).at[:37].set(1.0)
    found = weights_of(correct, 100)
    log_ratio = sum(math.log1p(-36 / (9999 - i)) for i in range(99))
    np.testing.assert_allclose(found[:37], 100 / 10_000 * math.exp(log_ratio), rtol=1e-4)
    np.testing.assert_allclose(found[37:], 0, atol=1e-7)


def test_best_of_n_learns_the_law_of_the_best():
    """Its mean over all groups of three is -sum_x P(x) log q(x), P the law of best-of-3; with log p
    as the score, the likeliest string has 1 - (1 - p)^3 of it.
    """
    batch = groups_of(3)
    with jax.enable_x64(True):
        losses = jax.jit(
            jax.vmap(lambda b, s: jax.grad(selection.best_of_n)(jnp.zeros(3), s), in_axes=(0, 0))
        )(batch, jnp.asarray(np.log(PROBS))[batch])
    law = np.zeros(STATES)
    np.add.at(law, batch, -np.asarray(losses) * PROBS[batch].prod(1)[:, None])
    np.testing.assert_allclose(law, laws.best_of_n(np.log(PROBS), np.log(PROBS), 3), atol=1e-12)
    mode = PROBS.argmax()
    np.testing.assert_allclose(law[mode], 1 - (1 - PROBS[mode]) ** 3, atol=1e-12)
    value = selection.best_of_n(jnp.asarray([-1.0, -2.0, -3.0]), jnp.asarray([0.0, 5.0, jnp.nan]))
    assert value == 2.0


def test_resampling_one_has_the_mean_of_weighing_all():
    log_q = jnp.asarray(rng.normal(size=6), jnp.float32)
    log_weights = jnp.asarray([0.0, 1.0, -1.0, 0.5, -jnp.inf, 2.0])
    groups = jnp.asarray([0, 0, 0, 1, 1, 1])
    keys = jax.random.split(jax.random.key(0), 20_000)

    def gradient(key: jax.Array) -> jax.Array:
        return jax.grad(lambda x: selection.resampled(key, x, log_weights, groups))(log_q)

    values = np.asarray(jax.jit(jax.vmap(gradient))(keys))
    expected = loss_gradient(variational.forward_kl, log_q, log_weights, groups)
    error = values.std(0) / len(values) ** 0.5
    assert (np.abs(values.mean(0) - expected) <= 5 * error).all() and error.max() < 2e-3
    assert (values[:, 4] == 0).all()


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="k to be a whole number of at least 1, got 0"):
        selection.pass_k_weights(jnp.zeros(3), 0)
