"""Rationales between question and answer: scores of answers against enumeration, and what
references leave out.
"""

from __future__ import annotations

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppl
from amortized import fit
from amortized.strings import behaviours, gflownet, latent, prefix_rewards, replay, rollouts
from amortized.strings.latent import Scored
from models import tabular
from ppl import exact
from ppl.sequences import Sequences
from ppl.target import Target
from tests import helpers
from tests.amortized.strings import test_gflownet as posteriors

EOS, T = 1, 2
ANSWERS, LENGTH = jnp.asarray([[0, 2, 1], [2, 1, 0]]), jnp.asarray([3, 2])
NUM = 50_000


@functools.cache
def p() -> Target:
    return tabular.random_hmm(jax.random.key(5), 3, 3, eos=EOS).given([2, 0], max_tokens=T)


@functools.cache
def q() -> Target:
    return tabular.random_markov(jax.random.key(6), 3, eos=EOS).given([2], max_tokens=T)


@functools.cache
def log_answers() -> np.ndarray:
    """log p(y_j | x), by enumeration of the rationales."""
    each = [
        ppl.continuation(p(), y[:n].tolist())
        for y, n in zip(np.asarray(ANSWERS), np.asarray(LENGTH), strict=True)
    ]
    return np.array([exact.enumerate_strings(p() * phi).log_z for phi in each])


def drawn(law: Target) -> Scored:
    """Many rationales from a law, and every answer under each."""
    x = rollouts.roll(
        jax.random.key(1), law, p(), behaviours.drawn(NUM), rewards=prefix_rewards.at_the_end
    ).sequences
    return latent.score(p(), law, x, ANSWERS, LENGTH)


def test_joint_densities_are_the_targets():
    """log p(z, y | x) of every rationale and answer, whose sum over all rationales is p(y | x)."""
    z = exact.strings(3, T, EOS)
    scored = latent.score(p(), q(), z, ANSWERS, LENGTH)
    for j, (y, n) in enumerate(zip(np.asarray(ANSWERS), np.asarray(LENGTH), strict=True)):
        gamma = (p() * ppl.continuation(p(), y[:n].tolist())).log_density(z.tokens, z.length)
        np.testing.assert_allclose(scored.log_joint[:, j], gamma, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.logsumexp(scored.log_joint, axis=0), log_answers(), rtol=1e-5)
    np.testing.assert_allclose(scored.log_q, q().log_density(z.tokens, z.length), rtol=1e-5)
    assert scored.num_tokens[0].tolist() == [4, 3] and scored.num_tokens[-1].tolist() == [5, 4]


def test_importance_converges_to_the_marginal_and_the_others_do_not():
    """A z-test of p(y | x) with rationales from another model, where q left out, or taken for p, is
    found.
    """
    scored = drawn(q())
    for j, log_p in enumerate(log_answers()):
        weights = np.exp(np.asarray(scored.log_weights[:, j], np.float64) - log_p)
        helpers.assert_z(weights, 1.0, resolution=0.02)
        assert float(scored.importance[j]) == pytest.approx(
            np.log(weights.mean()) + log_p, abs=1e-4
        )
        assert abs(scored.geomean_norm[j] - log_p) > 0.5
        for wrong in (scored.log_answer, scored.log_joint):
            with pytest.raises(AssertionError, match="z = "):
                helpers.assert_z(
                    np.exp(np.asarray(wrong[:, j], np.float64) - log_p), 1.0, resolution=0.02
                )


def test_logmeanexp_converges_with_rationales_from_the_prior():
    scored = drawn(p())
    for j, log_p in enumerate(log_answers()):
        helpers.assert_z(
            np.exp(np.asarray(scored.log_answer[:, j], np.float64) - log_p), 1.0, resolution=0.02
        )
    np.testing.assert_allclose(scored.logmeanexp, scored.importance, atol=1e-4)


def test_the_geometric_score_ranks_otherwise():
    """One rationale in two makes the first answer sure, the other rules it out: p(y) = 1/2 against
    1/10.
    """
    log_answer = jnp.log(jnp.asarray([[1.0, 0.1], [1e-6, 0.1]]))
    half = jnp.log(jnp.asarray([0.5, 0.5]))
    scored = Scored(half, half, log_answer, jnp.full((2, 2), 3))
    np.testing.assert_allclose(np.exp(scored.importance), [0.5, 0.1], rtol=1e-4)
    np.testing.assert_allclose(scored.logmeanexp, scored.importance, rtol=1e-5)
    assert scored.importance.argmax() == 0 and scored.geomean_norm.argmax() == 1
    np.testing.assert_allclose(
        scored.geomean_norm, (half[:, None] + log_answer).mean(0) / 3, rtol=1e-5
    )


def test_padding_of_answers_changes_nothing():
    z = exact.strings(3, T, EOS)
    wide = latent.score(p(), q(), z, jnp.pad(ANSWERS, ((0, 0), (0, 2)), constant_values=2), LENGTH)
    np.testing.assert_allclose(
        wide.log_answer, latent.score(p(), q(), z, ANSWERS, LENGTH).log_answer, rtol=1e-5
    )


