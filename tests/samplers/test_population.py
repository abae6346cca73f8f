"""The one loop, under enumeration: every combination of the choices of a small run is one script,
and the sum over all scripts is what LAW 1 says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import base, diagnostics, population, resampling
from samplers.base import Cost, Move, Particles
from samplers.population import Run
from tests.helpers import assert_z

NUM, STATES, ROUNDS = 2, 3, 2
TABLES = np.random.default_rng(7)
Q = TABLES.dirichlet(np.ones(STATES), STATES)
G = TABLES.uniform(0.1, 2.0, (STATES, STATES))
"""G[x, y] is what a path gains by a step from x to y, and Q the law that y is drawn from."""
G[0, 1] = 0.0


def moving_to(y: Any) -> Move:
    """The move whose draws are given."""

    def sample(key: Any, x: Any) -> Any:
        dw = jnp.log(jnp.asarray(G))[x, y] - jnp.log(jnp.asarray(Q))[x, y]
        return y, dw.astype(jnp.float32)

    return Move(sample)


def by_weight(p: Particles) -> None:
    return None


def hot(p: Particles) -> Any:
    """Another law than the weights, which looks at the states."""
    return 0.5 * p.log_weights + jnp.array([0.3, -0.4, 0.6], jnp.float32)[p.state]


def masses(threshold: float, log_selection: Callable[[Particles], Any]) -> np.ndarray:
    """E[exp(log_z) mean_i exp(w_i) 1{x_i = x}] of every x after all rounds."""
    draws = list(itertools.product(range(STATES), repeat=NUM * ROUNDS))
    choices = list(itertools.product(range(NUM), repeat=NUM * ROUNDS))
    script = np.asarray([a + b for a in draws for b in choices], np.int32)

    def one(row: Any) -> tuple[Any, Any]:
        drawn, chosen = row.reshape(2, -1)[0], row.reshape(2, -1)[1]
        drawn, chosen = drawn.reshape(ROUNDS, NUM), chosen.reshape(ROUNDS, NUM)

        def step(key: Any, run: Run) -> Run:
            r, law = run.rounds, log_selection(run.particles)
            among = jax.nn.log_softmax(run.particles.log_weights if law is None else law)
            run = population.select(
                key, run, lambda *_: chosen[r], jnp.float32(threshold), log_selection=law
            )
            # What is not drawn has all its alternatives in the script, in equal shares.
            share = jnp.where(run.rows["resampled"][r], among[chosen[r]], -jnp.log(NUM)).sum()
            log_q = jnp.log(jnp.asarray(Q))[run.particles.state, drawn[r]].sum()
            run = population.advance(key, run, moving_to(drawn[r]))
            run = population.note(population.record(run), log_prob=share + log_q)
            return population.end(run, Cost())

        fresh = base.particles(jnp.zeros(NUM, jnp.int32), NUM)
        run = population.start(fresh, ROUNDS, log_prob=jnp.float32(0))
        keys = jax.random.split(jax.random.key(0), ROUNDS)
        run = population.rounds(keys, run, step, lambda run: jnp.bool_(True))
        p = run.particles
        mass = jnp.zeros(STATES).at[p.state].add(jnp.exp(p.log_weights + p.log_z) / NUM)
        return jnp.exp(run.rows["log_prob"].sum()), mass

    probs, mass = (np.asarray(part, np.float64) for part in jax.jit(jax.vmap(one))(script))
    assert abs(probs.sum() - 1) < 1e-5
    # A dead particle is drawn with probability 0, and what would follow means nothing.
    return probs[probs > 0] @ mass[probs > 0]


def check_law_1(threshold: float, log_selection: Callable[[Particles], Any]) -> None:
    truth = np.linalg.matrix_power(G, ROUNDS)[0]
    np.testing.assert_allclose(masses(threshold, log_selection), truth, rtol=1e-4)


@pytest.mark.parametrize("log_selection", [by_weight, hot])
@pytest.mark.parametrize("threshold", [0.0, 0.8, population.ALWAYS])
def test_law_1_by_enumeration(threshold: float, log_selection: Callable[[Particles], Any]):
    check_law_1(threshold, log_selection)


def changed(change: Callable[..., Particles]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in what resampling gives: change(before, after, ancestors)."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def resample(key: Any, p: Any, *args: Any) -> Any:
            after, ancestors = base.resample(key, p, *args)
            return change(p, after, ancestors), ancestors

        patch.setattr(population, "resample", resample)

    return plant


def bare(before: Particles, after: Particles, ancestors: Any) -> Particles:
    """Weights are set back, whatever the ancestors were drawn from."""
    drawn = after.log_z != before.log_z
    return dataclasses.replace(after, log_weights=jnp.where(drawn, 0.0, after.log_weights))


def kept(before: Particles, after: Particles, ancestors: Any) -> Particles:
    drawn = after.log_z != before.log_z
    return dataclasses.replace(
        after, log_weights=jnp.where(drawn, before.log_weights[ancestors], after.log_weights)
    )


def unbanked(before: Particles, after: Particles, ancestors: Any) -> Particles:
    return dataclasses.replace(after, log_z=before.log_z)


def state_behind(before: Particles, after: Particles, ancestors: Any) -> Particles:
    return dataclasses.replace(after, state=before.state)


def unweighed(patch: pytest.MonkeyPatch) -> None:
    moved = population.moved
    patch.setattr(population, "moved", lambda run, y, dw: moved(run, y, jnp.minimum(dw, 0.1)))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Particles], Any]]] = {
    "ratio not carried": (changed(bare), hot),
    "weights kept": (changed(kept), by_weight),
    "evidence lost": (changed(unbanked), by_weight),
    "rows stay": (changed(state_behind), by_weight),
    "weights clipped": (unweighed, by_weight),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, log_selection = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="Mismatched"):
        check_law_1(population.ALWAYS, log_selection)


SCHEMES = ("multinomial", "stratified", "systematic", "residual", "ssp", "killing")


@pytest.mark.parametrize("name", [*SCHEMES, "optimal", "gumbel_top_k"])
def test_selecting_keeps_law_1_with_every_scheme(name: str):
    log_weights = jnp.array([-1.0, 0.5, -jnp.inf, 1.5, 0.2], jnp.float32)
    before = Particles(jnp.arange(5), log_weights, jnp.float32(0.7))

    def one(key: Any) -> tuple[Any, Any]:
        p = population.select(
            key, population.start(before), getattr(resampling, name), population.ALWAYS
        ).particles
        weights = jnp.exp(p.log_z + p.log_weights) / 5
        return jnp.zeros(5).at[p.state].add(weights), weights.sum()

    mass, _ = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 20_000))
    truth = np.exp(np.asarray(log_weights, np.float64) + 0.7) / 5
    for x in (0, 1, 3, 4):
        assert_z(mass[:, x], truth[x], resolution=0.02 * truth.sum())
    assert (mass[:, 2] == 0).all()


def steps(num: int, rounds: int, threshold: float = 0.7) -> Run:
    """A run of random steps whose states remember their path."""

    def move(r: Any) -> Move:
        def sample(key: Any, x: Any) -> Any:
            y = jax.random.randint(key, (num,), 0, STATES)
            return x.at[:, r].set(y), jnp.array([0.0, 0.8, 2.0], jnp.float32)[y]

        return Move(sample)

    def step(key: Any, run: Run) -> Run:
        select_key, move_key = jax.random.split(key)
        run = population.select(select_key, run, resampling.multinomial, threshold)
        run = population.record(population.advance(move_key, run, move(run.rounds)))
        run = population.note(run, drawn=run.particles.state[:, run.rounds], unknown=0)
        return population.end(run, Cost(tokens=jnp.int32(num), forwards=jnp.int32(1)))

    fresh = base.particles(jnp.full((num, rounds), -1, jnp.int32), num)
    run = population.start(fresh, rounds, genealogy=True, drawn=jnp.zeros(num, jnp.int32))
    return population.every_round(jax.random.split(jax.random.key(2), rounds), run, step)[0]


def check_trace(run: Run) -> None:
    """Trace, roots and genealogy tell of one and the same run."""
    rows, (p, error) = run.rows, population.finish(run)
    num, rounds = p.log_weights.shape[0], int(run.rounds)
    np.testing.assert_array_equal(run.roots, diagnostics.roots(rows["ancestors"]))
    np.testing.assert_allclose(rows["log_z"][-1], p.log_z, rtol=1e-6)
    np.testing.assert_allclose(error, diagnostics.log_z_std_error(p.log_weights, run.roots))
    slots = np.arange(num)
    for r in reversed(range(rounds)):
        np.testing.assert_array_equal(p.state[:, r], rows["drawn"][r][slots])
        np.testing.assert_allclose(rows["ess"][r], diagnostics.ess(rows["log_weights"][r]))
        moved = (np.asarray(rows["ancestors"][r]) != np.arange(num)).any()
        low = r > 0 and diagnostics.ess(rows["log_weights"][r - 1]) < 0.7 * num
        assert bool(rows["resampled"][r]) == low and (low or not moved)
        slots = np.asarray(rows["ancestors"][r])[slots]
    assert int(run.cost.tokens) == num * rounds and int(run.cost.forwards) == rounds


def test_trace_roots_and_genealogy_are_consistent():
    run = steps(12, 6)
    assert 0 < int(run.rows["resampled"].sum()) < 6 and len(np.unique(run.roots)) < 12
    check_trace(run)


def test_inconsistent_roots_or_rows_are_seen(monkeypatch: pytest.MonkeyPatch):
    run = steps(12, 6)
    with pytest.raises(AssertionError):
        check_trace(dataclasses.replace(run, roots=jnp.arange(12)))
    monkeypatch.setattr(population, "resample", lambda *args: (run.particles, jnp.arange(12)))
    with pytest.raises(AssertionError):
        check_trace(steps(12, 6))


def test_what_is_no_number_dies_and_is_counted_once():
    p = Particles(
        jnp.arange(5), jnp.array([0.0, 1.0, -jnp.inf, 2.0, 3.0], jnp.float32), jnp.float32(0)
    )
    odd = Move(lambda key, x: (x, jnp.array([jnp.nan, jnp.inf, jnp.nan, -jnp.inf, 0.5])))
    run = population.advance(jax.random.key(0), population.start(p), odd)
    np.testing.assert_array_equal(run.particles.log_weights, [-jnp.inf] * 4 + [3.5])
    assert int(run.num_invalid) == 2
    assert int(population.advance(jax.random.key(0), run, odd).num_invalid) == 2


def test_the_trigger_looks_at_what_ancestors_are_drawn_from():
    """Even weights of which one is to be drawn resample, and the other way round not."""
    even, uneven = jnp.zeros(4, jnp.float32), jnp.array([9.0, 0.0, 0.0, 0.0], jnp.float32)
    for log_weights, drawn_from, resampled in ((even, uneven, True), (uneven, even, False)):
        fresh = Particles(jnp.arange(4, dtype=jnp.int32), log_weights, jnp.float32(0))
        run = population.select(
            jax.random.key(0),
            population.start(fresh, 1),
            resampling.multinomial,
            0.5,
            log_selection=drawn_from,
        )
        assert bool(run.rows["resampled"][0]) == resampled


def test_a_dead_population_is_not_selected_and_has_no_evidence():
    p = Particles(jnp.arange(3), jnp.full(3, -jnp.inf, jnp.float32), jnp.float32(0.3))
    run = population.start(p, 1, genealogy=True)
    run = population.select(jax.random.key(0), run, resampling.systematic, population.ALWAYS)
    assert not run.rows["resampled"][0]
    after, error = population.finish(population.record(run))
    assert after.log_z == -jnp.inf and error == jnp.inf
    np.testing.assert_array_equal(after.state, np.arange(3))


def test_rounds_stop_early_and_rows_of_the_rest_are_as_at_the_start():
    def step(key: Any, run: Run) -> Run:
        return population.end(population.note(population.record(run), seen=run.rounds), cost)

    cost = Cost(tokens=jnp.int32(2), forwards=jnp.int32(1))
    start = population.start(base.particles(jnp.zeros(4), 4), 5, seen=jnp.int32(-1))
    keys = jax.random.split(jax.random.key(0), 5)
    run = population.rounds(keys, start, step, lambda run: run.rounds < 3)
    np.testing.assert_array_equal(run.rows["seen"], [0, 1, 2, -1, -1])
    np.testing.assert_array_equal(run.rows["ess"], [4, 4, 4, 0, 0])
    assert int(run.cost.tokens) == 6
    run, kept = population.every_round(keys, start, step, lambda run: run.rounds)
    np.testing.assert_array_equal(kept, [1, 2, 3, 4, 5])
    assert int(run.rounds) == 5


def test_a_run_of_no_rounds_writes_nothing_down():
    run = population.record(population.start(base.particles(jnp.zeros(4), 4)))
    assert run.rows == {}
