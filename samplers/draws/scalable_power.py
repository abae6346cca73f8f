"""Scalable power sampling (arXiv 2601.21590): p^alpha token by token, what follows being estimated
by rollouts.

The next token's law under p^alpha is exactly

    pi(v | x_<t) proportional to p(v | x_<t)^alpha zeta(v)
    zeta(v) = E_{y ~ p(. | x_<t v)}[ p(y | x_<t v)^{alpha - 1} ]

and zeta is replaced by the mean over M rollouts y, for the K most probable tokens v.  Drawing from
the plug-in estimate is biased by O(1 / M); the jackknife, M pi-hat - (M - 1) / M sum_s pi-hat
without rollout s, by O(1 / M^2), but it can be negative and is clipped at 0 and normalised again.
So nothing here is properly weighted; where a guarantee is needed at a finite budget, use p^alpha
with `smc.run`, or with a twist that estimates zeta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from ppl.checks import check_counts
from ppl.draw import categorical
from ppl.pytrees import as_pytree
from ppl.rows import at, log_normalised
from ppl.target import Target

from ..base import Cost, Guarantee
from ..registry import sampler
from ..results import Draws
from ..strings import costs, growing
from ..strings.growing import Growing
from ..strings.proposals import as_proposal, bootstrap
from .low_temperature import check_power

PROPOSAL = as_proposal(bootstrap)

_Carry = tuple[Growing, Int[Array, " C"], Cost]
"""The strings, how often an estimate was clipped, and what has been spent."""

Estimate = Callable[
    [Float[Array, "C K"], Float[Array, "C K M"]], tuple[Float[Array, "C K"], Int[Array, " C"]]
]
"""(log p(v)^alpha [C, K], log p(rollout)^{alpha - 1} [C, K, M]) -> the law to draw from [C, K], how
many entries were clipped [C]."""

NOISE = 1e-5
"""A jackknife above -NOISE is taken for 0, not for clipped."""


def plug_in(
    log_power: Float[Array, "C K"], log_values: Float[Array, "C K M"]
) -> tuple[Array, Int[Array, " C"]]:
    """p(v)^alpha times the mean of the rollouts, normalised; biased by O(1 / M)."""
    law = jax.nn.softmax(log_power + jax.nn.logsumexp(log_values, axis=2), axis=1)
    return law, jnp.zeros(law.shape[0], jnp.int32)


def jackknife(
    log_power: Float[Array, "C K"], log_values: Float[Array, "C K M"]
) -> tuple[Array, Int[Array, " C"]]:
    """The jackknife of `plug_in`, clipped at 0 and normalised; biased by O(1 / M^2) where nothing
    is clipped.
    """
    law = jackknife_unclipped(log_power, log_values)
    kept = jnp.maximum(law, 0.0)
    return kept / kept.sum(1, keepdims=True), (law < -NOISE).sum(1, dtype=jnp.int32)


def jackknife_unclipped(
    log_power: Float[Array, "C K"], log_values: Float[Array, "C K M"]
) -> Float[Array, "C K"]:
    """M pi-hat - (M - 1) / M sum_s pi-hat without rollout s of every candidate; sums to 1, entries
    may be negative.
    """
    num = log_values.shape[2]

    def without(s: Array) -> Float[Array, "C K"]:
        return plug_in(log_power, jnp.where(jnp.arange(num) == s, -jnp.inf, log_values))[0]

    others = jax.lax.fori_loop(
        0, num, lambda s, total: total + without(s), jnp.zeros_like(log_power)
    )
    return num * plug_in(log_power, log_values)[0] - (num - 1) / num * others


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/draws/test_scalable_power.py")
def full(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_samples: int = 8,
    num_rollouts: int = 8,
    estimate: Estimate = jackknife,
) -> Draws:
    """Scalable power sampling with all V tokens as candidates and rollouts to their ends: p^alpha
    for M to infinity.

    At a finite M the law is biased.  Every token takes C V M rollouts, so this is for small
    vocabularies.

    Arguments and errors as in `run`.
    """
    return _start(key, target, num_samples, target.lm.vocab_size, num_rollouts, None, estimate)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/draws/test_scalable_power.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_samples: int = 8,
    num_candidates: int = 8,
    num_rollouts: int = 8,
    horizon: int | None = None,
    estimate: Estimate = jackknife,
) -> Draws:
    """Scalable power sampling, in one jit: every token from an estimate of its law under p^alpha.

    There is no target unless all tokens are candidates and rollouts run to their ends (`full`), and
    then only in the limit of many rollouts.

        scalable_power.run(key, p**4)

    Args:
        key: typed key.
        target: p^alpha, alpha > 0; published 4.
        num_samples: C, independent strings with keys of their own.
        num_candidates: K, the most probable tokens, among which the next one is chosen; published
            8.
        num_rollouts: M for each candidate, at least 2 for the jackknife; published 8.  Caches have
            C K M rows.
        horizon: H, the most tokens of a rollout; None runs it to its end.
        estimate: `jackknife`, or `plug_in`.

    Returns:
        `Draws`: `cost` has the rollouts; `details` have `num_clipped` [N], how often, over tokens
        and candidates, the jackknife was negative and was clipped, and `missing_support` [N], the
        greatest share of p(. | x_<t)^alpha outside of the candidates; above 0 the sampler cannot
        tend to p^alpha.  The law that the strings were drawn from is not known.

    Raises:
        ValueError: unless the counts are at least 1 (rollouts 2 for the jackknife), K <= V and
            alpha > 0, or if the target has a potential.
    """
    return _start(key, target, num_samples, num_candidates, num_rollouts, horizon, estimate)


def _start(
    key: PRNGKeyArray,
    target: Target,
    num_samples: int,
    num_candidates: int,
    num_rollouts: int,
    horizon: int | None,
    estimate: Estimate,
) -> Draws:
    horizon = target.max_tokens if horizon is None else horizon
    check_counts(
        num_samples=num_samples,
        num_candidates=num_candidates,
        num_rollouts=num_rollouts,
        horizon=horizon,
    )
    check_power(target)
    if num_candidates > target.lm.vocab_size:
        raise ValueError(
            f"expected at most as many candidates as tokens, {target.lm.vocab_size}, got"
            f" {num_candidates}; pass"
            f" num_candidates={target.lm.vocab_size}"
        )
    if estimate is jackknife and num_rollouts < 2:
        raise ValueError(
            "expected at least 2 rollouts for the jackknife, got 1; pass estimate=plug_in"
        )
    return _run(
        key, target, as_pytree(estimate), num_samples, num_candidates, num_rollouts, horizon
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _run(
    key: Any,
    target: Target,
    estimate: Estimate,
    num: int,
    num_candidates: int,
    num_rollouts: int,
    horizon: int,
) -> Draws:
    chains, sizes = jax.random.split(key, num), (num_candidates, num_rollouts, horizon)

    def one(carry: _Carry) -> _Carry:
        return _longer(chains, target, estimate, sizes, carry)

    start = growing.start(target, PROPOSAL, num)
    carry = one((start, jnp.zeros(num, jnp.int32), costs.prompt(target, PROPOSAL)))
    x, clipped, cost = jax.lax.while_loop(lambda carry: carry[0].active.any(), one, carry)
    details = {"num_clipped": clipped, "missing_support": x.missing}
    return Draws(samples=x.sequences, log_prob=x.log_prob, cost=cost, details=details)


def _longer(
    chains: Key[Array, " C"],
    target: Target,
    estimate: Estimate,
    sizes: tuple[int, int, int],
    carry: _Carry,
) -> _Carry:
    """One more token of every string, from the estimate of its law."""
    (x, clipped, cost), (num_candidates, *rollouts) = carry, sizes
    before = x
    x, logits = growing.forward(target, growing.fresh(x))
    rollout_keys, choice_keys = _keys(chains, x)
    log_p = log_normalised(logits)
    best, candidates = jax.lax.top_k(log_p, num_candidates)
    log_values, spent = _rollouts(rollout_keys, target, x, candidates, *rollouts)
    law, more = estimate(target.power * best, (target.power - 1) * log_values)
    choice, _ = categorical(choice_keys, jnp.log(law))
    outside = _share_outside(target.power * best, target.power * log_p)
    seen = {
        "log_prob": x.log_prob + jnp.where(x.active, at(best, choice), 0.0),
        "missing": jnp.maximum(before.missing, jnp.where(x.active, outside, 0.0)),
    }
    clipped = clipped + jnp.where(x.active, more, 0)
    x, _ = growing.take(target, PROPOSAL, x, at(candidates, choice), x.active)
    cost = cost + spent + costs.of_round(target, PROPOSAL, x)
    return dataclasses.replace(x, **seen), clipped, cost


def _keys(chains: Key[Array, " C"], x: Growing) -> Key[Array, "2 C"]:
    """Of the rollouts and of the choice of every chain's next token."""
    t = jnp.where(x.active, x.sequences.length, 0).max()
    own = jax.vmap(jax.random.fold_in, (0, None))(chains, t)
    return jax.vmap(jax.random.split, out_axes=1)(own)


