"""The exact law of a stopping rule: a forward dynamic programme over what it has seen.

    lattice(rules.beta(0.95), [0.6, 0.4], cap=40)

Every rule runs here by its own functions.  The states of one n are the different statistics that n
draws can leave; those where the rule stops are absorbed.  Rules of counts have C(n + K - 1, K - 1)
of them; what a rule remembers besides multiplies that: by K for a window, by K m for a run of m.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppl.checks import check_count
from ppl.showing import shown

from .rules import Rule, Seen, check_scoreless

BLOCK = 256
"""States are padded to a power of two of at least so many, for each of which there is a program."""


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """The law of what a rule answers, and when; float64.

    Attributes:
        answer: [K] P(the majority of the draws at the stop, or at the cap, is a), ties by chance;
            what is missing to 1 is no answer at all.
        accuracy: P(it is the most likely answer, the first of equals).
        draws: [cap + 1] P(n draws).
        mean_draws: E[n].
        wrong: P(the rule stops, on another answer than the most likely one).
        stopped: P(the rule stops within the cap).
    """

    answer: Float[np.ndarray, " K"]
    accuracy: float
    draws: Float[np.ndarray, " L"]
    mean_draws: float
    wrong: float
    stopped: float


def lattice(rule: Rule, probs: Any, cap: int = 40) -> Law:
    """The exact law of a rule on independent draws, each the answer a with probability pi_a.

    For K <= 3 and caps up to 200 in seconds.  There are no scores, so not for `secretary`; and no
    more than `cap` draws.

    Args:
        rule: one rule, not an array of thresholds.
        probs: [K] pi, whose rest to 1 is the probability of no answer.
        cap: draws at most.

    Raises:
        ValueError: if `probs` is not a list of probabilities, `rule` no rule or one that reads
            scores, or `cap` < 1.
    """
    pi = _check(rule, probs, cap)
    chances = np.append(pi, max(1 - pi.sum(), 0.0))
    ids = np.append(np.arange(len(pi)), -1)[chances > 1e-12].astype(np.int32)
    chances, mode = chances[chances > 1e-12], np.argmax(pi)
    answer, draws, stops = np.zeros(len(pi)), np.zeros(cap + 1), np.zeros(len(pi))
    seen = jax.tree.map(lambda x: np.asarray(x)[None], rule.init(len(pi), cap))
    mass, stopped = np.ones(1), 0.0
    for num in range(1, cap + 1):
        (seen, stop), mass = _merged(_after(rule, seen, ids), np.outer(chances, mass))
        law = mass[:, None] * _majority(np.asarray(seen.counts))
        stops += law[stop].sum(0)
        stopped += mass[stop].sum()
        over = stop | (num == cap)
        answer += law[over].sum(0)
        draws[num] = mass[over].sum()
        seen, mass = _rows(seen, ~over), mass[~over]
        if not len(mass):
            break
    return Law(
        answer=answer,
        accuracy=float(answer[mode]),
        draws=draws,
        mean_draws=float(draws @ np.arange(cap + 1)),
        wrong=float(stops.sum() - stops[mode]),
        stopped=float(stopped),
    )


def _check(rule: Any, probs: Any, cap: int) -> Float[np.ndarray, " K"]:
    check_count("cap", cap)
    if not isinstance(rule, Rule) or any(np.ndim(x) for x in rule.parameters.values()):
        raise ValueError(f"expected one rule, got {rule!r}; pass e.g. stopping.beta(0.95)")
    check_scoreless(rule)
    pi = np.asarray(probs, np.float64)
    if pi.ndim != 1 or not pi.size or not (pi >= 0).all() or not 0 < pi.sum() <= 1 + 1e-6:
        raise ValueError(
            f"expected the probabilities of K answers, of sum 1 or less, got {probs!r}; pass e.g."
            " [0.6, 0.4]"
        )
    return pi


@jax.jit
def _children(rule: Rule, seen: Seen, ids: Int[Array, " A"]) -> tuple[Seen, Bool[Array, "A S"]]:
    def one(seen: Seen, answer: Array) -> tuple[Seen, Array]:
        after = rule.step(seen, answer, jnp.float32(0))
        return after, rule.decide(after)

    return jax.vmap(lambda answer: jax.vmap(one, (0, None))(seen, answer))(ids)


def _after(rule: Rule, seen: Seen, ids: Int[np.ndarray, " A"]) -> tuple[Seen, Any]:
    """What S states become by each of A answers, and whether the rule stops there: [A, S, ...]."""
    num = len(seen.num)
    size = max(BLOCK, 1 << (num - 1).bit_length())
    rows = np.minimum(np.arange(size), num - 1)
    after = _children(rule, _rows(seen, rows), ids)
    return jax.tree.map(lambda x: np.asarray(x)[:, :num], after)


def _merged(after: Any, mass: Float[np.ndarray, "A S"]) -> tuple[Any, Float[np.ndarray, " R"]]:
    """The different states among all children, and their masses."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after)
    columns = [x.reshape(mass.size, -1) for x in jax.tree.leaves(flat)]
    same = np.zeros(mass.size, np.int64)
    for column in np.concatenate(columns, axis=1, dtype=np.float64).T:
        if column.min() < column.max():
            _, value = np.unique(column, return_inverse=True)
            _, same = np.unique(same * (value.max() + 1) + value, return_inverse=True)
    first = np.unique(same, return_index=True)[1]
    return _rows(flat, first), np.bincount(same, mass.ravel())


def _rows(states: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], states)


def _majority(counts: Int[np.ndarray, "S K"]) -> Float[np.ndarray, "S K"]:
    """P(the majority is a), ties by chance; zeros where nothing was answered."""
    best = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    return best / np.maximum(best.sum(1, keepdims=True), 1)
