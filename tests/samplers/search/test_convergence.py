"""Thoughts that stop when answers agree: the law of what is returned, enumerated, and its cost."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import jax
import numpy as np
import pytest

import ppl
from models import tabular
from samplers.search import convergence
from tests.helpers import EOS, String, as_strings

T, V, NUM, CLOSE = 5, 4, 2, (3,)
SAMPLES = 6000


@functools.cache
def p() -> Any:
    lm = tabular.random_table(jax.random.key(5), V, T + 2, eos=EOS)
    return lm.given([2], max_tokens=T)


@functools.cache
def probs(x: String) -> list[float]:
    logits = p().lm.prefill([2, *x]).logits
    return np.asarray(jax.nn.softmax(logits), np.float64).tolist()


def answer(x: String, size: int) -> String:
    """The likeliest answer after closing."""
    found: String = ()
    before = (*x, *CLOSE)
    while len(found) < size and (token := int(np.argmax(probs((*before, *found))))) != EOS:
        found = (*found, token)
    return found


Said = tuple[String, ...]
"""The answers so far."""


@functools.cache
def law(every: int, size: int) -> tuple[dict[String, float], float, float]:
    """Every string's probability, and the expectations of looks and of convergence."""
    most = T - len(CLOSE) - size
    found: dict[String, float] = defaultdict(float)
    looks = converged = 0.0

    def free(x: String, share: float) -> None:
        if len(x) == T:
            found[x] += share
            return
        for token, q in enumerate(probs(x)):
            if token == EOS:
                found[x] += share * q
            else:
                free((*x, token), share * q)

    def think(x: String, said: Said, share: float) -> None:
        nonlocal looks, converged
        if len(x) >= most:
            free((*x, *CLOSE), share)
            return
        for token, q in enumerate(probs(x)):
            longer, now, more = (*x, token), said, share * q
            if token == EOS:
                found[x] += more
            elif token == CLOSE[0]:
                free(longer, more)
            else:
                if len(longer) % every == 0:
                    looks += more
                    now = (*said, answer(longer, size))
                    if len(now) >= NUM and len(set(now[-NUM:])) == 1 and now[-1]:
                        whole = (*longer, *CLOSE, *now[-1])
                        converged += more
                        if len(now[-1]) < size:
                            found[whole] += more
                        else:
                            free(whole, more)
                        continue
                think(longer, now, more)

    think((), (), 1.0)
    return found, looks, converged


def run(every: int, size: int, num: int) -> Any:
    options = {"num": num, "answer_tokens": size, "num_samples": SAMPLES}
    return convergence.run(jax.random.key(8), p(), CLOSE, ppl.Steps(every=every), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "size"), [(1, 1), (1, 2)])
def test_the_law_is_enumerated(every: int, size: int):
    expected, looks, converged = law(every, size)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5) and 0.1 < converged < 0.9
    out = run(every, size, NUM)
    x = as_strings(out.sequences.tokens, out.sequences.length)
    counts = {s: x.count(s) / SAMPLES for s in set(x)}
    assert set(counts) <= set(expected)
    for s, share in expected.items():
        error = (share * (1 - share) / SAMPLES) ** 0.5
        assert abs(counts.get(s, 0.0) - share) < 5 * error + 1e-4, s
    details = out.details
    assert details is not None
    assert abs(details["converged"].mean() - converged) < 5 / (2 * SAMPLES**0.5)
    assert abs(details["looks"].mean() - looks) < 5 * T / SAMPLES**0.5
    log_p = p().log_density(out.sequences.tokens, out.sequences.length)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-4, atol=1e-5)
    # A look takes the closing token, and an answer or its end.
    least, most = (SAMPLES * float(details["looks"].mean()) * n for n in (2, 1 + size))
    assert least <= int(details["looking"].tokens) * (1 + 1e-6) <= most * (1 + 2e-6)
    assert int(details["looking"].tokens) < int(out.cost.tokens)


def test_where_nothing_agrees_it_is_thinking_by_force():
    out = run(1, 1, 9)
    assert out.details is not None
    assert not out.details["converged"].any()
    most = T - 2
    for x in as_strings(out.sequences.tokens, out.sequences.length):
        assert len(x) <= most or CLOSE[0] in x[: most + 1]
    assert int(out.details["thought"].max()) <= most


@pytest.mark.bad_input
def test_bad_input():
    args = (jax.random.key(0), p(), CLOSE, ppl.Steps(every=1))
    with pytest.raises(ValueError, match="expected room for a thought, 1 closing tokens and 4"):
        convergence.run(*args, answer_tokens=4)
    with pytest.raises(ValueError, match="expected a plain language model"):
        convergence.run(jax.random.key(0), p() ** 2, CLOSE, args[3], answer_tokens=1)
    with pytest.raises(ValueError, match="num"):
        convergence.run(*args, num=0, answer_tokens=1)
