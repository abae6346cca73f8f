"""Language models as judges against one full pass per string, where and how often they run, and bad
input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl import exact
from ppl.judge import Judge
from ppl.lm import LM
from ppl.pytrees import register_dataclass
from ppl.space import Space
from ppl.testing import check_potential
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE, String, as_strings
from tests.samplers.problems import check_law, gamma, plain, smc_masses

BEFORE, AFTER, YES, NO = (3, 2), (0, 3, 2), 3, 0
ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = as_strings(ALL.tokens, ALL.length)


def hidden() -> LM:
    """Another model than any target's, with a long memory and all verdicts finite."""
    transition = jnp.array([[0.9, 0.07, 0.03], [0.02, 0.95, 0.03], [0.04, 0.02, 0.94]])
    emission = jnp.array([[0.55, 0.1, 0.25, 0.1], [0.2, 0.05, 0.55, 0.2], [0.25, 0.1, 0.15, 0.5]])
    return tabular.hmm(jnp.array([0.5, 0.2, 0.3]), transition, emission, eos=EOS)


def deep_table() -> LM:
    """Deep enough for before, text and after."""
    return tabular.random_table(
        jax.random.key(31), VOCAB_SIZE, len(BEFORE) + MAX_TOKENS + len(AFTER), eos=EOS
    )


def verdicts(lm: LM, strings: list[String] = STRINGS) -> dict[String, float]:
    """log p(yes | before x after) - log p(no | before x after), by one full pass per string."""
    rows = [(*BEFORE, *x, *AFTER) for x in strings]
    tokens, length = helpers.as_arrays(rows, len(BEFORE) + MAX_TOKENS + len(AFTER), EOS)
    logits = np.asarray(helpers._full_passes(lm, tokens, length), np.float64)
    return dict(zip(strings, (logits[:, YES] - logits[:, NO]).tolist(), strict=True))


def judge(lm: LM) -> Judge:
    return ppl.judge(lm, BEFORE, AFTER, yes=YES, no=NO)


def log_phi(potential: ppl.Potential) -> np.ndarray:
    return np.asarray((plain("markov") * potential).log_potential(ALL.tokens, ALL.length))


