"""Conditional SMC and particle Gibbs leave the target invariant: all choices enumerated, and as
jitted kernels.
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
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers import base, population, resampling
from samplers.smc import conditional, power_smc
from samplers.strings import proposals, selection
from samplers.testing import check_kernel
from tests.helpers import PROMPT, TraceCounter, hmm, markov
from tests.samplers.chains import chi_square_z
from tests.samplers.problems import target_of
from tests.samplers.tape import Runs, enumerate_runs, small_target

THRESHOLDS = (0.0, 0.85, 1.1)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def bias(runs: Runs) -> float:
    """|pi K - pi|."""
    return float(np.abs(runs.exact.probs @ runs.kernel() - runs.exact.probs).max())


@pytest.mark.parametrize(
    ("max_tokens", "options"),
    [
        (2, {}),
        slow(3, {"ancestor_sampling": True, "selection": selection.annealed(2.0)}),
        slow(3, {"ancestor_sampling": True, "proposal": proposals.bootstrap}),
        slow(3, {"ancestor_sampling": True, "steps": ppl.Steps(every=2)}),
        slow(3, power_smc.options(ramp=3)),
        slow(2, {"num_particles": 3, "ancestor_sampling": True}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_every_choice_enumerated(max_tokens: int, options: dict[str, Any]):
    """|pi K - pi| <= 1e-6 when it resamples never, sometimes and always; and Z-hat has the law that
    it should.
    """
    found = enumerate_runs(small_target(max_tokens), thresholds=THRESHOLDS, **options)
    for threshold, runs in found.items():
        assert bias(runs) <= 1e-6
        weights, log_z = (
            runs.exact.probs[runs.reference] * runs.probs,
            np.asarray(runs.out.log_z, np.float64),
        )
        np.testing.assert_allclose(weights @ np.exp(runs.exact.log_z - log_z), 1, atol=2e-6)
        assert weights @ log_z > runs.exact.log_z + 0.01
        matrix = runs.kernel()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        assert np.abs(matrix - np.eye(len(matrix))).max() > 0.5
        often = (weights[:, None] * np.asarray(runs.out.trace.resampled)).sum(0)[1]
        assert (
            often == 0 if threshold == 0 else often > 0.9 if threshold == 1.1 else 0.1 < often < 0.9
        )


# Faults.


def wrong_slot(patch: Any) -> None:
    """The resampler keeps the slot before the reference's."""
    patch.setattr(
        resampling,
        "conditional_multinomial",
        lambda key, log_weights, num: (
            resampling.multinomial(key, log_weights, num).at[-1].set(num - 2)
        ),
    )


def no_carry_for_the_reference(patch: Any) -> None:
    def resample(key: Any, p: Any, *args: Any) -> Any:
        after, ancestors = base.resample(key, p, *args)
        forgotten = after.log_weights.at[-1].set(0.0)
        log_weights = jnp.where(after.log_z == p.log_z, after.log_weights, forgotten)
        return dataclasses.replace(after, log_weights=log_weights), ancestors

    patch.setattr(population, "resample", resample)


def one_token_late(patch: Any) -> None:
    draw = conditional._Follow.draw
    patch.setattr(conditional._Follow, "draw", lambda *args: draw(*args[:-1], args[-1] + 1))


