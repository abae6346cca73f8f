"""Samplers over a decoder whose weights and caches are bfloat16: weights and evidence are float32,
and those of the strings.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import config, transformer
from samplers import smc
from samplers.mcmc import suffix
from samplers.strings import proposals, regeneration
from tests.helpers import EOS

pytestmark = [pytest.mark.slow, pytest.mark.optimised]


@pytest.fixture(scope="module")
def target() -> ppl.Target:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32}
    lm = transformer.random(jax.random.key(0), config.small(5, **sizes), EOS)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.params)
    lm = dataclasses.replace(lm, params=half)
    return lm.given((2, 0, 3), max_tokens=5) ** 1.5 * ppl.min_tokens(2)


def test_weights_telescope_to_the_density(target: ppl.Target):
    """log w = log gamma - log q of each string where nothing was resampled, up to what bfloat16 may
    differ between one token at a time and many.
    """
    out = smc.run(
        jax.random.key(1), target, num_particles=64, proposal=proposals.bootstrap, threshold=0.0
    )
    assert {x.dtype for x in (out.log_weights, out.log_z, out.log_prob)} == {jnp.dtype(jnp.float32)}
    alive = ~np.isneginf(np.asarray(out.log_weights))
    density = np.asarray(target.log_density(out.sequences.tokens, out.sequences.length))
    found = np.asarray(out.log_weights + out.log_z + out.log_prob)
    assert 20 < alive.sum()
    np.testing.assert_allclose(found[alive], density[alive], atol=0.1)
    assert np.isneginf(density[~alive]).all() and float(out.log_z_std_error) < 1


def test_chains_carry_one_type_and_their_pieces_are_those_of_their_strings(target: ppl.Target):
    start = smc.run(jax.random.key(2), target, num_particles=16, threshold=1.1).sequences
    kernel = suffix.kernel(target)
    state, moved = kernel.init(start), 0
    for seed in range(3):
        new, info = kernel.step(jax.random.key(seed), state)
        kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(of)] for of in (state, new)]
        assert kinds[0] == kinds[1]
        state, moved = new, moved + int(info.changed.sum())
    fresh = regeneration.score(target, suffix.method(target).proposal, state.sequences)
    np.testing.assert_allclose(state.log_p, fresh.log_p, atol=0.1)
    np.testing.assert_allclose(state.log_q, fresh.log_q, atol=0.1)
    assert moved > 8 and np.isfinite(state.log_prob).all()
