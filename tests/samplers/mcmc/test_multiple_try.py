"""Multiple-try moves leave their target invariant: transition matrices over all tries, and the
jitted chains.
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

import ppl
from ppl.ancestral import ancestral
from ppl.exact import enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from samplers.mcmc import multiple_try
from samplers.strings import cuts, growing, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import PROMPT, TraceCounter
from tests.samplers.chains import (
    Chain,
    chi_square_z,
    eight_strings,
    first_cut,
    pieces_of,
    second_eigenvalue,
    suffix_chain,
    wordy,
)
from tests.samplers.problems import score_arrays, target_of
from tests.samplers.tape import small_target, three_letters


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# The transition matrix.


def multiple_try_chain(target: Any, **options: Any) -> Chain:
    """K of `multiple_try.kernel`: its law of the cut, its weights, what it keeps, and its
    acceptance.
    """
    how = multiple_try.method(target, **options)
    with jax.enable_x64(True):
        x = pieces_of(target, how)
        log_gamma, length = np.asarray(regeneration.log_density(target, x)), x.sequences.length
        num, horizon = len(log_gamma), target.max_tokens
        pairs = take_rows(x, jnp.tile(jnp.arange(num), num))  # present, outcome
        found: list[tuple[np.ndarray, ...]] = []
        for r in range(horizon):
            cut = jnp.full(num, r)
            end = multiple_try.end_of(target, how, cut)
            chance = np.exp(np.asarray(how.cut(cut, length, jnp.full(num, horizon)), np.float64))
            log_w = np.asarray(multiple_try.log_weight(target, how, x, cut, end))
            kept = multiple_try.keeps_rest(pairs, jnp.repeat(length, num), jnp.repeat(end, num))
            kept = np.asarray(kept).reshape(num, num)
            draw = np.exp(np.asarray(x.log_q)[:, r : int(end[0])].sum(1))
            for present, outcomes in blocks(x, np.isfinite(log_gamma), r, int(end[0])):
                assert np.abs(draw[outcomes].sum() - 1) < 1e-5
                outcomes = outcomes[draw[outcomes] > 0]
                tries = outcomes[
                    np.indices((len(outcomes),) * how.num_tries).reshape(how.num_tries, -1).T
                ]
                probs = draw[tries].prod(1)
                for i in present:
                    weights, rows = (
                        np.where(kept[i, tries], log_w[tries], -np.inf),
                        np.full(len(tries), i),
                    )
                    found.append((rows, tries, weights, log_w[rows], chance[i] * probs))
        rows, ends, weights, present, probs = (
            np.concatenate(parts) for parts in zip(*found, strict=True)
        )
        ratio = np.asarray(
            jax.jit(lambda *w: multiple_try.log_ratio(*w))(
                jnp.asarray(weights), jnp.asarray(present)
            )
        )
    shares = np.exp(weights - np.maximum(weights.max(1, keepdims=True), -1e300))
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-300)
    matrix = np.zeros((num, num))
    np.add.at(matrix, (rows[:, None], ends), probs[:, None] * shares * np.exp(np.minimum(ratio, 0)))
    np.fill_diagonal(matrix, 0.0)
    return Chain(x, log_gamma - np.logaddexp.reduce(log_gamma), matrix + np.diag(1 - matrix.sum(1)))


def blocks(x: Any, inside: np.ndarray, r: int, e: int) -> Any:
    """Strings of positive density that are equal outside of r..e-1, and all that may be drawn for
    them.
    """
    tokens, length = np.asarray(x.sequences.tokens), np.asarray(x.sequences.length)
    reaches = length >= r
    groups: dict[tuple, list[int]] = {}
    for i in np.flatnonzero(reaches & inside):
        groups.setdefault((*tokens[i, :r], -1, *tokens[i, e:]), []).append(i)
    for present in groups.values():
        i = present[0]
        begins = reaches & (tokens[:, :r] == tokens[i, :r]).all(1)
        yield (
            np.asarray(present),
            np.flatnonzero(begins & ((length < e) | (tokens[:, e:] == tokens[i, e:]).all(1))),
        )


SMALL: dict[str, Callable[[], Any]] = {
    "factors": lambda: small_target(3),
    "power": lambda: three_letters(3) ** 2.5,
    "reward": lambda: three_letters(3) ** 0.7 * ppl.reward(score_arrays),
    "must_end": lambda: three_letters(3) ** 1.5 * ppl.must_end(),
    "min_tokens": lambda: three_letters(3) ** 1.5 * ppl.min_tokens(2),
    "banned": lambda: three_letters(3) * ppl.banned([2]) * ppl.reward(score_arrays),
}
LENGTH, LOCAL = {"cut": cuts.uniform_in_length}, {"proposal": proposals.locally_optimal}
TEMPERED = {"temperature": 0.7}
NARROW = {"proposal": proposals.top_k(2)}


@pytest.mark.parametrize(
    ("name", "tries", "ways"),
    [
        ("factors", (2,), [{}]),
        slow("power", (2,), [NARROW]),
        slow("reward", (3,), [TEMPERED]),
        slow("min_tokens", (2, 3), [LOCAL]),
        slow("banned", (2,), [{}]),
        slow("must_end", (2,), [LENGTH]),
    ],
)
def test_the_transition_matrix_leaves_pi_invariant(
    name: str, tries: tuple[int, ...], ways: list[dict[str, Any]]
):
    """|pi K - pi| <= 1e-12 and detailed balance, whatever is drawn anew: all of the rest, or
    blocks.
    """
    target = SMALL[name]()
    pi = enumerate_strings(target).probs
    for num_tries, block, options in itertools.product(tries, (None, 1, 2), ways):
        chain = multiple_try_chain(target, num_tries=num_tries, block=block, **options)
        np.testing.assert_allclose(chain.pi, pi, atol=1e-6)
        assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12 and chain.matrix.min() >= -1e-6
        assert 1 - chain.pi @ np.diag(chain.matrix) > 1e-4


@pytest.mark.parametrize("options", [{}, slow(TEMPERED | LENGTH)])
def test_one_try_is_suffix_metropolis_hastings(options: dict[str, Any]):
    target = small_target(3)
    ours, theirs = (
        multiple_try_chain(target, num_tries=1, **options),
        suffix_chain(target, **options),
    )
    np.testing.assert_allclose(ours.matrix, theirs.matrix, atol=1e-12)


@pytest.mark.slow
def test_more_tries_mix_better():
    target = eight_strings()
    found = [
        second_eigenvalue(multiple_try_chain(target, num_tries=m, cut=first_cut)) for m in (1, 2, 3)
    ]
    assert found[0] == pytest.approx(second_eigenvalue(suffix_chain(target, cut=first_cut)))
    assert found[0] > 1.3 * found[1] and found[1] > 1.2 * found[2], found


@pytest.mark.slow
def test_many_tries_are_blocked_gibbs():
    """The block is drawn from its law given all the rest: its distance falls with the tries."""
    target = small_target(2)
    distances = []
    for m in (1, 2, 4):
        chain = multiple_try_chain(target, num_tries=m, block=1)
        distances.append(np.abs(chain.matrix - gibbs(chain, target.max_tokens)).sum(1) @ chain.pi)
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 3, (
        distances
    )


def gibbs(chain: Chain, horizon: int) -> np.ndarray:
    """One position, drawn uniformly, given the others."""
    tokens, length = (
        np.asarray(leaf) for leaf in (chain.pieces.sequences.tokens, chain.pieces.sequences.length)
    )
    matrix = np.zeros((len(length), len(length)))
    for i, r in itertools.product(range(len(length)), range(horizon)):
        same = (np.delete(tokens, r, 1) == np.delete(tokens[i], r)).all(1) & (length >= r)
        same = same if r <= length[i] else np.arange(len(length)) == i
        matrix[i] += np.where(same, chain.pi, 0.0) / chain.pi[same].sum() / horizon
    return matrix


# Faults.


def up_to(x: Any, end: Any) -> Any:
    """Without the pieces of what is kept."""
    drawn = jnp.arange(x.log_p.shape[1]) < end[:, None]
    log_p, log_phi = (jnp.where(drawn, leaf, 0.0) for leaf in (x.log_p, x.log_phi))
    return dataclasses.replace(x, log_p=log_p, log_phi=log_phi)


RATIO = multiple_try.log_ratio
WEIGHT = multiple_try.log_weight
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "present weight forgotten": (
        "log_ratio",
        lambda w, present: RATIO(w, jnp.full_like(present, -1e3)),
    ),
    "q of the kept rest": (
        "log_weight",
        lambda target, how, x, cut, end: WEIGHT(
            target, how, x, cut, jnp.full_like(end, target.max_tokens)
        ),
    ),
    "only the block is weighed": (
        "log_weight",
        lambda target, how, x, cut, end: WEIGHT(target, how, up_to(x, end), cut, end),
    ),
    "no law of the cut": (
        "log_weight",
        lambda target, how, *rest: WEIGHT(
            target, dataclasses.replace(how, cut=cuts.uniform), *rest
        ),
    ),
    "an early end keeps its weight": ("keeps_rest", lambda y, length, end: y.sequences.length >= 0),
}


FAST = ("present weight forgotten", "q of the kept rest")


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in FAULTS])
def test_a_fault_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    target = small_target(3)
    monkeypatch.setattr(multiple_try, *FAULTS[name])
    assert multiple_try_chain(target, num_tries=2, block=2, cut=cuts.uniform_in_length).bias > 1e-3


# The jitted chains.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"num_tries": 2, "block": 2, **LENGTH}, lambda: small_target(3)),
        slow({"num_tries": 2, "block": 2, **LOCAL}, lambda: target_of("hmm", "product")),
    ],
)
def test_the_chains_make_the_moves_of_the_matrix(
    options: dict[str, Any], target: Callable[[], Any]
):
    target = target()
    chain = multiple_try_chain(target, **options)
    assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
    counts = check_kernel(multiple_try.kernel(target, **options), target, key=jax.random.key(3))
    assert abs(chi_square_z(counts, chain.matrix)) < 5
    # The test would see another kernel.
    other = multiple_try_chain(
        target, **{**options, "num_tries": 1, "temperature": 0.5, "proposal": None}
    )
    assert chi_square_z(counts, other.matrix) > 10


REORDER = growing.reorder


def stale(target: Any, proposal: Any, g: Any, rows: Any) -> Any:
    """All tries have the first chain's state of the potential."""
    right = REORDER(target, proposal, g, rows)
    return dataclasses.replace(right, potential=take_rows(g.potential, jnp.zeros_like(rows)))


