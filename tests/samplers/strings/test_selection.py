"""What ancestors are drawn from, by its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from samplers.base import Particles
from samplers.smc import sequential
from samplers.strings import selection
from tests import helpers

KEY = jax.random.key(4)


def test_annealed_draws_by_a_power_of_the_weights():
    """A = W^(1 / temperature), up to a constant."""
    target = helpers.table().given(helpers.PROMPT, max_tokens=helpers.MAX_TOKENS)
    p = Particles(None, jnp.log(jnp.array([0.64, 0.36])), jnp.float32(0))
    found = selection.annealed(2.0)(KEY, target, p, jnp.int32(1))[1]
    assert found is not None
    np.testing.assert_allclose(jax.nn.softmax(found), [0.8 / 1.4, 0.6 / 1.4], rtol=1e-6)


def test_looking_one_token_ahead_counts_for_strings_that_grow():
    """A = W sum_v p(v | x)^2 of those, and W of a string that has ended."""
    lm = helpers.table()
    target = lm.given(helpers.PROMPT, max_tokens=helpers.MAX_TOKENS) ** 2
    how = sequential.method(target, num_particles=32)
    p = sequential.first(KEY, target, sequential.init(target, how, 32), how).particles
    ended = np.asarray(~p.state.active)
    assert 0 < ended.sum() < 32
    tokens = np.asarray(p.state.sequences.tokens[:, 0])
    after = {int(token): lm.prefill([*helpers.PROMPT, int(token)]).logits for token in tokens}
    gain = [jax.nn.logsumexp(2 * jax.nn.log_softmax(after[int(token)])) for token in tokens]
    expected = p.log_weights + jnp.where(ended, 0.0, jnp.stack(gain))
    found = selection.next_token(KEY, target, p, jnp.int32(1))[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
