"""Answers as hints: a Markov chain on answers, with the numbers of the reference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from samplers.search import hints

MATRIX = np.asarray([[0.9, 0.05, 0.05], [0.3, 0.6, 0.1], [0.25, 0.15, 0.6]])


def test_rounds_end_in_the_stationary_law_whatever_the_first():
    laws = hints.iterate(jnp.asarray([0.3, 0.5, 0.2]), MATRIX, 60)
    np.testing.assert_allclose(laws[:4, 0], [0.3, 0.47, 0.573, 0.635], atol=5e-4)
    law = hints.stationary(MATRIX)
    np.testing.assert_allclose(law, [0.734, 0.139, 0.127], atol=5e-4)
    np.testing.assert_allclose(law @ MATRIX, law, atol=1e-6)
    other = hints.iterate(jnp.asarray([0.0, 0.0, 1.0]), MATRIX, 60)
    for found in (laws[-1], other[-1]):
        np.testing.assert_allclose(found, law, atol=1e-5)
    # The second eigenvalue is how fast.
    step = np.abs(np.asarray(laws[11]) - law).sum() / np.abs(np.asarray(laws[10]) - law).sum()
    assert abs(step - 0.621) < 0.01


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match=r"expected a matrix \[K, K\] .*, got shape \[3\]"):
        hints.stationary(jnp.ones(3))
    with pytest.raises(ValueError, match="expected rows that are laws"):
        hints.stationary(MATRIX.T)
    with pytest.raises(ValueError, match=r"expected a law of 3 answers, got shape \[2\]"):
        hints.iterate(jnp.ones(2), MATRIX, 1)
