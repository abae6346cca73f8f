"""Answers to cut-off thoughts: the law of each, and their joint law on the tree of a thought."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from samplers.draws import fractured
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, String, strings
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.draws.test_thinking import CLOSE, intervened
from tests.samplers.problems import code, dense, plain

NUM, DEPTHS, EACH = 8000, [1, 2], 2
NUM_CODES = 256


@functools.cache
def probs(x: String) -> list[float]:
    logits = MODELS["hmm"]().prefill([*PROMPT, *x]).logits
    return np.asarray(jax.nn.softmax(logits), np.float64).tolist()


def is_closed(x: String) -> bool:
    return any(x[i : i + 2] == CLOSE for i in range(len(x) - 1))


def thoughts(most: int) -> dict[tuple[String, bool], float]:
    """Probability of every thought, and whether the string ended with it."""
    law: dict[tuple[String, bool], float] = {}

    def grow(x: String, share: float) -> None:
        if len(x) == most or is_closed(x):
            law[x, False] = law.get((x, False), 0.0) + share
            return
        for token, p in enumerate(probs(x)):
            if token == EOS:
                law[x, True] = law.get((x, True), 0.0) + share * p
            else:
                grow((*x, token), share * p)

    grow((), 1.0)
    return law


def answers(x: String, ended: bool, depth: int) -> np.ndarray:
    """The law of an answer to a thought cut at `depth` [codes]."""
    law: dict[String, float] = {}

    def grow(x: String, share: float) -> None:
        if len(x) == MAX_TOKENS:
            law[x] = law.get(x, 0.0) + share
        elif len(x) >= depth and not is_closed(x):
            grow((*x, CLOSE[1] if x[-1] == CLOSE[0] else CLOSE[0]), share)
        else:
            for token, p in enumerate(probs(x)):
                if token == EOS:
                    law[x] = law.get(x, 0.0) + share * p
                else:
                    grow((*x, token), share * p)

    if ended and len(x) < depth:
        law[x] = 1.0
    else:
        grow(x[:depth], 1.0)
    return dense(law)


def joint(first: int, second: int) -> np.ndarray:
    """The law of an answer at one depth and one at another, of one thought [codes, codes]."""
    parts = thoughts(DEPTHS[-1]).items()
    return sum(
        (p * np.outer(answers(*x, first), answers(*x, second)) for x, p in parts),
        np.zeros((NUM_CODES, NUM_CODES)),
    )


@functools.cache
def drawn() -> Any:
    return fractured.run(
        jax.random.key(2), plain("hmm"), CLOSE, depths=DEPTHS, num_thoughts=NUM, num_samples=EACH
    )


def codes() -> np.ndarray:
    return np.asarray(code(drawn().sequences.tokens)).reshape(NUM, len(DEPTHS), EACH)


@pytest.mark.parametrize("h", range(len(DEPTHS)))
def test_every_answer_has_the_law_of_thinking_at_its_depth(h: int):
    law = intervened("hmm", DEPTHS[h])
    out, shape = drawn(), (NUM, len(DEPTHS), EACH)
    every = {s: law.get(s, 0.0) for s in strings(4, MAX_TOKENS, EOS)}
    tokens = np.asarray(out.sequences.tokens).reshape(*shape, -1)[:, h]
    for j in range(EACH):
        check_frequencies(tokens[:, j], every)
    log_q = np.asarray(out.log_q).reshape(shape)[:, h].ravel()
    np.testing.assert_allclose(np.exp(log_q), dense(every)[codes()[:, h].ravel()], rtol=1e-4)
    log_p = plain("hmm").log_density(out.sequences.tokens, out.sequences.length)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 0), (1, 1))])
def test_two_answers_have_the_joint_law_of_their_tree(pair: Any):
    (h, j), (g, k) = pair
    law = joint(DEPTHS[h], DEPTHS[g])
    assert law.sum() == pytest.approx(1, abs=1e-5)
    found = np.zeros_like(law)
    np.add.at(found, (codes()[:, h, j], codes()[:, g, k]), 1 / NUM)
    assert not found[law == 0].any()
    often = law * NUM > 25
    z = (found - law)[often] / np.sqrt(law[often] * (1 - law[often]) / NUM)
    assert often.sum() > 15 and np.abs(z).max() < 5
    # Answers to different thoughts would be this far off.
    apart = np.outer(law.sum(1), law.sum(0))
    assert np.abs((apart - law)[often] / np.sqrt(law[often] / NUM)).max() > 20


def test_what_it_cost():
    out = drawn()
    thinking, answering = out.details["thinking"], out.details["answering"]
    length = np.asarray(out.sequences.length).reshape(NUM, len(DEPTHS), EACH)
    own = np.asarray(out.details["thought"]).reshape(NUM, len(DEPTHS), EACH)
    assert (own[..., 0] == own[..., 1]).all() and (own[:, 0] <= own[:, 1]).all()
    # Of a string that ended as a thought, its end was drawn there.
    ended = (
        (length == own) & (own < DEPTHS[-1]) & ~np.asarray(out.details["closed"]).reshape(own.shape)
    )
    over = ended & (own < np.asarray(DEPTHS)[:, None])
    assert int(thinking.tokens) == own[:, -1, 0].sum() + over[:, -1, 0].sum()
    drawn_after = np.where(over, 0, length - own + (length < MAX_TOKENS))
    assert int(answering.tokens) == drawn_after.sum()
    assert int(out.cost.tokens) == int(thinking.tokens) + int(answering.tokens)
    assert int(out.cost.depth) == 1 + (DEPTHS[-1] - 1) + (MAX_TOKENS - DEPTHS[0])


@pytest.mark.bad_input
@pytest.mark.parametrize("depths", [[], [2, 1], [1, 1], [0, 2], [1.0, 2.0]])
def test_depths_that_are_none(depths: Any):
    with pytest.raises(ValueError, match="expected depths as increasing whole numbers from 1"):
        fractured.run(jax.random.key(0), plain("hmm"), CLOSE, depths=depths)


@pytest.mark.bad_input
def test_bad_input():
    key, p = jax.random.key(0), plain("hmm")
    with pytest.raises(ValueError, match=r"multiply by ppl\.closed and use smc\.run"):
        fractured.run(key, p**2, CLOSE, depths=[1])
    with pytest.raises(ValueError, match="room for 3 tokens of thought"):
        fractured.run(key, p, CLOSE, depths=[1, 3])
    with pytest.raises(ValueError, match="num_samples"):
        fractured.run(key, p, CLOSE, depths=[1], num_samples=0)
