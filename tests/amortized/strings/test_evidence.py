"""Bounds, effective sample sizes and diversity against enumeration and plain definitions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from amortized.strings import evidence
from ppl import exact
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target, log_probs_of
from samplers.strings import proposals
from tests.helpers import EOS, as_arrays, as_strings, assert_z, hmm
from tests.samplers.problems import plain, target_of


def enumerated(problem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sequences]:
    """Laws of the target and of a guide, log gamma / q, and the strings, where the
    target has mass.
    """
    target = target_of("table", problem)
    law, guide = exact.enumerate_strings(target), exact.enumerate_strings(target.under(hmm()))
    return law.probs, guide.probs, law.log_gamma - guide.log_gamma, law.sequences


@pytest.mark.slow
def test_bounds_are_those_of_the_enumerated_laws():
    target = target_of("table", "reward")
    guide = plain("markov").under(hmm())
    base = plain("table")
    p, q, log_ratio, x = enumerated("reward")
    living = p > 0
    assert (q[living] > 0).all()
    rows = take_rows(x, jnp.asarray(np.flatnonzero(living)))
    upper = evidence.eubo(target, guide, rows, jnp.log(jnp.asarray(p[living])))
    np.testing.assert_allclose(upper, p[living] @ log_ratio[living], rtol=1e-5)
    np.testing.assert_allclose(
        evidence.total_variation(target, guide), 0.5 * np.abs(p - q).sum(), rtol=1e-4
    )
    # The base model's own law has no string that the target forbids: all its numbers are finite.
    out = evidence.draws(jax.random.key(1), target, base, num_particles=5000)
    r, ratio = exact.enumerate_strings(base).probs, exact.enumerate_strings(target).log_gamma
    ratio = np.where(living, ratio - np.log(np.where(living, r, 1)), 0)
    assert_z(out.log_weights, float(r @ ratio), resolution=0.02)
    np.testing.assert_allclose(
        out.elbo_std_error, np.std(out.log_weights, ddof=1) / 5000**0.5, rtol=1e-3
    )
    assert_z(
        np.exp(out.log_weights),
        float(np.exp(exact.enumerate_strings(target).log_z)),
        resolution=0.04,
    )
    truth = (r @ np.exp(ratio)) ** 2 / (r @ np.exp(2 * ratio))
    np.testing.assert_allclose(out.ess, truth, rtol=0.05)
    assert out.elbo < out.log_z < upper


def forgetful(lm: Any, token: int) -> Any:
    """The model, except that after the prompt it as good as never draws `token`."""

    def prefill(static: Any, params: Any, tokens: Any, length: Any) -> Any:
        data, logits = lm.functions.prefill(static, params, tokens, length)
        return data, logits.at[token].add(-20.0)

    return dataclasses.replace(lm, functions=lm.functions._replace(prefill=prefill))


def test_a_guide_that_has_lost_a_part_is_found_out():
    """By its own numbers it is nearly perfect: the ESS is high, and the error of log Z small."""
    key, p = jax.random.key(4), plain("table")
    first = int(jnp.argmax(p.prefix.logits))
    share = float(jax.nn.softmax(p.prefix.logits)[first])
    assert 0.3 < share < 0.9
    guide = p.under(forgetful(p.lm, first))
    found = evidence.coverage(key, p, guide, num_particles=256)
    assert found.guide.ess > 0.99 and found.guide.log_z_std_error < 0.02
    np.testing.assert_allclose(found.guide.log_z, np.log1p(-share), atol=0.02)
    assert not found.agrees
    np.testing.assert_allclose(found.missed, share, atol=0.15)
    np.testing.assert_allclose(found.log_z_gap, -np.log1p(-share), atol=0.05)
    good = evidence.coverage(key, p, p, num_particles=256)
    assert good.agrees and good.missed == 0 and abs(good.log_z_gap) < 1e-4
    assert len(repr(found)) < 2000


@pytest.mark.slow
def test_a_mixture_with_the_model_finds_what_a_guide_has_lost():
    p = plain("table")
    guide = p.under(forgetful(p.lm, int(jnp.argmax(p.prefix.logits))))
    laws = [proposals.LanguageModel(guide), proposals.bootstrap]
    out = evidence.draws(
        jax.random.key(4), p, proposals.mixture([0.9, 0.1], laws), num_particles=4000
    )
    assert_z(np.exp(out.log_weights), 1.0, resolution=0.05)


def test_draws_are_weighed_by_the_law_they_came_from():
    """Every string's weight is gamma / q, enumerated, with q another model than the target's; not
    gamma / p.
    """
    target, guide = target_of("table", "reward"), plain("table").under(hmm())
    _, q, log_ratio, x = enumerated("reward")
    out = evidence.draws(jax.random.key(2), target, guide, num_particles=4000)
    row = {string: i for i, string in enumerate(as_strings(x.tokens, x.length))}
    rows = np.array(
        [row[string] for string in as_strings(out.sequences.tokens, out.sequences.length)]
    )
    np.testing.assert_allclose(out.log_weights, log_ratio[rows], atol=1e-4)
    for i in np.flatnonzero(q > 0.02):
        assert_z(rows == i, float(q[i]), resolution=0.01)


def law_without(q: Target, banned: int) -> np.ndarray:
    """log of the law [M] that draws every token from q's, renormalised without this one; the lost
    mass comes from the same prefixes with the token after them.
    """
    x = exact.strings(q.lm.vocab_size, q.max_tokens, EOS)
    own = np.asarray(q.token_log_probs(x.tokens, x.length), np.float64)
    total = own.sum(1)
    for t in range(q.max_tokens):
        instead = log_probs_of(q, x.tokens.at[:, t].set(banned))[:, t]
        lost = np.exp(np.asarray(instead, np.float64))
        total -= np.where(t <= np.asarray(x.length), np.log1p(-lost), 0.0)
    written = np.arange(q.max_tokens) < np.asarray(x.length)[:, None]
    return np.where((written & (np.asarray(x.tokens) == banned)).any(1), -np.inf, total)


def test_a_constrained_guide_has_the_law_that_it_draws_from():
    """Not p times the constraint: every token is renormalised."""
    target, plainly = target_of("table", "banned"), plain("table").under(hmm())
    guide = plainly * ppl.support(target)
    truth, log_q = exact.enumerate_strings(target), law_without(plainly, 2)
    np.testing.assert_allclose(np.exp(log_q).sum(), 1.0, rtol=1e-5)
    distance = 0.5 * np.abs(truth.probs - np.exp(log_q)).sum()
    np.testing.assert_allclose(evidence.total_variation(target, guide), distance, rtol=1e-4)
    living = truth.probs > 0
    rows = take_rows(truth.sequences, jnp.asarray(np.flatnonzero(living)))
    p, log_ratio = truth.probs[living], truth.log_gamma[living] - log_q[living]
    upper = evidence.eubo(target, guide, rows, jnp.log(jnp.asarray(p)))
    np.testing.assert_allclose(upper, p @ log_ratio, rtol=1e-5)


@pytest.mark.slow
def test_a_guide_that_draws_what_is_forbidden_says_so():
    out = evidence.draws(
        jax.random.key(1), target_of("table", "banned"), proposals.bootstrap, num_particles=64
    )
    assert (
        out.elbo == -jnp.inf
        and out.elbo_std_error == jnp.inf
        and jnp.isfinite(out.log_z)
        and 0 < out.ess < 1
    )
    target, guide = target_of("table", "banned"), plain("table") * ppl.banned([2])
    found = evidence.coverage(jax.random.key(1), target, guide, num_particles=256)
    assert found.agrees and jnp.isfinite(found.guide.elbo)
    exactly = evidence.draws(jax.random.key(1), plain("table"), plain("table"), num_particles=16)
    np.testing.assert_allclose([exactly.ess, exactly.elbo, exactly.log_z], [1, 0, 0], atol=1e-5)


def sequences(*strings: tuple[int, ...]) -> Sequences:
    return Sequences(*as_arrays(strings, 4, EOS))


def test_diversity():
    x = sequences((0, 2, 3), (0, 2), (0, 2, 3), (), (3, 3, 3, 3))
    assert evidence.distinct(x) == 4 / 5
    assert evidence.distinct_n(x, 1) == 3 / 12
    assert evidence.distinct_n(x, 2) == 3 / (2 + 1 + 2 + 3)
    assert evidence.distinct_n(sequences(()), 2) == 0
    assert evidence.mode_coverage(x, sequences((0, 2), (), (2,))) == 2 / 3
    distances = [1 / 3, 0, 1 / 3, 1, 1, 1, 3 / 4, 1, 3 / 4, 1]
    np.testing.assert_allclose(evidence.edit_diversity(x), np.mean(distances))
    assert evidence.edit_diversity(sequences((0,))) == 0


def test_edit_distance_is_the_recursive_one():
    @functools.cache
    def plainly(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(
            plainly(a[1:], b) + 1, plainly(a, b[1:]) + 1, plainly(a[1:], b[1:]) + (a[0] != b[0])
        )

    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = (tuple(rng.integers(0, 3, rng.integers(0, 6)).tolist()) for _ in range(2))
        assert evidence.edit_distance(list(a), list(b)) == plainly(a, b)


@pytest.mark.bad_input
def test_bad_input():
    target = target_of("table", "reward")
    x = sequences((0,))
    with pytest.raises(ValueError, match="expected a guide that is a language model"):
        evidence.eubo(target, target, x)
    with pytest.raises(ValueError, match="expected a guide that is a language model"):
        evidence.coverage(jax.random.key(0), target, target)
    with pytest.raises(ValueError, match=r"pass target.under\(lm\) \* ppl.support\(target\)"):
        evidence.total_variation(target, plain("table") ** 2.0)
    with pytest.raises(ValueError, match="expected n of at least 1"):
        evidence.distinct_n(x, 0)
    with pytest.raises(ValueError, match="expected modes"):
        evidence.mode_coverage(x, take_rows(x, jnp.zeros(0, jnp.int32)))
    with pytest.raises(ValueError, match="got an LM, .* pass target.under"):
        evidence.draws(jax.random.key(0), target, hmm())
    with pytest.raises(ValueError, match="expected a target, got an LM"):
        evidence.draws(jax.random.key(0), hmm(), target)
    with pytest.raises(ValueError, match="over the target's strings"):
        evidence.draws(jax.random.key(0), target, hmm().given([2], max_tokens=2))
