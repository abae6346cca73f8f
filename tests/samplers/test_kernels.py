"""Cycles, mixtures and powers of kernels against products, convex combinations and powers of their
matrices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from samplers import base, kernels
from samplers.base import Kernel, Move
from samplers.mcmc import suffix
from samplers.results import Trace, Weighted
from samplers.testing import check_hastings
from tests.samplers.chains import chi_square_z
from tests.samplers.problems import applied, target_of

PI = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
WALK = np.array([0.5, 0.3, 0.2])
"""Steps of -1, 0 and 2, which come back as 1, 0 and -2: never drawn in that way unless they are
mirrored.
"""


def metropolis(pi: np.ndarray, proposal: np.ndarray) -> np.ndarray:
    """The matrix of Metropolis-Hastings."""
    flow = pi[:, None] * proposal
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = proposal * np.where(flow > 0, np.minimum(1, flow.T / flow), 0.0)
    np.fill_diagonal(matrix, 0)
    return matrix + np.diag(1 - matrix.sum(1))


RNG = np.random.default_rng(0)
FIRST, SECOND = (metropolis(PI, RNG.dirichlet(np.ones(5) * 0.7, 5)) for _ in range(2))


def finite(matrix: np.ndarray) -> Kernel:
    """A kernel over 0..n-1 by its matrix; info is where it was."""
    rows = jnp.log(jnp.asarray(matrix))

    def step(key: Any, x: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, x.shape[0])
        return jax.vmap(jax.random.categorical)(keys, rows[x]).astype(x.dtype), x

    return Kernel(lambda x: x, step)


def counted(kernel: Kernel, n: int = 5, num_chains: int = 4000, replicas: int = 50) -> np.ndarray:
    """Moves [n, n] of one jitted step, from every state; every replica has a key of its own, as
    mixtures need.
    """
    x = jnp.tile(jnp.arange(n, dtype=jnp.int32), num_chains // replicas)

    @jax.jit
    def one(key: Any) -> Any:
        return kernel.step(key, kernel.init(x))[0]

    y = np.stack([one(key) for key in jax.random.split(jax.random.key(1), n * replicas)])
    counts = np.zeros((n, n))
    np.add.at(counts, (np.tile(np.asarray(x), len(y)), y.ravel()), 1)
    return counts


def flows(matrix: np.ndarray) -> tuple[float, float]:
    """|pi K - pi|, and how far K is from reversible."""
    flow = PI[:, None] * matrix
    return float(np.abs(PI @ matrix - PI).max()), float(np.abs(flow - flow.T).max())


ODDS = np.array([0.7, 0.3])
CASES: dict[str, tuple[Kernel, np.ndarray, bool]] = {
    "cycle": (kernels.cycle(finite(FIRST), finite(SECOND)), FIRST @ SECOND, False),
    "palindrome": (
        kernels.cycle(finite(FIRST), finite(SECOND), finite(FIRST)),
        FIRST @ SECOND @ FIRST,
        True,
    ),
    "mixture": (
        kernels.mix(finite(FIRST), finite(SECOND), probs=[7, 3]),
        ODDS[0] * FIRST + ODDS[1] * SECOND,
        True,
    ),
    "repeat": (kernels.repeat(finite(FIRST), 3), np.linalg.matrix_power(FIRST, 3), True),
    "nested": (
        kernels.mix(
            kernels.cycle(finite(FIRST), finite(SECOND)),
            kernels.cycle(finite(SECOND), finite(FIRST)),
        ),
        0.5 * (FIRST @ SECOND + SECOND @ FIRST),
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_of_the_whole_is_that_of_the_parts(name: str):
    """pi is invariant, detailed balance holds where it should and only there, and the jitted step
    has that matrix.
    """
    kernel, matrix, reversible = CASES[name]
    bias, imbalance = flows(matrix)
    assert bias <= 1e-12 and (imbalance <= 1e-12 if reversible else imbalance > 1e-3)
    # A mixture's chains choose together, so that cells are no longer multinomial: its parts are
    # counted apart.
    if name not in ("mixture", "nested"):
        assert chi_square_z(counted(kernel), matrix) < 4


def test_a_mixture_runs_each_part_as_often_as_it_says():
    """Given the choice, moves have the matrix of the part chosen; choices have the law
    asked for.
    """
    kernel = CASES["mixture"][0]
    x = jnp.tile(jnp.arange(5, dtype=jnp.int32), 10)
    step = jax.jit(lambda key: kernel.step(key, x))
    counts, times = np.zeros((2, 5, 5)), np.zeros(2)
    for key in jax.random.split(jax.random.key(2), 2000):
        y, info = step(key)
        k = int(info.chosen)
        times[k] += 1
        np.add.at(counts[k], (np.asarray(x), np.asarray(y)), 1)
        np.testing.assert_array_equal(info.infos[k], x)
        assert (np.asarray(info.infos[1 - k]) == 0).all()
    assert abs(times[0] - 1400) < 5 * (2000 * 0.7 * 0.3) ** 0.5
    assert chi_square_z(counts[0], FIRST) < 4 and chi_square_z(counts[1], SECOND) < 4
    assert chi_square_z(counts[0], SECOND) > 10


def test_infos_and_jit():
    x = jnp.arange(5, dtype=jnp.int32)
    key = jax.random.key(3)
    middle = kernels.cycle(finite(FIRST), finite(SECOND))
    y, (before, between) = middle.step(key, x)
    np.testing.assert_array_equal(before, x)
    np.testing.assert_array_equal(jax.jit(middle.step)(key, x)[0], y)
    _, info = kernels.repeat(finite(FIRST), 3).step(key, x)
    assert info.shape == (3, 5) and (info[0] == x).all() and between.shape == (5,)


# --- Metropolis-Hastings from a move ---


def walk(mirrored: bool) -> Move:
    """Steps on a ring of five by WALK, weighed for PI; with `mirrored` the way back is the same
    walk.
    """
    log_pi, steps = jnp.log(jnp.asarray(PI)), jnp.array([-1, 0, 2])
    log_q = jnp.full(5, -jnp.inf).at[steps % 5].set(jnp.log(jnp.asarray(WALK)))

    def log_law(x: Any, y: Any) -> Any:
        return (
            jnp.logaddexp(log_q[(y - x) % 5], log_q[(x - y) % 5]) - jnp.log(2.0)
            if mirrored
            else log_q[(y - x) % 5]
        )

    def weight(x: Any, y: Any) -> Any:
        # Unmirrored: the backward law is the walk's mirror image, which LAW 2 allows and acceptance
        # does not.
        back = log_law(y, x) if mirrored else log_law(x, y)
        return log_pi[y] - log_pi[x] + back - log_law(x, y)

    def sample(key: Any, x: Any) -> tuple[Any, Any]:
        step_key, sign_key = jax.random.split(key)
        step = jax.random.choice(step_key, steps, x.shape, p=jnp.asarray(WALK))
        sign = jax.random.rademacher(sign_key, x.shape, jnp.int32) if mirrored else 1
        y = (x + sign * step) % 5
        return y, weight(x, y)

    return Move(sample, lambda key, x, y: weight(x, y))


def walk_matrix(mirrored: bool) -> np.ndarray:
    proposal = np.zeros((5, 5))
    for x in range(5):
        for step, share in zip((-1, 0, 2), WALK, strict=True):
            for sign in (1, -1) if mirrored else (1,):
                proposal[x, (x + sign * step) % 5] += share / (2 if mirrored else 1)
    return proposal


def test_mh_accepts_by_the_moves_weight():
    """K from the move's own law and `assess`, invariant and reversible; and the jitted kernel has
    that matrix.
    """
    x, y = (
        jnp.asarray(index.ravel())
        for index in np.meshgrid(np.arange(5), np.arange(5), indexing="ij")
    )
    move = walk(True)
    assert move.assess is not None
    proposal = walk_matrix(True)
    with np.errstate(invalid="ignore"):
        accept = np.exp(
            np.minimum(np.asarray(move.assess(jax.random.key(0), x, y), np.float64), 0)
        ).reshape(5, 5)
    matrix = np.where(proposal > 0, proposal * np.nan_to_num(accept), 0.0)
    np.fill_diagonal(matrix, 0)
    matrix += np.diag(1 - matrix.sum(1))
    np.testing.assert_allclose(matrix, metropolis(PI, proposal), atol=1e-6)
    bias, imbalance = flows(metropolis(PI, proposal))
    assert bias <= 1e-12 and imbalance <= 1e-12
    assert chi_square_z(counted(kernels.mh(move)), matrix) < 4
    check_hastings(move, jnp.tile(jnp.arange(5), 20), key=jax.random.key(4))


def test_law_2_is_not_enough_for_mh():
    """A properly weighted move with another backward law: weights are right, acceptance by them is
    not invariant.
    """
    move, proposal = walk(False), walk_matrix(False)
    assert move.assess is not None
    ratio = np.exp(
        np.asarray(
            move.assess(jax.random.key(0), jnp.arange(5)[:, None], jnp.arange(5)), np.float64
        )
    )
    ratio = np.nan_to_num(ratio)
    np.testing.assert_allclose(PI @ (proposal * ratio), PI, atol=1e-6)  # LAW 2
    matrix = proposal * np.minimum(1, ratio)
    np.fill_diagonal(matrix, 0)
    matrix += np.diag(1 - matrix.sum(1))
    assert flows(matrix)[0] > 1e-2
    with pytest.raises(AssertionError, match="a Hastings ratio changes its sign on the way back"):
        check_hastings(move, jnp.tile(jnp.arange(5), 20), key=jax.random.key(4))


def test_what_is_no_hastings_ratio_is_shown_where_it_is_none():
    move = Move(
        lambda key, x: (x, jnp.where(x == 2, 0.5, 0.0)), assess=lambda key, x, y: jnp.zeros(5)
    )
    with pytest.raises(AssertionError, match="but row 2 has dw = 0.5 there and 0 back"):
        check_hastings(move, jnp.arange(5), key=jax.random.key(0))


def test_nan_and_impossible_are_rejected():
    x = jnp.zeros(3)
    for dw, accepts in ((jnp.nan, False), (-jnp.inf, False), (jnp.inf, True)):
        move = Move(lambda key, x, dw=dw: (x + 1, jnp.full(3, dw)))
        y, info = kernels.mh(move).step(jax.random.key(0), x)
        assert (info.accepted == accepts).all() and (y == x + accepts).all()
        assert (info.changed == accepts).all() and (info.invalid == np.isnan(dw)).all()


def test_kernels_rejuvenate_without_touching_weights():
    log_weights = jnp.array([0.3, -jnp.inf, -1.0, 0.0, 0.5])
    p = base.Particles(jnp.arange(5, dtype=jnp.int32), log_weights, jnp.float32(0.7))
    after = applied(jax.random.key(5), p, kernels.as_move(kernels.repeat(finite(FIRST), 20)))
    np.testing.assert_array_equal(after.log_weights, log_weights)
    assert after.log_z == p.log_z and (after.state != p.state).any()
    # Where the chains are, not what is said of them.
    following = Kernel(lambda x: x, lambda key, x: ((x + 1) % 5, x))
    y, _ = kernels.as_move(following).sample(jax.random.key(5), p.state)
    np.testing.assert_array_equal(y, [1, 2, 3, 4, 0])


# --- samplers as moves and kernels ---

GAMMA = np.array([0.5, 2.0, 0.0, 1.2])
"""Not normalised, and zero somewhere."""
LAW = np.array([0.4, 0.1, 0.2, 0.3])


def weighed(pair: Any) -> base.Particles:
    """Two particles and their importance weights, half of these banked; the state says the slot."""
    log_weights = jnp.log(jnp.asarray(GAMMA / LAW, jnp.float32))[pair]
    return base.Particles(jnp.stack([pair, jnp.arange(2)], 1), log_weights - 0.3, jnp.float32(0.3))


def outcomes(run: Any, patch: pytest.MonkeyPatch, fault: Any = None) -> Any:
    """For both slots, what `run` returns if every row keeps that one, and its chances [rows] to."""
    for slot in range(2):
        chances = []

        def chosen(key: Any, log_weights: Any, num: int, slot=slot, chances=chances) -> Any:
            log_weights = log_weights if fault is None else fault(log_weights)
            dead = np.isneginf(log_weights).all()
            chances.append(0.5 if dead else float(jax.nn.softmax(log_weights)[slot]))
            return jnp.full(num, slot)

        with jax.disable_jit(), patch.context() as inner:
            inner.setattr(kernels, "multinomial", chosen)
            yield run(), np.asarray(chances, np.float64)


def collapsed_mass(patch: pytest.MonkeyPatch, fault: Any = None) -> np.ndarray:
    """E[ exp(dw) 1(y) ] of a collapsed importance sampler, over both draws and the one kept."""
    pairs = np.array([(i, j) for i in range(4) for j in range(4)])
    move = kernels.collapse(lambda key, pair: weighed(pair))
    total = np.zeros(4)
    for (y, dw), chance in outcomes(
        lambda: move.sample(jax.random.key(0), jnp.asarray(pairs)), patch, fault
    ):
        mass = LAW[pairs].prod(1) * chance * np.exp(np.asarray(dw, np.float64))
        np.add.at(total, np.asarray(y)[:, 0], mass)
    return total


def test_a_collapsed_sampler_obeys_law_2(monkeypatch: pytest.MonkeyPatch):
    np.testing.assert_allclose(collapsed_mass(monkeypatch), GAMMA, atol=1e-6)
    # Planted: a particle drawn without regard to its weight; weights that are not in Z-hat.
    assert np.abs(collapsed_mass(monkeypatch, jnp.zeros_like) - GAMMA).max() > 0.1
    monkeypatch.setattr(kernels, "bank", lambda p: p)
    assert np.abs(collapsed_mass(monkeypatch) - GAMMA).max() > 0.1


def gibbs_matrix(patch: pytest.MonkeyPatch, fault: Any = None, held: bool = True) -> np.ndarray:
    """K of `conditional` for two particles, the second of which is the reference if it is `held`,
    and a draw from LAW if not.
    """
    references = jnp.asarray([0, 1, 3])
    matrix = np.zeros((4, 4))
    for i in range(4):
        for j in range(1 if held else 4):

            def around(key: Any, x: Any, i: int = i, j: int = j) -> base.Particles:
                p = weighed(jnp.stack([jnp.asarray(i), x if held else jnp.asarray(j)]))
                return base.Particles(p.state[:, 0], p.log_weights, p.log_z)

            kernel = kernels.conditional(around)
            run = lambda: kernel.step(jax.random.key(0), references)  # noqa: B023, E731, run at once
            for (y, info), chance in outcomes(run, patch, fault):
                share = LAW[i] * (1.0 if held else LAW[j])
                np.add.at(matrix, (np.asarray(references), np.asarray(y)), share * chance)
                np.testing.assert_array_equal(info.changed, y != references)
    return matrix


def test_conditional_leaves_the_law_invariant(monkeypatch: pytest.MonkeyPatch):
    pi = GAMMA / GAMMA.sum()
    matrix = gibbs_matrix(monkeypatch)
    np.testing.assert_allclose(matrix[[0, 1, 3]].sum(1), 1, atol=1e-6)
    assert np.abs(pi @ matrix - pi).max() <= 1e-6 and np.trace(matrix) < 2.5
    # Planted: a particle drawn without regard to its weight; a reference that is let go.
    assert np.abs(pi @ gibbs_matrix(monkeypatch, jnp.zeros_like) - pi).max() > 0.03
    assert np.abs(pi @ gibbs_matrix(monkeypatch, held=False) - pi).max() > 0.03


def test_the_dead_stay_and_costs_are_reported():
    def none(key: Any, x: Any) -> Any:
        state = jnp.arange(3, dtype=x.dtype)
        cost = base.Cost(tokens=jnp.int32(3), forwards=jnp.int32(2), potential_calls=jnp.int32(1))
        trace = Trace(ess=jnp.zeros(1), log_z=jnp.zeros(1), resampled=jnp.zeros(1, bool))
        return Weighted(
            samples=state,
            log_weights=jnp.full(3, -jnp.inf),
            log_z=jnp.float32(0),
            log_z_std_error=jnp.float32(jnp.inf),
            num_invalid=(x == 1).astype(jnp.int32),
            missing_support=0.25 * x.astype(jnp.float32),
            rounds=jnp.int32(1),
            cost=cost,
            trace=trace,
        )

    x = jnp.asarray([2, 1])
    y, info = kernels.conditional(none, batch_size=2).step(jax.random.key(0), x)
    np.testing.assert_array_equal(x, y)
    assert np.isneginf(info.details["log_z"]).all() and not info.changed.any()
    np.testing.assert_array_equal(info.tokens, [3, 3])
    assert int(info.cost.tokens) == 6
    np.testing.assert_array_equal(info.invalid, [False, True])
    np.testing.assert_array_equal(info.missing_support, [0.5, 0.25])
    assert np.isneginf(kernels.collapse(none).sample(jax.random.key(0), x)[1]).all()


def test_how_many_rows_run_at_a_time_changes_nothing():
    def sampler(key: Any, x: Any) -> base.Particles:
        draws = x + jax.random.normal(key, (5,))
        return base.Particles(draws, -(draws**2), jnp.float32(0))

    x = jnp.linspace(-1.0, 1.0, 6)
    for make in (
        lambda batch_size: kernels.collapse(sampler, batch_size=batch_size).sample,
        lambda batch_size: kernels.conditional(sampler, batch_size=batch_size).step,
    ):
        one, all_rows = (make(size)(jax.random.key(1), x) for size in (1, 6))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, all_rows)


def test_a_mixture_of_moves_is_one_of_them():
    moves = [Move(lambda key, x, k=k: (x + k, jnp.full(2, 10.0 * k))) for k in (1, 2)]
    move = jax.jit(kernels.mix(*moves, probs=[3, 1]).sample)
    found = [move(key, jnp.zeros(2)) for key in jax.random.split(jax.random.key(9), 800)]
    y, dw = (np.stack(leaves) for leaves in zip(*found, strict=True))
    np.testing.assert_array_equal(dw, 10 * y)
    assert (y[:, 0] == y[:, 1]).all() and abs((y[:, 0] == 1).mean() - 0.75) < 0.07


# --- over strings ---


@pytest.mark.bad_input
def test_bad_input():
    target = target_of("table", "power")
    exact = enumerate_strings(target)
    x = take_rows(exact.sequences, jnp.asarray(exact.probs.argsort()[-4:]))
    with pytest.raises(
        ValueError, match=r"same chain state, .* kernels 0 and 1 whose states differ at \.log_q"
    ):
        kernels.cycle(suffix.kernel(target), suffix.kernel(target, temperature=0.5)).init(x)
    with pytest.raises(ValueError, match="differ in structure"):
        kernels.mix(suffix.kernel(target), Kernel(lambda x: x, lambda key, x: (x, ()))).init(x)
    with pytest.raises(
        ValueError, match=r"differ at the array itself, \(\(2,\), .*float(32|64).*int(32|64)"
    ):
        kernels.cycle(finite(FIRST), Kernel(lambda x: x.astype(int), finite(FIRST).step)).init(
            jnp.ones(2)
        )
    with pytest.raises(ValueError, match="at least one kernel, got none"):
        kernels.cycle()
    with pytest.raises(ValueError, match="one positive probability for each of 2 kernels"):
        kernels.mix(finite(FIRST), finite(SECOND), probs=[1.0])
    with pytest.raises(ValueError, match="leave out kernels that are never to run"):
        kernels.mix(finite(FIRST), finite(SECOND), probs=[1.0, 0.0])
    with pytest.raises(ValueError, match="expected kernels or moves, got both"):
        kernels.mix(finite(FIRST), Move(lambda key, x: (x, x)))  # pyright: ignore
    for make in (kernels.collapse, kernels.conditional):
        with pytest.raises(ValueError, match="expected batch_size"):
            make(lambda key, x: x, batch_size=0)
    with pytest.raises(ValueError, match="expected num"):
        kernels.repeat(finite(FIRST), 0)
    with pytest.raises(ValueError, match="expected a move with assess"):
        check_hastings(Move(lambda key, x: (x, x)), jnp.ones(2), key=jax.random.key(0))
