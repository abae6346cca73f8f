"""What is compared on a bank: choices of an answer from n draws, rules that stop earlier, and
allocations of draws over prompts.

Each gives what it costs too.  Draws are independent, so that every method is replayed on draws that
were made once: in random orders, or, where the law of n draws is an average over all subsets of the
bank, exactly that.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy import stats

from samplers.search import allocation, coverage, pools, stopping, votes
from samplers.search.pools import Pool

from .banks import Bank
from .worlds import TEMPERATURE

SHARE = 0.1
"""Of the draws, that best of majority asks of an answer."""
PILOT = 4
"""Draws of each prompt from which an allocation learns its success rate."""
ALL = "all draws"
RULES = {
    ALL: stopping.fixed(1_000_000),  # more than any bank has
    "beta .95": stopping.beta(0.95),
    "e-value .05": stopping.evalue(0.05),
    "window 5": stopping.window(5),
    "doubling .75": stopping.doubling(0.75),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method does at a budget, on average over draws: of each prompt [P] its accuracy and
    its tokens; calls of the verifier or checker, and sequential passes, of a prompt.
    """

    accuracy: Float[np.ndarray, " P"]
    tokens: Float[np.ndarray, " P"]
    reward_calls: float
    depth: float


# Choices from n draws.


def choices(key: PRNGKeyArray, bank: Bank, num: int, num_orders: int) -> dict[str, Found]:
    """Every way to choose an answer from `num` draws, over `num_orders` random parts of the bank.

    `pass@n` is what a perfect checker would choose.
    """
    keys = jax.random.split(key, len(bank.answer))
    means, gated = jax.device_get(_chosen(keys, bank.pools, num, num_orders))
    over_subsets = partial(_over_subsets, k=num)
    correct = bank.correct.astype(np.float32)
    means |= {
        "single draw": bank.correct.mean(1),
        "best of n": over_subsets(bank.scores, bank.correct),
        "pass@n": over_subsets(correct, correct),
    }
    calls = dict.fromkeys(means, float(num)) | {"single draw": 0.0, "majority": 0.0}
    calls["best of majority"] = float(gated.mean())
    depth = float(over_subsets(bank.length, bank.length).mean())
    found = {}
    for name, accuracy in means.items():
        draws, passes = (num, depth) if name != "single draw" else (1, bank.mean_length.mean())
        tokens = draws * bank.mean_length
        found[name] = Found(np.asarray(accuracy, np.float64), tokens, calls[name], float(passes))
    return found


def _over_subsets(scores: Any, values: Any, k: Any) -> Float[np.ndarray, " P"]:
    """The mean of the value at the highest score, over all subsets of k draws."""
    scores, values = jnp.asarray(scores, jnp.float32), jnp.asarray(values, jnp.float32)
    ks = jnp.broadcast_to(jnp.asarray(k, jnp.float32), len(scores))
    weights = jax.vmap(votes.order_weights)(scores, ks)
    return np.asarray((weights * values).sum(1), np.float64)


@partial(jax.jit, static_argnames=("num", "num_orders"))
def _chosen(
    keys: PRNGKeyArray, pool: Pool, num: int, num_orders: int
) -> tuple[dict[str, Array], Array]:
    """How often [P] each choice is right, and how many strings [P] pass best of majority's gate."""

    def one(key: PRNGKeyArray, pool: Pool) -> tuple[dict[str, Array], Array]:
        order_key, *ties = jax.random.split(key, 6)
        ours = pools.take(pool, jax.random.permutation(order_key, pool.num)[:num])
        majority = votes.majority(ties[0], ours)
        rows = {
            "majority": majority.index,
            "weighted vote": votes.weighted(ties[1], ours).index,
            "majority of bests": votes.majority_of_bests(ties[2], ours).index,
            "best of majority": votes.best_of_majority(ties[3], ours, SHARE)[0],
            "soft best of n": votes.soft_best_of(ties[4], ours, TEMPERATURE).index,
        }
        right = {name: (row >= 0) & ours.samples[row] for name, row in rows.items()}
        gated = (ours.answer >= 0) & (majority.mass[ours.answer] >= SHARE)
        return right, gated.sum()

    def of_prompt(key: PRNGKeyArray, pool: Pool) -> Any:
        each = jax.vmap(one, (0, None))(jax.random.split(key, num_orders), pool)
        return jax.tree.map(lambda x: x.mean(0), each)

    return jax.vmap(of_prompt)(keys, pool)


# Rules that stop.


def stops(key: PRNGKeyArray, bank: Bank, num: int, num_orders: int) -> dict[str, Found]:
    """Majorities of what a rule lets be drawn, one string after the other, at most `num`; all rules
    see the same orders.
    """
    keys = jax.random.split(key, len(bank.answer))
    right, found = jnp.asarray(bank.is_right), {}
    for name, rule in RULES.items():
        accuracy, tokens = jax.device_get(_stopped(keys, bank.pools, right, rule, num, num_orders))
        accuracy, tokens = np.asarray(accuracy, np.float64), np.asarray(tokens, np.float64)
        found[name] = Found(accuracy, tokens, 0.0, float(tokens.mean()))
    return found