def _share_outside(best: Float[Array, "C K"], everything: Float[Array, "C V"]) -> Array:
    """The share [C] of exp(everything) that is not in exp(best)."""
    kept = jax.nn.logsumexp(best, axis=1) - jax.nn.logsumexp(everything, axis=1)
    return -jnp.expm1(kept)


def _rollouts(
    keys: Key[Array, " C"],
    target: Target,
    x: Growing,
    candidates: Int[Array, "C K"],
    num: int,
    horizon: int,
) -> tuple[Float[Array, "C K M"], Cost]:
    """log p of `num` rollouts after every candidate; the empty one after EOS or at the horizon."""
    shape, rows = (*candidates.shape, num), candidates.shape[1] * num
    own = jax.vmap(lambda key: jax.random.split(key, rows))(keys).reshape(-1)
    wide = growing.reorder(
        target, PROPOSAL, x, jnp.repeat(jnp.arange(shape[0], dtype=jnp.int32), rows)
    )
    token = jnp.repeat(candidates.reshape(-1), num)
    begun, _ = growing.take(target, PROPOSAL, growing.fresh(wide), token, wide.active)
    begun = growing.fresh(begun)

    def keys_of(x: Growing) -> Key[Array, " R"]:
        return jax.vmap(jax.random.fold_in, (0, None))(own, x.drawn.max())

    longest = begun.sequences.length + horizon
    ends = growing.complete(keys_of, target, PROPOSAL, begun, longest)
    log_p = (ends.log_prob - begun.log_prob).reshape(shape)
    return log_p, costs.of_round(target, PROPOSAL, ends)
