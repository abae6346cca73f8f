"""Process rewards: steps, log-odds, the telescoping and the product form; what is not a number or a
probability.
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
from ppl import exact
from ppl.pytrees import register_dataclass
from ppl.rewards import Factors
from ppl.sequences import Sequences
from ppl.space import Space
from ppl.testing import check_potential
from samplers import smc
from samplers.strings import proposals
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE, Letters, String, as_arrays, as_strings
from tests.samplers.problems import check_law, gamma, plain, score, score_arrays, smc_masses

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = as_strings(ALL.tokens, ALL.length)
TEXTS = ["ab", "aaa"]
STEPS = {
    "every 1": (lambda: ppl.Steps(every=1), lambda x: True),
    "every 2": (lambda: ppl.Steps(every=2), lambda x: len(x) % 2 == 0),
    "every 5": (lambda: ppl.Steps(every=5), lambda x: False),
    "delimiters": (lambda: ppl.Steps(delimiters=[3, 0]), lambda x: x[-1] in (3, 0)),
    "texts": (
        lambda: ppl.Steps.by_text(TEXTS, Letters()),
        lambda x: Letters().completes(x, TEXTS),
    ),
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def log_phi(potential: ppl.Potential) -> np.ndarray:
    return np.asarray((plain("hmm") * potential).log_potential(ALL.tokens, ALL.length))


def boundaries(x: String, name: str) -> list[String]:
    """The prefixes of x that end a step."""
    return [x[:n] for n in range(1, len(x) + 1) if STEPS[name][1](x[:n])]


# Steps.


@pytest.mark.parametrize("name", STEPS)
def test_steps_end_where_they_should(name: str):
    steps = STEPS[name][0]().within(Space(VOCAB_SIZE, EOS, MAX_TOKENS))
    rows = [x for x in STRINGS if x]
    before, x = (
        Sequences(*as_arrays([row[:n] for row in rows], MAX_TOKENS, EOS)) for n in (-1, None)
    )
    last = jnp.array([row[-1] for row in rows])

    @jax.jit
    def found(steps: ppl.Steps) -> Any:
        state, ends = steps.step(steps.read(before), last, x.length)
        return state, steps.read(x), ends

    state, again, ends = found(steps)
    np.testing.assert_array_equal(ends, [STEPS[name][1](x) and len(x) < MAX_TOKENS for x in rows])
    assert not steps.step(steps.init(5), jnp.full(5, EOS), jnp.arange(5))[1].any()
    if name == "texts":  # states that differ in the number alone are one
        np.testing.assert_array_equal(steps.table[state], steps.table[again])


@pytest.mark.parametrize("seed", range(3))
def test_texts_end_steps_however_they_are_cut(seed: int):
    """Random delimiters and tokens, some without text, against the definition."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(["a", "b"], rng.integers(1, 5))) for _ in range(3)]
    parts = ["".join(rng.choice(["a", "b"], rng.integers(1, 4))) for _ in range(6)]
    tokens = Letters((None, *(part.encode() for part in parts), b""), 0, 8)
    steps = ppl.Steps.by_text(texts, tokens).within(Space(8, 0, 20))
    x = rng.integers(1, 8, (4, 19))
    state = steps.init(4)
    for n in range(1, 19):
        state, ends = steps.step(state, jnp.asarray(x[:, n - 1]), jnp.full(4, n))
        for row in range(4):
            string = tuple(x[row, :n].tolist())
            since = max((i for i, token in enumerate(string) if token == 7), default=-1) + 1
            assert bool(ends[row]) == (since < n and tokens.completes(string[since:], texts))
        again = steps.read(Sequences(jnp.asarray(x), jnp.full(4, n)))
        np.testing.assert_array_equal(steps.table[state], steps.table[again])


def test_a_text_that_is_no_token_ends_a_step():
    tokens = Letters((b".", b"\n", b".\n\n", b"\n\n\n", None, b"\nSo"), 4, 6)
    steps = ppl.Steps.by_text("\n\n", tokens).within(Space(7, 4, 9))
    state, found = steps.init(1), []
    for n, token in enumerate([0, 1, 1, 1, 2, 5, 3, 6], 1):
        state, ends = steps.step(state, jnp.array([token]), jnp.array([n]))
        found.append(bool(ends[0]))
    # Of the vocabulary's last id, which the tokenizer does not have, there is no text.
    assert found == [False, False, True, True, True, True, True, False]


def test_the_most_that_steps_can_be():
    every, delimiters = ppl.Steps(every=8), ppl.Steps(delimiters=[3])
    assert [every.max_rounds(t) for t in (1, 8, 9, 64)] == [1, 1, 2, 8] and delimiters.max_rounds(
        64
    ) == 64
    assert [every.max_step_tokens(t) for t in (5, 64)] == [5, 8] and delimiters.max_step_tokens(
        64
    ) == 64