@pytest.mark.parametrize("lm", [hidden, deep_table])
def test_a_verdict_is_that_of_a_full_pass(lm: Any):
    """Asked once, at the end; where yes or no is impossible, there is nothing to compare."""
    truth = verdicts(lm())
    end = [truth[x] for x in STRINGS]
    finite = np.isfinite(end)
    assert finite.sum() > 60 and np.std(np.array(end)[finite]) > 0.15
    np.testing.assert_allclose(
        log_phi(ppl.reward(judge(lm())))[finite], np.array(end)[finite], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("every", [1, 2])
def test_a_judge_of_steps(every: int):
    """It reads on after a question as if it had not been asked."""
    truth = verdicts(hidden())
    steps = ppl.Steps(every=every)
    np.testing.assert_allclose(
        log_phi(ppl.step_scores(judge(hidden()), steps)),
        [truth[x] for x in STRINGS],
        rtol=1e-4,
        atol=1e-4,
    )
    positions = [{*range(every, len(x) + 1, every), len(x)} for x in STRINGS]
    product = [
        sum(truth[x[:n]] for n in where) for x, where in zip(STRINGS, positions, strict=True)
    ]
    np.testing.assert_allclose(
        log_phi(ppl.step_factors(judge(hidden()), steps)), product, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_the_public_kit_finds_no_fault():
    potential = ppl.step_scores(judge(hidden()), ppl.Steps(delimiters=[3]))
    check_potential(potential, vocab_size=4, eos=EOS, max_tokens=4, key=jax.random.key(0))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadsEos(Judge):
    """Keeps the EOS that it was shown."""

    def push(self, state: Any, token: Any, used: Any) -> Any:
        return self.lm.step(self.prefix, state, token)[0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NotAsked(Judge):
    """Forgets the last token of the question."""

    def score(self, state: Any, used: Any, needed: Any) -> Any:
        return dataclasses.replace(self, after=self.after[:-1]).score_(state, used, needed)

    score_ = Judge.score


def as_fault(kind: type, plain_judge: Judge) -> Judge:
    return kind(
        **{
            field.name: getattr(plain_judge, field.name)
            for field in dataclasses.fields(plain_judge)
        }
    )


def score_after_eos(scorer: Judge) -> Any:
    bound = scorer.within(Space(VOCAB_SIZE, EOS, MAX_TOKENS))
    state, used = bound.init(2), jnp.zeros(2, jnp.int32)
    for row in ((2, 3), (0, EOS), (3, EOS)):
        token = jnp.array(row)
        state, used = bound.push(state, token, used), used + (token != EOS)
    return bound.score(state, used, jnp.ones(2, bool))


@pytest.mark.slow
def test_eos_changes_nothing():
    """Rows of different lengths, one of which has been shown EOS twice."""
    truth = verdicts(hidden(), [(2, 0, 3), (3,)])
    np.testing.assert_allclose(score_after_eos(judge(hidden())), list(truth.values()), rtol=1e-4)
    fault = np.asarray(score_after_eos(as_fault(ReadsEos, judge(hidden()))))
    assert np.isclose(fault[0], truth[(2, 0, 3)], rtol=1e-4) and not np.isclose(
        fault[1], truth[(3,)], rtol=1e-2
    )


def test_a_question_cut_short_is_seen():
    truth = verdicts(hidden())
    found = log_phi(ppl.reward(as_fault(NotAsked, judge(hidden()))))
    assert np.abs(found - [truth[x] for x in STRINGS]).max() > 0.1


@pytest.mark.slow
def test_the_question_is_asked_only_where_a_step_ends():
    """Each token is read once; the question costs its length at boundaries and ends, and nothing
    elsewhere.
    """
    calls: list[int] = []
    base = hidden()

    def counted(static: Any, params: Any, prefix: Any, cache: Any, token: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return base.functions.step(static, params, prefix, cache, token)

    lm = dataclasses.replace(base, functions=base.functions._replace(step=counted))
    x = helpers.as_arrays([(3, 0, 3, 3), (2, 0, 0, 3)], MAX_TOKENS, EOS)
    for potential, questions in (
        (ppl.reward(judge(lm)), 1),
        (ppl.step_scores(judge(lm), ppl.Steps(every=3)), 2),
        (ppl.step_scores(judge(lm), ppl.Steps(delimiters=[2])), 2),
    ):
        calls.clear()
        jax.block_until_ready((plain("markov") * potential).log_potential(*x))
        jax.effects_barrier()
        assert len(calls) == MAX_TOKENS + questions * len(AFTER)


@pytest.mark.slow
def test_smc_with_a_judge():
    """LAW 1 for p(x) odds(x), with resampling between the judge's steps."""
    odds = verdicts(hidden())
    truth = {x: p * math.exp(odds[x]) for x, p in gamma("hmm", "plain").items()}
    target = plain("hmm") * ppl.step_scores(judge(hidden()), ppl.Steps(every=2))
    for found in smc_masses(jax.random.key(2), target, 1000).values():
        check_law(found, truth, resolution=0.05)


BAD = {
    "nothing after": (
        lambda: ppl.judge(hidden(), BEFORE, [], yes=3, no=0),
        "expected the number of tokens after",
    ),
    "nothing before": (
        lambda: ppl.judge(hidden(), [], AFTER, yes=3, no=0),
        "expected a prompt of at least one token",
    ),
    "id after": (
        lambda: ppl.judge(hidden(), BEFORE, [4], yes=3, no=0),
        r"expected token ids in \[0, 4\), got 4",
    ),
    "one answer": (
        lambda: ppl.judge(hidden(), BEFORE, AFTER, yes=3, no=3),
        "expected two different token ids .* 3 and 3",
    ),
    "answer": (
        lambda: ppl.judge(hidden(), BEFORE, AFTER, yes=3, no=-1),
        r"expected two different .* \[0, 4\) .* -1",
    ),
    "vocabulary": (
        lambda: (
            plain("hmm")
            * ppl.reward(
                ppl.judge(tabular.random_hmm(jax.random.key(0), 2, 5, eos=1), [2], [2], yes=3, no=0)
            )
        ),
        "expected a judge with the target's vocabulary of 4 tokens, got one of 5",
    ),
    "context": (
        lambda: plain("hmm") * ppl.reward(judge(dataclasses.replace(hidden(), context=8))),
        r"within the judge's context of 8 tokens, got 2 \+ 4 \+ 3",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_judges_are_refused(name: str):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_judge_that_just_fits():
    target = plain("hmm") * ppl.reward(judge(dataclasses.replace(hidden(), context=9)))
    assert np.isfinite(target.log_potential(ALL.tokens[:3], ALL.length[:3])).all()


def test_what_it_reads_is_counted_where_it_is_asked():
    """Every token once, and what follows the text at the boundaries and the end."""
    space = Space(vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS)
    phi = ppl.step_scores(judge(hidden()), ppl.Steps(every=2)).within(space)
    state, token = phi.init(3), jnp.array([0, 2, EOS], jnp.int32)
    ends, nowhere = token == EOS, jnp.zeros(3, bool)
    asked = len(AFTER)
    np.testing.assert_array_equal(phi.judged(state, token, ends), [1, 1, asked])
    state, _ = phi.step(state, token)
    second = phi.judged(state, jnp.zeros(3, jnp.int32), nowhere)
    np.testing.assert_array_equal(second[:2], [1 + asked] * 2)
