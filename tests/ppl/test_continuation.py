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
from ppl.continuation import Continuation
from ppl.space import Space
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
def truth(x: String, y: tuple[int, ...] = Y, after_eos: bool = True) -> float:
    """log p(y | prompt, x, EOS if there is one), one full pass per prefix of y."""
    before = (*PROMPT, *x, *((EOS,) if after_eos and len(x) < MAX_TOKENS else ()))
    rows = [(*before, *y[:i]) for i in range(len(y))]
    tokens, length = helpers.as_arrays(rows, 12, EOS)
    log_probs = np.asarray(
        jax.nn.log_softmax(helpers._full_passes(lm(), tokens, length)), np.float64
    )
    return float(log_probs[np.arange(len(y)), list(y)].sum())


def target() -> ppl.Target:
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    return p * ppl.continuation(p, Y)


def test_every_string_is_continued_as_by_full_passes():
    expected = [truth(x) for x in STRINGS]
    np.testing.assert_allclose(target().log_potential(ALL.tokens, ALL.length), expected, rtol=2e-5)


def test_the_end_of_a_string_may_be_no_part_of_the_text():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    found = (p * ppl.continuation(p, Y, after_eos=False)).log_potential(ALL.tokens, ALL.length)
    np.testing.assert_allclose(found, [truth(x, after_eos=False) for x in STRINGS], rtol=2e-5)


def test_it_is_a_potential():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    potential = ppl.continuation(p, Y)
    check_potential(
        potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0)
    )


def test_a_wrong_pass_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """The EOS between string and continuation left out."""
    monkeypatch.setattr(
        ppl.Sequences, "ended", property(lambda self: jnp.zeros_like(self.length, bool))
    )
    jax.clear_caches()
    found = target().log_potential(ALL.tokens, ALL.length)
    jax.clear_caches()
    wrong = np.abs(np.asarray(found) - [truth(x) for x in STRINGS]) > 1e-3
    assert wrong[np.asarray(ALL.length) < MAX_TOKENS].mean() > 0.9


FEW = [
    pytest.param(*some, marks=pytest.mark.slow)
    for some in ((3, 0.5, 1), (9, 0.9, 2), (100, 0.0, 0))
]


@pytest.mark.parametrize(("num", "share", "blocks"), [(100, 0.3, 2), *FEW])
def test_the_rows_needed_are_those_evaluated(
    num: int, share: float, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    """In blocks: some, one of too few rows, two that overlap, none."""
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    scorer = ppl.continuation(p, Y).scorer.within(Space(VOCAB_SIZE, EOS, MAX_TOKENS))
    needed = jnp.arange(num) < share * num
    needed = jax.random.permutation(jax.random.key(7), needed)
    evaluated = []

    def counted(self: Any, x: ppl.Sequences) -> Any:
        jax.debug.callback(evaluated.append, x.length.shape[0])
        return whole(self, x)

    whole = Continuation._log_prob
    monkeypatch.setattr(Continuation, "_log_prob", counted)
    found = np.asarray(scorer.score(ALL.tokens[:num], ALL.length[:num], needed))
    jax.effects_barrier()
    assert len(evaluated) == blocks
    np.testing.assert_allclose(
        found[needed], np.asarray([truth(x) for x in STRINGS[:num]])[needed], rtol=2e-5
    )
    both = jax.vmap(scorer.score)(
        *(jnp.stack([a[:num], a[:num][::-1]]) for a in (ALL.tokens, ALL.length, needed))
    )
    np.testing.assert_allclose(both[0][needed], found[needed], rtol=2e-5)
    np.testing.assert_allclose(both[1][::-1][needed], found[needed], rtol=2e-5)


@pytest.mark.slow
def test_it_is_differentiable_in_the_model_in_one_pass_or_in_steps():
    def log_density(model: ppl.LM, steps: ppl.Steps | None) -> Any:
        p = model.given(PROMPT, max_tokens=MAX_TOKENS)
        return (
            (p * ppl.continuation(p, Y, steps=steps))
            .log_density(ALL.tokens[::7], ALL.length[::7])
            .sum()
        )

    once, early = (
        jax.grad(log_density, allow_int=True)(lm(), steps) for steps in (None, ppl.Steps(every=2))
    )
    floats = [
        (a, b)
        for a, b in zip(*map(jax.tree.leaves, (once, early)), strict=True)
        if a.dtype == jnp.float32
    ]
    assert any(np.abs(a).max() > 0.1 for a, _ in floats)
    for a, b in floats:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_boundary_that_cannot_be_an_end_forbids_the_string():
    """An HMM in which y cannot follow EOS after an even number of tokens: such a step is -inf, and
    stays so.
    """
    transition = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    emission = jnp.array([[0.3, 0.2, 0.3, 0.2], [0.4, 0.3, 0.3, 0.0]])
    p = tabular.hmm(jnp.array([1.0, 0.0]), transition, emission, eos=EOS).given(
        PROMPT, max_tokens=MAX_TOKENS
    )
    early = p * ppl.continuation(p, [3], steps=ppl.Steps(every=2))
    found, whole = (
        t.log_density(ALL.tokens, ALL.length) for t in (early, p * ppl.continuation(p, [3]))
    )
    lost = np.isneginf(found) & ~np.isneginf(whole)
    assert lost.any() and (np.asarray(ALL.length)[lost] > 2).all()
    np.testing.assert_allclose(found[~lost], whole[~lost], rtol=2e-5)


@pytest.mark.slow
def test_in_steps_it_is_the_same_density_paid_earlier():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    early = ppl.continuation(p, Y, steps=ppl.Steps(every=2))
    check_potential(
        early, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0)
    )
    expected = target().log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose((p * early).log_density(ALL.tokens, ALL.length), expected, rtol=2e-5)
    bound = early.within(Space(VOCAB_SIZE, EOS, MAX_TOKENS))
    state, first = bound.step(bound.init(1), jnp.array([2]))
    _, second = bound.step(state, jnp.array([3]))
    np.testing.assert_allclose([first[0], second[0]], [0.0, truth((2, 3))], rtol=2e-5)


