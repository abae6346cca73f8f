"""A replay buffer on the device: the best strings of every prompt, each once.

It keeps strings and their untempered log rewards, never log q, which goes stale with the next step
of the policy: losses score replayed strings under the current one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl import draw
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.showing import shown


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """K slots for each of P prompts.

    tokens [P, K, T]; length [P, K], -1 where a slot is empty; log_reward [P, K, T+1], untempered:
    log R of the string that stops after i tokens.
    """

    tokens: Int[Array, "P K T"]
    length: Int[Array, "P K"]
    log_reward: Float[Array, "P K M"]

    @property
    def filled(self) -> Bool[Array, "P K"]:
        return self.length >= 0

    @property
    def score(self) -> Float[Array, "P K"]:
        """log R of the strings themselves; -inf in empty slots."""
        return _own(self.log_reward, self.length)


@shown
class Drawn(NamedTuple):
    """Replayed strings, log_reward [N, T+1], and found [N]: whether the prompt had any string.

    Where it had none, the row is the empty string with log R = -inf everywhere, which every balance
    objective leaves out; `found` as weight leaves it out of the average too.
    """

    sequences: Sequences
    log_reward: Float[Array, "N M"]
    found: Bool[Array, " N"]


def empty(num_prompts: int, num_slots: int, max_tokens: int) -> Replay:
    """A buffer without strings.

    Raises:
        ValueError: if it could never hold one.
    """
    if min(num_prompts, num_slots, max_tokens) < 1:
        raise ValueError(
            "expected at least one prompt, slot and token, got"
            f" num_prompts={num_prompts}, num_slots={num_slots}, max_tokens={max_tokens}"
        )
    shape = (num_prompts, num_slots)
    return Replay(
        jnp.zeros((*shape, max_tokens), jnp.int32),
        jnp.full(shape, -1, jnp.int32),
        jnp.full((*shape, max_tokens + 1), -jnp.inf, jnp.float32),
    )


def add(
    replay: Replay,
    sequences: Sequences,
    log_reward: Float[Array, "N M"],
    prompts: Int[Array, " N"] | None = None,
) -> Replay:
    """The buffer with these strings, in their order.

    A string that is there already takes the new reward.  Another takes an empty slot of its prompt,
    or that of the worst string there, if it is better.  Strings with a reward of zero, infinity or
    NaN are not kept.

    Args:
        replay: the buffer.
        sequences: N strings of at most T tokens.
        log_reward: untempered log R after i tokens [N, T+1].
        prompts: [N], each string's prompt; 0 by default.
    """
    num, horizon = sequences.tokens.shape
    prompts = jnp.zeros(num, jnp.int32) if prompts is None else prompts
    written = jnp.arange(horizon) < sequences.length[:, None]
    tokens = jnp.where(written, sequences.tokens, 0)  # what follows a string is no part of it
    scores = _own(log_reward, sequences.length)

    def one(replay: Replay, row: tuple) -> tuple[Replay, None]:
        tokens, length, log_reward, score, prompt = row
        same = (replay.tokens[prompt] == tokens).all(-1) & (replay.length[prompt] == length)
        known = same.any()
        there = replay.score[prompt]
        slot = jnp.where(known, same.argmax(), there.argmin())
        takes = jnp.isfinite(score) & (known | (score > there[slot]))
        # Out of range is dropped: nothing is read back where nothing is written.
        slot = jnp.where(takes, slot, there.shape[0])
        return Replay(
            replay.tokens.at[prompt, slot].set(tokens, mode="drop"),
            replay.length.at[prompt, slot].set(length, mode="drop"),
            replay.log_reward.at[prompt, slot].set(log_reward, mode="drop"),
        ), None

    rows = (tokens, sequences.length, log_reward.astype(jnp.float32), scores, prompts)
    return jax.lax.scan(one, replay, rows)[0]


Priority = Callable[[Float[Array, "N K"]], Float[Array, "N K"]]
"""Scores log R of the slots, -inf where empty, to log-weights of drawing them."""


def uniform(score: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """Every string is as likely as the others."""
    return jnp.where(jnp.isneginf(score), -jnp.inf, 0.0)


def ranked(k: float | int = 0.01) -> Priority:
    """Weights 1 / (k n + rank), n strings of which the best has rank 0 (arXiv 2402.05098)."""

    def log_weights(score: Float[Array, "N K"]) -> Float[Array, "N K"]:
        rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
        num = jnp.isfinite(score).sum(-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(jnp.isneginf(score), -jnp.inf, -jnp.log(k * num + rank))

    return log_weights


def sample(
    key: PRNGKeyArray,
    replay: Replay,
    prompts: Int[Array, " N"],
    eos: int,
    priority: Priority = uniform,
) -> Drawn:
    """A string for each of N prompts, with replacement.

    Args:
        key: one key.
        replay: the buffer.
        prompts: [N], whose string each row is to be.
        eos: what fills the positions after a string.
        priority: log-weights of the slots; behaviour is free, since losses score the strings anew.

    Raises:
        ValueError: outside jit, if no prompt asked for has a string; inside, `found` says so.
    """
    if not isinstance(replay.length, Tracer) and not isinstance(prompts, Tracer):
        if not np.asarray(replay.filled)[np.asarray(prompts)].any():
            raise ValueError(
                "expected a replay buffer with strings of these prompts, got an empty one; add"
                " rollouts of positive"
                " reward first (strings of reward zero or NaN are not kept)"
            )
    score = replay.score[prompts]
    slot, log_prob = draw.categorical(jax.random.split(key, prompts.shape[0]), priority(score))
    found = jnp.isfinite(log_prob)
    length = jnp.where(found, replay.length[prompts, slot], 0)
    tokens = jnp.where(
        jnp.arange(replay.tokens.shape[2]) < length[:, None],
        replay.tokens[prompts, slot],
        eos,
    )
    log_reward = jnp.where(found[:, None], replay.log_reward[prompts, slot], -jnp.inf)
    return Drawn(Sequences(tokens, length), log_reward, found)


def _own(log_reward: Float[Array, "*N M"], length: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """log R at the string's own length; -inf for no string."""
    at = jnp.maximum(length, 0)[..., None]
    return jnp.where(length >= 0, jnp.take_along_axis(log_reward, at, axis=-1)[..., 0], -jnp.inf)
