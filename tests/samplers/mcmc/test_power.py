"""Power sampling: the law of a run is that of the stages' transition matrices, and tends to
p^alpha.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import marginals, tabular
from ppl.exact import Enumeration, enumerate_strings
from samplers.mcmc import power, suffix
from samplers.strings import cuts, proposals, regeneration
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, TraceCounter, assert_z, markov
from tests.samplers.chains import Chain, suffix_chain, wordy
from tests.samplers.problems import plain

CHAINS = 20_000
LARGE = wordy()


def extended(law: dict[tuple, float], chain: Chain, before: int) -> np.ndarray:
    """The law over the strings of `chain` after those of `before` tokens are continued by the
    proposal.
    """
    x, log_q = chain.pieces.sequences, np.asarray(chain.pieces.log_q)
    found = np.zeros(len(log_q))
    for row, (tokens, n) in enumerate(
        zip(np.asarray(x.tokens).tolist(), np.asarray(x.length), strict=True)
    ):
        start = tuple(tokens[:before]) if n >= before else tuple(tokens[:n])
        found[row] = law.get(start, 0.0) * np.exp(log_q[row, before:].sum() if n >= before else 0.0)
    return found


def laws_of_runs(
    model: str, alpha: float, block_size: int, moves: Sequence[int], **options: Any
) -> list[np.ndarray]:
    """Over all strings of T tokens, from the enumerated transition matrix of every stage; for each
    number of moves.
    """
    stages = []
    for before in range(0, MAX_TOKENS, block_size):
        horizon = min(before + block_size, MAX_TOKENS)
        target = MODELS[model]().given(PROMPT, max_tokens=horizon) ** alpha
        stages.append((before, suffix_chain(target, **options)))
    return [law_of_a_run(stages, num_moves) for num_moves in moves]


def law_of_a_run(stages: list[tuple[int, Chain]], num_moves: int) -> np.ndarray:
    law: dict[tuple, float] = {(): 1.0}
    found = np.zeros(0)
    for before, chain in stages:
        found = extended(law, chain, before) @ np.linalg.matrix_power(chain.matrix, num_moves)
        x = chain.pieces.sequences
        rows = zip(np.asarray(x.tokens).tolist(), np.asarray(x.length), found, strict=True)
        law = {tuple(tokens[:n]): float(p) for tokens, n, p in rows}
    return found


def z_of_counts(exact: Enumeration, tokens: Any, law: np.ndarray) -> float:
    counts = np.bincount(exact.index(tokens), minlength=len(law))
    expected = law * counts.sum()
    common = expected >= 5
    assert counts[law == 0].sum() == 0
    cells = np.append((counts - expected)[common] ** 2 / expected[common], 0.0)
    if (rest := expected[~common].sum()) >= 5:
        cells[-1] = (counts[~common].sum() - rest) ** 2 / rest
    freedom = common.sum() - 1 + (rest >= 5)
    return float((cells.sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    ("model", "alpha", "block_size", "options"),
    [
        ("table", 2.5, 2, {}),
        pytest.param("hmm", 1.7, 1, {"temperature": 0.9}, marks=pytest.mark.slow),
        pytest.param(
            "markov",
            2.5,
            3,
            {"cut": cuts.uniform_in_length, "proposal": proposals.bootstrap},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_law_of_a_run(model: str, alpha: float, block_size: int, options: dict[str, Any]):
    exact = enumerate_strings(plain(model) ** alpha)
    out = power.run(
        jax.random.key(0),
        plain(model) ** alpha,
        num_chains=CHAINS,
        block_size=block_size,
        moves_per_block=2,
        **options,
    )
    law, another = laws_of_runs(model, alpha, block_size, (2, 3), **options)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-5)
    assert abs(z_of_counts(exact, out.sequences.tokens, law)) < 5
    # Two moves are not enough for p^alpha, and the counts would show it; nor is it the law of
    # three.
    assert z_of_counts(exact, out.sequences.tokens, exact.probs) > 10
    assert z_of_counts(exact, out.sequences.tokens, another) > 5
    stages = -(-MAX_TOKENS // block_size)
    assert out.info.accepted.shape == (1, stages * 2, CHAINS) and out.steps == stages * 2


@pytest.mark.slow
def test_more_moves_come_closer_to_the_power_target():
    """Total variation from p^alpha, enumerated; and E[log p] of a long run on 50 tokens."""
    exact = enumerate_strings(plain("hmm") ** 1.7)
    laws = laws_of_runs("hmm", 1.7, 2, (1, 4, 16, 64))
    distance = [0.5 * np.abs(law - exact.probs).sum() for law in laws]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 0.01 < 0.1 < distance[0]
    lm, alpha, h = tabular.random_markov(jax.random.key(21), 20, eos=EOS), 1.3, 1e-3
    p = lm.given(PROMPT, max_tokens=6)
    out = power.run(jax.random.key(1), p**alpha, num_chains=1000, block_size=3, moves_per_block=30)
    log_z = [marginals.markov_log_z(lm, PROMPT, 6, alpha + d) for d in (-h, h)]
    assert_z(out.log_prob, (log_z[1] - log_z[0]) / (2 * h), resolution=0.1)


@pytest.mark.slow
def test_a_constraint_and_a_reward_are_kept():
    """Phi is not powered, and strings that an extension led out of the support come back."""
    p = plain("table") * ppl.banned([2]) * ppl.reward(lambda tokens, length: 0.8 * length)
    target = dataclasses.replace(p, alpha=jnp.float32(1.3))
    exact = enumerate_strings(target)
    out = power.run(
        jax.random.key(0),
        target,
        num_chains=4000,
        block_size=2,
        moves_per_block=40,
        cut=cuts.uniform_in_length,
    )
    outside = np.asarray(out.info.outside_support[0, -1])
    np.testing.assert_array_equal(outside, exact.probs[exact.index(out.sequences.tokens)] == 0)
    assert outside.mean() < 1e-3
    inside = np.asarray(out.sequences.tokens)[~outside]
    assert abs(z_of_counts(exact, inside, exact.probs)) < 5
    assert z_of_counts(exact, inside, enumerate_strings(p**1.3).probs) > 10


@pytest.mark.slow
def test_the_run_goes_on_as_a_kernel():
    """The last stage's chains are a state of the kernel, which is exact for p^alpha;
    costs add up.
    """
    p = LARGE.given(PROMPT, max_tokens=12)
    out = power.run(jax.random.key(0), p**3.0, num_chains=4, block_size=5, moves_per_block=3)
    info = out.info
    tokens = int(info.tokens.sum())
    assert tokens < int(out.cost.tokens) <= tokens + 4 * 12
    # The busiest chain is the only one that all passes are made for.
    assert int(out.cost.forwards) <= 1 + int(info.tokens.sum((0, 1)).max()) + 12
    cut = np.asarray(info.details["cut"]).reshape(3, 3, 4)  # stages, moves, chains
    assert (cut < np.asarray([5, 10, 12])[:, None, None]).all()
    target, plan = dataclasses.replace(p, alpha=jnp.float32(3)), power.schedule(12, 5, 3)
    how = suffix.method(target)
    x = power.init(target, how, 4)
    for k in range(3):
        x, stage = power.step(jax.random.key(0), target, how, x, plan, k)
        np.testing.assert_array_equal(stage.accepted[:, 1:].T, info.accepted[0, 3 * k : 3 * k + 3])
    np.testing.assert_array_equal(x.sequences.tokens, out.sequences.tokens)
    fresh = suffix.kernel(p**3.0).init(out.sequences)
    np.testing.assert_allclose(out.state.log_p, fresh.log_p, atol=1e-5)
    np.testing.assert_allclose(out.log_prob, fresh.log_prob, rtol=1e-5)
    state, _ = suffix.kernel(p**3.0).step(jax.random.key(1), out.state)
    assert isinstance(state, regeneration.State)


@pytest.mark.slow
def test_chains_and_compilation():
    """Chain i is the same whatever the number of chains; another alpha, key or prompt compiles
    nothing new.
    """
    p = LARGE.given(PROMPT, max_tokens=12)
    counter = TraceCounter(cuts.uniform)
    options: dict[str, Any] = {"block_size": 4, "moves_per_block": 2, "cut": counter}
    few = power.run(jax.random.key(0), p**4, num_chains=2, **options)
    many = power.run(jax.random.key(0), p**4, num_chains=5, **options)
    np.testing.assert_array_equal(few.sequences.tokens, many.sequences.tokens[:2])
    seen = counter.count
    power.run(
        jax.random.key(1), LARGE.given((5, 4, 3), max_tokens=12) ** 2, num_chains=5, **options
    )
    assert counter.count == seen > 0


@pytest.mark.bad_input
def test_bad_input():
    p, key = markov().given(PROMPT, max_tokens=4), jax.random.key(0)
    for name in ("num_chains", "block_size", "moves_per_block"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            power.run(key, p, **options)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha above 0"):
            power.run(key, dataclasses.replace(p, alpha=jnp.float32(alpha)))
