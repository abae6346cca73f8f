"""Low-temperature sampling: its own law is known exactly, and it is not p^alpha."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.exact import enumerate_strings
from ppl.target import Target
from samplers.draws import low_temperature
from tests.helpers import EOS, MAX_TOKENS, PROMPT, markov
from tests.samplers.chains import chi_square_z
from tests.samplers.problems import plain


def own_law(target: Target, prompt: Sequence[int] = PROMPT) -> np.ndarray:
    """q of every string, from the model's next-token laws; nothing of the sampler is used."""
    alpha = float(target.alpha)
    x = enumerate_strings(target).sequences
    found = []
    for tokens, n in zip(np.asarray(x.tokens), np.asarray(x.length), strict=True):
        log_q = 0.0
        for t in range(min(n + 1, target.max_tokens)):
            log_p = np.asarray(
                jax.nn.log_softmax(target.lm.prefill([*prompt, *tokens[:t].tolist()]).logits), float
            )
            log_q += alpha * log_p[tokens[t]] - np.logaddexp.reduce(alpha * log_p)
        found.append(log_q)
    return np.asarray(found)


def test_the_law_is_the_one_that_is_returned():
    p = plain("table")
    target = p**1.7
    exact, log_q = enumerate_strings(target), own_law(target)
    np.testing.assert_allclose(np.exp(log_q).sum(), 1, atol=1e-5)
    out = low_temperature.run(jax.random.key(0), target, num_samples=20_000)
    index = exact.index(out.sequences.tokens)
    np.testing.assert_allclose(out.log_q, log_q[index], atol=1e-4)
    log_p = p.log_density(out.sequences.tokens, out.sequences.length)
    np.testing.assert_allclose(out.log_prob, log_p, atol=1e-4)
    counts = np.bincount(index, minlength=len(log_q))[None]
    assert abs(chi_square_z(counts, np.exp(log_q)[None])) < 5
    # The counts would tell it from p^alpha.
    assert chi_square_z(counts, exact.probs[None]) > 10
    assert int(out.cost.tokens) == int((out.sequences.length + out.sequences.ended).sum())
    assert int(out.cost.forwards) == MAX_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "distance"), [(3, 0.487), (5, 0.271)])
def test_how_far_it_is_from_the_power_target(seed: int, distance: float):
    """Total variation from p^3 on a table of 31 strings."""
    logits = 1.2 * jax.random.normal(jax.random.key(seed), (tabular.num_prefixes(3, 5), 3))
    target = tabular.table(logits, eos=0).given([1], max_tokens=4) ** 3
    exact = enumerate_strings(target)
    assert len(exact.probs) == 31
    found = 0.5 * np.abs(np.exp(own_law(target, (1,))) - exact.probs).sum()
    assert abs(found - distance) < 1e-3


@pytest.mark.slow
def test_it_is_the_power_target_where_tokens_are_independent():
    law = np.tile([0.5, 0.0, 0.3, 0.2], (4, 1))
    target = tabular.markov(law, eos=EOS).given(PROMPT, max_tokens=3) ** 3
    out = low_temperature.run(jax.random.key(1), target, num_samples=50)
    exact = enumerate_strings(target)
    np.testing.assert_allclose(
        np.exp(out.log_q), exact.probs[exact.index(out.sequences.tokens)], rtol=1e-5
    )


@pytest.mark.slow
def test_more_samples_keep_the_first_ones():
    target = plain("hmm") ** 2
    few, many = (low_temperature.run(jax.random.key(2), target, num_samples=n) for n in (3, 9))
    np.testing.assert_array_equal(few.sequences.tokens, many.sequences.tokens[:3])


@pytest.mark.bad_input
def test_bad_input():
    p, key = markov().given(PROMPT, max_tokens=4), jax.random.key(0)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha above 0"):
            low_temperature.run(key, dataclasses.replace(p, alpha=jnp.float32(alpha)))
    with pytest.raises(ValueError, match="without a potential"):
        low_temperature.run(key, p**2 * ppl.banned([0]))
    with pytest.raises(ValueError, match="expected num_samples to be a whole number of at least 1"):
        low_temperature.run(key, p, num_samples=0)
