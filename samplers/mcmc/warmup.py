"""Adapting a kernel before sampling: rounds of steps, each followed by a change of the kernel's
parameters.

    make = lambda temperature: suffix.kernel(p**4, temperature=temperature)
    found = warmup.run(key, make, 0.25, x, adapt=warmup.robbins_monro(0.3, lower=0.25))
    out = chains.run(sample_key, found.kernel, found.x, num_samples=1000)

A chain whose kernel depends on its own past has another law than the target; so what is sampled
comes from a kernel that was fixed before, and the warm-up keeps no draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_counts
from ppl.showing import shown

from ..base import Cost, Kernel
from ..results import MoveInfo
from . import chains

Make = Callable[[Any], Kernel]
Adapt = Callable[[Any, Any, int], Any]
"""(params, info of a round's steps with leaves [steps, C, ...], number of the round) -> params."""


@shown
@dataclasses.dataclass(frozen=True)
class Result:
    """A kernel that does not change any more, and where its chains are to start.

    Attributes:
        kernel: made from `params`.
        params: the last.
        x: the chains' positions.
        history: params of every round, the last of them those of the kernel.
        cost: of all steps; None if the kernel does not report it.  `init`, once a round, is not in
            it.
    """

    kernel: Kernel
    params: Any
    x: Any
    history: list[Any]
    cost: Cost | None


def ignore(params: Any, number: int) -> None:
    """A `watch` that does nothing."""


def run(
    key: PRNGKeyArray,
    make: Make,
    params: Any,
    x: Any,
    *,
    adapt: Adapt,
    num_rounds: int = 20,
    steps_per_round: int = 10,
    positions: Callable[[Any], Any] = chains.positions,
    watch: Callable[[Any, int], None] = ignore,
) -> Result:
    """Adapt the parameters of a kernel, and freeze them.

    A state may hold what a kernel's parameters made of it (log-probabilities under its proposal),
    so every round starts from the positions, by `init` of a new kernel.  The steps of a round are
    compiled once for all rounds, as the kernel is an argument of the program; for kernels made of
    closures in every round (`base.Kernel` says what to do).

    Args:
        key: typed key; step i has the key fold_in(key, i).
        make: params -> kernel.
        params: a pytree of arrays to start with.
        x: C positions, for the kernel's `init`.
        adapt: what to make of the params after a round.
        num_rounds: how often the params change.
        steps_per_round: steps that each change is based on.
        positions: reads the positions off the chains' state.
        watch: called after every round with the new params and the number of rounds so far.

    Raises:
        ValueError: unless the counts are at least 1; and as `make` and `init` do.
    """
    check_counts(num_rounds=num_rounds, steps_per_round=steps_per_round)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), params)
    history, cost, kernel = [], None, make(params)
    for number in range(num_rounds):
        first = np.int32(number * steps_per_round)
        state, info = _round(key, kernel.step, kernel.init(x), first, num_steps=steps_per_round)
        x = positions(state)
        spent = jax.tree.map(np.int64, chains.total_cost(info))
        cost = spent if cost is None else jax.tree.map(np.add, cost, spent)
        params = adapt(params, info, number)
        history.append(params)
        kernel = make(params)
        watch(params, number + 1)
    return Result(kernel, params, x, history, cost)


@functools.partial(jax.jit, static_argnames="num_steps")
def _round(key: Any, step: Any, state: Any, first: Any, *, num_steps: int) -> tuple[Any, Any]:
    def one(state: Any, i: Array) -> tuple[Any, Any]:
        return step(jax.random.fold_in(key, i), state)

    return jax.lax.scan(one, state, first + jnp.arange(num_steps, dtype=jnp.int32))


def robbins_monro(
    rate: float, *, gain: float = 1.0, lower: float = 0.0, upper: float = np.inf
) -> Callable[[Any, Any, int], Float[Array, ""]]:
    """Bring acceptance to `rate` by a positive parameter of which more is bolder (a step size, a
    temperature):

        log theta <- log theta + gain (n + 1)^-0.6 (acceptance of round n - rate)

    within [lower, upper].

    The temperature of a proposal for p^alpha is bolder the larger it is above 1 / alpha; below
    that, acceptance falls again.  Robbins and Monro (1951); Andrieu and Thoms (2008).

    Raises:
        ValueError: unless 0 < rate < 1.
    """
    if not 0 < rate < 1:
        raise ValueError(
            f"expected an acceptance rate between 0 and 1, got {rate}; 0.23 and 0.65 are usual"
        )

    def adapt(theta: Any, info: Any, number: int) -> Float[Array, ""]:
        change = gain * (number + 1) ** -0.6 * (acceptance(info) - rate)
        return jnp.clip(theta * jnp.exp(change), lower, upper).astype(jnp.float32)

    return adapt


def acceptance(info: Any) -> Float[Array, ""]:
    """Mean acceptance of what was proposed, over all steps and chains.

    Raises:
        ValueError: if the info has no acceptance.
    """
    if hasattr(info, "acceptance_rate"):  # blackjax
        return jnp.mean(info.acceptance_rate)
    if not isinstance(info, MoveInfo):
        raise ValueError(
            f"expected a MoveInfo or an info with `acceptance_rate`, got {type(info).__name__};"
            " write an `adapt` of your own"
        )
    return info.acceptance
