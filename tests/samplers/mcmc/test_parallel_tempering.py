"""Parallel tempering leaves the product of its rungs invariant: enumerated, jitted, against
transfer matrices.
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
from models import tabular
from ppl.ancestral import ancestral
from ppl.exact import enumerate_strings
from ppl.lm import LM
from ppl.rows import take_rows
from ppl.target import Target
from samplers.base import Kernel
from samplers.mcmc import parallel_tempering, suffix, suffix_csmc
from samplers.strings import cuts, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import EOS, PROMPT, TraceCounter
from tests.samplers.chains import Chain, chi_square_z, suffix_chain, wordy
from tests.samplers.problems import score_arrays, target_of

CHAINS = 20_000


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# The product, enumerated.


def rungs_of(target: Target, ladder: Any, **options: Any) -> list[Chain]:
    """The transition matrix of every rung's own kernel."""
    return [
        suffix_chain(dataclasses.replace(target, alpha=jnp.float32(alpha)), **options)
        for alpha in ladder
    ]


def product(rungs: list[Chain]) -> np.ndarray:
    """The product law [M, ..., M]."""
    law = np.ones(())
    for rung in rungs:
        law = law[..., None] * rung.pi
    return law


def moved(law: np.ndarray, rungs: list[Chain], num_moves: int = 1) -> np.ndarray:
    """Laws [..., M, ..., M] over all rungs' strings after moves of every replica."""
    for k, rung in enumerate(rungs):
        matrix = np.linalg.matrix_power(rung.matrix, num_moves)
        axis = k - len(rungs)
        law = np.moveaxis(np.moveaxis(law, axis, -1) @ matrix, -1, axis)
    return law


def swept(law: np.ndarray, rungs: list[Chain], powers: Any) -> np.ndarray:
    """... and after a sweep, by the sampler's own acceptance."""
    log_p = np.asarray(rungs[0].pieces.log_p).sum(1)
    with jax.enable_x64(True):
        ladder = jnp.asarray(np.asarray(powers, np.float32), jnp.float64)
        x, y = (jnp.asarray(pair) for pair in np.broadcast_arrays(log_p[:, None], log_p))
        for k in range(len(rungs) - 1):
            ratio = np.asarray(parallel_tempering.log_swap_ratio(ladder, jnp.int32(k), x, y))
            accept = np.exp(np.minimum(np.where(np.isnan(ratio), -np.inf, ratio), 0))
            pairs = np.moveaxis(law, (k - len(rungs), k + 1 - len(rungs)), (-2, -1))
            swapped = pairs * accept
            pairs = pairs - swapped + swapped.swapaxes(-1, -2)
            law = np.moveaxis(pairs, (-2, -1), (k - len(rungs), k + 1 - len(rungs)))
    return law


def test_the_product_of_all_rungs_is_invariant():
    """|pi K - pi| <= 1e-12, of moves and swaps and for the target's own rung."""
    target, powers = small(), [0.4, 1.1, 2.0]
    rungs = rungs_of(target, powers, cut=cuts.uniform_in_length)
    pi = product(rungs)
    after = swept(moved(pi, rungs), rungs, powers)
    assert np.abs(after - pi).max() <= 1e-12
    others = tuple(range(len(powers) - 1))
    assert np.abs(after.sum(others) - rungs[-1].pi).max() <= 1e-12
    # The last rung is the target, and swaps do something.
    np.testing.assert_allclose(rungs[-1].pi, enumerate_strings(target).probs, atol=1e-6)
    start = np.zeros_like(pi)
    start[np.unravel_index(pi.argmax(), pi.shape)[::-1]] = 1.0
    start = moved(start, rungs)
    assert np.abs(swept(start, rungs, powers) - start).sum() > 0.01


FAULTS: dict[str, Callable[..., Any]] = {
    "the other way round": lambda ladder, k, x, y: RIGHT(ladder, k, y, x),
    "powers forgotten": lambda ladder, k, x, y: x - y,
    "one power only": lambda ladder, k, x, y: ladder[k + 1] * (x - y),
    "the next pair": lambda ladder, k, x, y: RIGHT(jnp.asarray([0.1, 0.6, 2.0]), 1 - k, x, y),
}
RIGHT = parallel_tempering.log_swap_ratio


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_swap_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    target, powers = small(), [0.5, 2.0]
    rungs = rungs_of(target, powers)
    assert np.abs(swept(product(rungs), rungs, powers) - product(rungs)).max() <= 1e-12
    monkeypatch.setattr(parallel_tempering, "log_swap_ratio", FAULTS[name])
    assert np.abs(swept(product(rungs), rungs, powers) - product(rungs)).max() > 1e-3


