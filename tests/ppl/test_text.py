"""The NumPyro bridge: a target as a distribution in models that mix text with other variables."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import ppl
from ppl import exact
from samplers import smc
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, VOCAB_SIZE
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import plain, score_arrays, target_of

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
PROMPTS = ((2, 0), (3, 0), (3, 3, 0))
LOG_PRIOR = np.log([0.5, 0.2, 0.3])


def test_log_prob_is_log_gamma():
    target = target_of("hmm", "every_1")
    log_gamma = target.log_density(ALL.tokens, ALL.length)
    text = ppl.Text(target)
    assert text.event_shape == (MAX_TOKENS,) and text.batch_shape == ()
    np.testing.assert_array_equal(text.log_prob(ALL.tokens), log_gamma)
    np.testing.assert_allclose(text.log_prob(ALL.tokens[7]), log_gamma[7], rtol=1e-6)
    folded = text.log_prob(ALL.tokens[:120].reshape(4, 30, MAX_TOKENS))
    np.testing.assert_allclose(folded, log_gamma[:120].reshape(4, 30), rtol=1e-6)


def test_a_language_model_is_normalised_and_its_first_eos_ends_a_string():
    text = ppl.Text(plain("table"))
    np.testing.assert_allclose(jnp.exp(text.log_prob(ALL.tokens)).sum(), 1, rtol=1e-5)
    noise = jnp.where(jnp.arange(MAX_TOKENS) <= ALL.length[:, None], ALL.tokens, 3)
    np.testing.assert_array_equal(text.log_prob(noise), text.log_prob(ALL.tokens))


def test_sample_is_the_models_law():
    law, _ = helpers.brute_force_law(MODELS["table"](), helpers.PROMPT, MAX_TOKENS)
    tokens = jax.jit(lambda key: ppl.Text(plain("table")).sample(key, (100, 200)))(
        jax.random.key(0)
    )
    assert tokens.shape == (100, 200, MAX_TOKENS)
    check_frequencies(tokens.reshape(-1, MAX_TOKENS), law)
    assert jax.eval_shape(ppl.Text(plain("table")).sample, jax.random.key(0)).shape == (MAX_TOKENS,)


def targets() -> Any:
    """One target per prompt, stacked: what a topic chooses among."""
    each = [MODELS["hmm"]().given(prompt, max_tokens=MAX_TOKENS) for prompt in PROMPTS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.prefix for p in each)), each


def model(tilt: float = 1.0) -> Any:
    """topic ~ prior; text ~ p(. | prompt of the topic); a factor for what the text says."""
    prefixes, each = targets()
    topic = numpyro.sample("topic", dist.Categorical(logits=jnp.asarray(LOG_PRIOR)))
    prefix = jax.tree.map(lambda leaf: leaf[topic], prefixes)
    tokens = numpyro.sample("text", ppl.Text(dataclasses.replace(each[0], prefix=prefix)))
    x = ppl.sequences.from_tokens(tokens[None], EOS)
    numpyro.factor("tilt", tilt * score_arrays(x.tokens, x.length)[0])
    return topic, tokens


def joint() -> np.ndarray:
    """p(topic) p(text | topic) exp(score(text)) of every pair [3, M], from the oracles."""
    score = np.asarray(score_arrays(ALL.tokens, ALL.length), np.float64)
    strings = helpers.as_strings(ALL.tokens, ALL.length)
    laws = [helpers.brute_force_law(MODELS["hmm"](), prompt, MAX_TOKENS)[0] for prompt in PROMPTS]
    text = np.array([[law.get(x, 0.0) for x in strings] for law in laws])
    return np.exp(LOG_PRIOR)[:, None] * text * np.exp(score)


def test_the_joint_density_is_right_inside_jit():
    @jax.jit
    def density(topic: Any, tokens: Any) -> Any:
        return log_density(model, (), {}, {"topic": topic, "text": tokens})[0]

    found = jax.jit(jax.vmap(jax.vmap(density, (None, 0)), (0, None)))(jnp.arange(3), ALL.tokens)
    np.testing.assert_allclose(np.exp(np.asarray(found, np.float64)), joint(), rtol=1e-4, atol=1e-9)


def test_seed_and_trace():
    trace = handlers.trace(handlers.seed(model, jax.random.key(1))).get_trace()
    tokens = trace["text"]["value"]
    assert tokens.shape == (MAX_TOKENS,) and trace["text"]["type"] == "sample"
    sites = {"topic": trace["topic"]["value"], "text": tokens}
    _, again = log_density(model, (), {}, sites)
    np.testing.assert_array_equal(again["text"]["value"], tokens)
    same = handlers.trace(handlers.seed(model, jax.random.key(1))).get_trace()
    np.testing.assert_array_equal(same["text"]["value"], tokens)


def test_a_seeded_model_draws_the_joint_law():
    """Without the factor: frequencies of (topic, first token) over many runs of the model in one
    vmap.
    """
    draw = jax.jit(jax.vmap(lambda key: handlers.seed(model, key)()))
    topic, tokens = draw(jax.random.split(jax.random.key(2), 8000))
    score = np.exp(np.asarray(score_arrays(ALL.tokens, ALL.length), np.float64))
    truth = joint() / score
    first = np.asarray(ALL.tokens[:, 0])
    for z in range(3):
        for v in range(VOCAB_SIZE):
            p = truth[z, first == v].sum()
            share = np.mean((np.asarray(topic) == z) & (np.asarray(tokens[:, 0]) == v))
            assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 8000) + 1e-9


def test_condition_on_a_text():
    """The posterior of the topic given a text, by enumeration of the conditioned model."""
    row = 60
    conditioned = handlers.condition(model, {"text": ALL.tokens[row]})
    assert handlers.trace(handlers.seed(conditioned, jax.random.key(3))).get_trace()["text"][
        "is_observed"
    ]
    logs = [float(log_density(conditioned, (), {}, {"topic": jnp.int32(z)})[0]) for z in range(3)]
    posterior = np.exp(np.asarray(logs) - np.logaddexp.reduce(logs))
    np.testing.assert_allclose(posterior, joint()[:, row] / joint()[:, row].sum(), rtol=1e-4)


def test_substitute_and_block():
    trace = handlers.trace(
        handlers.seed(handlers.substitute(model, {"text": ALL.tokens[9]}), jax.random.key(4))
    )
    np.testing.assert_array_equal(trace.get_trace()["text"]["value"], ALL.tokens[9])


def test_a_tilted_target_acts_like_a_factor():
    """Text(p * reward) on a fixed text and Text(p) with numpyro.factor have one density."""
    tilted = plain("hmm") * ppl.reward(score_arrays)

    def with_text() -> None:
        numpyro.sample("text", ppl.Text(tilted), obs=ALL.tokens[33])

    def with_factor() -> None:
        numpyro.sample("text", ppl.Text(plain("hmm")), obs=ALL.tokens[33])
        numpyro.factor("tilt", score_arrays(ALL.tokens[33:34], ALL.length[33:34])[0])

    ours, theirs = (log_density(m, (), {}, {})[0] for m in (with_text, with_factor))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_tilted_target_has_no_sample_of_its_own():
    with pytest.raises(ValueError) as error:
        ppl.Text(target_of("hmm", "every_1")).sample(jax.random.key(5))
    assert str(error.value) == (
        "expected a language model to sample from, got a target with a power or a potential, which"
        " has no exact draw;"
        " pass Text(target, sampler=...), condition the site on a value, or write Text(p) with the"
        " tilt in"
        " numpyro.factor"
    )


def one_draw(key: Any, target: ppl.Target) -> Any:
    run_key, pick_key = jax.random.split(key)
    out = smc.run(run_key, target, num_particles=64)
    return out.sequences.tokens[jax.random.categorical(pick_key, out.log_weights)]


@pytest.mark.slow
def test_a_sampler_draws_from_a_tilted_target():
    """One weighted pick from SMC with 64 particles: frequencies near gamma / Z, inside a seeded
    model too.
    """
    target = plain("hmm") * ppl.must_end()
    text = ppl.Text(target, sampler=one_draw)
    tokens = jax.jit(lambda key: text.sample(key, (400,)))(jax.random.key(6))
    found = helpers.population_law(tokens, ppl.sequences.from_tokens(tokens, EOS).length)
    truth = exact.enumerate_strings(target)
    law = helpers.law_of(truth.sequences.tokens, truth.sequences.length, truth.log_gamma)
    assert max(len(x) for x in found) < MAX_TOKENS
    assert helpers.total_variation(found, law) < 0.12
    seeded = handlers.seed(lambda: numpyro.sample("text", text), jax.random.key(7))
    assert seeded().shape == (MAX_TOKENS,)


def test_a_text_crosses_jit_as_an_argument():
    """The target's arrays are leaves of the distribution, so it is data under jit and vmap."""
    text = ppl.Text(plain("hmm") ** 1.5)
    value = jax.jit(lambda d, x: d.log_prob(x))(text, ALL.tokens[5])
    np.testing.assert_allclose(value, text.log_prob(ALL.tokens[5]), rtol=1e-6)


