"""TARP: tests of accuracy with random points, which see all of theta and x at once.

    f = #{s: d(theta_s, r) < d(theta, r)} / S,    ECP(alpha) = P(f < alpha)

is alpha for every law of the reference r given x, if the draws are the posterior's; and if it is
alpha for all of them, the draws are.  So what is found depends on r: where it does not depend on x,
a sampler that returns the prior passes.  Here it does by default.

Distances are Euclidean, in units of the prior's spread.  f is a rank, of a quantity that depends on
x (`sbc`), and is tested as one, by its exact law.

Lemos et al. (arXiv 2302.03026).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from . import uniform
from .coverage import Coverage, of_levels
from .joint import Joint, coordinates, flattened, standardised

Reference = Callable[[PRNGKeyArray, Joint], Float[np.ndarray, "N D"]]
"""(key, joint) -> a point for every simulation, in units of the prior's spread (`standardised`).

Row i may depend on x_i, on chance, and on other simulations, but not on theta_i or its draws.
"""


def predicted(key: PRNGKeyArray, joint: Joint) -> Float[np.ndarray, "N D"]:
    """What a linear regression says about theta from x, moved by another linear function of x and
    by noise, both as large as what the regression leaves open.

    The regression is fitted on one half of the simulations and used in the other; so no point
    depends on its own theta.  The rest makes points look from all sides, and keeps them dependent
    on x where the mean of theta is not.
    """
    seen, theta = flattened(joint.x), coordinates(joint).truth
    x, target = standardised(seen, seen), standardised(theta, theta)
    num, width = x.shape
    half_key, map_key, noise_key = jax.random.split(key, 3)
    first = np.asarray(jax.random.permutation(half_key, num)) % 2 == 0
    points = np.zeros_like(target)
    for rows in (first, ~first):
        fit, seen = x[~rows], target[~rows]
        weights = np.linalg.solve(fit.T @ fit + width * np.eye(width), fit.T @ seen)
        left = (seen - fit @ weights).std(axis=0)
        normals = np.asarray(jax.random.normal(map_key, (width, target.shape[1])), np.float64)
        noise = np.asarray(jax.random.normal(noise_key, target.shape), np.float64)[rows]
        moved = x[rows] @ normals / width**0.5 + noise
        points[rows] = x[rows] @ weights + left * moved
    return points


def independent(key: PRNGKeyArray, joint: Joint) -> Float[np.ndarray, "N D"]:
    """Points that do not depend on x, as other libraries draw them.

    They are here to show why not: a sampler that returns the prior, and never looks at x, passes.
    A test that passes with these points is no sign that a posterior is right.
    """
    shape = coordinates(joint).truth.shape
    return np.asarray(jax.random.normal(key, shape), np.float64)


def run(key: PRNGKeyArray, joint: Joint, *, reference: Reference = predicted) -> Coverage:
    """Coverage of the balls around a reference that hold a share alpha of the draws.

    Args:
        key: for the references, and the places of the truth among equals.
        reference: (key, joint) -> points [N, D] in units of the prior's spread; row i must not
            depend on theta_i.

    Raises:
        ValueError: if the references are not [N, D].
    """
    of = coordinates(joint)
    reference_key, place_key, spread_key = jax.random.split(key, 3)
    points = reference(reference_key, joint)
    if np.shape(points) != of.truth.shape:
        raise ValueError(
            f"expected references [N, D] = {of.truth.shape}, got {np.shape(points)}; give a point"
            " in the space of theta for every simulation"
        )
    truth = np.square(standardised(of.truth, of.truth) - points).sum(-1)
    draws = np.square(standardised(of.draws, of.truth) - points[:, None]).sum(-1)
    ranks = uniform.ranks(place_key, truth[:, None], draws[..., None])
    levels = uniform.spread(spread_key, ranks, joint.num_samples)
    return of_levels("TARP", levels, ("all of theta",))