JITTED_FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "state of the potential": (growing, "reorder", stale),
    "always the first try": (
        multiple_try,
        "categorical",
        lambda keys, log_w: (jnp.zeros(keys.shape, jnp.int32), log_w[:, 0]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JITTED_FAULTS)
def test_chains_with_a_fault_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch):
    target, cut = small_target(3), lambda *args: cuts.uniform(*args)  # a new function: traced anew
    monkeypatch.setattr(*JITTED_FAULTS[name])
    kernel = multiple_try.kernel(target, num_tries=2, block=2, cut=cut)
    with pytest.raises(AssertionError, match="not invariant"):
        check_kernel(kernel, target, key=jax.random.key(3), num_steps=3)


# What else is promised.

LARGE = wordy()


@pytest.fixture(scope="module")
def large() -> tuple[Any, Sequences]:
    """p over 50 tokens, T = 20, and 12 draws."""
    p = LARGE.given(PROMPT, max_tokens=20)
    return p, ancestral(jax.random.key(1), p, 12)


@pytest.mark.slow
def test_state_and_info_say_what_happened(large: Any):
    p, x = large
    target, block = p**2 * ppl.step_scores(score_arrays, ppl.Steps(every=1)), 3
    kernel = multiple_try.blocked_gibbs(target, block=block, num_tries=5)
    state, some = kernel.init(x), 0
    for i in range(3):
        before = state
        state, info = kernel.step(jax.random.key(i), state)
        old, new = np.asarray(before.sequences.tokens), np.asarray(state.sequences.tokens)
        cut, accepted, length = (
            np.asarray(a) for a in (info.details["cut"], info.accepted, before.sequences.length)
        )
        anew = (np.arange(20) >= cut[:, None]) & (np.arange(20) < cut[:, None] + block)
        assert (old == new)[~anew].all() and (old == new)[~accepted].all()
        beyond = cut > length
        assert not accepted[beyond].any() and not np.asarray(info.tokens)[beyond].any()
        drawn = np.asarray(info.tokens)[~beyond]
        assert (drawn >= 5).all() and (drawn <= 5 * block).all()
        assert int(info.cost.tokens) == drawn.sum() and int(info.cost.potential_calls) > drawn.sum()
        assert block <= int(info.cost.forwards) <= 20
        assert (
            not info.outside_support.any()
            and not info.invalid.any()
            and not info.missing_support.any()
        )
        some += accepted.sum()
    assert some > 3
    # The pieces are those of a fresh look, kept tokens' included.
    fresh = kernel.init(state.sequences)
    for name in ("log_p", "log_q", "log_phi"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), atol=1e-4)
    density = target.log_density(state.sequences.tokens, state.sequences.length)
    np.testing.assert_allclose(regeneration.log_density(target, state), density, rtol=1e-4)


