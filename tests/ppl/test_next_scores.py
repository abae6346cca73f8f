"""Scores of every next token: the density, and the same evidence from a V-th of the evaluations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact
from ppl.potential import Trusted
from ppl.pytrees import register_dataclass
from ppl.testing import check_potential
from samplers import smc
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE, String, TraceCounter, as_strings
from tests.samplers.problems import check_law, masses, plain, score_arrays
from tests.samplers.process_rewards import plain_law

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = as_strings(ALL.tokens, ALL.length)
ENDED = 0.7
"""What EOS adds to a score."""


def longer(tokens: Any, length: Any, token: int) -> Any:
    """The score of strings so far and a token, or EOS."""
    if token == EOS:
        return score_arrays(tokens, length) + ENDED
    here = jnp.arange(tokens.shape[1]) == length[:, None]
    return score_arrays(jnp.where(here, token, tokens), length + 1)


def head(tokens: Any, length: Any) -> Any:
    return jnp.stack([longer(tokens, length, token) for token in range(VOCAB_SIZE)], axis=1)


def log_phi(x: String) -> float:
    tokens = jnp.asarray([[*x, *[EOS] * (MAX_TOKENS - len(x))]])
    value = float(score_arrays(tokens, jnp.asarray([len(x)]))[0])
    return value + ENDED * (len(x) < MAX_TOKENS)


def test_the_density_is_the_last_score():
    target = plain("hmm") * ppl.next_scores(head)
    found = target.log_potential(ALL.tokens, ALL.length)
    np.testing.assert_allclose(found, [log_phi(x) for x in STRINGS], atol=1e-5)


@pytest.mark.slow
def test_it_is_a_potential():
    def strict(tokens: Any, length: Any) -> Any:
        forbidden = (length == 2) & (tokens[:, 1] == 0)
        return jnp.where(forbidden[:, None] & (jnp.arange(VOCAB_SIZE) == 2), -jnp.inf, 0.0) + head(
            tokens, length
        )

    check_potential(
        ppl.next_scores(strict),
        vocab_size=VOCAB_SIZE,
        eos=EOS,
        max_tokens=MAX_TOKENS,
        key=jax.random.key(0),
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ByTheToken(Trusted):
    """The same Phi from a score of strings, which is asked for every next token."""

    score: Any = dataclasses.field(metadata={"static": True})

    def init(self, num: int) -> Any:
        start = jnp.full((num, MAX_TOKENS), EOS, jnp.int32), jnp.zeros(num, jnp.int32)
        return *start, jnp.zeros(num, jnp.float32)

    def step(self, state: Any, token: Any) -> Any:
        tokens, used, paid = state
        here = jnp.arange(MAX_TOKENS) == used[:, None]
        tokens, used = jnp.where(here, token[:, None], tokens), used + (token != EOS)
        reached = score_arrays(tokens, used)
        return (tokens, used, reached), reached - paid

    def final(self, state: Any) -> Any:
        tokens, used, paid = state
        ended = score_arrays(tokens, used) + ENDED - paid
        return jnp.where(used < MAX_TOKENS, ended, 0.0)

    def lookahead(self, state: Any) -> Any:
        tokens, used, paid = state
        ahead = [self.score(tokens, used, token) - paid for token in range(VOCAB_SIZE)]
        return jnp.stack(ahead, axis=1).at[:, EOS].set(self.final(state))


def test_the_same_evidence_from_one_evaluation_in_the_place_of_v():
    """T12: the draws and log Z are the same; a score of strings is asked V times for each token."""
    key, p = jax.random.key(3), plain("table")
    one, many = TraceCounter(head), TraceCounter(longer)
    found = smc.run(key, p * ppl.next_scores(one), num_particles=8)
    expected = smc.run(key, p * ByTheToken(many), num_particles=8)
    np.testing.assert_allclose(found.log_z, expected.log_z, atol=1e-4)
    np.testing.assert_array_equal(found.sequences.tokens, expected.sequences.tokens)
    assert int(found.cost.potential_calls) == int(found.cost.tokens)
    # What is evaluated for a token, outside of jit.
    potential, slow = (p * ppl.next_scores(one)).potential, ByTheToken(many)
    one.count = many.count = 0
    for part in (potential, slow):
        state = part.init(2)
        for _ in range(3):
            part.lookahead(state)
            state, _ = part.step(state, jnp.array([0, 3]))
    assert many.count == 3 * VOCAB_SIZE and one.count == 1 + 3


@pytest.mark.slow
def test_twisted_smc_obeys_law_1():
    p = plain("markov")
    target = p * ppl.next_scores(head)

    def run(key: Any) -> Any:
        return smc.run(key, target, num_particles=4)

    truth = {x: q * math.exp(log_phi(x)) for x, q in plain_law("markov").items()}
    found = masses(run, jax.random.split(jax.random.key(1), 10_000))
    check_law(found, truth, resolution=0.02)
    # Planted fault: without what EOS adds.
    wrong = {x: q / math.exp(ENDED * (len(x) < MAX_TOKENS)) for x, q in truth.items()}
    with pytest.raises(AssertionError, match="z = "):
        check_law(found, wrong, resolution=0.02)


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match=r"expected log-scores \[N, V\] = \(1, 4\) of every next"):
        (plain("hmm") * ppl.next_scores(score_arrays)).log_potential(ALL.tokens[:1], ALL.length[:1])
    with pytest.raises(ValueError, match="expected a jax function"):
        ppl.next_scores("head")
