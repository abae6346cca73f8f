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

import numpy as np
from jaxtyping import Float

from ppl.showing import shown

FEW = 2.0
"""Effective different strings from which on they are enough, where resampling has made copies."""
UNCERTAIN = 0.4
"""The standard error of log Z from which on it may well be off by a nat: estimates from one run are
themselves too small where something was missed, and never say more than about 1."""
DROPPED = 0.2
"""The share of Z that what was dropped might have been, from which on it may matter."""
SHORT = 0.1
"""Nats by which log Z may be below what the strings in hand weigh together: rounding, chance."""
DEAD = "all particles are dead: none has positive density; take more of them, or a looser target"


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """What speaks against a weighted population; `str` says it in a line.

    Attributes:
        dead: no particle has positive weight.
        one_root: all weight descends from one particle of the first round.
        uncertain: the standard error of log Z is 0.4 or more.
        dropped: what was dropped on the way would have been 0.2 of Z or more, if it had done as
            well as what was kept did on average (`smc.distinct`).
        few_strings: the particles are copies of effectively fewer than 2 different strings.
        below_strings: log Z is below the log of the sum of gamma over the strings in hand, which is
            a lower bound of the truth.
        truncated: the proposal could not draw some of what the target can.
        invalid: some factor raised, or it or a law was NaN or +inf.
        words: a line for each flag that is raised, in this order.
    """

    dead: bool = False
    one_root: bool = False
    uncertain: bool = False
    dropped: bool = False
    few_strings: bool = False
    below_strings: bool = False
    truncated: bool = False
    invalid: bool = False
    words: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.words

    def __str__(self) -> str:
        if self.ok:
            return "nothing speaks against log Z"
        return "log Z is not to be trusted: " + "; ".join(self.words)


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
            " prompt's result: prompts.apart(out)[0]"
        )
    found = dict(_losses(out))
    if np.isneginf(log_weights).all():
        found = {"dead": DEAD} | found
    else:
        found = dict(_spread(out, log_weights)) | found
    names = [field.name for field in dataclasses.fields(Health) if field.name in found]
    return Health(words=tuple(found[name] for name in names), **dict.fromkeys(names, True))


def _spread(out: Any, log_weights: Float[np.ndarray, " N"]) -> Iterator[tuple[str, str]]:
    """Flags of a population that lives: what its weight hangs on."""
    num, weights = len(log_weights), np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    roots = getattr(out, "num_roots", None)
    if roots is not None and num > 1 and int(roots) == 1:
        yield "one_root", "all weight descends from one particle of the first round"
    error = float(getattr(out, "log_z_std_error", None) or 0.0)
    if UNCERTAIN <= error < np.inf:
        yield "uncertain", f"the standard error of log Z is {error:.2f}"
    dropped = float((getattr(out, "details", None) or {}).get("dropped", 0.0))
    if dropped >= DROPPED:
        yield "dropped", f"what was dropped early might have been {100 * dropped:.0f} % of it"
    groups = _strings(out)
    if groups is not None and error > 0:
        shares = np.bincount(groups, weights)
        copies, effective = 1 / np.square(weights).sum(), 1 / np.square(shares).sum()
        if effective < FEW <= copies / effective:
            yield "few_strings", f"its particles are copies of {effective:.1f} different strings"
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
        yield (
            "truncated",
            f"the proposal could not draw up to {missing:.2g} of what the target may draw next: the"
            " result is that of a truncated target",
        )
    invalid = int(getattr(out, "num_invalid", 0))
    if invalid:
        yield (
            "invalid",
            f"a factor raised, or it or a law was NaN or +inf {invalid} times, which counted as 0",
        )


def _strings(out: Any) -> np.ndarray | None:
    """Which of its different strings every row is, from 0 on [N]; None where rows are none."""
    sequences = getattr(out, "sequences", None)
    if sequences is None:
        return None
    length = np.asarray(sequences.length)
    rows = np.concatenate([np.asarray(sequences.tokens), length[:, None]], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel()
