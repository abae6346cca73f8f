"""The enumerable models against brute force, and the oracles against both."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import marginals, tabular
from tests import helpers


def by_steps(lm, prompt, string):
    """log p(string | prompt), string with its EOS, from `step` on one row."""
    prefix = lm.prefill(prompt)
    cache, logits, total = lm.init(prefix, 1, len(string)), prefix.logits[None], 0.0
    for token in string:
        total += float(jax.nn.log_softmax(logits)[0, token])
        cache, logits = lm.step(prefix, cache, jnp.asarray([token], jnp.int32))
    return total


def ended(string):
    return string + (helpers.EOS,) if len(string) < helpers.MAX_TOKENS else string


@pytest.mark.parametrize("name", helpers.MODELS)
def test_probabilities_of_all_strings_sum_to_one(name):
    law, log_z = helpers.brute_force_law(helpers.MODELS[name](), helpers.PROMPT, helpers.MAX_TOKENS)
    assert abs(log_z) < 1e-5
    every = sum(3**t for t in range(helpers.MAX_TOKENS + 1))
    assert (
        len(law) == every if name == "hmm" else 0 < len(law) < every
    )  # elsewhere some strings are impossible


@pytest.mark.parametrize("name", helpers.MODELS)
def test_steps_agree_with_full_passes(name):
    lm = helpers.MODELS[name]()
    law, _ = helpers.brute_force_law(lm, helpers.PROMPT, helpers.MAX_TOKENS)
    batch = sorted(law)
    tokens, length = helpers.as_arrays(batch, helpers.MAX_TOKENS, lm.eos)
    prefix = lm.prefill(helpers.PROMPT)
    cache = lm.init(prefix, len(batch), helpers.MAX_TOKENS)
    logits = jnp.broadcast_to(prefix.logits, (len(batch), lm.vocab_size))
    log_prob = jnp.zeros(len(batch))
    for t in range(helpers.MAX_TOKENS):
        step = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, t, None], 1)[:, 0]
        log_prob += jnp.where(t <= length, step, 0.0)
        cache, logits = lm.step(prefix, cache, tokens[:, t])
    np.testing.assert_allclose(log_prob, [math.log(law[string]) for string in batch], atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 4.0])
def test_markov_log_z_is_the_sum_over_strings(alpha):
    _, log_z = helpers.brute_force_law(helpers.markov(), helpers.PROMPT, helpers.MAX_TOKENS, alpha)
    assert marginals.markov_log_z(
        helpers.markov(), helpers.PROMPT, helpers.MAX_TOKENS, alpha
    ) == pytest.approx(log_z, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_markov_marginals_and_length_are_sums_over_strings(alpha):
    law, _ = helpers.brute_force_law(helpers.markov(), helpers.PROMPT, helpers.MAX_TOKENS, alpha)
    expected = np.zeros((helpers.MAX_TOKENS, helpers.VOCAB_SIZE))
    for string, p in law.items():
        for t in range(helpers.MAX_TOKENS):
            expected[t, string[t] if t < len(string) else helpers.EOS] += p
    lm = helpers.markov()
    found = marginals.markov_marginals(lm, helpers.PROMPT, helpers.MAX_TOKENS, alpha)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    length = sum(p * len(string) for string, p in law.items())
    assert marginals.markov_expected_length(
        lm, helpers.PROMPT, helpers.MAX_TOKENS, alpha
    ) == pytest.approx(length)


def test_hmm_likelihood_is_the_forward_algorithm_and_a_sum_over_paths():
    lm = helpers.hmm()
    initial, transition, emission = (
        np.asarray(lm.params[k], float) for k in ("initial", "transition", "emission")
    )

    def over_paths(tokens):
        total = 0.0
        for code in np.ndindex(*(3,) * len(tokens)):
            p = initial[code[0]] * emission[code[0], tokens[0]]
            for a, b, token in zip(code, code[1:], tokens[1:], strict=False):
                p *= transition[a, b] * emission[b, token]
            total += p
        return total

    law, _ = helpers.brute_force_law(lm, helpers.PROMPT, helpers.MAX_TOKENS)
    for string, p in law.items():
        likelihood = marginals.hmm_log_likelihood(lm, helpers.PROMPT, ended(string))
        assert likelihood == pytest.approx(math.log(p), abs=1e-5)
    paths = over_paths([*helpers.PROMPT, 3, 2, 1]) / over_paths(helpers.PROMPT)
    assert marginals.hmm_log_likelihood(lm, helpers.PROMPT, (3, 2, 1)) == pytest.approx(
        math.log(paths)
    )
    assert by_steps(lm, helpers.PROMPT, (3, 2, 1)) == pytest.approx(math.log(paths), abs=1e-5)


def test_table_holds_any_joint_law():
    """The conditionals of an arbitrary joint law, put in the table, give that law back."""
    vocab_size, eos, depth = 3, 1, 3
    batch = list(helpers.strings(vocab_size, depth, eos))
    joint = np.random.default_rng(0).dirichlet(np.ones(len(batch)))
    mass = {
        prefix: sum(p for s, p in zip(batch, joint, strict=True) if s[: len(prefix)] == prefix)
        for prefix in batch
    }
    logits = np.zeros((tabular.num_prefixes(vocab_size, depth), vocab_size))
    for prefix in (s for s in batch if len(s) < depth):
        row = 0
        for token in prefix:
            row = row * vocab_size + token + 1
        law = {prefix + (v,): mass[prefix + (v,)] for v in (0, 2)}
        logits[row] = np.log(
            [law[prefix + (0,)], mass[prefix] - sum(law.values()), law[prefix + (2,)]]
        )
    lm = tabular.table(logits, eos=eos)
    law, log_z = helpers.brute_force_law(lm, [0], depth)
    assert abs(log_z) < 1e-5
    assert helpers.total_variation(law, dict(zip(batch, joint, strict=True))) < 1e-5


def test_table_conditions_on_the_prompt_and_ends_beyond_its_depth():
    lm = helpers.table()
    np.testing.assert_array_equal(lm.prefill([3, 2]).logits, lm.params[2 + 1])
    beyond = lm.prefill([0] * 7).logits
    assert beyond[helpers.EOS] == 0 and np.isneginf(np.delete(beyond, helpers.EOS)).all()
    with pytest.raises(ValueError, match="context of 7 tokens"):
        lm.given(helpers.PROMPT, max_tokens=helpers.MAX_TOKENS + 2)


def test_hmm_stays_finite_after_impossible_tokens():
    lm = helpers.hmm()
    blocked = tabular.hmm(
        [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], eos=1
    )
    assert np.isneginf(by_steps(blocked, [0], (2,)))
    logits = blocked.prefill([0, 2]).logits
    assert not np.isnan(logits).any() and jnp.isclose(jax.nn.logsumexp(logits), 0.0)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(lm.params))


@pytest.mark.parametrize("name", helpers.MODELS)
def test_random_models_are_asymmetric_with_early_eos_and_impossible_tokens(name):
    lm = helpers.MODELS[name]()
    laws = lm.params["emission"] if name == "hmm" else jax.nn.softmax(lm.params, axis=-1)
    np.testing.assert_allclose(laws.sum(-1), 1.0, atol=1e-5)
    assert laws[:, lm.eos].min() >= 0.099 and laws[:, lm.eos].max() <= 0.301
    others = np.delete(np.asarray(laws), lm.eos, axis=1)
    assert (others == 0).any() and ((others > 0).sum(1) >= 2).all()


def test_random_models_depend_on_their_key_only():
    first, again, other = (
        tabular.random_markov(jax.random.key(k), 4, eos=0).params for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_equal_models_share_a_compilation():
    counter = helpers.TraceCounter(lambda lm, prefix: lm.init(prefix, 2, 3))
    init = jax.jit(counter)
    for seed in (0, 1):
        lm = tabular.random_hmm(jax.random.key(seed), 3, 4, eos=2)
        init(lm, lm.prefill([0]))
    assert counter.count == 1


def test_gradient_reaches_the_parameters():
    lm = helpers.table()
    gradient = jax.grad(lambda lm: jax.nn.log_softmax(lm.prefill([0]).logits)[2])(lm)
    expected = -jax.nn.softmax(lm.params[0]).at[2].add(-1.0)
    np.testing.assert_allclose(gradient.params[0], expected, atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tabular.markov([[0.5, 0.6], [0.5, 0.5]], eos=0), "divide each row by its sum"),
        (lambda: tabular.markov([[1.5, -0.5], [0.5, 0.5]], eos=0), "divide each row by its sum"),
        (lambda: tabular.markov([[0.5, 0.5]], eos=0), "square transition"),
        (lambda: tabular.markov(jnp.full(2, 0.5), eos=0), "with 2 axes"),
        (lambda: tabular.markov([[0.5, 0.5], [0.5, 0.5]], eos=2), r"eos in \[0, 2\), got 2"),
        (lambda: tabular.table(jnp.zeros((5, 2)), eos=0), r"got 5; T = 3 needs 7"),
        (lambda: tabular.table(jnp.full((1, 2), -jnp.inf), eos=0), "finite largest logit"),
        (
            lambda: tabular.hmm([1.0], [[1.0]], [[0.5, 0.5], [0.5, 0.5]], eos=0),
            "an emission of 2 states",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_planted_faults_are_seen():
    """The oracle's agreement is not vacuous: an EOS that is not absorbing, and a horizon that
    demands EOS, differ.
    """
    lm = helpers.markov()
    powered = np.exp(np.asarray(lm.params, float)) ** 2
    truth = marginals.markov_log_z(lm, helpers.PROMPT, helpers.MAX_TOKENS, 2.0)
    not_absorbing = np.log(
        np.linalg.matrix_power(powered, helpers.MAX_TOKENS).sum(1)[helpers.PROMPT[-1]]
    )
    assert abs(not_absorbing - truth) > 0.01
    shorter = marginals.markov_log_z(lm, helpers.PROMPT, helpers.MAX_TOKENS - 1, 2.0)
    assert abs(shorter - truth) > 0.01


def test_z_scores_see_a_shift_and_refuse_a_blunt_test():
    samples = np.random.default_rng(0).normal(1.0, 1.0, 10_000)
    helpers.assert_z(samples, 1.0, resolution=0.02)
    with pytest.raises(AssertionError, match="z = "):
        helpers.assert_z(samples, 1.1, resolution=0.02)
    with pytest.raises(AssertionError, match="more samples"):
        helpers.assert_z(samples[:50], 1.1, resolution=0.02)
    helpers.assert_z(np.full(10, 2.0), 2.0, resolution=0.01)
    with pytest.raises(AssertionError, match="z = inf"):
        helpers.assert_z(np.full(10, 2.0), 2.1, resolution=0.01)


def test_laws_of_populations_merge_duplicates():
    batch = [(0,), (2, 3), (0,)]
    tokens, length = helpers.as_arrays(batch, 2, helpers.EOS)
    assert helpers.as_strings(tokens, length) == batch
    law = helpers.population_law(tokens, length, jnp.log(jnp.asarray([1.0, 2.0, 1.0])))
    assert law == pytest.approx({(0,): 0.5, (2, 3): 0.5})
    assert helpers.total_variation(law, {(0,): 1.0}) == pytest.approx(0.5)
