"""Any-order models small enough to enumerate, and one that is not but is known exactly.

    joint     all conditionals of a joint law of L sites: consistent
    table     a law for every site of every canvas: any conditionals at all
    markov    the conditionals of a Markov chain, by forward and backward sums, at any length
    latin4    the 288 completed sudoku grids of 4 x 4, L = 16, by counting

Tokens are 0..V-1 and MASK is V, so that the vocabulary has V + 1.  None reads a prompt.  Without
`eos` canvases are always full (EOS is MASK, which none has).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from ppl.any_order import AnyOrderFunctions, AnyOrderLM, Prompt, no_data, sites_at

GRIDS = 288
"""Completed sudoku grids of 4 x 4."""


def joint(logits: Float[ArrayLike, "..."], *, eos: int | None = None) -> AnyOrderLM:
    """The conditionals d_i(v | c) = p(x_i = v | x_O = c_O) of p = softmax(logits), logits [V] * L.

    `params` are the logits; a site's law is NaN-free, and uniform, where a canvas has probability
    zero.

    Raises:
        ValueError: if the axes differ in length.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim == 0 or len(set(logits.shape)) != 1:
        raise ValueError(
            f"expected logits [V, ..., V], an axis for each site, got shape {logits.shape}; all"
            " sites have one vocabulary"
        )
    return _model(logits, _joint, logits.shape[0], eos, logits.ndim)


def table(logits: Float[ArrayLike, "P L V"], *, eos: int | None = None) -> AnyOrderLM:
    """Any conditionals, d(. | c) = softmax(logits[row(c)]), row(c) = sum_i c_i (V + 1)^(L-1-i),
    MASK counted as V: P = (V + 1)^L rows.

    Raises:
        ValueError: if P is not that.
    """
    logits = jnp.asarray(logits, jnp.float32)
    rows, length, size = logits.shape
    if rows != (size + 1) ** length:
        raise ValueError(
            f"expected (V + 1)^L = {(size + 1) ** length} rows of logits for L = {length} and"
            f" V = {size}, got {rows}; MASK is one more token"
        )
    return _model(logits, _table, size, eos, length)


def markov(
    initial: Float[ArrayLike, " V"] | Sequence[float],
    transition: Float[ArrayLike, "V V"] | Sequence[Sequence[float]],
    *,
    eos: int | None = None,
) -> AnyOrderLM:
    """The conditionals of a Markov chain x_1 ~ initial, x_{t+1} ~ transition[x_t], at any length:

        d_i(v | c) ~ F_i(v) B_i(v), the sums over all sites to the left and to the right.

    Raises:
        ValueError: if a row is no probability law.
    """
    initial, transition = (jnp.asarray(x, jnp.float32) for x in (initial, transition))
    sums = np.concatenate([np.ravel(initial.sum()), np.ravel(transition.sum(1))])
    if (np.asarray(transition) < 0).any() or not np.allclose(sums, 1, atol=1e-4):
        raise ValueError(f"expected probability laws, got rows that sum to {sums}; normalise them")
    return _model((jnp.log(initial), jnp.log(transition)), _markov, initial.shape[0], eos, None)


def latin4() -> AnyOrderLM:
    """The uniform law over the 288 completed sudoku grids of 4 x 4: L = 16 sites in rows, V = 4.

    `params` are the grids [288, 16].  A canvas that no grid completes has uniform laws.
    """
    return _model(jnp.asarray(sudokus()), _counts, 4, None, 16)


@functools.cache
def sudokus() -> Int[np.ndarray, "G 16"]:
    """All grids whose rows, columns and 2 x 2 boxes hold every token once."""
    rows = list(itertools.permutations(range(4)))
    grids = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _fits(grid + row)]
    return np.asarray(grids, np.int32)


def _fits(cells: tuple[int, ...]) -> bool:
    grid = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    columns = all(len(set(column)) == len(grid) for column in zip(*grid, strict=True))
    if len(grid) % 2:
        return columns
    boxes = (grid[-2][k : k + 2] + grid[-1][k : k + 2] for k in (0, 2))
    return columns and all(len(set(box)) == 4 for box in boxes)


def random_joint(
    key: Key[Array, ""], length: int, vocab_size: int, *, eos: int | None = None, scale: float = 1.5
) -> AnyOrderLM:
    """A joint law with independent normal logits of standard deviation `scale`."""
    return joint(scale * jax.random.normal(key, (vocab_size,) * length, jnp.float32), eos=eos)