@pytest.mark.slow
def test_the_toy_of_the_paper():
    """From (a, EOS) suffix moves have total variation (2/3)(5/8)^N; a hot rung and swaps do not
    change the limit.
    """
    target = tabular.markov([[0.5, 0.5], [0.5, 0.5]], eos=1).given((0,), max_tokens=2) ** 2
    powers = [1.0, 2.0]
    rungs = rungs_of(target, powers)
    chain = rungs[-1]
    assert [tuple(row) for row in np.asarray(chain.pieces.sequences.tokens).tolist()] == [
        (1, 1),
        (0, 1),
        (0, 0),
    ]
    np.testing.assert_allclose(chain.pi, [2 / 3, 1 / 6, 1 / 6], atol=1e-12)
    law = np.array([0.0, 1.0, 0.0])
    both = np.zeros((3, 3))
    both[1, 1] = 1.0
    for n in range(13):
        if n:
            assert 0.5 * np.abs(law - chain.pi).sum() == pytest.approx(
                2 / 3 * (5 / 8) ** n, abs=1e-7
            )
        law, both = law @ chain.matrix, swept(moved(both, rungs), rungs, powers)
    assert np.abs(both.sum(0) - chain.pi).sum() < np.abs(law - chain.pi).sum()


@pytest.mark.parametrize("problem", ["second_lm", "banned", "reward"])
def test_strings_follow_their_rung_without_the_model(problem: str):
    """log q carried to another rung is that of a fresh look there, also where the proposal looks
    ahead.
    """
    target, ladder = target_of("table", problem), jnp.asarray([0.4, 1.1, 2.0])
    x = enumerate_strings(target).sequences
    proposal, num = proposals.Powered(ladder, lookahead=True), x.length.shape[0]

    def at(rung: Any) -> tuple[Target, regeneration.State]:
        here = dataclasses.replace(target, alpha=ladder[rung])
        return here, regeneration.score(here, proposal, x)

    first, last = jnp.arange(num) % 3, (jnp.arange(num) + 1) % 3
    (here, fresh), (_, old) = at(last), at(first)
    inside = ~np.isneginf(np.asarray(regeneration.log_density(here, fresh)))
    carried = regeneration.at_rung(here, old, last)
    np.testing.assert_allclose(carried.log_q[inside], fresh.log_q[inside], atol=1e-5)
    assert np.abs(np.asarray(carried.log_q - old.log_q))[inside].max() > 0.1
    assert np.isneginf(np.asarray(carried.log_q)).any(1)[~inside].all()


# The jitted chains.


def letters() -> LM:
    """Three tokens, T = 2."""
    return tabular.random_table(jax.random.key(5), 3, 2, eos=EOS)


def small() -> Target:
    """A power, and a reward that is not powered."""
    return letters().given((0,), max_tokens=2) ** 2 * ppl.reward(score_arrays)


def product_start(target: Target, powers: Any) -> tuple[Callable[..., Any], np.ndarray]:
    """(C strings of the target) -> chains whose other rungs are exact draws; and the rungs' laws
    [K, M].
    """
    exact = [
        enumerate_strings(dataclasses.replace(target, alpha=jnp.float32(alpha))) for alpha in powers
    ]
    laws = np.stack([of.probs for of in exact])

    def start(x: Any) -> Any:
        rng, num = np.random.default_rng(0), x.length.shape[0]
        rows = np.stack(
            [rng.choice(len(law), num, p=law) for law in laws[:-1]] + [exact[-1].index(x.tokens)],
            axis=1,
        )
        strings = take_rows(exact[-1].sequences, jnp.asarray(rows.ravel()))
        return parallel_tempering.init(target, powers, strings)

    return start, laws


