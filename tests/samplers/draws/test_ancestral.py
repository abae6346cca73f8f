"""Ancestral samples: independent draws from the model's own law, EOS absorbing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import ppl
from samplers.draws import ancestral
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE
from tests.samplers.problems import code, dense, plain

NUM = 40_000


def check_frequencies(tokens: Any, law: dict[helpers.String, float]) -> None:
    """Every string's count against its probability; strings of probability 0 never occur."""
    expected = dense(law)
    counts = np.bincount(np.asarray(code(tokens)), minlength=len(expected))
    assert not counts[expected == 0].any()
    rare = (expected > 0) & (expected * len(tokens) < 30)
    assert expected[rare].sum() < 0.1
    # Rare strings are counted together: few of any of them are drawn.
    keep = (expected > 0) & ~rare
    expected = np.append(expected[keep], expected[rare].sum())
    share = np.append(counts[keep], counts[rare].sum()) / len(tokens)
    z = (share - expected) / np.sqrt(np.maximum(expected * (1 - expected), 1e-12) / len(tokens))
    assert np.abs(z).max() < 5, f"z = {z}"


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_the_models(name: str):
    law, _ = helpers.brute_force_law(MODELS[name](), PROMPT, MAX_TOKENS)
    x = ancestral.run(jax.random.key(0), plain(name), num_samples=NUM).sequences
    check_frequencies(x.tokens, law)
    positions = np.arange(MAX_TOKENS)
    assert ((np.asarray(x.tokens) == EOS) == (positions >= np.asarray(x.length)[:, None])).all()


def test_the_check_can_fail():
    law, _ = helpers.brute_force_law(MODELS["hmm"](), PROMPT, MAX_TOKENS, alpha=1.1)
    x = ancestral.run(jax.random.key(0), plain("hmm"), num_samples=NUM).sequences
    with pytest.raises(AssertionError, match="z = "):
        check_frequencies(x.tokens, law)


def test_draws_are_independent():
    """The second draw's law given the first string's first token is the model's own."""
    x = ancestral.run(jax.random.key(1), plain("hmm"), num_samples=NUM).sequences
    first, second = np.asarray(x.tokens[0::2, 0]), np.asarray(x.tokens[1::2, 0])
    joint = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(joint, (first, second), 1 / len(first))
    product = np.outer(joint.sum(1), joint.sum(0))
    assert np.abs((joint - product) / np.sqrt(product * (1 - product) / len(first))).max() < 5


def test_more_samples_and_a_longer_horizon_keep_the_old_draws():
    key, lm = jax.random.key(2), MODELS["hmm"]()
    few = ancestral.run(key, lm.given(PROMPT, max_tokens=4), num_samples=5).sequences
    more = ancestral.run(key, lm.given(PROMPT, max_tokens=9), num_samples=50).sequences
    np.testing.assert_array_equal(few.tokens, more.tokens[:5, :4])
    np.testing.assert_array_equal(few.length, np.minimum(more.length[:5], 4))


def test_what_is_known_of_the_draws():
    p = plain("hmm")
    out = ancestral.run(jax.random.key(6), p, num_samples=20)
    log_p = p.log_density(out.sequences.tokens, out.sequences.length)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-5)
    np.testing.assert_array_equal(out.log_q, out.log_prob)
    x, horizon = out.sequences, p.max_tokens
    tokens, passes = int((x.length + x.ended).sum()), int(min(x.length.max() + 1, horizon))
    found = (int(out.cost.tokens), int(out.cost.forwards), int(out.cost.depth))
    assert found == (tokens, passes, passes) and int(out.cost.potential_calls) == 0
    # A token at position t reads the prompt and the t tokens before it; the first of all strings
    # takes one pass over the prompt.
    later = np.asarray(x.length + x.ended) - 1
    reads = (later * len(PROMPT) + later * (later + 1) // 2).sum()
    assert float(out.cost.kv_read) == len(PROMPT) + reads


@pytest.mark.slow
def test_a_horizon_of_one():
    x = ancestral.run(
        jax.random.key(3), MODELS["markov"]().given(PROMPT, max_tokens=1), num_samples=2000
    ).sequences
    law, _ = helpers.brute_force_law(MODELS["markov"](), PROMPT, 1)
    for token in (0, 3):
        share = float((x.tokens[:, 0] == token).mean())
        assert abs(share - law[(token,)]) < 5 * np.sqrt(law[(token,)] / 2000)
    assert (x.length == (x.tokens[:, 0] != EOS)).all()


@pytest.mark.parametrize("tilt", [lambda p: p**2, lambda p: p * ppl.banned([0])])
def test_a_tilted_target_has_no_exact_draw(tilt: Any):
    with pytest.raises(
        ValueError,
        match="expected a plain language model, got a target with a power or a potential",
    ):
        ancestral.run(jax.random.key(4), tilt(plain("hmm")))


@pytest.mark.bad_input
@pytest.mark.parametrize("num", [0, -1, 2.5, True])
def test_num_samples_must_be_a_count(num: Any):
    with pytest.raises(
        ValueError, match=f"num_samples to be a whole number of at least 1, got {num}; pass e.g."
    ):
        ancestral.run(jax.random.key(5), plain("hmm"), num_samples=num)
