"""Annealed SMC and annealed importance sampling obey LAW 1 along any ladder, and anneal where SMC
cannot see ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.exact import enumerate_strings
from samplers import diagnostics
from samplers.smc import annealed, importance
from samplers.strings import cuts, proposals, regeneration
from tests.helpers import TraceCounter
from tests.samplers.mcmc.test_early_rejection import favours_long, most
from tests.samplers.problems import check_law, gamma, mass, score_arrays, target_of

LADDER = [0.3, 1.0]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def found(
    model: str, problem: str, ladder: Any = LADDER, power: int = 1, **options: Any
) -> tuple[np.ndarray, float]:
    """`mass` of every run, and how often they resampled."""
    target, keys = target_of(model, problem) ** power, jax.random.split(jax.random.key(3), 2_500)
    options = {"num_particles": 4, "num_moves": 1, "threshold": 0.9, **options}

    def one(key: Any) -> tuple[Any, Any]:
        out = annealed.run(key, target, ladder, **options)
        return mass(out), out.trace.resampled

    law, resampled = jax.jit(jax.vmap(one))(keys)
    return np.asarray(law, np.float64), float(resampled.mean())


@pytest.mark.parametrize(
    ("model", "problem", "power", "ladder", "options"),
    [
        ("table", "every_1", 2, LADDER, {}),
        slow("hmm", "banned", 1, [0.2, 0.6, 1.0], {"threshold": 0.0}),
        slow("hmm", "product", 2, [0.2, 0.6, 1.0], {"cut": cuts.uniform_in_length}),
        slow("markov", "reward", 1, LADDER, {"num_moves": 2, "threshold": 1.1}),
    ],
)
def test_law_1(model: str, problem: str, power: int, ladder: Any, options: dict[str, Any]):
    """Resampling never, now and then (which is seen), and always; powers above and below 1 and
    none, a reward and a constraint.
    """
    law, resampled = found(model, problem, ladder, power, **options)
    threshold = options.get("threshold", 0.9)
    assert resampled == float(threshold > 1) if threshold in (0.0, 1.1) else 0.1 < resampled < 0.9
    truth = {x: value**power for x, value in gamma(model, problem).items()}
    check_law(law, truth, resolution=0.03)


def test_a_bound_of_phi_changes_the_cost_and_nothing_else():
    """The tightest bound: at every rung it is that of Phi^beta."""
    # A factor that all strings have: a bound of another rung would be far off.
    target = target_of("table", "plain") ** 4 * ppl.reward(lambda x, n: 20 + score_arrays(x, n))
    bound, key, ladder = most(target), jax.random.key(4), [0.5, 1.0]
    options = {"num_particles": 1000, "threshold": 0.9, "cut": favours_long}
    plainly = annealed.run(key, target, ladder, **options)
    bounded = annealed.run(key, target, ladder, log_phi_max=bound, **options)
    np.testing.assert_array_equal(bounded.sequences.tokens, plainly.sequences.tokens)
    np.testing.assert_allclose(bounded.log_weights, plainly.log_weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bounded.log_z, plainly.log_z, rtol=1e-5, atol=1e-5)
    assert int(bounded.cost.tokens) < int(plainly.cost.tokens)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "Phi not tempered": (
        annealed,
        "tempered",
        lambda target, x, stage, beta: TEMPERED(target, x, stage, jnp.float32(1)),
    ),
}
TEMPERED = annealed.tempered


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_breaks_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError, match="z ="):
        law, _ = found(
            "table", "every_1", power=2, num_moves=4, cut=lambda *args: cuts.uniform(*args)
        )  # traced anew
        check_law(
            law, {x: value**2 for x, value in gamma("table", "every_1").items()}, resolution=1.0
        )


def test_strings_follow_the_rungs_without_the_model():
    """Pieces carried from rung to rung are those of a fresh look at the rung's own target."""
    target, betas = target_of("hmm", "product"), jnp.asarray(LADDER)
    x = enumerate_strings(target).sequences
    ladder = proposals.Powered(1 + betas * 0.2)
    p = dataclasses.replace(target, alpha=jnp.float32(1))
    raw = regeneration.score(p, ladder, x)
    for k, beta in enumerate(betas):
        here = annealed.at_beta(target, beta)
        ours, fresh = (
            annealed.tempered(here, raw, jnp.int32(k), beta),
            regeneration.score(here, ladder, x),
        )
        np.testing.assert_allclose(ours.log_q, fresh.log_q, atol=1e-5)
        np.testing.assert_allclose(ours.log_phi, fresh.log_phi, atol=1e-5)
        slope = np.asarray(annealed.log_slope(target, raw)) * float(beta) + np.asarray(raw.log_prob)
        np.testing.assert_allclose(
            regeneration.log_density(here, fresh), slope, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_finer_ladder_has_better_weights_than_one_jump():
    """A reward at the end, of which SMC over tokens knows nothing; and the result's bookkeeping."""
    target = target_of("table", "plain") ** 3 * ppl.reward(lambda x, n: 2.0 * (x == 3).sum(1))
    p = target_of("table", "plain")
    out = annealed.run(
        jax.random.key(0),
        target,
        np.linspace(0, 1, 9)[1:],
        num_particles=400,
        num_moves=6,
        threshold=0.0,
    )
    jump = importance.run(
        jax.random.key(1), target, num_particles=400, proposal=proposals.bootstrap
    )
    assert diagnostics.ess(out.log_weights) > 1.6 * diagnostics.ess(jump.log_weights)
    assert abs(float(out.log_z) - enumerate_strings(target).log_z) < 5 * float(out.log_z_std_error)
    assert not out.trace.resampled.any() and out.trace.ess.shape == out.trace.acceptance.shape == (
        8,
    )
    log_p = np.asarray(p.token_log_probs(out.sequences.tokens, out.sequences.length)).sum(1)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-5)
    assert int(out.cost.forwards) < 8 * 6 * 4 * 12 and int(out.cost.tokens) > 400
    assert float(out.log_z_std_error) < 0.3 and int(out.num_invalid) == 0


@pytest.mark.slow
def test_another_ladder_or_power_compiles_nothing_new():
    counter = TraceCounter(cuts.uniform)
    seen = []
    for alpha, ladder in ((2.0, [0.1, 0.3, 1.0]), (0.5, [0.2, 0.5, 1.0])):
        annealed.run(jax.random.key(0), target_of("table", "plain") ** alpha, ladder, cut=counter)
        seen.append(counter.count)
    assert seen[0] == seen[1] > 0


@pytest.mark.bad_input
def test_bad_input():
    p, key = target_of("table", "plain"), jax.random.key(0)
    for ladder in ([0.5], [1.0, 0.5, 1.0], [0.0, 1.0], [], [0.5, float("nan"), 1.0]):
        with pytest.raises(
            ValueError, match="expected a ladder that increases strictly from above 0 to exactly 1"
        ):
            annealed.run(key, p**2, ladder)
    for name in ("num_particles", "num_moves"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            annealed.run(key, p**2, LADDER, **options)
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected a target with alpha above 0"):
            annealed.run(key, p**alpha, LADDER)
    with pytest.raises(ValueError, match="expected a target with alpha above 0, got nan"):
        annealed.run(key, dataclasses.replace(p, alpha=jnp.float32(jnp.nan)), LADDER)
