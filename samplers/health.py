"""What speaks against a weighted population, for people: flags, and a line of words.

A wrong log Z rarely looks wrong.  All particles that took the same first token have equal weights,
a full ESS and a small standard error, whatever the other tokens would have given.  What is asked
here is what such a run still gives away: how many different strings and lineages its weight hangs
on, what its own strings weigh, and what was lost on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

FEW = 2.0
"""Effective strings, or particles at the narrowest round, from which on they are enough."""
SATURATED = 0.8
"""The standard error of log Z, of at most 1, that says no more than "large"."""
SHORT = 0.1
"""Nats by which log Z may be below what the strings in hand weigh together: rounding, and chance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """What speaks against a weighted population; `str` says it in a line.

    Attributes:
        dead: no particle has positive weight.
        one_root: all weight descends from one particle of the first round.
        saturated: the standard error of log Z is close to the most that it can show.
        few_strings: the effective number of different strings is below 2.
        narrow: in some round the weight hung on fewer than 2 effective particles.
        below_strings: log Z is below the log of the sum of gamma over the strings in hand, which is
            a lower bound of the truth.
        truncated: the proposal could not draw some of what the target can.
        invalid: particles were dropped because some factor raised, or was NaN or +inf.
        words: a line for each flag that is raised, in this order.
    """

    dead: bool = False
    one_root: bool = False
    saturated: bool = False
    few_strings: bool = False
    narrow: bool = False
    below_strings: bool = False
    truncated: bool = False
    invalid: bool = False
    words: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.words

    def __str__(self) -> str:
        return "nothing speaks against it" if self.ok else "not to be trusted: " + "; ".join(self.words)


def health(out: Any) -> Health:
    """What speaks against a population, from what its result says.

        print(diagnostics.health(smc.run(key, target)))

    Args:
        out: `results.Weighted`, or anything with `log_weights` [N] and as many of its other fields
            as it has.

    Raises:
        ValueError: if it holds several populations.
    """
    log_weights = np.asarray(out.log_weights, np.float64)
    if log_weights.ndim != 1:
        raise ValueError(
            f"expected one population with log_weights [N], got {log_weights.shape}; pick one"
            " prompt's result, for example jax.tree.map(lambda leaf: leaf[0], out)"
        )
    found = dict(_losses(out))
    if np.isneginf(log_weights).all():
        found = {"dead": "all particles are dead: none has positive density"} | found
    else:
        found = dict(_spread(out, log_weights)) | found
    names = [field.name for field in dataclasses.fields(Health) if field.name in found]
    return Health(words=tuple(found[name] for name in names), **dict.fromkeys(names, True))


def _spread(out: Any, log_weights: Float[np.ndarray, " N"]) -> Iterator[tuple[str, str]]:
    """Flags of a population that lives: what its weight hangs on."""
    num, weights = len(log_weights), np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    error = float(getattr(out, "log_z_std_error", None) or 0.0)
    most = np.sqrt(1 - 1 / num)
    if num > 1 and most - 1e-4 <= error < np.inf:
        yield "one_root", "all weight has one ancestor in the first round"
    elif SATURATED * most <= error < np.inf:
        yield "saturated", f"few independent lineages are left (standard error {error:.2f})"
    groups = _strings(out)
    if groups is not None and num > 1:
        shares = np.bincount(groups, weights)
        effective = 1 / np.square(shares).sum()
        if effective < FEW:
            yield "few_strings", f"the weight is that of {effective:.1f} different strings"
    trace = getattr(out, "trace", None)
    rounds = 0 if trace is None else int(getattr(out, "rounds", len(trace.ess)))
    if rounds and num > 1:
        least = float(np.asarray(trace.ess)[:rounds].min())
        if least < FEW:
            yield "narrow", f"in one round it hung on {least:.1f} of {num} particles"
    log_density = getattr(out, "log_density", None)
    if groups is not None and log_density is not None:
        first = np.unique(groups, return_index=True)[1]
        floor = np.logaddexp.reduce(np.asarray(log_density, np.float64)[first])
        short = floor - float(out.log_z)
        if short > SHORT:
            yield "below_strings", f"its strings alone weigh {short:.1f} nats more than log Z"


def _losses(out: Any) -> Iterator[tuple[str, str]]:
    """Flags of what was lost on the way."""
    missing = float(getattr(out, "missing_support", 0.0))
    if missing > 0:
        yield "truncated", f"the proposal could not draw up to {missing:.2g} of a token's law"
    invalid = int(getattr(out, "num_invalid", 0))
    if invalid:
        yield "invalid", f"{invalid} particles were dropped: a factor raised, or was NaN or +inf"


def _strings(out: Any) -> np.ndarray | None:
    """Which of its different strings every row is, from 0 on [N]; None where rows are none."""
    sequences = getattr(out, "sequences", None)
    if sequences is None:
        return None
    length = np.asarray(sequences.length)
    rows = np.concatenate([np.asarray(sequences.tokens), length[:, None]], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel()
