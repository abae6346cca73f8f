"""Rollouts: strings for training, with log q and log q(EOS) at every prefix and the log reward of stopping there.

    q = target.under(g.lm)                                 # times the constraints that the guide is to keep
    out = rollouts.roll(key, q, target, behaviours.drawn(8))
    out.scores.log_q, out.scores.log_q_stop, out.log_reward

The guide q stands for the law that draws tokens from softmax(logits + look-ahead of q's potential): a constraint (a
minimum length, banned tokens) renormalises every probability of q, that of stopping included.  A string of T tokens is
cut by the horizon: nothing is drawn there, and log q(stop) is 0.  Scores are always those of the guide itself, not of
the behaviour that drew; a loss takes `scores` under its own parameters, and the scores of `roll` are then not computed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.ancestral import append
from ppl.draw import categorical
from ppl.potential import Product, State
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences, empty
from ppl.target import Target
from samplers.base import Cost, no_cost
from samplers.proposals import locally_optimal
from samplers.regeneration import where_rows

from . import behaviours
from .behaviours import Behaviour


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """N strings under a guide; differentiable in it.

    log_q [N, T]: of the string's tokens, EOS not included; 0 from `length` on.
    log_q_stop [N, T + 1]: of EOS after i tokens; 0 after T tokens, where the horizon stops, and beyond `length`.
    """

    log_q: Float[Array, "N T"]
    log_q_stop: Float[Array, "N L"]

    def log_prob(self, length: Int[Array, " N"]) -> Float[Array, " N"]:
        """log q(x) of the whole strings, of these lengths."""
        return self.log_q.sum(1) + jnp.take_along_axis(self.log_q_stop, length[:, None], axis=1)[:, 0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a loss needs besides its own scores: the strings, and log gamma [N, T + 1] of stopping after i tokens."""

    sequences: Sequences
    log_reward: Float[Array, "N L"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """N strings, scored.

    sequences, log_reward: see `Batch`.  scores: under the guide, untempered.  log_behaviour [N]: the log-probability of
    the law that the string was drawn from; +inf where it was not drawn but given or searched, so that importance
    weights are 0 there.  cost: of all of it.
    """

    sequences: Sequences
    scores: Scores
    log_reward: Float[Array, "N L"]
    log_behaviour: Float[Array, " N"]
    cost: Cost

    @property
    def batch(self) -> Batch:
        return Batch(self.sequences, self.log_reward)


@jax.jit
def roll(key: PRNGKeyArray, q: Target, target: Target, behaviour: Behaviour) -> Rollout:
    """Strings as the behaviour says, scored under the guide `q` and rewarded by the target.

    Args:
        key: the key of token t in row i depends on t and i alone.
        q: the guide over the target's strings, `target.under(lm)`, times its constraints.
        target: gamma; log_reward is log gamma of every prefix as a whole string.
        behaviour: N rows.

    Raises:
        ValueError: if q has a power, or a potential without look-ahead, or is not over the target's strings.
    """
    _check(q, target)
    draw_key, search_key = jax.random.split(key)
    x, log_behaviour, cost = _draw(draw_key, q, behaviour)
    if behaviour.num_moves and behaviour.searched is not None:
        moved, spent = behaviours.search(search_key, q, target, x, behaviour.num_moves)
        x = where_rows(behaviour.searched, moved, x)
        log_behaviour = jnp.where(behaviour.searched, jnp.inf, log_behaviour)
        cost = cost + spent
    asked = (x.length + 1).sum() if target.potential != Product() else 0
    cost = cost + Cost(jnp.int32(0), jnp.int32(2), jnp.int32(asked))
    return Rollout(x, scores(q, x), prefix_log_rewards(target, x), log_behaviour, cost)


@jax.jit
def scores(q: Target, x: Sequences) -> Scores:
    """log q of every token and of stopping at every prefix: one parallel pass of the model, differentiable.

    Raises:
        ValueError: if q has a power, or a potential without look-ahead.
    """
    _check(q, q)
    token, stop = _log_probs(q, x.tokens)
    within = jnp.arange(q.max_tokens) < x.length[:, None]
    here = jnp.arange(q.max_tokens) <= x.length[:, None]
    stop = jnp.where(here, stop, 0.0)
    return Scores(jnp.where(within, token, 0.0), jnp.pad(stop, ((0, 0), (0, 1))))


@jax.jit
def prefix_log_rewards(target: Target, x: Sequences) -> Float[Array, "N L"]:
    """log gamma of the string that stops after i tokens, for every i up to `length`; -inf beyond.

        alpha (sum_{t<i} log p(x_t) + log p(EOS)) + log Phi(x_<i),    without EOS at i = T

    One parallel pass of the model, one step of the potential per token and its `final` at every prefix.
    """
    num, horizon = x.tokens.shape
    plain = Target(target.lm, target.prefix, target.max_tokens)
    token, stop = (target.log_prob_factor(part) for part in _log_probs(plain, x.tokens))
    token = jnp.where(jnp.arange(horizon) < x.length[:, None], token, 0.0)
    so_far = jnp.pad(jnp.cumsum(token, axis=1), ((0, 0), (1, 0)))
    stops = jnp.arange(horizon + 1) <= x.length[:, None]

    def body(carry: tuple[State, Array], t: Array) -> tuple[tuple[State, Array], Array]:
        state, log_phi = carry
        whole = log_phi + _valid(target.potential.final_where(state, t <= x.length))
        state, log_factor = target.potential.step(state, x.tokens[:, jnp.minimum(t, horizon - 1)])
        return (state, log_phi + _valid(log_factor)), whole

    start = target.potential.init(num), jnp.zeros(num, jnp.float32)
    if target.potential == Product():
        log_phi = jnp.zeros((num, horizon + 1), jnp.float32)
    else:
        log_phi = jax.lax.scan(body, start, jnp.arange(horizon + 1))[1].T
    return jnp.where(stops, so_far + jnp.pad(stop, ((0, 0), (0, 1))) + log_phi, -jnp.inf)


def _valid(log_factor: Float[Array, " N"]) -> Float[Array, " N"]:
    """NaN and +inf count as -inf, as in `Target.factor`."""
    return jnp.where(jnp.isnan(log_factor) | jnp.isposinf(log_factor), -jnp.inf, log_factor)


def _log_probs(q: Target, tokens: Int[Array, "N T"]) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """log q of the tokens and of EOS, after 0..T-1 tokens."""
    num, horizon = tokens.shape
    logits = jnp.broadcast_to(q.prefix.logits, (num, 1, q.lm.vocab_size))
    if horizon > 1:
        logits = jnp.concatenate([logits, q.lm.extend(q.prefix, tokens[:, :-1])], axis=1)

    def at(law: Array, token: Array) -> tuple[Array, Array]:
        norm = jax.nn.logsumexp(law, axis=-1)
        return jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0] - norm, law[..., q.lm.eos] - norm

    if q.potential == Product():
        return at(logits, tokens)

    def body(state: State, now: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        logits, token = now
        return q.potential.step(state, token)[0], at(locally_optimal(q, logits, state), token)

    found = jax.lax.scan(body, q.potential.init(num), (jnp.swapaxes(logits, 0, 1), tokens.T))[1]
    return found[0].T, found[1].T


def _draw(key: PRNGKeyArray, q: Target, behaviour: Behaviour) -> tuple[Sequences, Float[Array, " N"], Cost]:
    """Strings token by token until all have ended; rows that are given are not drawn."""
    lm, horizon, num = q.lm, q.max_tokens, behaviour.num
    keys = jax.random.split(key, horizon)

    def draw(
        x: Sequences, potential: State, log_prob: Array, active: Bool[Array, " N"], t: Array, logits: Array
    ) -> tuple[Sequences, State, Array, Bool[Array, " N"]]:
        law = behaviours.law(behaviour, locally_optimal(q, logits, potential))
        token, log_token = categorical(jax.random.split(keys[t], num), law)
        log_prob = log_prob + jnp.where(active, log_token, 0.0)
        potential, _ = q.potential.step(potential, token)
        x, active = append(x, token, active, lm.eos)
        return x, potential, log_prob, active

    def body(carry: tuple) -> tuple:
        t, tokens, cache, x, potential, log_prob, active = carry
        cache, logits = lm.step(q.prefix, cache, x.tokens[:, t - 1])
        return t + 1, tokens + active.sum(), cache, *draw(x, potential, log_prob, active, t, logits)

    everyone = jnp.ones(num, bool) if behaviour.replaced is None else ~behaviour.replaced
    nothing = empty(num, horizon, lm.eos), q.potential.init(num), jnp.zeros(num, jnp.float32), everyone
    first = draw(*nothing, jnp.int32(0), jnp.broadcast_to(q.prefix.logits, (num, lm.vocab_size)))
    start = (jnp.int32(1), everyone.sum(dtype=jnp.int32), lm.init(q.prefix, num, horizon), *first)
    going = jax.lax.while_loop(lambda c: (c[0] < horizon) & c[-1].any(), body, start)
    passes, tokens, _, x, _, log_prob, _ = going
    if behaviour.strings is not None and behaviour.replaced is not None:
        strings = behaviour.strings
        clean = jnp.where(jnp.arange(horizon) < strings.length[:, None], strings.tokens, lm.eos)
        x = where_rows(behaviour.replaced, Sequences(clean, strings.length), x)
        log_prob = jnp.where(behaviour.replaced, jnp.inf, log_prob)
    # The first token comes from the prompt's own pass.
    return x, log_prob, no_cost() + Cost(tokens, passes, jnp.int32(0))


def _check(q: Target, target: Target) -> None:
    mine, theirs = ((t.lm.vocab_size, t.lm.eos, t.max_tokens) for t in (q, target))
    if mine != theirs:
        raise ValueError(
            f"expected a guide over the target's strings, (vocab_size, eos, max_tokens) = {theirs}, got {mine}; make it"
            " by target.under(lm)"
        )
    if q.alpha is not None:
        raise ValueError(
            "expected a guide without a power, for its scores are to be its own; explore by the behaviour's temperature"
        )
    if q.potential != Product() and jax.eval_shape(lambda: q.potential.lookahead(q.potential.init(1))) is None:
        raise ValueError(
            "expected a guide whose potential is a constraint with a look-ahead, got one without; put rewards on the"
            " target"
        )
