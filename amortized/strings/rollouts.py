"""Rollouts: strings for training, with log q and log q(EOS) at every prefix and the log reward of
stopping there.

    q = target.under(g.lm) * ppl.support(target)    # the guide keeps what the target forbids
    out = rollouts.roll(key, q, target, behaviours.drawn(8))
    out.scores.log_q, out.scores.log_q_stop, out.log_reward

The guide q stands for the law that draws tokens from softmax(logits + look-ahead of q's potential):
a constraint (a minimum length, banned tokens) renormalises every probability of q, that of stopping
included.  A string of T tokens is cut by the horizon: nothing is drawn there, and log q(stop) is 0.
Scores are always those of the guide itself, not of the behaviour that drew; a loss takes `scores`
under its own parameters, and the scores of `roll` are then not computed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from ppl.pytrees import register_dataclass
from ppl.rows import where_rows
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Cost
from samplers.strings import costs, growing
from samplers.strings.growing import Growing

from . import behaviours
from .behaviours import Behaviour, Exploring
from .prefix_rewards import Rewards, at_every_prefix, log_probs


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """N strings under a guide; differentiable in it.

    log_q [N, T]: of the string's tokens, EOS not included; 0 from `length` on.
    log_q_stop [N, T + 1]: of EOS after i tokens; 0 after T tokens, where the horizon stops, and
    beyond `length`.
    """

    log_q: Float[Array, "N T"]
    log_q_stop: Float[Array, "N L"]

    def log_prob(self, length: Int[Array, " N"]) -> Float[Array, " N"]:
        """log q(x) of the whole strings, of these lengths."""
        return (
            self.log_q.sum(1) + jnp.take_along_axis(self.log_q_stop, length[:, None], axis=1)[:, 0]
        )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a loss needs besides its own scores: the strings, and log gamma [N, T + 1] of stopping
    after i tokens.
    """

    sequences: Sequences
    log_reward: Float[Array, "N L"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """N strings, scored.

    sequences, log_reward: see `Batch`.  scores: under the guide, untempered.  log_behaviour [N]:
    the log-probability of the law that the string was drawn from; +inf where it was not drawn but
    given or searched, so that importance weights are 0 there.  cost: of all of it.
    """

    sequences: Sequences
    scores: Scores
    log_reward: Float[Array, "N L"]
    log_behaviour: Float[Array, " N"]
    cost: Cost

    @property
    def batch(self) -> Batch:
        return Batch(self.sequences, self.log_reward)


@functools.partial(jax.jit, static_argnames="rewards")
def roll(
    key: PRNGKeyArray,
    q: Target,
    target: Target,
    behaviour: Behaviour,
    *,
    rewards: Rewards = at_every_prefix,
) -> Rollout:
    """Strings as the behaviour says, scored under the guide `q` and rewarded by the target.

    Args:
        key: the key of token t in row i depends on t and i alone.
        q: the guide over the target's strings, `target.under(lm)`, times its constraints, as a rule
            `ppl.support(target)`.
        target: gamma.
        behaviour: N rows.
        rewards: log gamma of which prefixes, as whole strings: by default of every one.

    Raises:
        ValueError: if q has a power, or a potential without look-ahead, or is not over the target's
            strings.
    """
    _check(q, target)
    draw_key, search_key = jax.random.split(key)
    x, log_behaviour, cost = _draw(draw_key, q, behaviour)
    if behaviour.num_moves and behaviour.searched is not None:
        moved, spent = behaviours.search(search_key, q, target, x, behaviour.num_moves)
        x = where_rows(behaviour.searched, moved, x)
        log_behaviour = jnp.where(behaviour.searched, jnp.inf, log_behaviour)
        cost = cost + spent
    asked = (x.length + 1).sum(dtype=jnp.int32) if target.tilted else 0
    cost = cost + Cost(forwards=jnp.int32(2), potential_calls=jnp.int32(asked))
    return Rollout(x, scores(q, x), rewards(target, x), log_behaviour, cost)


@jax.jit
def scores(q: Target, x: Sequences) -> Scores:
    """log q of every token and of stopping at every prefix: one parallel pass of the model,
    differentiable.

    Raises:
        ValueError: if q has a power, or a potential without look-ahead.
    """
    _check(q, q)
    token, stop = log_probs(q, x.tokens)
    within = jnp.arange(q.max_tokens) < x.length[:, None]
    here = jnp.arange(q.max_tokens) <= x.length[:, None]
    stop = jnp.where(here, stop, 0.0)
    return Scores(jnp.where(within, token, 0.0), jnp.pad(stop, ((0, 0), (0, 1))))


def _draw(
    key: PRNGKeyArray, q: Target, behaviour: Behaviour
) -> tuple[Sequences, Float[Array, " N"], Cost]:
    """Strings token by token until all have ended; rows that are given are not drawn."""
    num, keys = behaviour.num, jax.random.split(key, q.max_tokens)
    proposal = Exploring(behaviour)

    def keys_of(x: Growing) -> Key[Array, " N"]:
        return jax.random.split(keys[x.drawn.max()], num)

    drawn = jnp.ones(num, bool) if behaviour.replaced is None else ~behaviour.replaced
    nothing = growing.start(q, proposal, num)
    nothing = dataclasses.replace(nothing, active=drawn)
    x = growing.complete(keys_of, q, proposal, nothing)
    spent = costs.prompt(q, proposal) + costs.of_round(q, proposal, x)
    return *_with_given(behaviour, x.sequences, x.log_q, q.lm.eos), spent


def _with_given(
    behaviour: Behaviour, x: Sequences, log_prob: Float[Array, " N"], eos: int
) -> tuple[Sequences, Float[Array, " N"]]:
    """The given strings in their rows, EOS after their ends; nothing drew them."""
    given, rows = behaviour.strings, behaviour.replaced
    if given is None or rows is None:
        return x, log_prob
    written = jnp.arange(x.tokens.shape[1]) < given.length[:, None]
    clean = Sequences(jnp.where(written, given.tokens, eos), given.length)
    return where_rows(rows, clean, x), jnp.where(rows, jnp.inf, log_prob)


def _check(q: Target, target: Target) -> None:
    target.space.check_same(q.space, "a guide", "make it by target.under(lm)")
    if has_law(q):
        return
    if q.alpha is not None:
        raise ValueError(
            "expected a guide without a power, for its scores are to be its own; explore by the"
            " behaviour's temperature"
        )
    raise ValueError(
        "expected a guide whose potential is a constraint with a look-ahead, got one without; put"
        " rewards on the target"
    )


def has_law(q: Target) -> bool:
    """Whether the law that a guide draws from is known: it is a language model, or one times
    constraints with a look-ahead.
    """
    if q.is_language_model:
        return True
    known = jax.eval_shape(lambda: q.potential.lookahead(q.potential.init(1)))
    return q.alpha is None and known is not None
