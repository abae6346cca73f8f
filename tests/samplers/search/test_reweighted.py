"""Votes by probabilities, utilities and confidences, against all tuples of draws or by hand."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers.search import pools, reweighted, votes
from tests.helpers import assert_z

KEY = jax.random.key(0)
P = np.asarray([0.4, 0.25, 0.2, 0.1, 0.05])
Q = np.asarray([0.3, 0.1, 0.2, 0.25, 0.15])
"""A law of five strings, and another that they may be drawn from."""
NUM = 4


@functools.cache
def tuples() -> np.ndarray:
    return np.asarray(list(itertools.product(range(len(P)), repeat=NUM)))


def pools_from(law: np.ndarray) -> pools.Pool:
    """All pools of four draws from a law; every string is an answer of its own."""

    def one(rows: Any) -> pools.Pool:
        known = {"log_prob": jnp.log(jnp.asarray(P)), "log_q": jnp.log(jnp.asarray(law))}
        return pools.take(pools.pool(jnp.arange(len(P)), **known), rows)

    return jax.vmap(one)(jnp.asarray(tuples()))


def expected_mass(vote: Any, law: np.ndarray) -> np.ndarray:
    """E mass of every string over all tuples of draws."""
    every = pools_from(law)
    keys = jax.random.split(KEY, len(tuples()))
    mass = np.asarray(jax.vmap(vote)(keys, every).mass, np.float64)
    # Slot a of a pool's masses is of the strings with id a.
    found, probs = np.zeros(len(P)), law[tuples()].prod(1)
    answer, samples = np.asarray(every.answer), np.asarray(every.samples)
    for x in range(len(P)):
        rows, places = np.nonzero(samples == x)
        seen = dict(zip(rows.tolist(), answer[rows, places].tolist(), strict=True))
        found[x] = sum(probs[row] * mass[row, slot] for row, slot in seen.items())
    return found


@pytest.mark.parametrize("law", [P, Q], ids=["from p", "from q"])
def test_horvitz_thompson_is_unbiased(law: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    np.testing.assert_allclose(expected_mass(reweighted.horvitz_thompson, law), P, rtol=1e-5)
    # With another number of draws in the inclusion probability it is not.
    inclusion = reweighted._log_inclusion
    monkeypatch.setattr(reweighted, "_log_inclusion", lambda log_q, num: inclusion(log_q, num - 1))
    wrong = expected_mass(reweighted.horvitz_thompson, law)
    assert np.abs(wrong - P).max() > 0.01


def test_the_bias_of_perplexity_consistency():
    """- p (1 - p)^N for each string."""
    found = expected_mass(reweighted.perplexity_consistency, P)
    np.testing.assert_allclose(found - P, -P * (1 - P) ** NUM, rtol=1e-4, atol=1e-6)


def test_inclusion_of_any_probability():
    """log(1 - (1 - q)^n) in float32, from certain strings to those of a thousand tokens."""
    log_q = np.asarray([0.0, -1e-3, -0.7, -12.0, -25.0, -59.0, -61.0, -80.0, -2000.0])
    exact = np.log(-np.expm1(256 * np.log1p(-np.exp(np.maximum(log_q[1:-1], -100)))))
    found = reweighted._log_inclusion(jnp.asarray(log_q, jnp.float32), jnp.float32(256))
    np.testing.assert_allclose(found[1:-1], exact, atol=1e-5)
    assert found[0] == 0 and abs(float(found[-1]) - (np.log(256) - 2000)) < 1e-3


def test_one_likely_wrong_string_wins_only_as_published():
    """A wrong string of .4 and a right answer spread over a thousand: n = 32."""
    law = np.asarray([0.4] + [0.6 / 1000] * 1000)
    every = pools.pool(jnp.arange(len(law)), log_prob=jnp.log(law), log_q=jnp.log(law))

    @jax.jit
    @jax.vmap
    def right(key: Any) -> Any:
        draw_key, *keys = jax.random.split(key, 4)
        rows = jax.random.choice(draw_key, len(law), (32,), p=jnp.asarray(law))
        pool = pools.take(every, rows)
        ids = (pool.samples > 0) == (pool.samples[0] > 0)
        pool = dataclasses.replace(pool, answer=jnp.where(ids, 0, 1).astype(jnp.int32))
        chosen = (
            votes.majority(keys[0], pool),
            reweighted.perplexity_consistency(keys[1], pool),
            reweighted.horvitz_thompson(keys[2], pool),
        )
        return jnp.stack([pool.samples[vote.index] > 0 for vote in chosen])

    found = right(jax.random.split(KEY, 1000))
    binomial = np.asarray([math.comb(32, c) * 0.6**c * 0.4 ** (32 - c) for c in range(33)])
    assert_z(found[:, 0], binomial[17:].sum() + binomial[16] / 2, resolution=0.02)
    assert not found[:, 1].any()
    assert_z(found[:, 2], 0.987, resolution=0.01)


def test_long_strings_do_not_vanish():
    """Probabilities below float32's least: as light strings they count as in a majority."""
    pool = pools.pool([0, 0, 1], log_prob=[-300.0, -301.0, -299.0], log_q=[-300.0, -301.0, -299.0])
    found = reweighted.horvitz_thompson(KEY, pool)
    np.testing.assert_allclose(found.mass, [2 / 3, 1 / 3, 0], rtol=1e-4)
    assert int(reweighted.perplexity_consistency(KEY, pool).answer) == 1


