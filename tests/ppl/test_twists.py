"""Twists: the same density in other increments, look-aheads, optimal twists without variance, and
planted faults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact, twists
from ppl.exact import TabulatedPotential
from ppl.pytrees import register_dataclass
from ppl.target import Target
from ppl.testing import check_potential
from ppl.twists import Twisted
from samplers import smc
from samplers.strings import proposals
from tests.helpers import EOS, MAX_TOKENS, PROMPT, VOCAB_SIZE, String, as_strings, hmm
from tests.samplers.problems import (
    THRESHOLDS,
    check_law,
    gamma,
    plain,
    score_arrays,
    smc_masses,
    target_of,
)

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = as_strings(ALL.tokens, ALL.length)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def random_table(target: Target) -> ppl.Potential:
    """The optimal twist's table with random values: a bad twist that has a look-ahead and guesses
    the end.
    """
    table = exact.optimal_twist(target)
    noise = (
        np.random.default_rng(3)
        .normal(scale=0.5, size=(2, table.log_twist.shape[0]))
        .astype(np.float32)
    )
    log_twist = jnp.asarray(noise[0]).at[0].set(0.0)
    return dataclasses.replace(table, log_twist=log_twist, log_final=jnp.asarray(noise[1]))


TWISTS = {
    "table": random_table,
    "model": lambda target: ppl.lm_potential(hmm().given(PROMPT, max_tokens=MAX_TOKENS)) ** 0.5,
    "function": lambda target: ppl.step_scores(
        lambda *x: 0.7 * score_arrays(*x), ppl.Steps(every=1)
    ),
}
FORMS = [True, False]
PAIRS = [
    ("reward", "table"),
    ("product", "function"),
    ("every_2", "model"),
    slow("regex", "function"),
    slow("second_lm", "table"),
    slow("power_of_all", "model"),
    slow("delimiters", "table"),
]


def twisted(problem: str, twist: str, terminal: bool, model: str = "table") -> Target:
    target = target_of(model, problem)
    return twists.twisted(target, TWISTS[twist](target), terminal=terminal)


# The density.


def assert_same_density(twisted: Target, truth: dict[String, float]) -> None:
    gamma = np.exp(np.asarray(twisted.log_density(ALL.tokens, ALL.length), np.float64))
    np.testing.assert_allclose(gamma, [truth.get(x, 0.0) for x in STRINGS], rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("terminal", FORMS)
@pytest.mark.parametrize(("problem", "twist"), PAIRS)
def test_the_density_is_unchanged(problem: str, twist: str, terminal: bool):
    """All strings against brute force, for models that know nothing of the twist."""
    assert_same_density(twisted(problem, twist, terminal), gamma("table", problem))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading(ppl.Potential):
    """A judge that reads so many tokens for a factor, and more for the last one."""

    tokens: int
    at_the_end: int

    def init(self, num: int) -> Any:
        return jnp.zeros(num)

    def judged(self, state: Any, token: Any, ends: Any) -> Any:
        return self.tokens + self.at_the_end * ends


@pytest.mark.parametrize("log_psi_0", [None, 0.3])
def test_what_base_and_twist_read_is_counted_but_for_the_twists_end(log_psi_0: float | None):
    target = dataclasses.replace(plain("table"), potential=Reading(2, 5))
    phi = twists.twisted(target, Reading(30, 70), log_psi_0=log_psi_0).potential
    ends = jnp.array([False, True])
    found = phi.judged(phi.init(2), jnp.array([0, EOS]), ends)
    np.testing.assert_array_equal(found, [2 + 30, 2 + 5 + 30])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NotDividedOut(Twisted):
    """Pays Phi at the end without taking psi back."""

    def final_where(self, state: Any, needed: Any) -> Any:
        base, twist, owed = state
        return super().final_where((base, twist, jnp.where(jnp.isneginf(owed), owed, 0.0)), needed)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PhiLost(Twisted):
    """Forgets what the terminal form owes for the tokens so far."""

    def step(self, state: Any, token: Any) -> Any:
        (base, twist, owed), paid = super().step(state, token)
        return (base, twist, jnp.where(jnp.isneginf(paid), owed, state[2] - paid)), paid


@pytest.mark.parametrize("fault", [NotDividedOut, PhiLost])
def test_a_changed_density_is_seen(fault: type):
    target = twisted("every_2", "table", terminal=True)
    right = target.potential
    wrong = fault(right.base, right.twist, right.space, right.terminal)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_density(dataclasses.replace(target, potential=wrong), gamma("table", "every_2"))


@pytest.mark.parametrize("terminal", FORMS)
def test_the_way_to_the_end_is_the_twist(terminal: bool):
    """The increments up to token t add up to log psi_t, in the per-step form to log Phi_t psi_t;
    the end to log Phi.
    """
    target = twisted("every_1", "function", terminal)
    tokens = ALL.tokens[ALL.length == MAX_TOKENS]
    state, so_far = target.potential.init(len(tokens)), jnp.zeros(len(tokens))
    step = jax.jit(target.potential.step)
    for t in range(MAX_TOKENS):
        state, log_factor = step(state, tokens[:, t])
        so_far += log_factor
        score = score_arrays(
            jnp.where(jnp.arange(MAX_TOKENS) <= t, tokens, EOS), jnp.full(len(tokens), t + 1)
        )
        last = t == MAX_TOKENS - 1
        so_far += target.potential.final(state) if last else 0.0
        share = 1.0 if last else 0.7 if terminal else 1.7
        np.testing.assert_allclose(so_far, share * score, rtol=1e-4, atol=1e-5)


def test_a_twist_of_zero_loses_the_mass_behind_it():
    """As documented: strings through the prefix are gone, the others keep their density."""
    target = target_of("table", "reward")
    strict = lambda tokens, length: jnp.where((length == 1) & (tokens[:, 0] == 3), -jnp.inf, 0.0)  # noqa: E731
    lossy = twists.twisted(target, ppl.step_scores(strict, ppl.Steps(every=1)))
    assert_same_density(lossy, {x: v for x, v in gamma("table", "reward").items() if x[:1] != (3,)})


def test_what_is_forbidden_is_dropped_at_once():
    """Not at the end, where a terminal Phi is paid."""
    target = twists.twisted(plain("hmm") * ppl.banned([0]), TWISTS["function"](None))
    potential = target.potential
    state, log_factor = potential.step(potential.init(2), jnp.array([0, 3]))
    assert np.isneginf(log_factor).tolist() == [True, False]
    assert np.isneginf(potential.lookahead(potential.init(1))[0]).tolist() == [
        v == 0 for v in range(VOCAB_SIZE)
    ]


@pytest.mark.slow
@pytest.mark.bad_input
def test_a_twist_that_is_not_a_number_kills_its_particle():
    nan = lambda tokens, length: jnp.where(tokens[:, 0] == 3, jnp.nan, 0.0)  # noqa: E731
    target = twists.twisted(target_of("markov", "reward"), ppl.step_scores(nan, ppl.Steps(every=1)))
    out = smc.run(
        jax.random.key(0), target, num_particles=32, threshold=0.0, proposal=proposals.bootstrap
    )
    dead = np.isneginf(out.log_weights)
    first = np.where(out.sequences.length > 0, out.sequences.tokens[:, 0], EOS)
    assert 0 < dead.sum() < 32 and out.num_invalid == dead.sum()
    np.testing.assert_array_equal(dead, first == 3)


@pytest.mark.bad_input
def test_bad_twists_are_refused():
    target = plain("hmm")
    with pytest.raises(
        ValueError, match="expected a potential as twist, got Target; use ppl.lm_potential"
    ):
        twists.twisted(target, hmm().given(PROMPT, max_tokens=MAX_TOKENS))
    with pytest.raises(ValueError, match="expected a potential as twist, got function"):
        twists.twisted(target, score_arrays)
    with pytest.raises(
        ValueError, match="expected a second language model over the target's strings"
    ):
        twists.twisted(target, ppl.lm_potential(hmm().given(PROMPT, max_tokens=3)))


# As a potential.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Blind(ppl.Potential):
    """A potential without its look-ahead, which may guess."""

    inner: ppl.Potential

    def init(self, num: int) -> Any:
        return self.inner.init(num)

    def step(self, state: Any, token: Any) -> Any:
        return self.inner.step(state, token)

    def final(self, state: Any) -> Any:
        return self.inner.final(state)


KNOWN = [
    ("second_lm", "model", True),
    ("plain", "table", False),
    slow("regex", "table", True),
    slow("power_of_all", "model", False),
]


@pytest.mark.parametrize(("problem", "twist", "terminal"), KNOWN)
def test_the_lookahead_is_exact_where_base_and_twist_know(problem: str, twist: str, terminal: bool):
    potential = twisted(problem, twist, terminal).potential
    check_potential(
        potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0)
    )


GUESSED = [
    ("reward", "table", True),
    ("product", "function", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "twist", "terminal"), GUESSED)
def test_where_the_lookahead_guesses_all_else_holds(problem: str, twist: str, terminal: bool):
    potential = Blind(twisted(problem, twist, terminal).potential)
    check_potential(
        potential, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(0)
    )


@pytest.mark.parametrize(
    ("problem", "twist", "terminal"),
    [("reward", "table", True), ("product", "function", True), ("product", "table", False)],
)
def test_a_guess_has_the_support_of_the_factor(problem: str, twist: str, terminal: bool):
    """-inf stands for -inf, and nothing else does, as far as the base knows it (`must_end` knows
    the horizon).
    """
    potential = twisted(problem, twist, terminal).potential
    tokens = ALL.tokens[ALL.length == MAX_TOKENS]
    state, alive = potential.init(len(tokens)), np.ones(len(tokens), bool)
    lookahead, final, step = (
        jax.jit(potential.lookahead),
        jax.jit(potential.final),
        jax.jit(potential.step),
    )
    for t in range(MAX_TOKENS):
        known = np.asarray(lookahead(state))
        for v in range(VOCAB_SIZE):
            rows = jnp.full(len(tokens), v)
            expected = final(state) if v == EOS else step(state, rows)[1]
            np.testing.assert_array_equal(
                np.isneginf(known[alive, v]), np.isneginf(expected)[alive]
            )
        state, log_factor = step(state, tokens[:, t])
        alive &= ~np.isneginf(log_factor)


def test_no_lookahead_from_nothing():
    potential = twisted("reward", "function", True).potential
    assert potential.lookahead(potential.init(2)) is None


# Optimal twists.

# In the per-step form the proposal can be optimal only where the base knows its factors in advance,
# or pays at the end.
OPTIMAL = [
    ("product", True),
    ("every_2", True),
    ("second_lm", False),
    ("power_of_all", False),
    ("must_end", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "terminal"), OPTIMAL)
def test_optimal_twists_leave_no_variance(problem: str, terminal: bool):
    """Every weight is 1 and log_z exact for 3 particles at every threshold (Z by brute force),
    early EOS and all.
    """
    target = target_of("table", problem)
    target = twists.twisted(
        target, exact.optimal_twist(target, terminal=terminal), terminal=terminal
    )
    keys, thresholds = (
        jax.random.split(jax.random.key(4), 60),
        jnp.tile(jnp.asarray(THRESHOLDS), 20),
    )
    runs = jax.vmap(
        lambda key, threshold: smc.run(key, target, num_particles=3, threshold=threshold)
    )
    out = jax.jit(runs)(keys, thresholds)
    assert len({*np.asarray(out.sequences.length).ravel().tolist()}) > 2
    np.testing.assert_allclose(out.log_weights, 0.0, atol=1e-5)
    np.testing.assert_allclose(out.log_z, np.log(sum(gamma("table", problem).values())), atol=1e-5)


@pytest.mark.slow
def test_the_wrong_forms_twist_has_variance():
    """Planted fault: the twist that is optimal where Phi is paid at the end, paid on top of Phi."""
    target = target_of("table", "second_lm")
    target = twists.twisted(target, exact.optimal_twist(target), terminal=False)
    out = smc.run(jax.random.key(4), target, num_particles=8, threshold=0.0)
    assert np.std(out.log_weights) > 0.05


def test_an_optimal_twist_is_the_mass_of_completions():
    """psi_t p^alpha is the sum of gamma over the strings that start so; the other form leaves Phi_t
    out of it.
    """
    target, truth, x = target_of("table", "every_1"), gamma("table", "every_1"), (3, 0, 3)
    p = np.exp(
        1.3 * np.asarray(plain("table").token_log_probs(jnp.array([[*x, EOS]]), jnp.array([3])))[0]
    )
    phi = np.asarray(
        score_arrays(
            jnp.array([[3, EOS, EOS, EOS], [3, 0, EOS, EOS], [*x, EOS]]), jnp.array([1, 2, 3])
        )
    )
    for terminal in FORMS:
        table: TabulatedPotential = exact.optimal_twist(target, terminal=terminal)
        state, log_psi = table.init(1), 0.0
        for t, token in enumerate(x):
            state, log_factor = table.step(state, jnp.array([token]))
            log_psi += float(log_factor[0])
            mass = sum(v for y, v in truth.items() if y[: t + 1] == x[: t + 1])
            expected = np.log(mass / p[: t + 1].prod()) - (0.0 if terminal else phi[t])
            np.testing.assert_allclose(log_psi, expected, rtol=1e-4, atol=1e-5)


# LAW 1 with twists that are far from optimal.


LAWS = [("reward", "table", True), ("product", "function", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "twist", "terminal"), LAWS)
def test_law_1(problem: str, twist: str, terminal: bool):
    """The proposal follows the guess, the weights do not."""
    for found in smc_masses(jax.random.key(6), twisted(problem, twist, terminal), 2000).values():
        check_law(found, gamma("table", problem), resolution=0.05)


@pytest.mark.slow
def test_a_weight_made_of_a_guess_is_seen():
    """Planted fault: the end pays what the look-ahead guessed."""

    @register_dataclass
    @dataclasses.dataclass(frozen=True)
    class PaysTheGuess(Twisted):
        def final_where(self, state: Any, needed: Any) -> Any:
            return self.lookahead(state)[:, self.space.eos]

    target = twisted("reward", "table", True)
    right = target.potential
    wrong = dataclasses.replace(
        target, potential=PaysTheGuess(right.base, right.twist, right.space, right.terminal)
    )
    found = smc_masses(jax.random.key(6), wrong, 500, thresholds=(0.5,))[0.5]
    with pytest.raises(AssertionError, match="z"):
        check_law(found, gamma("table", "reward"), resolution=0.2)


# psi of the empty string.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Values(ppl.Potential):
    """Increments log V(x v) - log V(x) of true values, V of the empty string being Z."""

    table: TabulatedPotential
    log_z: jax.Array

    def init(self, num: int) -> Any:
        return self.table.init(num)

    def step(self, state: Any, token: Any) -> Any:
        after, log_factor = self.table.step(state, token)
        return after, log_factor - jnp.where(state == 0, self.log_z, 0.0)

    def final(self, state: Any) -> Any:
        return self.table.final(state) - jnp.where(state == 0, self.log_z, 0.0)

    def lookahead(self, state: Any) -> Any:
        return self.table.lookahead(state) - jnp.where(state == 0, self.log_z, 0.0)[:, None]


def test_psi_of_the_empty_string_is_banked():
    """Exact values leave no variance, whether the empty string's is written as 1 or as it is."""
    target = plain("hmm") * ppl.reward(lambda *x: 2.0 * score_arrays(*x) - 8.0)
    truth, table = exact.enumerate_strings(target), exact.optimal_twist(target)
    values = Values(table, jnp.float32(truth.log_z))
    first = dataclasses.replace(table, log_twist=table.log_twist.at[0].set(truth.log_z))

    def error(twisted: Target) -> float:
        out = smc.run(jax.random.key(7), twisted, num_particles=64, threshold=1.1)
        return abs(float(out.log_z) - truth.log_z)

    assert error(twists.twisted(target, values, log_psi_0=truth.log_z)) < 1e-4
    assert error(twists.twisted(target, first)) < 1e-4
    # Left at 1, the density is the same, and what ends early is thrown away.
    lost = twists.twisted(target, values, log_psi_0=0.0)
    log_gamma = lost.log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose(log_gamma, truth.log_gamma, rtol=1e-4, atol=1e-4)
    assert error(lost) > 0.05
