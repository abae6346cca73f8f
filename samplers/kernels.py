"""Kernels out of kernels and moves, kernels and moves out of whole samplers: cycles, mixtures and
repetitions, Metropolis-Hastings, samplers collapsed to a move, particle Gibbs.

With transition matrices K_k that all leave pi invariant,

    cycle     K_1 K_2 ... K_n    invariant; reversible if it reads the same backwards (a palindrome)
    mix       sum_k p_k K_k      invariant; reversible if all K_k are
    repeat    K^n                invariant; reversible if K is

The parts must share one chain state: they target one law, and keep the same things about it.

With a sampler that draws a properly weighted population (LAW 1) of Z-hat = exp(log_z) mean_i
exp(w_i),

    collapse       one particle by weight, dw = log Z-hat: a move that obeys LAW 2
    conditional    the sampler around a reference, then one particle by weight: leaves pi invariant

All are pytrees of their parts (`base.Kernel`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.draw import uniforms
from ppl.pytrees import as_pytree
from ppl.rows import where_rows
from ppl.showing import shown

from .base import Kernel, Move, Particles, X, bank, each_chain, holding
from .resampling import multinomial
from .results import MoveInfo, Weighted, changed_rows, moved

Probs = Sequence[float | int] | Float[Any, " K"] | None

Sampler = Callable[[PRNGKeyArray, X], Particles | Weighted]
"""(key, x of one row) -> a population that obeys LAW 1; a `Weighted` also says what the run met and
cost.

