"""Learned twists: a language model whose unnormalised logits are log psi_t, and what strings say
about it.

    twist = twists.of(lm, target)                          # psi_t(x_1:t-1, v) = exp of the logit of v after x_1:t-1
    smc.run(key, ppl.twists.twisted(target, twist))        # exact with every twist, better with a good one

The model is any LM over the target's vocabulary: a table, a decoder with a head that starts at
zero, an adapter. `amortized.twist_objectives` trains it.  Zhao, Brekelmans, Makhzani and Grosse
(arXiv 2404.17546).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppl.lm import LM, Prefix
from ppl.potential import Potential, Product, State
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.space import Space
from ppl.target import Target
from ppl.twists import Twisted
from samplers.strings.proposals import locally_optimal


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LMTwist(Potential):
    """The increments log psi_t - log psi_{t-1}, psi_0 = 1, of a model's logits; see `of`.

    State = (cache, log psi of every next token [N, V], log psi so far [N], tokens so far [N]).  The
    EOS logit guesses what the end of a string is worth, where the target does not know it.
    """

    lm: LM
    prefix: Prefix
    space: Space = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> LMTwist:
        space.check_same(self.space, "a twist", "make it with amortized.twists.of(lm, target)")
        return self

    def init(self, num: int) -> State:
        log_psi = jnp.broadcast_to(self.prefix.logits, (num, self.lm.vocab_size))
        cache = self.lm.init(self.prefix, num, self.space.max_tokens)
        return cache, log_psi, jnp.zeros(num, jnp.float32), jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        cache, log_psi, so_far, used = state
        reached = _at(log_psi, token)
        cache, log_psi = self.lm.step(self.prefix, cache, token)
        return (cache, log_psi, reached, used + 1), _ratio(reached, so_far)

    def final(self, state: State) -> Float[Array, " N"]:
        _, log_psi, so_far, used = state
        return jnp.where(used < self.space.max_tokens, _ratio(log_psi[:, self.lm.eos], so_far), 0.0)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        return _ratio(state[1], state[2][:, None])


def of(lm: LM, target: Target) -> LMTwist:
    """The twist of a model for a target: it reads the target's prompt, differentiably in its
    weights.

    Raises:
        ValueError: if the model has another vocabulary or EOS, or too short a context
            (`Target.under`).
    """
    mine = target.under(lm)
    return LMTwist(mine.lm, mine.prefix, mine.space)


def _at(values: Float[Array, "N V"], token: Int[Array, " N"]) -> Float[Array, " N"]:
    return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]


def _ratio(log_next: Array, log_now: Array) -> Array:
    """log_next - log_now; what is -inf, or comes after it, stays so."""
    living = (log_next > -jnp.inf) & (log_now > -jnp.inf)
    return jnp.where(living, log_next - jnp.where(living, log_now, 0.0), -jnp.inf)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What a twist says of N strings, as a differentiable function of its weights; t counts from 0.

    With q the locally optimal proposal of the twisted target and pi_t(x_1:t) its intermediate
    targets, for token t:

    Attributes:
        log_psi: [N, T] of the prefix that ends with token t.
        log_p: [N, T] log p, without the target's power.
        log_q: [N, T] of the proposal.
        log_pi: [N, T] log pi_t - log pi_{t-1}; once a string has ended it is the target's own
            density.
        log_norm: [N, T] log of what q was divided by: 0 everywhere but at t = 0 for the optimal
            twist.
        log_phi: [N] of the whole string.
        growing: [N, T] whether the string goes on after token t, so that psi stands for what is to
            come.
        ends: [N, T] whether it ends with token t, by EOS or by the horizon.
    """

    log_psi: Float[Array, "N T"]
    log_p: Float[Array, "N T"]
    log_q: Float[Array, "N T"]
    log_pi: Float[Array, "N T"]
    log_norm: Float[Array, "N T"]
    log_phi: Float[Array, " N"]
    growing: Bool[Array, "N T"]
    ends: Bool[Array, "N T"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Row(Potential):
    """A twist for one token, whose log psi [N, V] were computed before; state = log psi
    so far [N].
    """

    log_psi: Float[Array, "N V"]

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        reached = _at(self.log_psi, token)
        return reached, _ratio(reached, state)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        return _ratio(self.log_psi, state[:, None])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Paid(Potential):
    """A potential of which log Phi [N] of whole strings is known, and nothing before; state = log
    Phi.
    """

    log_phi_of: Float[Array, " N"]

    def init(self, num: int) -> State:
        return self.log_phi_of

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        return state, jnp.zeros(token.shape[0], jnp.float32)

    def final(self, state: State) -> Float[Array, " N"]:
        return state


def _quick(potential: Potential, x: Sequences) -> Potential:
    """The same on these strings; factors that take them whole, and look nowhere ahead, are asked at
    once.
    """

    def one(factor: Potential) -> Potential:
        log_phi = factor.log_phi(x)
        blind = factor.lookahead(factor.init(x.length.shape[0])) is None
        return _Paid(log_phi) if blind and log_phi is not None else factor

    return Product(tuple(one(part) for part in potential.parts))


def score(target: Target, twist: LMTwist, x: Sequences) -> Scores:
    """`Scores` of strings, by one parallel pass of each model and a scan of the target's
    potential.
    """
    num, horizon = x.tokens.shape
    target = dataclasses.replace(target, potential=_quick(target.potential, x))
    mine = dataclasses.replace(target, lm=twist.lm, prefix=twist.prefix)
    log_psi, log_p = _logits(mine, x), jax.lax.stop_gradient(jax.nn.log_softmax(_logits(target, x)))

    def body(state: State, at: tuple) -> tuple[State, tuple]:
        token, psi, p, t = at
        # The rules of a twisted potential, with the row of this token in place of the model.
        potential = Twisted(target.potential, _Row(psi), target.space, terminal=True)
        now, active = dataclasses.replace(target, potential=potential), t <= x.length
        law = locally_optimal(now, p, state)
        log_norm = _log_sum(law)
        log_q, log_p = _ratio(_at(law, token), log_norm), _at(p, token)
        state, log_factor, _ = now.factor(state, token, active, t == horizon - 1)
        log_pi = target.log_prob_factor(log_p) + log_factor
        parts = _at(psi, token), log_p, log_q, log_pi, log_norm
        return state, (*(jnp.where(active, part, 0.0) for part in parts), log_factor)

    start = target.potential.init(num), jnp.zeros(num, jnp.float32), jnp.zeros(num, jnp.float32)
    steps = (
        x.tokens.T,
        jnp.swapaxes(log_psi, 0, 1),
        jnp.swapaxes(log_p, 0, 1),
        jnp.arange(horizon),
    )
    _, parts = jax.lax.scan(body, start, steps)
    t = jnp.arange(horizon)
    growing = (t < x.length[:, None]) & (t < horizon - 1)
    ends = (t <= x.length[:, None]) & ~growing
    token_log_psi, token_log_p, log_q, log_pi, log_norm, log_factor = (part.T for part in parts)
    log_phi = jax.lax.stop_gradient(log_factor).sum(1)
    return Scores(token_log_psi, token_log_p, log_q, log_pi, log_norm, log_phi, growing, ends)


def _logits(target: Target, x: Sequences) -> Float[Array, "N T V"]:
    """Unnormalised logits of every token, given those before."""
    lm, num = target.lm, x.tokens.shape[0]
    first = jnp.broadcast_to(target.prefix.logits, (num, 1, lm.vocab_size))
    return jnp.concatenate([first, lm.extend(target.prefix, x.tokens[:, :-1])], axis=1)


def _log_sum(law: Float[Array, "N V"]) -> Float[Array, " N"]:
    """log-sum-exp over tokens, whose gradient is zero where nothing has mass."""
    living = (law > -jnp.inf).any(axis=1)
    return jnp.where(
        living, jax.nn.logsumexp(jnp.where(living[:, None], law, 0.0), axis=1), -jnp.inf
    )
