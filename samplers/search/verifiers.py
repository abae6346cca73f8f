"""What imperfect verifiers and judges do to a search, exactly.

    curve = verifiers.accept_curve([0.58, 0.42], [0.87, 0.13], completeness=1.0, soundness=0.75)
    curve.precision, curve.best_num(-1.0)      # falls with the attempts; when to stop
    verifiers.judge_error(8, truth=0.5, target=1.5)      # a wrong judge has a best k
    verifiers.iso_cost(64, [0.4, 0.6], true_positive=0.8, false_positive=0.3)   # solve or verify?

More draws find more correct answers, and more that are taken for correct.  Precision, where a wrong
answer costs something, has its optimum at few draws.  All is float64 numpy on the host.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from ppl.checks import check_count, check_counts, probabilities, shares
from ppl.showing import shown

from .laws import Row, best_of_n, majority, soft_of_levels

HARD_STEP = 0.02
"""Of the trapezoids in log distance of `judge_error` at temperature 0."""
SPREAD = 8.0
"""Standard deviations of the answers beyond which nothing is integrated."""
COLDEST = 0.1
"""The lowest positive temperature over the answers' variance that `judge_error` integrates."""


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptCurve:
    """What is accepted within 1, ..., K attempts.

    Attributes:
        accepted: [K] P(some attempt was accepted).
        correct: [K] P(it was accepted, and is correct).
        ceiling: of `correct`, as K grows.
    """

    accepted: Float[np.ndarray, " K"]
    correct: Float[np.ndarray, " K"]
    ceiling: float

    @property
    def precision(self) -> Float[np.ndarray, " K"]:
        """P(correct | accepted) [K]; NaN where nothing is accepted."""
        with np.errstate(invalid="ignore"):
            return self.correct / self.accepted

    def value(self, wrong: float | int) -> Float[np.ndarray, " K"]:
        """Expected value [K]: a correct answer is worth 1, none 0, and a wrong one `wrong`."""
        return self.correct + wrong * (self.accepted - self.correct)

    def best_num(self, wrong: float | int) -> int:
        """The number of attempts, 0..K, of greatest value; the least of them, and K where the value
        still grows.
        """
        return int(np.argmax(np.append(0.0, self.value(wrong))))


def accept_curve(
    probs: Row, solved: Row, *, completeness: float | int, soundness: float | int, num: int = 64
) -> AcceptCurve:
    """Draw until a verifier accepts, at most `num` times, then abstain (arXiv 2411.17501).

    A problem of class i, which has probability p_i, is solved by a draw with probability r_i; the
    verifier accepts correct draws with probability c and wrong ones with 1 - s, each anew:

        A_i = c r_i + (1 - s) (1 - r_i)
        P(accepted within K)          = sum_i p_i (1 - (1 - A_i)^K)
        P(accepted within K, correct) = sum_i p_i c r_i (1 - (1 - A_i)^K) / A_i

    Of one class precision does not depend on K; of several it falls, for what is accepted late is
    of the hard ones.

    Args:
        probs: [I] p.
        solved: [I] r.
        completeness: c.
        soundness: s.
        num: K.

    Raises:
        ValueError: if `probs` are no probabilities, the others not between 0 and 1, rows differ in
            length, or num < 1.
    """
    check_count("num", num)
    p, r = probabilities("probs", probs), shares("solved", solved)
    if p.shape != r.shape:
        raise ValueError(
            f"expected a success rate for each of {p.size} classes, got {r.size}; pass one each"
        )
    c, s = shares("completeness and soundness", [completeness, soundness])
    accept = c * r + (1 - s) * (1 - r)
    within = 1 - (1 - accept) ** np.arange(1, num + 1)[:, None]
    right = np.divide(c * r, accept, where=accept > 0, out=np.zeros_like(accept))
    return AcceptCurve(accepted=within @ p, correct=within @ (p * right), ceiling=float(p @ right))


