"""What ancestors are drawn from, by its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from samplers.smc import sequential
from samplers.strings import selection
from tests import helpers

KEY = jax.random.key(4)


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
