"""The pieces that the density of a string is made of, one token's and all of them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppl.pytrees import register_dataclass
from ppl.target import Target


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Token:
    """One token of N rows: log p and log q of it, and the potential's log-factor.

    log_q is -inf for a token that was given and cannot be drawn.  Where nothing could be drawn,
    log_phi is -inf and log_q 0: the string is dead.
    """

    token: Int[Array, " N"]
    log_p: Float[Array, " N"]
    log_q: Float[Array, " N"]
    log_phi: Float[Array, " N"]

    def log_weight(self, target: Target) -> Float[Array, " N"]:
        """log w_t; -inf for a token that cannot be drawn."""
        dw = target.log_prob_factor(self.log_p) - self.log_q + self.log_phi
        return jnp.where(self.log_q > -jnp.inf, dw, -jnp.inf)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Pieces:
    """What strings are made of, token by token (EOS included, 0 after it).

    log_p, log_q, log_phi [N, T]: the log-probabilities under the model and under the proposal, and
    the potential's log-factor.  log_norms [N, T, K]: what the proposal notes (`Proposal.note`).
    """

    log_p: Float[Array, "N T"]
    log_q: Float[Array, "N T"]
    log_phi: Float[Array, "N T"]
    log_norms: Float[Array, "N T K"] | None = None

    def written(
        self, here: Bool[Array, "N T"], one: Token, note: Float[Array, "N K"] | None
    ) -> Pieces:
        """The pieces with those of a token at the places `here`, and its note."""
        return Pieces(
            log_p=jnp.where(here, one.log_p[:, None], self.log_p),
            log_q=jnp.where(here, one.log_q[:, None], self.log_q),
            log_phi=jnp.where(here, one.log_phi[:, None], self.log_phi),
            log_norms=self.log_norms
            if self.log_norms is None or note is None
            else jnp.where(here[..., None], note[:, None], self.log_norms),
        )