def test_padding_is_no_part_of_it():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    padded = p * ppl.continuation(p, [*Y, 2, 2], len(Y))
    found = padded.log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose(found, target().log_density(ALL.tokens, ALL.length), rtol=2e-5)
    for length in (4, 0):
        with pytest.raises(
            ValueError, match="one number from 1 to 3, the number of tokens given, got"
        ):
            ppl.continuation(p, Y, length)


def test_other_factors_go_token_by_token():
    """A product of a quick factor and one that is not; a power of the quick one."""
    both = target() * ppl.banned([2])
    expected = [truth(x) if 2 not in x else -np.inf for x in STRINGS]
    np.testing.assert_allclose(both.log_potential(ALL.tokens, ALL.length), expected, rtol=2e-5)
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    half = p * ppl.continuation(p, Y) ** 0.5
    np.testing.assert_allclose(
        half.log_potential(ALL.tokens, ALL.length), [0.5 * truth(x) for x in STRINGS], rtol=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, ppl.Steps(every=2)])
def test_smc_has_the_joint_law(steps: ppl.Steps | None):
    """LAW 1: the evidence is p(y | prompt) summed over the strings between."""
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    of = p * ppl.continuation(p, Y, steps=steps)
    keys = jax.random.split(jax.random.key(3), 20_000)
    found = masses(lambda key: smc.run(key, of, num_particles=4, threshold=0.6, steps=steps), keys)
    strings, _ = helpers.brute_force_law(lm(), PROMPT, MAX_TOKENS)
    check_law(found, {x: prob * np.exp(truth(x)) for x, prob in strings.items()}, resolution=0.02)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ((), "at least one token"),
        ((7,), r"token ids in \[0, 4\)"),
        ("d", "expected the tokenizer of a continuation that is a text, got 'd' alone; pass"),
    ],
)
def test_bad_continuations(y: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ppl.continuation(lm().given(PROMPT, max_tokens=MAX_TOKENS), y)


def test_another_horizon():
    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    with pytest.raises(ValueError, match="expected a continuation over the target's strings"):
        lm().given(PROMPT, max_tokens=3) * ppl.continuation(p, Y)


def test_a_text_is_its_tokens():
    """Without what begins a text."""

    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [9] * add_special_tokens + ["abcd".index(letter) for letter in text]

    p = lm().given(PROMPT, max_tokens=MAX_TOKENS)
    text = ppl.continuation(p, "dba", tokenizer=Letters())
    np.testing.assert_array_equal(
        (p * text).log_density(ALL.tokens, ALL.length), target().log_density(ALL.tokens, ALL.length)
    )
