"""Regression losses g(t) of a balance residual t = log target - log model (arXiv 2410.02596).

On trajectories drawn from a normalised model, with the true log Z, the expected gradient of g(t) is
that of a divergence between target p and model q:

    half_square       KL(q || p)                            mode seeking; any log Z
    linex(1)          KL(p || q)                            mass covering
    linex(1/2)        4 (1 - sum sqrt(p q))                 between the two
    cosh              KL(p || q) + chi^2(q || p) / 2

`square` is twice `half_square`.  With t of the other sign, Linex(1) would be half of chi^2(q || p),
which forces zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Loss = Callable[[Float[Array, "*n"]], Float[Array, "*n"]]
"""Elementwise: residuals to losses, 0 at 0."""

FORBIDDEN = 10.0
"""A regression asks that what is forbidden be below a share of e^-10; it cannot ask for zero."""

MAX_EXPONENT = 40.0
"""Exponentials continue as their tangent from here: the square of a gradient still fits float32."""


def square(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """t^2."""
    return t**2


def half_square(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """t^2 / 2."""
    return 0.5 * t**2


def cosh(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """e^t + e^-t - 2, the shifted hyperbolic cosine (twice)."""
    return _exp(t) + _exp(-t) - 2.0


def linex(a: float | int) -> Loss:
    """(e^(a t) - a t - 1) / a^2: exponential on one side, linear on the other.

    Raises:
        ValueError: if a is 0, whose limit is `half_square`.
    """
    if a == 0:
        raise ValueError(
            "expected a slope a that is not 0, got 0; its limit is regression.half_square"
        )

    def loss(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return (_exp(a * t) - a * t - 1.0) / a**2

    return loss


def _exp(x: Array) -> Array:
    """e^x, and its tangent beyond the largest exponent: a residual that large still has
    a gradient.
    """
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT)) * (1.0 + jnp.maximum(x - MAX_EXPONENT, 0.0))
