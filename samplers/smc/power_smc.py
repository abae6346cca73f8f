"""Power-SMC (arXiv 2602.10273): SMC for p^alpha Phi that raises the exponent as the strings grow.

Ancestors are drawn from the bridged targets

    gamma_t(x_1:t) = p(x_1:t)^alpha_t Phi_t(x_1:t)      alpha_t = 1 + (alpha - 1) min(1, t / ramp)

t the tokens so far, the same for ended strings.  Given a prefix, q proportional to p^alpha_t is the
one proposal whose weight in gamma_t does not depend on the token drawn.  The weights of a run are
for p^alpha Phi all along: a particle drawn from A carries W / A, so the schedule changes the
variance and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.potential import State, scale
from ppl.pytrees import register_dataclass
from ppl.target import Target

from ..base import Cost, Guarantee, Particles, dead
from ..registry import sampler
from ..results import Weighted
from ..strings.proposals import Proposal
from . import sequential as smc


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_power_smc.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    ramp: float | int | Float[Array, ""] = 32,
    num_particles: int = 32,
    history: bool = False,
    **others: Unpack[smc.Options],
) -> Weighted:
    """SMC for gamma(x) = p(x)^alpha Phi(x) by way of p^alpha_t Phi_t: LAW 1 for gamma at any
    `ramp`.

        power_smc.run(key, p**4, ramp=100)

    Args:
        key: typed key.
        target: p^alpha, tilted or not, or a list of targets as in `smc.run`.
        ramp: as in `options`.
        num_particles, history, others: as in `smc.run`; `proposal` and `selection` by default as
            the module says.

    Raises:
        ValueError: if `ramp` < 0, or as `smc.run` does.
    """
    how: smc.Options = {**options(ramp), **others}
    return smc.run(key, target, num_particles=num_particles, history=history, **how)


def options(ramp: float | int | Float[Array, ""] = 32) -> smc.Options:
    """The proposal and the selection of Power-SMC, for whatever takes the options of `smc.run`:

        pimh.kernel(p**4, num_particles=64, **power_smc.options(ramp=100))
        conditional.kernel(p**4, **power_smc.options(ramp=100))

    Args:
        ramp: tokens after which the exponent is alpha; 0 starts there, which is `smc.run`.

    Raises:
        ValueError: if `ramp` < 0.
    """
    if not isinstance(ramp, Tracer) and not ramp >= 0:
        raise ValueError(
            f"expected a ramp of at least 0 tokens, got {ramp}; 0 starts with the full exponent"
        )
    ramp = jnp.asarray(ramp, jnp.float32)
    return {"proposal": Bridged(ramp), "selection": jax.tree_util.Partial(_bridged, ramp)}


def exponent(target: Target, ramp: Float[Array, ""], t: Int[Array, " *N"]) -> Float[Array, " *N"]:
    """alpha_t after t tokens."""
    alpha = target.power
    return 1 + (alpha - 1) * jnp.minimum(1.0, t / jnp.maximum(ramp, 1e-6))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Bridged(Proposal):
    """q proportional to p^alpha_t times the factors that the potential knows in advance; state =
    tokens so far [N].
    """

    ramp: Float[Array, ""]

    def init(self, target: Target, num: int) -> State:
        return jnp.zeros(num, jnp.int32)

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> Float[Array, "N V"]:
        log_q = scale(exponent(target, self.ramp, state + 1)[:, None], logits)
        known = target.potential.lookahead(potential)
        return log_q if known is None else log_q + known

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        return state + 1


def _bridged(ramp: Array, key: PRNGKeyArray, target: Target, p: Particles, round: Array) -> tuple:
    """A proportional to W p^(alpha_t - alpha)."""
    alpha = target.power
    short = exponent(target, ramp, p.state.sequences.length.max()) - alpha
    return (
        p,
        jnp.where(dead(p.log_weights), -jnp.inf, p.log_weights + short * p.state.log_prob),
        Cost(),
    )
