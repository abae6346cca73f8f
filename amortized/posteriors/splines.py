"""A monotone rational quadratic spline (Durkan et al. 2019, arXiv 1906.04032), for the flows of
flowjax.

It is the map of flowjax's `RationalQuadraticSpline` with the same parameters, and cheaper: of a
value only the two knots of its bin need their slopes, and they are picked by comparisons, whose
gradient is no scatter.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from jaxtyping import Array, Float
from paramax.utils import inv_softplus

LEAST_SLOPE, LEAST_WIDTH = 1e-3, 1e-3


class Spline(AbstractBijection):
    """Maps [-interval, interval] to itself, and is the identity outside; of a single number.

    Attributes:
        interval: half of the range.
        widths, heights: [knots + 1] logits of the bins' shares.
        slopes: [knots + 2] of the derivatives at all positions, before softplus.
    """

    interval: float = eqx.field(static=True)
    widths: Float[Array, " K"]
    heights: Float[Array, " K"]
    slopes: Float[Array, " L"]
    shape = ()
    cond_shape = None

    def __init__(self, *, knots: int, interval: float) -> None:
        self.interval = interval
        self.widths = self.heights = jnp.zeros(knots + 1)
        self.slopes = jnp.full(knots + 2, inv_softplus(1 - LEAST_SLOPE))

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple:
        inside = jnp.abs(x) <= self.interval
        value = jnp.clip(x, -self.interval, self.interval)
        at, to = self._positions(self.widths), self._positions(self.heights)
        (x0, x1), (y0, y1), (d0, d1) = self._bin(value, at, at, to)
        share = (value - x0) / (x1 - x0)
        y, slope = _curve(share, (y1 - y0) / (x1 - x0), y0, y1, d0, d1)
        y = jnp.clip(y, -self.interval, self.interval)
        return jnp.where(inside, y, x), jnp.log(jnp.where(inside, slope, 1.0))

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple:
        inside = jnp.abs(y) <= self.interval
        value = jnp.clip(y, -self.interval, self.interval)
        at, to = self._positions(self.widths), self._positions(self.heights)
        (x0, x1), (y0, y1), (d0, d1) = self._bin(value, to, at, to)
        mean = (y1 - y0) / (x1 - x0)
        # The quadratic equation of the share of the bin.
        rest = (value - y0) * (d1 + d0 - 2 * mean)
        a, b = (y1 - y0) * (mean - d0) + rest, (y1 - y0) * d0 - rest
        c = -mean * (value - y0)
        share = 2 * c / (-b - jnp.sqrt(b**2 - 4 * a * c))
        x = jnp.clip(share * (x1 - x0) + x0, -self.interval, self.interval)
        _, slope = _curve(share, mean, y0, y1, d0, d1)
        return jnp.where(inside, x, y), -jnp.log(jnp.where(inside, slope, 1.0))

    def _positions(self, logits: Float[Array, " K"]) -> Float[Array, " L"]:
        """Where bins begin and end."""
        shares = jax.nn.softmax(logits)
        free = 2 * self.interval - LEAST_WIDTH * len(logits)
        ends = jnp.cumsum(LEAST_WIDTH + free * shares)[:-1] - self.interval
        first = jnp.full(1, self.interval, ends.dtype)
        return jnp.concatenate([-first, ends, first])

    def _bin(self, value: Array, knots: Array, at: Array, to: Array) -> list[tuple[Array, Array]]:
        """Both ends of the bin of `value` among `knots`: where from, where to, and slopes."""
        number = jnp.sum(value > knots[1:-1])
        here = jnp.arange(len(knots) - 1) == number

        def ends(row: Array) -> tuple[Array, Array]:
            return jnp.sum(jnp.where(here, row[:-1], 0)), jnp.sum(jnp.where(here, row[1:], 0))

        low, high = (jax.nn.softplus(slope) + LEAST_SLOPE for slope in ends(self.slopes))
        return [ends(at), ends(to), (low, high)]


def _curve(
    share: Array, mean: Array, y0: Array, y1: Array, d0: Array, d1: Array
) -> tuple[Array, Array]:
    """Value and slope at a share of a bin whose mean slope is `mean` (equations 4 and 5)."""
    both = share * (1 - share)
    below = mean + (d1 + d0 - 2 * mean) * both
    y = y0 + (y1 - y0) * (mean * share**2 + d0 * both) / below
    slope = mean**2 * (d1 * share**2 + 2 * mean * both + d0 * (1 - share) ** 2) / below**2
    return y, slope
