"""Particle marginal Metropolis-Hastings against the forward algorithm, its estimator enumerated run
by run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from samplers import base, kernels
from samplers.base import Move
from samplers.latent import filtering, pmmh
from samplers.testing import check_hastings
from tests.samplers.chains import chi_square_z
from tests.samplers.state_spaces import (
    GRID_PRIOR,
    GRID_STEPS,
    SYMBOLS,
    emission_filter,
    emission_hmm,
    emission_posterior,
)
from tests.samplers.tape import Module, Tape

NUM = len(GRID_PRIOR)
PROPOSAL = pmmh.propose(lambda theta: dist.Categorical(probs=jnp.asarray(GRID_STEPS)[theta]))
PRIOR = dist.Categorical(probs=jnp.asarray(GRID_PRIOR))


def tables(times: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """m(u | theta) and log Z-hat [5, runs] of every run of `filtering.run` with two particles."""
    symbols = jnp.asarray(SYMBOLS[:times])
    draws, choices = 2 * times, 2 * (times - 1)
    script = np.asarray(list(itertools.product(range(2), repeat=draws + choices)), np.int32)

    def one(theta: Any, row: Any) -> tuple[Any, Any]:
        tape = Tape(row[:draws].reshape(times, 2), row[draws:].reshape(times - 1, 2), None, 2)

        def from_tape(key: Any, law: Any) -> Any:
            x = tape.next("tokens")
            tape.log_probs.append((law.log_prob(x).sum(), 4))
            return x

        with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
            patch.setattr(filtering, "draw", from_tape)
            patch.setattr(base, "jax", Module(jax, lax=Module(jax.lax, while_loop=tape.unroll(1))))
            found = filtering.run(
                jax.random.key(0),
                emission_hmm(theta),
                symbols,
                num_particles=2,
                resampler=tape.multinomial,
                threshold=0.95,
            )
        return sum((p for p, _ in tape.log_probs), jnp.float32(0)), found.log_z

    log_probs, log_z = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(
        jnp.arange(NUM), script
    )
    probs = np.exp(np.asarray(log_probs, np.float64))
    assert np.abs(probs.sum(1) - 1).max() < 1e-5
    return probs / probs.sum(1, keepdims=True), np.asarray(log_z, np.float64)


@functools.cache
def merged() -> tuple[np.ndarray, np.ndarray]:
    """`tables`, with runs of equal evidence as one; columns that a row lacks have m = 0."""
    probs, log_z = tables()
    values = [np.unique(row.round(4)) for row in log_z]
    width = max(map(len, values))
    law, found = np.zeros((NUM, width)), np.zeros((NUM, width))
    for g in range(NUM):
        which = np.searchsorted(values[g], log_z[g].round(4))
        np.add.at(law[g], which, probs[g])
        np.add.at(found[g], which, probs[g] * np.exp(log_z[g]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return law, np.where(law > 0, np.log(found / law), -50.0)


def extended_chain(*, fresh: bool = False, log_back: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """K on (theta, Z-hat) by the kernel's own ratio, float64, and its invariant law prior(theta)
    m(u) Z-hat(u).

    `fresh` estimates the evidence of the present theta anew in every step.
    """
    law, log_z = merged()
    shape, q = law.shape, GRID_STEPS
    with jax.enable_x64(True):
        log_prior = np.broadcast_to(np.log(GRID_PRIOR)[:, None], shape)
        state = pmmh.State(
            np.indices(shape)[0].ravel(),
            *(jnp.asarray(leaf.ravel()) for leaf in (log_prior, log_z)),
        )
        rows, columns = (i.ravel() for i in np.meshgrid(*[np.arange(law.size)] * 2, indexing="ij"))
        x, y = (
            jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf)[i], state) for i in (rows, columns)
        )
        there = q[np.asarray(x.theta), np.asarray(y.theta)]
        back = (
            np.log(q[np.asarray(y.theta), np.asarray(x.theta)] / there)
            if log_back
            else np.zeros(there.shape)
        )
        accept = np.exp(
            np.minimum(np.asarray(pmmh.log_ratio(x, y, jnp.asarray(back)), np.float64), 0)
        )
    flow = (there * law.ravel()[columns] * accept).reshape(law.size, law.size)
    if fresh:  # the present estimate is one of those that its theta may have
        mix = np.kron(np.eye(NUM), np.ones((shape[1], 1))) @ np.einsum(
            "gj,gjk->gk", law, flow.reshape(*shape, -1)
        )
        flow = mix
    np.fill_diagonal(flow, 0)
    matrix = flow + np.diag(1 - flow.sum(1))
    pi = (GRID_PRIOR[:, None] * law * np.exp(log_z)).ravel()
    return matrix, pi / pi.sum()


def test_the_transition_matrix_leaves_the_extended_law_invariant():
    """|pi K - pi| <= 1e-12, reversible; theta's marginal is the posterior by the forward
    algorithm.
    """
    matrix, pi = extended_chain()
    flow = pi[:, None] * matrix
    assert np.abs(pi @ matrix - pi).max() <= 1e-12 and np.abs(flow - flow.T).max() <= 1e-12
    assert 0.1 < 1 - pi @ np.diag(matrix) < 0.95 and len(pi) > 20
    posterior, log_z = emission_posterior(SYMBOLS[:2])
    np.testing.assert_allclose(pi.reshape(NUM, -1).sum(1), posterior, atol=2e-6)
    law, found = merged()
    np.testing.assert_allclose((law * np.exp(found)).sum(1), np.exp(log_z), rtol=5e-6)
    # So noisy that the mean of log Z-hat, or a posterior by it, is another one.
    assert np.abs((law * found).sum(1) - log_z).max() > 0.02


@pytest.mark.parametrize(
    "fault", [{"fresh": True}, {"log_back": False}], ids=["fresh evidence", "q forgotten"]
)
def test_a_fault_is_not_invariant(fault: dict[str, bool]):
    """Nor is theta's marginal."""
    matrix, pi = extended_chain(**fault)
    assert np.abs((pi @ matrix - pi).reshape(NUM, -1).sum(1)).max() > 1e-3


