"""REBASE (arXiv 2408.00724), reward-balanced search: rounds whose places go to prefixes in
proportion to exp(r / T), r the process reward.

`run` is the published form, a choice.  `exact` is its twin with a target: the same shares select
what goes on, drawn at random, and every copy carries what it was favoured by.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.steps import Steps
from ppl.target import Target

from ..base import Cost, Guarantee, Particles, dead
from ..diagnostics import normalise
from ..population import ALWAYS
from ..registry import sampler
from ..results import Choice, Weighted
from ..smc import particle_filtering
from ..smc import sequential as smc
from ..strings import growing
from ..strings.selection import Selection
from . import step_search

ROUNDING = 1e-5
"""What a share may be above a whole number by rounding."""


def allocate(log_probs: Float[Array, " N"], num: int | Int[Array, ""]) -> Int[Array, " N"]:
    """How many of `num` places each prefix gets: from the greatest share down, the ceiling of its
    share of what is left.

    With shares w in that order n_i = ceil((num - sum_{j<i} n_j) w_i / sum_{j>=i} w_j), and the n_i
    add up to num.  Small shares get nothing, for certain, which no weight can repair.
    """
    order = jnp.argsort(-log_probs)
    shares = normalise(log_probs)[order]
    rest = jnp.cumsum(shares[::-1])[::-1]
    part = jnp.where(shares > 0, shares / jnp.where(rest > 0, rest, 1.0), 0.0)

    def next_share(left: Array, part: Array) -> tuple[Array, Array]:
        places = jnp.clip(jnp.ceil(left * part - ROUNDING).astype(jnp.int32), 0, left)
        return left - places, places

    _, places = jax.lax.scan(next_share, jnp.int32(num), part)
    return jnp.zeros(log_probs.shape, jnp.int32).at[order].set(places)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_rebase.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    width: int = 16,
    temperature: float = 0.2,
    max_steps: int = 25,
) -> Choice:
    """REBASE as published: after every step the places of growing strings are allocated anew, by
    the ceilings of their shares of exp(r / temperature).

    Strings that have ended keep their places.  The last of `max_steps` rounds runs to the string's
    end.  There is no target; it favours what the process reward says, and `best` is the string of
    the highest reward.  Published is a vote that the rewards weigh, `jax.nn.sigmoid(out.scores)`.

    Args:
        key: typed key.
        p: a language model.
        reward: as in `particle_filtering.run`.
        steps: where steps of text end.
        width: N, strings in every round.
        temperature: T; small ones spend all places on the best prefix.
        max_steps: rounds.

    Returns:
        `Choice` of N strings, as of `step_search.beam`.

    Raises:
        ValueError: unless width and max_steps are at least 1 and temperature is above 0, or p has
            a power or a potential.
    """
    check_counts(width=width, max_steps=max_steps)
    check_temperature(temperature)
    target, bound = step_search.check(p, reward, steps, width, 1, max_steps)
    max_steps = min(max_steps, bound.max_rounds(p.max_tokens))
    return _run(key, target, bound, jnp.float32(temperature), width, max_steps)


@sampler(Guarantee.EXACT, proof="tests/samplers/search/test_rebase.py")
def exact(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_particles: int = 16,
    temperature: float = 0.2,
    **options: Unpack[smc.RoundOptions],
) -> Weighted:
    """The twin of `run` that has a target, p(x) odds(r(x)): SMC that resamples after every step
    from A proportional to exp(r / temperature).

    It is `particle_filtering.run` with `selection=by_reward(temperature)`.  A copy of particle a
    carries W_a / A_a, so E[exp(log_z)] = sum_x p(x) odds(r(x)) at any temperature, and votes with
    the weights estimate the target's answer.

    Args:
        options: as in `smc.run`; by default systematic resampling after every step.

    The others, and what it raises, as in `run` and `particle_filtering.run`.
    """
    check_temperature(temperature)
    options = smc.RoundOptions(threshold=ALWAYS, selection=by_reward(temperature)) | options
    return particle_filtering.run(key, p, reward, steps, num_particles=num_particles, **options)


def by_reward(temperature: float | Float[Array, ""]) -> Selection:
    """A proportional to exp(r / temperature), where log Phi so far is the log-odds of r."""
    return jax.tree_util.Partial(_by_reward, jnp.float32(temperature))


def _by_reward(
    temperature: Array, key: PRNGKeyArray, target: Target, p: Particles, round: Array
) -> tuple[Particles, Array, Cost]:
    x, gone = p.state, dead(p.log_weights)
    log_p = jnp.where(gone, 0.0, target.log_prob_factor(x.log_prob))
    r = jax.nn.sigmoid(jnp.where(gone, 0.0, x.log_density) - log_p)
    return p, jnp.where(gone, -jnp.inf, r / temperature), Cost()


def check_temperature(temperature: Any) -> None:
    """Raise ValueError unless it is above 0."""
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"expected a temperature above 0, got {temperature}; pass e.g. temperature=0.2, or a"
            " small one to go on with the best prefix only"
        )


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(
    key: Any, target: Target, steps: Steps, temperature: Array, num: int, max_steps: int
) -> Choice:
    slots = jnp.arange(num, dtype=jnp.int32)

    def choose(s: step_search.Search, scores: Array) -> tuple[step_search.Search, Array]:
        going = s.x.active
        # What died has lost its place to those that go on.
        free = going | (jnp.isneginf(scores) & going.any())
        shares = jnp.where(going, jax.nn.sigmoid(scores) / temperature, -jnp.inf)
        places = allocate(shares, free.sum(dtype=jnp.int32))
        listed = jnp.repeat(slots, places, total_repeat_length=num)
        number = jnp.cumsum(free, dtype=jnp.int32) - 1
        ancestors = jnp.where(free, listed[jnp.maximum(number, 0)], slots)
        x = growing.reorder(target, step_search.PROPOSAL, s.x, ancestors)
        return dataclasses.replace(s, x=x), scores[ancestors]

    run = step_search.loop(key, target, steps, (), (num, max_steps), choose)
    x, scores = run.particles.state.x, run.particles.log_weights
    return step_search.choice(run, x.sequences, scores, ~x.active & (scores > -jnp.inf))
