"""How many draws each prompt gets: allocations of a budget that are optimal, and two published ones
that are not, beside them.

    law = coverage.beta_binomial(correct, num).after(correct, num)  # from a few pilot draws
    allocation.greedy(law, 1024)                       # draws [P], for most prompts solved

Every allocation is optimal for what it is given: success rates that are wrong misplace draws.  A
prompt's p is estimated from draws that are part of the budget.  All is float64 numpy on the host.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize

from ppl.checks import check_count, numbers, shares

from .coverage import Known, Posterior
from .laws import Row


def greedy(
    law: Known | Posterior | Row, budget: int, *, most: int | None = None
) -> Int[np.ndarray, " P"]:
    """The draws [P], `budget` in all, after which most prompts are expected to be solved:

        max sum_i E[1 - (1 - p_i)^n_i]    with    sum_i n_i <= budget.

    Every draw goes where it adds most.  What a draw adds falls with the draws before it, so this is
    optimal.  Neither easy nor hopeless prompts get many: at a fixed price n is greatest where p is
    small and above the price.  Draws that add nothing are not made.

    Args:
        law: success rates, known or not (`coverage`); numbers [P] are known ones.
        budget: draws.
        most: of one prompt, for example the size of its pool; None: any number.

    Raises:
        ValueError: if budget or `most` is below 1, or known rates are no probabilities.
    """
    law = law if isinstance(law, Known | Posterior) else Known(p=shares("law", law))
    check_count("budget", budget)
    most = budget if most is None else most
    check_count("most", most)
    first = law.marginal(0)
    draws = np.zeros(first.size, int)
    # Ties go to the earlier prompt.
    queue = [(-gain, i) for i, gain in enumerate(first.tolist()) if gain > 0]
    heapq.heapify(queue)
    for _ in range(budget):
        if not queue:
            break
        gain, i = queue[0]
        draws[i] += 1
        gain *= _ratio(law, i, int(draws[i]))
        if gain < 0 and draws[i] < most:
            heapq.heapreplace(queue, (gain, i))
        else:
            heapq.heappop(queue)
    return draws


def _ratio(law: Known | Posterior, i: int, n: int) -> float:
    """What draw n + 1 adds over what draw n added."""
    if isinstance(law, Known):
        return float(1 - law.p[i])
    return float((law.b[i] + n - 1) / (law.a[i] + law.b[i] + n))


def at_price(p: Row, price: float) -> Float[np.ndarray, " P"]:
    """Draws [P], fractional, of which the last adds just its price: log(price / p) / log(1 - p), 0
    where p <= price.

    Maximises the expected number of solved prompts less price times draws, for n continuous.

    Raises:
        ValueError: unless price is between 0 and 1, and p are probabilities.
    """
    if not 0 < price < 1:
        raise ValueError(
            f"expected a price between 0 and 1, of a draw in units of a solved prompt, got {price}"
        )
    rates = shares("p", p)
    worth = rates > price
    inside = np.where(worth, np.minimum(rates, 1 - 1e-15), 0.5)
    return np.where(worth, np.log(price / inside) / np.log1p(-inside), 0.0)


def ias(p: Row, *, certainty: float = 0.99) -> Int[np.ndarray, " P"]:
    """The draws [P] after which each prompt is solved with probability `certainty`, as instance-
    adaptive scaling allocates (arXiv 2506.09338): ceil(log(1 - C) / log(1 - p)), p clipped to
    [1e-4, 1 - 1e-4].

    A goal for every prompt, not an optimum of a budget: most draws go to prompts that are nearly
    hopeless, where `greedy` makes none.

    Raises:
        ValueError: unless certainty is between 0 and 1, and p are probabilities.
    """
    if not 0 < certainty < 1:
        raise ValueError(f"expected a certainty between 0 and 1, got {certainty}; 0.99 is usual")
    rates = np.clip(shares("p", p), 1e-4, 1 - 1e-4)
    return np.ceil(math.log1p(-certainty) / np.log1p(-rates)).astype(int)


def power_law(scale: Row, alpha: Row, budget: float | int) -> Float[np.ndarray, " J"]:
    """The budgets b [J] of sub-problems that minimise sum_j c_j b_j^-alpha_j with sum_j b_j = B.

    With lambda the price of budget, b_j = (c_j alpha_j / lambda)^(1 / (alpha_j + 1)), and lambda
    such that they sum to B, by bisection of log lambda.  A sub-problem with c_j = 0 gets nothing.

    Args:
        scale: [J] c, the loss at one unit of budget.
        alpha: [J] how fast it falls, above 0.
        budget: B, above 0.

    Raises:
        ValueError: if c is negative or all 0, alpha or budget not above 0, or the rows differ in
            length.
    """
    scale, alpha = _power_laws(scale, alpha, budget)
    with np.errstate(divide="ignore"):
        log_slope = np.log(scale) + np.log(alpha)

    def log_budgets(log_price: float) -> np.ndarray:
        return (log_slope - log_price) / (alpha + 1)

    def excess(log_price: float) -> float:
        return float(np.logaddexp.reduce(log_budgets(log_price))) - math.log(budget)

    # Below `low` the least costly one alone, at `high` none of them, spends the budget.
    costs = (log_slope - (alpha + 1) * math.log(budget))[scale > 0]
    low, high = costs.min() - 1.0, costs.max() + (alpha.max() + 1) * math.log(alpha.size) + 1.0
    found: Any = optimize.bisect(excess, low, high, xtol=1e-13)
    shares_of = np.exp(log_budgets(found))
    return budget * shares_of / shares_of.sum()


def plan_and_budget(scale: Row, alpha: Row, budget: float | int) -> Float[np.ndarray, " J"]:
    """Budgets in proportion to (c_j alpha_j)^(1 / (alpha_j + 1)), as Plan-and-Budget has them
    (arXiv 2505.16122).

    These are `power_law`'s if all alpha are equal, and in general not optimal: a factor of lambda^
    (1 / (alpha_j + 1)) does not cancel.

    Arguments and errors as in `power_law`.
    """
    scale, alpha = _power_laws(scale, alpha, budget)
    weights = (scale * alpha) ** (1 / (alpha + 1))
    return budget * weights / weights.sum()


def for_estimating(p: Row, k: int) -> Float[np.ndarray, " P"]:
    """Shares [P] of draws with which pass@k, averaged over prompts, is estimated with the least
    variance: in proportion to sqrt(p (1 - p)^(2 k - 1)) (arXiv 2510.05197).

    The delta method's optimum, with p estimated beforehand.  `rounded` makes whole numbers of them.

    Raises:
        ValueError: if k < 1, or no p is strictly between 0 and 1.
    """
    check_count("k", k)
    rates = shares("p", p)
    weights = np.sqrt(rates * (1 - rates) ** (2 * k - 1))
    if weights.sum() == 0:
        raise ValueError(
            f"expected a success rate strictly between 0 and 1, got only {np.unique(rates)}; of"
            " others there is nothing to estimate"
        )
    return weights / weights.sum()


def gvm(
    p: Row, gradient_norm: Row, *, smooth: float | int = 1e-3, beta: float | int = 2.0
) -> Float[np.ndarray, " P"]:
    """Shares [P] of draws for rejection sampling in training, of GVM-RAFT (arXiv 2505.02391): in
    proportion to G / sqrt(p + smooth / p^(beta - 1)), 0 where p is 0.

    With smooth = 0 they minimise the variance of the gradient, sum_i G_i^2 / (n_i p_i).  A prompt
    that no pilot draw solved gets nothing, and is never learned: give it a floor.

    Args:
        p: [P] acceptance rates of pilot draws.
        gradient_norm: [P] G, mean norm of the gradient of accepted draws.
        smooth: takes draws from prompts that are nearly hopeless.
        beta: how fast it does.

    Raises:
        ValueError: if the rows differ in length, G is negative, or no prompt has both p and G above
            0.
    """
    rates, norm = shares("p", p), numbers("gradient_norm", gradient_norm)
    if rates.shape != norm.shape or (norm < 0).any() or not (rates * norm > 0).any():
        raise ValueError(
            f"expected a norm of at least 0 for each of {rates.size} prompts, one above 0 where p"
            f" is, got {norm.size} from {norm.min():g} to {norm.max():g}; make more pilot draws"
        )
    known = np.where(rates > 0, rates, 1.0)
    weights = np.where(rates > 0, norm / np.sqrt(known + smooth / known ** (beta - 1)), 0.0)
    return weights / weights.sum()


def going(correct: Row, wrong: Row, num: int, *, balanced: bool = True) -> Bool[np.ndarray, " P"]:
    """Which prompts [P] draw on, by the elimination of Reinforce-Ada (arXiv 2510.04996): until
    there are num // 2 correct draws and num - num // 2 wrong ones, or one correct draw.

    What is kept of such draws has as many correct ones as the rule wants, not as the prompt has:
    take baselines and success rates from all draws, or `coverage.cost_of_pass`.

    Args:
        correct: [P] draws so far that are.
        wrong: [P] draws so far that are not.
        num: draws to keep of each prompt.
        balanced: False: one correct draw is enough.

    Raises:
        ValueError: if num < 1, or the rows differ in length.
    """
    check_count("num", num)
    right, failed = numbers("correct", correct), numbers("wrong", wrong)
    if right.shape != failed.shape:
        raise ValueError(
            f"expected as many counts of wrong draws as of correct ones, got {failed.size} for"
            f" {right.size}; pass one of each prompt"
        )
    half = num // 2
    return (right < half) | (failed < num - half) if balanced else right < 1


def rounded(share: Row, budget: int) -> Int[np.ndarray, " P"]:
    """Whole draws [P] that sum to the budget, by largest remainders; ties go to the earlier prompt.

    Raises:
        ValueError: if budget < 1, a share is negative, or all are 0.
    """
    check_count("budget", budget)
    weights = numbers("share", share)
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(
            f"expected shares of at least 0, some above it, got {weights.min():g} to"
            f" {weights.max():g}; pass what the draws are to be in proportion to"
        )
    ideal = budget * weights / weights.sum()
    whole = np.floor(ideal).astype(int)
    order = np.argsort(whole - ideal, kind="stable")
    whole[order[: budget - whole.sum()]] += 1
    return whole


def _power_laws(
    scale: Row, alpha: Row, budget: float | int
) -> tuple[Float[np.ndarray, " J"], Float[np.ndarray, " J"]]:
    scale, alpha = numbers("scale", scale), numbers("alpha", alpha)
    wrong = scale.shape != alpha.shape or (scale < 0).any() or not (scale > 0).any()
    if wrong or (alpha <= 0).any() or budget <= 0:
        raise ValueError(
            f"expected scales of at least 0, some above it, and as many alpha above 0, with a"
            f" budget above 0, got scale {scale}, alpha {alpha} and budget {budget}; fit losses"
            " c b^-alpha that fall"
        )
    return scale, alpha
