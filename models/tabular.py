"""Language models small enough to enumerate: the oracles of every sampler's tests.

    markov    the next token depends on the last one
    table     a next-token law for every prefix: any joint law at all
    hmm       a hidden Markov chain with its filter: every token depends on all before it

Caches keep their whole history, so `truncate` followed by `step` is exact for rows of different
lengths.  Their exact marginals are in `marginals`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from ppl.lm import LM, Cache, LMFunctions, Prefix, reorder_rows
from ppl.potential import log_mask

Rows = Sequence[Sequence[float]]

ROW_SUM_TOLERANCE = 1e-4


def markov(transition: Float[ArrayLike, "V V"] | Rows, *, eos: int) -> LM:
    """Markov chain with EOS: p(v | prefix ending in u) = transition[u, v].

    The last prompt token is the initial state.  `params` is log transition [V, V].

    Raises:
        ValueError: if a row is not a probability law, or eos is outside [0, V).

    >>> lm = markov([[0.5, 0.5], [0.2, 0.8]], eos=1)
    >>> lm.prefill([0]).logits.shape
    (2,)
    """
    transition = _laws("transition", transition, 2)
    if transition.shape[0] != transition.shape[1]:
        raise ValueError(
            f"expected a square transition [V, V], got {transition.shape}; both axes are tokens"
        )
    vocab_size = transition.shape[1]
    _check_eos(eos, vocab_size)
    functions = LMFunctions(
        _markov_prefill, _markov_init, _markov_step, _markov_truncate, reorder_rows, _markov_advance
    )
    return LM(jnp.log(transition), None, functions, vocab_size, eos)


def table(logits: Float[ArrayLike, "P V"] | Rows, *, eos: int) -> LM:
    """Any joint law of strings of at most T tokens: one row of next-token logits per prefix.

    The row of the empty prefix is 0, the row of prefix u followed by v is row(u) * V + v + 1; P = 1
    + V + ... + V^(T-1) rows cover every prefix that a string of T tokens needs (those with EOS
    inside are never used).  The first prompt token stands for BOS: the empty prefix is the prompt
    [any token], and a longer prompt conditions on what follows it. The context is T + 1.

    Raises:
        ValueError: if P is not such a sum, a row has no finite logit, or eos is outside [0, V).
    """
    logits = jnp.asarray(logits, jnp.float32)
    rows, vocab_size = logits.shape
    depth = next((d for d in range(1, rows + 1) if num_prefixes(vocab_size, d) >= rows), 0)
    if num_prefixes(vocab_size, depth) != rows:
        raise ValueError(
            f"expected 1 + V + ... + V^(T-1) rows of logits for V = {vocab_size}, got {rows};"
            f" T = {depth} needs {num_prefixes(vocab_size, depth)}"
        )
    if not isinstance(logits, Tracer):
        top = np.asarray(logits.max(axis=1))
        if not np.isfinite(top).all():
            raise ValueError(
                f"expected a finite largest logit in every row, got {top[~np.isfinite(top)][0]}"
            )
    _check_eos(eos, vocab_size)
    functions = LMFunctions(
        _table_prefill, _table_init, _table_step, _table_truncate, reorder_rows, _table_advance
    )
    return LM(logits, eos, functions, vocab_size, eos, context=depth + 1)


def hmm(
    initial: Float[ArrayLike, " K"] | Sequence[float],
    transition: Float[ArrayLike, "K K"] | Rows,
    emission: Float[ArrayLike, "K V"] | Rows,
    *,
    eos: int,
) -> LM:
    """Hidden Markov model: z_1 ~ initial, x_t ~ emission[z_t], z_{t+1} ~ transition[z_t]; the
    prompt is x_1, x_2, ...

    With the predictive belief b_t(z) = p(z_t = z | x_{<t}) the next-token law is b_t emission, and
    x_t updates b_{t+1} ~ (b_t * emission[:, x_t]) transition.  The cache holds every row's beliefs
    at every position.

    Raises:
        ValueError: if the shapes disagree, a row is not a probability law, or eos is outside [0,
            V).
    """
    initial, transition = _laws("initial", initial, 1), _laws("transition", transition, 2)
    emission = _laws("emission", emission, 2)
    num_states, vocab_size = emission.shape
    if initial.shape != (num_states,) or transition.shape != (num_states, num_states):
        raise ValueError(
            f"expected initial [{num_states}] and transition [{num_states}, {num_states}] for an"
            " emission of"
            f" {num_states} states, got {initial.shape} and {transition.shape}"
        )
    _check_eos(eos, vocab_size)
    functions = LMFunctions(_hmm_prefill, _hmm_init, _hmm_step, _hmm_truncate, reorder_rows)
    return LM(
        {"initial": initial, "transition": transition, "emission": emission},
        None,
        functions,
        vocab_size,
        eos,
    )


def num_prefixes(vocab_size: int, depth: int) -> int:
    """Prefixes of fewer than `depth` tokens: 1 + V + ... + V^(depth-1)."""
    return sum(vocab_size**t for t in range(depth))


def _laws(name: str, value: Any, ndim: int) -> Float[Array, "*shape"]:
    value = jnp.asarray(value, jnp.float32)
    if value.ndim != ndim:
        raise ValueError(f"expected {name} with {ndim} axes, got shape {value.shape}")
    if not isinstance(value, Tracer):
        concrete = np.asarray(value)
        sums = concrete.sum(-1)
        if not (concrete >= 0).all() or not np.allclose(sums, 1.0, atol=ROW_SUM_TOLERANCE):
            raise ValueError(
                f"expected rows of {name} that are probability laws, got entries from"
                f" {concrete.min()} and sums"
                f" {np.ravel(sums)}; divide each row by its sum"
            )
    return value


def _check_eos(eos: int, vocab_size: int) -> None:
    if not 0 <= eos < vocab_size:
        raise ValueError(
            f"expected eos in [0, {vocab_size}), got {eos}; EOS is one of the V tokens"
        )


# Markov chain.  The last token is all that matters and `step` is given it, so the cache is only the
# row's length.


def _markov_prefill(
    static: Hashable,
    log_transition: Float[Array, "V V"],
    tokens: Int[Array, " S"],
    length: Int[Array, ""],
) -> tuple[PyTree, Float[Array, " V"]]:
    return None, log_transition[tokens[length - 1]]


def _markov_init(
    static: Hashable, log_transition: PyTree, prefix: Prefix, num: int, max_tokens: int
) -> Cache:
    return jnp.zeros(num, jnp.int32)


def _markov_step(
    static: Hashable,
    log_transition: Float[Array, "V V"],
    prefix: Prefix,
    cache: Cache,
    token: Int[Array, " N"],
) -> tuple[Cache, Float[Array, "N V"]]:
    return cache + 1, log_transition[token]


def _markov_truncate(
    static: Hashable, log_transition: PyTree, cache: Cache, length: Int[Array, " N"]
) -> Cache:
    return length.astype(jnp.int32)


def _markov_advance(
    static: Hashable,
    log_transition: Float[Array, "V V"],
    prefix: Prefix,
    cache: Cache | None,
    tokens: Int[Array, "N K"],
) -> tuple[Cache | None, Float[Array, "N K V"]]:
    return None if cache is None else cache + tokens.shape[1], log_transition[tokens]


# Prefix table.  A prefix is its row in the table; the cache is every row's path from the prompt.


def _child(
    node: Int[Array, " *N"], token: Int[Array, " *N"], table_shape: tuple[int, ...]
) -> Int[Array, " *N"]:
    """The row of a prefix with one more token; the number of rows stands for every prefix that is
    not in the table.
    """
    rows, vocab_size = table_shape
    inside = node < rows
    # Products of rows outside could overflow.
    child = jnp.where(inside, node, 0) * vocab_size + token + 1
    return jnp.where(inside, jnp.minimum(child, rows), rows).astype(jnp.int32)


def _table_law(
    eos: Any, logits: Float[Array, "P V"], node: Int[Array, " *N"]
) -> Float[Array, "*N V"]:
    """The row's logits; beyond the table only EOS follows."""
    ends = log_mask(jnp.arange(logits.shape[1]) == eos)
    inside = node < logits.shape[0]
    return jnp.where(inside[..., None], logits[jnp.where(inside, node, 0)], ends)


