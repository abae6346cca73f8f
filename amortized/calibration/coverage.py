"""Expected coverage: regions of probability alpha hold the truth with probability alpha.

Each check gives every simulation a level u in [0, 1], the alpha from which on the region holds the
truth.  Then coverage(alpha) = P(u < alpha), and u is uniform if the sampler draws from the
posterior:

    central intervals      u = |2 v - 1|, v the spread rank of the truth among the draws
    highest density        u = the share of draws whose density q(. | x) is above the truth's
    tarp                   u = the share of draws that are nearer to a reference than the truth is

Ranks are spread over their cells (`uniform.spread`), so all this is exact at any number of draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy import stats

from ppl.showing import shown

from . import uniform
from .joint import Joint, coordinates, evaluate


@shown
@dataclasses.dataclass(frozen=True)
class Coverage:
    """Levels from which on the truth is covered, and whether they are uniform.

    Attributes:
        kind: of regions.
        levels: [N, K], u of the module's docstring.
        names: of the K kinds of region.
        statistic: [K] sup over alpha of |coverage(alpha) - alpha|.
        p_values: [K], each by itself, of Kolmogorov and Smirnov's test.
    """

    kind: str
    levels: Float[np.ndarray, "N K"]
    names: tuple[str, ...]
    statistic: Float[np.ndarray, " K"]
    p_values: Float[np.ndarray, " K"]

    @property
    def adjusted(self) -> Float[np.ndarray, " K"]:
        """p-values, corrected for there being K of them."""
        return uniform.holm(self.p_values)

    @property
    def p_value(self) -> float:
        """Of all together."""
        return float(self.adjusted.min())

    @property
    def excess(self) -> Float[np.ndarray, " K"]:
        """Integral over alpha > 1/2 of coverage(alpha) - alpha [K]: positive where the draws are
        spread too widely, negative where they are too sure; 0 in expectation if all is right.
        """
        return (1 - np.maximum(self.levels, 0.5)).mean(axis=0) - 0.375

    def at(self, alpha: Float[np.ndarray, " A"]) -> Float[np.ndarray, "A K"]:
        """The share of simulations whose regions of probability alpha hold the truth."""
        return (self.levels < alpha[:, None, None]).mean(axis=1)

    def band(
        self, alpha: Float[np.ndarray, " A"], probability: float = 0.95
    ) -> tuple[Float[np.ndarray, "A K"], Float[np.ndarray, "A K"]]:
        """The bootstrap's interval around `at(alpha)`, low and high [A, K].

        To draw simulations with replacement and count those that are covered is to draw from
        Binomial(N, at(alpha)): its quantiles are taken, and nothing is drawn.
        """
        num, share = len(self.levels), self.at(alpha)
        tail = (1 - probability) / 2
        low, high = (stats.binom.ppf(q, num, share) / num for q in (tail, 1 - tail))
        return np.maximum(low, 0.0), high


def of_levels(kind: str, levels: Float[np.ndarray, "N K"], names: tuple[str, ...]) -> Coverage:
    """Levels with their test."""
    return Coverage(kind, levels, names, *uniform.kolmogorov_smirnov(levels))


def central(key: PRNGKeyArray, joint: Joint) -> Coverage:
    """Of the intervals between the quantiles (1 - alpha) / 2 and (1 + alpha) / 2 of the draws, for
    every coordinate of theta.

    Too wide and too narrow shows; a shift that keeps the width shows less than in `sbc`.
    """
    of = coordinates(joint)
    place_key, spread_key = jax.random.split(key)
    ranks = uniform.ranks(place_key, of.truth, of.draws)
    v = uniform.spread(spread_key, ranks, joint.num_samples)
    return of_levels("central intervals", np.abs(2 * v - 1), of.names)


def highest_density(
    key: PRNGKeyArray, joint: Joint, log_prob: Callable[[Any, Any], Any]
) -> Coverage:
    """Of the regions in which the sampler's own density is highest.

    It cannot see that a sampler ignores x: of one that returns the prior all regions hold the truth
    as often as they should.

    Args:
        log_prob: (theta, x) -> log q(theta | x) [], of one theta and one x; traced.

    Raises:
        ValueError: if it is NaN for some draw, or gives no number.
    """
    of = evaluate(joint, lambda theta, x: {"highest density": log_prob(theta, x)})
    place_key, spread_key = jax.random.split(key)
    # Draws of higher density are those of lower -log q.
    ranks = uniform.ranks(place_key, -of.truth, -of.draws)
    levels = uniform.spread(spread_key, ranks, joint.num_samples)
    return of_levels("highest density", levels, ("log q",))
