"""More candidates for uncertain steps: when, and the law of the string, enumerated."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers.search import mur
from tests.helpers import EOS, MAX_TOKENS, String
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import plain
from tests.samplers.search.test_step_search import (
    WIDTH,
    Step,
    next_steps,
    rows,
    score,
    small,
    tie_free,
)

GAMMA, BETA = 0.8, 0.6
RUNS = 8000


def fired(u: list[float], beta: float, gamma: float) -> list[bool]:
    momentum, found = mur.momentum(beta, gamma), []
    for one in u:
        found.append(bool(momentum.fires(jnp.float32(one))))
        momentum = momentum.after(jnp.float32(one))
    return found


def test_constant_uncertainties_never_fire():
    """Without the correction they would, at steps 2 to 15, as published."""
    assert not any(fired([0.5] * 40, 0.9, 0.9))
    published = [0.5 * 0.9**t > -math.log(0.9) for t in range(1, 40)]
    assert sum(published) == 14 and all(published[:14])


def test_the_momentum_by_hand():
    u, found = [0.5, 0.9, 0.4, 1.2], fired([0.5, 0.9, 0.4, 1.2], BETA, GAMMA)
    expected, mean = [False], [0.5]
    for t in range(1, 4):
        weights = BETA ** np.arange(t)[::-1]
        mean.append(float(weights @ u[:t] / weights.sum()))
        expected.append(u[t] > mean[-1] - math.log(GAMMA))
    assert found == expected == [False, True, False, True]


def uncertainty(x: String, longer: Step) -> float:
    y, ended = longer
    tokens = (*y[len(x) :], *([EOS] if ended and len(y) < MAX_TOKENS else []))
    before = [*([x[-1]] if x else [2]), *tokens]
    logs = [math.log(rows()[a][b]) for a, b in itertools.pairwise(before)]
    return -sum(logs) / len(logs)


@functools.cache
def law(steps: str, corrected: bool = True) -> tuple[dict[String, float], float]:
    """The law of the string, and how many steps are drawn."""
    found: dict[String, float] = defaultdict(float)
    drawn = 0.0

    def grow(x: String, us: tuple[float, ...], share: float) -> None:
        nonlocal drawn
        weights = (1 - BETA) * BETA ** np.arange(len(us))[::-1]
        mean = float(weights @ us) if us else math.inf
        mean = mean / weights.sum() if us and corrected else mean
        after: dict[Step, float] = defaultdict(float)
        nexts = next_steps(x, steps)
        for first, q in nexts.items():
            if uncertainty(x, first) <= mean - math.log(GAMMA):
                after[first] += q
                drawn += share * q
                continue
            drawn += share * q * (1 + WIDTH)
            for others in itertools.product(nexts, repeat=WIDTH):
                best = max((first, *others), key=lambda step: score(step[0]))
                after[best] += q * math.prod(nexts[o] for o in others)
        for (y, ended), q in after.items():
            if ended:
                found[y] += share * q
            else:
                grow(y, (*us, uncertainty(x, (y, ended))), share * q)

    grow((), (), 1.0)
    return found, drawn


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["delimiters"])
def test_the_string_has_the_enumerated_law(steps: str):
    expected, drawn = law(steps)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    how = {"every_1": ppl.Steps(every=1), "delimiters": ppl.Steps(delimiters=[2])}[steps]

    def one(key: Any) -> Any:
        out = mur.run(key, small(), tie_free, how, width=WIDTH, gamma=GAMMA, beta=BETA)
        assert out.details is not None
        many = out.details["fired"].sum() * WIDTH + out.details["rounds"]
        return out.chosen.tokens[0], out.cost.tokens, many, out.log_prob[0], out.scores[0]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), RUNS))
    tokens, paid, many, log_prob, scores = (np.asarray(x) for x in found)
    check_frequencies(tokens, expected)
    with pytest.raises(AssertionError):  # as published
        check_frequencies(tokens, law(steps, corrected=False)[0])
    # All that was drawn is paid.
    assert abs(many.mean() - drawn) < 5 * many.std() / RUNS**0.5
    assert (paid == many).all() if steps == "every_1" else (paid >= many).all()
    x = ppl.Sequences(jnp.asarray(tokens), jnp.asarray((tokens != EOS).sum(1), jnp.int32))
    np.testing.assert_allclose(log_prob, small().log_density(x.tokens, x.length), atol=1e-4)
    odds = np.asarray(jax.scipy.special.logit(tie_free(x.tokens, x.length)))
    np.testing.assert_allclose(scores, odds, atol=1e-4)


@pytest.mark.bad_input
def test_bad_input():
    args = (jax.random.key(0), small(), tie_free, ppl.Steps(every=1))
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\) and gamma in \(0, 1\], got 1"):
        mur.run(*args, beta=1.0)
    with pytest.raises(ValueError, match="width"):
        mur.run(*args, width=0)
    with pytest.raises(ValueError, match="expected a plain language model"):
        mur.run(args[0], plain("hmm") ** 2, *args[2:])
