"""Particle independent Metropolis-Hastings leaves the target invariant, from the first step on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers import resampling, smc
from samplers.results import Weighted
from samplers.smc import conditional, pimh, power_smc
from samplers.strings import proposals, selection
from samplers.testing import check_kernel
from tests.samplers.chains import chi_square_z
from tests.samplers.problems import score_arrays, target_of
from tests.samplers.tape import enumerate_runs, small_target, three_letters


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def transition_matrices(
    threshold: float, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K of the first step from every string, from all runs of SMC and of conditional SMC; what it
    would be if the start's evidence came from an unconditional run; and pi.
    """
    target = small_target(2)
    proposed = enumerate_runs(target, thresholds=[threshold], pinned=False, **options)[threshold]
    held = enumerate_runs(target, thresholds=[threshold], **options)[threshold]
    pi, new = proposed.exact.probs, np.asarray(proposed.out.log_z, np.float64)
    moves = proposed.probs[:, None] * proposed.weights
    log_z_held = np.asarray(held.out.log_z, np.float64)
    matrix, wrong = np.zeros((2, len(pi), len(pi)))
    for x in range(len(pi)):
        runs = held.reference == x
        for found, probs, log_z in (
            (matrix, held.probs[runs], log_z_held[runs]),
            (wrong, proposed.probs, new),
        ):
            accept = np.minimum(1, np.exp(new[None] - log_z[:, None]))
            found[x] += probs @ accept @ moves
            found[x, x] += probs @ (1 - accept @ proposed.probs)
    return matrix, wrong, pi


@pytest.mark.parametrize(
    ("threshold", "options"),
    [
        (1.1, {}),
        slow(0.8, {"selection": selection.annealed(2.0)}),
    ],
)
def test_the_first_step_enumerated(threshold: float, options: dict[str, Any]):
    """|pi K - pi| <= 1e-6, and not if the start's evidence came from an unconditional run; and the
    jitted chains make the moves of that matrix.
    """
    matrix, wrong, pi = transition_matrices(threshold, **options)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    assert np.abs(pi @ matrix - pi).max() <= 1e-6 and np.trace(matrix) < len(pi) / 2
    assert np.abs(pi @ wrong - pi).max() > 1e-3
    target = small_target(2)
    how = {"num_particles": 2, "threshold": threshold, "batch_size": 20_000, **options}
    counts = check_kernel(pimh.kernel(target, **how), target, key=jax.random.key(2))
    assert abs(chi_square_z(counts, matrix)) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "problem", "num_steps", "options"),
    [
        ("table", "every_1", 3, {}),
        ("hmm", "power_of_all", 2, {}),
        ("table", "power", 2, power_smc.options(ramp=3)),
    ],
)
def test_the_kernel_is_invariant(model: str, problem: str, num_steps: int, options: dict[str, Any]):
    target = target_of(model, problem)
    kernel = pimh.kernel(target, num_particles=2, threshold=0.8, batch_size=20_000, **options)
    check_kernel(kernel, target, key=jax.random.key(2), num_steps=num_steps)


def unconditional(
    key: Any, target: Any, how: Any, reference: Any, *, num_particles: int, **options: Any
) -> Weighted:
    how = dataclasses.replace(how, resampler=resampling.multinomial)
    return smc.result(smc.loop(key, target, how, num_particles))


@pytest.mark.slow
def test_another_evidence_of_the_start_is_not_invariant(monkeypatch: pytest.MonkeyPatch):
    target = target_of("table", "every_1")
    monkeypatch.setattr(conditional, "particles_of", unconditional)
    proposal = lambda *args: proposals.bootstrap(*args)  # noqa: E731, a new function: traced anew
    kernel = pimh.kernel(
        target, num_particles=2, threshold=0.8, proposal=proposal, batch_size=20_000
    )
    with pytest.raises(AssertionError, match="not invariant"):
        check_kernel(kernel, target, key=jax.random.key(2))


def test_the_evidence_is_made_up_once_and_kept():
    """Strings of two tokens, so every run takes a pass beside the prompt's: of eight chains the
    first step makes sixteen runs, later ones eight, and one more for a chain whose evidence is not
    known.  Of two particles around a string one is drawn.
    """
    p = three_letters(2)
    target = p * ppl.min_tokens(2) * ppl.reward(lambda x, n: 2.0 * score_arrays(x, n))
    exact = enumerate_strings(target)
    x = take_rows(exact.sequences, jnp.full(8, int(exact.probs.argmax())))
    kernel = pimh.kernel(target, num_particles=2, batch_size=8)
    step = jax.jit(kernel.step)
    first, info = step(jax.random.key(0), kernel.init(x))
    assert int(info.cost.forwards) == 16 and int(info.cost.tokens) == 48
    assert np.isfinite(first.log_z).all()
    state, seen = first, []
    for seed in range(1, 4):
        before = state
        state, later = step(jax.random.key(seed), before)
        assert int(later.cost.forwards) == 8 and (np.asarray(later.tokens) == 4).all()
        kept = np.where(later.accepted, later.details["log_z"], before.log_z)
        np.testing.assert_array_equal(state.log_z, kept)
        seen += np.asarray(later.accepted).tolist()
    assert 2 < sum(seen) < len(seen) - 2
    forgotten = dataclasses.replace(state, log_z=state.log_z.at[3].set(-jnp.inf))
    after, info = step(jax.random.key(9), forgotten)
    assert (
        int(info.cost.forwards) == 9 and np.asarray(info.tokens).tolist() == [4] * 3 + [6] + [4] * 4
    )
    others = ~np.asarray(info.accepted) & (np.arange(8) != 3)
    assert others.any() and np.isfinite(after.log_z).all()
    np.testing.assert_array_equal(after.log_z[others], state.log_z[others])


@pytest.mark.bad_input
def test_bad_input():
    target = target_of("table", "every_1")
    with pytest.raises(ValueError, match="expected no resampler"):
        pimh.kernel(target, resampler=resampling.systematic)
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 4\]"):
        pimh.kernel(target).init(Sequences(jnp.zeros((2, 3), jnp.int32), jnp.full(2, 3)))
