"""What a Python function returns that is no float: its string dies, is counted, and it is said."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import pytest

import ppl
from samplers import smc
from samplers.results import Weighted
from tests import helpers

RETURNED: list[Any] = [None]
SCORE = ppl.python(lambda ids: RETURNED[0])


def run(value: Any) -> Weighted:
    """SMC with a reward that returns this; one program for all."""
    RETURNED[0] = value
    target = helpers.markov().given(helpers.PROMPT, max_tokens=2) * ppl.reward(SCORE)
    return jax.block_until_ready(smc.run(jax.random.key(0), target, num_particles=4, threshold=0.0))


@pytest.mark.parametrize("value", [None, "1.5", np.ones(1), 1j], ids=str)
def test_what_is_no_float_is_said(value: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="ppl.failures"):
        out = run(value)
    assert out.log_z == -np.inf and out.num_invalid > 0
    assert "TypeError" in caplog.text and "returned nan" not in caplog.text


@pytest.mark.parametrize("value", [1, np.ones(())], ids=str)
def test_what_is_a_float_counts(value: Any):
    out = run(value)
    np.testing.assert_allclose(out.log_z, float(value), rtol=1e-5)
