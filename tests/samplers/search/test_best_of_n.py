"""Best-of-n has no target, but its law is known: P(x) = p(x) / P(S = s_x) (F(s_x)^n -
F(s_x^-)^n).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from samplers.search import best_of_n
from tests import helpers
from tests.helpers import MAX_TOKENS, MODELS, PROMPT
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import plain, score, score_arrays

N = 3


def order_statistics(
    scores: dict[helpers.String, float], law: dict[helpers.String, float], n: int
) -> dict:
    """The law of the best of n, by the distribution function of the score under p."""
    result = {}
    for x, s in scores.items():
        below = sum(law[y] for y in law if scores[y] < s - 1e-6)
        equal = sum(law[y] for y in law if abs(scores[y] - s) <= 1e-6)
        result[x] = law[x] / equal * ((below + equal) ** n - below**n)
    return result


def best(target: Any, runs: int) -> Any:
    """The chosen strings of many runs [runs, T]."""

    def one(key: Any) -> Any:
        out = best_of_n.run(key, target, num_samples=N)
        return out.sequences.tokens[out.best]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), runs))


@pytest.mark.parametrize("alpha", [pytest.param(1.0, marks=pytest.mark.slow), 1.6])
def test_order_statistics(alpha: float):
    law, _ = helpers.brute_force_law(MODELS["hmm"](), PROMPT, MAX_TOKENS)
    p = plain("hmm") if alpha == 1 else plain("hmm") ** alpha
    # Scores on a coarse grid, so that ties occur and the first of equals counts.
    grid = {x: (alpha - 1) * np.log(p_x) + np.round(2 * score(x)) for x, p_x in law.items()}
    target = p * ppl.reward(lambda tokens, length: jnp.round(2 * score_arrays(tokens, length)))
    tokens = best(target, 20_000)
    check_frequencies(tokens, order_statistics(grid, law, N))
    with pytest.raises(AssertionError, match="z = "):
        check_frequencies(tokens, order_statistics(grid, law, N + 1))


@pytest.mark.slow
def test_scores_are_the_importance_weights():
    target = plain("table") ** 1.6 * ppl.reward(score_arrays)
    out = best_of_n.run(jax.random.key(1), target, num_samples=16)
    x = out.sequences
    weights = target.log_density(x.tokens, x.length) - plain("table").log_density(
        x.tokens, x.length
    )
    np.testing.assert_allclose(out.scores, weights, rtol=1e-4, atol=1e-5)
    assert out.scores[out.best] == out.scores.max()


def test_no_candidate_meets_the_constraint():
    out = best_of_n.run(jax.random.key(2), plain("markov") * ppl.forced([2]), num_samples=4)
    assert out.scores[out.best] == -jnp.inf and not jnp.isnan(out.scores).any()


@pytest.mark.bad_input
def test_num_samples_must_be_a_count():
    with pytest.raises(
        ValueError, match="expected num_samples to be a whole number of at least 1, got 0"
    ):
        best_of_n.run(jax.random.key(3), plain("hmm"), num_samples=0)


def test_cost_includes_the_scoring():
    plain_out = best_of_n.run(jax.random.key(4), plain("hmm"), num_samples=8)
    tilted = best_of_n.run(
        jax.random.key(4), plain("hmm") * ppl.reward(score_arrays), num_samples=8
    )
    x = tilted.sequences
    tokens = int((x.length + x.ended).sum())
    assert int(tilted.cost.tokens) == int(tilted.cost.potential_calls) == tokens
    # Their probabilities are those of the draws: no string is read again.
    assert int(tilted.cost.forwards) == min(int(x.length.max()) + 1, MAX_TOKENS)
    assert int(plain_out.cost.potential_calls) == 0
