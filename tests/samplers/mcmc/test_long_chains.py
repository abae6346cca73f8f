"""Chains over strings of 30 tokens, suffix moves alone and tempered, against the
transfer matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import marginals, tabular
from ppl.ancestral import ancestral
from ppl.lm import LM
from ppl.rows import take_rows
from ppl.sequences import from_tokens
from samplers.base import Kernel
from samplers.mcmc import parallel_tempering
from samplers.strings import cuts, ladders, proposals
from tests.helpers import EOS, PROMPT, assert_z
from tests.samplers.chains import wordy


def terse() -> LM:
    """A Markov chain over 50 tokens, nearly deterministic until it ends: powers of it are not all
    on one string.
    """
    logits = 12.0 * jax.random.normal(jax.random.key(21), (50, 50))
    others = jax.nn.softmax(jnp.where(jnp.arange(50) == EOS, -jnp.inf, logits))
    return tabular.markov(jnp.where(jnp.arange(50) == EOS, 0.3, 0.7 * others), eos=EOS)


def mean_log_p(lm: LM, max_tokens: int, alpha: float) -> float:
    """E[log p] = d log Z / d alpha under p^alpha."""
    log_z = [marginals.markov_log_z(lm, PROMPT, max_tokens, alpha + h) for h in (-1e-4, 1e-4)]
    return (log_z[1] - log_z[0]) / 2e-4


def power_draws(lm: LM, max_tokens: int, alpha: float, num: int) -> np.ndarray:
    """Exact draws of p^alpha [num, T]: the chain p(j | i)^alpha h_t(j) / h_{t-1}(i), h_t what can
    follow t tokens.
    """
    rng, powered = np.random.default_rng(0), np.exp(alpha * np.asarray(lm.params, np.float64))
    powered[lm.eos] = np.arange(len(powered)) == lm.eos
    tails = [np.ones(len(powered))]
    for _ in range(max_tokens):
        tails.insert(0, powered @ tails[0])
    last, rows = np.full(num, PROMPT[-1]), []
    for tail in tails[1:]:
        law = powered[last] * tail
        law = np.cumsum(law / law.sum(1, keepdims=True), axis=1)
        last = (rng.random((num, 1)) > law).sum(1)
        rows.append(last)
    return np.stack(rows, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "powers"), [(0.5, [0.3, 0.5]), (4.0, [1, 2, 4])])
def test_long_strings_stay_in_the_power_target(alpha: float, powers: Any):
    """Marginals, lengths and E[log p] after some steps from exact draws, T = 30, by swaps and by
    suffix moves alone.
    """
    lm, num, size = terse(), 160, 30
    target = lm.given(PROMPT, max_tokens=size) ** alpha
    draws = np.stack([power_draws(lm, size, power, num) for power in powers], axis=1).reshape(
        -1, size
    )
    x = from_tokens(jnp.asarray(draws), EOS)
    last = take_rows(x, jnp.arange(num) * len(powers) + len(powers) - 1)
    make = parallel_tempering.suffix_moves(2, cut=cuts.uniform_in_length)
    tempered = parallel_tempering.kernel(target, powers, make=make)
    plain = make(target, proposals.Powered())
    for start, step in (
        (parallel_tempering.init(target, powers, x), tempered.step),
        (plain.init(last), plain.step),
    ):
        state = start
        for key in jax.random.split(jax.random.key(5), 10):
            state, _ = step(key, state)
        changed = (np.asarray(state.sequences.tokens) != np.asarray(start.sequences.tokens)).any(1)
        assert changed.mean() > 0.02
        exact = marginals.markov_marginals(lm, PROMPT, size, alpha)
        tokens = np.asarray(state.sequences.tokens)
        for t, token in np.argwhere((exact > 0.15) & (exact < 0.85))[::3]:
            assert_z(tokens[:, t] == token, float(exact[t, token]), resolution=0.04)
        truth = mean_log_p(lm, size, alpha)
        assert_z(state.log_prob, truth, resolution=-0.07 * truth)
        # The draws' own luck cancels.
        assert_z(
            np.asarray(state.log_prob) - np.asarray(start.log_prob), 0.0, resolution=-0.07 * truth
        )
        assert_z(
            state.sequences.length,
            marginals.markov_expected_length(lm, PROMPT, size, alpha),
            resolution=1.2,
        )


@pytest.mark.optimised
@pytest.mark.slow
def test_tempering_forgets_a_start_that_plain_chains_do_not():
    """p^4 of strings of 30 tokens: suffix moves propose to end too rarely to reach the short
    strings that it wants.

    E[log p] is -3.5, and chains start from draws of p, at -60.  After 2 500 tokens per chain plain
    moves are still 12 short of it (7.6 after 4 100, with cuts within the length).  Four rungs are
    2.6 short after 2 400 tokens and right after 7 400; so is one run of Power-SMC, which takes
    early ends while they are cheap, after 5 600 (512 particles).
    """
    p = wordy().given(PROMPT, max_tokens=30)
    x, truth = ancestral(jax.random.key(1), p, 20), mean_log_p(wordy(), 30, 4.0)

    def log_probs(kernel: Kernel) -> Any:
        def body(state: Any, key: Any) -> tuple[Any, Any]:
            state, _ = kernel.step(key, state)
            return state, state.log_prob

        keys = jax.random.split(jax.random.key(2), 120)
        return np.asarray(jax.lax.scan(body, kernel.init(x), keys)[1])[-50:].mean()

    make = parallel_tempering.suffix_moves(1, cut=cuts.uniform_in_length)
    tempered = parallel_tempering.kernel(p**4, ladders.geometric(1, 4, 4), make=make)
    assert log_probs(tempered) > truth - 4 > truth - 10 > log_probs(make(p**4, proposals.Powered()))