def indices(target: Target, state: parallel_tempering.State) -> np.ndarray:
    """Which string is at each rung [C, K]."""
    exact = enumerate_strings(target)
    return np.stack(
        [exact.index(state.at(k).sequences.tokens) for k in range(state.rung.shape[1])], axis=1
    )


def counted(target: Target, powers: Any, make: Any) -> tuple[np.ndarray, np.ndarray]:
    """Moves of the product's chains between all tuples of strings, of a step from the product; and
    its law.
    """
    start, laws = product_start(target, powers)
    rng, size = np.random.default_rng(1), laws.shape[1]
    x = take_rows(
        enumerate_strings(target).sequences, jnp.asarray(rng.choice(size, CHAINS, p=laws[-1]))
    )
    kernel = parallel_tempering.kernel(target, powers, make=make)
    state = start(x)
    place = size ** np.arange(len(powers))[::-1]
    before = indices(target, state) @ place
    # Twice, so that the rungs are no longer in the order of the rows.
    for key in jax.random.split(jax.random.key(3)):
        state, _ = kernel.step(key, state)
    counts = np.zeros((size ** len(powers),) * 2)
    np.add.at(counts, (before, indices(target, state) @ place), 1)
    return counts, laws


def product_matrix(target: Target, powers: Any, num_moves: int) -> np.ndarray:
    """Of two steps."""
    rungs = rungs_of(target, powers)
    states = np.eye(len(rungs[0].pi) ** len(powers))
    laws = states.reshape(-1, *(len(rung.pi) for rung in rungs))
    steps = swept(moved(laws, rungs, num_moves), rungs, powers).reshape(states.shape)
    return steps @ steps


@pytest.mark.slow
def test_the_chains_make_the_moves_of_the_product():
    powers = [0.2, 0.7, 2.0]
    counts, _ = counted(small(), powers, parallel_tempering.suffix_moves(2))
    assert abs(chi_square_z(counts, product_matrix(small(), powers, 2))) < 5
    # The test would see another kernel.
    assert chi_square_z(counts, product_matrix(small(), powers, 1)) > 10


@pytest.mark.slow
def test_chains_with_a_fault_are_found_out(monkeypatch: pytest.MonkeyPatch):
    """Rows keep log q of their old rung after a swap."""
    monkeypatch.setattr(parallel_tempering, "at_rung", lambda target, x, rung: x)
    # A new function: traced anew.
    make = parallel_tempering.suffix_moves(2, cut=lambda *args: cuts.uniform(*args))
    counts, _ = counted(small(), [0.3, 2.0], make)
    assert chi_square_z(counts, product_matrix(small(), [0.3, 2.0], 2)) > 10


def particle_gibbs(target: Target, proposal: proposals.Powered) -> Kernel:
    return suffix_csmc.kernel(target, num_particles=3, proposal=proposal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "problem", "powers", "make"),
    [
        (
            "markov",
            "must_end",
            [0.5, 0.8, 1.0],
            parallel_tempering.suffix_moves(2, log_phi_max=0.0),
        ),
        ("hmm", "product", [0.4, 1.2], particle_gibbs),
    ],
)
def test_the_target_is_invariant_within_the_product(
    model: str, problem: str, powers: Any, make: Any
):
    """Also with constraints, bounds for early rejection, and particle Gibbs within parallel
    tempering.
    """
    target = target_of(model, problem)
    kernel = parallel_tempering.kernel(target, powers, make=make)
    check_kernel(
        Kernel(product_start(target, powers)[0], kernel.step),
        target,
        key=jax.random.key(4),
        num_steps=2,
    )


# Runs.


def extension(before: Chain, after: Chain, size: int) -> np.ndarray:
    """The law of every string of at most `size` tokens, continued by the proposal of a longer
    stage.
    """
    x, y, log_q = before.pieces.sequences, after.pieces.sequences, np.asarray(after.pieces.log_q)
    begins = (np.asarray(y.tokens)[None, :, :size] == np.asarray(x.tokens)[:, None, :]).all(2)
    return np.where(begins, np.exp(log_q[:, size:].sum(1)), 0.0)


