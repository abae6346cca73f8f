"""Multiple-try moves leave their target invariant: transition matrices over all tries, and the jitted chains."""

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
from ppl.lm import take_rows
from ppl.sequences import Sequences
from samplers import cuts, multiple_try, proposals, regeneration, suffix
from samplers.testing import check_kernel
from tests.helpers import MAX_TOKENS, PROMPT
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
from tests.samplers.tape import EOS, small_target, three_letters


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# The transition matrix.


def multiple_try_chain(target: Any, **options: Any) -> Chain:
    """K of `multiple_try.kernel`: its law of the cut, its weights, what it keeps, and its acceptance."""
    how = multiple_try.method(target, **options)
    with jax.enable_x64(True):
        x = pieces_of(target, how)
        log_gamma, length = np.asarray(suffix.log_density(target, x)), x.sequences.length
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
                tries = outcomes[np.asarray(list(itertools.product(range(len(outcomes)), repeat=how.num_tries)))]
                probs = draw[tries].prod(1)
                for i in present:
                    weights, rows = np.where(kept[i, tries], log_w[tries], -np.inf), np.full(len(tries), i)
                    found.append((rows, tries, weights, log_w[rows], chance[i] * probs))
        rows, ends, weights, present, probs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        ratio = np.asarray(multiple_try.log_ratio(jnp.asarray(weights), jnp.asarray(present)))
    shares = np.exp(weights - np.maximum(weights.max(1, keepdims=True), -1e300))
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-300)
    matrix = np.zeros((num, num))
    np.add.at(matrix, (rows[:, None], ends), probs[:, None] * shares * np.exp(np.minimum(ratio, 0)))
    np.fill_diagonal(matrix, 0.0)
    return Chain(x, log_gamma - np.logaddexp.reduce(log_gamma), matrix + np.diag(1 - matrix.sum(1)))


def blocks(x: Any, inside: np.ndarray, r: int, e: int) -> Any:
    """Strings of positive density that are equal outside of r..e-1, and all that may be drawn for them."""
    tokens, length = np.asarray(x.sequences.tokens), np.asarray(x.sequences.length)
    reaches = length >= r
    groups: dict[tuple, list[int]] = {}
    for i in np.flatnonzero(reaches & inside):
        groups.setdefault((*tokens[i, :r], -1, *tokens[i, e:]), []).append(i)
    for present in groups.values():
        i = present[0]
        begins = reaches & (tokens[:, :r] == tokens[i, :r]).all(1)
        yield np.asarray(present), np.flatnonzero(begins & ((length < e) | (tokens[:, e:] == tokens[i, e:]).all(1)))


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
        ("factors", (1, 2), [{}]),
        ("must_end", (2,), [LENGTH]),
        slow("factors", (3,), [{}, LENGTH]),
        slow("power", (1, 2, 3), [{}, TEMPERED, NARROW]),
        slow("reward", (1, 2, 3), [TEMPERED, LENGTH, NARROW]),
        slow("min_tokens", (1, 2, 3), [{}, LOCAL, LENGTH]),
        slow("banned", (2,), [{}, LOCAL, LENGTH]),
        slow("must_end", (3,), [LOCAL]),
    ],
)
def test_the_transition_matrix_leaves_pi_invariant(name: str, tries: tuple[int, ...], ways: list[dict[str, Any]]):
    """|pi K - pi| <= 1e-12 and detailed balance, whatever is drawn anew: all of the rest, or blocks."""
    target = SMALL[name]()
    pi = enumerate_strings(target).probs
    for num_tries, block, options in itertools.product(tries, (None, 1, 2), ways):
        chain = multiple_try_chain(target, num_tries=num_tries, block=block, **options)
        np.testing.assert_allclose(chain.pi, pi, atol=1e-6)
        assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12 and chain.matrix.min() >= -1e-6
        assert 1 - chain.pi @ np.diag(chain.matrix) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("model", "problem"), [("hmm", "product"), ("table", "regex"), ("markov", "every_2")])
def test_blocks_of_longer_strings(model: str, problem: str):
    for num_tries, block in ((3, 1), (2, 2)):
        chain = multiple_try_chain(target_of(model, problem), num_tries=num_tries, block=block)
        assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
        assert 1 - chain.pi @ np.diag(chain.matrix) > 0.01


@pytest.mark.parametrize("options", [{}, slow(LENGTH), slow(TEMPERED), slow(NARROW)])
def test_one_try_is_suffix_metropolis_hastings(options: dict[str, Any]):
    target = small_target(3)
    ours, theirs = multiple_try_chain(target, num_tries=1, **options), suffix_chain(target, **options)
    np.testing.assert_allclose(ours.matrix, theirs.matrix, atol=1e-12)


def test_more_tries_mix_better():
    target = eight_strings()
    found = [second_eigenvalue(multiple_try_chain(target, num_tries=m, cut=first_cut)) for m in (1, 2, 3)]
    assert found[0] == pytest.approx(second_eigenvalue(suffix_chain(target, cut=first_cut)))
    assert found[0] > 1.3 * found[1] and found[1] > 1.2 * found[2], found


@pytest.mark.slow
def test_many_tries_are_blocked_gibbs():
    """The block is drawn from its law given all the rest: its distance falls with the tries."""
    target = small_target(2)
    distances = []
    for m in (1, 2, 4, 6):
        chain = multiple_try_chain(target, num_tries=m, block=1)
        distances.append(np.abs(chain.matrix - gibbs(chain, target.max_tokens)).sum(1) @ chain.pi)
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 5, distances


def gibbs(chain: Chain, horizon: int) -> np.ndarray:
    """One position, drawn uniformly, given the others."""
    tokens, length = (np.asarray(leaf) for leaf in (chain.pieces.sequences.tokens, chain.pieces.sequences.length))
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
    "present weight forgotten": ("log_ratio", lambda w, present: RATIO(w, jnp.full_like(present, -1e3))),
    "q of the kept rest": (
        "log_weight",
        lambda target, how, x, cut, end: WEIGHT(target, how, x, cut, jnp.full_like(end, target.max_tokens)),
    ),
    "only the block is weighed": (
        "log_weight",
        lambda target, how, x, cut, end: WEIGHT(target, how, up_to(x, end), cut, end),
    ),
    "no law of the cut": (
        "log_weight",
        lambda target, how, *rest: WEIGHT(target, dataclasses.replace(how, cut=cuts.uniform), *rest),
    ),
    "an early end keeps its weight": ("keeps_rest", lambda y, length, end: y.sequences.length >= 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_not_invariant(name: str, monkeypatch: pytest.MonkeyPatch):
    target = small_target(3)
    monkeypatch.setattr(multiple_try, *FAULTS[name])
    assert multiple_try_chain(target, num_tries=2, block=2, cut=cuts.uniform_in_length).bias > 1e-3
