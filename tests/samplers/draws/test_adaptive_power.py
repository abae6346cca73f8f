"""Adaptive power sampling: the identity behind its gradient, and every step of the controller."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.exact import enumerate_strings
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Cost
from samplers.draws import adaptive_power, low_temperature
from samplers.results import Choice
from tests.helpers import EOS, MAX_TOKENS, PROMPT, markov
from tests.samplers.problems import plain


def correct(x: Sequences) -> np.ndarray:
    """Some half of all strings."""
    return ((np.asarray(x.tokens) * (1 + np.arange(x.tokens.shape[1]))).sum(1) % 3 == 0).astype(
        float
    )


def power_law(log_p: np.ndarray, alpha: float) -> np.ndarray:
    return np.exp(alpha * log_p - np.logaddexp.reduce(alpha * log_p))


@pytest.mark.parametrize("model", ["table", pytest.param("hmm", marks=pytest.mark.slow)])
def test_the_derivative_of_the_success_rate(model: str):
    """dP / dalpha = Cov(r, log p) = P (1 - P) delta, and d delta / dalpha = var_C - var_I, by
    central differences.
    """
    exact = enumerate_strings(plain(model))
    inside = exact.probs > 0
    log_p, r = exact.log_gamma[inside], correct(exact.sequences)[inside]
    alpha, h = 1.7, 1e-4

    def moments(alpha: float) -> tuple[float, float, float]:
        """P, delta, and var_C - var_I."""
        law = power_law(log_p, alpha)
        parts = [law * keep / (law * keep).sum() for keep in (r, 1 - r)]
        means = [part @ log_p for part in parts]
        variances = [part @ log_p**2 - mean**2 for part, mean in zip(parts, means, strict=True)]
        return float(law @ r), float(means[0] - means[1]), float(variances[0] - variances[1])

    p, delta, spread = moments(alpha)
    law = power_law(log_p, alpha)
    covariance = law @ (r * log_p) - (law @ r) * (law @ log_p)
    slopes = [(moments(alpha + h)[i] - moments(alpha - h)[i]) / (2 * h) for i in range(2)]
    assert abs(covariance) > 0.01
    np.testing.assert_allclose([covariance, p * (1 - p) * delta], slopes[0], rtol=1e-6)
    np.testing.assert_allclose(spread, slopes[1], rtol=1e-6)
    # With correctness itself for agreement, g estimates that derivative over the spread of log p.
    drawn = np.random.default_rng(0).choice(len(law), 200_000, p=law)
    g = adaptive_power.gradient(r[drawn], log_p[drawn])
    assert abs(g - covariance / np.sqrt(law @ log_p**2 - (law @ log_p) ** 2)) < 5 * 0.5 / math.sqrt(
        200_000
    )


def test_agreement_gradient_and_vote():
    answers = np.asarray([3, 3, -1, 5, 3, 5, -1])
    v = adaptive_power.agreement(answers)
    np.testing.assert_allclose(v, np.asarray([2, 2, 0, 1, 2, 1, 0]) / 6)
    log_p = np.asarray([-1.0, -4.0, -2.0, -0.5, -3.0, -1.0, -9.0])
    z = (log_p - log_p.mean()) / log_p.std()
    np.testing.assert_allclose(adaptive_power.gradient(v, log_p), ((v - v.mean()) * z).mean())
    assert adaptive_power.gradient(v, np.full(7, -2.0)) == 0
    assert adaptive_power.vote(answers, log_p) == (3, 0)
    # Of two answers given as often, the one with the greater mean log p.
    assert adaptive_power.vote(answers[1:], log_p[1:]) == (5, 2)
    assert adaptive_power.vote(np.asarray([-1, -1]), np.asarray([-2.0, -1.0])) == (-1, 1)


# The controller.


@dataclasses.dataclass(frozen=True)
class Batch:
    sequences: Sequences
    log_prob: jax.Array
    cost: Cost = Cost(tokens=jnp.int32(5), forwards=jnp.int32(2))


class Script:
    """A sampler that returns what is written down: (answers, log p) of each batch in turn."""

    def __init__(self, *batches: tuple[list[int], list[float]]):
        self.batches, self.alphas, self.keys = batches, [], []

    def __call__(self, key: Any, target: Target) -> Batch:
        given, log_prob = self.batches[min(len(self.alphas), len(self.batches) - 1)]
        assert target.alpha is not None
        self.alphas.append(float(target.alpha))
        self.keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        tokens = jnp.full((len(given), MAX_TOKENS), EOS).at[:, 0].set(jnp.asarray(given))
        return Batch(
            Sequences(tokens, jnp.ones(len(given), jnp.int32)), jnp.asarray(log_prob, jnp.float32)
        )


def read(x: Sequences) -> np.ndarray:
    return np.asarray(x.tokens)[:, 0]


RISING = ([2, 2, 2, 3], [-1.0, -1.5, -1.2, -6.0])
FALLING = ([2, 2, 2, 3], [-6.0, -5.5, -5.2, -1.0])
LEVEL = ([2, 2, 3, 3], [-1.0, -2.0, -2.0, -1.0])


def step_of(batch: tuple[list[int], list[float]]) -> float:
    given, log_prob = (np.asarray(part) for part in batch)
    return adaptive_power.gradient(adaptive_power.agreement(given), log_prob.astype(float))


def run(script: Script, **options: Any) -> Choice:
    return adaptive_power.run(jax.random.key(0), plain("hmm"), script, read, **options)


def test_alpha_follows_the_gradient_and_stops():
    """Up, down, then no agreement to gain: the rest is drawn there, and voted on."""
    script = Script(RISING, FALLING, ([2, 2, 2, 3], [-1.0, -3.0, -2.0, -2.0]))
    up, down = step_of(RISING), step_of(FALLING)
    assert up > 0.1 and down < -0.1
    out = run(script, alpha=2.0, learning_rate=1.5, num_batches=5)
    a = [2.0, 2.0 + 1.5 * up, 2.0 + 1.5 * (up + down)]
    np.testing.assert_allclose(script.alphas, [*a, a[2], a[2]], rtol=1e-5)
    np.testing.assert_allclose(out.details["alphas"], script.alphas, rtol=1e-6)
    np.testing.assert_allclose(out.details["gradients"], [up, down, 0.0, np.nan, np.nan], atol=1e-6)
    assert (
        out.details["alpha"] == pytest.approx(a[2])
        and out.details["passed"].all()
        and out.details["answer"] == 2
        and out.best == 0
    )
    assert (
        len(out.details["answers"]) == 3 * 4 == out.sequences.tokens.shape[0]
        and int(out.cost.tokens) == 5 * 5
    )
    assert len(set(script.keys)) == 5


def test_alpha_stays_within_bounds():
    out = run(Script(RISING), alpha=2.0, bounds=(1.0, 3.0), learning_rate=100.0, num_batches=4)
    np.testing.assert_allclose(out.details["alphas"], [2, 3, 3, 3])
    assert np.isfinite(out.details["gradients"]).tolist() == [True, True, False, False]
    out = run(Script(FALLING), alpha=2.0, bounds=(1.5, 3.0), learning_rate=100.0, num_batches=3)
    np.testing.assert_allclose(out.details["alphas"], [2, 1.5, 1.5])


def test_where_all_agree_equally_more_are_drawn():
    """Two answers, two strings each: no direction; with the next batch, which goes to one of them,
    there is.
    """
    script = Script(LEVEL, RISING, LEVEL)
    out = run(script, alpha=2.0, learning_rate=1.0, num_batches=3)
    assert np.isnan(out.details["gradients"][0]) and out.details["alphas"][1] == 2.0
    both = step_of((LEVEL[0] + RISING[0], LEVEL[1] + RISING[1]))
    np.testing.assert_allclose(out.details["gradients"][1], both, rtol=1e-5)


def test_a_batch_that_is_not_accepted_sends_alpha_back():
    script = Script(RISING)
    out = run(script, alpha=2.0, num_batches=4, accept=lambda batch: len(script.alphas) != 2)
    assert (
        out.details["alphas"][1] > 2
        and out.details["alphas"][[0, 2, 3]].tolist() == [2.0] * 3
        and out.details["alpha"] == 2.0
    )
    assert (
        out.details["passed"].tolist() == [True, False, True, True]
        and len(out.details["answers"]) == 3 * 4
    )
    # Without any accepted batch: alpha = 1.
    out = run(Script(RISING), alpha=2.0, num_batches=3, accept=lambda batch: False)
    assert out.details["alphas"].tolist() == [2.0, 1.0, 1.0] and out.details["alpha"] == 1.0


@pytest.mark.slow
def test_it_takes_the_samplers_there_are():
    """With the first token for an answer; another alpha compiles nothing new."""

    def sample(key: Any, target: Target) -> Any:
        return low_temperature.run(key, target, num_samples=64)

    p = plain("hmm")
    out = adaptive_power.run(jax.random.key(1), p, sample, read, num_batches=3)
    assert (
        out.details["alphas"][0] == 2.0
        and (out.details["alphas"] >= 1).all()
        and (out.details["alphas"] <= 8).all()
    )
    np.testing.assert_allclose(
        out.log_prob, p.log_density(out.sequences.tokens, out.sequences.length), atol=1e-4
    )
    assert (
        np.bincount(out.details["answers"]).argmax()
        == out.details["answer"]
        == out.details["answers"][out.best]
    )


@pytest.mark.bad_input
def test_bad_input():
    p, key = markov().given(PROMPT, max_tokens=MAX_TOKENS), jax.random.key(0)

    def start(p: Target = p, answers: Any = read, **options: Any) -> Any:
        return adaptive_power.run(key, p, Script(RISING), answers, **options)

    for alpha in (0.0, -1.0, math.nan, 9.0):
        with pytest.raises(ValueError, match="expected 0 < alpha_min <= alpha <= alpha_max"):
            start(alpha=alpha)
    with pytest.raises(ValueError, match="expected 0 < alpha_min <= alpha <= alpha_max"):
        start(bounds=(3.0, 1.0))
    for options in ({"learning_rate": 0.0}, {"learning_rate": math.nan}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="expected a learning rate above 0 and a tolerance"):
            start(**options)
    with pytest.raises(ValueError, match="expected at least 2 batches"):
        start(num_batches=1)
    for target in (p**2, p * ppl.banned([0])):
        with pytest.raises(ValueError, match="expected a plain language model"):
            start(target)
    for answers in (lambda x: np.zeros(3, int), lambda x: np.zeros(4)):
        with pytest.raises(ValueError, match="expected one whole number for each of 4 strings"):
            start(answers=answers)
