"""Power-SMC has the law of p^alpha Phi at any ramp, and its evidence is right where enumeration
cannot reach.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import marginals, tabular
from samplers import base, diagnostics, smc
from samplers.smc import power_smc
from samplers.strings import proposals
from tests import helpers
from tests.samplers.problems import check_law, gamma, masses, target_of

ROWS = [
    ("hmm", "product", 3.0),
    pytest.param("table", "power", 2.0, marks=pytest.mark.slow),
    pytest.param("table", "banned", 4.0, marks=pytest.mark.slow),
    pytest.param("markov", "power_of_all", 100.0, marks=pytest.mark.slow),
]


def power_masses(model: str, problem: str, ramp: float, num: int = 20_000) -> np.ndarray:
    target, keys = target_of(model, problem), jax.random.split(jax.random.key(3), num)
    return masses(
        lambda key: power_smc.run(key, target, ramp=ramp, num_particles=4, threshold=0.9), keys
    )


@pytest.mark.parametrize(("model", "problem", "ramp"), ROWS)
def test_law_1(model: str, problem: str, ramp: float):
    """With an exponent still short of alpha at the end, reached on the way, and an alpha
    below 1.
    """
    check_law(power_masses(model, problem, ramp), gamma(model, problem), resolution=0.02)


@pytest.mark.slow
def test_without_the_carry_it_fails(monkeypatch: pytest.MonkeyPatch):
    """Drawing from the bridged target and forgetting that it is not the target's own."""

    def forgotten(*args: Any) -> Any:
        p, log_selection, spent = bridged(*args)
        return dataclasses.replace(p, log_weights=log_selection), None, spent

    bridged = power_smc._bridged
    monkeypatch.setattr(power_smc, "_bridged", forgotten)
    with pytest.raises(AssertionError, match="z = "):
        check_law(power_masses("table", "power", 2.0), gamma("table", "power"), resolution=0.02)


def test_the_first_token_earns_no_variance():
    """All weights of the bridged target are equal after one token, those of p^alpha are not."""
    target = target_of("table", "power") ** 2
    first = next(
        smc.iterate(
            jax.random.key(0), target, num_particles=50, proposal=power_smc.Bridged(jnp.float32(4))
        )
    )
    seen = np.asarray(target.token_log_probs(first.sequences.tokens, first.sequences.length))[:, 0]
    short = float(power_smc.exponent(target, jnp.float32(4), jnp.int32(1)) - target.alpha)
    assert len({*seen.tolist()}) > 1 and diagnostics.ess(first.log_weights) < 49
    assert float(diagnostics.ess(first.log_weights + short * seen)) == pytest.approx(50, rel=1e-4)


def test_ancestors_are_drawn_from_the_bridged_target():
    """So even weights after one token start no resampling, though those of p^alpha are far from
    even.
    """
    target, key = target_of("table", "power") ** 2, jax.random.key(0)
    bridged = power_smc.run(key, target, ramp=4, num_particles=50, threshold=0.99)
    plain = smc.run(
        key, target, num_particles=50, threshold=0.99, proposal=power_smc.Bridged(jnp.float32(4))
    )
    assert not bridged.trace.resampled[1] and bridged.trace.resampled[2]
    assert plain.trace.resampled[1]


def test_the_state_keeps_log_p_of_every_string():
    target = target_of("hmm", "product")
    how = smc.method(target, num_particles=30)
    carry = jax.jit(lambda key: smc.loop(key, target, how, 30))(jax.random.key(1))
    x = carry.particles.state
    expected = target.token_log_probs(x.sequences.tokens, x.sequences.length).sum(1)
    alive = ~np.asarray(base.dead(carry.particles.log_weights))
    assert alive.sum() > 10 and len({*x.sequences.length[alive].tolist()}) > 1
    np.testing.assert_allclose(x.log_prob[alive], expected[alive], rtol=1e-5)


def test_no_ramp_is_smc():
    target, key = target_of("table", "power"), jax.random.key(2)
    how = {"num_particles": 50, "threshold": 0.99}
    ours = power_smc.run(key, target, ramp=0, **how)
    theirs = smc.run(key, target, proposal=proposals.locally_optimal, **how)
    np.testing.assert_array_equal(ours.sequences.tokens, theirs.sequences.tokens)
    np.testing.assert_allclose(ours.log_z, theirs.log_z, rtol=1e-5)


@pytest.mark.optimised
@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "max_tokens"), [(0.5, 30), (2.0, 200)])
def test_the_evidence_of_a_long_chain(alpha: float, max_tokens: int):
    """V = 50 against the transfer matrix: E[Z-hat] = Z on the linear scale."""
    lm = tabular.random_markov(jax.random.key(7), 50, eos=9)
    target = lm.given((3,), max_tokens=max_tokens) ** alpha
    keys = jax.random.split(jax.random.key(8), 400)
    runs = jax.jit(
        jax.vmap(
            lambda key: power_smc.run(key, target, ramp=max_tokens // 3, num_particles=128).log_z
        )
    )
    ratio = np.exp(
        np.asarray(runs(keys), np.float64) - marginals.markov_log_z(lm, (3,), max_tokens, alpha)
    )
    helpers.assert_z(ratio, 1.0, resolution=0.03)


@pytest.mark.bad_input
@pytest.mark.parametrize("ramp", [-1, float("nan")])
def test_a_ramp_below_0_is_refused(ramp: float):
    with pytest.raises(ValueError, match="expected a ramp of at least 0 tokens, got"):
        power_smc.run(jax.random.key(0), target_of("table", "power"), ramp=ramp)
