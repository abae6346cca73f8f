"""Resample-move SMC obeys LAW 1 at any number of particles, blocks and moves, and its moves tell
copies apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.rows import take_rows
from samplers.results import Weighted
from samplers.smc import resample_move
from samplers.strings import cuts, proposals, regeneration
from tests.helpers import TraceCounter
from tests.samplers.problems import check_law, gamma, masses, target_of


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def found(model: str, problem: str, **options: Any) -> np.ndarray:
    target, keys = target_of(model, problem), jax.random.split(jax.random.key(3), 2_500)
    options = {"num_particles": 4, "block_size": 2, "num_moves": 1, "threshold": 0.9, **options}
    return masses(lambda key: resample_move.run(key, target, **options), keys)


@pytest.mark.parametrize(
    ("model", "problem", "options"),
    [
        ("table", "every_1", {}),
        slow("hmm", "product", {"block_size": 3, "cut": cuts.uniform_in_length}),
        slow("table", "second_lm", {"block_size": 1, "proposal": proposals.locally_optimal}),
    ],
)
def test_law_1(model: str, problem: str, options: dict[str, Any]):
    check_law(found(model, problem, **options), gamma(model, problem), resolution=0.03)


def mixed_up(target: Any, x: Any, rows: Any) -> Any:
    """The caches stay where they were."""
    return regeneration.with_cache(take_rows(regeneration.without_cache(x), rows), x.cache)


@pytest.mark.slow
def test_without_its_caches_resampling_breaks_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resample_move, "rows_of", mixed_up)
    with pytest.raises(AssertionError, match="z ="):
        # A new function: traced anew.
        law = found(
            "table", "every_1", threshold=1.1, num_moves=2, cut=lambda *args: cuts.uniform(*args)
        )
        check_law(law, gamma("table", "every_1"), resolution=0.1)


@pytest.fixture(scope="module")
def population() -> tuple[Any, Weighted]:
    target = target_of("table", "power") ** 2 * ppl.banned([2])
    return target, resample_move.run(
        jax.random.key(0), target, num_particles=64, block_size=3, threshold=1.1
    )


def test_the_result_says_what_happened(population: Any):
    target, out = population
    log_p = np.asarray(target.token_log_probs(out.sequences.tokens, out.sequences.length)).sum(1)
    np.testing.assert_allclose(out.log_prob, log_p, rtol=1e-5)
    alive = ~np.isneginf(np.asarray(out.log_weights))
    density = np.asarray(target.log_density(out.sequences.tokens, out.sequences.length))
    assert (
        np.isfinite(density[alive]).all() and not out.all_dead and np.isfinite(out.log_z_std_error)
    )
    assert out.trace.ess.shape == out.trace.acceptance.shape == (2,) and out.trace.resampled.all()
    assert (np.asarray(out.trace.acceptance) > 0).all() and (
        np.asarray(out.trace.acceptance) <= 1
    ).all()
    np.testing.assert_allclose(float(out.trace.log_z[-1]), float(out.log_z), rtol=1e-6)
    assert int(out.cost.potential_calls) >= int(out.cost.tokens) > 64
    assert int(out.num_invalid) == 0 and float(out.missing_support) == 0


@pytest.mark.slow
def test_what_is_missing_or_invalid_is_reported():
    p = target_of("table", "power") * ppl.reward(lambda x, n: jnp.where(n == 1, jnp.nan, 0.0))
    out = resample_move.run(jax.random.key(0), p, proposal=proposals.top_k(2), block_size=4)
    assert float(out.missing_support) > 0 and int(out.num_invalid) > 0 and not out.all_dead
    out = resample_move.run(
        jax.random.key(0), p * ppl.reward(lambda x, n: -jnp.inf + 0.0 * n), block_size=4
    )
    assert (
        out.all_dead
        and np.isneginf(float(out.log_z))
        and not np.isnan(np.asarray(out.log_weights)).any()
    )


@pytest.mark.slow
def test_a_new_key_or_power_compiles_nothing_new():
    counter = TraceCounter(cuts.uniform)
    seen = []
    for key, alpha in ((0, 2.0), (1, 3.0)):
        resample_move.run(jax.random.key(key), target_of("table", "plain") ** alpha, cut=counter)
        seen.append(counter.count)
    assert seen[0] == seen[1] > 0


@pytest.mark.bad_input
def test_bad_input():
    p, key = target_of("table", "plain"), jax.random.key(0)
    for name in ("num_particles", "block_size", "num_moves"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            resample_move.run(key, p, **options)
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected a target with alpha above 0"):
            resample_move.run(key, p**alpha)
