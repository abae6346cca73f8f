"""Importance sampling is SMC that never resamples: exact, and its particles are independent."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from samplers import smc
from samplers.smc import importance
from samplers.strings import proposals
from tests.samplers.problems import check_law, gamma, masses, target_of


@pytest.mark.slow
def test_law_1():
    target = target_of("table", "delimiters")
    keys = jax.random.split(jax.random.key(0), 30_000)
    found = masses(lambda key: importance.run(key, target, num_particles=3), keys)
    check_law(found, gamma("table", "delimiters"), resolution=0.005)


@pytest.mark.slow
def test_it_is_smc_without_resampling():
    target, key = target_of("hmm", "delimiters"), jax.random.key(1)
    ours = importance.run(key, target, num_particles=8, proposal=proposals.bootstrap)
    theirs = smc.run(key, target, num_particles=8, proposal=proposals.bootstrap, threshold=0.0)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not ours.trace.resampled.any()


@pytest.mark.bad_input
def test_num_particles_must_be_a_count():
    with pytest.raises(
        ValueError, match="expected num_particles to be a whole number of at least 1, got 0"
    ):
        importance.run(jax.random.key(0), target_of("hmm", "plain"), num_particles=0)
