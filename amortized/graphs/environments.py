"""Environments for the balance objectives: directed acyclic graphs whose states may stop for a
reward.

A state is an array of D integers, and every function takes any number of leading axes.  A
trajectory starts in `initial`, makes moves 0..A-1, and stops by the last action, A.  An undo takes
a state to one of its parents: there are B kinds of them, and a backward policy is a law over the
legal ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppl.showing import shown

MAX_STATES = 1_000_000

State = Int[Array, "*N D"]


@shown
class Environment(NamedTuple):
    """A state graph as pure functions.

    initial [D]; num_moves A; num_undos B; num_states S; max_moves L, the most moves a trajectory
    can make; fixed_length: whether all make as many.
    step(state, move) -> state; undo(state, undo) -> (parent, the move from there).  Illegal actions
    give anything. undo_of(state, move) -> the undo that takes step(state, move) back.
    legal(state) -> [*N, A+1], stop last; legal_undos(state) -> [*N, B].  Every state but the first
    has a parent, and every one can move or stop.
    log_reward(state) -> [*N]: of stopping there; -inf where it cannot.
    features(state) -> [*N, F]: what a network sees.
    index(state) -> [*N] in 0..S-1, and states() -> [S, D] in that order, for what is small enough
    to enumerate.
    """

    initial: Int[Array, " D"]
    num_moves: int
    num_undos: int
    num_states: int
    max_moves: int
    fixed_length: bool
    step: Callable[[State, Int[Array, "*N"]], State]
    undo: Callable[[State, Int[Array, "*N"]], tuple[State, Int[Array, "*N"]]]
    undo_of: Callable[[State, Int[Array, "*N"]], Int[Array, "*N"]]
    legal: Callable[[State], Bool[Array, "*N K"]]
    legal_undos: Callable[[State], Bool[Array, "*N B"]]
    log_reward: Callable[[State], Float[Array, "*N"]]
    features: Callable[[State], Float[Array, "*N F"]]
    index: Callable[[State], Int[Array, "*N"]]
    states: Callable[[], Int[Array, "S D"]]


def hypergrid(
    dim: int, side: int, *, r0: float = 1e-3, r1: float = 0.5, r2: float = 2.0
) -> Environment:
    """A grid of `side`^`dim` points, moves that raise one coordinate, modes near the corners (arXiv
    2106.04399).

        R(s) = r0 + r1 1[all |a_i - 1/2| > 1/4] + r2 1[all 3/10 < |a_i - 1/2| < 4/10]
        a_i = s_i / (side - 1)

    Sides with (side - 1) divisible by 10 put points on the boundaries, where rounding decides.
    """
    if dim < 1 or side < 2:
        raise ValueError(
            f"expected dim of at least 1 and side of at least 2, got dim={dim} and side={side}"
        )

    def shift(state: Array, axis: Array, by: int) -> Array:
        return state + by * (jnp.arange(dim) == axis[..., None]).astype(state.dtype)

    def log_reward(state: Array) -> Array:
        away = jnp.abs(state / (side - 1) - 0.5)
        plateau, mode = (away > 0.25).all(-1), ((away > 0.3) & (away < 0.4)).all(-1)
        return jnp.log(r0 + r1 * plateau + r2 * mode)

    radix = np.full(dim, side)
    return Environment(
        initial=jnp.zeros(dim, jnp.int32),
        num_moves=dim,
        num_undos=dim,
        num_states=side**dim,
        max_moves=dim * (side - 1),
        fixed_length=False,
        step=lambda state, move: shift(state, move, 1),
        undo=lambda state, undo: (shift(state, undo, -1), undo),
        undo_of=lambda state, move: move,
        legal=lambda state: jnp.concatenate(
            [state < side - 1, jnp.ones_like(state[..., :1], bool)], axis=-1
        ),
        legal_undos=lambda state: state > 0,
        log_reward=log_reward,
        features=lambda state: _one_hot(state, side),
        index=lambda state: _to_index(state, radix),
        states=lambda: _enumerate(radix),
    )


def bit_sequences(
    modes: Bool[Array, "M bits"] | Any, *, word_bits: int = 1, exponent: float | int = 3.0
) -> Environment:
    """Bit strings written word by word, at any free position (arXiv 2201.13259).

        R(x) = exp(-exponent min_m hamming(x, m) / bits)

    A state holds the words, and 2^word_bits where none has been written; it stops when it is full.
    Move `position * 2^word_bits + word` writes, undo `position` erases.  `modes` [M, bits] are the
    best strings.

    Raises:
        ValueError: if `word_bits` does not divide the number of bits.
    """
    modes = np.asarray(modes, bool)
    bits = modes.shape[1]
    if bits % word_bits:
        raise ValueError(
            f"expected word_bits to divide the {bits} bits of the modes, got {word_bits}"
        )
    places, words = bits // word_bits, 2**word_bits
    empty = words

    def put(state: Array, place: Array, word: Array | int) -> Array:
        word = jnp.broadcast_to(jnp.asarray(word, state.dtype), place.shape)
        return jnp.where(jnp.arange(places) == place[..., None], word[..., None], state)

    def undo(state: Array, place: Array) -> tuple[Array, Array]:
        word = jnp.take_along_axis(state, place[..., None], axis=-1)[..., 0]
        return put(state, place, empty), place * words + word

    def legal(state: Array) -> Array:
        free = state == empty
        moves = jnp.repeat(free, words, axis=-1)
        return jnp.concatenate([moves, ~free.any(-1, keepdims=True)], axis=-1)

    radix = np.full(places, words + 1)
    return Environment(
        initial=jnp.full(places, empty, jnp.int32),
        num_moves=places * words,
        num_undos=places,
        num_states=(words + 1) ** places,
        max_moves=places,
        fixed_length=True,
        step=lambda state, move: put(state, move // words, move % words),
        undo=undo,
        undo_of=lambda state, move: move // words,
        legal=legal,
        legal_undos=lambda state: state != empty,
        log_reward=functools.partial(_nearness, modes, word_bits, exponent),
        features=lambda state: _one_hot(state, words + 1),
        index=lambda state: _to_index(state, radix),
        states=lambda: _enumerate(radix),
    )


def _nearness(modes: np.ndarray, word_bits: int, exponent: float | int, state: Array) -> Array:
    """log R of words [..., places]; -inf where one is missing."""
    missing = (state == 2**word_bits).any(-1)
    written = (state[..., None] >> jnp.arange(word_bits - 1, -1, -1, dtype=jnp.int32)) & 1
    written = written.reshape(*state.shape[:-1], modes.shape[1]).astype(jnp.float32)
    # |x - m| summed over bits, for all modes at once, is a product of matrices.
    ones = jnp.asarray(modes, jnp.float32)
    distance = (written.sum(-1)[..., None] + ones.sum(1) - 2 * written @ ones.T).min(-1)
    return jnp.where(missing, -jnp.inf, -exponent * distance / modes.shape[1])


def dag(children: Int[Array, "S A"] | Any, log_reward: Float[Array, " S"] | Any) -> Environment:
    """A graph given by its edges: `children` [S, A] are states, or -1 for no edge; state 0 comes
    first.

    Several edges may join the same two states.

    Raises:
        ValueError: if an edge leads to no state or closes a cycle, if a state has no parent, or if
            one can neither move nor stop.
    """
    children, log_reward = np.asarray(children), np.asarray(log_reward, np.float32)
    num_states, num_moves = children.shape
    longest = _longest_path(children, log_reward)
    source, by, undos, counts = map(jnp.asarray, _backwards(children))
    num_undos = source.shape[1]
    actions = jnp.asarray(np.concatenate([children >= 0, np.isfinite(log_reward)[:, None]], axis=1))
    to, rewards = jnp.asarray(children, jnp.int32), jnp.asarray(log_reward)
    radix = np.array([num_states])
    return Environment(
        initial=jnp.zeros(1, jnp.int32),
        num_moves=num_moves,
        num_undos=num_undos,
        num_states=num_states,
        max_moves=longest,
        fixed_length=False,
        step=lambda state, move: to[state[..., 0], move][..., None],
        undo=lambda state, undo: (source[state[..., 0], undo][..., None], by[state[..., 0], undo]),
        undo_of=lambda state, move: undos[state[..., 0], move],
        legal=lambda state: actions[state[..., 0]],
        legal_undos=lambda state: jnp.arange(num_undos) < counts[state],
        log_reward=lambda state: rewards[state[..., 0]],
        features=lambda state: _one_hot(state, num_states),
        index=lambda state: state[..., 0],
        states=lambda: _enumerate(radix),
    )


def _backwards(
    children: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The edges from their ends: for each state and undo where it leads and which move came from
    there [S, B], for each state and move its undo [S, A], and the number of undos [S].
    """
    num_states, num_moves = children.shape
    edges = [(s, a, c) for s in range(num_states) for a, c in enumerate(children[s]) if c >= 0]
    into = [[(s, a) for s, a, c in edges if c == state] for state in range(num_states)]
    counts = np.array([len(entries) for entries in into], np.int32)
    source, by = np.zeros((2, num_states, counts.max()), np.int32)
    undos = np.zeros((num_states, num_moves), np.int32)
    for state, entries in enumerate(into):
        for undo, (parent, move) in enumerate(entries):
            source[state, undo], by[state, undo], undos[parent, move] = parent, move, undo
    return source, by, undos, counts


