"""Adaptive power sampling (arXiv 2610.08563): an alpha for every prompt, moved by how strings agree
in their answers.

With r*(x) in {0, 1} whether a string is correct, pi_alpha proportional to p^alpha and P(alpha) =
E_{pi_alpha}[r*],

    dP / dalpha = Cov_{pi_alpha}(r*, log p) = P (1 - P) (mu_C - mu_I)

mu the mean log p of correct and of incorrect strings: sharper is better where correct strings are
the more probable ones.  Correctness is not known, so agreement with the other strings stands in for
it, and N draws for pi_alpha:

    v_i = share of the other strings with the same answer     z_i = log p(x_i), standardised
    g = mean_i (v_i - mean v) z_i             alpha <- clip(alpha + eta g, alpha_min, alpha_max)

The controller runs on the host, one batch of any sampler of p^alpha at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.sequences import Sequences
from ppl.showing import shown
from ppl.target import Target, check_plain

from ..base import Cost, Guarantee
from ..registry import sampler
from ..results import Choice


@runtime_checkable
class Batch(Protocol):
    """What a sampler of p^alpha returns: strings that count alike, log p(x | prompt) of each, and
    what they took.
    """

    @property
    def sequences(self) -> Sequences: ...
    @property
    def log_prob(self) -> Float[Array, " N"]: ...
    @property
    def cost(self) -> Cost | None: ...


@shown
@dataclasses.dataclass(frozen=True)
class Controller:
    """How alpha moves: learning_rate eta, within bounds; `tolerance` is the |g| below which it
    stays.  See `run`.
    """

    learning_rate: float
    bounds: tuple[float, float]
    tolerance: float

    def step(self, alpha: float, gradient: float) -> float:
        """The next alpha; the same if it is to stay."""
        if abs(gradient) <= self.tolerance:
            return alpha
        return float(np.clip(alpha + self.learning_rate * gradient, *self.bounds))


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/draws/test_adaptive_power.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    sample: Callable[[PRNGKeyArray, Target], Batch],
    answers: Callable[[Sequences], Any],
    *,
    alpha: float | int = 2.0,
    bounds: tuple[float, float] = (1.0, 8.0),
    learning_rate: float = 4.0,
    tolerance: float = 0.02,
    num_batches: int = 6,
    accept: Callable[[Any], bool] = lambda batch: True,
) -> Choice:
    """Draw batches from p^alpha, move alpha towards agreement, and vote at the alpha where it comes
    to rest.

    There is no target: alpha depends on the strings drawn, and agreement is not correctness.

        adaptive_power.run(key, p, lambda key, target: power.run(key, target, num_chains=16),
        answers)

    alpha stops where |g| <= tolerance, where it is at a bound, and where a batch is not accepted;
    what is left of the budget, at least one batch, is spent at the last alpha whose batch was
    accepted (1 if none was).  Where all strings agree equally there is no direction, and more are
    drawn at the same alpha.

    Args:
        key: typed key.
        p: a language model.
        sample: draws a batch for a target p^alpha: `power.run`, `low_temperature.run`,
            `scalable_power.run`.
        answers: strings -> whole numbers [N], equal for equal answers, negative for none.
        alpha: of the first batch.
        bounds: alpha_min and alpha_max.
        learning_rate: eta.
        tolerance: see above.
        num_batches: B, at least 2.
        accept: the quality check of a batch, such as its share of accepted moves being large
            enough.

    Returns:
        `Choice` of all n strings drawn at the alpha of the vote: `scores` are log p of those with
        the majority's answer (of equals the one with the greater mean log p) and -inf elsewhere; of
        all if no string has an answer.  `cost` is of all batches.  `details`, on the host: of the
        batches `alphas` [B], `gradients` [B], g after each, NaN where none was formed, and `passed`
        [B] the quality check; `alpha` of the vote, `answers` [n] as given, and `answer`, the
        majority's, negative if there is none.

    Raises:
        ValueError: unless 0 < alpha_min <= alpha <= alpha_max, learning_rate > 0, tolerance >= 0
            and num_batches >= 2, if p has a power or a potential, or if `answers` does not give one
            whole number for every string.
    """
    controller = Controller(learning_rate, bounds, tolerance)
    _check(p, controller, alpha, num_batches)
    return _drawn(key, p, (sample, answers, accept), controller, alpha, num_batches)


def _drawn(
    key: PRNGKeyArray,
    p: Target,
    functions: tuple[Callable[..., Batch], Callable[[Sequences], Any], Callable[[Any], bool]],
    controller: Controller,
    alpha: float | int,
    num_batches: int,
) -> Choice:
    """`run` with its options checked; `functions` are its `sample`, `answers` and `accept`."""
    sample, answers, accept = functions
    keys, budget = jax.random.split(key, num_batches), num_batches
    found: list[tuple[float, Batch, np.ndarray]] = []
    gradients, passed, resting = [], [], 1.0

    def draw(at: float) -> None:
        batch = sample(keys[len(found)], p ** jnp.float32(at))
        found.append((at, batch, _answers(answers, batch)))

    moving = True
    while moving and len(found) < budget - 1:
        draw(float(alpha))
        passed.append(bool(accept(found[-1][1])))
        gradients.append(np.nan)
        if not passed[-1]:
            break
        resting = float(alpha)
        log_prob, given = _pool(found, resting)
        v = agreement(given)
        if np.ptp(v) > 0:
            gradients[-1] = gradient(v, log_prob)
            alpha = controller.step(resting, gradients[-1])
            moving = alpha != resting
    while len(found) < budget:
        draw(resting)
        passed.append(bool(accept(found[-1][1])))
        gradients.append(np.nan)
    return _result(found, gradients, passed, resting)


def agreement(answers: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """v_i, the share of the other strings with the same answer; 0 without one."""
    same = (answers[:, None] == answers[None]).sum(1) - 1
    return np.where(answers < 0, 0.0, same / max(len(answers) - 1, 1))


def gradient(values: Float[np.ndarray, " N"], log_prob: Float[np.ndarray, " N"]) -> float:
    """g = mean_i (v_i - mean v) z_i, the covariance of v and log p over the latter's spread; 0 if
    there is none.
    """
    spread = log_prob.std()
    if not spread > 1e-6 * max(1.0, float(np.abs(log_prob).max())):
        return 0.0
    return float(np.mean((values - values.mean()) * (log_prob - log_prob.mean())) / spread)


def vote(answers: Int[np.ndarray, " N"], log_prob: Float[np.ndarray, " N"]) -> tuple[int, int]:
    """The answer most often given, of equals the one with the greater mean log p, and the most
    probable string of it.

    Without any answer: -1, and the most probable string of all.
    """
    given = np.unique(answers[answers >= 0])
    if not given.size:
        return -1, int(log_prob.argmax())
    answer = max(given, key=lambda a: ((answers == a).sum(), log_prob[answers == a].mean()))
    return int(answer), int(np.where(answers == answer, log_prob, -np.inf).argmax())


def _check(p: Target, controller: Controller, alpha: float, num_batches: int) -> None:
    check_count("num_batches", num_batches)
    if num_batches < 2:
        raise ValueError("expected at least 2 batches, got 1; the last one is for the vote")
    low, high = controller.bounds
    if not (0 < low <= alpha <= high and np.isfinite(high)):
        raise ValueError(
            f"expected 0 < alpha_min <= alpha <= alpha_max, got {low}, {alpha}, {high}; 1, 2, 8"
            " will do"
        )
    if not (controller.learning_rate > 0 and controller.tolerance >= 0):
        raise ValueError(
            "expected a learning rate above 0 and a tolerance of at least 0, got"
            f" {controller.learning_rate} and"
            f" {controller.tolerance}; g is at most 1/2 in size"
        )
    check_plain(p, "; pass p itself")


def _answers(answers: Callable[[Sequences], Any], batch: Batch) -> np.ndarray:
    given, num = np.asarray(answers(batch.sequences)), batch.sequences.length.shape[0]
    if given.shape != (num,) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"expected one whole number for each of {num} strings, got shape {given.shape} of"
            f" {given.dtype}; number the"
            " answers, and give -1 to strings without one"
        )
    return given


def _pool(found: list, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """log p and answers of everything drawn at `alpha`."""
    at = [
        (np.asarray(batch.log_prob, np.float64), given) for a, batch, given in found if a == alpha
    ]
    return np.concatenate([log_prob for log_prob, _ in at]), np.concatenate(
        [given for _, given in at]
    )


def _result(found: list, gradients: list[float], passed: list[bool], alpha: float) -> Choice:
    log_prob, given = _pool(found, alpha)
    rows = [batch.sequences for a, batch, _ in found if a == alpha]
    sequences = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    answer, best = vote(given, log_prob)
    costs = (Cost() if batch.cost is None else batch.cost for _, batch, _ in found)
    cost = functools.reduce(operator.add, costs)
    scores = log_prob if answer < 0 else np.where(given == answer, log_prob, -np.inf)
    details = {
        "alphas": np.asarray([a for a, _, _ in found]),
        "gradients": np.asarray(gradients),
        "passed": np.asarray(passed),
        "alpha": alpha,
        "answers": given,
        "answer": answer,
    }
    return Choice(
        samples=sequences,
        scores=jnp.asarray(scores, jnp.float32),
        best=jnp.int32(best),
        cost=cost,
        log_prob=jnp.asarray(log_prob, jnp.float32),
        details=details,
    )
