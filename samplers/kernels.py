"""Kernels out of kernels and moves: cycles, mixtures and repetitions, Metropolis-Hastings, and the
way back to moves.

With transition matrices K_k that all leave pi invariant,

    cycle     K_1 K_2 ... K_n           invariant; reversible only if it is a palindrome
    mixture   sum_k p_k K_k             invariant; reversible if all K_k are
    repeat    K^n                       invariant; reversible if K is

The parts must share one chain state: they target one law, and keep the same things about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.rows import where_rows
from ppl.showing import shown

from .base import Kernel, Move, X


@shown
class Choice(NamedTuple):
    """What a step of a mixture did: which part ran [], and the infos of all parts, zeros for those
    that did not.

    So what is additive (`Cost`) may be summed over the parts.
    """

    chosen: Int[Array, ""]
    infos: tuple


@shown
class Decision(NamedTuple):
    """What a step of `mh` did: whether y was taken [C], and the logarithm of its Hastings ratio
    [C]; NaN rejects.
    """

    accepted: Bool[Array, " C"]
    log_ratio: Float[Array, " C"]


def cycle(*kernels: Kernel) -> Kernel:
    """The kernels one after another in every step; info is the tuple of theirs.

    Raises:
        ValueError: without kernels; by `init`, if theirs do not agree on the state (`mixture`
            alike), which under jit is seen for its structure only.  Kernels with different targets
            may have the same state: that is not seen.
    """
    _check_some(kernels)

    def step(key: PRNGKeyArray, state: X) -> tuple[X, tuple]:
        infos = []
        for own_key, kernel in zip(jax.random.split(key, len(kernels)), kernels, strict=True):
            state, info = kernel.step(own_key, state)
            infos.append(info)
        return state, tuple(infos)

    return Kernel(_common_init(kernels), step)


def mixture(
    *kernels: Kernel, probs: Sequence[float | int] | Float[Any, " K"] | None = None
) -> Kernel:
    """One of the kernels in every step, drawn without looking at the state; info is `Choice`.

    All chains of a batch make the same choice, so that only one kernel runs.  Each of them has the
    transition matrix sum_k p_k K_k for itself, but they are no longer independent of each other:
    invariance is exact, and standard errors across chains are a little off in short runs.

    Args:
        kernels: K of them.
        probs: p, positive, normalised here; by default all equal.

    Raises:
        ValueError: unless there is one positive number per kernel; and as in `cycle`.
    """
    _check_some(kernels)
    probs = jnp.ones(len(kernels)) if probs is None else jnp.asarray(probs, jnp.float32)
    if probs.shape != (len(kernels),) or (not isinstance(probs, Tracer) and not (probs > 0).all()):
        raise ValueError(
            f"expected one positive probability for each of {len(kernels)} kernels, got {probs};"
            " leave out kernels that"
            " are never to run"
        )

    def step(key: PRNGKeyArray, state: X) -> tuple[X, Choice]:
        choice_key, step_key = jax.random.split(key)
        nothing = [
            jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(k.step, step_key, state)[1],
            )
            for k in kernels
        ]

        def run(k: int) -> tuple[X, tuple]:
            after, info = kernels[k].step(step_key, state)
            return after, (*nothing[:k], info, *nothing[k + 1 :])

        chosen = jax.random.categorical(choice_key, jnp.log(probs)).astype(jnp.int32)
        state, infos = jax.lax.switch(chosen, [lambda k=k: run(k) for k in range(len(kernels))])
        return state, Choice(chosen, infos)

    return Kernel(_common_init(kernels), step)


def repeat(kernel: Kernel, num: int) -> Kernel:
    """`num` steps as one; info has a leading axis of that many.

    Raises:
        ValueError: unless num >= 1.
    """
    check_count("num", num)

    def step(key: PRNGKeyArray, state: X) -> tuple[X, Any]:
        return jax.lax.scan(
            lambda x, own_key: kernel.step(own_key, x), state, jax.random.split(key, num)
        )

    return Kernel(kernel.init, step)


def mh(move: Move) -> Kernel:
    """Metropolis-Hastings: every chain takes the y that `move` draws with probability min(1,
    exp(dw)); else it stays.

    That leaves gamma invariant if the move's weight is a Hastings ratio, i.e. if the move is its
    own reverse:

        dw(x, y) = log gamma(y) + log q(x | y) - log gamma(x) - log q(y | x) = -dw(y, x)

    LAW 2 alone is not enough: it allows weights with any backward law in place of q(x | y), and
    accepting by those is wrong.  `samplers.testing.check_hastings` asks `assess` about it.

    The chain state is the move's, as given; info is `Decision`.
    """

    def step(key: PRNGKeyArray, x: X) -> tuple[X, Decision]:
        move_key, accept_key = jax.random.split(key)
        y, log_ratio = move.sample(move_key, x)
        keys = jax.random.split(accept_key, log_ratio.shape[0])
        accepted = jnp.log(jax.vmap(jax.random.uniform)(keys)) < log_ratio
        return where_rows(accepted, y, x), Decision(accepted, log_ratio)

    return Kernel(lambda x: x, step)


def as_move(kernel: Kernel) -> Move:
    """A step of `kernel` as a move over its chain states, dw = 0: rejuvenation.

    LAW 2 for weights that are proper for what the kernel leaves invariant, however they were
    selected.
    """

    def sample(key: PRNGKeyArray, x: X) -> tuple[X, Float[Array, " N"]]:
        y, _ = kernel.step(key, x)
        return y, jnp.zeros(jax.tree.leaves(x)[0].shape[0], jnp.float32)

    return Move(sample)


def _check_some(kernels: tuple[Kernel, ...]) -> None:
    if not kernels:
        raise ValueError(
            "expected at least one kernel, got none; a chain that never moves samples nothing"
        )


def _common_init(kernels: tuple[Kernel, ...]) -> Any:
    def init(x: X) -> X:
        states = [kernel.init(x) for kernel in kernels]
        for number, other in enumerate(states[1:], 1):
            place = _difference(states[0], other)
            if place is not None:
                raise ValueError(
                    "expected kernels with the same chain state, which takes one target and one"
                    " proposal, got kernels 0"
                    f" and {number} whose states differ {place}; give them the same target and"
                    " proposal"
                )
        return states[0]

    return init


def _difference(a: X, b: X) -> str | None:
    """Where two states differ, if they do; values are compared up to rounding, and not
    if traced.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        return "in structure"
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        place = f"at {jax.tree_util.keystr(path) or 'the array itself'}"
        kinds = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in (x, y)]
        if kinds[0] != kinds[1]:
            return f"{place}, {kinds[0]} and {kinds[1]}"
        same = jnp.isclose(x, y, rtol=1e-4, atol=1e-4, equal_nan=True).all()
        if not isinstance(same, Tracer) and not same:
            return place
    return None
