"""What is said after a thought was cut off: the law of the intervention, and not another."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import ppl
from samplers.draws import thinking
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, as_strings
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import plain

NUM, CLOSE = 20_000, (0, 3)


def intervened(name: str, within: int) -> dict[helpers.String, float]:
    """Every string's probability where closing tokens that are due are given, not drawn."""
    p = MODELS[name]()

    def probs(x: helpers.String) -> np.ndarray:
        return np.asarray(jax.nn.softmax(p.prefill([*PROMPT, *x]).logits))

    law: dict[helpers.String, float] = {}

    def grow(x: helpers.String, log: float) -> None:
        if len(x) == MAX_TOKENS:
            law[x] = law.get(x, 0.0) + log
            return
        closed = any(x[i : i + 2] == CLOSE for i in range(len(x) - 1))
        if len(x) >= within and not closed:
            due = CLOSE[1] if x[-1] == CLOSE[0] else CLOSE[0]
            grow((*x, due), log)
            return
        for token, share in enumerate(probs(x)):
            if token == EOS:
                law[x] = law.get(x, 0.0) + log * float(share)
            else:
                grow((*x, token), log * float(share))

    grow((), 1.0)
    return law


@pytest.mark.parametrize("within", [1, 2])
def test_the_law_is_that_of_the_intervention(within: int):
    law = intervened("hmm", within)
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    out = thinking.run(jax.random.key(within), plain("hmm"), CLOSE, within=within, num_samples=NUM)
    x = out.sequences
    check_frequencies(x.tokens, {s: law.get(s, 0.0) for s in helpers.strings(4, 4, EOS)})
    strings = as_strings(x.tokens, x.length)
    assert out.log_q is not None
    np.testing.assert_allclose(np.exp(np.asarray(out.log_q)), [law[s] for s in strings], rtol=1e-4)
    log_p = plain("hmm").log_density(x.tokens, x.length)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-4, atol=1e-5)
    assert out.details is not None
    found = [any(s[i : i + 2] == CLOSE for i in range(len(s) - 1)) for s in strings]
    np.testing.assert_array_equal(out.details["closed"], found)


def test_to_condition_is_another_law():
    within, p = 2, plain("hmm")
    given = ppl.exact.enumerate_strings(p * ppl.closed(CLOSE, within=within))
    conditioned = dict(
        zip(
            as_strings(given.sequences.tokens, given.sequences.length),
            np.asarray(given.probs).tolist(),
            strict=True,
        )
    )
    forced = intervened("hmm", within)
    # What is forced is possible, but for strings that end before, and has other shares.
    both = {x for x, share in conditioned.items() if share > 0 and forced.get(x, 0) > 0}
    ended = {x for x, share in forced.items() if share > 0 and x not in both}
    assert all(len(x) <= within for x in ended)
    one, other = ({x: law[x] for x in both} for law in (conditioned, forced))
    one, other = ({x: v / sum(law.values()) for x, v in law.items()} for law in (one, other))
    assert helpers.total_variation(one, other) > 0.05


@pytest.mark.bad_input
def test_bad_input():
    key, p = jax.random.key(0), plain("hmm")
    with pytest.raises(ValueError, match=r"multiply by ppl\.closed and use smc\.run"):
        thinking.run(key, p**2, CLOSE, within=1)
    with pytest.raises(ValueError, match="room for 3 tokens of thought"):
        thinking.run(key, p, CLOSE, within=3)
    with pytest.raises(ValueError, match="num_samples"):
        thinking.run(key, p, CLOSE, within=1, num_samples=0)
