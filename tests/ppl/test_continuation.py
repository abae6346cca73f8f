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
    """Its steps telescope to the one pass too: `check_potential` compares them."""
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    potential = ppl.continuation(p, Y)
    check_potential(potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0))


def test_a_wrong_pass_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """The EOS between string and continuation left out of the one pass."""
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    potential = ppl.continuation(p, Y)
    monkeypatch.setattr(ppl.Sequences, "ended", property(lambda self: jnp.zeros_like(self.length, bool)))
    with pytest.raises(AssertionError, match="log_phi"):
        check_potential(potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0))


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
