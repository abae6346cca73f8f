"""Simulation-based calibration: the rank of the truth among posterior draws is uniform.

    theta ~ prior,  x ~ p(x | theta),  theta_1, ..., theta_S ~ q(. | x)
    rank = #{s: f(theta_s, x) < f(theta, x)}  is uniform on {0, ..., S}  if q is the posterior

for every f.  Coordinates do not see everything: a sampler that returns the prior has uniform ranks
of all coordinates.  A quantity that depends on x, such as the log-likelihood, sees it (and so does
`tarp`).

Talts et al. (arXiv 1804.06788); Modrak et al. (arXiv 2211.02383) for quantities.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from ppl.showing import shown

from . import uniform
from .joint import Joint, Quantity, coordinates, evaluate
from .uniform import Bins


@shown
@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks of the truth, and whether they are uniform.

    Attributes:
        ranks: [N, K] in 0..S.
        num_samples: S.
        names: of the K quantities.
        bins: how the ranks fall into bins.
        statistic: [K] Pearson's chi-squared on the bins.
        p_values: [K], each by itself.
    """

    ranks: Int[np.ndarray, "N K"]
    num_samples: int
    names: tuple[str, ...]
    bins: Bins
    statistic: Float[np.ndarray, " K"]
    p_values: Float[np.ndarray, " K"]

    @property
    def adjusted(self) -> Float[np.ndarray, " K"]:
        """p-values, corrected for there being K of them."""
        return uniform.holm(self.p_values)

    @property
    def p_value(self) -> float:
        """Of all quantities together."""
        return float(self.adjusted.min())


def run(
    key: PRNGKeyArray, joint: Joint, *, quantities: Quantity | None = None, bins: int | None = None
) -> Ranks:
    """Ranks of every coordinate of theta, or of quantities of theta and x, and their test.

    With N simulations a variance that is off by 20 % is found at N = 4,000 almost surely.

    Args:
        key: for the places of the truth among equals.
        quantities: (theta, x) -> {name: number []}, in the place of the coordinates; traced.
        bins: of the test; by default at most 20, with 5 ranks or more in each on average.

    Raises:
        ValueError: for fewer than 10 simulations, as in `joint.evaluate`, `uniform.binned`.
    """
    of = coordinates(joint) if quantities is None else evaluate(joint, quantities)
    ranks = uniform.ranks(key, of.truth, of.draws)
    found = uniform.binned(ranks, joint.num_samples, bins)
    return Ranks(ranks, joint.num_samples, of.names, found, *uniform.chi_squared(found))
