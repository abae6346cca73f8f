"""Potentials: increments that telescope, look-aheads that keep their word, Python functions that
fail, bad input.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact
from ppl.potential import Product, scale
from ppl.pytrees import register_dataclass
from ppl.space import Space
from samplers import smc
from samplers.strings import proposals
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE, as_strings, assert_z
from tests.samplers.problems import (
    PROBLEMS,
    RESAMPLERS,
    gamma,
    plain,
    score,
    score_arrays,
    target_of,
)

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
TILTED = [name for name in PROBLEMS if name not in ("plain", "power")]


def states_along(potential: ppl.Potential, tokens: Any) -> Any:
    """States before every token, the last one after all, and the factor of every token."""
    step = jax.jit(lambda potential, state, token: potential.step(state, token))
    states, factors = [potential.init(tokens.shape[0])], []
    for t in range(tokens.shape[1]):
        state, log_factor = step(potential, states[-1], tokens[:, t])
        states.append(state)
        factors.append(np.asarray(log_factor, np.float64))
    return states, np.stack(factors, 1)


def by_hand(potential: ppl.Potential) -> np.ndarray:
    """log Phi of all strings from the contract: `step` for the tokens, `final` once, EOS never
    stepped.
    """
    states, factors = states_along(
        potential, jnp.where(ALL.tokens == EOS, 0, ALL.tokens)
    )  # 0 where nothing is read
    final = jax.jit(lambda potential, state: potential.final(state))
    finals = np.stack([np.asarray(final(potential, state), np.float64) for state in states], 1)
    length = np.asarray(ALL.length)
    written = np.where(np.arange(MAX_TOKENS) < length[:, None], factors, 0.0)
    dead = np.isneginf(written).any(1)
    return np.where(
        dead,
        -np.inf,
        np.where(dead[:, None], 0.0, written).sum(1) + finals[np.arange(len(length)), length],
    )


@pytest.mark.parametrize("problem", TILTED)
def test_increments_telescope(problem: str):
    """Factors added up by hand are `log_potential`, and their exponential is Phi as plain Python
    has it.
    """
    target = target_of("hmm", problem)
    log_phi = by_hand(target.potential)
    assert not np.isnan(log_phi).any()
    referee = np.asarray(target.log_potential(ALL.tokens, ALL.length))
    np.testing.assert_array_equal(np.isneginf(referee), np.isneginf(log_phi))
    np.testing.assert_allclose(np.exp(referee), np.exp(log_phi), rtol=1e-5)
    phi = np.array([PROBLEMS[problem].phi(x) for x in as_strings(ALL.tokens, ALL.length)])
    np.testing.assert_allclose(np.exp(log_phi), phi, rtol=1e-4)


def check_lookahead(potential: ppl.Potential, letters: list[int]) -> None:
    """Every column after every prefix is the factor that `step` gives (`final` in column EOS)."""
    tokens = ALL.tokens[ALL.length == MAX_TOKENS]  # their prefixes are all prefixes
    states, factors = states_along(potential, tokens)
    final, step = jax.jit(potential.final), jax.jit(potential.step)
    lookahead = jax.jit(potential.lookahead)
    for t, state in enumerate(states[:-1]):
        alive = ~np.isneginf(factors[:, :t]).any(1)
        known = np.asarray(lookahead(state))
        assert known.shape == (len(tokens), VOCAB_SIZE)
        for v in letters:
            expected = (
                final(state) if v == EOS else step(state, jnp.full(len(tokens), v, jnp.int32))[1]
            )
            np.testing.assert_allclose(
                np.exp(known[alive, v]),
                np.exp(np.asarray(expected)[alive]),
                rtol=1e-5,
                err_msg=f"column {v}",
            )


KNOWN = ["banned", "forced", "must_end", "min_tokens", "second_lm", "regex"]


@pytest.mark.parametrize("problem", KNOWN)
def test_the_lookahead_is_the_next_factor(problem: str):
    [potential] = target_of("hmm", problem).potential.factors
    check_lookahead(potential if problem == "banned" else potential**0.5, list(range(VOCAB_SIZE)))


def test_a_products_lookahead_has_the_factors_that_are_known():
    target = plain("hmm") * ppl.must_end() * ppl.reward(score_arrays) * ppl.min_tokens(2)
    state = target.potential.init(2)
    known = (plain("hmm") * ppl.must_end() * ppl.min_tokens(2)).potential
    np.testing.assert_array_equal(target.potential.lookahead(state), known.lookahead(known.init(2)))
    unknown = (plain("hmm") * ppl.reward(score_arrays)).potential
    assert unknown.lookahead(unknown.init(2)) is None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class WrongEosColumn(ppl.Potential):
    """min_tokens whose look-ahead treats EOS like any other token."""

    inner: ppl.Potential

    def init(self, num: int) -> Any:
        return self.inner.init(num)

    def step(self, state: Any, token: Any) -> Any:
        return self.inner.step(state, token)

    def final(self, state: Any) -> Any:
        return self.inner.final(state)

    def lookahead(self, state: Any) -> Any:
        return self.inner.lookahead(state).at[:, EOS].set(0.0)


def test_a_wrong_eos_column_is_seen():
    bound = ppl.min_tokens(2).within(Space(VOCAB_SIZE, EOS, MAX_TOKENS))
    with pytest.raises(AssertionError, match=f"column {EOS}"):
        check_lookahead(WrongEosColumn(bound), list(range(VOCAB_SIZE)))


# Powers.


def test_tempering_keeps_what_is_forbidden():
    factors = jnp.array([-jnp.inf, -2.0, 0.0, 3.0])
    for power, expected in (
        (0.0, [-np.inf, 0, 0, 0]),
        (0.5, [-np.inf, -1, 0, 1.5]),
        (-1.0, [-np.inf, 2, 0, -3]),
    ):
        np.testing.assert_array_equal(scale(power, factors), expected)
    indicator = ppl.banned([3]).within(Space(4, EOS, 4)) ** 0.0
    np.testing.assert_array_equal(indicator.lookahead(indicator.init(1))[0], [0, 0, 0, -np.inf])


def test_a_potential_binds_inside_products_and_powers():
    """`within` reaches the parts: the horizon of the target is what must_end asks about."""
    target = (
        MODELS["hmm"]().given(PROMPT, max_tokens=2)
        * (ppl.must_end() * ppl.reward(score_arrays)) ** 2.0
    )
    x = exact.strings(VOCAB_SIZE, 2, EOS)
    log_phi = np.asarray(target.log_potential(x.tokens, x.length))
    expected = [2 * score(s) if len(s) < 2 else -np.inf for s in as_strings(x.tokens, x.length)]
    np.testing.assert_allclose(log_phi, expected, rtol=1e-5, atol=1e-6)


# What a look-ahead forbids.

SUPPORTS = {
    "banned": lambda x: 2 not in x,
    "power_of_potential": lambda x: 0 not in x,
    "product": lambda x: 1 <= len(x) < MAX_TOKENS,
    "regex": PROBLEMS["regex"].phi,
    # The second model's law, which is a look-ahead too, costs a model.
    "power_of_all": lambda x: len(x) < MAX_TOKENS,
    "every_2": lambda x: True,
}


def assert_support(target: ppl.Target, expected: Any) -> None:
    p = plain("hmm") * ppl.support(target)
    phi = np.exp(np.asarray(p.log_potential(ALL.tokens, ALL.length)))
    np.testing.assert_array_equal(phi, [expected(x) for x in as_strings(ALL.tokens, ALL.length)])


@pytest.mark.parametrize("problem", SUPPORTS)
def test_the_support_is_what_a_look_ahead_forbids(problem: str):
    """One where it forbids nothing, whatever the parts without one say."""
    assert_support(target_of("hmm", problem), SUPPORTS[problem])


def test_the_support_of_what_is_twisted_and_of_a_graded_look_ahead():
    target = target_of("hmm", "regex")
    table = exact.optimal_twist(target)
    assert_support(ppl.twists.twisted(target, table), SUPPORTS["regex"])
    assert_support(plain("hmm") * table, SUPPORTS["regex"])
    # Of what has no look-ahead, or a model's: nothing.
    rewarded = target_of("hmm", "reward")
    blind = (
        plain("hmm"),
        rewarded,
        ppl.twists.twisted(rewarded, table),
        target_of("hmm", "second_lm"),
    )
    assert [ppl.support(target) for target in blind] == [Product()] * 4


@pytest.mark.bad_input
def test_a_support_is_over_the_strings_of_its_target():
    support = ppl.support(target_of("hmm", "banned"))
    with pytest.raises(ValueError, match="expected a support over the target's strings"):
        MODELS["hmm"]().given(PROMPT, max_tokens=2) * support


# Python functions.


def test_a_python_reward_is_its_jax_twin():
    target = plain("hmm") * ppl.reward(ppl.python(lambda ids: score(tuple(ids))))
    twin = plain("hmm") * ppl.reward(score_arrays)
    x = ALL.tokens, ALL.length
    np.testing.assert_allclose(target.log_density(*x), twin.log_density(*x), rtol=1e-5, atol=1e-5)
    stepwise = plain("hmm") * ppl.step_scores(
        ppl.python(lambda ids: score(tuple(ids))), ppl.Steps(every=2)
    )
    np.testing.assert_allclose(stepwise.log_density(*x), twin.log_density(*x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smc_with_a_python_potential_is_exact():
    """E[Z-hat] = Z over populations one after another; N = 16 keeps the host calls in batches."""
    target = plain("table") ** 1.3 * ppl.step_scores(
        ppl.python(lambda ids: score(tuple(ids))), ppl.Steps(every=1)
    )

    @jax.jit
    def evidence(keys: Any) -> Any:
        options = {"num_particles": 16, "threshold": 0.7, "resampler": RESAMPLERS["stratified"]}
        return jax.lax.map(lambda key: smc.run(key, target, **options).log_z, keys)

    truth = sum(gamma("table", "every_1").values())
    found = np.exp(np.asarray(evidence(jax.random.split(jax.random.key(0), 600)), np.float64))
    assert_z(found, truth, resolution=0.01 * truth)


@pytest.mark.slow
def test_a_python_function_sees_whole_strings_once():
    """Not the strings that have ended before, nor those that still grow: a parser would fail on
    them.
    """
    seen: list[tuple[int, ...]] = []

    def parse(ids: list[int]) -> float:
        seen.append(tuple(ids))
        return 0.0

    out = smc.run(
        jax.random.key(1),
        plain("hmm") * ppl.reward(ppl.python(parse)),
        num_particles=12,
        threshold=0.0,
    )
    drawn = as_strings(out.sequences.tokens, out.sequences.length)
    assert len({len(x) for x in drawn}) > 2
    assert collections.Counter(seen) == collections.Counter(drawn)


@pytest.mark.slow
def test_a_python_step_score_sees_boundaries_once():
    """Every prefix that ends a step and every whole string; what the horizon ends is one question,
    not two.
    """
    seen: list[tuple[int, ...]] = []

    def parse(ids: list[int]) -> float:
        seen.append(tuple(ids))
        return 0.0

    target = plain("hmm") * ppl.step_scores(ppl.python(parse), ppl.Steps(every=2))
    out = smc.run(jax.random.key(2), target, num_particles=12, threshold=0.0)
    drawn = as_strings(out.sequences.tokens, out.sequences.length)
    boundaries = [x[:2] for x in drawn if len(x) >= 2]
    assert collections.Counter(seen) == collections.Counter([*drawn, *boundaries])


def fails(ids: list[int]) -> float:
    """Raises on strings that start with 3, is NaN on those that start with 0."""
    if ids[:1] == [3]:
        raise RuntimeError("cannot score this")
    return math.nan if ids[:1] == [0] else score(tuple(ids))


def forbids(tokens: Any, length: Any) -> Any:
    bad = (length > 0) & ((tokens[:, 0] == 3) | (tokens[:, 0] == 0))
    return jnp.where(bad, -jnp.inf, score_arrays(tokens, length))


def test_a_failing_python_function_kills_its_particle_only(caplog: pytest.LogCaptureFixture):
    key, options = (
        jax.random.key(3),
        {"num_particles": 32, "threshold": 0.0, "proposal": proposals.bootstrap},
    )
    bad = smc.run(key, plain("markov") * ppl.reward(ppl.python(fails)), **options)
    good = smc.run(key, plain("markov") * ppl.reward(forbids), **options)
    dead = np.asarray(jnp.isneginf(bad.log_weights))
    first = np.where(bad.sequences.length > 0, bad.sequences.tokens[:, 0], EOS)
    assert {0, 3} <= set(first[dead].tolist()) and 0 < dead.sum() < 32
    assert bad.num_invalid == dead.sum() and good.num_invalid == 0
    np.testing.assert_array_equal(bad.sequences.tokens, good.sequences.tokens)
    np.testing.assert_allclose(bad.log_weights, good.log_weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bad.log_z, good.log_z, rtol=1e-5)
    (record,) = caplog.records
    assert f"It failed in {dead.sum()} of 32 calls" in record.getMessage()


@pytest.mark.slow
def test_a_python_function_that_always_fails_leaves_a_flag_and_no_nan():
    def always(ids: list[int]) -> float:
        raise KeyError(ids)

    target = plain("hmm") * ppl.step_scores(ppl.python(always), ppl.Steps(every=1))
    out = smc.run(jax.random.key(4), target, num_particles=5, history=True)
    assert out.all_dead and out.log_z == -jnp.inf and out.num_invalid == 5
    floats = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not any(jnp.isnan(leaf).any() for leaf in floats)


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer that spells."""

    def decode(self, ids: list[int]) -> str:
        return "".join("a.bc"[v] for v in ids)


