"""What a Python function returns that is no float: its string dies, is counted, and it is said."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import pytest

import ppl
from samplers import smc
from tests import helpers


@pytest.mark.parametrize("value", [None, "1.5", np.ones(1), 1j], ids=str)
def test_what_is_no_float_is_said(value: Any, caplog: pytest.LogCaptureFixture):
    target = helpers.markov().given(helpers.PROMPT, max_tokens=2)
    score = ppl.python(lambda ids: value)
    with caplog.at_level(logging.WARNING, logger="ppl.failures"):
        out = smc.run(jax.random.key(0), target * ppl.reward(score), num_particles=4)
    assert out.log_z == -np.inf and out.num_invalid > 0
    assert "TypeError" in caplog.text and "returned nan" not in caplog.text


@pytest.mark.parametrize("value", [1, np.ones(())], ids=str)
def test_what_is_a_float_counts(value: Any):
    target = helpers.markov().given(helpers.PROMPT, max_tokens=2)
    score = ppl.python(lambda ids: value)
    out = smc.run(jax.random.key(0), target * ppl.reward(score), num_particles=4, threshold=0.0)
    np.testing.assert_allclose(out.log_z, float(value), rtol=1e-5)
