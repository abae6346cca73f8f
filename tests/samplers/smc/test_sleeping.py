"""Answers after shared thoughts: LAW 1 over thoughts and answers, and who pays what."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tabular
from samplers.smc import sleeping
from tests import helpers
from tests.helpers import EOS, as_strings, brute_force_law

CONTEXT, QUESTIONS = (2,), [(0, 3), (3,)]
THINK, ANSWER, NUM, EACH = 2, 2, 4000, 2


@functools.cache
def truth(i: int) -> dict[helpers.String, float]:
    """sum_c' p(c' | c) p(a | c, c', q) of every answer."""
    lm, law = helpers.hmm(), {}
    for thought, share in brute_force_law(lm, CONTEXT, THINK)[0].items():
        prompt = (*CONTEXT, *thought, *QUESTIONS[i])
        for answer, q in brute_force_law(lm, prompt, ANSWER)[0].items():
            law[answer] = law.get(answer, 0.0) + share * q
    return law


@functools.cache
def outs() -> Any:
    p = helpers.hmm().given(CONTEXT, max_tokens=THINK)
    laws = jnp.tile(jnp.array([0.15, 0.15, 0.15, 0.55]), (4, 1))
    guide = tabular.markov(laws, eos=EOS).given((3,), max_tokens=THINK)
    how = {"guide": guide, "num_thoughts": NUM, "num_samples": EACH, "max_tokens": ANSWER}
    return sleeping.run(jax.random.key(6), p, QUESTIONS, **how)


@pytest.mark.parametrize("i", range(len(QUESTIONS)))
def test_law_1(i: int):
    out, law = outs()[i], truth(i)
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    weights = np.exp(np.asarray(out.log_weights + out.log_z, np.float64))
    answers = as_strings(out.sequences.tokens, out.sequences.length)
    assert set(answers) <= set(law)
    # Thoughts are independent, answers after one are not.
    by_thought = weights.reshape(NUM, EACH).mean(1)
    helpers.assert_z(by_thought, 1.0, resolution=0.03)
    for answer, share in law.items():
        found = weights * np.array([a == answer for a in answers])
        if share > 0.02:
            helpers.assert_z(found.reshape(NUM, EACH).mean(1), share, resolution=0.03)
    error = float(by_thought.std() / NUM**0.5)
    np.testing.assert_allclose(out.log_z_std_error, error, rtol=0.1)
    # Without the weights it is another law, where the thought matters for the answer.
    plain = {a: answers.count(a) / len(answers) for a in law}
    assert i == 0 or helpers.total_variation(plain, law) > 0.02


def test_log_prob_is_of_the_answer_after_its_thought():
    out = outs()[0]
    thoughts = out.details["thoughts"].sequences
    thought = as_strings(thoughts.tokens[:3], thoughts.length[:3])
    answers = as_strings(out.sequences.tokens[:6], out.sequences.length[:6])
    for k, answer in enumerate(answers):
        prompt = (*CONTEXT, *thought[k // EACH], *QUESTIONS[0])
        law = brute_force_law(helpers.hmm(), prompt, ANSWER)[0]
        assert float(out.log_prob[k]) == pytest.approx(np.log(law[answer]), abs=1e-4)


def test_what_it_costs():
    first, second = outs()
    ended = lambda x: np.asarray(x.length + (x.length < x.tokens.shape[1])).sum()  # noqa: E731
    shared = first.details["sleeping"]
    assert int(shared.tokens) == ended(first.details["thoughts"].sequences)
    for out in (first, second):
        assert int(out.cost.tokens) == ended(out.sequences)
    thoughts = first.details["thoughts"].sequences
    # Context and thought are read once, whatever the number of questions and answers.
    read = np.asarray(len(CONTEXT) + thoughts.length).sum()
    drawing = first.details["thoughts"].cost.kv_read
    np.testing.assert_allclose(shared.kv_read, drawing + read, rtol=1e-6)


def test_when_sleep_pays():
    assert sleeping.per_question(1000, 200, 10) == 300
    assert sleeping.break_even(1000, 300) == 4 and sleeping.break_even(5, 0) == np.inf
    least = sleeping.break_even(1000, 300)
    costs = [sleeping.per_question(1000, 200, m) < 500 for m in (least - 1, least)]
    assert costs == [False, True]


@pytest.mark.bad_input
def test_bad_input():
    key, p = jax.random.key(0), helpers.hmm().given(CONTEXT, max_tokens=THINK)
    with pytest.raises(ValueError, match="question token"):
        sleeping.run(key, p, [(0, EOS)])
    with pytest.raises(ValueError, match="number of tokens of a question"):
        sleeping.run(key, p, [()])
    with pytest.raises(ValueError, match="a guide"):
        sleeping.run(key, p, [(0,)], guide=helpers.hmm().given(CONTEXT, max_tokens=3))
    with pytest.raises(ValueError, match="expected a plain language model"):
        sleeping.run(key, p**2, [(0,)])
    assert jnp.isfinite(outs()[0].log_z)