ANCESTORS = {"ancestor_sampling": True}
ANNEALED = {"selection": selection.annealed(2.0)}
FAULTS: dict[str, tuple[Callable[[Any], None], dict[str, Any], float]] = {
    "wrong slot": (wrong_slot, {}, 1.1),
    "no carry": (no_carry_for_the_reference, ANNEALED, 1.1),
    "rest scored one token late": (one_token_late, ANCESTORS, 1.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    plant, options, threshold = FAULTS[name]
    plant(monkeypatch)
    assert (
        bias(enumerate_runs(small_target(3), thresholds=[threshold], **options)[threshold]) > 1e-3
    )


# The jitted kernels.

KERNELS: dict[str, dict[str, Any]] = {
    "gibbs": {"threshold": 0.7},
    "ancestors": {"threshold": 1.1, "ancestor_sampling": True},
    "blocks": {
        "threshold": 0.9,
        "ancestor_sampling": True,
        "steps": ppl.Steps(every=2),
        "block_size": 1,
        "proposal": proposals.bootstrap,
    },
    "delimiters": {"threshold": 1.1, "steps": ppl.Steps(delimiters=[3, 2])},
    "next_token": {"threshold": 1.1, "ancestor_sampling": True, "selection": selection.next_token},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model", "problem"),
    [
        ("gibbs", "table", "product"),
        ("ancestors", "markov", "regex"),
        ("blocks", "table", "every_2"),
        ("delimiters", "table", "second_lm"),
        ("next_token", "table", "power_of_all"),
    ],
)
def test_the_kernel_is_invariant(kind: str, model: str, problem: str):
    target = target_of(model, problem)
    kernel = conditional.kernel(target, num_particles=3, batch_size=20_000, **KERNELS[kind])
    check_kernel(kernel, target, key=jax.random.key(2))


def test_the_jitted_sweeps_make_the_enumerated_moves():
    """Those of every choice of every run: |pi K - pi| <= 1e-6 for K, and the chains draw from K."""
    target, options = small_target(2), {"num_particles": 2, "ancestor_sampling": True}
    runs = enumerate_runs(target, thresholds=[1.1], **options)[1.1]
    assert bias(runs) <= 1e-6
    kernel = conditional.kernel(target, threshold=1.1, batch_size=20_000, **options)
    counts = check_kernel(kernel, target, key=jax.random.key(2))
    assert abs(chi_square_z(counts, runs.kernel())) < 5


def test_the_reference_draws_its_ancestor_by_itself():
    """Of two particles: given the first token of the other one, which makes the weights, the two
    ancestors are independent.
    """
    target = small_target(2)
    exact = enumerate_strings(target)
    reference = take_rows(exact.sequences, jnp.asarray([int(exact.probs.argmax())]))

    @jax.jit
    @jax.vmap
    def run(key: Any) -> Any:
        options = {"num_particles": 2, "threshold": 1.1, "history": True}
        out = conditional.run(key, target, reference, ancestor_sampling=True, **options)
        return out.history.drawn[0, 0, 0], out.history.ancestors[1]

    first, ancestors = (np.asarray(x) for x in run(jax.random.split(jax.random.key(5), 8000)))
    compared = 0
    for token in np.unique(first):
        pair = ancestors[first == token]
        other, own = pair.T - pair.mean(0)[:, None]
        spread = np.sqrt((other**2).mean() * (own**2).mean() / len(pair))
        assert abs((other * own).mean()) <= 5 * spread
        compared += int(spread > 0.002)  # a particle that has ended is no ancestor of the reference
    assert compared


@pytest.mark.slow
def test_a_language_model_proposes_and_is_followed():
    target = target_of("table", "every_1")
    guide = proposals.LanguageModel(hmm().given(PROMPT, max_tokens=4) ** 0.7)
    options = {
        "num_particles": 3,
        "batch_size": 20_000,
        "threshold": 1.1,
        "ancestor_sampling": True,
    }
    check_kernel(
        conditional.kernel(target, proposal=guide, **options), target, key=jax.random.key(2)
    )


# What else is promised.


@pytest.fixture(scope="module")
def chains() -> tuple[Any, Sequences]:
    """A target, and five strings of positive density and unequal length."""
    target = target_of("table", "every_1")
    exact = enumerate_strings(target)
    length = np.asarray(exact.sequences.length)
    rows = [np.flatnonzero((exact.probs > 0) & (length == n))[-1] for n in range(5)]
    return target, take_rows(exact.sequences, jnp.asarray(rows))


def row(x: Sequences, i: int) -> Sequences:
    return take_rows(x, jnp.asarray([i]))


@pytest.mark.slow
def test_the_reference_is_the_last_particle(chains: Any):
    target, x = chains
    for i in range(5):
        out = conditional.run(
            jax.random.key(i), target, row(x, i), num_particles=4, threshold=1.1, history=True
        )
        np.testing.assert_array_equal(out.sequences.tokens[-1], x.tokens[i])
        assert int(out.sequences.length[-1]) == int(x.length[i])
        np.testing.assert_array_equal(out.history.ancestors[:, -1], 3)
        assert np.isfinite(out.log_weights[-1])


@pytest.mark.slow
def test_chains_do_not_depend_on_how_many_run_together(chains: Any):
    target, x = chains
    options = {"num_particles": 4, "ancestor_sampling": True, "threshold": 0.9}
    first, info = conditional.kernel(target, **options).step(jax.random.key(0), x)
    other, more = conditional.kernel(target, batch_size=5, **options).step(jax.random.key(0), x)
    np.testing.assert_array_equal(first.tokens, other.tokens)
    np.testing.assert_allclose(info.details["log_z"], more.details["log_z"], rtol=1e-5)
    np.testing.assert_array_equal(info.changed, (first.tokens != x.tokens).any(1))
    jax.tree.map(np.testing.assert_array_equal, info.cost, more.cost)


@pytest.mark.slow
def test_cost_counts_the_scored_rest(chains: Any):
    """Resampling before each round scores what the reference holds from there on, its
    EOS included.
    """
    target, x = chains
    i, options = 4, {"num_particles": 4, "threshold": 1.1}
    length = int(x.length[i])
    plain = conditional.run(jax.random.key(1), target, row(x, i), **options)
    scored = conditional.run(
        jax.random.key(1), target, row(x, i), ancestor_sampling=True, **options
    )
    rounds = int(scored.rounds)
    passes = sum(
        max(min(4, length + 1) - t, 1) for t in range(1, rounds) if scored.trace.resampled[t]
    )
    assert passes > 0 and int(scored.cost.forwards) == rounds + passes
    assert int(plain.cost.forwards) == int(plain.rounds)


def test_a_single_particle_stays(chains: Any):
    target, x = chains
    y, info = conditional.kernel(target, num_particles=1).step(jax.random.key(0), x)
    np.testing.assert_array_equal(x.tokens, y.tokens)
    assert not info.changed.any()


@pytest.mark.slow
def test_a_start_of_density_zero_is_left():
    """Banned token 2: all chains enter the support at once, and the reference does not come back to
    life.
    """
    banned = target_of("hmm", "banned")
    x = take_rows(
        Sequences(jnp.asarray([[0, 2, 3, 3]]), jnp.asarray([4])), jnp.zeros(200, jnp.int32)
    )
    options = {"selection": selection.annealed(2.0), "ancestor_sampling": True}
    kernel = conditional.kernel(banned, num_particles=2, threshold=1.1, batch_size=200, **options)
    y, info = kernel.step(jax.random.key(0), x)
    left = ~np.isneginf(np.asarray(info.details["log_z"]))
    assert left.sum() > 100 and not np.isnan(info.details["log_z"]).any()
    np.testing.assert_array_equal(info.changed, left)
    density = np.asarray(banned.log_density(y.tokens, y.length))
    assert np.isfinite(density[left]).all()


@pytest.mark.slow
def test_where_nothing_has_mass_a_chain_stays():
    x = Sequences(jnp.asarray([[2, 0, 2, 2]]), jnp.asarray([4]))
    nothing = markov().given(PROMPT, max_tokens=4) * ppl.banned([2]) * ppl.forced([2])
    y, info = conditional.kernel(nothing, num_particles=4, ancestor_sampling=True).step(
        jax.random.key(0), x
    )
    np.testing.assert_array_equal(x.tokens, y.tokens)
    assert np.isneginf(info.details["log_z"]).all()


@pytest.mark.slow
def test_a_new_kernel_compiles_nothing_new(chains: Any):
    target, x = chains
    counter = TraceCounter(proposals.locally_optimal)
    for threshold in (0.5, 0.9):
        kernel = conditional.kernel(target, num_particles=4, proposal=counter, threshold=threshold)
        kernel.step(jax.random.key(0), x)
        seen = counter.count if threshold == 0.5 else seen
    assert counter.count == seen > 0


@pytest.mark.bad_input
def test_bad_input(chains: Any):
    target, x = chains
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="expected a reference of one string, got 5"):
        conditional.run(key, target, x)
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 4\]"):
        conditional.kernel(target).init(Sequences(x.tokens[:, :3], x.length))
    with pytest.raises(ValueError, match="expected no resampler"):
        conditional.run(key, target, row(x, 0), resampler=resampling.systematic)
    with pytest.raises(ValueError, match="use ppl.Steps"):
        conditional.kernel(target, ancestor_sampling=True, steps=ppl.Steps(delimiters=[3]))
    with pytest.raises(ValueError, match="batch_size to be a whole number"):
        conditional.kernel(target, batch_size=0)


@pytest.mark.bad_input
def test_where_nobody_can_take_the_rest_the_reference_keeps_its_past(
    monkeypatch: pytest.MonkeyPatch,
):
    """And with ancestor sampling the others are drawn as without."""
    key, log_probs = jax.random.key(6), jnp.log(jnp.array([0.2, 0.5, 0.3]))
    none = jnp.full(3, -jnp.inf)
    monkeypatch.setattr(conditional, "ancestor_log_weights", lambda *_: none)
    adopt = conditional._ancestor_sampler(*[None] * 4)  # type: ignore[arg-type]
    others = resampling.pinned_multinomial(jax.random.split(key, 3)[0], log_probs, 3)
    np.testing.assert_array_equal(adopt(key, log_probs, 3), others)
