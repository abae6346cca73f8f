"""How well chains have mixed: R-hat and effective samples, acceptance by cut, replicas on their way
through a ladder.

Draws have the axes [S, C] (draws, chains), as `samplers.mcmc.chains` keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from ppl.showing import shown

MODELS = ("latents", "theta")
"""What chains over models keep: a number or an array [S, C, ...] for every site."""
MAX_NUMBERS = 16
"""The most numbers that a site has a quantity for each of."""
Numbers = Num[np.ndarray, "S C"] | Num[Array, "S C"] | Bool[np.ndarray, "S C"]


@shown
@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one quantity.

    Attributes:
        name: of the quantity.
        mean, sd: over all draws.
        mcse: standard error of the mean, sd / sqrt(ess).
        ess, r_hat: as in `bulk_ess` and `split_r_hat`.
        note: why a number is missing or should not be believed; empty if nothing is known against
            them.
    """

    name: str
    mean: float
    sd: float
    mcse: float
    ess: float
    r_hat: float
    note: str


def split_r_hat(x: Numbers) -> float:
    """Split R-hat: the square root of the ratio of total to within-chain variance, with every chain
    cut in two.

    Close to 1 if the halves of all chains look alike; below 1.01 is usually asked for.  It is NaN
    where there is nothing to compare, because all draws are equal or some are not finite, and inf
    for chains that never move and differ.

    Raises:
        ValueError: if there are fewer than four draws.

    Gelman et al., Bayesian Data Analysis; computed by numpyro.
    """
    x = _chains_first(x)
    return float(split_gelman_rubin(x)) if np.isfinite(x).all() and np.ptp(x) > 0 else float("nan")


