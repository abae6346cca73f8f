"""Closing tokens: the automaton against search in lists, the potential against what it says."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact
from ppl.testing import check_potential
from ppl.thinking import closing
from tests.helpers import EOS, VOCAB_SIZE, as_strings
from tests.samplers.problems import plain

T = 5
CLOSINGS = [(3,), (0, 3), (3, 3), (0, 0, 3)]


def begins(x: tuple[int, ...], close: tuple[int, ...]) -> int:
    """Where the closing tokens first begin; len(x) if nowhere."""
    places = (at for at in range(len(x)) if x[at : at + len(close)] == close)
    return next(places, len(x))


@pytest.mark.parametrize("close", CLOSINGS)
def test_the_automaton_finds_the_tokens(close: tuple[int, ...]):
    automaton = closing(close)
    texts = np.array(list(itertools.product((0, 2, 3), repeat=6)))
    state = automaton.start(len(texts))
    for t, column in enumerate(texts.T):
        state = automaton.after(state, jnp.asarray(column, jnp.int32))
        found = [begins(tuple(x[: t + 1]), close) < t + 1 for x in texts]
        np.testing.assert_array_equal(automaton.closed(state), found)


@pytest.mark.parametrize("within", [1, 2])
@pytest.mark.parametrize("close", CLOSINGS)
def test_the_potential_is_what_it_says(close: tuple[int, ...], within: int):
    target = plain("hmm").lm.given([2, 0], max_tokens=T) * ppl.closed(close, within=within)
    x = exact.strings(VOCAB_SIZE, T, EOS)
    found = np.exp(np.asarray(target.log_potential(x.tokens, x.length)))
    places = [(begins(s, close), len(s)) for s in as_strings(x.tokens, x.length)]
    np.testing.assert_array_equal(found, [at < num and at <= within for at, num in places])


def test_it_obeys_the_laws_of_potentials():
    key = jax.random.key(0)
    sizes = {"vocab_size": VOCAB_SIZE, "eos": EOS, "max_tokens": T}
    check_potential(ppl.closed([0, 3], within=2), **sizes, key=key)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ppl.closed([], within=1), "number of closing tokens"),
        (lambda p: ppl.closed(3, within=1), r"a list of ids, got 3; pass tok\.encode"),
        (lambda p: ppl.closed("stop", within=1), "a list of ids, got 'stop'"),
        (lambda p: ppl.closed([3], within=0), "within"),
        (lambda p: p * ppl.closed([EOS], within=1), "closing tokens other than EOS"),
        (lambda p: p * ppl.closed([9], within=1), r"closing token ids in \[0, 4\), got 9"),
        (lambda p: p * ppl.closed([0, 3], within=3), "room for 3 tokens of thought and 2"),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(ValueError, match=message):
        make(plain("hmm"))
