"""Objectives that train twists, in the form of `amortized.fit`: each is a loss, and `Strings` draws
what they ask for.

    twist = guide.head(lm, heads.zeros(lm))                # psi = 1 at the start
    fit.run(key, twist.params, CTL(target, twist), Strings(target, twist), no_evidence(),
    optimizer=..., num_steps=...)

sigma is the target's law, sigma_t that of its first t tokens, pi_t the intermediate target that the
twist makes, and q the locally optimal proposal under it.  A prefix that goes on counts with psi, a
string that has ended with its true Phi, as in SMC; for alpha = 1 the optimum is psi*_t(x_1:t) =
E_p[Phi | x_1:t].

    CTL     sum_t KL(sigma_t | pi_t) + KL(sigma | q)    psi* up to a factor per step, and not even that where strings
                                                        may end early, since what has ended fixes
                                                        the scale
    DPG     KL(sigma | q)                               psi* up to a factor per prefix: a good proposal, but weights on
                                                        the way that mislead resampling
    SIXO    classify sigma_t against p                  psi*, as far as log Z is known
    FUDGE   regress Phi on prefixes drawn from p        psi*
    SoftQ   psi_{t-1} is the sum of p psi_t             psi*

arXiv 2404.17546 (CTL and the others for language models), 2206.05952 (SIXO), 2104.05218 (FUDGE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from ppl.twists import twisted
from samplers import smc
from samplers.diagnostics import ess, normalise
from samplers.smc import importance
from samplers.strings.proposals import bootstrap

from ..strings import twists
from ..strings.guide import Guide
from ..strings.twists import LMTwist, Scores

FORBIDDEN = 10.0
"""A regression asks psi of what the target forbids to be below Z e^-10; it cannot ask for zero."""

Evidence = tuple[Float[Array, ""], Int[Array, ""]]
"""The data that `Strings` carries: log of the sum of all estimates of Z so far, and how many there
were.
"""


def no_evidence() -> Evidence:
    """No estimate yet: (-inf [], 0 [])."""
    return jnp.float32(-jnp.inf), jnp.int32(0)


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
class Strings:
    """Draws a `Batch` under the current twist.

    Attributes:
        target: gamma.
        guide: the model whose logits are log psi; its own parameters are not looked at.
        exact: a pool of exact draws of gamma / Z, from which positive strings are taken; None: they
            come from SMC with the current twist, weighted.
        num_positive, num_negative: P and N.
        from_model: negative strings come from p (SIXO, FUDGE); else from the twist's locally
            optimal proposal, by sequential importance sampling without resampling.
    """

    target: Target
    guide: Guide
    exact: Sequences | None = None
    num_positive: int = dataclasses.field(default=32, metadata={"static": True})
    num_negative: int = dataclasses.field(default=32, metadata={"static": True})
    from_model: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, key: PRNGKeyArray, params: PyTree, data: Evidence) -> tuple[Batch, Evidence]:
        positive_key, negative_key = jax.random.split(key)
        learned = twisted(self.target, _twist(self, params))
        if self.from_model:
            below = importance.run(
                negative_key, self.target, num_particles=self.num_negative, proposal=bootstrap
            )
        else:
            below = importance.run(negative_key, learned, num_particles=self.num_negative)
        if self.exact is None:
            above = smc.run(positive_key, learned, num_particles=self.num_positive)
            positive, log_weights, estimate = above.sequences, above.log_weights, above.log_z
            size, tokens = (
                ess(log_weights) / self.num_positive,
                below.cost.tokens + above.cost.tokens,
            )
        else:
            rows = jax.random.randint(
                positive_key, (self.num_positive,), 0, self.exact.length.shape[0]
            )
            positive, log_weights = (
                take_rows(self.exact, rows),
                jnp.zeros(self.num_positive, jnp.float32),
            )
            estimate, size, tokens = (
                below.log_z,
                ess(below.log_weights) / self.num_negative,
                below.cost.tokens,
            )
        log_sum, count = jnp.logaddexp(data[0], estimate), data[1] + 1
        log_z = log_sum - jnp.log(count)
        return Batch(positive, log_weights, below.sequences, log_z, size, tokens), (log_sum, count)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Objective:
    """A loss of `fit` over the strings of a target; `guide` as in `Strings`."""

    target: Target
    guide: Guide

    def __call__(
        self, params: PyTree, key: PRNGKeyArray, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        twist = _twist(self, params)

        def scores(x: Sequences) -> Scores:
            return twists.score(self.target, twist, x)

        value = self.value(scores, batch) / self.target.max_tokens
        return value, {"log_z": batch.log_z, "ess": batch.ess, "tokens": batch.tokens}

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        """The sum over tokens."""
        raise NotImplementedError

    def sharpened(self, s: Scores) -> Float[Array, "N T"]:
        """(alpha - 1) log p; 0 for tokens that cannot be drawn."""
        possible = s.log_p > -jnp.inf
        log_p = jnp.where(possible, s.log_p, 0.0)
        return self.target.log_prob_factor(log_p) - log_p


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CTL(_Objective):
    """Contrastive twist learning: sum_t KL(sigma_t | pi_t) + KL(sigma | q), its gradient

        -E_sigma[ sum_t grad log psi_t + grad log q ] + sum_t E_{pi_t}[ grad log psi_t ]

    with pi_t by weighted draws from q (`Strings` with from_model=False).  The second divergence
    teaches what the end of a string is worth, where the target does not know it beforehand.
    """

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        above, below = scores(batch.positive), scores(batch.negative)
        shares = jax.lax.stop_gradient(jax.vmap(normalise, 1, 1)(log_weights_so_far(below)))
        pushed_down = jnp.where(below.growing & (shares > 0), shares * below.log_psi, 0.0).sum()
        pulled_up = _expected(batch, jnp.where(above.growing, above.log_psi, 0.0) + above.log_q)
        return pushed_down - pulled_up


@register_dataclass
@dataclasses.dataclass(frozen=True)
class DPG(_Objective):
    """Distributional policy gradient, one divergence for the whole string: KL(sigma | q) =
    -E_sigma[log q] + const.
    """

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        return -_expected(batch, scores(batch.positive).log_q)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SIXO(_Objective):
    """Density ratios by classification: prefixes of sigma against those of p (`Strings` with
    from_model=True),

    log-odds of sigma  =  log psi_t + (alpha - 1) log p(x_1:t) - log Z
    """

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        above, below = scores(batch.positive), scores(batch.negative)

        def log_odds(s: Scores) -> Float[Array, "N T"]:
            return s.log_psi + jnp.cumsum(self.sharpened(s), axis=1) - batch.log_z

        missed = jnp.where(above.growing | above.ends, jax.nn.softplus(-log_odds(above)), 0.0)
        mistaken = jnp.where(below.growing | below.ends, jax.nn.softplus(log_odds(below)), 0.0)
        return _expected(batch, missed) + mistaken.sum(1).mean()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FUDGE(_Objective):
    """Regression of what is to come on prefixes drawn from p (`Strings` with from_model=True),

        E_p[ psi_t - y_t log psi_t ] / c,    y_t = Phi(x) p(x_t+1:)^(alpha - 1),

    the Poisson form of FUDGE's logistic regression: right for every Phi >= 0, and least at psi_t =
    E_p[y_t | x_1:t].

    Attributes:
        log_scale: log c, about log Z; only the size of the gradients depends on it.
    """

    log_scale: Float[Array, ""] | float = 0.0

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        s = scores(batch.negative)
        sharpened = self.sharpened(s)
        to_come = jnp.cumsum(sharpened[:, ::-1], axis=1)[:, ::-1] - sharpened
        y = jnp.exp(s.log_phi[:, None] + to_come - self.log_scale)
        loss = jnp.exp(s.log_psi - self.log_scale) - y * s.log_psi
        return jnp.where(s.growing | s.ends, loss, 0.0).sum(1).mean()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftQ(_Objective):
    """Soft Bellman consistency, by squares: with sg the stop-gradient, over all strings of the
    batch alike,

    ( log psi_{t-1}(x_1:t-1) - sg log sum_v p(v | x_1:t-1)^alpha psi_t(x_1:t-1, v) )^2,    and at the end
    ( log psi_t(x) - log Phi(x) )^2
    """

    def value(self, scores: Callable[[Sequences], Scores], batch: Batch) -> Float[Array, ""]:
        x = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.positive, batch.negative)
        s = scores(x)
        # Of the next token; the last prefix that grows has one.
        following = jnp.roll(s.log_norm, -1, axis=1) + s.log_psi
        towards = jax.lax.stop_gradient(jnp.where(s.growing, following, s.log_phi[:, None]))
        possible = towards > -jnp.inf
        error = s.log_psi - jnp.where(possible, towards, batch.log_z - FORBIDDEN)
        error = jnp.where(possible, error, jax.nn.relu(error))
        return jnp.where(s.growing | s.ends, error**2, 0.0).sum(1).mean()


def _twist(of: Strings | _Objective, params: PyTree) -> LMTwist:
    return twists.of(dataclasses.replace(of.guide, params=params).lm, of.target)


def log_weights_so_far(s: Scores) -> Float[Array, "N T"]:
    """log pi_t - log q of every prefix of strings drawn from q: sequential importance sampling."""
    living = (s.log_pi > -jnp.inf) & (s.log_q > -jnp.inf)
    steps = jnp.where(living, s.log_pi - jnp.where(living, s.log_q, 0.0), -jnp.inf)
    return jnp.cumsum(steps, axis=1)


def _expected(batch: Batch, values: Float[Array, "P T"]) -> Float[Array, ""]:
    """The sum over tokens, expected under sigma; NaN, so that the step is skipped, if no positive
    string lives.
    """
    shares = normalise(batch.log_weights)[:, None]
    total = jnp.where(shares > 0, shares * jnp.where(shares > 0, values, 0.0), 0.0).sum()
    return jnp.where(shares.sum() > 0, total, jnp.nan)
