"""Is an observation like the simulations that a posterior network has learned from?

Far from them a network extrapolates, and is sure of what it says.  The score is the maximum mean
discrepancy between the summaries of M observations and those of simulations R,

    MMD^2 = mean k(o, o') - 2 mean k(o, r) + mean k(r, r'),
    k(a, b) = mean over s in (1/4, 1, 4) of 1 / (1 + |a - b|^2 / (s c)),   c the median |r - r'|^2

and the null are the scores of M simulations at a time that are not among R.  If the observations
are like simulations, all scores are exchangeable, and the p-value is exact.

Schmitt, Buerkner, Koethe and Radev (arXiv 2112.08866).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ppl.checks import check_key
from ppl.showing import shown

from .joint import flattened, named_leaves, standardised

MOST = 2_000
"""The most simulations that an observation is compared with."""
SCALES = (0.25, 1.0, 4.0)
LEVEL = 0.01
"""The p-value from which on there is a warning."""


@shown
@dataclasses.dataclass(frozen=True)
class Misfit:
    """How unlike simulations some observations are.

    Attributes:
        score: MMD; about 1 and more means nothing in common.
        nulls: [G] scores of as many simulations.
        p_value: (1 + #{nulls >= score}) / (1 + G).
        furthest: the number of the summaries that is furthest from its mean over the simulations,
            by name, and how far, in units of its spread.
    """

    score: float
    nulls: Float[np.ndarray, " G"]
    p_value: float
    furthest: tuple[str, float]


def run(key: PRNGKeyArray, observed: PyTree, simulated: PyTree) -> Misfit:
    """The score of M observations among N simulations; a warning if it is too high for chance.

    Args:
        key: which simulations are compared with, and which are the null.
        observed: summaries of M observations of one law, leaves [M, ...]; usually M = 1.
        simulated: summaries of N simulations, leaves [N, ...].

    Raises:
        ValueError: if the shapes differ, a simulation is not finite, or N is too small for p-values
            of 1 %: N / 2 >= 99 M.
    """
    check_key(key)
    rows, seen = flattened(simulated), flattened(observed)
    num, some = len(rows), len(seen)
    if rows.shape[1] != seen.shape[1] or not np.isfinite(rows).all():
        raise ValueError(
            "expected finite simulations [N, ...] and observations [M, ...] of the same summaries,"
            f" got {rows.shape} and {seen.shape}; put [None] before one observation, and leave out"
            " simulations that are NaN"
        )
    half = num - max(num // 2, 1)
    groups = (num - half) // some
    if (1 + groups) * LEVEL < 1:
        raise ValueError(
            f"expected at least {2 * some * round(1 / LEVEL)} simulations for {some} observations,"
            f" got {num}; half of them, {some} at a time, are the null"
        )
    order = np.asarray(jax.random.permutation(key, num))
    reference = rows[order[:half]]
    null = rows[order[half : half + groups * some]]
    asked = standardised(np.concatenate([seen, null]), reference)
    scores = _scores(
        jnp.asarray(asked.reshape(1 + groups, some, -1), jnp.float32),
        jnp.asarray(standardised(reference, reference)[:MOST], jnp.float32),
    )
    # A summary that is not finite is as far away as can be.
    score, *nulls = np.nan_to_num(np.asarray(scores, np.float64), nan=np.inf)
    p_value = (1 + sum(other >= score for other in nulls)) / (1 + groups)
    out = Misfit(float(score), np.array(nulls), float(p_value), _furthest(observed, asked[:some]))
    if p_value <= LEVEL:
        _warn(out)
    return out


def _warn(out: Misfit) -> None:
    name, far = out.furthest
    warnings.warn(
        f"the observation is unlike the simulations: its misspecification score {out.score:.3g} is"
        f" above {np.mean(out.nulls < out.score):.1%} of those of simulations (p = "
        f"{out.p_value:.2g}), and {name} is {far:.3g} spreads from its mean; what a network says"
        " about it is an extrapolation",
        stacklevel=3,
    )


def _furthest(observed: PyTree, rows: Float[np.ndarray, "M P"]) -> tuple[str, float]:
    """The name and distance of the number that is furthest away."""
    names = [
        f"x{name}" + (f"[{','.join(map(str, at))}]" if at else "")
        for name, leaf in named_leaves(jax.tree.map(np.asarray, observed))
        for at in np.ndindex(leaf.shape[1:])
    ]
    far = np.abs(np.nan_to_num(rows, nan=np.inf)).max(axis=0)
    return names[int(far.argmax())], float(far.max())


def kernel(
    left: Float[Array, "M P"], right: Float[Array, "R P"], unit: Float[Array, ""]
) -> Float[Array, "M R"]:
    """k of all pairs, with `unit` for c."""
    far = jnp.sum((left[:, None] - right) ** 2, axis=-1) / unit
    return functools.reduce(jnp.add, [1 / (1 + far / s) for s in SCALES]) / len(SCALES)


@jax.jit
def _scores(groups: Float[Array, "G M P"], reference: Float[Array, "R P"]) -> Float[Array, " G"]:
    """MMD of every group from the reference."""

    # Simulations in random order: next to each other is as good as any two.
    unit = jnp.median(jnp.sum((reference[1:] - reference[:-1]) ** 2, axis=-1))
    unit = jnp.where(unit > 0, unit, 1.0)

    def mean_kernel(a: Any, b: Any) -> Any:
        return jnp.mean(kernel(a, b, unit))

    own = jnp.mean(jax.lax.map(lambda row: mean_kernel(row[None], reference), reference))

    def score(rows: Any) -> Any:
        return mean_kernel(rows, rows) - 2 * mean_kernel(rows, reference) + own

    return jnp.sqrt(jnp.maximum(jax.lax.map(score, groups), 0.0))