def tabulated(key: Any, theta: Any) -> Any:
    """A draw from the enumerated law of log Z-hat."""
    law, log_z = (jnp.asarray(leaf, jnp.float32) for leaf in merged())
    return log_z[theta, jax.random.categorical(key, jnp.log(law[theta]))]


def index_of(state: pmmh.State) -> np.ndarray:
    law, log_z = merged()
    theta = np.asarray(state.theta)
    distance = np.abs(np.where(law > 0, log_z, np.inf)[theta] - np.asarray(state.log_z)[:, None])
    assert distance.min(1).max() < 1e-5
    return theta * law.shape[1] + distance.argmin(1)


def moved(
    log_evidence: Callable[..., Any], proposal: Move, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One jitted step of chains that start at rows of the extended space, and its matrix
    of counts.
    """
    law, log_z = merged()
    theta, column = np.divmod(start, law.shape[1])
    kernel = pmmh.kernel(log_evidence, PRIOR, proposal, batch_size=len(start))
    state = kernel.init(jnp.asarray(theta, jnp.int32))
    state = pmmh.State(state.theta, state.log_prior, jnp.asarray(log_z[theta, column], jnp.float32))
    after, info = jax.jit(kernel.step)(jax.random.key(3), state)
    counts = np.zeros((law.size, law.size))
    np.add.at(counts, (start, index_of(after)), 1)
    return counts, np.asarray(info.accepted)


@pytest.mark.slow
def test_the_jitted_kernel_has_that_matrix():
    matrix, pi = extended_chain()
    start = np.random.default_rng(0).choice(len(pi), 100_000, p=pi)
    counts, accepted = moved(tabulated, PROPOSAL, start)
    assert chi_square_z(counts, matrix) < 4 and 0.2 < accepted.mean() < 0.95
    assert chi_square_z(counts, extended_chain(fresh=True)[0]) > 10


@pytest.mark.slow
def test_the_first_step_estimates_the_evidence_of_the_start():
    law, log_z = merged()
    theta = jnp.tile(jnp.arange(NUM), 2000)
    kernel = pmmh.kernel(tabulated, PRIOR, PROPOSAL, batch_size=len(theta))
    start = kernel.init(theta)
    assert np.isnan(start.log_z).all()
    state, info = kernel.step(jax.random.key(4), start)
    np.testing.assert_array_equal(state.theta, theta)
    assert info.accepted.all() and np.isposinf(info.log_ratio).all()
    assert not info.changed.any()  # the runs are new, theta is not
    counts = np.bincount(index_of(state), minlength=law.size).reshape(law.shape)
    assert chi_square_z(counts, law) < 4


def test_chains_leave_what_is_impossible_and_never_go_there():
    """Grid point 0 has no evidence, 1 a NaN, 2 none by the prior; the others are alike."""
    prior = dist.Categorical(probs=jnp.array([0.2, 0.2, 0.0, 0.3, 0.3]))

    def log_evidence(key: Any, theta: Any) -> Any:
        return jnp.array([-jnp.inf, jnp.nan, 0.0, 0.0, 0.0])[theta]

    kernel = pmmh.kernel(log_evidence, prior, PROPOSAL, batch_size=500)
    state, _ = kernels.repeat(kernel, 30).step(
        jax.random.key(5), kernel.init(jnp.tile(jnp.arange(5), 100))
    )
    assert np.isin(state.theta, [3, 4]).all()


def test_propose_is_a_hastings_ratio():
    """On the positive half-line, where log-normal steps are not symmetric; and for pytrees."""
    move = pmmh.propose(
        lambda x: {"a": dist.LogNormal(jnp.log(x["a"]), 0.4), "b": dist.Normal(0.9 * x["b"], 1.0)}
    )
    x = {"a": jnp.linspace(0.1, 3, 50), "b": jnp.linspace(-2, 2, 50)}
    check_hastings(move, x, key=jax.random.key(6))
    y, dw = move.sample(jax.random.key(7), x)
    expected = jnp.log(y["a"] / x["a"]) + 0.5 * (1 - 0.81) * (y["b"] ** 2 - x["b"] ** 2)
    np.testing.assert_allclose(dw, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_with_a_filter_and_a_longer_record():
    """Theta and the last state, at the end of many chains, have the law of their joint
    posterior.
    """

    def log_evidence(key: Any, theta: Any) -> Any:
        """And the last state of a particle, drawn by weight."""
        run_key, draw_key = jax.random.split(key)
        found = filtering.run(run_key, emission_hmm(theta), SYMBOLS, num_particles=4)
        return found.log_z, found.samples[jax.random.categorical(draw_key, found.log_weights)]

    posterior, _ = emission_posterior(SYMBOLS)
    kernel = pmmh.kernel(log_evidence, PRIOR, PROPOSAL, batch_size=10_000)

    @jax.jit
    def run(key: Any, theta: Any) -> Any:
        state = kernel.init(theta)
        return jax.lax.scan(lambda x, k: kernel.step(k, x), state, jax.random.split(key, 25))

    state, info = run(jax.random.key(8), jnp.tile(jnp.arange(NUM), 2000))
    counts = np.bincount(np.asarray(2 * state.theta + state.rest), minlength=2 * NUM)
    joint = posterior[:, None] * emission_filter(SYMBOLS)
    assert chi_square_z(counts[None], joint.reshape(1, -1)) < 4
    assert 0.2 < info.accepted[1:].mean() < 0.9
    assert np.abs(posterior - GRID_PRIOR).max() > 0.05


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="expected batch_size"):
        pmmh.kernel(tabulated, PRIOR, PROPOSAL, batch_size=0)
    with pytest.raises(ValueError, match="expected prior to return NumPyro distributions"):
        pmmh.kernel(tabulated, dist.Normal(jnp.zeros(3), 1.0), PROPOSAL).init(jnp.zeros(2))