def law_of_a_run(powers: Any, sweep: Callable[..., Any]) -> np.ndarray:
    """Stages of one token; of a stage's four moves the first is its extension, and after every two
    there is a sweep.
    """
    stages = [rungs_of(letters().given((0,), max_tokens=n), powers) for n in (1, 2)]
    law = np.ones((1, 1))
    for n, rungs in enumerate(stages):
        for k, rung in enumerate(rungs):
            first = np.exp(np.asarray(rung.pieces.log_q).sum(1))[None]
            growth = first if n == 0 else extension(stages[n - 1][k], rung, n)
            law = np.moveaxis(np.moveaxis(law, k, -1) @ growth, -1, k)
        law = sweep(moved(sweep(moved(law, rungs), rungs, powers), rungs, 2), rungs, powers)
    return law.reshape(1, -1)


@pytest.mark.slow
def test_the_law_of_a_run():
    target, powers = letters().given((0,), max_tokens=2) ** 1.8, [0.6, 1.8]
    law = law_of_a_run(powers, swept)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-5)
    out = parallel_tempering.run(
        jax.random.key(0),
        target,
        powers,
        num_chains=CHAINS,
        block_size=1,
        sweeps_per_block=2,
        moves_per_sweep=2,
    )
    size = round(law.size**0.5)
    counts = np.bincount(indices(target, out.state) @ [size, 1], minlength=law.size)[None]
    assert abs(chi_square_z(counts, law)) < 5
    # Without swaps it would be another.
    assert chi_square_z(counts, law_of_a_run(powers, lambda law, *_: law)) > 5
    swaps = out.info.details
    assert out.info.accepted.shape == (1, 4, CHAINS, 2, 2)
    assert swaps["swapped"].shape == (1, 4, CHAINS, 1) and out.steps == 4
    assert out.cost is not None and int(out.cost.tokens) == int(out.info.tokens.sum())
    np.testing.assert_allclose(
        swaps["swap_acceptance"].mean((0, 1, 2)), swaps["swapped"].mean((0, 1, 2)), atol=0.01
    )


# What else is promised.

LARGE = wordy()


@pytest.fixture(scope="module")
def large() -> tuple[Target, Any]:
    """p over 50 tokens, T = 12, and 5 draws."""
    p = LARGE.given(PROMPT, max_tokens=12)
    return p, ancestral(jax.random.key(1), p, 5)


@pytest.mark.slow
def test_state_and_info_say_what_happened(large: Any):
    p, x = large
    kernel = parallel_tempering.kernel(p**2, [0.5, 1, 2], make=parallel_tempering.suffix_moves(3))
    state = kernel.init(x)
    np.testing.assert_array_equal(state.sequences.tokens, x.tokens)
    swaps = 0
    for i in range(6):
        before = state
        state, info = kernel.step(jax.random.key(i), state)
        np.testing.assert_array_equal(np.sort(state.rung, axis=1), np.tile(np.arange(3), (5, 1)))
        swapped, chance = (np.asarray(info.details[k]) for k in ("swapped", "swap_acceptance"))
        assert info.accepted.shape == info.changed.shape == (5, 3, 3)
        assert swapped.shape == chance.shape == (5, 2)
        assert int(info.cost.tokens) == int(info.tokens.sum())
        assert not (np.asarray(info.changed) & ~np.asarray(info.accepted)).any()
        assert (chance > 0)[swapped].all()
        np.testing.assert_array_equal(info.details["rung"], state.rung)
        # Composed, the swaps take every replica from where it was to where it is.
        rungs = np.array(before.replica)
        for k in range(2):
            rows = swapped[:, k]
            rungs[rows, k], rungs[rows, k + 1] = rungs[rows, k + 1].copy(), rungs[rows, k].copy()
        np.testing.assert_array_equal(rungs, state.replica)
        swaps += int(swapped.sum())
    assert swaps > 5 and (np.asarray(state.rung) != np.arange(3)).any()
    # The pieces are those of a fresh look, at the rung where each row is now.
    order = np.asarray(state.rung)
    fresh = suffix.kernel(
        parallel_tempering.at_rungs(p, jnp.asarray([0.5, 1.0, 2.0]), state.rung),
    ).init(state.rows.sequences)
    assert (order != np.arange(3)).any()
    np.testing.assert_allclose(state.rows.log_p, fresh.log_p, atol=1e-5)
    np.testing.assert_allclose(state.rows.log_q, fresh.log_q, atol=1e-5)
    np.testing.assert_allclose(state.log_prob, state.at(2).log_p.sum(1))