def judge_error(
    k: int,
    *,
    mean: float | int = 0.0,
    std: float | int = 1.0,
    truth: float | int,
    target: float | int,
    temperature: float | int = 0.0,
) -> float:
    """E (y - truth)^2 of the answer y that a judge takes from k (arXiv 2512.19905).

    Answers are N(mean, std^2).  The judge takes one in proportion to exp(-(y - target)^2 /
    temperature); at temperature 0 the one nearest to its target:

        int (y - truth)^2 k f(y) P(|Y - target| > |y - target|)^(k - 1) dy.

    With target = truth the error falls as 1 / k^2; with another target k has an optimum, and the
    error goes to (target - truth)^2.

    Raises:
        ValueError: if k < 1, std is not above 0, or a positive temperature is below 0.1 std^2,
            where the integral would need too many points.
    """
    check_count("k", k)
    if std <= 0 or not (temperature == 0 or temperature >= COLDEST * std**2):
        raise ValueError(
            f"expected std above 0, and a temperature of 0 or at least {COLDEST:g} std^2, got std"
            f" {std} and temperature {temperature}; 0 takes the best of k"
        )
    # In units of std, from the judge's target.
    mean, truth = (mean - target) / std, (truth - target) / std
    if temperature == 0:
        return std**2 * _hard(k, mean, truth)
    # Far out the weights bend over a distance of temperature / reach.
    reach = SPREAD + abs(mean)
    step = min(0.05, 0.8 * temperature / std**2 / reach)
    y = np.arange(mean - SPREAD, mean + SPREAD, step)
    mass = stats.norm.pdf(y, mean) * step
    taken = soft_of_levels(mass / mass.sum(), -(y**2) * std**2 / temperature, k)
    return float(std**2 * (taken @ (y - truth) ** 2))


def _hard(k: int, mean: float, truth: float) -> float:
    """The best of k by |y|, y ~ N(mean, 1): over log |y|, which ends at both sides."""
    u = np.exp(np.arange(-math.log(k) - 40.0, math.log(SPREAD + abs(mean)), HARD_STEP))
    farther = stats.norm.sf(u, mean) + stats.norm.cdf(-u, mean)
    error = (u - truth) ** 2 * stats.norm.pdf(u, mean)
    error += (u + truth) ** 2 * stats.norm.pdf(-u, mean)
    return float(HARD_STEP * k * (u * error * farther ** (k - 1)).sum())


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoCost:
    """What a budget buys with 0, ..., V verifications of every solution.

    Attributes:
        num_solutions: [V + 1], as many as can be paid; 0 where not even one can.
        accuracy: [V + 1]; NaN where there is none.
    """

    num_solutions: Int[np.ndarray, " J"]
    accuracy: Float[np.ndarray, " J"]

    @property
    def best(self) -> int:
        """Verifications per solution of the greatest accuracy; 0 is the majority vote."""
        return int(np.nanargmax(self.accuracy))


def iso_cost(
    budget: float | int,
    probs: Row,
    *,
    true_positive: float | int,
    false_positive: float | int,
    verify_cost: float | int = 1.0,
    max_votes: int = 16,
) -> IsoCost:
    """When to solve and when to verify (arXiv 2504.01005): accuracy of S solutions with V votes of
    a verifier each, at one cost S (1 + lambda V) <= budget.

    Votes are independent, yes with the true-positive rate for a correct solution and the
    false-positive rate for a wrong one.  The solution with most votes is taken, ties uniform over
    solutions: best-of-S with binomial scores, so that the accuracy is exact.  V = 0 is the majority
    of S answers.

    Args:
        budget: in solutions.
        probs: [K] of the answers of one solution, of which the first is correct.
        true_positive: P(yes | correct).
        false_positive: P(yes | wrong).
        verify_cost: lambda, of one vote.
        max_votes: the greatest V.

    Raises:
        ValueError: for rates outside of [0, 1], `probs` that do not sum to one, a verify_cost below
            0, or a budget below 1, which no solution fits in.
    """
    check_counts(max_votes=max_votes)
    p = probabilities("probs", probs)
    rates = shares("the verifier's rates", [true_positive, false_positive])
    if verify_cost < 0 or budget < 1:
        raise ValueError(
            f"expected a budget of at least one solution and a verify_cost of at least 0, got"
            f" {budget} and {verify_cost}; both are in units of a solution's cost"
        )
    votes = np.arange(max_votes + 1)
    # What is paid exactly is paid: 3 * 1.1 = 3.3000000000000003.
    nums = np.floor(budget / (1 + verify_cost * votes) + 1e-9).astype(int)
    accuracy = [majority(p, int(nums[0]))[0]]
    for v, num in zip(votes[1:].tolist(), nums[1:].tolist(), strict=True):
        scores = np.arange(v + 1)
        mass = np.array([[p[0]], [1 - p[0]]]) * stats.binom.pmf(scores, v, rates[:, None])
        with np.errstate(divide="ignore"):
            log_p = np.log(mass.ravel())
        law = best_of_n(log_p, np.tile(scores, 2), num) if num else np.full(2 * v + 2, np.nan)
        accuracy.append(law[: v + 1].sum())
    return IsoCost(num_solutions=nums, accuracy=np.array(accuracy))
