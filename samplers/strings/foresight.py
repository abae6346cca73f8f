"""Foresight: how far a proposal follows what a potential knows of the next tokens.

A look-ahead gives the factors phi(v) of every next token v.  Where it weighs them against each
other, q proportional to p^alpha phi is the best that one step allows.  It is the worst where it
knows what the end pays and little else, as of a reward at the end: the factors of the other tokens
are 1 because they pay later.  A string that goes on where the end pays much, or ends where it pays
little, is then drawn far too seldom and weighs far too much.  So on such rows, unless the
look-ahead is `trusted`,

    q = (1 - s) b + s b phi / g        b proportional to p^alpha and to all that is certain

with g = sum_v b(v) phi(v), s = 1/2 where g <= 1 and s = min(1/2, 1 / (2 T (1 - 1/g))) elsewhere.
No q(v) is below b(v) / 2, and none of a token with phi = 1 below (1 - 1/2T) b(v); so a string on
which phi != 1 once, at its end, weighs at most 4 times what it weighs when drawn from b.  The parts
of a potential are taken one after another: b has those before.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppl.potential import State
from ppl.rows import log_normalised, valid
from ppl.target import Target


def followed(
    target: Target, log_base: Float[Array, "N V"], potential: State
) -> tuple[Float[Array, "N V"] | None, Bool[Array, " N"]]:
    """The log-factors by which a law that starts from `log_base`, p^alpha as a rule, is to be
    multiplied; None if the potential knows none.  Also which rows had NaN or +inf in them.
    """
    ahead = target.lookahead(potential)
    if ahead is None:
        return None, jnp.zeros(log_base.shape[0], bool)
    known = functools.reduce(jnp.subtract, ahead.doubtful, ahead.known)
    for phi in ahead.doubtful:
        known = known + _trusted(target, log_base + known, phi)
    return known, ahead.invalid


def _trusted(
    target: Target, log_base: Float[Array, "N V"], phi: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """A part's log-factors, as far as they are to be followed beside `log_base`."""
    living = (log_base > -jnp.inf).any(axis=1)
    b = log_normalised(log_base)
    log_g = jnp.where(living, jax.nn.logsumexp(b + phi, axis=1), 0.0)
    most = jnp.float32(0.5 / target.max_tokens) / -jnp.expm1(-jnp.maximum(log_g, 1e-6))
    share = jnp.minimum(0.5, most)[:, None]
    mixed = jnp.logaddexp(jnp.log1p(-share), jnp.log(share) + phi - log_g[:, None])
    return jnp.where(_knows_little(target, b, phi)[:, None], mixed, phi)


def _knows_little(
    target: Target, b: Float[Array, "N V"], phi: Float[Array, "N V"]
) -> Bool[Array, " N"]:
    """Whether the end pays, and at least half of b's mass on other tokens has factor 1."""
    eos = target.lm.eos
    others = jnp.where(jnp.arange(b.shape[1]) == eos, 0.0, jnp.exp(b))
    silent = jnp.where(phi == 0, others, 0.0).sum(1)
    return (phi[:, eos] != 0) & (2 * silent >= others.sum(1))


def locally_optimal(
    target: Target, logits: Float[Array, "N V"], potential: State
) -> Float[Array, "N V"]:
    """q proportional to p^alpha times the factors that the potential knows in advance (its
    `lookahead`); in part only where it knows the end's and little else (see the module).

    If all are known, the weight is the normaliser and does not depend on the token drawn: the least
    variance that one step allows.
    """
    log_q = target.log_prob_factor(valid(logits)[0])
    known, _ = followed(target, log_q, potential)
    return log_q if known is None else log_q + known
