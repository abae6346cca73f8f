"""Ladders of targets between an easy one and the wanted one: made, checked, tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ppl.checks import check_count
from ppl.target import Target

Ladder = Sequence[float | int] | Float[Any, " K"]


def geometric(alpha_1: float | int, alpha: float | int, num_rungs: int) -> Float[Array, " K"]:
    """The powers alpha_k = alpha_1 (alpha / alpha_1)^((k - 1) / (K - 1)), K = `num_rungs`.

    Raises:
        ValueError: unless 0 < alpha_1 < alpha and there are at least two rungs.
    """
    check_count("num_rungs", num_rungs)
    if not 0 < alpha_1 < alpha < np.inf:
        raise ValueError(
            f"expected 0 < alpha_1 < alpha, got {alpha_1} and {alpha}; the first rung is the"
            " hottest, e.g."
            " ladders.geometric(1, 4, 5)"
        )
    return _powers(np.geomspace(alpha_1, alpha, num_rungs))


def tune(ladder: Ladder, acceptance: Float[Any, " J"]) -> Float[Array, " K"]:
    """A ladder with the same ends and number of rungs whose neighbours swap about equally often.

    The rejection rates 1 - acceptance of a trial run add up to a barrier Lambda(alpha_k), which
    depends little on where the rungs between are; the new ones cut it, linearly interpolated, into
    K - 1 equal parts.  Where nearly all swaps were rejected the barrier is underestimated: tune
    again.  A run's ladder must not depend on that run:

        trial = parallel_tempering.run(trial_key, target, ladder)
        rates = trial.info.details["swap_acceptance"].mean((0, 1, 2))
        out = parallel_tempering.run(key, target, ladders.tune(ladder, rates))

    Args:
        ladder: powers alpha_1 < ... < alpha_K.
        acceptance: [J] mean acceptance of the swaps of neighbours, e.g. of many steps'
            `swap_acceptance`.

    Raises:
        ValueError: if the ladder does not increase, or there are not K - 1 rates in [0, 1].

    Syed, Bouchard-Cote, Deligiannidis and Doucet (arXiv 1905.02939).
    """
    old, rates = np.asarray(_powers(ladder), np.float64), np.asarray(acceptance, np.float64)
    if rates.shape != (len(old) - 1,) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(
            f"expected {len(old) - 1} acceptance rates in [0, 1], one for each pair of neighbours,"
            f" got {rates};"
            " average Info.acceptance over steps and chains"
        )
    # A pair that never rejects still has its interval: the barrier must increase to be inverted.
    barrier = np.append(0.0, np.cumsum(np.maximum(1 - rates, 1e-3)))
    inside = np.interp(np.linspace(0, barrier[-1], len(old))[1:-1], barrier, old)
    return _powers([old[0], *inside, old[-1]])


def check_powers(target: Target, ladder: Ladder) -> Float[Array, " K"]:
    """Powers of p that increase to the target's alpha; traced values cannot be read, and pass."""
    if isinstance(ladder, Tracer):
        return ladder
    powers, alpha = _powers(ladder), target.alpha
    if isinstance(alpha, Tracer):
        return powers
    alpha = 1.0 if alpha is None else float(alpha)
    if not np.isclose(powers[-1], alpha, rtol=1e-6):
        raise ValueError(
            f"expected a ladder that ends at the target's alpha, {alpha:g}, got"
            f" {float(powers[-1]):g}; its last rung is"
            " the target, as in run(key, p**4, [1, 2, 4])"
        )
    return powers


def check_betas(ladder: Ladder) -> Float[Array, " S"]:
    """Inverse temperatures that increase from above 0 to 1."""
    betas = np.asarray(ladder, np.float32)
    if (
        betas.ndim != 1
        or betas.size == 0
        or not (np.diff(betas, prepend=np.float32(0)) > 0).all()
        or betas[-1] != 1
    ):
        raise ValueError(
            "expected a ladder that increases strictly from above 0 to exactly 1, got"
            f" {np.asarray(ladder).tolist()};"
            " leave the prior's 0 out, and end with 1.0"
        )
    return jnp.asarray(betas)


def _powers(ladder: Any) -> Float[Array, " K"]:
    powers = np.asarray(ladder, np.float32)
    if powers.ndim != 1 or len(powers) < 2:
        raise ValueError(
            f"expected a ladder of at least two powers, got {np.asarray(ladder).tolist()}; e.g. [1,"
            " 2, 4]"
        )
    if not (np.isfinite(powers).all() and powers[0] > 0 and (np.diff(powers) > 0).all()):
        raise ValueError(
            "expected a ladder of powers above 0 that increase strictly, got"
            f" {np.asarray(ladder).tolist()}; the hottest comes first, and the target's own last"
        )
    return jnp.asarray(powers)


def check_alpha(target: Target) -> None:
    """Raise ValueError unless alpha > 0; a traced one passes."""
    alpha = target.power
    if not isinstance(alpha, Tracer) and not (np.asarray(alpha) > 0).all():
        raise ValueError(
            f"expected a target with alpha above 0, got {alpha}; p ** 4 is usual, p itself has"
            " alpha = 1"
        )