@partial(jax.jit, static_argnames="num_orders")
def _stopped(
    keys: PRNGKeyArray,
    pool: Pool,
    is_right: Bool[Array, "P N"],
    rule: stopping.Rule,
    num: Int[Array, ""],
    num_orders: int,
) -> tuple[Array, Array]:
    def one(key: PRNGKeyArray, pool: Pool, is_right: Array) -> tuple[Array, Array]:
        out = stopping.replay(key, pool, rule, draws=num[None], num_orders=num_orders)
        right = (out.answer >= 0) & is_right[out.answer]
        return right.mean(), out.tokens.mean()

    return jax.vmap(one)(keys, pool, is_right)


# Allocations.


def allocations(
    rng: np.random.Generator, bank: Bank, num: int, num_orders: int, known: Any = None
) -> dict[str, Found]:
    """Coverage if `num` draws for each prompt are shared out in four ways, and in two more if the
    success rates [P] are known.

    `greedy` and `IAS` learn success rates from a pilot, which they pay; what it solved does not
    count, as if a plan was made from an earlier evaluation.  `unsolved alike` has a checker that
    tells at once: what the pilot solves is done, the others share the rest.
    """
    budget, most = num * len(bank.answer), bank.num
    plans = {"uniform": [_planned(bank, np.full(len(bank.answer), num), np.arange(bank.num), 0)]}
    if known is not None:
        rates = coverage.Known(p=known)
        for name, draws in _two(rates, known, budget, most).items():
            plans[f"{name}, p known"] = [_planned(bank, draws, np.arange(bank.num), 0)]
    if num > PILOT:
        for _ in range(num_orders):
            for name, plan in _piloted(bank, rng.permutation(bank.num), budget).items():
                plans.setdefault(name, []).append(plan)
    return {name: _mean(several) for name, several in plans.items()}


def _two(law: Any, p: Any, budget: int, most: int) -> dict[str, Int[np.ndarray, " P"]]:
    """The greedy plan, and instance-adaptive scaling brought to the same budget."""
    wanted = allocation.ias(p).astype(float)
    return {
        "greedy": allocation.greedy(law, budget, most=most),
        "IAS": _shared_out(wanted, budget, most),
    }


def _shared_out(weights: Float[np.ndarray, " P"], budget: int, most: int) -> Int[np.ndarray, " P"]:
    """Draws in proportion, at most `most` of a prompt: what is above goes to the others."""
    draws = np.zeros(len(weights), int)
    while (left := budget - draws.sum()) > 0 and (open_ := (draws < most) * weights).any():
        draws = np.minimum(draws + allocation.rounded(open_, int(left)), most)
    return draws


def _piloted(bank: Bank, order: Int[np.ndarray, " N"], budget: int) -> dict[str, Found]:
    pilot = bank.correct[:, order[:PILOT]].sum(1)
    rest, most = budget - PILOT * len(pilot), bank.num - PILOT
    counts = np.bincount(pilot, minlength=PILOT + 1)
    law = _fitted(tuple(counts.tolist())).after(pilot, PILOT)
    rate = law.possible * law.a / (law.a + law.b)
    planned = partial(_planned, bank, order=order[PILOT:], pilot=PILOT)
    found = {name: planned(draws) for name, draws in _two(law, rate, rest, most).items()}
    alike = planned(_shared_out((pilot == 0).astype(float), rest, most))
    solved = np.where(pilot > 0, 1.0, alike.accuracy)
    return found | {"unsolved alike": dataclasses.replace(alike, accuracy=solved)}


@functools.cache
def _fitted(times: tuple[int, ...]) -> coverage.BetaBinomial:
    """The law of success rates, from how often 0, 1, ... of a pilot's draws were correct; it serves
    all budgets.
    """
    return coverage.beta_binomial(np.repeat(np.arange(PILOT + 1), times), PILOT)


def _planned(
    bank: Bank, draws: Int[np.ndarray, " P"], order: Int[np.ndarray, " M"], pilot: int
) -> Found:
    """What `draws` [P] of the M draws `order` solve, over all subsets of them, and what they and a
    pilot cost.
    """
    correct, length = bank.correct[:, order], bank.length[:, order]
    missed = stats.hypergeom.pmf(0, len(order), correct.sum(1), draws)
    longest = np.where(draws > 0, _over_subsets(length, length, np.maximum(draws, 1)), 0.0)
    # The pilot comes first.
    before = _over_subsets(length, length, pilot).mean() if pilot else 0.0
    return Found(
        accuracy=1 - missed,
        tokens=(draws + pilot) * bank.mean_length,
        reward_calls=float((draws + pilot).mean()),
        depth=float(longest.mean() + before),
    )


def _mean(plans: list[Found]) -> Found:
    columns = ([getattr(plan, f.name) for plan in plans] for f in dataclasses.fields(Found))
    return Found(*(np.mean(column, axis=0) for column in columns))