def _longest_path(children: np.ndarray, log_reward: np.ndarray) -> int:
    """Edges of the longest path from state 0; also checks the graph."""
    num_states = children.shape[0]
    if log_reward.shape != (num_states,) or (children >= num_states).any() or (children < -1).any():
        raise ValueError(
            f"expected children in -1..{num_states - 1} and log_reward [{num_states}], got children"
            " from"
            f" {children.min()} to {children.max()} and log_reward {log_reward.shape}"
        )
    stuck = (children < 0).all(1) & ~np.isfinite(log_reward)
    orphans = np.setdiff1d(np.arange(1, num_states), children)
    if stuck.any() or orphans.size:
        raise ValueError(
            "expected every state to move or stop and to have a parent, got states"
            f" {np.flatnonzero(stuck)} that can do"
            f" neither and states {orphans} without a parent; drop them, or give the former a"
            " reward"
        )
    reached, depth = np.arange(num_states) == 0, 0
    while (following := np.isin(np.arange(num_states), children[reached])).any():
        reached, depth = following, depth + 1
        if depth >= num_states:
            raise ValueError("expected a graph without cycles, got a path that never ends")
    return depth


def _one_hot(state: Array, num: int) -> Array:
    return jax.nn.one_hot(state, num, dtype=jnp.float32).reshape(*state.shape[:-1], -1)


def _to_index(state: Array, radix: np.ndarray) -> Array:
    place = np.cumprod([1, *radix[:0:-1]], dtype=object)[::-1]
    if place[0] * radix[0] > MAX_STATES:
        raise ValueError(
            f"expected at most {MAX_STATES} states to enumerate, got {place[0] * radix[0]}"
        )
    return (state * jnp.asarray(place.astype(np.int32))).sum(-1)


def _enumerate(radix: np.ndarray) -> Array:
    num = np.prod(radix, dtype=object)
    if num > MAX_STATES:
        raise ValueError(
            f"expected at most {MAX_STATES} states to enumerate, got {num}; use a smaller"
            " environment"
        )
    return jnp.stack(
        jnp.unravel_index(jnp.arange(int(num), dtype=jnp.int32), tuple(radix.tolist())), axis=-1
    ).astype(jnp.int32)
