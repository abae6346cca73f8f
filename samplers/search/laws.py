"""Exact laws of what is chosen from n independent draws: best-of-n, soft best-of-n, the majority.

    laws.best_of_n(log_p, scores, 16)        # P(x is chosen), for every string x
    laws.best_of_n_kl(log_p, scores, 16)     # how far that is from p; at most log n - (n - 1) / n
    laws.majority([0.45, 0.35, 0.2], 21)     # P(an answer wins the vote)

They are laws of a selector that is given: where strings can be enumerated they say what a pool
would have chosen, without drawing it.  With F(v) = P(score <= v), F'(v) = P(score < v) and n draws,

    best of n    P(x) = p(x) (F(v)^n - F'(v)^n) / (F(v) - F'(v)),    v the score of x
    soft         P(x) = n p(x) w(x) E[1 / (w(x) + W)],               w = exp(score / lambda),
                                                                     W the weights of n - 1 draws
    majority     P(a) = E[1{N_a is greatest} / number of answers with N_a],    N multinomial

Ties are uniform over the tied draws, or answers.  All is float64 numpy on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float, Int, Num
from scipy import special, stats

from ppl.checks import check_count, numbers, probabilities

Row = Num[ArrayLike, " X"] | Sequence[float] | Sequence[int]
"""One number for each of X things: any array, or a list."""

STEP = 0.15
"""Of the trapezoids in log u of `soft_of_levels`, whose error falls as exp(-pi^2 / STEP)."""
TAIL = 40.0
"""exp(-TAIL) of an integral is left out at its ends."""


def best_of_n(log_p: Row, scores: Row, n: int) -> Float[np.ndarray, " X"]:
    """P(x is the draw of the highest score among n), ties uniform over the tied draws (arXiv
    2401.01879).

    Args:
        log_p: [X] of all strings; normalised here.
        scores: [X]; -inf is the lowest score, not a string that cannot be chosen.
        n: draws.

    Raises:
        ValueError: if n < 1, the rows differ in length, or something is NaN.
    """
    check_count("n", n)
    p, level, mass, _ = _levels(log_p, scores)
    with np.errstate(invalid="ignore"):
        ratio = np.where(mass > 0, _best_level(mass, n) / mass, 0.0)
    return p * ratio[level]


def best_of_n_kl(log_p: Row, scores: Row, n: int) -> float:
    """KL(best of n | p), in nats: over levels of the score, sum D log(D / M) with M a level's mass
    and D = F^n - F'^n that of the best.

    It is log n - (n - 1) / n only if no two draws ever tie.  With ties it is less, and it
    saturates at -log M of the highest level, where the formula goes on growing.

    Arguments and errors as in `best_of_n`.
    """
    check_count("n", n)
    _, _, mass, _ = _levels(log_p, scores)
    best = _best_level(mass, n)
    seen = best > 0
    return float((best[seen] * np.log(best[seen] / mass[seen])).sum())


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: KL(best of n | p) of continuous scores, a bound for all others."""
    check_count("n", n)
    return math.log(n) - (n - 1) / n


