"""Votes and order statistics against all pools of a small law."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import gammaln

from samplers.search import order_statistics, pools, reweighted, votes
from tests.helpers import TraceCounter, assert_z

KEY = jax.random.key(0)
P = np.asarray([0.35, 0.2, 0.15, 0.2, 0.1])
R = np.asarray([1.0, 2.0, 2.0, 0.0, 3.0])
F = np.asarray([0.7, -1.0, 2.0, 0.4, 1.3])
"""A law of five strings, with a tie among their scores, and any function of them."""
K4 = [1, 2, 3, 4]


@functools.cache
def tuples(num: int) -> tuple[np.ndarray, np.ndarray]:
    """All pools of `num` draws from P, and their probabilities."""
    rows = np.asarray(list(itertools.product(range(len(P)), repeat=num)))
    return rows, P[rows].prod(1)


def best_of_law(k: int) -> np.ndarray:
    """P(x) = p(x) (F^k - F^-^k) / (F - F^-)."""
    upto = np.asarray([P[R <= r].sum() for r in R])
    below = np.asarray([P[R < r].sum() for r in R])
    return P * (upto**k - below**k) / (upto - below)


def all_weights(weights: Any, num: int, k: int) -> np.ndarray:
    """The weights of all pools, by something like `order_weights`."""
    rows, _ = tuples(num)
    scores = jnp.asarray(R[rows], jnp.float32)
    return np.asarray(jax.vmap(weights, (0, None))(scores, k), np.float64)


def law_by(weights: Any, num: int, k: int) -> np.ndarray:
    """E sum_i w_i 1{x_i = x} over all pools."""
    rows, probs = tuples(num)
    found = all_weights(weights, num, k) * probs[:, None]
    return np.bincount(rows.ravel(), found.ravel(), minlength=len(P))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_order_weights_are_unbiased_for_the_best_of_k(k: int):
    """E sum_i w_i f(x_i) = E f(best of k) over all 625 pools of four: the law of `pick`."""
    law = law_by(votes.order_weights, 4, k)
    np.testing.assert_allclose(law, best_of_law(k), atol=1e-6)
    assert abs(law @ F - best_of_law(k) @ F) < 1e-6


def without_the_mean_of_ties(scores: Any, k: int) -> Any:
    """C(N-1-t, k-1) / C(N, k) as the sort orders them."""
    num = scores.shape[0]
    ranks = [math.comb(num - 1 - t, k - 1) / math.comb(num, k) for t in range(num)]
    return jnp.zeros(num).at[jnp.argsort(-scores)].set(jnp.asarray(ranks))


def test_ties_must_share():
    """Where tied draws do not share, the first of a pool has more: seen in what the places weigh,
    and in the law as soon as the places are not alike, here of the first half of the pool.
    """

    def first_half(weights: Any) -> float:
        rows, probs = tuples(4)
        tied = (R[rows] == 2).all(1)
        return float(probs[tied] @ all_weights(weights, 4, 3)[tied, :2].sum(1) / probs[tied].sum())

    assert abs(first_half(votes.order_weights) - 0.5) < 1e-6
    assert abs(first_half(without_the_mean_of_ties) - 0.5) > 0.4
    scores = jnp.asarray([2.0, 3.0, 2.0, 2.0, -jnp.inf])
    np.testing.assert_allclose(
        votes.order_weights(scores, 2), np.asarray([2, 4, 2, 2, 0]) / 10, atol=1e-6
    )


def exact_weights(num: int, k: int) -> np.ndarray:
    """In whole numbers."""
    total = math.comb(num, k)
    return np.asarray(
        [float(Fraction(math.comb(num - 1 - t, k - 1), total)) for t in range(num)], np.float64
    )


def by_gammaln(num: int, k: int) -> np.ndarray:
    def log_choose(n: Any, k: Any) -> Any:
        n, k = jnp.float32(n), jnp.float32(k)
        return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)

    left = num - 1 - np.arange(num - k + 1)
    return np.asarray(jnp.exp(log_choose(left, k - 1) - log_choose(num, k)), np.float64)


@pytest.mark.parametrize("k", [1, 2, 45, 1000, 1999, 2000])
def test_float32_is_enough(k: int):
    """Within 1e-6 of whole numbers at N = 2000: each weight by the greatest, and in sums."""
    num = 2000
    scores = jnp.arange(num, dtype=jnp.float32)[::-1]
    found = np.asarray(votes.order_weights(scores, k), np.float64)
    exact, f = exact_weights(num, k), np.cos(np.arange(num) / 7)
    assert np.abs(found - exact).max() < 1e-6 * exact.max()
    assert abs(found.sum() - 1) < 1e-6 and abs((found - exact) @ f) < 1e-6
    if k == 45:
        wrong = by_gammaln(num, k)
        assert np.abs(wrong - exact[: len(wrong)]).max() > 1e-4 * exact.max()


def test_the_degree_may_be_traced():
    scores = jnp.asarray(R, jnp.float32)
    curve = jax.jit(jax.vmap(votes.order_weights, (None, 0)))(scores, jnp.arange(7))
    for k in range(1, 6):
        np.testing.assert_allclose(curve[k], votes.order_weights(scores, k), atol=1e-7)
    assert jnp.isnan(curve[0]).all() and jnp.isnan(curve[6]).all()


def test_what_was_not_drawn_does_not_count():
    """Rows of log-weight -inf are no draws: the weights are those of the others alone, scores of
    -inf that were drawn keep their rank, and sqrt(N) is of the draws.
    """
    scores, there = jnp.asarray([1.0, -jnp.inf, 2, 2, 0, 3]), jnp.asarray([1, 1, 1, 0, 1, 0]) > 0
    among = jax.vmap(votes.order_weights, (None, 0, None))(scores, jnp.arange(1, 6), there)
    # By rank 2, 1, 0, -inf: C(3 - t, k - 1) / C(4, k).
    ranks = np.asarray([[math.comb(3 - t, k - 1) / math.comb(4, k) for t in range(4)] for k in K4])
    np.testing.assert_allclose(among[:4, jnp.asarray([2, 0, 4, 1])], ranks, atol=1e-7)
    assert (among[:4, jnp.asarray([3, 5])] == 0).all() and jnp.isnan(among[4]).all()
    pool = pools.pool(
        [0, 1, 2, 2, -1, 0], scores=scores, log_weights=jnp.where(there, 0.0, -jnp.inf)
    )
    found = votes.majority_of_bests(KEY, pool)
    np.testing.assert_allclose(found.mass[:3], [2 / 6, 0, 3 / 6], atol=1e-7)
    with pytest.raises(ValueError, match=r"expected k to be a whole number in 1..4"):
        votes.best_of(KEY, pool, 5)
    nothing = dataclasses.replace(pool, log_weights=jnp.full(6, -jnp.inf))
    empty = votes.best_of(KEY, nothing, jnp.int32(1))
    assert int(empty.index) == -1 and float(empty.mass.sum()) == 0


def test_a_row_is_picked_by_its_weight():
    """`best_of` draws by the order weights: with the test above, exactly the law of best of k."""
    pool = pools.pool([0, 1, 0, 2, -1], scores=[1.0, 2.0, 2.0, 0.0, 3.0])
    keys = jax.random.split(KEY, 20_000)
    found = jax.vmap(lambda key: votes.best_of(key, pool, 2))(keys)
    weights = np.asarray(votes.order_weights(pool.scores, 2))
    share = np.bincount(np.asarray(found.index), minlength=5) / len(keys)
    assert np.abs(share - weights).max() < 5 * np.sqrt(0.25 / len(keys))
    np.testing.assert_array_equal(found.answer, np.asarray(pool.answer)[found.index])
    mass = np.asarray([weights[0] + weights[2], weights[1], weights[3], 0, 0])
    np.testing.assert_allclose(found.mass[0], mass, atol=1e-6)
    np.testing.assert_allclose(
        found.confidence,
        np.where(found.answer < 0, 0, mass[found.answer] / mass.sum()),
        atol=1e-6,
    )
    best = votes.best_of(KEY, pool, 5)
    assert int(best.index) == 4 and int(best.answer) == -1


def test_pass_at_k():
    """Exactly, and where float32 log-gammas fail."""
    found = votes.pass_at_k(np.asarray([37]), [100], num=10**4)
    exact = 1 - Fraction(math.comb(10**4 - 37, 100), math.comb(10**4, 100))
    assert found.shape == (1, 1) and abs(float(found[0, 0]) - float(exact)) < 1e-6
    assert round(float(found[0, 0]), 4) == 0.3110

    def log_choose(n: float, k: float) -> Any:
        return gammaln(jnp.float32(n + 1)) - gammaln(jnp.float32(k + 1)) - gammaln(n - k + 1)

    wrong = 1 - jnp.exp(log_choose(10**4 - 37, 100) - log_choose(10**4, 100))
    assert abs(float(wrong) - float(exact)) > 1e-4
    # Several problems, pools of several sizes and all k; c = 0 and c = N.
    correct, num, ks = np.asarray([0, 3, 17, 20]), np.asarray([20, 25, 30, 20]), [1, 2, 13, 20]
    truth = [
        [1 - math.comb(n - c, k) / math.comb(n, k) for k in ks]
        for n, c in zip(num.tolist(), correct.tolist(), strict=True)
    ]
    np.testing.assert_allclose(votes.pass_at_k(correct, ks, num=num), truth, atol=1e-6)
    # The same function as the order weights of what is correct.
    right = jnp.asarray([1.0, 0, 0, 1, 0, 1, 0])
    both = votes.order_weights(right, 3) @ right
    np.testing.assert_allclose(votes.pass_at_k(right > 0, [3])[0], both, atol=1e-6)
    traced = jax.jit(lambda right: votes.pass_at_k(right, [3]))(right > 0)
    np.testing.assert_allclose(traced[0], both, atol=1e-6)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_soft_best_of_obeys_law_1(num: int):
    """E[exp(log_weight) 1{x}] = p(x) exp(r(x) / t) over all pools, KL <= log(1 + CV^2 / N), and the
    independence chain that proposes by it leaves the tilted law invariant.
    """
    rows, probs = tuples(num)
    scores, temperature = jnp.asarray(R[rows], jnp.float32), 0.8
    batch = jax.vmap(lambda r: pools.pool(jnp.zeros(num, jnp.int32), scores=r))(scores)
    keys = jax.random.split(KEY, len(rows))
    found = jax.vmap(lambda key, pool: votes.soft_best_of(key, pool, temperature))(keys, batch)
    weights = np.exp(np.asarray(found.log_weight, np.float64))
    tilt = np.exp(R / temperature)
    chosen = tilt[rows] / tilt[rows].sum(1, keepdims=True)

    def law(of: np.ndarray) -> np.ndarray:
        return np.bincount(rows.ravel(), (of[:, None] * chosen).ravel(), minlength=len(P))

    np.testing.assert_allclose(law(probs * weights), P * tilt, rtol=1e-6)
    target = P * tilt / (P @ tilt)
    bare = law(probs)
    divergence = target @ np.log(target / bare)
    spread = (P @ tilt**2) / (P @ tilt) ** 2 - 1
    assert 1e-3 < divergence <= np.log1p(spread / num)
    # Rows of a run are proposed by its weight, from p's runs: pi(run) ~ its probability times that.
    accept = np.minimum(1, weights[None] / weights[:, None]) * probs[None]
    pi = probs * weights / (probs @ weights)
    stays = pi * (1 - accept.sum(1))
    np.testing.assert_allclose(pi @ accept + stays, pi, atol=1e-12)
    np.testing.assert_allclose(law(pi), target, rtol=1e-6)


def test_soft_best_of_draws_by_its_weights():
    pool = pools.pool([0, 1, 2], scores=[0.0, 1.0, -np.inf], log_weights=[0.5, 0.0, 2.0])
    keys = jax.random.split(KEY, 20_000)
    found = jax.vmap(lambda key: votes.soft_best_of(key, pool, 2.0))(keys)
    each = np.exp([0.5, 0.5])
    assert_z(found.index == 0, each[0] / each.sum(), resolution=0.01)
    assert not (found.index == 2).any()
    np.testing.assert_allclose(found.log_weight[0], np.log(each.sum() / 3), rtol=1e-6)
    dead = pools.pool([0, 0], log_weights=[-np.inf, -np.inf])
    none = votes.soft_best_of(KEY, dead, 1.0)
    assert int(none.index) == -1 and float(none.log_weight) == -np.inf


# The constructed instance of the reference: a right answer, a popular wrong one, many rare ones.

RARE = 300
PROBS = np.asarray([0.2, 0.5] + [0.001] * RARE)
RUNS = 400


@functools.partial(jax.jit, static_argnames="num")
def accuracies(num: int) -> Any:
    """How often best-of-n, best-of-majority, majority and the majority of the bests of 8 are right,
    one row for each run.
    """

    def one(key: Any) -> Any:
        draw_key, score_key, *keys = jax.random.split(key, 6)
        rare = jax.random.uniform(score_key, (RARE,))
        scores = jnp.concatenate([jnp.asarray([0.8, 0.5]), rare])
        every = pools.pool(jnp.arange(len(PROBS)), scores=scores)
        rows = jax.random.choice(draw_key, len(PROBS), (num,), p=jnp.asarray(PROBS))
        pool = pools.take(every, rows)
        chosen = (
            votes.best_of(keys[0], pool, num).index,
            votes.best_of_majority(keys[1], pool, 0.1)[0],
            votes.majority(keys[2], pool).index,
            votes.majority_of_bests(keys[3], pool, min(8, num)).index,
        )
        return jnp.stack([pool.samples[row] == 0 for row in chosen])

    return jax.vmap(one)(jax.random.split(KEY, RUNS))


@pytest.mark.parametrize(
    ("num", "truth"),
    [(4, (0.474, None, 0.184, None)), (64, (0.015, 0.988, 0.0014, 0.985))],
)
def test_the_ends_of_the_family_fail_and_the_middle_wins(num: int, truth: tuple):
    """The reference's table within Monte Carlo errors, its own included; majority, whose ties it
    gave to the right answer, by 2 10^4 runs of numpy or more with uniform ties.
    """
    found = np.asarray(accuracies(num), np.float64).mean(0)
    for share, expected in zip(found, truth, strict=True):
        if expected is not None:
            sd = np.sqrt(max(expected * (1 - expected), 0.004) * 2 / RUNS)
            assert abs(share - expected) < 4 * sd, (found, truth)
    # Among four draws every answer has the share.
    assert num > 4 or abs(found[0] - found[1]) < 1e-9


# Votes.


def test_a_vote_of_weights():
    pool = pools.pool(
        [0, 1, 1, -1, 2],
        scores=[5.0, 1.0, 2.0, 9.0, 9.0],
        log_weights=np.log([0.5, 0.3, 0.1, 2.0, 1e-9]) + 200,
    )
    found = votes.vote(KEY, pool)
    assert int(found.answer) == 0 and int(found.index) == 0 and not found.tied
    np.testing.assert_allclose(found.mass[:2], np.asarray([0.5, 0.4]) / 2.9, rtol=1e-4)
    np.testing.assert_allclose(found.confidence, 0.5 / 0.9, rtol=1e-4)
    doubled = votes.vote(KEY, pool, jnp.asarray([1.0, 1, 3, 1, 1]))
    assert int(doubled.answer) == 1 and int(doubled.index) == 2
    np.testing.assert_allclose(doubled.mass[:2], np.asarray([0.5, 0.6]) / 3.1, rtol=1e-4)
    # A string of weight zero stands for nothing.
    gone = votes.vote(KEY, pool, jnp.asarray([0.0, 1, 0, 1, 0]))
    assert int(gone.answer) == 1 and int(gone.index) == 1


def test_weights_are_honoured():
    """LAW 1 with f = 1{answer}, over all pools of three draws from P with weights for p e^f:
    E[Z-hat mass_a] = sum_x gamma(x) 1{a(x) = a}; without the weights it is another.
    """
    rows, probs = tuples(3)
    answer = np.asarray([0, 1, 0, 1, 2])[rows]
    orders = [list(dict.fromkeys(row)) for row in answer.tolist()]
    ids = np.asarray([[o.index(a) for a in row] for row, o in zip(answer, orders, strict=True)])
    named = np.asarray([(o + [-1] * 3)[:3] for o in orders])
    z = np.exp(F)[rows].mean(1)

    def estimate(log_weights: np.ndarray) -> np.ndarray:
        batch = jax.vmap(lambda a, w: pools.pool(a, log_weights=w))(
            jnp.asarray(ids), jnp.asarray(log_weights, jnp.float32)
        )
        keys = jax.random.split(KEY, len(rows))
        mass = np.asarray(jax.vmap(votes.majority)(keys, batch).mass, np.float64)
        found = np.zeros(3)
        for slot in range(3):
            for a in range(3):
                found[a] += (probs * z * mass[:, slot])[named[:, slot] == a].sum()
        return found

    gamma = P * np.exp(F)
    truth = np.asarray([gamma[[0, 2]].sum(), gamma[[1, 3]].sum(), gamma[4]])
    np.testing.assert_allclose(estimate(F[rows] - np.log(z)[:, None]), truth, rtol=1e-5)
    assert np.abs(estimate(np.zeros(rows.shape)) - truth).max() > 0.05


def test_a_vote_weighted_by_scores():
    pool = pools.pool([0, 0, 1, 2], scores=[0.2, 0.1, 0.6, -np.inf])
    found = votes.weighted(KEY, pool)
    assert int(found.answer) == 1
    np.testing.assert_allclose(found.mass, np.asarray([0.3, 0.6, 0, 0]) / 0.9, rtol=1e-6)


def test_ties_are_uniform():
    """Among answers, and among the strings that stand for one; sums in another order are ties."""
    pool = pools.pool(
        [0, 0, 0, 1, 1, 1, 2, -1], log_weights=np.log([0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.6, 0.9])
    )
    found = jax.vmap(lambda key: votes.majority(key, pool))(jax.random.split(KEY, 9_000))
    assert found.tied.all()
    for answer in range(3):
        assert_z(found.answer == answer, 1 / 3, resolution=0.01)
    for row in range(3):
        assert_z(found.index == row, 1 / 9, resolution=0.01)
    assert not votes.majority(KEY, pools.pool([0, 0, 1])).tied
    # The same weights, whose float32 sums differ by their order.
    weights = jnp.asarray([0.1, 0.6, 0.7, 0.7, 0.6, 0.1])
    both = votes.vote(KEY, pools.pool([0, 0, 0, 1, 1, 1]), weights)
    assert both.tied and both.mass[0] != both.mass[1]


def test_the_best_of_a_majority():
    pool = pools.pool([0, 1, 0, 1, 2, 3, -1, -1], scores=[0.3, 0.4, 0.6, 0.5, 9.0, 0.1, 9.0, 9.0])
    rows = votes.best_of_majority(KEY, pool, 0.25, 3)
    assert np.asarray(rows).tolist() == [2, 3, -1]
    rows = votes.best_of_majority(KEY, pool, 0.125, 4)
    assert np.asarray(rows).tolist() == [4, 2, 3, 5]
    assert np.asarray(votes.best_of_majority(KEY, pool, 0.3, 2)).tolist() == [-1, -1]
    tied = pools.pool([0, 1, 1], scores=[1.0, 1.0, 1.0])
    found = jax.vmap(lambda key: votes.best_of_majority(key, tied, 0.1)[0])(
        jax.random.split(KEY, 9_000)
    )
    for row in range(3):
        assert_z(found == row, 1 / 3, resolution=0.01)


def test_a_large_pool_is_one_program():
    """10^5 strings, and another number of answers among them compiles nothing."""
    num = 10**5
    counted = TraceCounter(
        lambda key, pool: (votes.majority(key, pool), votes.best_of(key, pool, 9))
    )
    both = jax.jit(counted)
    scores = jnp.arange(num, dtype=jnp.float32)
    for many in (3, 40_000):
        ids = np.arange(num, dtype=np.int32) % many
        ids[::7] = 2
        found, best = both(KEY, pools.pool(ids, scores=scores))
        assert int(found.answer) == 2 and abs(float(best.mass.sum()) - 1) < 1e-5
        assert int(found.index) == int(np.flatnonzero(ids == 2)[-1])
        np.testing.assert_allclose(found.mass[2], (ids == 2).mean(), rtol=1e-6)
    assert counted.count == 1


@pytest.mark.bad_input
def test_bad_input():
    pool = pools.pool([0, 1, 0], scores=[0.5, -1.0, 0.2])
    with pytest.raises(ValueError, match=r"expected a pool, got list; make one by pools\.draw"):
        votes.majority(KEY, [0, 1, 0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected k to be a whole number in 1..3, .*, got 4"):
        votes.best_of(KEY, pool, 4)
    for k in (0, 1.5, -1):
        with pytest.raises(ValueError, match="expected k to be a whole number in 1..3"):
            votes.order_weights(pool.scores, k)
    with pytest.raises(ValueError, match="expected the scores of at least one string, got none"):
        votes.order_weights(jnp.zeros(0), 1)
    with pytest.raises(ValueError, match="expected scores below .inf, got NaN"):
        votes.order_weights(jnp.asarray([1.0, jnp.nan]), 1)
    with pytest.raises(ValueError, match="expected weights of at least 0, got some that are below"):
        votes.weighted(KEY, pool)
    with pytest.raises(ValueError, match=r"a weight for each of 3 strings, got shape \[2\]"):
        votes.vote(KEY, pool, jnp.ones(2))
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0"):
        votes.soft_best_of(KEY, pool, 0)
    with pytest.raises(ValueError, match="expected num to be a whole number in 1..3"):
        votes.best_of_majority(KEY, pool, 0.1, 4)
    uneven = pools.pool([0, 1], log_weights=[0.0, 1.0])
    for vote in (
        lambda: votes.best_of(KEY, uneven, 1),
        lambda: votes.majority_of_bests(KEY, uneven),
    ):
        with pytest.raises(ValueError, match="expected independent draws of equal weight"):
            vote()
    for correct, more in (([3], {}), ([True], {"num": 4}), (True, {})):
        with pytest.raises(ValueError, match="expected booleans .N., whether each draw is correct"):
            votes.pass_at_k(correct, [1], **more)
    with pytest.raises(ValueError, match="expected a list of sizes k, got 1"):
        votes.pass_at_k([True], 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected every k to be a whole number in 1..4"):
        votes.pass_at_k(np.asarray([1]), [2, 5], num=4)
    with pytest.raises(ValueError, match=r"counts of correct draws in 0..4, .*, got 1 to 5"):
        votes.pass_at_k(np.asarray([1, 5]), [2], num=4)
    assert order_statistics.pass_at_k is votes.pass_at_k


@pytest.mark.bad_input
def test_a_vote_is_on_one_prompt():
    """Pools with prompts first would be read as one, wrongly."""
    two: Any = jax.vmap(lambda a: pools.pool(a))(jnp.asarray([[0, 1, 1], [0, 0, 1]]))
    for vote in (
        lambda: votes.majority(KEY, two),
        lambda: votes.weighted(KEY, two),
        lambda: votes.best_of(KEY, two, 1),
        lambda: votes.majority_of_bests(KEY, two),
        lambda: votes.best_of_majority(KEY, two, 0.1),
        lambda: votes.soft_best_of(KEY, two, 1.0),
        lambda: reweighted.horvitz_thompson(KEY, two),
        lambda: reweighted.perplexity_consistency(KEY, two),
        lambda: reweighted.expected_utility(KEY, two, jnp.eye(3)),
        lambda: reweighted.deep_conf(KEY, two, jnp.ones(3)),
        lambda: pools.take(two, jnp.arange(2)),
    ):
        with pytest.raises(ValueError, match="pool of one prompt, got answers of shape"):
            vote()
    assert jax.vmap(votes.majority, (None, 0))(KEY, two).answer.tolist() == [1, 0]