def test_steps_are_a_pytree():
    """Leaves are the delimiters; what jax puts into them is not checked, and a bound copy stays
    bound.
    """
    steps = ppl.Steps(delimiters=[3, 0]).within(Space(VOCAB_SIZE, EOS, 4))
    leaves, structure = jax.tree.flatten(steps)
    assert len(leaves) == 1 and structure.unflatten([object()]).space.eos == EOS
    assert structure == jax.tree.structure(
        ppl.Steps(delimiters=[2, 2]).within(Space(VOCAB_SIZE, EOS, 4))
    )
    assert jax.tree.leaves(ppl.Steps(every=3)) == []


BAD_STEPS = {
    "no delimiter": (
        lambda: ppl.Steps(delimiters=[]),
        r"expected delimiters as a list of token ids, at least one, got",
    ),
    "text": (
        lambda: ppl.Steps(delimiters="\n\n"),
        "expected delimiters as a list of token ids.*encode the delimiter",
    ),
    "a fraction": (
        lambda: ppl.Steps(every=2.5),
        "expected every to be a whole number of at least 1, got 2.5",
    ),
    "no text": (lambda: ppl.Steps.by_text([], Letters()), "expected delimiters as texts of at"),
    "ids as texts": (lambda: ppl.Steps.by_text([3], Letters()), r"got \[3\]; for token ids write"),
    "an empty text": (lambda: ppl.Steps.by_text(["a", ""], Letters()), "at least one character"),
    "a text that cannot be written": (
        lambda: ppl.Steps.by_text(["ab", "aé"], Letters()),
        "expected delimiters that this vocabulary can write, got 'aé'",
    ),
    "another vocabulary": (
        lambda: ppl.Steps.by_text("ab", Letters()).within(Space(3, EOS, 4)),
        "expected a tokenizer of at most 3 tokens, got one of 4; build the steps",
    ),
    "EOS": (
        lambda: ppl.Steps(delimiters=[EOS]).within(Space(VOCAB_SIZE, EOS, 4)),
        r"expected delimiter tokens other than EOS \(1\)",
    ),
    "free": (
        lambda: ppl.Steps(every=2).step((), jnp.zeros(1, int), jnp.ones(1, int)),
        "expected steps bound to a space of strings, got a free one; .* call within",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_refused(name: str):
    build, message = BAD_STEPS[name]
    with pytest.raises(ValueError, match=message):
        build()


# Both forms against plain Python.


@pytest.mark.parametrize("name", STEPS)
def test_step_factors_are_the_product_over_steps(name: str):
    """Each boundary and the end once, also where the string ends right after a boundary or has
    none.
    """
    expected = [sum(score(y) for y in {*boundaries(x, name), x}) for x in STRINGS]
    np.testing.assert_allclose(
        log_phi(ppl.step_factors(score_arrays, STEPS[name][0]())), expected, rtol=1e-5, atol=1e-5
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PaidTwice(Factors):
    """Pays for the last step again at the end."""

    def _pay(self, text: Any, used: Any, paid: Any, needed: Any) -> Any:
        return super()._pay(text, used, jnp.full_like(paid, -1), needed)


def test_a_step_paid_twice_is_seen():
    fault = ppl.step_factors(score_arrays, ppl.Steps(every=2))
    expected = [sum(score(y) for y in {*boundaries(x, "every 2"), x}) for x in STRINGS]
    twice = log_phi(PaidTwice(fault.scorer, fault.steps))
    wrong = ~np.isclose(twice, expected, atol=1e-5)
    assert {len(x) for x, bad in zip(STRINGS, wrong, strict=True) if bad} == {2}


def test_a_delimiter_that_never_comes_is_paid_for_at_the_end():
    never = ppl.Steps(every=MAX_TOKENS + 1)
    for build in (ppl.step_scores, ppl.step_factors):
        np.testing.assert_allclose(
            log_phi(build(score_arrays, never)),
            log_phi(ppl.reward(score_arrays)),
            rtol=1e-6,
            atol=1e-6,
        )
    without = np.array([3 not in x for x in STRINGS])
    found = log_phi(ppl.step_factors(score_arrays, ppl.Steps(delimiters=[3])))
    np.testing.assert_allclose(
        found[without], np.array([score(x) for x in STRINGS])[without], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("host", "build", "texts"),
    [
        (False, ppl.step_factors, False),
        (True, ppl.step_scores, False),
        slow(False, ppl.step_scores, True),
        slow(True, ppl.step_factors, True),
    ],
)
def test_process_rewards_are_potentials(host: bool, build: Any, texts: bool):
    """The public kit; a Python function is its jax twin."""
    log_score = ppl.python(lambda ids: score(tuple(ids))) if host else score_arrays
    steps = ppl.Steps.by_text(TEXTS, Letters()) if texts else ppl.Steps(delimiters=[3, 2])
    potential = build(log_score, steps)
    check_potential(potential, vocab_size=4, eos=EOS, max_tokens=4, key=jax.random.key(0))
    np.testing.assert_allclose(
        log_phi(potential),
        log_phi(build(score_arrays, steps)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
def test_smc_for_the_product_form():
    """LAW 1 for p(x) prod_t r(x_1:t), r in (0, 1)."""
    log_r = lambda tokens, length: score_arrays(tokens, length) - 2.0  # noqa: E731
    target = plain("table") * ppl.step_factors(log_r, ppl.Steps(every=2))
    phi = {x: math.exp(sum(score(y) - 2 for y in {*boundaries(x, "every 2"), x})) for x in STRINGS}
    truth = {x: p * phi[x] for x, p in gamma("table", "plain").items()}
    for found in smc_masses(jax.random.key(1), target, 2000).values():
        check_law(found, truth, resolution=0.03)


# Log-odds.


def probability(x: String) -> float:
    return 1 / (1 + math.exp(-3 * score(x)))


def probabilities(tokens: Any, length: Any) -> Any:
    return jax.nn.sigmoid(3 * score_arrays(tokens, length))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
    """A reward model with a weight."""

    weight: Any

    def __call__(self, tokens: Any, length: Any) -> Any:
        return jax.nn.sigmoid(self.weight * score_arrays(tokens, length))


@pytest.mark.parametrize(
    "reward",
    [probabilities, Module(jnp.float32(3)), ppl.python(lambda ids: probability(tuple(ids)))],
)
def test_log_odds_of_every_kind_of_reward(reward: Any):
    found = log_phi(ppl.step_scores(ppl.log_odds(reward), ppl.Steps(every=1)))
    np.testing.assert_allclose(found, [3 * score(x) for x in STRINGS], rtol=1e-4, atol=1e-4)


def test_log_odds_are_clipped():
    r = np.array([0.0, 1e-9, 1e-7, 1e-3, 0.5, 0.9, 1 - 2.0**-23, 1.0])
    expected = np.clip(np.log(r + 1e-30) - np.log(1 - r + 1e-30), *np.log([1e-7, 1e7]))
    found = ppl.log_odds(lambda tokens, length: jnp.asarray(r, jnp.float32))(
        ALL.tokens[:8], ALL.length[:8]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    host = [ppl.log_odds(ppl.python(lambda ids, r=value: r)).function([]) for value in r]
    np.testing.assert_allclose(host, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
def test_what_is_no_probability_is_refused(value: float):
    reward = ppl.log_odds(lambda tokens, length: jnp.where(length == 2, value, 0.5))
    with pytest.raises(
        ValueError, match=r"expected rewards in \[0, 1\] to take log-odds of, got .*as they are"
    ):
        reward(ALL.tokens, ALL.length)
    with pytest.raises(ValueError, match="expected rewards in"):
        ppl.log_odds(ppl.python(lambda ids: value)).function([2])


def bad_on_three(tokens: Any, length: Any) -> Any:
    return jnp.where(
        (length > 0) & (tokens[:, 0] == 3), 1.5, jnp.where(tokens[:, 0] == 0, jnp.nan, 0.5)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("host", "build"), [(False, ppl.step_scores), (True, ppl.step_factors)])
def test_a_traced_bad_probability_kills_its_particle_and_is_counted(host: bool, build: Any):
    """Above 1 and NaN alike; the others go on with weight 1 (odds of 0.5 are 1)."""
    on_host = ppl.python(lambda ids: {3: 1.5, 0: math.nan}.get(ids[0], 0.5) if ids else 0.5)
    reward = ppl.log_odds(on_host if host else bad_on_three)
    target = plain("markov") * build(reward, ppl.Steps(every=2))
    out = smc.run(
        jax.random.key(3), target, num_particles=32, threshold=0.0, proposal=proposals.bootstrap
    )
    dead = np.isneginf(out.log_weights)
    first = np.where(out.sequences.length > 0, out.sequences.tokens[:, 0], EOS)
    np.testing.assert_array_equal(dead, (first == 3) | (first == 0))
    assert {0, 3} <= set(first.tolist()) and 0 < dead.sum() < 32 and out.num_invalid == dead.sum()
    np.testing.assert_allclose(
        np.asarray(out.log_weights)[~dead], np.log(32 / (32 - dead.sum())), rtol=1e-5
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "build", [lambda f: ppl.reward(f), lambda f: ppl.step_factors(f, ppl.Steps(every=1))]
)
@pytest.mark.parametrize(
    ("shape", "said"), [((3, 1), r"\(3, 1\)"), ((), r"\(\)"), ((3, 4), r"\(3, 4\)")]
)
def test_a_reward_of_the_wrong_shape_is_refused(build: Any, shape: tuple[int, ...], said: str):
    target = plain("hmm") * build(lambda tokens, length: jnp.zeros(shape))
    with pytest.raises(
        ValueError,
        match=rf"expected log-scores \[N\] = \(3,\) of 3 strings, got shape {said}; return",
    ):
        target.log_density(*as_arrays([(0,), (2,), ()], MAX_TOKENS, EOS))


def test_log_odds_and_second_thoughts_are_compiled_once():
    """A module's weights are leaves: another reward model of the same shape does not retrace."""
    counter = helpers.TraceCounter(lambda target, *x: target.log_density(*x))
    density = jax.jit(counter)
    for weight in (1.0, 2.0):
        density(
            plain("hmm")
            * ppl.step_scores(ppl.log_odds(Module(jnp.float32(weight))), ppl.Steps(every=2)),
            ALL.tokens,
            ALL.length,
        )
    assert counter.count == 1