def _table_prefill(
    eos: Hashable, logits: Float[Array, "P V"], tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[PyTree, Float[Array, " V"]]:
    def descend(node: Array, position: Array) -> tuple[Array, None]:
        counts = (position >= 1) & (position < length)
        return jnp.where(counts, _child(node, tokens[position], logits.shape), node), None

    node, _ = jax.lax.scan(descend, jnp.int32(0), jnp.arange(tokens.shape[0]))
    return node, _table_law(eos, logits, node)


def _table_init(eos: Hashable, logits: PyTree, prefix: Prefix, num: int, max_tokens: int) -> Cache:
    path = jnp.zeros((num, max_tokens + 1), jnp.int32).at[:, 0].set(prefix.data)
    return path, jnp.zeros(num, jnp.int32)


def _table_step(
    eos: Hashable,
    logits: Float[Array, "P V"],
    prefix: Prefix,
    cache: Cache,
    token: Int[Array, " N"],
) -> tuple[Cache, Float[Array, "N V"]]:
    path, length = cache
    row = jnp.arange(path.shape[0])
    node = _child(path[row, length], token, logits.shape)
    return (path.at[row, length + 1].set(node), length + 1), _table_law(eos, logits, node)


def _table_truncate(eos: Hashable, logits: PyTree, cache: Cache, length: Int[Array, " N"]) -> Cache:
    return cache[0], length.astype(jnp.int32)


def _table_advance(
    eos: Hashable,
    logits: Float[Array, "P V"],
    prefix: Prefix,
    cache: Cache | None,
    tokens: Int[Array, "N K"],
) -> tuple[Cache | None, Float[Array, "N K V"]]:
    num, count = tokens.shape
    rows = jnp.arange(num)

    def descend(node: Array, token: Array) -> tuple[Array, Array]:
        node = _child(node, token, logits.shape)
        return node, node

    start = jnp.full(num, prefix.data) if cache is None else cache[0][rows, cache[1]]
    nodes = jax.lax.scan(descend, start, tokens.T)[1].T
    if cache is not None:
        path, length = cache
        slots = length[:, None] + 1 + jnp.arange(count)
        cache = path.at[rows[:, None], slots].set(nodes), length + count
    return cache, _table_law(eos, logits, nodes)


# Hidden Markov model.  The cache is every row's predictive belief at every position.


def _update(
    params: PyTree, belief: Float[Array, "*N K"], token: Int[Array, " *N"]
) -> Float[Array, "*N K"]:
    joint = belief * jnp.moveaxis(params["emission"], 1, 0)[token]
    evidence = joint.sum(-1, keepdims=True)
    # After a token of probability zero the filter is undefined; it keeps its belief, so that
    # nothing becomes NaN.
    filtered = jnp.where(evidence > 0, joint / jnp.where(evidence > 0, evidence, 1.0), belief)
    return filtered @ params["transition"]


def _hmm_law(params: PyTree, belief: Float[Array, "*N K"]) -> Float[Array, "*N V"]:
    return jnp.log(belief @ params["emission"])


def _hmm_prefill(
    static: Hashable, params: PyTree, tokens: Int[Array, " S"], length: Int[Array, ""]
) -> tuple[PyTree, Float[Array, " V"]]:
    def observe(belief: Array, position: Array) -> tuple[Array, None]:
        return jnp.where(position < length, _update(params, belief, tokens[position]), belief), None

    belief, _ = jax.lax.scan(observe, params["initial"], jnp.arange(tokens.shape[0]))
    return belief, _hmm_law(params, belief)


def _hmm_init(static: Hashable, params: PyTree, prefix: Prefix, num: int, max_tokens: int) -> Cache:
    beliefs = (
        jnp.zeros((num, max_tokens + 1, prefix.data.shape[0]), jnp.float32)
        .at[:, 0]
        .set(prefix.data)
    )
    return beliefs, jnp.zeros(num, jnp.int32)


def _hmm_step(
    static: Hashable, params: PyTree, prefix: Prefix, cache: Cache, token: Int[Array, " N"]
) -> tuple[Cache, Float[Array, "N V"]]:
    beliefs, length = cache
    row = jnp.arange(beliefs.shape[0])
    belief = _update(params, beliefs[row, length], token)
    return (beliefs.at[row, length + 1].set(belief), length + 1), _hmm_law(params, belief)


def _hmm_truncate(
    static: Hashable, params: PyTree, cache: Cache, length: Int[Array, " N"]
) -> Cache:
    return cache[0], length.astype(jnp.int32)


# Random models: asymmetric, EOS possible at every depth, a few tokens impossible.


def random_markov(key: Key[Array, ""], vocab_size: int, *, eos: int) -> LM:
    """A Markov chain whose rows come from `random_laws`."""
    return markov(random_laws(key, (vocab_size,), vocab_size, eos), eos=eos)


def random_table(key: Key[Array, ""], vocab_size: int, depth: int, *, eos: int) -> LM:
    """A prefix table of depth T = `depth` whose rows come from `random_laws`, each with its own
    normaliser.
    """
    law_key, shift_key = jax.random.split(key)
    rows = num_prefixes(vocab_size, depth)
    shift = jax.random.normal(shift_key, (rows, 1), jnp.float32)
    return table(jnp.log(random_laws(law_key, (rows,), vocab_size, eos)) + shift, eos=eos)


def random_hmm(key: Key[Array, ""], num_states: int, vocab_size: int, *, eos: int) -> LM:
    """A hidden Markov model; every state emits EOS, and some states cannot emit some tokens."""
    initial_key, transition_key, emission_key = jax.random.split(key, 3)
    square = (num_states, num_states)
    initial = jax.nn.softmax(jax.random.normal(initial_key, (num_states,), jnp.float32))
    transition = jax.nn.softmax(2.0 * jax.random.normal(transition_key, square, jnp.float32))
    emission = random_laws(emission_key, (num_states,), vocab_size, eos)
    return hmm(initial, transition, emission, eos=eos)


def random_laws(
    key: Key[Array, ""], shape: tuple[int, ...], vocab_size: int, eos: int
) -> Float[Array, "... V"]:
    """Next-token laws [*shape, V]: softmax of normal logits, EOS between 0.1 and 0.3, and in about
    half of the rows one other token impossible (where at least two others are left)."""
    logit_key, eos_key, zero_key, row_key = jax.random.split(key, 4)
    others = jnp.arange(vocab_size) != eos
    full, rows = (*shape, vocab_size), (*shape, 1)
    normal = jax.random.normal(logit_key, full, jnp.float32)
    logits = jnp.where(others, 1.5 * normal, -jnp.inf)
    if vocab_size > 3:
        scores = jnp.where(others, jax.random.uniform(zero_key, full, jnp.float32), -1.0)
        chosen = jnp.arange(vocab_size) == scores.argmax(-1)[..., None]
        impossible = chosen & jax.random.bernoulli(row_key, jnp.float32(0.5), rows)
        logits = jnp.where(impossible, -jnp.inf, logits)
    p_eos = jax.random.uniform(eos_key, rows, jnp.float32, minval=0.1, maxval=0.3)
    return jnp.where(others, (1 - p_eos) * jax.nn.softmax(logits), p_eos)
