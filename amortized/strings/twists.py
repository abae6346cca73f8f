"""Learned twists: a language model whose unnormalised logits are log psi_t, what strings say about
it, and its training.

    g = guide.head(lm, heads.zeros(lm))                     # psi = 1 at the start
    out = fit.run(key, twists.training(g, target, CTL()), optimizer=..., num_steps=...)
    twist = twists.of(dataclasses.replace(g, params=out.params).lm, target)
    smc.run(key, ppl.twists.twisted(target, twist))         # exact with every twist

psi_t(x_1:t-1, v) is exp of the logit of v after x_1:t-1.  The model is any LM over the target's
vocabulary: a table, a decoder with a head that starts at zero, an adapter.  Zhao, Brekelmans,
Makhzani and Grosse (arXiv 2404.17546).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ppl.checks import check_count
from ppl.lm import LM, Prefix
from ppl.potential import Potential, Product, State, Trusted
from ppl.pytrees import register_dataclass
from ppl.rows import log_normalised, take_rows
from ppl.sequences import Sequences
from ppl.space import Space
from ppl.target import Target
from ppl.twists import Twisted, twisted
from samplers import smc
from samplers.diagnostics import ess
from samplers.smc import importance
from samplers.strings.proposals import bootstrap, locally_optimal

from ..objectives.twisting import Evidence, Objective, Scores
from ..training import Training
from .guide import Guide


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LMTwist(Trusted):
    """The increments log psi_t - log psi_{t-1}, psi_0 = 1, of a model's logits; see `of`.

    State = (cache, log psi of every next token [N, V], log psi so far [N], tokens so far [N]).  The
    EOS logit guesses what the end of a string is worth, where the target does not know it.
    """

    lm: LM
    prefix: Prefix
    space: Space = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> LMTwist:
        space.check_same(
            self.space, "a twist", "make it with amortized.strings.twists.of(lm, target)"
        )
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
class _Row(Trusted):
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
    """`Scores` of strings, differentiable in the twist's weights: by one parallel pass of each
    model and a scan of the target's potential.
    """
    num, horizon = x.tokens.shape
    target = dataclasses.replace(target, potential=_quick(target.potential, x))
    mine = dataclasses.replace(target, lm=twist.lm, prefix=twist.prefix)
    log_psi, log_p = _logits(mine, x), jax.lax.stop_gradient(log_normalised(_logits(target, x)))
    zeros = jnp.zeros(num, jnp.float32)
    carry = target.potential.init(num), zeros, zeros
    by_step = jnp.swapaxes(log_psi, 0, 1), jnp.swapaxes(log_p, 0, 1)
    t = jnp.arange(horizon, dtype=jnp.int32)
    body = functools.partial(_score_token, target, x.length)
    _, columns = jax.lax.scan(body, carry, (x.tokens.T, *by_step, t))
    found = {name: column.T for name, column in columns.items()}
    growing = (t < x.length[:, None]) & (t < horizon - 1)
    return Scores(
        log_power=_log_power(target, found["log_p"]),
        log_phi=jax.lax.stop_gradient(found.pop("log_factor")).sum(1),
        growing=growing,
        ends=(t <= x.length[:, None]) & ~growing,
        **found,
    )


def _score_token(
    target: Target, length: Int[Array, " N"], state: State, at: tuple[Array, Array, Array, Array]
) -> tuple[State, dict[str, Float[Array, " N"]]]:
    """What the twist says of token t; `at`: the token [N], log psi and log p [N, V] of it, t."""
    token, psi, p, t = at
    # The rules of a twisted potential, with the row of this token in place of the model.
    potential = Twisted(target.potential, _Row(psi), target.space, terminal=True)
    now, active = dataclasses.replace(target, potential=potential), t <= length
    law = locally_optimal(now, p, state)
    log_norm, log_p = _log_sum(law), _at(p, token)
    state, log_factor, _ = now.factor(state, token, active, t == target.max_tokens - 1)
    parts = {
        "log_psi": _at(psi, token),
        "log_p": log_p,
        "log_q": _ratio(_at(law, token), log_norm),
        "log_pi": target.log_prob_factor(log_p) + log_factor,
        "log_norm": log_norm,
    }
    parts = {name: jnp.where(active, part, 0.0) for name, part in parts.items()}
    return state, parts | {"log_factor": log_factor}


def _log_power(target: Target, log_p: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """(alpha - 1) log p; 0 for tokens that cannot be drawn."""
    log_p = jnp.where(log_p > -jnp.inf, log_p, 0.0)
    return target.log_prob_factor(log_p) - log_p


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


# Training.

Estimates = tuple[Float[Array, ""], Int[Array, ""]]
"""The data that `Draw` carries: log of the sum of all estimates of Z so far, and how many there
were.
"""


def training(
    guide: Guide,
    target: Target,
    objective: Objective,
    *,
    exact: Sequences | None = None,
    num_positive: int = 32,
    num_negative: int = 32,
) -> Training:
    """What `fit.run` takes to train a twist.

    Args:
        guide: the model whose logits are log psi, as it starts.
        target: gamma.
        objective: of `amortized.objectives.twisting`.
        exact: a pool of exact draws of gamma / Z, from which positive strings are taken; None: they
            come from SMC with the current twist, weighted.
        num_positive, num_negative: strings of both kinds in a step.

    Raises:
        ValueError: if a number is not positive.
    """
    check_count("num_positive", num_positive)
    check_count("num_negative", num_negative)
    return Training(
        params=guide.params,
        draw=Draw(target, guide, exact, num_positive, num_negative, objective.from_model),
        loss=Loss(target, guide, objective),
        data=(jnp.float32(-jnp.inf), jnp.int32(0)),
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Strings to learn from.

    positive: P draws from sigma with log_weights [P]; negative: N independent draws, from the
    twist's proposal or from the model.  log_z []: of the mean of all estimates of Z so far.  ess
    []: of the positive strings, over P.  tokens []: drawn.
    """

    positive: Sequences
    log_weights: Float[Array, " P"]
    negative: Sequences
    log_z: Float[Array, ""]
    ess: Float[Array, ""]
    tokens: Int[Array, ""]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws a `Batch` under the current twist (see `training`).

    from_model: negative strings come from p; else from the twist's locally optimal proposal, by
    sequential importance sampling without resampling.
    """

    target: Target
    guide: Guide
    exact: Sequences | None
    num_positive: int = dataclasses.field(metadata={"static": True})
    num_negative: int = dataclasses.field(metadata={"static": True})
    from_model: bool = dataclasses.field(metadata={"static": True})

    def __call__(
        self, key: PRNGKeyArray, params: PyTree, data: Estimates
    ) -> tuple[Batch, Estimates]:
        positive_key, negative_key = jax.random.split(key)
        learned = twisted(self.target, _twist(self.guide, params, self.target))
        if self.from_model:
            below = importance.run(
                negative_key, self.target, num_particles=self.num_negative, proposal=bootstrap
            )
        else:
            below = importance.run(negative_key, learned, num_particles=self.num_negative)
        if self.exact is None:
            above = smc.run(positive_key, learned, num_particles=self.num_positive)
            positive, log_weights, estimate = above.sequences, above.log_weights, above.log_z
            share = ess(log_weights) / self.num_positive
            tokens = below.cost.tokens + above.cost.tokens
        else:
            available = self.exact.length.shape[0]
            rows = jax.random.randint(positive_key, (self.num_positive,), 0, available, jnp.int32)
            positive = take_rows(self.exact, rows)
            log_weights, estimate = jnp.zeros(self.num_positive, jnp.float32), below.log_z
            share, tokens = ess(below.log_weights) / self.num_negative, below.cost.tokens
        log_sum, count = jnp.logaddexp(data[0], estimate), data[1] + 1
        log_z = log_sum - jnp.log(count.astype(jnp.float32))
        return Batch(positive, log_weights, below.sequences, log_z, share, tokens), (log_sum, count)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The objective of a batch under the current twist, per token of the horizon."""

    target: Target
    guide: Guide
    objective: Objective

    def __call__(
        self, params: PyTree, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        twist = _twist(self.guide, params, self.target)
        above = score(self.target, twist, batch.positive)
        below = score(self.target, twist, batch.negative)
        value = self.objective(Evidence(above, batch.log_weights, below, batch.log_z))
        metrics = {"log_z": batch.log_z, "ess": batch.ess, "tokens": batch.tokens}
        return value / self.target.max_tokens, metrics


def _twist(guide: Guide, params: PyTree, target: Target) -> LMTwist:
    return of(dataclasses.replace(guide, params=params).lm, target)
