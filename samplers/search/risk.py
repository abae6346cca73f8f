"""Risk that is controlled in finite samples: thresholds for abstaining, early exits and cascades.

    tau = risk.learn_then_test(correct, confidence, grid, alpha=0.1, delta=0.05)
    answered = confidence_of_new >= tau        # at most a tenth of what is answered is wrong

The promises hold for prompts that are exchangeable with those of the calibration, which fitted
nothing else.  All is numpy, in double precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from ppl.checks import numbers
from ppl.showing import shown


def learn_then_test(correct: Any, confidence: Any, grid: Any, alpha: float, delta: float) -> float:
    """The lowest threshold tau of a grid of which the errors among what has confidence >= tau are
    known to be at most `alpha`: P(risk(tau) > alpha) <= delta over calibration sets.

    Thresholds are tested from the highest down, until the first whose p-value P(Bin(m, alpha) <= k)
    for k errors among m answers exceeds `delta`.  The risk of what is answered is not monotone in
    the threshold, so `conformal_risk` does not apply.  See arXiv 2110.01052.

    Args:
        correct: [n] whether the answers of n prompts are right.
        confidence: [n]; of a trajectory with many cues, its maximum (`trajectory_scores`).
        grid: [J] thresholds, chosen without these prompts.  The highest must let through at least
            log(delta) / log(1 - alpha) of them, else nothing can be shown.
        alpha: the risk that is allowed.
        delta: the probability that it is exceeded.

    Returns:
        tau; +inf, answer nothing, if not even the highest threshold passes.

    Raises:
        ValueError: unless 0 < alpha < 1 and 0 < delta < 1, there is a confidence for each prompt,
            and a grid.
    """
    _check_probabilities(alpha=alpha, delta=delta)
    right, sure = _pair(correct, confidence)
    tau = np.inf
    for threshold in np.sort(numbers("grid", grid))[::-1]:
        answered = sure >= threshold
        wrong = np.count_nonzero(answered & ~right)
        if scipy.stats.binom.cdf(wrong, np.count_nonzero(answered), alpha) > delta:
            break
        tau = float(threshold)
    return tau


def conformal_risk(losses: Any, alpha: float, bound: float = 1.0) -> int:
    """The first column j of losses [n, J] with (n mean_j + B) / (n + 1) <= alpha: then the expected
    loss of a new prompt at j is at most alpha.

    Losses fall along the columns, from the boldest setting to the most careful, and lie in [0, B].
    See arXiv 2208.02814.

    Returns:
        j; J, which is no column, if not even the last one is careful enough.

    Raises:
        ValueError: if losses rise along a row (use `learn_then_test`), leave [0, B], or alpha < 0.
    """
    table = np.asarray(losses, np.float64)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= bound)).all():
        raise ValueError(
            f"expected losses [n, J] between 0 and bound={bound:g}, got shape {table.shape} from"
            f" {table.min(initial=np.inf):g} to {table.max(initial=-np.inf):g}; give their bound"
        )
    if (np.diff(table, axis=1) > 0).any():
        raise ValueError(
            "expected losses that fall along each row, got some that rise, as the risk of what is"
            " answered does; use risk.learn_then_test"
        )
    if not alpha >= 0:
        raise ValueError(f"expected alpha of at least 0, got {alpha}; pass e.g. alpha=0.1")
    enough = (table.sum(0) + bound) / (len(table) + 1) <= alpha
    return int(np.argmax(enough)) if enough.any() else table.shape[1]


def split_quantile(scores: Any, delta: float) -> float:
    """The ceil((n + 1)(1 - delta))-th smallest of n scores: a new one exceeds it with probability
    at most `delta`.

    Returns:
        The quantile; +inf if that number is above n, for n scores cannot say so much.

    Raises:
        ValueError: unless 0 < delta < 1 and there are scores.
    """
    _check_probabilities(delta=delta)
    ordered = np.sort(numbers("scores", scores))
    # ceil((n + 1)(1 - delta)), without the rounding of 1 - delta.
    place = len(ordered) + 1 - int(np.floor((len(ordered) + 1) * delta * (1 + 1e-12)))
    return float(ordered[place - 1]) if place <= len(ordered) else np.inf


def trajectory_scores(scores: Any, there: Any = None) -> Float[np.ndarray, " n"]:
    """The greatest score of all cues of each trajectory [n, M], on which an exit is calibrated.

    A threshold that each cue exceeds with probability delta is exceeded somewhere along M cues with
    up to M delta; the quantile of these maxima is exceeded with delta.

    Args:
        scores: [n, M].
        there: [n, M] which cues a trajectory has; by default all.

    Raises:
        ValueError: unless both are [n, M]; -inf of a trajectory without cues, which never exits.
    """
    table = np.asarray(scores, np.float64)
    has = np.ones(table.shape, bool) if there is None else np.asarray(there, bool)
    if table.ndim != 2 or table.shape != has.shape:
        raise ValueError(
            f"expected scores and their cues as [n, M], got shapes {table.shape} and {has.shape};"
            " pad shorter trajectories, and say so in `there`"
        )
    return np.where(has, table, -np.inf).max(1, initial=-np.inf)


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """Risk against coverage, from the highest confidence down; float64.

    Attributes:
        threshold: [R] the different confidences.
        coverage: [R] the share of prompts with at least that confidence.
        risk: [R] the share of errors among them.
    """

    threshold: Float[np.ndarray, " R"]
    coverage: Float[np.ndarray, " R"]
    risk: Float[np.ndarray, " R"]

    @property
    def area(self) -> float:
        """The mean risk over coverages (AURC)."""
        return float(np.diff(self.coverage, prepend=0) @ self.risk)


def risk_coverage(correct: Any, confidence: Any) -> RiskCoverage:
    """The errors among what is answered, for every threshold of confidence; ties go together.

    Raises:
        ValueError: unless there is a confidence for each of at least one prompt.
    """
    right, sure = _pair(correct, confidence)
    order = np.argsort(-sure, kind="stable")
    right, sure = right[order], sure[order]
    last = np.append(sure[1:] < sure[:-1], True)
    num = np.arange(1, len(sure) + 1)[last]
    return RiskCoverage(
        threshold=sure[last],
        coverage=num / len(sure),
        risk=np.cumsum(~right)[last] / num,
    )


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class Deferral:
    """Accuracy of two models against the share of prompts that the second answers; float64.

    Attributes:
        order: [n] prompts, the first to defer first.
        deferred: [n + 1] share of prompts that go to the second model, from none to all.
        accuracy: [n + 1] of both together.
    """

    order: Any
    deferred: Float[np.ndarray, " L"]
    accuracy: Float[np.ndarray, " L"]


def deferral_curve(p1: Any, p2: Any, weights: Any = None, by: Any = None) -> Deferral:
    """Accuracy of a cascade that defers more and more prompts, by one sort.

    Deferring where p2 - p1 is greatest is optimal at every share.  To defer where the first model
    is not confident is optimal only if that is the same order.  See arXiv 2307.02764.

    Args:
        p1: [n] P(the first model is right), as known or estimated on held-out prompts.
        p2: [n] of the second.
        weights: [n] of the prompts; by default equal.
        by: [n] what is deferred first, the greatest; by default p2 - p1.

    Raises:
        ValueError: unless all are [n], and weights at least 0 and not all 0.
    """
    first, second = numbers("p1", p1), numbers("p2", p2)
    share = np.ones(len(first)) if weights is None else numbers("weights", weights)
    key = second - first if by is None else numbers("by", by)
    if not len(first) == len(second) == len(share) == len(key):
        raise ValueError(
            f"expected one number for each of {len(first)} prompts, got {len(second)} in p2,"
            f" {len(share)} weights and {len(key)} to sort by"
        )
    if not (share >= 0).all() or not share.sum() > 0:
        raise ValueError(f"expected weights of at least 0, some above, got {weights!r}")
    share = share / share.sum()
    order = np.argsort(-key, kind="stable")
    gain = (share * (second - first))[order]
    return Deferral(
        order=order,
        deferred=np.append(0, np.cumsum(share[order])),
        accuracy=share @ first + np.append(0, np.cumsum(gain)),
    )


def answer_threshold(wrong: float) -> float:
    """The probability of being right from which to answer, where a right answer is worth 1, none 0
    and a wrong one `wrong` <= 0: -r / (1 - r).

    Raises:
        ValueError: if a wrong answer is worth more than none.
    """
    if not wrong <= 0:
        raise ValueError(f"expected a wrong answer to be worth at most 0, got {wrong}; pass -1")
    return -wrong / (1 - wrong) if np.isfinite(wrong) else 1.0


def _check_probabilities(**named: float) -> None:
    for name, value in named.items():
        if not 0 < value < 1:
            raise ValueError(f"expected {name} between 0 and 1, got {value}; pass {name}=0.05")


def _pair(correct: Any, confidence: Any) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    sure, right = numbers("confidence", confidence), np.asarray(correct)
    # NaN, a grade that is missing, would be read as right.
    if not np.isin(right, (0, 1)).all():
        raise ValueError(
            f"expected correct as booleans, got {right[~np.isin(right, (0, 1))][0]}; leave out what"
            " is not known, and say from which grade on an answer is right"
        )
    if right.shape != sure.shape:
        raise ValueError(
            f"expected a confidence for each answer, got shapes {right.shape} and {sure.shape}"
        )
    return right.astype(bool), sure
