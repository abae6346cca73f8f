"""theta ~ N(0, I_2), x = theta + N(0, I_2): posterior N(x / 2, I / 2); and posteriors that are
wrong in a way of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amortized.calibration.joint import Joint

SD = 0.5**0.5


def simulations(rng: np.random.Generator, num: int, dim: int = 2) -> tuple[Any, Any]:
    """theta and x, [N, D]."""
    theta = rng.standard_normal((num, dim))
    return theta, theta + rng.standard_normal((num, dim))


def gaussian(
    rng: np.random.Generator, num: int, samples: int, *, sd: float = SD, shift: float = 0.0
) -> Joint:
    """Draws from N(x / 2 + shift, sd^2 I)."""
    theta, x = simulations(rng, num)
    noise = rng.standard_normal((num, samples, 2))
    return Joint(theta, x, x[:, None] / 2 + shift + sd * noise)


def prior(rng: np.random.Generator, num: int, samples: int) -> Joint:
    """Draws from the prior, whatever x is."""
    theta, x = simulations(rng, num)
    return Joint(theta, x, rng.standard_normal((num, samples, 2)))
