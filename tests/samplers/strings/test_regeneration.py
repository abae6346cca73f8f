"""Strings scored and drawn anew from a cut."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ppl import exact
from samplers.strings import proposals, regeneration
from tests.helpers import EOS, PROMPT, VOCAB_SIZE, hmm

MAX_TOKENS = 5


def test_a_score_is_the_density_where_tokens_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    """Three at a time: there are five, and of the second part some have been read."""
    target = hmm().given(PROMPT, max_tokens=MAX_TOKENS) ** 2
    x = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
    monkeypatch.setattr(regeneration, "SCORED_LOGITS", 3 * len(x.length) * VOCAB_SIZE)
    score = jax.jit(regeneration.score.__wrapped__)
    state = score(target, proposals.as_proposal(proposals.bootstrap), x)
    found = regeneration.log_density(target, state)
    np.testing.assert_allclose(found, target.log_density(x.tokens, x.length), rtol=1e-5)