def bulk_ess(x: Numbers) -> float:
    """Bulk effective sample size: of the normal scores of the draws' ranks, with every chain cut in
    two.

    Ranks make it finite for any law, and equal draws, which a chain that rejects makes many of,
    share their mean rank. NaN where all draws are equal or some are NaN; about the number of chains
    if these never move and differ.

    Raises:
        ValueError: if there are fewer than four draws.

    Vehtari et al. (arXiv 1903.08008); autocorrelations by numpyro.
    """
    x = _chains_first(x)
    if np.isnan(x).any() or (x == x.flat[0]).all():
        return float("nan")
    half = x.shape[1] // 2
    halves = np.concatenate([x[:, :half], x[:, -half:]])
    _, of, counts = np.unique(halves, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[of.reshape(halves.shape)]
    scores = np.asarray(
        jax.scipy.special.ndtri(jnp.asarray((rank - 0.375) / (halves.size + 0.25))), np.float64
    )
    return float(effective_sample_size(scores))


def summary(quantities: Mapping[str, Numbers]) -> list[Row]:
    """A row for each quantity [S, C], e.g. {"log p": log_prob, "length": sequences.length}.

    Raises:
        ValueError: if there are fewer than four draws.
    """
    return [_row(name, np.asarray(x, np.float64)) for name, x in quantities.items()]


def sites(draws: Mapping[str, Any]) -> dict[str, Any]:
    """What `samplers.mcmc.chains` keeps, with latents and parameters under the names of their sites
    and in their own supports, in the place of the unconstrained `position` [S, C, D].
    """
    found: dict[str, Any] = {}
    for name, value in draws.items():
        if name in MODELS:
            parts = jax.tree_util.tree_leaves_with_path(value)
            for path, leaf in parts:
                site = jax.tree_util.keystr(path, simple=True, separator=".")
                own = isinstance(value, Mapping) and site not in draws
                found[site if own else ".".join(filter(None, (name, site)))] = np.asarray(leaf)
        elif name != "position" or "latents" not in draws:
            found[name] = value
    return found


def quantities(draws: Mapping[str, Any]) -> dict[str, Num[np.ndarray, "S C"]]:
    """What `samplers.mcmc.chains` keeps that is one number per chain and draw, the strings'
    lengths, and the numbers of sites that have few, by name.
    """
    found = {}
    for name, x in sites(draws).items():
        if name == "sequences":
            found["length"] = np.asarray(x.length)
        elif np.ndim(x) == 2:
            found[name] = np.asarray(x)
        elif name not in draws and np.prod(np.shape(x)[2:]) <= MAX_NUMBERS:
            for at in np.ndindex(*np.shape(x)[2:]):
                found[f"{name}[{', '.join(map(str, at))}]"] = np.asarray(x)[:, :, *at]
    return found


def _row(name: str, x: np.ndarray) -> Row:
    finite = np.isfinite(x).all()
    mean, sd = (float(x.mean()), float(x.std(ddof=1))) if finite else (float("nan"), float("nan"))
    ess, r_hat = bulk_ess(x), split_r_hat(x)
    return Row(name, mean, sd, float(sd / np.sqrt(ess)), ess, r_hat, _note(x, r_hat))


def _note(x: np.ndarray, r_hat: float) -> str:
    num_chains, still = x.shape[1], (x == x[0]).all(axis=0)
    if not np.isfinite(x).all():
        return (
            f"{(~np.isfinite(x)).any(axis=0).sum()} of {num_chains} chains have draws that are"
            " not finite"
        )
    if (x == x[0, 0]).all():
        return "all draws are equal: nothing is known of the mixing"
    if still.any():
        return f"constant in {still.sum()} of {num_chains} chains"
    if num_chains == 1:
        return "one chain: R-hat compares its halves only"
    return "" if r_hat < 1.01 else "R-hat above 1.01: the chains have not mixed"


def _chains_first(x: Any) -> Float[np.ndarray, "C S"]:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[0] < 4:
        raise ValueError(
            f"expected at least 4 draws [S, C], got {list(x.shape)}; run the chains longer"
        )
    return x.T


def acceptance_by_cut(
    accepted: Bool[np.ndarray, "..."] | Bool[Array, "..."],
    cut: Int[np.ndarray, "..."] | Int[Array, "..."],
    max_tokens: int,
    made: Bool[np.ndarray, "..."] | Bool[Array, "..."] | None = None,
) -> tuple[Float[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Mean acceptance of moves with each cut, and how many there were; NaN for cuts without any.

    Args:
        accepted, cut: of moves, in any shape.
        max_tokens: T.
        made: which moves count; of a `MoveInfo` those `proposed`, as others had their cut beyond
            the end.
    """
    accepted, cut = np.asarray(accepted), np.asarray(cut)
    count = np.ones(cut.shape, bool) if made is None else np.asarray(made)
    total = np.bincount(cut[count], minlength=max_tokens)
    taken = np.bincount(cut[count & accepted], minlength=max_tokens)
    return np.where(total > 0, taken / np.maximum(total, 1), np.nan), total


# Tempering.  rungs [S, C, K], `draws["rung"]` of a run of `parallel_tempering`: the rung, 0
# (hottest, the smallest power) to K - 1 (coldest), on which replica k of chain c is after draw s.


def swap_acceptance(
    rungs: Int[np.ndarray, "S C K"] | Int[Array, "S C K"],
) -> Float[np.ndarray, " K-1"]:
    """How often rungs k and k + 1 exchanged replicas, per draw.

    A swap takes one replica up across the line between k and k + 1.  So where each pair is tried
    once between two draws this is the acceptance; pairs that are tried every other time have twice
    as much, and of several swaps between two draws only the last one's effect is seen.

    Raises:
        ValueError: unless every row holds each of the rungs 0..K - 1 once.
    """
    rungs = _permutations(rungs)
    line = np.arange(rungs.shape[2] - 1)
    up = (rungs[:-1, ..., None] <= line) & (rungs[1:, ..., None] > line)
    return up.any(axis=2).mean(axis=(0, 1))


def round_trips(rungs: Int[np.ndarray, "S C K"] | Int[Array, "S C K"]) -> Int[np.ndarray, "C K"]:
    """How often each replica went from the coldest rung to the hottest and back.

    Raises:
        ValueError: as in `swap_acceptance`.
    """
    rungs = _permutations(rungs)
    coldest = rungs.shape[2] - 1
    done = np.zeros(rungs.shape[1:], np.int64)
    # 0: has not been coldest; 1: coldest since; 2: then hottest.
    stage = np.zeros(rungs.shape[1:], np.int64)
    for now in rungs:
        done += (now == coldest) & (stage == 2)
        stage = np.where(now == coldest, 1, np.where((now == 0) & (stage == 1), 2, stage))
    return done


def _permutations(rungs: Any) -> Int[np.ndarray, "S C K"]:
    rungs = np.asarray(rungs)
    if (
        rungs.shape[0] < 2
        or rungs.shape[2] < 2
        or (np.sort(rungs, axis=2) != np.arange(rungs.shape[2])).any()
    ):
        raise ValueError(
            "expected rungs [S, C, K] of at least two draws, each with all of 0..K-1 once, got"
            f" shape {list(rungs.shape)}; [s, c, k] is the rung of replica k, 0 the hottest"
        )
    return rungs
