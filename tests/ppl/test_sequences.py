"""Strings in arrays: what `append` does to rows that go on, end, are full, or rest."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ppl import sequences

EOS, T = 1, 3


def test_the_first_eos_ends_a_string_and_nothing_follows_it():
    x = sequences.from_tokens(jnp.array([[2, EOS, 3], [EOS, 2, 2], [2, 3, 0]]), EOS)
    np.testing.assert_array_equal(x.tokens, [[2, EOS, EOS], [EOS, EOS, EOS], [2, 3, 0]])
    np.testing.assert_array_equal(x.length, [1, 0, 3])
    np.testing.assert_array_equal(x.ended, [True, True, False])


def test_append():
    x = sequences.from_tokens(jnp.array([[2, EOS, EOS]] * 3 + [[3, 2, EOS]] * 2), EOS)
    token = jnp.array([0, EOS, 3, 0, 0])
    # Goes on; ends; rests, where token 3 is nothing; is full; rests.
    active = jnp.array([True, True, False, True, False])
    y, goes_on = sequences.append(x, token, active, EOS)
    np.testing.assert_array_equal(
        y.tokens, [[2, 0, EOS], [2, EOS, EOS], [2, EOS, EOS], [3, 2, 0], [3, 2, EOS]]
    )
    np.testing.assert_array_equal(y.length, [2, 1, 1, 3, 2])
    np.testing.assert_array_equal(goes_on, [True, False, False, False, False])
    assert y.length.dtype == jnp.int32


def test_append_fills_what_is_empty():
    x, active = sequences.empty(2, T, EOS), jnp.array([True, False])
    for token in ([0, 2], [2, 2], [3, 2]):
        x, active = sequences.append(x, jnp.array(token), active, EOS)
    np.testing.assert_array_equal(x.tokens, [[0, 2, 3], [EOS] * T])
    np.testing.assert_array_equal(x.length, [3, 0])
    assert not active.any()
