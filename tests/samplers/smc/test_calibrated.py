"""Draws by a fitted law are properly weighted for the model, and the fit is at its optimum."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tabular
from ppl.exact import enumerate_strings
from ppl.sequences import Sequences
from samplers.smc import calibrated, importance
from samplers.smc.calibrated import Calibrated
from tests.helpers import z_score

KEY, EOS, T = jax.random.key(5), 1, 3
LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.3], [0.3, 0.4, 0.3], [0.2, 0.3, 0.5]]))
P = tabular.markov(jnp.exp(LOGITS), eos=EOS).given(jnp.array([0]), max_tokens=T)


def score(tokens, length):
    """Twos, best of all at the beginning."""
    inside = jnp.arange(tokens.shape[1]) < length[:, None]
    return ((tokens == 2) & inside) @ jnp.array([2.0, 1.0, 1.0])


def means(num: int = 3000, **options) -> np.ndarray:
    """exp(log_z) times the weighted mean of the score and of 1, of many small runs."""

    def one(key):
        out = calibrated.run(key, P, score, num_first=4, num_second=6, top=2, **options)
        values = jnp.stack([jnp.ones(10), score(out.samples.tokens, out.samples.length)])
        return jnp.exp(out.log_z) * (jnp.exp(out.log_weights) * values).mean(axis=1)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, num)), np.float64)


def truth() -> np.ndarray:
    every = enumerate_strings(P).sequences
    p = np.exp(np.asarray(P.log_density(every.tokens, every.length), np.float64))
    return np.array([p.sum(), p @ np.asarray(score(every.tokens, every.length))])


def test_law_1():
    found = means(ridge=0.3)
    for values, expected in zip(found.T, truth(), strict=True):
        assert abs(z_score(values, expected)[0]) < 5
    assert found.std(axis=0).max() / len(found) ** 0.5 < 0.03


@pytest.mark.slow
def test_pooling_without_weights_fails(monkeypatch: pytest.MonkeyPatch):
    """As published."""
    real = importance.run

    def unweighted(*args, **options):
        out = real(*args, **options)
        return dataclasses.replace(out, log_weights=jnp.zeros_like(out.log_weights))

    monkeypatch.setattr(calibrated.importance, "run", unweighted)
    jax.clear_caches()
    assert abs(z_score(means(ridge=0.31)[:, 1], truth()[1])[0]) > 5
    jax.clear_caches()


def test_the_fit_is_where_its_gradient_vanishes():
    x = Sequences(jnp.array([[2, 2, 0], [0, 2, 1]]), jnp.array([3, 2]))
    how = jax.jit(calibrated.fitted)(P, x, 0.1)
    delta, temperature = (np.asarray(part, np.float64) for part in (how.delta, how.temperature))
    # (token before, token): the end of the second is one, where the horizon cuts is none.
    moves = [(0, 2), (2, 2), (2, 0), (0, 0), (0, 2), (2, EOS)]
    surprise, slope = np.zeros(3), 0.0
    for before, token in moves:
        biased = (np.asarray(LOGITS[before], np.float64) + delta) / temperature
        q = np.exp(biased) / np.exp(biased).sum()
        surprise += (np.eye(3)[token] - q) / temperature / len(moves)
        slope += (biased[token] - q @ biased) / len(moves)
    np.testing.assert_allclose(surprise, 0.1 * delta, atol=2e-4)
    np.testing.assert_allclose(slope, -0.1 * np.log(temperature), atol=2e-4)
    assert delta[2] > 0.1


def test_nothing_fitted_is_more_of_the_model():
    plain = Calibrated(jnp.zeros(3), jnp.float32(1))
    out = importance.run(KEY, P, num_particles=8, proposal=plain)
    np.testing.assert_allclose(out.log_weights, 0.0, atol=1e-5)
    out = calibrated.run(KEY, P, score, num_first=4, num_second=4, top=4, ridge=1e6)
    assert np.abs(np.asarray(out.details["delta"])).max() < 1e-4


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="expected at most 4 strings to fit, .* got 5; pass top=1"):
        calibrated.run(KEY, P, score, num_first=4, top=5)
    with pytest.raises(ValueError, match="expected a plain language model"):
        calibrated.run(KEY, P**2, score)
    with pytest.raises(ValueError, match="expected num_second to be a whole number of at least 1"):
        calibrated.run(KEY, P, score, num_second=0)
