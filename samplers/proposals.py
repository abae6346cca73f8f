"""Proposals: from the next-token logits and the potential's state to the law the next token is drawn from.

A proposal is a function (target, logits[N, V], potential_state) -> unnormalised log-probabilities [N, V].  Whatever it
returns, SMC divides by the law that was really drawn from, so any proposal that covers the target's support is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.core import Tracer
from jaxtyping import Array, Float

from ppl.potential import State
from ppl.target import Target

Proposal = Callable[[Target, Float[Array, "N V"], State], Float[Array, "N V"]]


def bootstrap(target: Target, logits: Float[Array, "N V"], state: State) -> Float[Array, "N V"]:
    """q = p: draw from the model, pay for alpha and Phi in the weight."""
    return logits


def tempered(temperature: float | int | Float[Array, ""]) -> Proposal:
    """q proportional to p^(1 / temperature).

    Raises:
        ValueError: unless temperature > 0.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; small values are near-greedy")
    return jax.tree_util.Partial(_tempered, temperature)


def _tempered(
    temperature: float | Array, target: Target, logits: Float[Array, "N V"], state: State
) -> Float[Array, "N V"]:
    return logits / temperature


def locally_optimal(target: Target, logits: Float[Array, "N V"], state: State) -> Float[Array, "N V"]:
    """q proportional to p^alpha times the factors that the potential knows in advance (its `lookahead`).

    If all are known, the weight is the normaliser and does not depend on the token drawn: the least variance that one
    step allows.
    """
    log_q = target.log_prob_factor(logits)
    known = target.potential.lookahead(state)
    return log_q if known is None else log_q + known
