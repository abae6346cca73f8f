"""How often problems are solved in k draws: pass@k, the noise of its estimate, fits that say it for
more draws than there are, and what a solution costs.

    law = coverage.beta_binomial(correct, num)      # c of N draws, for each of P problems
    law.coverage([1, 100, 10_000])                  # of a new problem, far beyond N
    law.after(correct, num).coverage(k)             # of these problems [P], what was drawn counted

A problem of success rate p is solved by k draws with probability 1 - (1 - p)^k.  Over problems
whose p has a density like p^(a - 1) at 0 the unsolved share falls as k^-a (arXiv 2407.21787,
2502.17578): how coverage grows is the law of the hard problems.  All is float64 numpy on the host.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int, Num
from scipy import optimize, special, stats

from ppl.checks import check_count, check_counts, numbers, shares
from ppl.showing import shown

from .laws import Row

Sizes = Row | float | int
"""Numbers of draws: one, or a row of J."""


def pass_at_k_variance(p: float | int, num: int, k: int) -> float:
    """Variance of the unbiased estimate 1 - C(N - c, k) / C(N, k) of 1 - (1 - p)^k from N draws of
    which c are correct, exactly: sum_c Bin(c; N, p) U(c)^2 - (1 - (1 - p)^k)^2.

    Raises:
        ValueError: unless 1 <= k <= N and p is a probability.
    """
    check_counts(num=num, k=k)
    if k > num:
        raise ValueError(
            f"expected at least k = {k} draws, got {num}; beyond them only a fit says something"
            " (coverage.beta_binomial)"
        )
    (rate,) = shares("p", [p])
    correct = np.arange(num + 1)
    # Both terms of the failures, which are small where the successes are near 1.
    log_failed = _log_choose(num - correct, k) - _log_choose(np.asarray([num]), k)
    mean = (1 - rate) ** k
    return float(stats.binom.pmf(correct, num, rate) @ (np.exp(log_failed) - mean) ** 2)


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """P problems whose success rates are known.

    p [P]: of one draw.

    Raises:
        ValueError: unless they are probabilities.
    """

    p: Float[np.ndarray, " P"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", shares("p", self.p))

    def coverage(self, k: Num[ArrayLike, "*P"]) -> Float[np.ndarray, " P"]:
        """1 - (1 - p)^k, k one number or one for each problem."""
        return -np.expm1(special.xlog1py(np.asarray(k, np.float64), -self.p))

    def marginal(self, n: Num[ArrayLike, "*P"]) -> Float[np.ndarray, " P"]:
        """p (1 - p)^n: what draw n + 1 adds to the coverage."""
        return self.p * np.exp(special.xlog1py(np.asarray(n, np.float64), -self.p))


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class Posterior:
    """P problems whose success rates have Beta laws.

    a, b [P].  possible [P]: probability that a problem can be solved at all.
    """

    a: Float[np.ndarray, " P"]
    b: Float[np.ndarray, " P"]
    possible: Float[np.ndarray, " P"]

    def coverage(self, k: Num[ArrayLike, "*P"]) -> Float[np.ndarray, " P"]:
        """E[1 - (1 - p)^k] of k further draws: 1 - B(a, b + k) / B(a, b)."""
        k = np.asarray(k, np.float64)
        return -self.possible * np.expm1(_log_fall(self.a, self.b, k))

    def marginal(self, n: Num[ArrayLike, "*P"]) -> Float[np.ndarray, " P"]:
        """E[p (1 - p)^n] = B(a + 1, b + n) / B(a, b): what draw n + 1 adds, if all are planned
        beforehand.
        """
        n = np.asarray(n, np.float64)
        chance = self.a / (self.a + self.b + n)
        return self.possible * np.exp(_log_fall(self.a, self.b, n)) * chance

    def chance(self, n: Num[ArrayLike, "*P"]) -> Float[np.ndarray, " P"]:
        """P(draw n + 1 is right), given that n draws were wrong: a / (a + b + n) of a problem that
        can be solved.  Where one may look after every draw, draw where this is greatest.
        """
        failed = 1.0 - self.coverage(n)
        return np.divide(self.marginal(n), failed, where=failed > 0, out=np.zeros_like(failed))


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaBinomial:
    """The law of a problem's success rate: impossible with probability `hopeless`, else Beta(a, b).

    log_likelihood: of the counts that it was fitted to, binomial coefficients included.
    """

    a: float
    b: float
    hopeless: float
    log_likelihood: float

    def coverage(self, k: Sizes) -> Float[np.ndarray, "*J"]:
        """E[1 - (1 - p)^k] of a new problem, which falls short of 1 - hopeless as k^-a."""
        k = np.asarray(k, np.float64)
        return np.asarray(-(1 - self.hopeless) * np.expm1(_log_fall(self.a, self.b, k)))

    def after(self, correct: Row, num: Row | int) -> Posterior:
        """What is known of P problems of which c of N draws were correct.

        Arguments and errors as in `beta_binomial`.
        """
        correct, num = _counts(correct, num)
        possible = np.ones(correct.size)
        if self.hopeless > 0:
            unseen = (1 - self.hopeless) * np.exp(_log_fall(self.a, self.b, num.astype(float)))
            possible = np.where(correct > 0, 1.0, unseen / (unseen + self.hopeless))
        return Posterior(a=self.a + correct, b=self.b + num - correct, possible=possible)


def beta_binomial(correct: Row, num: Row | int, *, hopeless: bool = True) -> BetaBinomial:
    """Fit the law of the success rate over problems, by the likelihood of their counts

        h 1{c = 0} + (1 - h) C(N, c) B(a + c, b + N - c) / B(a, b).

    CONSISTENT if success rates are Beta; coverage at k far beyond N hangs on the hard problems
    alone.  Without the point mass h at zero, problems that cannot be solved are taken for hard
    ones, and the extrapolation is biased upward; with it a heavy tail may be taken for h.

    Args:
        correct: [P] c, correct draws of each problem.
        num: N, or [P] of each.
        hopeless: whether there may be problems that no number of draws solves.

    Raises:
        ValueError: unless 0 <= c <= N and N >= 1.
    """
    table, times = np.unique(np.stack(_counts(correct, num)), axis=1, return_counts=True)
    right, total = table
    log_choose = _log_choose(total, right)

    def negative(x: np.ndarray) -> float:
        a, b = np.exp(x[:2])
        log_prob = special.betaln(a + right, b + total - right) - special.betaln(a, b)
        log_prob = np.log1p(-x[2]) + log_choose + log_prob
        if x[2] > 0:
            log_prob = np.where(right == 0, np.logaddexp(np.log(x[2]), log_prob), log_prob)
        return -float(times @ log_prob)

    # Rates near 0, 1 and between; the likelihood has few modes, and the best of three is taken.
    most = 1 - 1e-9 if hopeless else 0.0
    bounds = [(-9.0, 9.0), (-9.0, 9.0), (0.0, most)]
    nothing = float(times[right == 0].sum() / times.sum())
    starts = [(-1.0, 0.5, 0.0), (-1.0, 2.0, 0.1), (1.0, 1.0, 0.9 * nothing)]
    fits = [
        optimize.minimize(negative, np.minimum(start, [9, 9, most]), bounds=bounds)
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.fun)
    a, b = np.exp(best.x[:2])
    return BetaBinomial(
        a=float(a), b=float(b), hopeless=float(best.x[2]), log_likelihood=-float(best.fun)
    )


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentiatedPower:
    """Coverage exp(a k^b), with a and b negative."""

    a: float
    b: float

    def coverage(self, k: Sizes) -> Float[np.ndarray, "*J"]:
        """exp(a k^b)."""
        return np.asarray(np.exp(self.a * np.asarray(k, np.float64) ** self.b))


def exponentiated_power(ks: Row, coverage: Row) -> ExponentiatedPower:
    """Fit exp(a k^b) to a curve of coverage by least squares (arXiv 2407.21787, which takes 40
    log-spaced k).

    A description of the curve, not a law of problems: its residuals depend on each other, since all
    k share their draws, so it has no standard error.

    Args:
        ks: [J] numbers of draws, of which two differ.
        coverage: [J] pass@k, averaged over problems.

    Raises:
        ValueError: for fewer than two k, k below 1 or another number of them, or coverage outside
            of [0, 1].
    """
    ks, coverage = numbers("ks", ks), shares("coverage", coverage)
    if ks.shape != coverage.shape or np.unique(ks).size < 2 or ks.min() < 1:
        raise ValueError(
            f"expected a coverage for each of at least two numbers of draws, got {coverage.size}"
            f" for {np.unique(ks).size}, from {ks.min():g} on; pass np.geomspace(1, N, 40)"
        )
    # log(-log c) = log(-a) + b log k: a line, as far as c is neither 0 nor 1.
    inside = np.clip(coverage, 1e-6, 1 - 1e-6)
    slope, height = np.polyfit(np.log(ks), np.log(-np.log(inside)), 1)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.exp(-np.exp(x[0] - np.exp(x[1]) * np.log(ks))) - coverage

    start = np.array([height, math.log(max(-slope, 1e-3))])
    found = optimize.least_squares(residuals, start, bounds=([-30, -12], [6, 4]))
    return ExponentiatedPower(a=-math.exp(found.x[0]), b=-math.exp(found.x[1]))


@shown
@dataclasses.dataclass(frozen=True, kw_only=True)
class CostOfPass:
    """What a correct answer costs.

    Attributes:
        value: cost per success, unbiased for E[cost] / P(success).
        std_error: of it; infinite for one success.
        success_rate: (r - 1) / (attempts - 1), unbiased for P(success).
    """

    value: float
    std_error: float
    success_rate: float


def cost_of_pass(cost: Row, correct: Bool[ArrayLike, " N"] | list[bool]) -> CostOfPass:
    """E[cost] / P(success) from attempts that were made until the r-th success (arXiv 2504.13359).

    Total cost / r is unbiased (Wald): costs between successes are independent and alike.  Of a
    fixed number of attempts the plug-in has no expectation, since none of them may succeed.

    Args:
        cost: [N] of every attempt, failures included, in order.
        correct: [N]; the last attempt is the r-th success.

    Raises:
        ValueError: if the last attempt failed, or costs and outcomes differ in number.
    """
    spent, right = numbers("cost", cost), np.asarray(correct, bool)
    if spent.shape != right.shape or not right[-1]:
        raise ValueError(
            f"expected the costs of attempts that end with a success, got {spent.size} costs for"
            f" {right.size} outcomes; go on until the r-th success, and count no attempt after it"
        )
    num = int(right.sum())
    cycle = np.cumsum(right) - right
    each = np.bincount(cycle, weights=spent)
    error = float(each.std(ddof=1) / math.sqrt(num)) if num > 1 else math.inf
    rate = (num - 1) / (spent.size - 1) if spent.size > 1 else 1.0
    return CostOfPass(value=float(each.mean()), std_error=error, success_rate=rate)


def premium(p: float | int, k: int) -> float:
    """k p / (1 - (1 - p)^k) >= 1: by what factor drawing k at once, and keeping a right one, raises
    the cost per success over drawing one by one.
    """
    check_count("k", k)
    (rate,) = shares("p", [p])
    return float(k * rate / Known(p=np.asarray([rate])).coverage(k)[0]) if rate > 0 else 1.0


def _counts(correct: Row, num: Row | int) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    right = numbers("correct", correct)
    total = np.broadcast_to(np.asarray(num, np.float64), right.shape)
    whole = (right % 1 == 0).all() and (total % 1 == 0).all()
    if not whole or (right < 0).any() or (right > total).any() or (total < 1).any():
        raise ValueError(
            f"expected counts 0 <= correct <= num, num at least 1, got correct from {right.min():g}"
            f" to {right.max():g} and num from {total.min():g} to {total.max():g}; count correct"
            " draws, and not their share"
        )
    return right.astype(int), total.astype(int)


def _log_choose(n: np.ndarray, k: np.ndarray | int) -> np.ndarray:
    """log C(n, k), -inf where k > n."""
    possible = n >= k
    k = np.where(possible, k, 0)
    return np.where(possible, -np.log1p(n) - special.betaln(n - k + 1, k + 1), -np.inf)


def _log_fall(a: np.ndarray | float, b: np.ndarray | float, k: np.ndarray) -> np.ndarray:
    """log E[(1 - p)^k] of p ~ Beta(a, b)."""
    return np.asarray(special.betaln(a, b + k) - special.betaln(a, b))
