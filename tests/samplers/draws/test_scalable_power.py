"""Scalable power sampling: its law for a given number of rollouts enumerated, the order of its
bias, and its limit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.exact import enumerate_strings
from ppl.target import Target
from samplers.draws import scalable_power
from samplers.results import Draws
from tests.helpers import PROMPT, TraceCounter, markov, table
from tests.samplers.chains import chi_square_z

HORIZON = 3
CHAINS = 8000
ALPHA = 2.5


@functools.cache
def small() -> Target:
    """V = 3, T = 3, every law depending on the whole prefix; alpha = 2.5."""
    logits = 0.8 * jax.random.normal(jax.random.key(6), (tabular.num_prefixes(3, HORIZON), 3))
    return tabular.table(logits, eos=1).given([0], max_tokens=HORIZON) ** ALPHA


@functools.cache
def next_log_p(prefix: tuple[int, ...]) -> np.ndarray:
    """Of `small()`."""
    return np.asarray(jax.nn.log_softmax(small().lm.prefill([0, *prefix]).logits), np.float64)


def rollouts(prefix: tuple[int, ...], horizon: int) -> list[float]:
    """log p of every rollout of at most `horizon` tokens after `prefix`."""
    if prefix[-1:] == (small().lm.eos,) or len(prefix) == HORIZON or horizon == 0:
        return [0.0]
    law = next_log_p(prefix)
    return [
        log_p + rest
        for token, log_p in enumerate(law)
        for rest in rollouts((*prefix, token), horizon - 1)
    ]


def next_law(
    prefix: tuple[int, ...], num: int, candidates: int, horizon: int, estimate: Any
) -> np.ndarray:
    """The law of the next token, all combinations of `num` rollouts summed over."""
    alpha, law = ALPHA, next_log_p(prefix)
    best = np.argsort(-law)[:candidates]
    after = [rollouts((*prefix, int(v)), horizon) for v in best]
    many = [list(itertools.product(log_p, repeat=num)) for log_p in after]
    log_p = np.asarray(list(itertools.product(*many)))  # [combinations, K, M]
    log_power = np.broadcast_to(alpha * law[best], log_p.shape[:2])
    laws, _ = jax.jit(estimate)(
        jnp.asarray(log_power, jnp.float32), jnp.asarray((alpha - 1) * log_p, jnp.float32)
    )
    found = np.zeros(len(law))
    found[best] = np.exp(log_p.sum((1, 2))) @ np.asarray(laws, np.float64)
    return found


def law_of_a_run(num: int, candidates: int, horizon: int, estimate: Any) -> np.ndarray:
    x = enumerate_strings(small()).sequences
    laws: dict[tuple[int, ...], np.ndarray] = {}
    found = np.ones(len(x.length))
    for row, (tokens, n) in enumerate(
        zip(np.asarray(x.tokens).tolist(), np.asarray(x.length), strict=True)
    ):
        for t in range(min(n + 1, HORIZON)):
            prefix = tuple(tokens[:t])
            if prefix not in laws:
                laws[prefix] = next_law(prefix, num, candidates, horizon, estimate)
            found[row] *= laws[prefix][tokens[t]]
    return found


def counted(target: Target, out: Draws) -> np.ndarray:
    exact = enumerate_strings(target)
    return np.bincount(exact.index(out.sequences.tokens), minlength=len(exact.probs))[None]


def check_tokens(out: Draws, num: int) -> None:
    """What `full` draws of `small()`: the strings; for the first token `num` rollouts after both
    letters, of a token and, unless that is EOS, a second one; for the second token as many of one.
    """
    eos, length = small().lm.eos, np.asarray(out.sequences.length)
    drawn = int((length + np.asarray(out.sequences.ended)).sum())
    goes_on = np.asarray([1 - np.exp(next_log_p((v,))[eos]) for v in range(3) if v != eos])
    certain = drawn + 2 * num * (CHAINS + (length > 0).sum())
    mean, variance = (num * CHAINS * x.sum() for x in (goes_on, goes_on * (1 - goes_on)))
    assert abs(int(out.cost.tokens) - certain - mean) < 5 * math.sqrt(variance)


# The law at a finite budget.


@pytest.mark.parametrize(
    ("num", "candidates", "horizon", "estimate"),
    [
        (2, 3, HORIZON, scalable_power.jackknife),
        pytest.param(1, 2, 1, scalable_power.plug_in, marks=pytest.mark.slow),
    ],
)
def test_the_law_of_a_run(num: int, candidates: int, horizon: int, estimate: Any):
    target, key = small(), jax.random.key(0)
    law = law_of_a_run(num, candidates, horizon, estimate)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-5)
    if candidates == 3 and horizon == HORIZON:
        out = scalable_power.full(
            key, target, num_samples=CHAINS, num_rollouts=num, estimate=estimate
        )
        np.testing.assert_allclose(out.details["missing_support"], 0, atol=1e-5)
        check_tokens(out, num)
    else:
        out = scalable_power.run(
            key,
            target,
            num_samples=CHAINS,
            num_candidates=candidates,
            num_rollouts=num,
            horizon=horizon,
            estimate=estimate,
        )
        assert (out.details["missing_support"].max() > 0.01) == (candidates < 3)
    counts = counted(target, out)
    assert abs(chi_square_z(counts, law[None])) < 5
    # So few rollouts are biased, and the counts show it.
    assert chi_square_z(counts[:, law > 0], enumerate_strings(target).probs[None, law > 0]) > 5
    log_p = dataclasses.replace(target, alpha=None).log_density(
        out.sequences.tokens, out.sequences.length
    )
    np.testing.assert_allclose(out.log_prob, log_p, atol=1e-4)
    assert (out.details["num_clipped"].max() > 0) == (estimate is scalable_power.jackknife)


# The bias.


def expected(
    estimate: Any, num: int, values: np.ndarray, chance: np.ndarray, log_power: np.ndarray
) -> np.ndarray:
    """E[pi-hat] of two candidates whose rollouts have two values each: a sum over counts of the
    four pairs.
    """
    pairs = np.asarray(list(itertools.product(range(2), repeat=2)))
    three = (c for c in itertools.product(range(num + 1), repeat=3) if sum(c) <= num)
    counts = np.asarray([(*c, num - sum(c)) for c in three])
    log_many = math.lgamma(num + 1) - np.asarray(
        [[math.lgamma(n + 1) for n in c] for c in counts]
    ).sum(1)
    log_chance = np.log(chance[0, pairs[:, 0]] * chance[1, pairs[:, 1]])
    weight = np.exp(log_many + counts @ log_chance)
    np.testing.assert_allclose(weight.sum(), 1)
    drawn = np.stack([np.repeat(pairs, c, axis=0) for c in counts])  # [combinations, M, K]
    log_values = np.log(
        np.swapaxes(np.stack([values[k][drawn[:, :, k]] for k in range(2)], axis=2), 1, 2)
    )
    with jax.enable_x64(True):
        laws = jax.jit(estimate)(
            jnp.asarray(np.broadcast_to(log_power, (len(counts), 2))), jnp.asarray(log_values)
        )
    return weight @ np.asarray(laws)


@pytest.mark.parametrize(
    ("estimate", "slope"),
    [(lambda *args: scalable_power.plug_in(*args)[0], 1), (scalable_power.jackknife_unclipped, 2)],
    ids=["plug_in", "jackknife"],
)
def test_the_order_of_the_bias(estimate: Any, slope: int):
    """|E[pi-hat] - pi| falls like 1 / M for the plug-in and like 1 / M^2 for the jackknife."""
    values, chance = np.asarray([[0.9, 2.4], [0.3, 1.1]]), np.asarray([[0.7, 0.3], [0.4, 0.6]])
    log_power = np.log([0.45, 0.55])
    truth = np.exp(log_power) * (values * chance).sum(1)
    truth /= truth.sum()
    nums = np.asarray([20, 36])
    bias = [
        np.abs(expected(estimate, int(n), values, chance, log_power) - truth).max() for n in nums
    ]
    fitted = -np.polyfit(np.log(nums), np.log(bias), 1)[0]
    assert abs(fitted - slope) < 0.2


def test_the_jackknife_sums_to_one_and_is_clipped():
    """One rollout that outweighs all others: without it the law is another one, and the estimate
    overshoots.
    """
    log_values = jnp.asarray([[[6.0, 0.0], [0.0, 0.0]]])
    law = scalable_power.jackknife_unclipped(jnp.zeros((1, 2)), log_values)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    assert law.min() < -0.1
    clipped, count = scalable_power.jackknife(jnp.zeros((1, 2)), log_values)
    np.testing.assert_allclose(clipped, [[1.0, 0.0]], atol=1e-6)
    assert count.tolist() == [1]


# The limit.


def four() -> Target:
    """Four strings of two letters: p = (.38, .02 | .33, .27), alpha = 4."""
    first, second = [0.4, 0.0, 0.6], [[0.95, 0.0, 0.05], [1.0, 0.0, 0.0], [0.55, 0.0, 0.45]]
    return (
        tabular.table(jnp.log(jnp.asarray([first, *second])), eos=1).given([0], max_tokens=2) ** 4
    )


@pytest.mark.slow
def test_many_rollouts_give_the_power_target():
    """The published four strings: (.548, .000, .312, .140); low temperature takes the second branch
    with .835.
    """
    target = four()
    exact = enumerate_strings(target)
    letters = exact.index(np.asarray([[0, 0], [0, 2], [2, 0], [2, 2]]))
    np.testing.assert_allclose(exact.probs[letters], [0.548, 0.000, 0.312, 0.140], atol=6e-4)
    np.testing.assert_allclose(0.6**4 / (0.4**4 + 0.6**4), 0.835, atol=1e-3)
    out = scalable_power.full(jax.random.key(1), target, num_samples=4000, num_rollouts=40)
    law = counted(target, out)[0] / 4000
    np.testing.assert_allclose(law[letters], exact.probs[letters], atol=5 * 0.5 / math.sqrt(4000))


# What else is promised.


@pytest.mark.slow
def test_chains_costs_and_compilation():
    target = table().given(PROMPT, max_tokens=4) ** 3
    counter = TraceCounter(scalable_power.plug_in)
    options: dict[str, Any] = {"num_candidates": 2, "num_rollouts": 3, "estimate": counter}
    few, many = (
        scalable_power.run(jax.random.key(3), target, num_samples=n, **options) for n in (2, 5)
    )
    np.testing.assert_array_equal(few.sequences.tokens, many.sequences.tokens[:2])
    traces = counter.count
    scalable_power.run(
        jax.random.key(4), table().given((3, 2), max_tokens=4) ** 2, num_samples=5, **options
    )
    assert counter.count == traces > 0
    drawn = int((many.sequences.length + many.sequences.ended).sum())
    assert drawn < int(many.cost.tokens) <= drawn + 5 * 2 * 3 * (3 + 2 + 1)
    assert int(many.cost.forwards) <= 4 + 3 + 2 + 1


@pytest.mark.bad_input
def test_bad_input():
    p, key = markov().given(PROMPT, max_tokens=3), jax.random.key(0)
    for name in ("num_samples", "num_candidates", "num_rollouts", "horizon"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            scalable_power.run(key, p, **options)
    with pytest.raises(ValueError, match="expected at most as many candidates as tokens, 4, got 5"):
        scalable_power.run(key, p, num_candidates=5)
    with pytest.raises(ValueError, match="expected at least 2 rollouts for the jackknife"):
        scalable_power.full(key, p, num_rollouts=1)
    with pytest.raises(ValueError, match="without a potential"):
        scalable_power.full(key, p * ppl.banned([0]))
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha above 0"):
            scalable_power.full(key, dataclasses.replace(p, alpha=jnp.float32(alpha)))
