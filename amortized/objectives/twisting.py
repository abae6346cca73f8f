"""Objectives that train twists: how far psi is from what it should be, by what it says of strings.

    fit.run(key, twists.training(guide, target, CTL()), optimizer=..., num_steps=...)

sigma is the target's law, sigma_t that of its first t tokens, pi_t the intermediate target that the
twist makes, and q the locally optimal proposal under it.  A prefix that goes on counts with psi, a
string that has ended with its true Phi, as in SMC; for alpha = 1 the optimum is psi*_t(x_1:t) =
E_p[Phi | x_1:t].

    CTL     sum_t KL(sigma_t | pi_t) + KL(sigma | q)    psi* up to a factor per step, and not even
                                                        that where strings may end early, since what
                                                        has ended fixes the scale
    DPG     KL(sigma | q)                               psi* up to a factor per prefix: a good
                                                        proposal, but weights on the way that
                                                        mislead resampling
    SIXO    classify sigma_t against p                  psi*, as far as log Z is known
    FUDGE   regress Phi on prefixes drawn from p        psi*
    SoftQ   psi_{t-1} is the sum of p psi_t             psi*

arXiv 2404.17546 (CTL and the others for language models), 2206.05952 (SIXO), 2104.05218 (FUDGE).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppl.pytrees import register_dataclass
from samplers.diagnostics import normalise

from .regression import FORBIDDEN


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What a twist says of N strings; t counts from 0.

    With q the locally optimal proposal of the twisted target and pi_t(x_1:t) its intermediate
    targets, for token t:

    Attributes:
        log_psi: [N, T] of the prefix that ends with token t.
        log_p: [N, T] log p, without the target's power.
        log_power: [N, T] (alpha - 1) log p, what the target's power adds; 0 for tokens that cannot
            be drawn.
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
    log_power: Float[Array, "N T"]
    log_q: Float[Array, "N T"]
    log_pi: Float[Array, "N T"]
    log_norm: Float[Array, "N T"]
    log_phi: Float[Array, " N"]
    growing: Bool[Array, "N T"]
    ends: Bool[Array, "N T"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a twist says of strings of both kinds.

    Attributes:
        positive: of P draws from sigma.
        log_weights: [P] of those draws.
        negative: of N independent draws, from the twist's proposal or from the model.
        log_z: [] of the target, as far as it is known.
    """

    positive: Scores
    log_weights: Float[Array, " P"]
    negative: Scores
    log_z: Float[Array, ""]


@runtime_checkable
class Objective(Protocol):
    """A loss of `Evidence`, summed over tokens.

    from_model: whether negative strings are drawn from p, not from the twist's locally optimal
    proposal.
    """

    from_model: ClassVar[bool]

    def __call__(self, seen: Evidence) -> Float[Array, ""]: ...


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CTL:
    """Contrastive twist learning: sum_t KL(sigma_t | pi_t) + KL(sigma | q), its gradient

        -E_sigma[ sum_t grad log psi_t + grad log q ] + sum_t E_{pi_t}[ grad log psi_t ]

    with pi_t by weighted draws from q.  The second divergence teaches what the end of a string is
    worth, where the target does not know it beforehand.
    """

    from_model: ClassVar[bool] = False

    def __call__(self, seen: Evidence) -> Float[Array, ""]:
        above, below = seen.positive, seen.negative
        shares = jax.lax.stop_gradient(jax.vmap(normalise, 1, 1)(log_weights_so_far(below)))
        pushed_down = jnp.where(below.growing & (shares > 0), shares * below.log_psi, 0.0).sum()
        pulled_up = _expected(seen, jnp.where(above.growing, above.log_psi, 0.0) + above.log_q)
        return pushed_down - pulled_up


