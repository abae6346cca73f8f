"""How far proposals follow a look-ahead: exact variances of weights over all strings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import exact
from ppl.pytrees import register_dataclass
from ppl.target import Target
from samplers.strings import growing, proposals, regeneration
from tests.helpers import EOS, MAX_TOKENS, VOCAB_SIZE
from tests.samplers.problems import plain, score_arrays, target_of

ALL = exact.strings(VOCAB_SIZE, MAX_TOKENS, EOS)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Ending(ppl.Potential):
    """log Phi(x) = scale * score(x) + constant, paid at the end, which fills the column of EOS
    alone; state = (tokens [N, T], their number [N])."""

    scale: jax.Array
    constant: jax.Array
    sure: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def trusted(self) -> bool:
        return self.sure

    def init(self, num: int) -> Any:
        return jnp.full((num, MAX_TOKENS), EOS, jnp.int32), jnp.zeros(num, jnp.int32)

    def step(self, state: Any, token: Any) -> Any:
        tokens, used = state
        place = jnp.arange(MAX_TOKENS) == used[:, None]
        return (jnp.where(place, token[:, None], tokens), used + 1), jnp.zeros(token.shape)

    def final(self, state: Any) -> Any:
        return (self.scale * score_arrays(*state) + self.constant).astype(jnp.float32)

    def lookahead(self, state: Any) -> Any:
        ends = jnp.arange(VOCAB_SIZE) == EOS
        return jnp.where(ends, self.final(state)[:, None], 0.0)


def ending(scale: float, constant: float, sure: bool = False) -> Ending:
    return Ending(jnp.float32(scale), jnp.float32(constant), sure)


def weights(target: Target, law: Any) -> tuple[np.ndarray, np.ndarray]:
    """log gamma and log q of all strings of positive density."""
    pieces = regeneration.score(target, proposals.as_proposal(law), ALL)
    log_gamma = np.asarray(regeneration.log_density(target, pieces), np.float64)
    log_q = np.asarray(pieces.log_q.sum(1), np.float64)
    alive = log_gamma > -np.inf
    np.testing.assert_allclose(np.exp(log_q[alive]).sum(), 1, atol=1e-4)
    return log_gamma[alive], log_q[alive]


def variation(log_gamma: np.ndarray, log_q: np.ndarray) -> float:
    """Var w / (E w)^2 of w = gamma / q."""
    w = np.exp(log_gamma - log_gamma.max())
    return float((w**2 / np.exp(log_q)).sum() / w.sum() ** 2) - 1


REWARDS = [(0.0, -10.0), (0.0, 10.0), (3.0, 0.0), (1.0, -4.0), (-6.0, 2.0), (0.5, 0.0)]


def test_a_look_ahead_that_knows_the_end_alone_is_not_trusted():
    """Next to the bootstrap where that is good, and no weight more than 4 times its."""
    for scale, constant in REWARDS:
        target = target_of("hmm", "min_tokens") * ending(scale, constant)
        _, certain = weights(target_of("hmm", "min_tokens"), proposals.locally_optimal)
        log_gamma, log_q = weights(target, proposals.locally_optimal)
        assert (certain - log_q).max() <= np.log(4)
        theirs, ours = variation(log_gamma, certain), variation(log_gamma, log_q)
        assert ours <= 1.5 * theirs + 0.5, (scale, constant, ours, theirs)


def test_the_faults_that_it_avoids_are_large():
    """Planted: a potential that vouches for such a look-ahead is followed, 3,000 and more."""
    for constant in (-10.0, 10.0):
        target = plain("hmm") * ending(0.0, constant, sure=True)
        assert variation(*weights(target, proposals.locally_optimal)) > 1000


@pytest.mark.parametrize("problem", ["regex", "power_of_all"])
def test_what_weighs_all_tokens_is_followed_as_it_is(problem: str):
    """Constraints and laws, beside a reward that has its own hedge or no look-ahead."""
    target = target_of("hmm", problem)
    x = growing.start(target, proposals.as_proposal(proposals.bootstrap), 3)
    assert x.logits is not None
    law = proposals.locally_optimal(target, x.logits, x.potential)
    known = target.potential.lookahead(x.potential)
    assert known is not None
    expected = target.log_prob_factor(x.logits) + known
    np.testing.assert_allclose(law, expected, rtol=1e-6)
    both = target * ending(0.0, 0.0)
    x = growing.start(both, proposals.as_proposal(proposals.bootstrap), 3)
    assert x.logits is not None
    np.testing.assert_allclose(
        proposals.locally_optimal(both, x.logits, x.potential), expected, rtol=1e-6
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias(ppl.Potential):
    """Phi(x) = prod exp(bias of token), known of every token and nothing at the end."""

    bias: jax.Array

    def init(self, num: int) -> Any:
        return jnp.zeros(num, jnp.float32)

    def step(self, state: Any, token: Any) -> Any:
        return state, self.bias[token]

    def final(self, state: Any) -> Any:
        return state

    def lookahead(self, state: Any) -> Any:
        return jnp.broadcast_to(self.bias, (state.shape[0], VOCAB_SIZE))


@pytest.mark.parametrize("bias", [[0.0, 0.0, 2.0, 0.0], [1.0, -0.5, 2.0, -1.0]])
def test_a_users_factors_of_all_tokens_are_followed(bias: list[float]):
    target = plain("hmm") * Bias(jnp.asarray(bias, jnp.float32))
    x = growing.start(target, proposals.as_proposal(proposals.bootstrap), 2)
    assert x.logits is not None
    law = proposals.locally_optimal(target, x.logits, x.potential)
    np.testing.assert_allclose(law, x.logits + jnp.asarray(bias), rtol=1e-6)


@pytest.mark.slow
def test_chains_remember_the_law_that_they_drew_from():
    """`Powered`'s notes give log q at every rung, also where the look-ahead is followed in part."""
    target = plain("hmm") ** 1.5 * ending(1.0, -2.0)
    ladder = jnp.asarray([0.5, 1.5], jnp.float32)
    how = proposals.Powered(ladder, lookahead=True)
    pieces = regeneration.score(target, how, ALL)
    for rung in range(2):
        there = dataclasses.replace(target, alpha=ladder[rung])
        moved = regeneration.at_rung(there, pieces, jnp.full(ALL.length.shape, rung))
        again = regeneration.score(there, proposals.Powered(lookahead=True), ALL)
        np.testing.assert_allclose(moved.log_q, again.log_q, atol=1e-4)