def test_first_copies():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2, (300, 7)).astype(np.int32)
    length = rng.integers(6, 8, 300).astype(np.int32)
    found = reweighted.first_copies(ppl.Sequences(jnp.asarray(tokens), jnp.asarray(length)))
    seen: set[tuple[int, ...]] = set()
    for row, n, first in zip(tokens.tolist(), length.tolist(), np.asarray(found), strict=True):
        assert first == ((*row, n) not in seen)
        seen.add((*row, n))
    floats = reweighted.first_copies({"mu": jnp.asarray([0.5, 0.25, 0.5])})
    assert np.asarray(floats).tolist() == [True, True, False]


def test_rows_are_compared_and_not_only_their_hashes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reweighted, "_mixed", lambda x: x * 0)
    found = reweighted.first_copies(jnp.asarray([[1, 2], [1, 2], [2, 1]], jnp.int32))
    assert np.asarray(found).tolist() == [True, False, True]


def test_expected_utility():
    pool = pools.pool([0, 1, 0, -1], log_weights=np.log([0.1, 0.5, 0.3, 0.1]))
    utility = np.asarray([[1, 0.2, 0.3, 0], [0, 0.1, 0.9, 0], [0.3, 0.6, 1, -1], [9, 9, 9, 9.0]])
    gains = utility @ np.asarray([0.1, 0.5, 0.3, 0.1])
    found = reweighted.expected_utility(KEY, pool, utility)
    assert int(found.index) == 2 and int(found.answer) == 0 and not found.tied
    np.testing.assert_allclose(found.mass[:2], [gains[2], gains[1]], rtol=1e-5)
    np.testing.assert_allclose(found.confidence, gains[2], rtol=1e-5)
    assert jnp.isneginf(found.mass[2:]).all()
    # 1{equal} is majority; a function of two rows is the same as its matrix.
    equal = reweighted.expected_utility(KEY, pool, lambda a, b: (a % 2 == b % 2) * 1.0)
    assert int(equal.answer) == 1
    np.testing.assert_allclose(equal.mass[:2], [0.4, 0.6], rtol=1e-5)


def test_deep_conf():
    pool = pools.pool([0, 0, 0, 1, 1])
    confidences = jnp.asarray([1.0, 1.1, 1.2, 8.0, 3.0])
    found = reweighted.deep_conf(KEY, pool, confidences, 0.0)
    assert int(found.answer) == 1 and int(votes.majority(KEY, pool).answer) == 0
    np.testing.assert_allclose(found.mass[:2], np.asarray([3.3, 11]) / 14.3, rtol=1e-5)
    half = reweighted.deep_conf(KEY, pool, confidences, 0.5)
    np.testing.assert_allclose(half.mass[:2], np.asarray([1.2, 11]) / 12.2, rtol=1e-5)


def test_group_confidence():
    """The least mean of so many in a row; scripted, of lengths around the window."""
    rng = np.random.default_rng(1)
    top = -rng.exponential(2.0, (5, 9, 3)).astype(np.float32)
    length = np.asarray([9, 4, 3, 1, 0])
    found = reweighted.group_confidence(jnp.asarray(top), jnp.asarray(length), window=4)
    own = -top.astype(np.float64).mean(2)
    for row, n, value in zip(own, length, found, strict=True):
        size = min(4, int(n))
        groups = [row[i : i + size].mean() for i in range(n - size + 1)] if n else [0.0]
        np.testing.assert_allclose(value, min(groups), rtol=1e-5)


@pytest.mark.bad_input
def test_bad_input():
    pool = pools.pool([0, 1])
    with pytest.raises(ValueError, match="expected a pool with the log_prob of each string"):
        reweighted.perplexity_consistency(KEY, pool)
    resampled = pools.pool(
        [0, 1], log_weights=[0.0, 1.0], log_prob=[-1.0, -2.0], log_q=[-1.0, -2.0]
    )
    with pytest.raises(ValueError, match="expected independent draws, whose weights are equal or"):
        reweighted.horvitz_thompson(KEY, resampled)
    weighted = pools.pool(
        [0, 1], log_weights=[0.5, -0.5], log_prob=[-1.0, -2.0], log_q=[-1.6, -1.6]
    )
    reweighted.horvitz_thompson(KEY, weighted)
    with pytest.raises(ValueError, match=r"expected utilities \[2, 2\] .* got shape \[2, 3\]"):
        reweighted.expected_utility(KEY, pool, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="expected finite utilities"):
        reweighted.expected_utility(KEY, pool, jnp.full((2, 2), jnp.nan))
    with pytest.raises(ValueError, match=r"expected a quantile in \[0, 1\], got 10"):
        reweighted.deep_conf(KEY, pool, jnp.ones(2), 10)
    with pytest.raises(ValueError, match="expected window to be a whole number of at least 1"):
        reweighted.group_confidence(jnp.zeros((1, 2, 3)), jnp.asarray([2]), 0)
