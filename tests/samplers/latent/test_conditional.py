"""Particle Gibbs for state-space models: its matrix over all paths, by all choices of two particles
summed by hand, and as a jitted kernel.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from samplers import resampling
from samplers.latent import conditional, smoothing
from samplers.latent.filtering import StateSpace
from samplers.mcmc import chains
from tests.helpers import assert_z
from tests.samplers.chains import chi_square_z
from tests.samplers.state_spaces import (
    GRID_PRIOR,
    HMM,
    LINEAR,
    SEES,
    START,
    SYMBOLS,
    Y,
    emission_hmm,
    emission_posterior,
    kalman,
)

T = 3
MOVES = np.array([[[0.85, 0.15], [0.4, 0.6]], [[0.3, 0.7], [0.55, 0.45]]])
"""Into times 1 and 2: not the same."""
GUIDE = np.array([[0.6, 0.4], [0.25, 0.75]])
ETA = np.array([[1.0, 3.0], [2.0, 0.5]])
OBSERVED = np.array([0, 2, 1])
PATHS = np.array(list(itertools.product((0, 1), repeat=T)))

MODEL = StateSpace(
    lambda: dist.Categorical(jnp.asarray(START)),
    lambda t, x: dist.Categorical(jnp.asarray(MOVES)[t - 1, x]),
    lambda t, x: dist.Categorical(jnp.asarray(SEES)[x]),
)
GUIDED: dict[str, Any] = {
    "proposal": lambda t, x, y: dist.Categorical(jnp.asarray(GUIDE)[x]),
    "initial_proposal": lambda y: dist.Categorical(jnp.asarray([0.5, 0.5])),
    "lookahead": lambda t, x, y: jnp.log(jnp.asarray(ETA)[t, x]),
}


def joint_law() -> np.ndarray:
    """p(x_0, x_1, x_2, y) [8]."""
    joint = [
        START[x[0]]
        * np.prod([MOVES[t - 1, x[t - 1], x[t]] for t in (1, 2)])
        * np.prod([SEES[x[t], OBSERVED[t]] for t in range(T)])
        for x in PATHS
    ]
    return np.array(joint)


def matrix(threshold: float, ancestor_sampling: bool, guided: bool) -> np.ndarray:
    """K [8, 8] of particle Gibbs with two particles, by summing over all that they can do."""
    found = np.zeros((8, 8))
    index = {tuple(path): row for row, path in enumerate(PATHS.tolist())}
    for row, reference in enumerate(PATHS.tolist()):
        for prob, paths, weights in _all_runs(reference, threshold, ancestor_sampling, guided):
            for path, weight in zip(paths, weights / weights.sum(), strict=True):
                found[row, index[tuple(path)]] += prob * weight
    return found


def _all_runs(reference: list[int], threshold: float, ancestor_sampling: bool, guided: bool):
    """(probability, the paths of the free particle and of the pinned one, their weights)."""
    first = np.array([0.5, 0.5]) if guided else START

    def weight_0(x: int) -> float:
        return START[x] * SEES[x, OBSERVED[0]] / first[x]

    runs = [
        (first[x], ([x], [reference[0]]), np.array([weight_0(x), weight_0(reference[0])]))
        for x in (0, 1)
    ]
    for t in (1, 2):
        runs = [
            after
            for run in runs
            for after in _one_round(run, t, reference[t], threshold, ancestor_sampling, guided)
        ]
    return runs


def _one_round(run: Any, t: int, here: int, threshold: float, own: bool, guided: bool):
    prob, paths, weights = run
    moves = MOVES[t - 1]
    guide = GUIDE if guided else moves
    eta = np.array([ETA[t - 1, path[-1]] for path in paths]) if guided else np.ones(2)
    chances = weights * eta / (weights * eta).sum()
    chosen: list[tuple[float, tuple[int, int], np.ndarray]] = [(1.0, (0, 1), weights)]
    if 1 / (chances**2).sum() < threshold * 2:
        back = weights * np.array([moves[path[-1], here] for path in paths])
        back = back / back.sum() if own else np.array([0.0, 1.0])
        carried = weights / chances
        chosen = [(chances[a] * back[b], (a, b), carried[[a, b]]) for a in (0, 1) for b in (0, 1)]
    for chance, (a, b), kept in chosen:
        for x in (0, 1):
            dw = [
                moves[paths[i][-1], z] * SEES[z, OBSERVED[t]] / guide[paths[i][-1], z]
                for i, z in ((a, x), (b, here))
            ]
            new = ([*paths[a], x], [*paths[b], here])
            yield prob * chance * guide[paths[a][-1], x], new, kept * np.array(dw)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("threshold", "ancestor_sampling", "guided"),
    [(0.9, True, True), slow(0.0, False, False), slow(1.1, True, False)],
)
def test_the_chains_make_the_moves_of_the_matrix(
    threshold: float, ancestor_sampling: bool, guided: bool
):
    """pi K = pi for the matrix, and the running kernel has that matrix."""
    exact, pi = matrix(threshold, ancestor_sampling, guided), joint_law() / joint_law().sum()
    np.testing.assert_allclose(exact.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pi @ exact, pi, atol=1e-12)
    each = 4000
    kernel = conditional.kernel(
        MODEL,
        OBSERVED,
        num_particles=2,
        ancestor_sampling=ancestor_sampling,
        batch_size=8 * each,
        threshold=threshold,
        **(GUIDED if guided else {}),
    )
    start = kernel.init(jnp.repeat(jnp.asarray(PATHS, jnp.int32), each, axis=0))
    after, info = jax.jit(kernel.step)(jax.random.key(2), start)
    which = np.asarray(after @ jnp.array([4, 2, 1])).reshape(8, each)
    assert np.asarray(info.accepted).all() and not np.asarray(info.invalid).any()
    counts = np.array([np.bincount(row, minlength=8) for row in which])
    assert chi_square_z(counts, exact) < 5


def test_a_sweep_weighs_the_reference_like_the_others():
    """E[1 / Z-hat] = 1 / Z from the smoothing law on, and the last path is the reference."""
    joint, num = joint_law(), 4000
    start = np.random.default_rng(0).choice(8, num, p=joint / joint.sum())
    kernel = conditional.kernel(MODEL, OBSERVED, num_particles=5, batch_size=num)
    _, info = jax.jit(kernel.step)(jax.random.key(2), jnp.asarray(PATHS[start], jnp.int32))
    ratio = joint.sum() / np.exp(np.asarray(info.details["log_z"]))
    assert_z(ratio, 1.0, resolution=0.01)
    reference = jnp.asarray(PATHS[5], jnp.int32)
    one = conditional.run(jax.random.key(3), MODEL, OBSERVED, reference, num_particles=5)
    assert one.history is not None
    np.testing.assert_array_equal(smoothing.trajectories(one.history)[:, -1], reference)


@pytest.mark.slow
def test_continuous_states():
    """Chains that start at nothing likely come to the smoother of Kalman, Rauch, Tung and
    Striebel.
    """
    _, _, _, means, covariances = kalman(Y)
    kernel = conditional.kernel(LINEAR, Y, num_particles=8, ancestor_sampling=True, batch_size=4000)
    step, x = jax.jit(kernel.step), jnp.zeros((4000, *means.shape), jnp.float32)
    for key in jax.random.split(jax.random.key(2), 25):
        x, _ = step(key, x)
    for t, k in ((0, 0), (0, 1), (4, 0)):
        assert_z(np.asarray(x[:, t, k]), means[t, k], resolution=0.015)
        spread = (np.asarray(x[:, t, k]) - means[t, k]) ** 2
        assert_z(spread, covariances[t, k, k], resolution=0.025)


@pytest.mark.slow
def test_particle_gibbs_for_a_parameter():
    """In turn theta given the path and the path given theta, against p(theta | y) by summation."""
    num = 8_000

    def log_likelihood(theta: Any, path: Any) -> Any:
        law = emission_hmm(jnp.full(path.shape, theta)).observation(0, path)
        return law.log_prob(jnp.asarray(SYMBOLS)).sum()

    def one(key: Any, theta: Any, path: Any) -> Any:
        theta_key, path_key, draw_key = jax.random.split(key, 3)
        logits = jnp.log(jnp.asarray(GRID_PRIOR)) + jax.vmap(log_likelihood, in_axes=(0, None))(
            jnp.arange(5), path
        )
        theta = jax.random.categorical(theta_key, logits)
        out = conditional.run(
            path_key, emission_hmm(theta), SYMBOLS, path, num_particles=3, ancestor_sampling=True
        )
        chosen = resampling.multinomial(draw_key, out.log_weights, 1)[0]
        assert out.history is not None
        return theta, smoothing.trajectories(out.history)[:, chosen]

    step = jax.jit(jax.vmap(one))
    theta, path = jnp.zeros(num, jnp.int32), jnp.ones((num, len(SYMBOLS)), jnp.int32)
    for key in jax.random.split(jax.random.key(0), 15):
        theta, path = step(jax.random.split(key, num), theta, path)
    exact = emission_posterior(SYMBOLS)[0]
    assert chi_square_z(np.bincount(np.asarray(theta), minlength=5)[None], exact[None]) < 5


def test_one_particle_stays():
    kernel = conditional.kernel(MODEL, OBSERVED, num_particles=1)
    start = kernel.init(jnp.asarray(PATHS, jnp.int32))
    np.testing.assert_array_equal(jax.jit(kernel.step)(jax.random.key(0), start)[0], PATHS)


def test_chains_run_it():
    kernel = conditional.kernel(HMM, SYMBOLS, num_particles=4, ancestor_sampling=True)
    start = jnp.zeros((2, len(SYMBOLS)), jnp.int32)
    out = chains.run(
        jax.random.key(0), kernel, start, num_samples=3, collect=lambda paths: {"path": paths}
    )
    assert out.draws["path"].shape == (3, 2, len(SYMBOLS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference": np.zeros(2, np.int32)},
            r"expected a state for each of 3 times, int(32|64)\[3\]",
        ),
        ({"reference": np.zeros((3, 1), np.int32)}, r"got int32\[3, 1\]"),
        ({"reference": np.zeros(3, np.float32)}, r"got float32\[3\]"),
        ({"num_particles": 0}, "expected num_particles to be a whole number"),
        ({"observations": np.float32(1)}, "expected observations"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str):
    given = {"observations": OBSERVED, "reference": PATHS[0].astype(np.int32), **change}
    with pytest.raises(ValueError, match=message):
        conditional.run(jax.random.key(0), MODEL, **given)


def test_paths_of_a_kernel_are_checked():
    kernel = conditional.kernel(MODEL, OBSERVED)
    with pytest.raises(
        ValueError, match=r"int(32|64)\[5, 3\], as the model draws it, got int32\[5, 2\]"
    ):
        kernel.init(jnp.zeros((5, 2), jnp.int32))