def test_bad_input_is_named():
    z = exact.strings(3, T, EOS)
    with pytest.raises(ValueError, match="expected the plain law of the rationales"):
        latent.score(p() ** 2, q(), z, ANSWERS, LENGTH)
    with pytest.raises(ValueError, match="expected token ids"):
        latent.score(p(), q(), z, ANSWERS + 2, LENGTH)
    with pytest.raises(ValueError, match="expected length as one number from 1"):
        latent.score(p(), q(), z, ANSWERS, LENGTH * 0)


def test_strings_as_good_as_the_reference_count():
    """By log R per token; delta = 1 keeps exactly those at least as good, a larger one
    keeps more.
    """
    log_reward = jnp.asarray([-4.0, -4.1, -2.0, -2.1, -9.0, 0.0, -jnp.inf, jnp.nan, -6.0])
    length = jnp.asarray([4, 4, 2, 2, 10, 0, 3, 3, 4])
    kept = latent.as_good_as(log_reward, length, -3.0, 3)
    assert kept.tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 0]
    assert latent.as_good_as(log_reward, length, -3.0, 3, 1.25).tolist() == [
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert latent.as_good_as(log_reward, length, -3.0, 3, 0.95).tolist() == [
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.slow
def test_a_filtered_draw_weighs_by_its_examples_reference():
    """The weights follow from the batch itself, delta from the step; what does not count has no
    gradient.
    """
    g, task = posteriors.fresh(), posteriors.task()
    strings = Sequences(jnp.asarray([[0, 2, 1], [2, 1, 1]]), jnp.asarray([2, 1]))
    found = latent.references(task, strings, prefix_rewards.at_every_prefix)
    for i in range(2):
        log_density = task.target(i).log_density(strings.tokens, strings.length)[i]
        assert float(found.own[i]) == pytest.approx(float(log_density), rel=1e-5)
    training = gflownet.training(g, task, num=64, replayed=0.0)
    delta_of = optax.linear_schedule(1.5, 1.0, 2)
    filtered = eqx.filter_jit(latent.Filtered(training.draw, found, delta_of))
    params, loss, data = training.params, training.loss, training.data
    for delta in (1.5, 1.25, 1.0, 1.0):
        key = jax.random.fold_in(jax.random.key(3), int(data.step))
        batch, data = filtered(key, params, data)
        x, weight, i = batch.sequences, np.asarray(batch.weight), batch.example
        log_r = np.asarray(task.target(i).log_density(x.tokens, x.length), np.float64)
        length = np.maximum(np.asarray(x.length), 1)
        wanted = log_r / length >= delta * float(found.own[i]) / float(strings.length[i]) - 1e-4
        np.testing.assert_array_equal(weight, wanted & (np.asarray(x.length) > 0))
        same = (np.asarray(x.tokens) == np.asarray(strings.tokens[i])).all(1)
        assert same.any() and weight[same].all() and not weight.all()
    without = jnp.where(batch.weight[:, None] > 0, batch.log_reward, -7.0)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, key, batch)[0]))
    grads = [
        gradient(params, b)["guide"]
        for b in (
            batch,
            dataclasses.replace(batch, log_reward=without),
            dataclasses.replace(batch, weight=None),
        )
    ]
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-6)
    assert np.abs(np.asarray(grads[0] - grads[2])).max() > 1e-3


@pytest.mark.slow
def test_a_guide_learns_from_references_alone():
    """With delta = 1 and the two references replayed, the guide comes to favour strings as good as
    they are.
    """
    g, task = posteriors.fresh(), posteriors.task()
    strings = Sequences(jnp.asarray([[0, 2, 1], [2, 1, 1]]), jnp.asarray([2, 1]))
    found = latent.references(task, strings, prefix_rewards.at_every_prefix)
    training = gflownet.training(g, task, num=16, objective=gflownet.modified_subtb, slots=8)
    data = training.data
    training = dataclasses.replace(
        training,
        draw=latent.Filtered(training.draw, found, optax.linear_schedule(1.5, 1.0, 100)),
        data=data._replace(
            replay=replay.add(data.replay, strings, found.log_reward, jnp.arange(2))
        ),
    )
    options = {"optimizer": optax.adam(0.05), "num_steps": 300, "progress": False}
    out = fit.run(jax.random.key(0), training, **options)
    for i in range(2):
        x = exact.strings(3, posteriors.T, EOS)
        log_r = task.target(i).log_density(x.tokens, x.length)
        kept = np.asarray(latent.as_good_as(log_r, x.length, found.own[i], strings.length[i])) > 0
        before, after = (
            exact.enumerate_strings(task.law(dataclasses.replace(g, params=params["guide"]).lm, i))
            .probs[kept]
            .sum()
            for params in (training.params, out.params)
        )
        assert after > before + 0.1
