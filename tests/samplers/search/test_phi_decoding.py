"""phi-decoding: its rules by hand, and the law of its choice enumerated."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.sequences import Sequences
from samplers.search import phi_decoding
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, String
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import plain
from tests.samplers.search.test_step_search import next_steps, rows, small

KEY = jax.random.key(6)
WIDTH = 3


def test_weights_by_hand():
    a, c = np.array([0.4, -0.2, 0.1]), np.array([2, 2, 1]) / 3

    def softmax(x: Any) -> Any:
        return np.exp(x) / np.exp(x).sum()

    found = phi_decoding.paper(jnp.asarray(a), jnp.asarray(c))
    np.testing.assert_allclose(found, softmax(a / 0.6) + softmax(c / 0.6), rtol=1e-5)
    published = phi_decoding.code(jnp.asarray(a), jnp.asarray(c))
    np.testing.assert_allclose(np.exp(published), (softmax(a / 0.1) + softmax(c)) / 2, rtol=1e-5)


def test_what_is_pruned():
    mean, alive = jnp.array([-1.0, -1.1, -0.9, -3.0, -9.0]), jnp.array([True] * 4 + [False])
    np.testing.assert_array_equal(
        phi_decoding.prune(KEY, mean, alive, 2), [True, True, True, False, False]
    )
    # Seven that stay, and of the two others one is drawn back in proportion to exp(s / 0.1).
    keys = jax.random.split(KEY, 4000)
    mean = jnp.array([5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 0.0, -0.05])
    found = jax.vmap(lambda k: phi_decoding.prune(k, mean, jnp.ones(9, bool), 8))(keys)
    assert np.asarray(found[:, :7]).all() and (np.asarray(found).sum(1) == 8).all()
    helpers.assert_z(found[:, 7], 1 / (1 + math.exp(-0.5)), resolution=0.01)


def test_clusters_are_of_equal_words():
    tokens, length = helpers.as_arrays(
        [(0, 0), (0, 0, 0), (2, 2), (3, 3, 3, 3), (2, 2, 2), (0,), (3,)], MAX_TOKENS, EOS
    )
    living = jnp.array([True] * 6 + [False])
    share = phi_decoding.clusters(Sequences(tokens, length), living, 4)
    np.testing.assert_allclose(share, [1 / 2, 1 / 2, 1 / 3, 1 / 6, 1 / 3, 1 / 2, 0], atol=1e-6)


def nobody(x: Any, living: Any, vocab_size: int) -> Any:
    """Nothing agrees."""
    return jnp.zeros(living.shape, jnp.float32)


def log_p(x: String, before: String = ()) -> list[float]:
    """log p of the tokens of x, EOS too, after a prefix of it."""
    found = []
    for t in range(len(before), min(len(x) + 1, MAX_TOKENS)):
        token = x[t] if t < len(x) else EOS
        found.append(math.log(rows()[x[t - 1] if t else 2][token]))
    return found


def one_round_law() -> dict[String, float]:
    """A single string, of whose next tokens one is drawn; then it goes to its end."""
    whole = next_steps((), None)
    strings = [(x, mass) for (x, _), mass in whole.items()]
    chosen: dict[String, float] = defaultdict(float)
    for draws in itertools.product(strings, repeat=WIDTH):
        mass = math.prod(m for _, m in draws)
        firsts = [log_p(x)[0] for x, _ in draws]
        keeps = [s >= np.mean(firsts) - np.std(firsts) - 1e-5 for s in firsts]
        rests = [log_p(x, x[:1])[0 if x else 1 :] for x, _ in draws]
        foresight = [np.mean(r) if r else s for r, s in zip(rests, firsts, strict=True)]
        shares = np.exp(np.where(keeps, foresight, -np.inf) / 0.6)
        weights = np.where(keeps, np.exp(shares / shares.sum()), 0.0)
        for (x, _), w in zip(draws, weights / weights.sum(), strict=True):
            chosen[x[:1]] += mass * w
    law: dict[String, float] = defaultdict(float)
    for first, mass in chosen.items():
        inside = {x: m for x, m in strings if x[:1] == first}
        for x, m in inside.items():
            law[x] += mass * m / sum(inside.values())
    return law


@pytest.mark.slow
def test_the_choice_has_the_enumerated_law():
    p = small()

    def one(key: Any) -> Any:
        options = {"num_beams": 1, "width": WIDTH, "min_steps": 1, "max_steps": 1}
        steps = ppl.Steps(every=1)
        out = phi_decoding.run(key, p, steps, **options, temperature=1.0, align=nobody)
        return out.chosen.tokens[0]

    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, 40_000))
    law = one_round_law()
    assert abs(sum(law.values()) - 1) < 1e-6
    check_frequencies(found, law)
    with pytest.raises(AssertionError):  # without foresight it would be p
        check_frequencies(found, {x: m for (x, _), m in next_steps((), None).items()})


@pytest.mark.slow
def test_what_a_search_returns():
    out = phi_decoding.run(
        KEY, plain("table"), ppl.Steps(every=1), num_beams=3, width=2, min_steps=1, max_steps=3
    )
    x, details = out.sequences, out.details
    expected = plain("table").log_density(x.tokens, x.length)
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-4)
    assert 1 <= int(details["rounds"]) <= 3 and out.scores[out.best] == out.scores.max()
    assert np.isfinite(details["log_weights"]).all()
    # All agree at once.
    agreed = phi_decoding.run(
        KEY, plain("table"), ppl.Steps(every=1), num_beams=3, min_steps=2, align=everybody
    )
    assert int(agreed.details["rounds"]) == 2


def everybody(x: Any, living: Any, vocab_size: int) -> Any:
    return jnp.where(living, 1.0, 0.0).astype(jnp.float32)


@pytest.mark.bad_input
def test_bad_input():
    args = (KEY, plain("hmm"), ppl.Steps(every=1))
    with pytest.raises(ValueError, match="min_steps of at most max_steps, got 9 and 8; pass max_s"):
        phi_decoding.run(*args, min_steps=9)
    with pytest.raises(ValueError, match="expected a plain language model"):
        phi_decoding.run(KEY, plain("hmm") ** 2, args[2])
    with pytest.raises(ValueError, match="expected align to be a function of x, living"):
        phi_decoding.run(*args, align="clusters")
    with pytest.raises(ValueError, match="emperature"):
        phi_decoding.run(*args, temperature=0.0)
