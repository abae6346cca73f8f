"""All paths of a canvas sampler in float64: orders and tokens, and the law they are drawn from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppl.canvas import CanvasTarget

Canvas = tuple[int, ...]
Path = tuple[tuple[int, ...], Canvas]
"""Ranks of the sites, and their tokens."""


def conditionals(target: CanvasTarget) -> dict[Canvas, np.ndarray]:
    """d [L, V] of every canvas, MASK being V."""
    size = target.lm.vocab_size - 1
    every = list(itertools.product(range(size + 1), repeat=target.length))
    tokens = jnp.asarray(every, jnp.int32)
    log_d = np.asarray(target.denoise(tokens, tokens == size), np.float64)[:, :, :size]
    d = np.exp(log_d)
    return dict(zip(every, d / d.sum(2, keepdims=True), strict=True))


def pick(log_weights: np.ndarray, masked: list[int], count: int) -> Iterator[tuple[tuple, float]]:
    """Ordered draws without replacement of `count` sites, and their probabilities."""
    if not count or not masked:
        yield (), 1.0
        return
    w = np.exp(log_weights[masked] - log_weights[masked].max())
    for site, p in zip(masked, w / w.sum(), strict=True):
        left = [i for i in masked if i != site]
        for rest, q in pick(log_weights, left, count - 1):
            yield (site, *rest), p * q


def paths(
    target: CanvasTarget,
    log_weights: Callable[[np.ndarray], np.ndarray],
    block: int = 1,
    law: Callable[[np.ndarray, tuple[int, ...]], dict[tuple[int, ...], float]] | None = None,
    alpha: float = 1.0,
) -> dict[Path, float]:
    """q of every path: sites by log_weights(d [L, V]), tokens by law(e [L, V], sites), e being
    d^alpha normalised, and point masses at open sites.
    """
    size, d = target.lm.vocab_size - 1, conditionals(target)
    found: dict[Path, float] = {}

    def go(c: Canvas, rank: tuple[int, ...], now: int, q: float) -> None:
        masked = [i for i in range(len(c)) if c[i] == size]
        if not masked:
            found[rank, c] = found.get((rank, c), 0.0) + q
            return
        e = np.eye(size + 1)[list(c)][:, :size]
        power = d[c] ** alpha
        e[masked] = (power / power.sum(1, keepdims=True))[masked]
        sets: dict[tuple[int, ...], float] = {}
        for sites, p in pick(log_weights(d[c]), masked, block):
            sets[tuple(sorted(sites))] = sets.get(tuple(sorted(sites)), 0.0) + p
        for sites, p in sets.items():
            tokens = independent(e, sites) if law is None else law(e, sites)
            for drawn, r in tokens.items():
                if p * r > 0:
                    new, ranks = list(c), list(rank)
                    for i, v in zip(sites, drawn, strict=True):
                        new[i], ranks[i] = v, now
                    go(tuple(new), tuple(ranks), now + 1, q * p * r)

    go(tuple(np.asarray(target.given).tolist()), (-1,) * target.length, 0, 1.0)
    return found


def independent(e: np.ndarray, sites: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Every site's own law."""
    each = itertools.product(range(e.shape[1]), repeat=len(sites))
    return {v: math.prod(e[i, x] for i, x in zip(sites, v, strict=True)) for v in each}


def accepted(
    accepts: Callable[[Canvas], bool],
) -> Callable[[np.ndarray, tuple[int, ...]], dict[tuple[int, ...], float]]:
    """The law of the sites if all are drawn together and accepted."""

    def law(e: np.ndarray, sites: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        found: dict[tuple[int, ...], float] = {}
        for x in itertools.product(range(e.shape[1]), repeat=len(e)):
            p = math.prod(e[i, v] for i, v in enumerate(x)) * accepts(x)
            drawn = tuple(x[i] for i in sites)
            found[drawn] = found.get(drawn, 0.0) + p
        total = sum(found.values())
        return {v: p / total for v, p in found.items()} if total else {}

    return law


def path_of(out: Any) -> list[Path]:
    """The paths of a result's rows."""
    ranks, tokens = np.asarray(out.samples.rank).tolist(), np.asarray(out.samples.tokens).tolist()
    return [(tuple(rank), tuple(x)) for rank, x in zip(ranks, tokens, strict=True)]


def log_weights_by_path(out: Any) -> dict[Path, list[float]]:
    """The unnormalised log-weights of every path that was drawn."""
    raw = np.asarray(out.log_weights, np.float64) + float(out.log_z)
    found: dict[Path, list[float]] = {}
    for path, w in zip(path_of(out), raw.tolist(), strict=True):
        found.setdefault(path, []).append(w)
    return found
