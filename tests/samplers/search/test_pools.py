"""Pools: what is drawn is the model's, weights are kept, and answers are numbered on the host."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl.rows import take_rows
from samplers.base import Cost
from samplers.draws import ancestral
from samplers.results import Chains, Draws, Trace, Weighted
from samplers.search import best_of_n, pools, votes
from samplers.strings import prompts, proposals
from tests import helpers
from tests.helpers import MODELS, PROMPT
from tests.samplers.problems import plain, score_arrays
from tests.samplers.tape import enumerate_runs, small_target

KEY = jax.random.key(3)
NUM = 8


def zeros(ids: list[int]) -> int:
    """How often token 0 comes."""
    return ids.count(0)


def check_answers(pool: pools.Pool, answer: Any = zeros) -> None:
    """Equal ids are equal answers, numbered as they come."""
    x = pool.samples
    values = [answer(list(string)) for string in helpers.as_strings(x.tokens, x.length)]
    order = list(dict.fromkeys(values))
    assert np.asarray(pool.answer).tolist() == [order.index(value) for value in values]


def test_a_pool_holds_what_was_drawn():
    out = ancestral.run(KEY, plain("table"), num_samples=NUM)
    pool = pools.draw(KEY, plain("table"), num=NUM, answer=zeros, score=score_arrays)
    np.testing.assert_array_equal(pool.samples.tokens, out.sequences.tokens)
    check_answers(pool)
    np.testing.assert_array_equal(pool.log_prob, out.log_prob)
    np.testing.assert_array_equal(pool.log_q, out.log_prob)
    assert not pool.log_weights.any() and pool.num == NUM and not pool.num_unparsed
    x = out.sequences
    np.testing.assert_allclose(pool.scores, score_arrays(x.tokens, x.length), rtol=1e-6)
    # Every token that was drawn is somebody's, EOS too, and was judged.
    assert int(pool.length.sum()) == int(out.cost.tokens) == int(pool.cost.potential_calls)
    assert int(pool.cost.forwards) == int(out.cost.forwards)


def test_several_prompts_are_pools_with_prompts_first():
    targets = MODELS["table"]().given_each([PROMPT, (3, 0), (0, 2)], max_tokens=helpers.MAX_TOKENS)
    together = pools.draw(KEY, targets, num=NUM, answer=zeros, score=score_arrays)
    assert together.answer.shape == (3, NUM) and together.num == NUM
    for key, p, pool in zip(
        jax.random.split(KEY, 3), targets, prompts.apart(together), strict=True
    ):
        alone = pools.draw(key, p, num=NUM, answer=zeros, score=score_arrays)
        for one, other in zip(jax.tree.leaves(pool), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    found = jax.vmap(votes.majority)(jax.random.split(KEY, 3), together)
    assert found.mass.shape == (3, NUM)
    np.testing.assert_allclose(found.mass.sum(1), 1, rtol=1e-6)


@pytest.mark.slow
def test_weights_of_smc_are_honoured():
    """LAW 1 with f = 1{answer}, over every run of two particles: E[Z-hat mass_a] = sum gamma 1{a};
    without the weights it is another.
    """
    how = {"pinned": False, "proposal": proposals.bootstrap}
    runs = enumerate_runs(small_target(2), thresholds=[0.0], **how)[0.0]
    out, exact = runs.out, runs.exact
    parity = out.sequences.length % 2
    # Ids in the order of appearance, as of a pool that is made on the host.
    ids = jnp.where(parity == parity[:, :1], 0, 1).astype(jnp.int32)

    def masses(log_weights: Any) -> np.ndarray:
        pool = jax.vmap(lambda a, w: pools.pool(a, log_weights=w))(ids, log_weights)
        mass = jax.vmap(votes.majority)(jax.random.split(KEY, len(ids)), pool).mass
        odd = jnp.where(parity[:, 0] == 1, mass[:, 0], mass[:, 1])
        return np.asarray(odd, np.float64)

    gamma = np.exp(np.float64(exact.log_z)) * np.asarray(exact.probs, np.float64)
    truth = gamma[np.asarray(exact.sequences.length) % 2 == 1].sum()
    each = runs.probs * np.exp(np.asarray(out.log_z, np.float64))
    assert abs(each @ masses(out.log_weights) - truth) < 1e-5 * truth
    assert abs(each @ masses(jnp.zeros_like(out.log_weights)) - truth) > 1e-2 * truth


def test_a_weighted_result_as_a_pool():
    drawn = ancestral.run(KEY, plain("table"), num_samples=NUM)
    none = jnp.zeros(1)
    out = Weighted(
        samples={"text": drawn.samples, "mu": jnp.arange(8.0)},
        log_weights=jnp.asarray([0.3, -jnp.inf, 0.5, -1.0] * 2),
        log_z=jnp.float32(-2),
        log_z_std_error=jnp.float32(0),
        num_invalid=jnp.int32(0),
        rounds=jnp.int32(1),
        cost=drawn.cost,
        trace=Trace(ess=none, log_z=none, resampled=none > 0),
        log_q=drawn.log_prob - 1,
    )
    pool = pools.of(out, answer=zeros, score=jnp.arange(8.0))
    check_answers(dataclasses.replace(pool, samples=out.sequences))
    # With the evidence, without which `votes.soft_best_of` would be off by Z.
    np.testing.assert_allclose(pool.log_weights, out.log_weights - 2, rtol=1e-6)
    np.testing.assert_array_equal(pool.log_q, drawn.log_prob - 1)
    np.testing.assert_array_equal(pool.samples["mu"], np.arange(8.0))
    np.testing.assert_array_equal(pool.scores, np.arange(8.0))
    assert jnp.isnan(pool.log_prob).all() and int(pool.cost.tokens) == int(drawn.cost.tokens)
    with pytest.raises(ValueError, match="draw the pool with pools.draw, or take votes.vote"):
        votes.best_of(KEY, pool, k=2)


def test_all_draws_of_chains_count_the_same():
    """Those that were kept, and not where the chains are now."""
    drawn = ancestral.run(KEY, plain("table"), num_samples=NUM)
    rows = {"sequences": drawn.samples, "log_prob": drawn.log_prob}
    kept = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), rows)
    now = take_rows(rows, jnp.arange(2))
    out = Chains(draws=kept, info=None, state=now, cost=None, steps=4)
    pool = pools.of(out, answer=zeros)
    check_answers(pool)
    assert pool.num == NUM and not pool.log_weights.any() and not int(pool.cost.tokens)
    np.testing.assert_array_equal(pool.log_prob, drawn.log_prob)
    assert jnp.isnan(pool.log_q).all()


def test_what_raises_votes_for_nothing_and_is_said_once(caplog: pytest.LogCaptureFixture):
    x = ppl.Sequences(jnp.zeros((4, 3), jnp.int32), jnp.asarray([0, 2, 0, 1], jnp.int32))
    out = Draws(samples=x, log_prob=jnp.zeros(4), cost=Cost())
    with caplog.at_level(logging.WARNING):
        pool = pools.of(out, answer=lambda ids: 1 // len(ids))
    assert np.asarray(pool.answer).tolist() == [-1, 0, -1, 1] and int(pool.num_unparsed) == 2
    [record] = caplog.records
    assert "raised on 2 of 4 strings, which vote for nothing" in record.getMessage()
    assert "ZeroDivisionError" in record.getMessage() and "on []" in record.getMessage()


def test_nobody_answers(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        pool = pools.draw(KEY, plain("table"), num=NUM, answer=lambda ids: None)
    assert f"none of {NUM} strings has an answer" in caplog.text
    found = votes.majority(KEY, pool)
    assert int(found.answer) == int(found.index) == -1 and float(found.confidence) == 0
    assert not found.tied and not found.mass.any()


def test_a_score_that_is_no_number_rejects(caplog: pytest.LogCaptureFixture):
    def score(tokens: Any, length: Any) -> Any:
        return jnp.where(length > 1, jnp.nan, 1.0)

    with caplog.at_level(logging.WARNING):
        pool = pools.draw(KEY, plain("table"), num=NUM, answer=zeros, score=score)
    long = np.asarray(pool.samples.length) > 1
    assert long.any() and np.isneginf(pool.scores[long]).all() and (pool.scores[~long] == 1).all()
    assert f"{long.sum()} of {NUM} strings are rejected" in caplog.text


def test_a_python_score(caplog: pytest.LogCaptureFixture):
    """What it raises on is rejected, and said."""
    score = ppl.python(lambda ids: 1.0 / (len(ids) - 3))
    pool = pools.draw(KEY, plain("table"), num=NUM, answer=zeros, score=score)
    length = np.asarray(pool.samples.length)
    expected = [1 / (n - 3) if n != 3 else -np.inf for n in length.tolist()]
    np.testing.assert_allclose(pool.scores, expected, rtol=1e-6)
    assert (length == 3).any() and "ZeroDivisionError" in caplog.text


def test_a_part_of_a_pool_numbers_its_answers_anew():
    pool = pools.pool([0, 1, -1, 1, 2], scores=jnp.arange(5.0), length=[1, 2, 3, 4, 5])
    part = jax.jit(pools.take)(pool, jnp.asarray([4, 2, 3, 4, 1, 0, 3]))
    assert np.asarray(part.answer).tolist() == [0, -1, 1, 0, 1, 2, 1] and part.num == 7
    assert np.asarray(part.scores).tolist() == [4, 2, 3, 4, 1, 0, 3]
    assert np.asarray(part.samples).tolist() == [4, 2, 3, 4, 1, 0, 3]
    assert np.asarray(pools.take(pool, jnp.asarray([2])).answer).tolist() == [-1]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": []}, "at least one string, got shape .*; an empty pool has no vote"),
        ({"answer": 0}, r"answer ids \[N\] of at least one string, got shape \(\)"),
        ({"answer": [0.0, 1.0]}, "expected answer ids as integers, got float64"),
        ({"answer": [0, 2]}, r"expected answer ids in -1..1, got 2; number the answers"),
        ({"answer": [0, -2]}, r"expected answer ids in -1..1, got -2"),
        ({"answer": [0, 1], "scores": [1.0]}, r"expected scores for each .*\[2\].* shape \[1\]"),
        ({"answer": [0, 1], "samples": jnp.zeros(3)}, r"expected samples for each .* \[3\]"),
        ({"answer": [0, 1], "scores": [1.0, np.nan]}, "NaN or .inf in 1 of 2, first in row 1"),
        ({"answer": [0, 1], "log_weights": [np.inf, 0]}, "expected log_weights below .inf"),
    ],
)
def test_what_is_no_pool(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        pools.pool(**fields)


@pytest.mark.bad_input
def test_other_bad_input():
    with pytest.raises(TypeError, match="expected fields of a pool, scores, .*, got reward"):
        pools.pool([0], reward=[1.0])
    with pytest.raises(ValueError, match="expected num to be a whole number of at least 1, got 0"):
        pools.draw(KEY, plain("table"), num=0, answer=zeros)
    with pytest.raises(ValueError, match="a plain language model, got a target with a power"):
        pools.draw(KEY, plain("table") ** 2, answer=zeros)
    with pytest.raises(ValueError, match=r"expected a score of each of 8 strings, got shape \[\]"):
        pools.draw(KEY, plain("table"), num=NUM, answer=zeros, score=lambda tokens, length: 1.0)
    named: Any = "last_number"
    with pytest.raises(
        ValueError, match=r"expected answer to be a function of .*answers.last_number"
    ):
        pools.draw(KEY, plain("table"), answer=named)
    choice = best_of_n.run(KEY, plain("table"), num_samples=NUM)
    with pytest.raises(ValueError, match="got a Choice with `scores`, which is a choice"):
        pools.of(choice, answer=zeros)  # pyright: ignore[reportArgumentType]
