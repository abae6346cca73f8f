"""E[lower] <= log Z <= E[upper]: enumerated, for a single particle in closed form, and as the run's
means.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers import resampling, smc
from samplers.results import Weighted
from samplers.smc import bounds, conditional
from samplers.strings import proposals
from tests.helpers import assert_z
from tests.samplers.problems import plain, target_of
from tests.samplers.tape import Runs, enumerate_runs, small_target


def expected(runs: Runs) -> float:
    """E[log Z-hat] over all runs, started from pi."""
    weights = (
        runs.probs if runs.reference.max() == 0 else runs.exact.probs[runs.reference] * runs.probs
    )
    return float(weights @ np.asarray(runs.out.log_z, np.float64))


def draws(target: Any, num: int) -> Sequences:
    exact = enumerate_strings(target)
    rows = np.random.default_rng(3).choice(len(exact.probs), num, p=exact.probs)
    return take_rows(exact.sequences, jnp.asarray(rows))


@pytest.mark.slow
def test_bounds_enumerated_and_run():
    """Both expectations by enumeration, on the right sides of log Z, and met by the
    means of `run`.
    """
    target, threshold = small_target(2), 0.8
    below = enumerate_runs(target, thresholds=[threshold], pinned=False)[threshold]
    above = enumerate_runs(target, thresholds=[threshold])[threshold]
    lower, upper, log_z = expected(below), expected(above), below.exact.log_z
    assert lower < log_z - 0.01 and upper > log_z + 0.01
    out = bounds.run(
        jax.random.key(1),
        target,
        draws(target, 3000),
        num_particles=2,
        threshold=threshold,
        batch_size=3000,
    )
    assert_z(out.log_z_lower, lower, resolution=0.01)
    assert_z(out.log_z_upper, upper, resolution=0.01)
    assert abs(float(out.gap) - (upper - lower)) < 5 * float(out.gap_std_error) < 0.1
    np.testing.assert_allclose(
        out.lower_std_error, np.std(out.log_z_lower, ddof=1) / 3000**0.5, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, pytest.param(1.25, marks=pytest.mark.slow)])
def test_one_particle_gives_the_bounds_of_its_proposal(temperature: float):
    """F = E_q[log gamma / q] and G = E_pi[log gamma / q]: G - F = KL(q | pi) + KL(pi | q), all by
    enumeration.
    """
    target = target_of("table", "every_1")
    exact = enumerate_strings(target)
    living = np.flatnonzero(exact.probs > 0)
    every = take_rows(exact.sequences, jnp.asarray(living))
    proposal = proposals.tempered(temperature)
    options = {
        "num_particles": 1,
        "threshold": 0.0,
        "proposal": proposal,
        "batch_size": len(living),
    }
    out = bounds.run(jax.random.key(2), target, every, num_runs=4000, **options)
    log_ratio = np.asarray(
        out.log_z_upper, np.float64
    )  # nothing is drawn: log gamma / q of every string
    pi, log_q = exact.probs[living], exact.log_gamma[living] - log_ratio
    q = np.exp(log_q)
    np.testing.assert_allclose(q.sum(), 1, atol=1e-4)
    if temperature == 1:
        np.testing.assert_allclose(
            log_q, plain("table").log_density(every.tokens, every.length), atol=1e-4
        )
    f, g = q @ log_ratio, pi @ log_ratio
    np.testing.assert_allclose(g - f, q @ np.log(q / pi) + pi @ np.log(pi / q), atol=1e-4)
    assert f < exact.log_z < g
    assert_z(out.log_z_lower, f, resolution=0.02)


@pytest.mark.slow
def test_an_unconditional_run_is_no_upper_bound(monkeypatch: pytest.MonkeyPatch):
    """Planted: the exact draw is not pinned."""

    def unconditional(
        key: Any, target: Any, how: Any, reference: Any, *, num_particles: int, **options: Any
    ) -> Weighted:
        how = dataclasses.replace(how, resampler=resampling.multinomial)
        return smc.result(smc.loop(key, target, how, num_particles))

    monkeypatch.setattr(conditional, "particles_of", unconditional)
    target = small_target(2)
    proposal = lambda *args: proposals.locally_optimal(*args)  # noqa: E731, a new function: traced anew
    options = {"num_particles": 2, "proposal": proposal, "batch_size": 3000}
    out = bounds.run(jax.random.key(1), target, draws(target, 3000), **options)
    assert out.upper + 5 * out.upper_std_error < enumerate_strings(target).log_z


@pytest.mark.bad_input
def test_bad_input():
    target = target_of("table", "every_1")
    x = draws(target, 3)
    with pytest.raises(ValueError, match="expected no resampler"):
        bounds.run(jax.random.key(0), target, x, resampler=resampling.systematic)
    with pytest.raises(ValueError, match="num_runs to be a whole number"):
        bounds.run(jax.random.key(0), target, x, num_runs=0)
    with pytest.raises(ValueError, match="number of exact draws"):
        bounds.run(jax.random.key(0), target, take_rows(x, jnp.zeros(0, jnp.int32)))
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 4\]"):
        bounds.run(jax.random.key(0), target, Sequences(x.tokens[:, :2], x.length))
