"""Pref-MH leaves gamma e^s invariant at any number of votes; the plug-in rule does not."""

from __future__ import annotations

import dataclasses
import itertools
import math
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
from ppl.target import Target
from samplers.mcmc import judges, pref_mh, suffix
from samplers.strings import cuts, proposals, regeneration
from samplers.testing import check_kernel
from tests.helpers import EOS, MAX_TOKENS, PROMPT, as_strings, assert_z, hmm, table
from tests.samplers.chains import Chain, chain_of, chi_square_z
from tests.samplers.problems import plain, score, score_arrays, target_of


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def second_score(tokens: Any, length: Any) -> Any:
    return 0.4 * length - 0.9 * (tokens[:, 0] == 2)


def scores_of(x: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Both scores of all strings, in float64."""
    rows = as_strings(x.tokens, x.length)
    return np.asarray([score(r) for r in rows]), np.asarray(
        [0.4 * len(r) - 0.9 * (r[:1] == (2,)) for r in rows]
    )


def plug_in(votes: Any, num_votes: int) -> Any:
    """log K / (N - K): the estimate of e^{s(y) - s(x)} taken for the truth."""
    return jnp.log(votes) - jnp.log(num_votes - votes)


def pref_chain(
    target: Target,
    num_votes: tuple[int, ...],
    factor: Callable[..., Any] = pref_mh.log_vote_factor,
    cut: cuts.Cut = cuts.uniform_in_length,
    **options: Any,
) -> Chain:
    """K, with the votes of Bradley-Terry judges summed over."""
    x = ppl.exact.strings(target.lm.vocab_size, target.max_tokens, target.lm.eos)
    scores = scores_of(x)[: len(num_votes)]

    def votes_law(s: np.ndarray, n: int, k: int) -> np.ndarray:
        p = 1 / (1 + np.exp(s[:, None] - s[None]))
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)

    def accept(log_ratio: np.ndarray) -> np.ndarray:
        total = np.zeros_like(log_ratio)
        for counts in itertools.product(*(range(n + 1) for n in num_votes)):
            chance = np.prod(
                [votes_law(s, n, k) for s, n, k in zip(scores, num_votes, counts, strict=True)],
                axis=0,
            )
            factors = [
                float(factor(jnp.asarray(k), n)) for n, k in zip(num_votes, counts, strict=True)
            ]
            decided = np.where(np.isinf(log_ratio), 0.0, sum(factors))
            total += chance * np.exp(np.minimum(log_ratio + decided, 0))
        return total

    return chain_of(
        target, suffix.method(target, cut=cut, **options), accept, sum(scores, np.zeros(1))
    )


def judges_of(target: Target, num_votes: tuple[int, ...]) -> list[judges.Judge]:
    functions = (score_arrays, second_score)[: len(num_votes)]
    return [
        judges.bradley_terry(target, f, num_votes=n)
        for f, n in zip(functions, num_votes, strict=True)
    ]


# The transition matrix.


@pytest.mark.parametrize(
    ("model", "problem", "num_votes", "options"),
    [
        ("table", "plain", (1,), {}),
        ("table", "power", (2, 1), {"temperature": 0.8}),
        slow("hmm", "banned", (3, 2), {"proposal": proposals.bootstrap, "cut": cuts.uniform}),
    ],
)
def test_the_transition_matrix_leaves_pi_invariant(
    model: str, problem: str, num_votes: Any, options: dict
):
    chain = pref_chain(target_of(model, problem), num_votes, **options)
    assert chain.bias <= 1e-12 and chain.imbalance <= 1e-12
    assert chain.pi @ np.diag(chain.matrix) < 0.95
    target = target_of(model, problem) * ppl.reward(score_arrays)
    if len(num_votes) == 2:
        target = target * ppl.reward(second_score)
    np.testing.assert_allclose(chain.pi, enumerate_strings(target).probs, atol=1e-5)


@pytest.mark.parametrize(("num_votes", "least"), [(1, 0.01), (3, 3e-3), slow(8, 5e-4)])
def test_the_plug_in_rule_is_not_invariant(num_votes: int, least: float):
    with np.errstate(divide="ignore"):
        assert pref_chain(plain("table"), (num_votes,), plug_in).bias > least


@pytest.mark.slow
def test_more_votes_move_more():
    moved = [
        1 - (c := pref_chain(plain("table"), (n,))).pi @ np.diag(c.matrix) for n in (1, 2, 4, 8)
    ]
    assert moved == sorted(moved) and moved[-1] > 1.2 * moved[0]


# The jitted chains.


@pytest.mark.parametrize(
    ("model", "problem", "num_votes", "options"),
    [("table", "plain", (3,), {}), slow("table", "power", (2, 1), {"temperature": 0.8})],
)
def test_the_chains_make_the_moves_of_the_matrix(
    model: str, problem: str, num_votes: Any, options: dict
):
    p = target_of(model, problem)
    target = p
    for f, _ in zip((score_arrays, second_score), num_votes, strict=False):
        target = target * ppl.reward(f)
    kernel = pref_mh.kernel(p, judges_of(p, num_votes), **options)
    counts = check_kernel(kernel, target, key=jax.random.key(0))
    assert abs(chi_square_z(counts, pref_chain(p, num_votes, **options).matrix)) < 5
    # The counts would show another number of votes.
    assert chi_square_z(counts, pref_chain(p, (1,) * len(num_votes), **options).matrix) > 10


@pytest.mark.slow
def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch):
    p = plain("table")
    monkeypatch.setattr(pref_mh, "log_vote_factor", plug_in)
    fresh = judges.judge(
        lambda *args: judges_of(p, (1,))[0].votes(*args), num_votes=1
    )  # traced anew
    with pytest.raises(AssertionError, match="not invariant"):
        check_kernel(pref_mh.kernel(p, fresh), p * ppl.reward(score_arrays), key=jax.random.key(0))


# Judges.

NUM = 20_000


def pair(num: int) -> tuple[Any, Sequences, Sequences]:
    x = Sequences(jnp.asarray([[3, 2, EOS, EOS]]), jnp.asarray([2]))
    y = Sequences(jnp.asarray([[0, 0, 3, 0]]), jnp.asarray([4]))
    rows = jnp.zeros(num, jnp.int32)
    return jax.random.split(jax.random.key(1), num), take_rows(x, rows), take_rows(y, rows)


@pytest.mark.slow
def test_bradley_terry_votes():
    keys, x, y = pair(NUM)
    truth = 1 / (1 + math.exp(score((3, 2)) - score((0, 0, 3, 0))))
    one = judges.bradley_terry(plain("table"), score_arrays, num_votes=3)
    votes = np.asarray(one.votes(keys, x, y))
    assert_z(votes, 3 * truth, resolution=0.01)
    assert_z(votes == 3, truth**3, resolution=0.01)
    assert_z(np.asarray(one.votes(keys, y, x)), 3 * (1 - truth), resolution=0.01)


def test_the_order_of_presentation_cancels():
    """A judge that likes what comes last: P(y over x) + P(x over y) = 1 all the same,
    vote by vote.
    """

    def log_odds(first: Sequences, second: Sequences) -> Any:
        return (
            0.5
            + score_arrays(second.tokens, second.length)
            - score_arrays(first.tokens, first.length)
        )

    keys, x, y = pair(NUM)
    one = judges.pairwise(log_odds, num_votes=2)
    gap = score((0, 0, 3, 0)) - score((3, 2))
    truth = 0.5 / (1 + math.exp(-0.5 - gap)) + 0.5 / (1 + math.exp(0.5 - gap))
    forth, back = np.asarray(one.votes(keys, x, y)), np.asarray(one.votes(keys, y, x))
    assert_z(forth, 2 * truth, resolution=0.01)
    assert_z(back, 2 * (1 - truth), resolution=0.01)
    assert_z(forth == 2, truth**2, resolution=0.01)


@pytest.mark.slow
def test_a_model_as_a_judge_reads_both_strings():
    lm = hmm()
    model = judges.pair_model(lm, [2, 0], [3, 1], [0], first=2, second=3)
    x = Sequences(jnp.asarray([[3, 2, EOS, EOS], [EOS] * 4, [0, 0, 3, 0]]), jnp.asarray([2, 0, 4]))
    y = Sequences(
        jnp.asarray([[0, 0, 3, 0], [2, EOS, EOS, EOS], [EOS] * 4]), jnp.asarray([4, 1, 0])
    )
    pairs = zip(as_strings(x.tokens, x.length), as_strings(y.tokens, y.length), strict=True)
    truth = []
    for a, b in pairs:
        logits = np.asarray(lm.prefill([2, 0, *a, 3, 1, *b, 0]).logits)
        truth.append(logits[3] - logits[2])
    np.testing.assert_allclose(model(x, y), truth, atol=1e-4)
    votes = judges.pairwise(model, num_votes=4).votes(jax.random.split(jax.random.key(0), 3), x, y)
    assert ((votes >= 0) & (votes <= 4)).all()


# What else is promised.


@pytest.mark.slow
def test_the_state_and_what_is_reported():
    p = plain("table")
    exact = enumerate_strings(p)
    x = take_rows(exact.sequences, jnp.flatnonzero(exact.probs > 0))
    kernel = pref_mh.kernel(p, judges_of(p, (3, 1)))
    state, info = kernel.step(jax.random.key(0), kernel.init(x))
    assert isinstance(state, regeneration.State) and info.details["votes"].shape == (
        len(x.length),
        2,
    )
    assert info.accepted.any() and not info.invalid.any() and not info.outside_support.any()
    assert int(info.cost.tokens) == int(info.tokens.sum()) and int(info.cost.forwards) == int(
        info.tokens.max()
    )
    same = (np.asarray(state.sequences.tokens) == np.asarray(x.tokens)).all(1)
    assert same[~np.asarray(info.accepted)].all()
    assert not (np.asarray(info.accepted) & (np.asarray(info.details["votes"]) == 0).any(1)).any()
    fresh = kernel.init(state.sequences)
    np.testing.assert_allclose(state.log_p, fresh.log_p, atol=1e-5)
    # A chain does not depend on how many there are.
    few, _ = kernel.step(jax.random.key(0), kernel.init(take_rows(x, jnp.arange(2))))
    np.testing.assert_array_equal(few.sequences.tokens, state.sequences.tokens[:2])


@pytest.mark.slow
@pytest.mark.parametrize("votes", [-1, 4])
def test_impossible_votes_are_reported_and_count_for_nothing(votes: int):
    p = plain("table")
    exact = enumerate_strings(p)
    x = take_rows(exact.sequences, jnp.flatnonzero(exact.probs > 0))
    wrong = judges.judge(lambda keys, x, y: jnp.full(x.length.shape, votes), num_votes=3)
    kernel = pref_mh.kernel(p, wrong)
    _, info = kernel.step(jax.random.key(0), kernel.init(x))
    assert info.invalid.all() and not info.accepted.any()
    assert np.isneginf(pref_mh.log_vote_factor(jnp.asarray([votes, 0]), 3)).all()


@pytest.mark.bad_input
def test_bad_input():
    p = table().given(PROMPT, max_tokens=MAX_TOKENS)
    some = judges.bradley_terry(p, score_arrays, num_votes=2)
    for num_votes in (0, -1, 1.5):
        with pytest.raises(
            ValueError, match="expected num_votes to be a whole number of at least 1"
        ):
            judges.bradley_terry(p, score_arrays, num_votes=num_votes)
    with pytest.raises(ValueError, match="expected a judge, got none"):
        pref_mh.kernel(p, [])
    for alpha in (0.0, math.nan):
        with pytest.raises(ValueError, match="alpha above 0"):
            pref_mh.kernel(dataclasses.replace(p, alpha=jnp.float32(alpha)), some)
    with pytest.raises(ValueError, match="expected two different answers"):
        judges.pair_model(hmm(), [0], [0], [0], first=2, second=2)
    with pytest.raises(ValueError, match="expected token ids in"):
        judges.pair_model(hmm(), [0], [9], [0], first=2, second=3)
    with pytest.raises(ValueError, match="within its context of 5 tokens"):
        judges.pair_model(dataclasses.replace(hmm(), context=5), [0], [0], [0], first=2, second=3)(
            *pair(2)[1:]
        )
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 4\]"):
        pref_mh.kernel(p, some).init(Sequences(jnp.zeros((2, 3), jnp.int32), jnp.full(2, 3)))