A pytree, e.g. a `Partial` of a function of a module over the target, is an argument of programs.
"""

Seen = dict[str, Any]
"""Of the runs of C chains `cost`, `invalid` and `missing_support` [C], as in `MoveInfo`; nothing
where a sampler gives `Particles`.
"""


@shown
class Chosen(NamedTuple):
    """What a step of a mixture did: which part ran [], and the infos of all parts, zeros for those
    that did not.

    So what is additive (`Cost`) may be summed over the parts.
    """

    chosen: Int[Array, ""]
    infos: tuple


# Kernels, and moves, in turn and at random.


def cycle(*kernels: Kernel) -> Kernel:
    """The kernels one after another in every step; info is the tuple of theirs.

    Raises:
        ValueError: without kernels; by `init`, if theirs do not agree on the state (`mix` alike),
            which under jit is seen for its structure only.  Kernels with different targets may
            have the same state: that is not seen.
    """
    _check_some(kernels)
    return Kernel(_common_init(kernels), holding(_in_turn, kernels))


def _in_turn(key: PRNGKeyArray, kernels: tuple[Kernel, ...], state: X) -> tuple[X, tuple]:
    infos = []
    for own_key, kernel in zip(jax.random.split(key, len(kernels)), kernels, strict=True):
        state, info = kernel.step(own_key, state)
        infos.append(info)
    return state, tuple(infos)


@overload
def mix(*parts: Kernel, probs: Probs = None) -> Kernel: ...
@overload
def mix(*parts: Move, probs: Probs = None) -> Move: ...
def mix(*parts: Any, probs: Probs = None) -> Any:
    """One of the kernels (or of the moves) in every step, drawn without looking at the state.

    All chains of a batch make the same choice, so that only one part runs.  Each of them has the
    transition matrix sum_k p_k K_k for itself, but they are no longer independent of each other:
    invariance is exact, and standard errors across chains are a little off in short runs.  Of moves
    to the same next target, any of which obeys LAW 2, the mixture does too.

    Args:
        parts: K kernels, whose info is `Chosen`; or K moves.
        probs: p, positive, normalised here; by default all equal.

    Raises:
        ValueError: unless there is one positive number per part; for moves among kernels; and as in
            `cycle`.
    """
    _check_some(parts)
    log_probs = jnp.log(_checked_probs(probs, len(parts)))
    moves = [part for part in parts if isinstance(part, Move)]
    if not moves:
        return Kernel(_common_init(parts), holding(_any_kernel, log_probs, parts))
    if len(moves) < len(parts):
        raise ValueError("expected kernels or moves, got both; as_move makes moves of kernels")
    return Move(holding(_any_move, log_probs, tuple(as_pytree(move.sample) for move in moves)))


def _any_move(key: PRNGKeyArray, log_probs: Array, samples: tuple, x: X) -> tuple[X, Array]:
    choice_key, move_key = jax.random.split(key)
    return jax.lax.switch(jax.random.categorical(choice_key, log_probs), samples, move_key, x)


def _any_kernel(
    key: PRNGKeyArray, log_probs: Array, kernels: tuple[Kernel, ...], state: X
) -> tuple[X, Chosen]:
    choice_key, step_key = jax.random.split(key)
    shapes = [jax.eval_shape(kernel.step, step_key, state)[1] for kernel in kernels]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def run(k: int) -> tuple[X, tuple]:
        after, info = kernels[k].step(step_key, state)
        return after, (*nothing[:k], info, *nothing[k + 1 :])

    chosen = jax.random.categorical(choice_key, log_probs).astype(jnp.int32)
    state, infos = jax.lax.switch(chosen, [lambda k=k: run(k) for k in range(len(kernels))])
    return state, Chosen(chosen, infos)


def repeat(kernel: Kernel, num: int) -> Kernel:
    """`num` steps as one; info has a leading axis of that many.

    Raises:
        ValueError: unless num >= 1.
    """
    check_count("num", num)
    return Kernel(kernel.init, holding(_repeated, kernel.step, num=num))


def _repeated(key: PRNGKeyArray, step: Any, state: X, *, num: int) -> tuple[X, Any]:
    return jax.lax.scan(lambda x, own_key: step(own_key, x), state, jax.random.split(key, num))


# Kernels out of moves, and moves out of kernels.


def mh(move: Move) -> Kernel:
    """Metropolis-Hastings: every chain takes the y that `move` draws with probability min(1,
    exp(dw)); else it stays.

    That leaves gamma invariant if the move's weight is a Hastings ratio, i.e. if the move is its
    own reverse:

        dw(x, y) = log gamma(y) + log q(x | y) - log gamma(x) - log q(y | x) = -dw(y, x)

    LAW 2 alone is not enough: it allows weights with any backward law in place of q(x | y), and
    accepting by those is wrong.  `samplers.testing.check_hastings` asks `assess` about it.

    The chain state is the move's, as given; info is `MoveInfo`, see `accept`.
    """
    return Kernel(_as_given, holding(_tried, as_pytree(move.sample)))


def _tried(key: PRNGKeyArray, sample: Any, x: X) -> tuple[X, MoveInfo]:
    move_key, accept_key = jax.random.split(key)
    y, log_ratio = sample(move_key, x)
    return accept(accept_key, log_ratio, x, y)


def accept(key: PRNGKeyArray, log_ratio: Float[Array, " C"], x: X, y: X) -> tuple[X, MoveInfo]:
    """y in the rows that take it, with probability min(1, exp(log_ratio)), else x.

    NaN rejects, and is `invalid`.  `changed` looks at all that a row has.
    """
    u = uniforms(jax.random.split(key, log_ratio.shape[0]))
    accepted = jnp.log(u) < log_ratio
    return where_rows(accepted, y, x), moved(
        accepted,
        changed=accepted & changed_rows(x, y),
        log_ratio=log_ratio,
        invalid=jnp.isnan(log_ratio),
    )


def as_move(kernel: Kernel) -> Move:
    """A step of `kernel` as a move over its chain states, dw = 0: rejuvenation.

    LAW 2 for weights that are proper for what the kernel leaves invariant, however they were
    selected.
    """
    return Move(holding(_rejuvenated, kernel.step))


def _rejuvenated(key: PRNGKeyArray, step: Any, x: X) -> tuple[X, Float[Array, " N"]]:
    return step(key, x)[0], jnp.zeros(_num_rows(x), jnp.float32)


# Moves and kernels out of samplers.


def collapse(sampler: Sampler, *, batch_size: int = 1) -> Move:
    """The move that runs `sampler` at every row x and keeps one particle y of it, drawn by weight,
    dw = log Z-hat.

    If at each x the sampler obeys LAW 1 for gamma(. | x), then

        E[ exp(dw) f(y) ] = sum_y gamma(y | x) f(y),

    LAW 2 towards sum_x gamma(x) gamma(y | x).  Where all particles are dead, dw = -inf.

    Args:
        sampler: (key, x of one row) -> Particles.
        batch_size: rows that run at a time; the others wait.  One at a time moves the rows of
            caches only where its particles resample.

    Raises:
        ValueError: unless batch_size >= 1.
    """
    check_count("batch_size", batch_size)
    return Move(holding(_collapsed, as_pytree(sampler), batch_size=batch_size))


def _collapsed(
    key: PRNGKeyArray, sampler: Any, x: X, *, batch_size: int
) -> tuple[X, Float[Array, " N"]]:
    return one_of_each(key, sampler, x, batch_size=batch_size)[:2]


def conditional(sampler: Sampler, *, batch_size: int = 1) -> Kernel:
    """Particle Gibbs: chains over references that leave gamma / Z invariant.

    A sweep runs the sampler around the chain's reference and draws the next one from its particles
    by weight.  If all of them are dead, the chain stays.

    Args:
        sampler: (key, reference of one row) -> Particles.  With a reference from pi = gamma / Z,
            the two must have the joint law of a population of some sampler that obeys LAW 1, tilted
            by Z-hat / Z, and of one of its particles, drawn by weight.  A run that is told nothing
            of its reference does not.
        batch_size: as in `collapse`.

    Returns:
        `Kernel`, whose chain state is the references, as given, and whose info is `MoveInfo`: a
        sweep is never rejected; `details` have `log_z` [C], the sweeps' estimates of log Z (at
        stationarity E[1 / Z-hat] = 1 / Z, if the sampler never ends all dead).

    Raises:
        ValueError: unless batch_size >= 1.

    Andrieu, Doucet and Holenstein (2010).
    """
    check_count("batch_size", batch_size)
    return Kernel(_as_given, holding(_sweep, as_pytree(sampler), batch_size=batch_size))


def _sweep(key: PRNGKeyArray, sampler: Any, x: X, *, batch_size: int) -> tuple[X, MoveInfo]:
    drawn, log_z, seen = one_of_each(key, sampler, x, batch_size=batch_size)
    y = where_rows(log_z > -jnp.inf, drawn, x)
    return y, moved(
        jnp.ones(log_z.shape, bool),
        changed=changed_rows(x, y),
        details={"log_z": log_z},
        **reported(seen),
    )


def reported(seen: Seen) -> dict[str, Any]:
    """What a `MoveInfo` says of the runs of C chains."""
    return {**seen, "cost": seen["cost"].total(), "tokens": seen["cost"].tokens} if seen else {}


@functools.partial(jax.jit, static_argnames="batch_size")
def one_of_each(
    key: PRNGKeyArray, sampler: Any, x: X, *, batch_size: int
) -> tuple[X, Float[Array, " C"], Seen]:
    """One particle of each row's run, drawn by weight, log Z-hat [C], and what else is known of
    the runs.
    """

    def one(row: tuple[PRNGKeyArray, X]) -> tuple[X, Array, Seen]:
        run_key, draw_key = jax.random.split(row[0])
        p, seen = sampler(run_key, row[1]), {}
        if isinstance(p, Weighted):
            seen = {
                "cost": p.cost,
                "invalid": p.num_invalid > 0,
                "missing_support": p.missing_support,
            }
            p = Particles(p.samples, p.log_weights, p.log_z)
        chosen = multinomial(draw_key, p.log_weights, 1)[0]
        return jax.tree.map(lambda leaf: leaf[chosen], p.state), bank(p).log_z, seen

    return each_chain(one, (jax.random.split(key, _num_rows(x)), x), batch_size)


def _num_rows(x: X) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _as_given(x: X) -> X:
    return x


def _checked_probs(probs: Any, num: int) -> Float[Array, " K"]:
    probs = jnp.ones(num, jnp.float32) if probs is None else jnp.asarray(probs, jnp.float32)
    if probs.shape != (num,) or (not isinstance(probs, Tracer) and not (probs > 0).all()):
        raise ValueError(
            f"expected one positive probability for each of {num} kernels, got {probs}; leave out"
            " kernels that are never to run"
        )
    return probs


def _check_some(parts: tuple) -> None:
    if not parts:
        raise ValueError(
            "expected at least one kernel, got none; a chain that never moves samples nothing"
        )


def _common_init(kernels: tuple[Kernel, ...]) -> Any:
    return Partial(_agreed, tuple(kernel.init for kernel in kernels))


def _agreed(inits: tuple, x: X) -> X:
    """The state that all of `inits` make of x."""
    states = [init(x) for init in inits]
    for number, other in enumerate(states[1:], 1):
        place = _difference(states[0], other)
        if place is not None:
            raise ValueError(
                "expected kernels with the same chain state, which takes one target and one"
                f" proposal, got kernels 0 and {number} whose states differ {place}; give them the"
                " same target and proposal"
            )
    return states[0]


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