@pytest.mark.slow
def test_chains_of_their_own_alpha(large: Any):
    """Each moves as it does where all have its alpha; nor does it matter how many there are."""
    p, x = large
    alphas = jnp.linspace(1.0, 4.0, 12)
    key = jax.random.key(7)

    def moved(target: Any, x: Sequences) -> Any:
        kernel = multiple_try.kernel(target, num_tries=3)
        state, info = kernel.step(key, kernel.init(x))
        return state.sequences.tokens, info.accepted

    tokens, accepted = moved(dataclasses.replace(p, alpha=alphas), x)
    assert 2 < int(accepted.sum()) < 12
    for i in (5, 11):
        alone, took = moved(p ** float(alphas[i]), take_rows(x, jnp.arange(i + 1)))
        np.testing.assert_array_equal(tokens[i], alone[i])
        assert bool(accepted[i]) == bool(took[i])


@pytest.mark.slow
def test_a_chain_outside_of_the_support_comes_in():
    target = target_of("hmm", "banned")
    state = regeneration.score(
        target,
        proposals.Powered(),
        Sequences(jnp.tile(jnp.asarray([[0, 2, 3, 3]]), (200, 1)), jnp.full(200, 4)),
    )
    kernel = multiple_try.kernel(target, num_tries=2)
    for i in range(8):
        state, info = kernel.step(jax.random.key(i), state)
        outside = np.isneginf(
            np.asarray(target.log_density(state.sequences.tokens, state.sequences.length))
        )
        np.testing.assert_array_equal(info.outside_support, outside)
    assert outside.mean() < 0.2


@pytest.mark.slow
def test_a_new_kernel_compiles_nothing_new(large: Any):
    p, x = large
    counter, seen = TraceCounter(cuts.uniform), []
    for alpha, key in itertools.product((2.0, 3.0), (0, 1)):
        kernel = multiple_try.token_replacement(p**alpha, cut=counter)
        kernel.step(jax.random.key(key), kernel.init(x))
        seen.append(counter.count)
    assert seen[0] == seen[-1] > 0


@pytest.mark.bad_input
def test_bad_input():
    p, x = three_letters(2), Sequences(jnp.asarray([[0, 2], [2, 2]]), jnp.asarray([2, 2]))
    with pytest.raises(
        ValueError, match="expected num_tries to be a whole number of at least 1, got 0"
    ):
        multiple_try.kernel(p, num_tries=0)
    with pytest.raises(
        ValueError, match="expected block to be a whole number of at least 1, got 0"
    ):
        multiple_try.kernel(p, block=0)
    with pytest.raises(ValueError, match="expected a target with alpha above 0"):
        multiple_try.kernel(p**-1.0)
    with pytest.raises(
        ValueError, match="in the support of the target, got log gamma = -inf for row"
    ):
        multiple_try.kernel(p * ppl.banned([0])).init(x)
