"""Ladders: made, checked, and tuned to equal acceptance."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from samplers.mcmc import parallel_tempering
from samplers.strings import ladders
from tests.helpers import PROMPT
from tests.samplers.chains import wordy
from tests.samplers.problems import plain


def test_geometric_ladders():
    ladder = np.asarray(ladders.geometric(0.5, 4, 4))
    assert ladder[0] == 0.5 and ladder[-1] == 4
    np.testing.assert_allclose(ladder[1:] / ladder[:-1], 2, rtol=1e-6)


def test_tuning_cuts_the_barrier_into_equal_parts():
    """With a constant barrier per unit of alpha, and with one that is all in one gap."""
    old = np.asarray([1.0, 1.5, 3.0, 4.0])
    np.testing.assert_allclose(
        ladders.tune(old, 1 - 0.2 * np.diff(old)), np.linspace(1, 4, 4), rtol=1e-5
    )
    found = np.asarray(ladders.tune(old, np.asarray([1.0, 0.0, 1.0])))
    np.testing.assert_allclose(found, [1, 2, 2.5, 4], atol=0.01)
    # No swap is ever rejected: as it was, spread evenly over the gaps.
    np.testing.assert_allclose(ladders.tune(old, np.ones(3)), old, rtol=1e-5)


@pytest.mark.slow
def test_a_tuned_ladder_accepts_evenly():
    target = wordy().given(PROMPT, max_tokens=12) ** 0.8
    ladder: Any = [0.2, 0.25, 0.7, 0.8]
    spread = []
    for i in range(3):
        out = parallel_tempering.run(
            jax.random.key(i),
            target,
            ladder,
            num_chains=64,
            block_size=6,
            sweeps_per_block=10,
            moves_per_sweep=2,
        )
        rates = np.asarray(out.info.details["swap_acceptance"][0, 10:].mean((0, 1)))
        spread.append(float(np.ptp(rates)))
        ladder = ladders.tune(ladder, rates)
    assert spread[0] > 0.3 and spread[-1] < 0.12


@pytest.mark.bad_input
def test_bad_input():
    for alpha_1, alpha in ((0, 4), (4, 1), (-1, 2), (float("nan"), 2), (1, float("inf"))):
        with pytest.raises(ValueError, match="expected 0 < alpha_1 < alpha"):
            ladders.geometric(alpha_1, alpha, 3)
    with pytest.raises(ValueError, match="at least two powers"):
        ladders.geometric(1, 4, 1)
    with pytest.raises(ValueError, match="expected num_rungs to be a whole number"):
        ladders.geometric(1, 4, 0)
    for rates in ([0.5], [0.5, 1.2], [0.5, float("nan")]):
        with pytest.raises(ValueError, match=r"expected 2 acceptance rates in \[0, 1\]"):
            ladders.tune([1, 2, 4], np.asarray(rates))
    with pytest.raises(ValueError, match="increase strictly"):
        ladders.tune([1, 4, 2], np.asarray([0.5, 0.5]))
    with pytest.raises(ValueError, match="ends at the target's alpha, 1, got 2"):
        ladders.check_powers(plain("table"), [1, 2])