@register_dataclass
@dataclasses.dataclass(frozen=True)
class DPG:
    """Distributional policy gradient, one divergence for the whole string: KL(sigma | q) =
    -E_sigma[log q] + const.
    """

    from_model: ClassVar[bool] = False

    def __call__(self, seen: Evidence) -> Float[Array, ""]:
        return -_expected(seen, seen.positive.log_q)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SIXO:
    """Density ratios by classification: prefixes of sigma against those of p,

    log-odds of sigma  =  log psi_t + (alpha - 1) log p(x_1:t) - log Z
    """

    from_model: ClassVar[bool] = True

    def __call__(self, seen: Evidence) -> Float[Array, ""]:
        above, below = seen.positive, seen.negative

        def log_odds(s: Scores) -> Float[Array, "N T"]:
            return s.log_psi + jnp.cumsum(s.log_power, axis=1) - seen.log_z

        missed = jnp.where(above.growing | above.ends, jax.nn.softplus(-log_odds(above)), 0.0)
        mistaken = jnp.where(below.growing | below.ends, jax.nn.softplus(log_odds(below)), 0.0)
        return _expected(seen, missed) + mistaken.sum(1).mean()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FUDGE:
    """Regression of what is to come on prefixes drawn from p,

        E_p[ psi_t - y_t log psi_t ] / c,    y_t = Phi(x) p(x_t+1:)^(alpha - 1),

    the Poisson form of FUDGE's logistic regression: right for every Phi >= 0, and least at psi_t =
    E_p[y_t | x_1:t].

    Attributes:
        log_scale: log c, about log Z; only the size of the gradients depends on it.
    """

    from_model: ClassVar[bool] = True
    log_scale: Float[Array, ""] | float = 0.0

    def __call__(self, seen: Evidence) -> Float[Array, ""]:
        s = seen.negative
        to_come = jnp.cumsum(s.log_power[:, ::-1], axis=1)[:, ::-1] - s.log_power
        y = jnp.exp(s.log_phi[:, None] + to_come - self.log_scale)
        loss = jnp.exp(s.log_psi - self.log_scale) - y * s.log_psi
        return jnp.where(s.growing | s.ends, loss, 0.0).sum(1).mean()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftQ:
    """Soft Bellman consistency, by squares: with sg the stop-gradient, over all strings of the
    batch alike,

    ( log psi_{t-1}(x_1:t-1) - sg log sum_v p(v | x_1:t-1)^alpha psi_t(x_1:t-1, v) )^2,

    and at the end ( log psi_t(x) - log Phi(x) )^2.
    """

    from_model: ClassVar[bool] = False

    def __call__(self, seen: Evidence) -> Float[Array, ""]:
        s = jax.tree.map(lambda *both: jnp.concatenate(both), seen.positive, seen.negative)
        # Of the next token; the last prefix that grows has one.
        following = jnp.roll(s.log_norm, -1, axis=1) + s.log_psi
        towards = jax.lax.stop_gradient(jnp.where(s.growing, following, s.log_phi[:, None]))
        possible = towards > -jnp.inf
        error = s.log_psi - jnp.where(possible, towards, seen.log_z - FORBIDDEN)
        error = jnp.where(possible, error, jax.nn.relu(error))
        return jnp.where(s.growing | s.ends, error**2, 0.0).sum(1).mean()


def log_weights_so_far(s: Scores) -> Float[Array, "N T"]:
    """log pi_t - log q of every prefix of strings drawn from q: sequential importance sampling."""
    living = (s.log_pi > -jnp.inf) & (s.log_q > -jnp.inf)
    steps = jnp.where(living, s.log_pi - jnp.where(living, s.log_q, 0.0), -jnp.inf)
    return jnp.cumsum(steps, axis=1)


def _expected(seen: Evidence, values: Float[Array, "P T"]) -> Float[Array, ""]:
    """The sum over tokens, expected under sigma; NaN, so that the step is skipped, if no positive
    string lives.
    """
    shares = normalise(seen.log_weights)[:, None]
    total = jnp.where(shares > 0, shares * jnp.where(shares > 0, values, 0.0), 0.0).sum()
    return jnp.where(shares.sum() > 0, total, jnp.nan)
