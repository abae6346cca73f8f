"""p(y | prompt, x) against full passes of the model over the joined string."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.testing import check_potential
from samplers import smc
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, PROMPT, VOCAB_SIZE, String
from tests.samplers.problems import check_law, masses

Y = (3, EOS, 0)
ALL = ppl.exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = helpers.as_strings(ALL.tokens, ALL.length)


@functools.cache
def lm() -> ppl.LM:
    """Remembers everything, and goes on after EOS as after any token."""
    transition = jnp.array([[0.9, 0.07, 0.03], [0.02, 0.95, 0.03], [0.04, 0.02, 0.94]])
    emission = jnp.array([[0.55, 0.1, 0.25, 0.1], [0.2, 0.05, 0.55, 0.2], [0.25, 0.1, 0.15, 0.5]])
    return tabular.hmm(jnp.array([0.5, 0.2, 0.3]), transition, emission, eos=EOS)


@functools.cache
def truth(x: String, y: tuple[int, ...] = Y) -> float:
    """log p(y | prompt, x, EOS if there is one), one full pass per prefix of y."""
    before = (*PROMPT, *x, *((EOS,) if len(x) < MAX_TOKENS else ()))
    rows = [(*before, *y[:i]) for i in range(len(y))]
    tokens, length = helpers.as_arrays(rows, 12, EOS)
    log_probs = np.asarray(jax.nn.log_softmax(helpers._full_passes(lm(), tokens, length)), np.float64)
    return float(log_probs[np.arange(len(y)), list(y)].sum())


def target() -> ppl.Target:
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    return p * ppl.continuation(p, Y)


def test_every_string_is_continued_as_by_full_passes():
    expected = [truth(x) for x in STRINGS]
    np.testing.assert_allclose(target().log_potential(ALL.tokens, ALL.length), expected, rtol=2e-5)


def test_it_is_a_potential():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    potential = ppl.continuation(p, Y)
    check_potential(potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0))


def test_a_wrong_pass_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """The EOS between string and continuation left out."""
    monkeypatch.setattr(ppl.Sequences, "ended", property(lambda self: jnp.zeros_like(self.length, bool)))
    jax.clear_caches()
    found = target().log_potential(ALL.tokens, ALL.length)
    jax.clear_caches()
    wrong = np.abs(np.asarray(found) - [truth(x) for x in STRINGS]) > 1e-3
    assert wrong[np.asarray(ALL.length) < MAX_TOKENS].mean() > 0.9


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_the_rows_needed_are_those_evaluated(share: float):
    """In blocks: none, less than one, several of which the last is not full, all."""
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    scorer = ppl.continuation(p, Y).within(MAX_TOKENS, VOCAB_SIZE, EOS).scorer
    needed = jax.random.bernoulli(jax.random.key(7), share, ALL.length.shape)
    found = np.asarray(scorer.score(ALL.tokens, ALL.length, needed))
    np.testing.assert_allclose(found[needed], np.asarray([truth(x) for x in STRINGS])[needed], rtol=2e-5)


def test_in_steps_it_is_the_same_density_paid_earlier():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    early = ppl.continuation(p, Y, steps=ppl.Steps(every=2))
    check_potential(early, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0))
    expected = target().log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose((p * early).log_density(ALL.tokens, ALL.length), expected, rtol=2e-5)
    bound = early.within(MAX_TOKENS, VOCAB_SIZE, EOS)
    state, first = bound.step(bound.init(1), jnp.array([2]))
    _, second = bound.step(state, jnp.array([3]))
    np.testing.assert_allclose([first[0], second[0]], [0.0, truth((2, 3))], rtol=2e-5)


def test_padding_is_no_part_of_it():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    padded = p * ppl.continuation(p, [*Y, 2, 2], len(Y))
    found = padded.log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose(found, target().log_density(ALL.tokens, ALL.length), rtol=2e-5)
    with pytest.raises(ValueError, match="from 1 to the 3 tokens given, got 4"):
        ppl.continuation(p, Y, 4)


def test_other_factors_go_token_by_token():
    """A product of a quick factor and one that is not; a power of the quick one."""
    both = target() * ppl.banned([2])
    expected = [truth(x) if 2 not in x else -np.inf for x in STRINGS]
    np.testing.assert_allclose(both.log_potential(ALL.tokens, ALL.length), expected, rtol=2e-5)
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    half = p * ppl.continuation(p, Y) ** 0.5
    np.testing.assert_allclose(half.log_potential(ALL.tokens, ALL.length), [0.5 * truth(x) for x in STRINGS], rtol=2e-5)


@pytest.mark.slow
def test_smc_has_the_joint_law():
    """LAW 1: the evidence is p(y | prompt) summed over the strings between."""
    of = target()
    keys = jax.random.split(jax.random.key(3), 20_000)
    found = masses(lambda key: smc.run(key, of, num_particles=4, threshold=0.6), keys)
    strings, _ = helpers.brute_force_law(lm(), PROMPT, MAX_TOKENS)
    check_law(found, {x: prob * np.exp(truth(x)) for x, prob in strings.items()}, resolution=0.02)


@pytest.mark.parametrize(
    ("y", "message"),
    [((), "at least one token"), ((7,), r"token ids in \[0, 4\)")],
)
def test_bad_continuations(y: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ppl.continuation(lm().given(PROMPT, max_tokens=MAX_TOKENS), y)


def test_another_horizon():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    with pytest.raises(ValueError, match="expected a continuation of the target's strings"):
        lm().given(PROMPT, max_tokens=3) * ppl.continuation(p, Y)
