"""Enumeration against brute force: two implementations of every density that share nothing but the
model's prefill.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact
from tests import helpers
from tests.helpers import EOS, MODELS
from tests.samplers.problems import PROBLEMS, gamma, plain, target_of

# Every problem once, the models in turn.
ROWS = [
    pytest.param(model, problem, marks=() if i % 2 == 0 else pytest.mark.slow)
    for i, (problem, model) in enumerate(zip(PROBLEMS, itertools.cycle(MODELS), strict=False))
]


@pytest.mark.parametrize(("model", "problem"), ROWS)
def test_enumeration_is_brute_force(model: str, problem: str):
    found = exact.enumerate_strings(target_of(model, problem))
    truth = gamma(model, problem)
    strings = helpers.as_strings(found.sequences.tokens, found.sequences.length)
    values = {x: v for x, v in zip(strings, np.exp(found.log_gamma), strict=True) if v > 0}
    assert values.keys() == truth.keys() and len(truth) >= 5
    np.testing.assert_allclose([values[x] for x in truth], list(truth.values()), rtol=1e-4)
    np.testing.assert_allclose(found.log_z, np.log(sum(truth.values())), atol=1e-4)
    law = helpers.law_of(found.sequences.tokens, found.sequences.length, found.log_gamma)
    assert (
        helpers.total_variation(law, {x: v / sum(truth.values()) for x, v in truth.items()}) < 1e-5
    )
    np.testing.assert_allclose(found.probs.sum(), 1, rtol=1e-12)


def test_strings_are_all_strings():
    x = exact.strings(3, 3, 0)
    assert helpers.as_strings(x.tokens, x.length) == list(helpers.strings(3, 3, 0))
    assert len(set(helpers.as_strings(x.tokens, x.length))) == 1 + 2 + 4 + 8
    assert ((np.asarray(x.tokens) == 0) == (np.arange(3) >= np.asarray(x.length)[:, None])).all()


def test_too_many_strings_are_refused():
    message = (
        r"expected at most 1000000 strings to enumerate, got 1111111 \(V=11, T=6\); use a smaller"
        " model or horizon"
    )
    with pytest.raises(ValueError, match=message):
        exact.strings(11, 6, 0)


@pytest.fixture(scope="module")
def found() -> exact.Enumeration:
    return exact.enumerate_strings(target_of("table", "every_1"))


def test_index_finds_every_string(found: exact.Enumeration):
    order = np.random.default_rng(0).permutation(len(found.log_gamma))
    np.testing.assert_array_equal(found.index(found.sequences.tokens[order]), order)
    with pytest.raises(
        ValueError, match="expected strings padded with EOS after their end, got a token after EOS"
    ):
        found.index(jnp.array([[0, EOS, 0, EOS]]))


def test_law_of_a_population(found: exact.Enumeration):
    rows = np.array([5, 9, 5, 70])
    law = found.law(found.sequences.tokens[rows], jnp.log(jnp.array([1.0, 2.0, 3.0, 4.0])) - 500)
    expected = np.zeros(len(found.log_gamma))
    expected[[5, 9, 70]] = 0.4, 0.2, 0.4
    np.testing.assert_allclose(law, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("prefix", [(), (3,), (3, 0), (0, 3, 3, 2)])
def test_suffix_conditionals(found: exact.Enumeration, prefix: tuple[int, ...]):
    truth = {x: v for x, v in gamma("table", "every_1").items() if x[: len(prefix)] == prefix}
    if not truth:
        with pytest.raises(ValueError, match="expected a prefix of positive probability"):
            found.suffix(prefix)
        return
    law = found.suffix(prefix)
    strings = helpers.as_strings(found.sequences.tokens, found.sequences.length)
    values = {x: v for x, v in zip(strings, law, strict=True) if v > 0}
    assert values.keys() == truth.keys()
    np.testing.assert_allclose(
        [values[x] * sum(truth.values()) for x in truth], list(truth.values()), rtol=1e-4
    )


def test_a_suffix_of_an_impossible_prefix_is_refused(found: exact.Enumeration):
    with pytest.raises(
        ValueError, match=r"expected a prefix of positive probability, got \[2\]; shorten it"
    ):
        found.suffix([2])


def test_a_target_without_mass_says_so():
    found = exact.enumerate_strings(plain("markov") * ppl.forced([2]))
    assert found.log_z == -np.inf
    assert dataclasses.is_dataclass(found) and not np.isnan(found.log_gamma).any()
    with pytest.raises(ValueError, match="expected a string of positive density, got none"):
        _ = found.probs
    with pytest.raises(
        ValueError, match="expected a living particle, got a population that is all dead"
    ):
        found.law(found.sequences.tokens[:2], jnp.full(2, -jnp.inf))
