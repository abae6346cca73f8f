"""Learned twists: the potential of a model's logits, the scores of strings under it, both by
enumeration.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from amortized.strings import twists
from models import tabular
from ppl import exact
from ppl.lm import LM
from ppl.target import Target
from ppl.testing import check_potential
from ppl.twists import twisted
from samplers import smc
from samplers.smc import importance
from tests.helpers import EOS, MAX_TOKENS, PROMPT, VOCAB_SIZE, as_strings, markov
from tests.samplers.problems import target_of

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)
STRINGS = as_strings(ALL.tokens, ALL.length)
ROWS = tabular.num_prefixes(VOCAB_SIZE, MAX_TOKENS + len(PROMPT))


def table(values: Any) -> LM:
    return tabular.table(values, eos=EOS)


def random_values(seed: int) -> jax.Array:
    return jnp.asarray(
        0.7 * np.random.default_rng(seed).normal(size=(ROWS, VOCAB_SIZE)), jnp.float32
    )


def row_of(prefix: tuple[int, ...]) -> int:
    """The row of a prefix after the prompt, as `tabular.table` numbers them."""
    row = 0
    for token in (*PROMPT[1:], *prefix):
        row = row * VOCAB_SIZE + token + 1
    return row


def optimal_values(target: Target) -> jax.Array:
    """The logits [P, V] that are log psi* (an end's logit is log Phi), -20 where that is zero or
    never needed.
    """
    optimal = exact.optimal_twist(target)
    values = np.full((ROWS, VOCAB_SIZE), -20.0, np.float32)
    children, log_twist, log_final = (
        np.asarray(x) for x in (optimal.children, optimal.log_twist, optimal.log_final)
    )
    rows: dict[tuple[int, ...], int] = {(): 0}
    for string in STRINGS[1:]:
        rows[string] = int(children[rows[string[:-1]], string[-1]])
    for string, row in rows.items():
        if string:
            whole = log_final[row] if len(string) == MAX_TOKENS else log_twist[row]
            values[row_of(string[:-1]), string[-1]] = max(whole, -20.0)
        if len(string) < MAX_TOKENS:
            values[row_of(string), EOS] = max(log_final[row], -20.0)
    return jnp.asarray(values)


@pytest.mark.slow
def test_it_is_a_potential():
    twist = twists.of(markov(), target_of("table", "reward"))
    check_potential(
        twist, vocab_size=VOCAB_SIZE, eos=EOS, max_tokens=MAX_TOKENS, key=jax.random.key(4)
    )


@pytest.mark.slow
def test_the_optimal_table_leaves_no_variance():
    target = target_of("table", "reward")
    twist = twists.of(table(optimal_values(target)), target)
    out = importance.run(jax.random.key(1), twisted(target, twist), num_particles=64)
    np.testing.assert_allclose(out.log_weights, 0.0, atol=2e-4)
    np.testing.assert_allclose(out.log_z, exact.enumerate_strings(target).log_z, atol=2e-4)
    s = jax.jit(twists.score)(target, twist, out.sequences)
    np.testing.assert_allclose(s.log_norm[:, 1:], 0.0, atol=2e-4)


@pytest.mark.parametrize(
    "problem",
    ["banned", pytest.param("product", marks=pytest.mark.slow)],
)
def test_scores_are_what_the_sampler_does(problem: str):
    """log q is a law, log pi telescopes to the density, and both are those of importance sampling
    under the twist.
    """
    target = target_of("table", problem)
    twist = twists.of(table(random_values(2)), target)
    s = jax.jit(twists.score)(target, twist, ALL)
    log_gamma = target.log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose(s.log_pi.sum(1), log_gamma, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        s.log_phi, target.log_potential(ALL.tokens, ALL.length), rtol=1e-4, atol=1e-4
    )
    out = smc.run(
        jax.random.key(3), twisted(target, twist), num_particles=32, threshold=0.0, history=True
    )
    x = jax.jit(twists.score)(target, twist, out.sequences)
    drawn = np.asarray(jnp.cumsum(x.log_pi - x.log_q, axis=1))[:, : int(out.rounds)].T
    history = np.asarray(out.history.log_weights)[: int(out.rounds)]
    np.testing.assert_allclose(np.exp(drawn), np.exp(history), rtol=1e-3, atol=1e-6)
    if problem == "banned":  # what the target forbids is never drawn
        np.testing.assert_allclose(np.exp(s.log_q.sum(1)).sum(), 1.0, rtol=1e-4)
    for string, log_psi, growing, ends in zip(STRINGS, s.log_psi, s.growing, s.ends, strict=True):
        padded = (*string, EOS)[:MAX_TOKENS]
        expected = [random_values(2)[row_of(padded[:t]), v] for t, v in enumerate(padded)]
        np.testing.assert_allclose(log_psi[: len(padded)], expected, rtol=1e-5)
        assert int(ends.argmax()) == len(padded) - 1 == int(growing.sum()) and ends.sum() == 1


@pytest.mark.slow
def test_potentials_that_take_whole_strings_score_alike():
    p = target_of("markov", "banned")
    target = p * ppl.continuation(p, [0, 3])
    twist = twists.of(markov(), target)
    s = jax.jit(twists.score)(target, twist, ALL)
    log_gamma = target.log_density(ALL.tokens, ALL.length)
    np.testing.assert_allclose(np.exp(s.log_pi.sum(1)), np.exp(log_gamma), rtol=1e-4)
    out = smc.run(
        jax.random.key(3), twisted(target, twist), num_particles=32, threshold=0.0, history=True
    )
    x = jax.jit(twists.score)(target, twist, out.sequences)
    drawn = np.asarray(jnp.cumsum(x.log_pi - x.log_q, axis=1))[:, : int(out.rounds)].T
    np.testing.assert_allclose(
        np.exp(drawn), np.exp(np.asarray(out.history.log_weights)[: int(out.rounds)]), rtol=1e-3
    )


@pytest.mark.bad_input
def test_bad_input():
    target = target_of("table", "reward")
    with pytest.raises(ValueError, match="expected a model over the target's strings"):
        twists.of(dataclasses.replace(markov(), eos=2), target)
    longer = markov().given(PROMPT, max_tokens=MAX_TOKENS + 1)
    with pytest.raises(ValueError, match="expected a twist over the target's strings"):
        twisted(target, twists.of(markov(), longer))
