"""The kernel kit passes exact kernels and finds the classic biases."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl.exact import Enumeration, enumerate_strings
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Kernel
from samplers.testing import check_kernel
from tests import helpers

MAX_TOKENS = 3


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Strings with their number among the enumerated ones."""

    sequences: Sequences
    index: jax.Array


def target() -> Target:
    return helpers.markov().given(helpers.PROMPT, max_tokens=MAX_TOKENS) ** 2.0


def proposals(exact: Enumeration, *, spread: float = 1.0) -> np.ndarray:
    """An asymmetric proposal matrix [M, M]."""
    q = np.random.default_rng(1).gamma(spread, size=(len(exact.probs),) * 2)
    return q / q.sum(1, keepdims=True)


def metropolis(
    log_gamma: np.ndarray, q: np.ndarray, exact: Enumeration, *, hastings: bool = True
) -> Kernel:
    """Metropolis-Hastings over the enumerated strings."""
    log_pi, log_q = jnp.asarray(log_gamma, jnp.float32), jnp.log(jnp.asarray(q, jnp.float32))
    lookup = jnp.asarray(exact.vocab_size ** np.arange(MAX_TOKENS))
    order = np.full(exact.vocab_size**MAX_TOKENS, -1)
    order[np.asarray(exact.sequences.tokens) @ np.asarray(lookup)] = np.arange(len(log_gamma))
    index_of = jnp.asarray(order, jnp.int32)

    def init(x: Sequences) -> Chain:
        return Chain(x, index_of[x.tokens @ lookup])

    def step(key: Any, chain: Chain) -> tuple[Chain, jax.Array]:
        propose_key, accept_key = jax.random.split(key)
        x, y = (
            chain.index,
            jax.random.categorical(propose_key, log_q[chain.index]).astype(jnp.int32),
        )
        ratio = log_pi[y] - log_pi[x] + jnp.where(hastings, log_q[y, x] - log_q[x, y], 0.0)
        accept = jnp.log(jax.random.uniform(accept_key, x.shape)) < ratio
        new = jnp.where(accept, y, x)
        return Chain(take_rows(exact.sequences, new), new), accept

    return Kernel(init, step)


@pytest.fixture(scope="module")
def exact() -> Enumeration:
    return enumerate_strings(target())


def check(kernel: Kernel, **options: Any) -> np.ndarray:
    return check_kernel(kernel, target(), key=jax.random.key(3), **options)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_metropolis_hastings_passes(exact, num_steps):
    kernel = metropolis(exact.log_gamma, proposals(exact), exact)
    counts = check(kernel, num_steps=num_steps)
    assert counts.sum() == 20_000 and 0 < np.trace(counts) < counts.sum()


def test_the_counts_estimate_the_transition_matrix(exact):
    q = proposals(exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        accept = np.minimum(1.0, exact.probs[None] * q.T / (exact.probs[:, None] * q))
    matrix = np.where(np.eye(len(q)) > 0, 0.0, q * np.nan_to_num(accept))
    matrix += np.diag(1 - matrix.sum(1))
    counts = check(metropolis(exact.log_gamma, q, exact), num_chains=50_000)
    expected = 50_000 * exact.probs[:, None] * matrix
    large = expected > 25
    z = (counts - expected)[large] / np.sqrt(expected[large])
    assert large.sum() > 30 and np.abs(z).max() < 5


def test_an_exact_draw_passes(exact):
    log_probs = jnp.log(jnp.asarray(exact.probs, jnp.float32))

    def step(key, x):
        index = jax.random.categorical(key, log_probs, shape=x.length.shape)
        return take_rows(exact.sequences, index), None

    check(Kernel(lambda x: x, step))


@pytest.mark.slow
def test_false_alarms_are_rare(exact):
    """The kit's z-scores are standard normal under a right kernel, so |z| < 5 does not fail by
    chance.
    """
    kernel = metropolis(exact.log_gamma, proposals(exact), exact)
    failures = 0
    for seed in range(20):
        try:
            check_kernel(kernel, target(), key=jax.random.key(seed), num_chains=3000, bound=3.5)
        except AssertionError:
            failures += 1
    assert failures <= 1


def never_longer(exact: Enumeration) -> np.ndarray:
    """Proposals that keep the length or shorten: an accepted early EOS is never undone."""
    length = np.asarray(exact.sequences.length)
    q = proposals(exact) * (length[None] <= length[:, None])
    return q / q.sum(1, keepdims=True)


def faults(exact: Enumeration) -> dict[str, tuple[Kernel, str]]:
    q, right = proposals(exact, spread=0.3), metropolis(exact.log_gamma, proposals(exact), exact)

    def other_string(x: Sequences) -> Chain:
        return right.init(take_rows(x, jnp.roll(jnp.arange(x.length.shape[0]), 1)))

    def wrong_length(key: Any, chain: Chain) -> tuple[Chain, Any]:
        chain, info = right.step(key, chain)
        return dataclasses.replace(
            chain, sequences=Sequences(chain.sequences.tokens, chain.sequences.length * 0)
        ), info

    def other_type(key: Any, chain: Chain) -> tuple[Chain, Any]:
        chain, info = right.step(key, chain)
        return dataclasses.replace(chain, index=chain.index * 1.0), info

    invariant = "the target is not invariant"
    everywhere = np.where(np.isfinite(exact.log_gamma), exact.log_gamma, -3.0)
    return {
        "no Hastings factor": (metropolis(exact.log_gamma, q, exact, hastings=False), invariant),
        "wrong alpha": (metropolis(exact.log_gamma * 0.8, q, exact), invariant),
        "never longer": (
            metropolis(exact.log_gamma, never_longer(exact), exact, hastings=False),
            invariant,
        ),
        "leaves the support": (metropolis(everywhere, q, exact), "which has probability 0"),
        "identity": (
            Kernel(right.init, lambda key, chain: (chain, None)),
            "the kernel is the identity",
        ),
        "init moves": (Kernel(other_string, right.step), "init must keep the positions"),
        "wrong length": (
            Kernel(right.init, wrong_length),
            "length must count the tokens before EOS",
        ),
        "structure": (Kernel(right.init, other_type), "step must return a state of the structure"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "no Hastings factor",
        "wrong alpha",
        "never longer",
        "leaves the support",
        "identity",
        "init moves",
        "wrong length",
        "structure",
    ],
)
def test_a_planted_fault_is_named(exact, name):
    kernel, message = faults(exact)[name]
    with pytest.raises(AssertionError, match=message):
        check(kernel)


@pytest.mark.slow
def test_a_faint_fault_takes_more_chains(exact):
    """alpha 5 % too small."""
    kernel = metropolis(exact.log_gamma * 0.95, proposals(exact), exact)
    check(kernel, num_chains=1000)
    with pytest.raises(AssertionError, match="the mean log gamma changed by -"):
        check(kernel, num_chains=100_000, num_steps=3)