def random_table(
    key: Key[Array, ""], length: int, vocab_size: int, *, eos: int | None = None, scale: float = 1.5
) -> AnyOrderLM:
    """Conditionals with independent normal logits: as inconsistent as can be."""
    shape = ((vocab_size + 1) ** length, length, vocab_size)
    return table(scale * jax.random.normal(key, shape, jnp.float32), eos=eos)


def _model(
    params: PyTree, denoise: Callable[..., Any], size: int, eos: int | None, length: int | None
) -> AnyOrderLM:
    if eos is not None and not 0 <= eos < size:
        raise ValueError(f"expected eos in [0, {size}), got {eos}; leave it out if there is none")
    functions = AnyOrderFunctions(no_data, denoise)
    eos = size if eos is None else eos
    return AnyOrderLM(params, None, functions, size + 1, size, eos, length=length)


def _with_mask(logits: Float[Array, "N L V"]) -> Float[Array, "N L W"]:
    return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)


def _joint(
    static: Hashable,
    logits: Float[Array, "..."],
    prompt: Prompt,
    tokens: Int[Array, "N L"],
    masked: Bool[Array, "N L"],
    at: Int[Array, "N K"] | None,
) -> Float[Array, "N K W"]:
    size, length = logits.shape[0], logits.ndim
    allowed = masked[:, :, None] | (tokens[:, :, None] == jnp.arange(size))

    def laws(allowed: Array) -> Array:
        log_p = logits
        for i in range(length):
            shape = [1] * length
            shape[i] = size
            log_p = jnp.where(allowed[i].reshape(shape), log_p, -jnp.inf)
        return jnp.stack(
            [
                jax.nn.logsumexp(log_p, axis=tuple(j for j in range(length) if j != i))
                for i in range(length)
            ]
        )

    return sites_at(_with_mask(_somewhere(jax.vmap(laws)(allowed))), at)


def _table(
    static: Hashable,
    logits: Float[Array, "P L V"],
    prompt: Prompt,
    tokens: Int[Array, "N L"],
    masked: Bool[Array, "N L"],
    at: Int[Array, "N K"] | None,
) -> Float[Array, "N K W"]:
    _, length, size = logits.shape
    places = (size + 1) ** jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
    row = (jnp.where(masked, size, tokens) * places).sum(1, dtype=jnp.int32)
    return sites_at(_with_mask(logits[row]), at)


def _markov(
    static: Hashable,
    params: PyTree,
    prompt: Prompt,
    tokens: Int[Array, "N L"],
    masked: Bool[Array, "N L"],
    at: Int[Array, "N K"] | None,
) -> Float[Array, "N K W"]:
    initial, transition = params
    seen = masked[:, :, None] | (tokens[:, :, None] == jnp.arange(initial.shape[0]))
    log_seen = jnp.swapaxes(jnp.where(seen, jnp.float32(0), -jnp.inf), 0, 1)

    def forward(before: Array, here: Array) -> tuple[Array, Array]:
        after = jax.nn.logsumexp((before + here)[:, :, None] + transition, axis=1)
        return after, before

    def backward(after: Array, here: Array) -> tuple[Array, Array]:
        before = jax.nn.logsumexp((after + here)[:, None, :] + transition, axis=2)
        return before, after

    num = tokens.shape[0]
    left = jax.lax.scan(forward, jnp.broadcast_to(initial, (num, *initial.shape)), log_seen)[1]
    ones = jnp.zeros((num, *initial.shape), jnp.float32)
    right = jax.lax.scan(backward, ones, log_seen, reverse=True)[1]
    return sites_at(_with_mask(_somewhere(jnp.swapaxes(left + right, 0, 1))), at)


def _counts(
    static: Hashable,
    grids: Int[Array, "G L"],
    prompt: Prompt,
    tokens: Int[Array, "N L"],
    masked: Bool[Array, "N L"],
    at: Int[Array, "N K"] | None,
) -> Float[Array, "N K W"]:
    fits = (masked[:, None] | (tokens[:, None] == grids)).all(2).astype(jnp.float32)
    marks = jax.nn.one_hot(grids, 4, dtype=jnp.float32)
    return sites_at(_with_mask(_somewhere(jnp.log(jnp.einsum("ng,glv->nlv", fits, marks)))), at)


def _somewhere(log_masses: Float[Array, "N L V"]) -> Float[Array, "N L V"]:
    """Uniform where there is no mass: the canvas has probability zero."""
    mass = (log_masses > -jnp.inf).any(2, keepdims=True)
    return jnp.where(mass, log_masses, 0.0)
