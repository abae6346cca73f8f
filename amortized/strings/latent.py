"""Latent chains of thought: a rationale z between a question x and an answer y (arXiv 2310.04363,
2510.23925).

    p = lm.given(question, max_tokens=T)                # its eos ends a rationale: a line break
    posterior = p * ppl.continuation(p, answer)         # gamma(z) = p(z, EOS, y | x), to train on
    scored = latent.score(p, q, z, answers, length)     # every answer under every rationale
    best = scored.importance.argmax()

Answers are ranked by log p(y | x) = log sum_z p(z, y | x), estimated from rationales z_1, ..., z_N:

    logmeanexp       log mean_i p(y | x, z_i)                   for z_i from the prior p(z | x) only
    importance       log mean_i p(z_i, y | x) / q(z_i | x)      for z_i from q
    geomean_norm     mean_i log p(z_i, y | x) / |z_i y|         the published score of 2510.23925:
                                                                a geometric mean of joint densities
                                                                per token, no estimate of p(y | x)

Training may leave out strings that are worse than the example's reference rationale (`Filtered`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.continuation import continuation
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..training import Draw
from . import gflownet, rollouts
from .prefix_rewards import Rewards

TIES = 1e-5
"""Relative difference of log rewards that is rounding: the reference, scored again, is as good as
itself.
"""


# Answers.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """J answers under N rationales; every array has the rationales first.

    log_prior, log_q [N]: of the rationales, their ends included, under the model and under what
    drew them. log_answer [N, J]: log p(y_j | x, z_i).  num_tokens [N, J]: of rationale, its EOS if
    it ended, and answer.
    """

    log_prior: Float[Array, " N"]
    log_q: Float[Array, " N"]
    log_answer: Float[Array, "N J"]
    num_tokens: Int[Array, "N J"]

    @property
    def log_joint(self) -> Float[Array, "N J"]:
        """log p(z_i, y_j | x)."""
        return self.log_prior[:, None] + self.log_answer

    @property
    def log_weights(self) -> Float[Array, "N J"]:
        """log p(z_i, y_j | x) / q(z_i | x): of answer j's posterior, for the effective
        sample size.
        """
        return self.log_joint - self.log_q[:, None]

    @property
    def logmeanexp(self) -> Float[Array, " J"]:
        """log mean_i p(y_j | x, z_i): consistent for log p(y_j | x) if the rationales are from the
        prior.
        """
        return _log_mean(self.log_answer)

    @property
    def importance(self) -> Float[Array, " J"]:
        """log mean_i p(z_i, y_j | x) / q(z_i | x): consistent for log p(y_j | x) if the rationales
        are from q.
        """
        return _log_mean(self.log_weights)

    @property
    def geomean_norm(self) -> Float[Array, " J"]:
        """mean_i log p(z_i, y_j | x) / |z_i y_j|, whatever drew the rationales (arXiv
        2510.23925).
        """
        return (self.log_joint / self.num_tokens).mean(0)


def score(
    p: Target, q: Target, z: Sequences, answers: Int[Array, "J L"], length: Int[Array, " J"]
) -> Scored:
    """Every answer under every rationale: one parallel pass over all rationales for each answer.

    Args:
        p: the law of the rationales, `lm.given(question, max_tokens=T)`.
        q: what drew them, over the same strings: p itself, or a guide's law.
        z: N rationales.
        answers: J answers [J, L], padded.  Without an end of their own "1" is never less likely
            than "12": an answer that is whole ends with a line break or an end of turn.
        length: tokens of each.

    Raises:
        ValueError: if p has a power or a potential, an answer has ids outside the vocabulary or a
            length outside of 1..L, or question, rationale and answer exceed the model's context.
    """
    if not p.is_language_model:
        raise ValueError(
            "expected the plain law of the rationales, got one with a power or a potential, whose"
            " answers have no"
            " normalised probability; pass lm.given(question, max_tokens=T)"
        )
    for answer in zip(answers, length, strict=True) if not isinstance(answers, Tracer) else ():
        continuation(p, *answer)  # for its errors
    return _score(p, q, z, answers, length)


@jax.jit
def _score(
    p: Target, q: Target, z: Sequences, answers: Int[Array, "J L"], length: Int[Array, " J"]
) -> Scored:
    def one(answer: tuple[Array, Array]) -> Array:
        return (p * continuation(p, *answer)).log_potential(z.tokens, z.length)

    log_answer = jax.lax.map(one, (answers.astype(jnp.int32), length.astype(jnp.int32))).T
    log_prior, log_q = (rollouts.scores(law, z).log_prob(z.length) for law in (p, q))
    return Scored(log_prior, log_q, log_answer, (z.length + z.ended)[:, None] + length)


def _log_mean(values: Float[Array, "N J"]) -> Float[Array, " J"]:
    return jax.nn.logsumexp(values, axis=0) - jnp.log(values.shape[0])


# References.


def as_good_as(
    log_reward: Float[Array, " N"],
    length: Int[Array, " N"],
    reference: Float[Array, ""] | float,
    reference_length: Int[Array, ""] | int,
    delta: Float[Array, ""] | float | int = 1.0,
) -> Float[Array, " N"]:
    """Reference-guided filtering: 1 where log R / len >= delta log R_ref / len_ref, 0 elsewhere.

    A weight for `balance.Trajectories`.  Log rewards are negative, so delta > 1 tolerates worse
    strings.  The empty string is never kept, one with R = 0 or NaN neither; the reference itself
    is, at delta >= 1.

    Args:
        log_reward: log R of N strings.
        length: their tokens.
        reference, reference_length: of the reference.
        delta: 1 keeps those that are at least as good.
    """
    # Multiplied out: no division by the length of the empty string.
    ours, theirs = log_reward * reference_length, delta * reference * length
    kept = (ours >= theirs - TIES * jnp.abs(theirs)) & (length > 0) & jnp.isfinite(log_reward)
    return kept.astype(jnp.float32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class References:
    """One rationale for each of P examples: tokens [P, T] and length [P], and log R [P, T + 1]
    after i tokens.
    """

    sequences: Sequences
    log_reward: Float[Array, "P L"]

    @property
    def own(self) -> Float[Array, " P"]:
        """log R of the rationales themselves."""
        return jnp.take_along_axis(self.log_reward, self.sequences.length[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="rewards")
def references(task: gflownet.Task, z: Sequences, rewards: Rewards) -> References:
    """The rewards of reference rationales, one for each example in order; `rewards` as in
    `gflownet.training`.
    """

    def one(row: tuple[Array, Array, Array]) -> Array:
        index, tokens, length = row
        return rewards(task.target(index), Sequences(tokens[None], length[None]))[0]

    return References(
        z, jax.lax.map(one, (jnp.arange(task.num, dtype=jnp.int32), z.tokens, z.length))
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Filtered:
    """A draw of which only strings that are as good as the example's reference count
    (`as_good_as`).

        training = gflownet.training(guide, task, ...)
        filtered = latent.Filtered(training.draw, references, delta)
        fit.run(key, dataclasses.replace(training, draw=filtered), ...)

    delta: step -> delta, an optax schedule; arXiv 2510.23925 takes `linear_schedule(1.5, 1.0, 50)`.
    """

    draw: Draw
    references: References
    delta: Callable[[Int[Array, ""]], Any] = dataclasses.field(metadata={"static": True})

    def __call__(
        self, key: PRNGKeyArray, params: gflownet.Params, data: gflownet.Data
    ) -> tuple[gflownet.Batch, gflownet.Data]:
        batch, after = self.draw(key, params, data)
        log_reward = jnp.take_along_axis(batch.log_reward, batch.sequences.length[:, None], axis=1)[
            :, 0
        ]
        index, delta = batch.example, self.delta(data.step)
        reference = self.references.own[index], self.references.sequences.length[index]
        weight = as_good_as(log_reward, batch.sequences.length, *reference, delta)
        return dataclasses.replace(batch, weight=weight), after
