"""Interpolated rewards of prefixes: exact where log Phi is linear between anchors, and
only there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from amortized.strings import gflownet, prefix_rewards
from ppl import exact
from ppl.target import Target
from tests.amortized.strings import test_gflownet as posteriors
from tests.helpers import EOS, MAX_TOKENS, PROMPT, VOCAB_SIZE, hmm

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)


@functools.cache
def p() -> Target:
    return hmm().given(PROMPT, max_tokens=MAX_TOKENS)


def answered() -> Target:
    return p() * ppl.continuation(p(), [0, 3, 1])


def with_knots(every: int) -> Target:
    """log Phi with a kink at every so many tokens, steeper or not by the first one."""

    def score(tokens: jax.Array, length: jax.Array) -> jax.Array:
        kinks = jnp.maximum(length[:, None] - jnp.arange(0, MAX_TOKENS, every), 0)
        signs = jnp.where(jnp.arange(kinks.shape[1]) % 2 == 0, 1.0, -2.0)
        return jnp.where(tokens[:, 0] == 2, 0.5, -0.3) * (kinks * signs).sum(1)

    return p() * ppl.reward(score)


@pytest.mark.parametrize(
    "every", [3, *(pytest.param(every, marks=pytest.mark.slow) for every in (2, 9))]
)
def test_interpolation_is_exact_where_log_phi_is_linear_between_anchors(every: int):
    """With each string as long as it is: the last stretch ends at its end."""
    target = with_knots(every)
    wanted = prefix_rewards.at_every_prefix(target, ALL)
    np.testing.assert_allclose(prefix_rewards.interpolated(every)(target, ALL), wanted, atol=1e-5)


def test_a_kink_between_anchors_is_not_seen():
    target = with_knots(1)
    difference = prefix_rewards.interpolated(2)(target, ALL) - prefix_rewards.at_every_prefix(
        target, ALL
    )
    assert np.nanmax(np.abs(np.asarray(difference))) > 0.1


def test_every_prefix_is_an_anchor_at_one():
    """Of what is not linear at all; and the loss is the exact one."""
    target = answered()
    exactly, found = (
        prefix_rewards.at_every_prefix(target, ALL),
        prefix_rewards.interpolated(1)(target, ALL),
    )
    np.testing.assert_allclose(found, exactly, atol=1e-5)
    coarse = np.asarray(prefix_rewards.interpolated(2)(target, ALL))
    length = np.asarray(ALL.length)
    known = np.arange(MAX_TOKENS + 1) <= length[:, None]
    anchors = known & (
        (np.arange(MAX_TOKENS + 1) % 2 == 0) | (np.arange(MAX_TOKENS + 1) == length[:, None])
    )
    np.testing.assert_allclose(coarse[anchors], np.asarray(exactly)[anchors], atol=1e-5)
    assert np.abs(coarse - exactly)[known & ~anchors].max() > 0.05


@pytest.mark.slow
def test_the_interpolated_loss_is_the_exact_one_at_one():
    values = []
    for rewards in (
        prefix_rewards.at_every_prefix,
        prefix_rewards.interpolated(1),
        prefix_rewards.interpolated(2),
    ):
        g, task = posteriors.fresh(), posteriors.task()
        t = gflownet.training(g, task, objective=gflownet.modified_subtb, rewards=rewards)
        batch, _ = t.draw(jax.random.key(2), t.params, t.data)
        values.append(float(t.loss(t.params, jax.random.key(0), batch)[0]))
    assert values[1] == pytest.approx(values[0], rel=1e-5) and abs(values[2] - values[0]) > 1e-3


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_at_the_end_is_the_density(power: float):
    target = answered() ** power
    found = np.array(prefix_rewards.at_the_end(target, ALL))
    rows = np.arange(len(found))
    np.testing.assert_allclose(
        found[rows, ALL.length], target.log_density(ALL.tokens, ALL.length), atol=1e-5
    )
    found[rows, np.asarray(ALL.length)] = -np.inf
    assert np.isneginf(found).all()


def test_bad_distances_are_named():
    with pytest.raises(ValueError, match="expected every"):
        prefix_rewards.interpolated(0)