def test_a_python_function_gets_text_if_there_is_a_tokenizer():
    target = plain("hmm") * ppl.reward(ppl.python(lambda text: float(text == "ac"), Letters()))
    log_phi = np.asarray(target.log_potential(ALL.tokens, ALL.length))
    assert log_phi.sum() == 1 and as_strings(ALL.tokens, ALL.length)[int(log_phi.argmax())] == (
        0,
        3,
    )


# Bad input.

BAD = {
    "banned id": (
        lambda: ppl.banned([0, 4]),
        "expected banned token ids in [0, 4), got 4; encode with this model's own",
    ),
    "banned EOS": (
        lambda: ppl.banned([EOS]),
        "expected banned tokens other than EOS (1); constrain the end with ppl.min_tokens or"
        " ppl.must_end",
    ),
    "forced id": (
        lambda: ppl.forced([-1]),
        "expected forced token ids in [0, 4), got -1; encode with this model's own",
    ),
    "forced EOS": (
        lambda: ppl.forced([3, EOS]),
        "expected forced tokens other than EOS (1); constrain the end with",
    ),
    "forced nothing": (
        lambda: ppl.forced([]),
        "expected the number of forced tokens to be a whole number of at least 1, got 0",
    ),
    "forced too many": (
        lambda: ppl.forced([3] * 5),
        "expected at most max_tokens=4 forced tokens, got 5; raise max_tokens",
    ),
    "min_tokens 0": (
        lambda: ppl.min_tokens(0),
        "expected the minimum length to be a whole number of at least 1, got 0",
    ),
    "min_tokens beyond": (
        lambda: ppl.min_tokens(5),
        "expected a minimum length of at most 4 (max_tokens=4), got 5; raise max_tokens",
    ),
    "steps of both kinds": (
        lambda: ppl.step_scores(score_arrays, ppl.Steps(delimiters=[3], every=2)),
        "expected either delimiters or every, got delimiters=[3], every=2; pass the one that marks"
        " your steps",
    ),
    "steps of no kind": (
        lambda: ppl.step_scores(score_arrays, ppl.Steps()),
        "expected either delimiters or every, got delimiters=None, every=None; pass the one",
    ),
    "steps that end outside the vocabulary": (
        lambda: ppl.step_scores(score_arrays, ppl.Steps(delimiters=[3, 4])),
        "expected delimiter token ids in [0, 4), got 4; encode with this model's own",
    ),
    "steps of no tokens": (
        lambda: ppl.step_scores(score_arrays, ppl.Steps(every=0)),
        "expected every to be a whole number of at least 1, got 0; pass e.g. every=32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_potentials_are_refused(name: str):
    build, message = BAD[name]
    with pytest.raises(ValueError) as error:
        plain("hmm") * build()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("potential", [ppl.banned([0]), ppl.must_end(), ppl.reward(score_arrays)])
def test_a_free_potential_says_that_it_is_not_bound(potential: ppl.Potential):
    with pytest.raises(
        ValueError,
        match="expected a potential bound to a .*, got a free one; multiply it onto a target",
    ):
        state = potential.init(2)
        potential.step(state, jnp.zeros(2, jnp.int32))


def test_a_potential_that_fits_no_string_of_the_horizon():
    one = MODELS["hmm"]().given(PROMPT, max_tokens=1)
    assert (one * ppl.must_end()).max_tokens == 1  # the empty string
    with pytest.raises(ValueError, match="expected a minimum length of at most 1"):
        one * ppl.min_tokens(2)


def test_parts_of_products_and_powers_and_their_states():
    """They multiply to the whole, powers drawn in, each in its own state; joined, they are it."""
    x = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
    target = plain("hmm") * ((ppl.banned([3]) ** 0.5 * ppl.min_tokens(2)) ** 2 * ppl.forced([2]))
    whole = target.potential
    assert [type(part).__name__ for part in whole.parts] == ["Power", "Power", "Forced"]
    state = whole.init(x.length.size)
    pairs = list(zip(whole.parts, whole.part_states(state), strict=True))
    joined, joined_state = Product.joined(pairs, x.length.size)
    for t in range(MAX_TOKENS):
        pairs = list(zip(whole.parts, whole.part_states(state), strict=True))
        total = sum(part.lookahead(s) for part, s in pairs)
        np.testing.assert_array_equal(total, whole.lookahead(state))
        np.testing.assert_array_equal(joined.lookahead(joined_state), whole.lookahead(state))
        state, factor = whole.step(state, x.tokens[:, t])
        joined_state, joined_factor = joined.step(joined_state, x.tokens[:, t])
        np.testing.assert_array_equal(factor, joined_factor)
