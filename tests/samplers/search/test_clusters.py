"""Estimates from clusters: by hand, and against their law over all ways that thoughts can go."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers.search import clusters

CHANCE = np.array([0.5, 0.3, 0.2])
"""Of a thought to be of each kind, whose answers, two at each of two depths, are right by `RIGHT`.
"""
RIGHT = np.array([[0.9, 0.5], [0.2, 0.4], [0.0, 0.1]])
EACH = 2


def kinds() -> Any:
    """Every outcome of one thought [2, 2], and its probability."""
    rows, shares = [], []
    for outcome in itertools.product([False, True], repeat=4):
        x = np.array(outcome).reshape(2, EACH)
        given = np.where(x, RIGHT[:, :, None], 1 - RIGHT[:, :, None]).prod((1, 2))
        rows.append(x)
        shares.append(CHANCE @ given)
    return np.array(rows), np.array(shares)


def pairs() -> Any:
    """Every outcome of two thoughts [2, 2, 2], and its probability."""
    rows, shares = kinds()
    i, j = np.indices((16, 16)).reshape(2, -1)
    return np.stack([rows[i], rows[j]], 1), shares[i] * shares[j]


def test_the_squared_error_is_unbiased_for_the_variance():
    """Enumerated over all outcomes of n = 2 thoughts; that of independent values is not."""
    rows, shares = pairs()
    assert shares.sum() == pytest.approx(1)
    found = jax.vmap(clusters.mean)(jnp.asarray(rows))
    value, error = (np.asarray(x, np.float64) for x in (found.value, found.std_error))
    truth = CHANCE @ RIGHT.mean(1)
    assert shares @ value == pytest.approx(truth, abs=1e-6)
    variance = shares @ (value - truth) ** 2
    assert shares @ error**2 == pytest.approx(variance, abs=1e-6)
    flat = rows.reshape(len(rows), -1)
    assert shares @ (flat.var(1, ddof=1) / 8) < 0.9 * variance


def test_pass_at_k_is_of_whole_thoughts():
    rows, shares = pairs()
    at_1, at_2 = np.asarray(jax.vmap(lambda x: clusters.pass_at_k(x, [1, 2]))(jnp.asarray(rows))).T
    fails = CHANCE @ ((1 - RIGHT) ** EACH).prod(1)
    assert shares @ at_1 == pytest.approx(1 - fails, abs=1e-6)
    assert shares @ at_2 == pytest.approx(1 - fails**2, abs=1e-6)
    assert fails > (CHANCE @ (1 - RIGHT)).prod() ** EACH  # as if thoughts did not matter


def test_a_majority_by_hand():
    answer = np.array([[0, 0, 1], [1, 0, -1], [0, 0, 2]])
    vote, lead = clusters.majority(jax.random.key(0), answer)
    assert int(vote.answer) == 0
    np.testing.assert_allclose(lead.value, 3 / 9, rtol=1e-6)
    np.testing.assert_allclose(lead.std_error, np.std([1 / 3, 0, 2 / 3], ddof=1) / 3**0.5)
    alone = clusters.majority(jax.random.key(0), np.zeros((2, 2), np.int32)).lead
    assert float(alone.value) == 1 and float(alone.std_error) == 0
    nothing = clusters.majority(jax.random.key(0), np.full((2, 2), -1)).lead
    assert float(nothing.value) == 0


def test_effect_is_the_size_of_equal_clusters():
    rows = jnp.repeat(jnp.arange(40.0)[:, None] % 3, 5, axis=1)
    found = clusters.mean(rows)
    np.testing.assert_allclose(found.effect, 5 * (199 / 200) / (39 / 40), rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least two clusters, got shape \[1, 4\]"):
        clusters.mean(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least two clusters"):
        clusters.majority(jax.random.key(0), np.zeros(4, np.int32))
