"""More candidates for the steps of a text that are more uncertain than those before (MUR, momentum
uncertainty-guided reasoning, arXiv 2507.14958).

    u_t = - mean log p of the tokens of step t
    M_t = beta M_{t-1} + (1 - beta) u_t,    M_0 = 0,    m_t = M_t / (1 - beta^t)

A step is drawn once.  Where it is more uncertain than the momentum by a margin,

    u_t > m_{t-1} - log gamma,    t > 1

n other steps are drawn from the same prefix, and of all n + 1 the one with the highest process
reward goes on.  As published M is in the place of m: beginning at 0 it is too small for long, and
constant uncertainties u fire as long as u beta^(t-1) > -log gamma, at the first steps of every text
and for no reason.  Published is also to throw away the first draw and not to count it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, take_rows, where_rows
from ppl.steps import Steps
from ppl.target import Target

from ..base import Cost, Guarantee, spent
from ..registry import sampler
from ..results import Choice
from ..strings import costs, extending, growing
from ..strings.growing import Growing
from .step_search import PROPOSAL, check


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Momentum:
    """M, and how many uncertainties are in it.

    beta: how long it remembers.  log_gamma: the margin.
    """

    beta: Float[Array, ""]
    log_gamma: Float[Array, ""]
    sum: Float[Array, ""]
    count: Int[Array, ""]

    def fires(self, u: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether a step is much more uncertain than those before; the first one never is."""
        bias = 1 - self.beta ** jnp.maximum(self.count, 1)
        return (self.count > 0) & (u > self.sum / bias - self.log_gamma)

    def after(self, u: Float[Array, ""]) -> Momentum:
        """With another step's."""
        total = self.beta * self.sum + (1 - self.beta) * u
        return dataclasses.replace(self, sum=total, count=self.count + 1)


def momentum(beta: float, gamma: float) -> Momentum:
    """No steps yet.

    Raises:
        ValueError: unless 0 <= beta < 1 and 0 < gamma <= 1.
    """
    if not (0 <= beta < 1 and 0 < gamma <= 1):
        raise ValueError(
            f"expected beta in [0, 1) and gamma in (0, 1], got {beta} and {gamma}; pass beta=0.9"
            " and gamma=0.9"
        )
    numbers = (jnp.float32(beta), jnp.log(jnp.float32(gamma)), jnp.float32(0))
    return Momentum(*numbers, count=jnp.int32(0))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Text:
    """A string in n + 1 rows, all alike between rounds; its log-odds, and what happened [R]."""

    x: Growing
    score: Float[Array, ""]
    momentum: Momentum
    fired: Bool[Array, " R"]
    uncertainty: Float[Array, " R"]
    cost: Cost


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_mur.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    width: int = 4,
    gamma: float = 0.9,
    beta: float = 0.9,
) -> Choice:
    """One string, of whose uncertain steps the best of n + 1 is taken, in one jit.

    All that was drawn is paid, and the process reward is asked for every step.  There is no target.

    Args:
        key: typed key.
        p: a language model.
        reward: as in `particle_filtering.run`.
        steps: where steps of text end.
        width: n, further candidates for a step.
        gamma: the smaller, the more uncertain a step must be.
        beta: how long the momentum remembers.

    Returns:
        `Choice` of one string, whose score is the log-odds of its reward.  `details`: `fired` [R],
        whether further candidates were drawn for a step, `uncertainty` [R] of the step that was
        taken, `rounds` [].

    Raises:
        ValueError: if width < 1, beta is outside [0, 1) or gamma outside (0, 1], or p has a power
            or a potential.
    """
    check_counts(width=width)
    start = momentum(beta, gamma)
    target, within = check(p, reward, steps, 1, 1, 1)
    return _run(key, target, within, start, width, within.max_rounds(p.max_tokens))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(
    key: Any, target: Target, steps: Steps, start: Momentum, width: int, max_rounds: int
) -> Choice:
    keys = jax.random.split(key, max_rounds)
    # Later strings have no logits, and one pass more keeps one program.
    x = dataclasses.replace(growing.start(target, PROPOSAL, width + 1), logits=None)
    zeros = jnp.zeros(max_rounds, jnp.float32)
    text = _Text(x, jnp.float32(0), start, zeros > 0, zeros, cost=costs.prompt(target, PROPOSAL))
    text = jax.lax.while_loop(
        lambda s: anywhere(s.x.active),
        lambda s: _round(keys[s.momentum.count], target, steps, s),
        text,
    )
    one = take_rows((text.x.sequences, text.x.log_prob), jnp.zeros(1, jnp.int32))
    return Choice(
        samples=one[0],
        scores=text.score[None],
        best=jnp.int32(0),
        cost=text.cost,
        log_prob=one[1],
        details={
            "fired": text.fired,
            "uncertainty": text.uncertainty,
            "rounds": text.momentum.count,
        },
    )


def _round(key: PRNGKeyArray, target: Target, steps: Steps, s: _Text) -> _Text:
    """A step of the string, drawn once or n + 1 times."""
    first_key, more_key = jax.random.split(key)
    first = jnp.arange(s.x.active.shape[0]) == 0
    x, gain, cost = _drawn(first_key, target, steps, s.x, first)
    fires = s.momentum.fires(_uncertainty(s.x, x)[0])

    def more(carry: tuple) -> tuple:
        _, x, gain, cost = carry
        others, other_gain, other_cost = _drawn(more_key, target, steps, x, ~first)
        gains = jnp.where(first, gain, other_gain)
        return jnp.bool_(False), others, gains, spent(cost, other_cost)

    # A loop of at most one turn, for the same reason as in `base.resample`.
    carry = (fires, x, jnp.where(first, gain, -jnp.inf), spent(s.cost, cost))
    _, x, gain, cost = jax.lax.while_loop(lambda carry: anywhere(carry[0]), more, carry)
    best = jnp.argmax(gain).astype(jnp.int32)
    u, r = _uncertainty(s.x, x)[best], s.momentum.count
    return _Text(
        growing.reorder(target, PROPOSAL, x, jnp.full(first.shape, best)),
        score=s.score + gain[best],
        momentum=s.momentum.after(u),
        fired=s.fired.at[r].set(fires),
        uncertainty=s.uncertainty.at[r].set(u),
        cost=cost,
    )


def _drawn(
    key: PRNGKeyArray, target: Target, steps: Steps, before: Growing, rows: Bool[Array, " N"]
) -> tuple[Growing, Float[Array, " N"], Cost]:
    """A step more in some rows, of active ones; the others stay as they are."""
    moving = dataclasses.replace(before, active=before.active & rows)
    x, gain = extending.extend(target, PROPOSAL, steps).sample(key, moving)
    kept = where_rows(rows, (x.potential, x.active), (before.potential, before.active))
    x = dataclasses.replace(x, potential=kept[0], active=kept[1])
    return x, gain, costs.of_round(target, PROPOSAL, x)


def _uncertainty(before: Growing, x: Growing) -> Float[Array, " N"]:
    """u of what was drawn; EOS counts as a token."""
    written = x.sequences.length - before.sequences.length
    ended = ~x.active & (x.sequences.length < x.sequences.tokens.shape[1])
    return (before.log_prob - x.log_prob) / jnp.maximum(written + ended, 1)