def test_what_is_no_string_has_density_zero_inside_jit():
    """Ids outside the vocabulary, lengths outside the horizon and EOS before the length, in power,
    potential and model alike; outside of jit they are errors.
    """
    target = plain("table") ** 2 * ppl.banned([3])
    tokens = jnp.tile(jnp.asarray([0, 2, 0, EOS]), (6, 1))
    tokens = tokens.at[:, 1].set(jnp.asarray([2, -1, 4, 2, 2, EOS]))
    length = jnp.asarray([3, 3, 3, -1, MAX_TOKENS + 1, 3])
    found = jax.jit(lambda *x: target.log_density(*x))(tokens, length)
    np.testing.assert_allclose(found[0], target.log_density(tokens[:1], length[:1])[0], rtol=1e-6)
    assert np.isfinite(found[0]) and np.isneginf(found[1:]).all()
    parts = jax.jit(lambda *x: (target.log_potential(*x), target.token_log_probs(*x)))
    phi, log_probs = parts(tokens, length)
    assert np.isneginf(phi[1:]).all() and np.isneginf(log_probs[1:].sum(1)).all()
    text = ppl.Text(plain("table"))
    found = jax.jit(lambda value: text.log_prob(value))(tokens[:3])
    assert np.isfinite(found[0]) and np.isneginf(found[1:]).all()
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 4\), got -1"):
        text.log_prob(tokens[:3])
