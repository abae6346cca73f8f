"""Laws of the cut, by their values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from samplers.strings import cuts

HORIZON = 4


@pytest.mark.parametrize(
    ("law", "places"),
    [(cuts.uniform, [4, 4, 4, 4, 4]), (cuts.uniform_in_length, [1, 2, 3, 4, 4])],
    ids=["uniform", "uniform in length"],
)
def test_a_law_is_uniform_over_so_many_places(law: cuts.Cut, places: list[int]):
    """Of strings of 0 to 4 tokens: EOS is one more place, unless the horizon cut them."""
    length = jnp.arange(HORIZON + 1, dtype=jnp.int32)[:, None]
    cut = jnp.arange(HORIZON, dtype=jnp.int32)
    found = np.exp(np.asarray(law(cut, length, jnp.int32(HORIZON)), np.float64))
    expected = [[1 / n] * n + [0.0] * (HORIZON - n) for n in places]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