def best_of_n_moments(log_p: Row, scores: Row, n: int) -> tuple[float, float]:
    """Mean and variance of the highest of n scores.

    Arguments and errors as in `best_of_n`; where a score of -inf may be the highest the mean is
    -inf and the variance NaN.
    """
    check_count("n", n)
    _, _, mass, values = _levels(log_p, scores)
    best = _best_level(mass, n)
    seen = best > 0
    best, values = best[seen], values[seen]
    mean = float(best @ values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, float(best @ (values - mean) ** 2)


def expected_max(probs: Num[ArrayLike, "N B"], values: Row) -> float:
    """E of the highest of N independent draws, each with a law of its own over B values:

        sum_b v_b (prod_i F_i(v_b) - prod_i F_i(v_b-1)),

    what a set of candidates is worth whose laws are predicted (the utility of arXiv 2512.01457).
    Draws that depend on each other, such as answers on one chain, are worth less.

    Raises:
        ValueError: unless every row holds probabilities that sum to one, one for every value.
    """
    values = numbers("values", values)
    rows = np.stack([probabilities("every law", row) for row in np.asarray(probs)])
    if rows.shape[1] != values.size:
        raise ValueError(
            f"expected probs of shape [N, {values.size}], one for every value, got"
            f" {list(rows.shape)}; give each of the N draws its probabilities of the same values"
        )
    order = np.argsort(values)
    highest = np.prod(np.cumsum(rows[:, order], axis=1), axis=0)
    return float(np.diff(highest, prepend=0.0) @ values[order])


def soft_best_of_n(
    log_p: Row, scores: Row, n: int, temperature: float | int
) -> Float[np.ndarray, " X"]:
    """P(x) of drawing n strings and taking one in proportion to exp(score / temperature).

    Between p (n = 1, or an infinite temperature) and p exp(score / temperature) (n to infinity); at
    temperature 0 it is `best_of_n`.  KL(tilted | soft) <= log(1 + CV^2 / n), with CV^2 the relative
    variance of the weights under p (arXiv 2505.03156).  The expectation is an integral over u,

        E[1 / (w + W)] = int_0^inf exp(-u w) E[exp(-u w(X))]^(n - 1) du,

    by trapezoids in log u, whose error is below rounding.

    Arguments and errors as in `best_of_n`; scores of -inf have weight 0 and are never taken, unless
    all draws have it, which has no law: then the probabilities sum to less than one.
    """
    check_count("n", n)
    if temperature < 0 or math.isnan(temperature):
        raise ValueError(
            f"expected a temperature of at least 0, got {temperature}; 0 is the best of n"
        )
    if temperature == 0:
        return best_of_n(log_p, scores, n)
    p, level, mass, values = _levels(log_p, scores)
    taken = soft_of_levels(mass, values / temperature, n)
    with np.errstate(invalid="ignore"):
        return p * np.where(mass > 0, taken / mass, 0.0)[level]


def soft_of_levels(
    mass: Float[np.ndarray, " L"], log_w: Float[np.ndarray, " L"], n: int
) -> Float[np.ndarray, " L"]:
    """The law of soft best-of-n over L outcomes of probability `mass` and weight exp(log_w): n m w
    E[1 / (w + W)], the integral of `soft_best_of_n` over u = e^s.
    """
    positive = (mass > 0) & (log_w > -np.inf)
    taken = np.zeros(mass.size)
    if not positive.any():
        return taken
    log_w = log_w - log_w[positive].max()
    start, end = -math.log(n) - TAIL, -log_w[positive].min() + math.log(TAIL)
    for s in np.arange(start, end + STEP, STEP):
        with np.errstate(over="ignore"):
            spent = np.exp(s + log_w)
        others = (mass @ np.exp(-spent)) ** (n - 1)
        taken += STEP * n * mass * np.exp(s + log_w - spent) * others
    return taken


def majority(probs: Row, n: int) -> Float[np.ndarray, " K"]:
    """P(an answer has the most of n votes), ties uniform over the tied answers: the law of self-
    consistency (arXiv 2203.11171).

    Exactly, by a dynamic programme: over m, the winner's votes, with the others' votes independent
    Poisson given that all sum to n, and 1 / (number of winners) = int_0^1 y^(others that tie) dy by
    Gauss-Legendre, which is exact for polynomials.  It takes about K n^2 log n steps: 0.1 s at
    K = 4, n = 160.  Two votes are worth no more than one; and where the right answer is not the
    likeliest one, its probability falls to 0.

    Args:
        probs: [K] of the answers of one draw.
        n: draws.

    Raises:
        ValueError: if n < 1 or these are no probabilities.
    """
    check_count("n", n)
    p = probabilities("probs", probs)
    votes = stats.poisson.pmf(np.arange(n + 1), n * p[:, None])
    law = np.zeros(p.size)
    # Fewer votes than ceil(n / K) are never the most.
    for most in range(-(-n // p.size), n + 1):
        nodes, weights = np.polynomial.legendre.leggauss(n // most // 2 + 1)
        for y, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            others = votes[:, : most + 1].copy()
            others[:, most] *= y
            law += weight * votes[:, most] * _product_of_others(others, n - most)
    return law / stats.poisson.pmf(n, n)


def _product_of_others(
    polynomials: Float[np.ndarray, "K M"], power: int
) -> Float[np.ndarray, " K"]:
    """For each k the coefficient of x^power in the product of all polynomials but the k-th."""
    num = polynomials.shape[0]

    def running(rows: np.ndarray) -> list[np.ndarray]:
        """The products of the first 0, ..., K - 1 of them, as far as that power."""
        products: list[np.ndarray] = [np.ones(1)]
        for row in rows[:-1]:
            products.append(np.convolve(products[-1], row)[: power + 1])
        return products

    before, after = running(polynomials), running(polynomials[::-1])[::-1]
    found = np.zeros(num)
    for k in range(num):
        left, right = before[k], after[k]
        low, high = max(0, power - right.size + 1), min(left.size - 1, power)
        if low <= high:
            found[k] = left[low : high + 1] @ right[power - high : power - low + 1][::-1]
    return found


def _levels(
    log_p: Row, scores: Row
) -> tuple[
    Float[np.ndarray, " X"],
    Int[np.ndarray, " X"],
    Float[np.ndarray, " L"],
    Float[np.ndarray, " L"],
]:
    """Probabilities [X], and the levels of the score in ascending order: each string's, their
    masses and values [L].
    """
    log_p, scores = numbers("log_p", log_p), numbers("scores", scores)
    if log_p.shape != scores.shape:
        raise ValueError(
            f"expected a score for each of {log_p.size} strings, got {scores.size}; pass both in"
            " the same order"
        )
    log_z = special.logsumexp(log_p)
    if not math.isfinite(log_z):
        raise ValueError(
            "expected log_p of strings of which some are possible, got a total of"
            f" {math.exp(log_z)}; pass log-probabilities, 0 and below"
        )
    p = np.exp(log_p - log_z)
    values, level = np.unique(scores, return_inverse=True)
    return p, level, np.bincount(level, weights=p, minlength=values.size), values


def _best_level(mass: Float[np.ndarray, " L"], n: int) -> Float[np.ndarray, " L"]:
    """F^n - F'^n of every level, as F^n (1 - (F' / F)^n): nothing cancels."""
    below_or_at = np.cumsum(mass)
    above = np.cumsum(mass[::-1])[::-1] - mass
    with np.errstate(divide="ignore", invalid="ignore"):
        log_f = np.where(above < 0.5, np.log1p(-above), np.log(below_or_at))
        share = np.where(mass > 0, np.minimum(mass / below_or_at, 1.0), 0.0)
        return np.where(mass > 0, np.exp(n * log_f) * -np.expm1(n * np.log1p(-share)), 0.0)
