"""An oracle: each of the 121 strings of at most 4 letters from 3 has its own reward; all is known
by enumeration.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LETTERS, HORIZON = 3, 4
LOG_Z = 5.819864

STRINGS = [s for n in range(HORIZON + 1) for s in itertools.product(range(LETTERS), repeat=n)]
INDEX = {s: i for i, s in enumerate(STRINGS)}
NUM = len(STRINGS)
LENGTH = np.array([len(s) for s in STRINGS])
LOG_REWARDS = 1.5 * np.random.default_rng(0).standard_normal(NUM)

# Where string s stands after i letters, and its letter there; what lies beyond its end repeats.
PREFIXES = np.array([[INDEX[s[: min(i, len(s))]] for i in range(HORIZON + 1)] for s in STRINGS])
TOKENS = np.array([[*s, *[0] * (HORIZON - len(s))] for s in STRINGS], np.int32).reshape(
    NUM, HORIZON
)
STOP = LETTERS


class Arrays(NamedTuple):
    """What `balance.strings` takes, for all 121 strings."""

    log_q: jax.Array
    log_q_stop: jax.Array
    log_reward: jax.Array
    length: jax.Array


def arrays(logits: jax.Array) -> Arrays:
    """All strings under the policy with these logits [121, 4], stop last."""
    law = jax.nn.log_softmax(logits)
    log_q = jnp.take_along_axis(law[PREFIXES[:, :-1]], jnp.asarray(TOKENS)[..., None], axis=2)[
        ..., 0
    ]
    return Arrays(
        log_q,
        law[PREFIXES, STOP],
        jnp.asarray(LOG_REWARDS)[PREFIXES],
        jnp.asarray(LENGTH, jnp.int32),
    )


def log_prob(logits: jax.Array) -> jax.Array:
    """log q of all strings [121]; a string of 4 letters is cut, its policy's stop plays no part."""
    x = arrays(logits)
    written = jnp.arange(HORIZON) < x.length[:, None]
    stop = jnp.take_along_axis(x.log_q_stop, x.length[:, None], axis=1)[:, 0]
    return (jnp.where(written, x.log_q, 0.0)).sum(1) + jnp.where(x.length < HORIZON, stop, 0.0)


def exact_policy() -> tuple[np.ndarray, np.ndarray]:
    """Logits [121, 4] of the policy that draws in proportion to R, and log F [121], by dynamic
    programming.
    """
    flow, logits = np.zeros(NUM), np.zeros((NUM, LETTERS + 1))
    for s in reversed(STRINGS):
        stops = np.exp(LOG_REWARDS[INDEX[s]])
        on = [flow[INDEX[(*s, v)]] for v in range(LETTERS)] if len(s) < HORIZON else []
        flow[INDEX[s]] = stops + sum(on)
        if on:
            logits[INDEX[s]] = np.log([*on, stops])
    return logits, np.log(flow)


def law() -> np.ndarray:
    """The law in proportion to R [121]."""
    weights = np.exp(LOG_REWARDS)
    return weights / weights.sum()


def total_variation(logits: jax.Array, truth: np.ndarray | None = None) -> float:
    """Of the policy's strings from the target's, exactly."""
    return 0.5 * float(
        np.abs(
            np.exp(np.asarray(log_prob(logits), np.float64)) - (law() if truth is None else truth)
        ).sum()
    )
