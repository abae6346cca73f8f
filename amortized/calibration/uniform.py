"""Ranks of the truth among posterior draws, and tests that they are uniform.

If theta and its S draws are exchangeable, the rank of any number of them is uniform on {0, ..., S},
exactly, at any S.  Two tests ask for it: chi-squared on bins of ranks with their exact
probabilities, and Kolmogorov and Smirnov's on ranks that are spread over their cells of [0, 1],
which makes their law continuous.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray
from scipy import stats

from ppl.checks import check_count
from ppl.showing import shown

EXPECTED = 5
"""The least number of ranks that a bin is to hold on average, for its law to be near a normal."""
ROUNDING = 1e-6
"""Of numbers that are equal but for rounding, relative to their size."""
BINS = 20
"""The most bins: with more of them, the test sees slopes and humps less well."""


@shown
class Bins(NamedTuple):
    """Ranks counted in B bins.

    counts [B, K]; edges [B + 1]: bin b holds the ranks from edges[b] to edges[b + 1] - 1;
    probabilities [B]: exact, the share of the S + 1 ranks that a bin holds.
    """

    counts: Int[np.ndarray, "B K"]
    edges: Int[np.ndarray, " E"]
    probabilities: Float[np.ndarray, " B"]


@shown
class Test(NamedTuple):
    """A statistic and its p-value, of each column [K]."""

    statistic: Float[np.ndarray, " K"]
    p_values: Float[np.ndarray, " K"]


def ranks(
    key: PRNGKeyArray, truth: Float[np.ndarray, "N K"], draws: Float[np.ndarray, "N S K"]
) -> Int[np.ndarray, "N K"]:
    """How many draws are below the truth, in 0..S; among equals it has a place at random.

    Without that, a quantity with ties (a length, a count, log p of a string) would not have uniform
    ranks even if all were right.  Numbers that differ as roundings of float32 do are equal: the
    same log p, once computed in a batch of one and once in a batch of many, is not the same number.
    """
    own = truth[:, None]
    usual = np.median(np.abs(draws), axis=1, keepdims=True)
    slack = ROUNDING * (np.abs(own) + np.where(np.isfinite(usual), usual, 0.0))
    with np.errstate(invalid="ignore"):  # infinite numbers are equal only to themselves
        near = np.isfinite(own) & (np.abs(draws - own) <= slack)
    equal = (draws == own) | near
    below, equals = ((draws < own) & ~equal).sum(axis=1), equal.sum(axis=1)
    places = np.floor(_uniforms(key, truth.shape) * (equals + 1)).astype(np.int64)
    return below + np.minimum(places, equals)


def spread(
    key: PRNGKeyArray, ranks: Int[np.ndarray, "N K"], num_samples: int
) -> Float[np.ndarray, "N K"]:
    """(rank + U) / (S + 1), uniform on [0, 1] if the ranks are on {0, ..., S}."""
    return (ranks + _uniforms(key, ranks.shape)) / (num_samples + 1)


def _uniforms(key: PRNGKeyArray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.uniform(key, shape, jnp.float32), np.float64)


def binned(ranks: Int[np.ndarray, "N K"], num_samples: int, bins: int | None = None) -> Bins:
    """Ranks in bins of as equal numbers of ranks as there can be.

    Args:
        ranks: in 0..S.
        num_samples: S.
        bins: B; by default as many as leave 5 ranks in each on average, and at most 20.

    Raises:
        ValueError: if there are fewer than 10 simulations, or some bin would hold fewer than 5.
    """
    num, cells = len(ranks), num_samples + 1
    # The smallest bin has cells // B ranks, and must hold enough.
    good = [b for b in range(2, cells + 1) if num * (cells // b) >= EXPECTED * cells]
    if not good:
        raise ValueError(
            f"expected enough simulations for two bins of {EXPECTED} ranks, got {num}; pass"
            " num_simulations=1000"
        )
    bins = max(b for b in good if b <= BINS) if bins is None else bins
    check_count("bins", bins)
    if bins not in good:
        raise ValueError(
            f"expected from 2 to {good[-1]} bins for {num} ranks in 0..{num_samples}, at least"
            f" {EXPECTED} in each on average, got {bins}; take fewer, or more simulations"
        )
    sizes = np.array([len(part) for part in np.array_split(np.arange(cells), bins)])
    edges = np.concatenate([[0], np.cumsum(sizes)])
    counts = [np.histogram(column, edges - 0.5)[0] for column in ranks.T]
    return Bins(np.stack(counts, axis=1), edges, sizes / cells)


def chi_squared(found: Bins) -> Test:
    """Pearson's test that ranks fall into the bins with their exact probabilities."""
    expected = found.probabilities[:, None] * found.counts.sum(axis=0)
    statistic = ((found.counts - expected) ** 2 / expected).sum(axis=0)
    return Test(statistic, stats.chi2.sf(statistic, len(expected) - 1))


def kolmogorov_smirnov(u: Float[np.ndarray, "N K"]) -> Test:
    """The one-sample test that every column is uniform on [0, 1]: sup |F_N - F| and its p-value."""
    found = [stats.kstest(column, "uniform") for column in u.T]
    return Test(
        np.array([test.statistic for test in found]), np.array([test.pvalue for test in found])
    )


def holm(p_values: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """p-values corrected for there being K of them (Holm): the least is right for all together,
    however they depend on each other.
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.maximum.accumulate(factors * np.asarray(p_values, np.float64)[order])
    out = np.empty(len(p_values))
    out[order] = np.minimum(adjusted, 1.0)
    return out