def test_a_swap_does_not_ask_the_model(large: Any):
    def asked(*args: Any) -> Any:
        raise AssertionError("a swap asked the model")

    p, x = large
    ladder = jnp.asarray([1.0, 2.0])
    state = parallel_tempering.kernel(p**2, ladder).init(x)
    silent = dataclasses.replace(p.lm, functions=type(p.lm.functions)(*[asked] * 5))
    target = dataclasses.replace(p, lm=silent)
    with pytest.raises(AssertionError, match="asked"):
        parallel_tempering.kernel(target**2, ladder).step(jax.random.key(0), state)
    after, _, swapped = parallel_tempering.exchange(jax.random.key(0), target, ladder, state)
    assert swapped.all() and (after.rung != state.rung).all()  # equal strings always swap
    np.testing.assert_array_equal(after.rows.sequences.tokens, state.rows.sequences.tokens)


@pytest.mark.slow
def test_any_kernel_of_the_replicas(large: Any):
    p, x = large
    kernels = [
        parallel_tempering.kernel(p**2, [1, 2], make=make)
        for make in (None, lambda target, proposal: suffix.kernel(target, proposal=proposal))
    ]
    (ours, _), (theirs, info) = (
        kernel.step(jax.random.key(0), kernel.init(x)) for kernel in kernels
    )
    np.testing.assert_array_equal(ours.rows.sequences.tokens, theirs.rows.sequences.tokens)
    assert info.accepted.shape == (5, 2) and info.cost.forwards.shape == ()


@pytest.mark.slow
def test_chains_and_compilation(large: Any):
    """Chain i is the same whatever the number of chains; another power, ladder or key compiles
    nothing new.
    """
    p, x = large
    counter = TraceCounter(cuts.uniform)
    make = parallel_tempering.suffix_moves(2, cut=counter)

    def run(target: Target, ladder: Any, num: int) -> Any:
        kernel = parallel_tempering.kernel(target, ladder, make=make)
        state = kernel.init(take_rows(x, jnp.arange(num)))
        return kernel.step(jax.random.key(0), state)[0]

    few = run(p**2, [1, 2], 2)
    many = run(p**2, [1, 2], 5)
    np.testing.assert_array_equal(few.rows.sequences.tokens, many.rows.sequences.tokens[:4])
    np.testing.assert_array_equal(few.rung, many.rung[:2])
    seen = counter.count
    run(p**3, [0.5, 3], 5)
    assert counter.count == seen > 0


@pytest.mark.bad_input
def test_bad_input(large: Any):
    p, x = large
    key = jax.random.key(0)
    for ladder in ([1, 1, 2], [2, 1], [0, 2], [-1, 2], [1, float("nan")]):
        with pytest.raises(
            ValueError, match="expected a ladder of powers above 0 that increase strictly"
        ):
            parallel_tempering.kernel(p**2, ladder)
    for ladder in ([2], [], [[1, 2]]):
        with pytest.raises(ValueError, match="expected a ladder of at least two powers"):
            parallel_tempering.run(key, p**2, ladder)
    with pytest.raises(
        ValueError, match="expected a ladder that ends at the target's alpha, 3, got 2"
    ):
        parallel_tempering.kernel(p**3, [1, 2])
    with pytest.raises(ValueError, match="ends at the target's alpha, nan"):
        parallel_tempering.kernel(dataclasses.replace(p, alpha=jnp.float32(jnp.nan)), [1, 2])
    for name in ("num_chains", "block_size", "sweeps_per_block", "moves_per_sweep"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            parallel_tempering.run(key, p**2, [1, 2], **options)
    with pytest.raises(ValueError, match="expected moves in every block"):
        parallel_tempering.run(key, p**2, [1, 2], sweeps_per_block=1, moves_per_sweep=1)
    with pytest.raises(ValueError, match="expected num_moves to be a whole number"):
        parallel_tempering.suffix_moves(0)
    with pytest.raises(ValueError, match="in the support of the target, got log gamma = -inf"):
        banned = p**2 * ppl.banned([int(x.tokens[0, 0])])
        parallel_tempering.kernel(banned, [1, 2]).init(x)
