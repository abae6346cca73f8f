"""Conformance kits for Markov kernels, over a target small enough to enumerate, and for resamplers:
run them on your own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.exact import Enumeration, enumerate_strings
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target

from .base import Kernel, Move, Resampler, X, checked_ancestors
from .base import check_resampler as check_callable

SHARES = (
    (0.02, 0.31, 0.0, 0.17, 0.005, 0.095, 0.4),
    (0.9, 0.0, 0.0, 0.0, 0.04, 0.0, 0.06),
    (0.15, 0.13, 0.14, 0.16, 0.12, 0.17, 0.13),
    (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
)
"""Weights to resample: uneven, a heavy one among dead ones, nearly equal, a single one."""
MIN_FLOW = 20
"""Strings that fewer chains entered or left are pooled: the z-scores are for large counts."""


def sequences_of(state: Any) -> Sequences:
    """The strings of a chain state: the state itself, or its attribute `sequences`."""
    return state if isinstance(state, Sequences) else state.sequences


def check_kernel(
    kernel: Kernel,
    target: Target,
    *,
    key: PRNGKeyArray,
    num_chains: int = 20_000,
    num_steps: int = 1,
    sequences: Callable[[Any], Sequences] = sequences_of,
    bound: float = 5.0,
) -> Float[np.ndarray, "M M"]:
    """Assert that `kernel` leaves `target` invariant, from its empirical transition matrix.

    Chains start at exact draws from the enumerated law pi, so under pi K = pi every string is
    entered as often as it is left.  With counts C [M, M] of the moves over `num_steps` steps and
    net flows d = C' 1 - C 1, each string has

        z = d_x / sqrt(in_x + out_x)

    and together they have chi^2 = d' (diag(in + out) - C - C')^+ d (Stuart-Maxwell test), turned
    into a z-score too; the mean changes of log gamma and of the length are tested by themselves.
    What the start draws happened to be cancels, so this sees smaller faults than comparing laws.

    Args:
        kernel: over strings; `init` gets `Sequences` of `num_chains` rows, which must be
            independent chains.
        target: of a few hundred strings.
        num_chains: more chains see smaller faults: SE of a flow is about sqrt(in + out).
        num_steps: k; the k-step law is tested, in which faults add up.
        sequences: reads the strings [num_chains] off the chain state.
        bound: largest |z| that passes.

    Returns:
        C [M, M], the moves counted between the strings of `ppl.exact.enumerate_strings(target)`,
        stays included.

    Raises:
        AssertionError: if `init` moves a chain, `step` changes the state's structure, no chain ever
            moves, a chain reaches a string of probability zero, or the law is not invariant.
        ValueError: if the target has too many strings, or a string is not padded with EOS.
    """
    exact = enumerate_strings(target)
    draw_key, step_key = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(draw_key)))
    start = rng.choice(len(exact.probs), num_chains, p=exact.probs)
    state = kernel.init(take_rows(exact.sequences, jnp.asarray(start)))
    if not np.array_equal(exact.index(sequences(state).tokens), start):
        raise AssertionError("init must keep the positions it is given, but it holds other strings")
    _check_structure(kernel, step_key, state)
    state = _run(kernel, step_key, state, num_steps)
    end = exact.index(sequences(state).tokens)
    _check_lengths(sequences(state), exact.sequences, end)

    _check_ends(exact, start, end, num_steps)
    counts = np.zeros((len(exact.probs), len(exact.probs)))
    np.add.at(counts, (start, end), 1)
    _check_drift("log gamma", exact.log_gamma[end] - exact.log_gamma[start], bound)
    length = np.asarray(exact.sequences.length)
    _check_drift("length", length[end] - length[start], bound)
    _check_flows(counts, exact.sequences, bound)
    return counts


def _check_ends(exact: Enumeration, start: np.ndarray, end: np.ndarray, num_steps: int) -> None:
    impossible = exact.probs[end] == 0
    if impossible.any():
        row = int(impossible.argmax())
        raise AssertionError(
            "a chain must stay where the target is positive, but one went from"
            f" {_show(exact.sequences, start[row])} to"
            f" {_show(exact.sequences, end[row])}, which has probability 0"
        )
    if (start == end).all():
        raise AssertionError(
            f"no chain of {len(start)} moved in {num_steps} steps: the kernel is the identity"
        )


def check_resampler(
    resampler: Resampler, *, key: PRNGKeyArray, num_draws: int = 20_000, bound: float = 5.0
) -> None:
    """Assert that `resampler` is unbiased, as `base.Resampler` says, on several sets of weights.

    With A = softmax(log_probs), ancestors a_j and log-weights v_j (0 if it gives none), every
    particle i has

        E[ mean_j( exp(v_j) 1{a_j = i} ) ] = A_i

    tested by the mean over independent draws, z = (mean - A_i) / SE.  Log-probabilities are shifted
    by a constant, which must not matter.

    Args:
        resampler: (key, log_probs [N], num) -> ancestors [num], or those and log-weights [num].
        key: typed key.
        num_draws: of each set of weights.
        bound: largest |z| that passes.

    Raises:
        AssertionError: if an ancestor is no particle, one of weight 0 lives on, or the law is
            biased.
        ValueError: when traced, if it is no function, or does not give `num` ancestors as integers.
    """
    check_callable(resampler)

    @jax.jit
    def draw(keys: Array, log_probs: Array) -> tuple[Array, Array]:
        num = log_probs.shape[0]
        return jax.vmap(lambda key: checked_ancestors(resampler(key, log_probs, num), num))(keys)

    for shares, own_key in zip(SHARES, jax.random.split(key, len(SHARES)), strict=True):
        truth = np.asarray(shares) / np.sum(shares)
        log_probs = jnp.log(jnp.asarray(truth, jnp.float32)) - 7.0
        ancestors, log_weights = draw(jax.random.split(own_key, num_draws), log_probs)
        _check_copies(truth, np.asarray(ancestors), np.asarray(log_weights), bound)


def _check_copies(
    truth: np.ndarray, ancestors: np.ndarray, log_weights: np.ndarray, bound: float
) -> None:
    """Of ancestors and log-weights [draws, N]."""
    outside = ancestors[(ancestors < 0) | (ancestors >= len(truth))]
    if outside.size:
        raise AssertionError(
            f"ancestors must be in 0..{len(truth) - 1} for {len(truth)} particles, got {outside[0]}"
        )
    weights = np.exp(log_weights.astype(np.float64))
    copies = np.stack([(weights * (ancestors == i)).mean(1) for i in range(len(truth))], axis=1)
    mean, se = copies.mean(0), copies.std(0, ddof=1) / np.sqrt(len(copies))
    # Without spread, the mean itself: what is left is rounding.
    z = (mean - truth) / np.maximum(se, 1e-6)
    worst = int(np.abs(z).argmax())
    if not np.abs(z[worst]) < bound:
        raise AssertionError(
            f"a resampler must give particle {worst} the share {truth[worst]:.4g} in the mean, of"
            f" weights {truth.round(3).tolist()}, but gave {mean[worst]:.4g} with standard error"
            f" {se[worst]:.2g} (z = {z[worst]:.1f}); at most {bound} passes"
        )


def check_hastings(move: Move, x: X, *, key: PRNGKeyArray, tolerance: float = 1e-3) -> None:
    """Assert that the weight of `move` is a Hastings ratio, dw(x, y) = -dw(y, x), at draws from the
    population `x`.

    What `kernels.mh` needs.  The way back is weighed by `assess`; a move that draws more than y (an
    evidence estimate) has no such equality, and is right to fail.

    Raises:
        AssertionError: if some dw(x, y) + dw(y, x) is not 0 up to `tolerance`.
        ValueError: if the move has no `assess`.
    """
    if move.assess is None:
        raise ValueError(
            "expected a move with assess, to weigh the way back, got one without; pass Move(sample,"
            " assess)"
        )
    move_key, back_key = jax.random.split(key)
    y, dw = move.sample(move_key, x)
    there, back = np.asarray(dw), np.asarray(move.assess(back_key, y, x))
    wrong = np.isnan(there) | (
        ~np.isneginf(there) & ~(np.abs(there + back) <= tolerance * (1 + np.abs(there)))
    )
    if wrong.any():
        row = int(wrong.argmax())
        raise AssertionError(
            f"a Hastings ratio changes its sign on the way back, but row {row} has dw ="
            f" {there[row]:.6g} there and"
            f" {back[row]:.6g} back; accept by kernels.mh only moves that are their own reverse"
        )


def _run(kernel: Kernel, key: PRNGKeyArray, state: Any, num_steps: int) -> Any:
    def body(state: Any, step_key: Array) -> tuple[Any, None]:
        return kernel.step(step_key, state)[0], None

    return jax.jit(lambda state, keys: jax.lax.scan(body, state, keys)[0])(
        state, jax.random.split(key, num_steps)
    )


def _check_structure(kernel: Kernel, key: PRNGKeyArray, state: Any) -> None:
    def describe(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)

    stepped, _ = jax.eval_shape(kernel.step, key, state)
    if describe(stepped) != describe(state):
        raise AssertionError(
            "step must return a state of the structure, shapes and dtypes of init's (a loop"
            " carries it):"
            f" {describe(state)} became {describe(stepped)}"
        )


def _check_lengths(x: Sequences, strings: Sequences, index: np.ndarray) -> None:
    wrong = np.asarray(x.length) != np.asarray(strings.length)[index]
    if wrong.any():
        row = int(wrong.argmax())
        raise AssertionError(
            f"length must count the tokens before EOS, got length {int(x.length[row])} for tokens"
            f" {np.asarray(x.tokens[row]).tolist()}"
        )


def _check_drift(name: str, change: np.ndarray, bound: float) -> None:
    se = change.std() / np.sqrt(change.size)
    z = change.mean() / se if se > 0 else 0.0
    if abs(z) >= bound:
        raise AssertionError(
            f"the target is not invariant: from exact draws, the mean {name} changed by"
            f" {change.mean():.3g} with"
            f" standard error {se:.2g} (z = {z:.1f}); at most {bound} passes"
        )


def _check_flows(counts: np.ndarray, strings: Sequences, bound: float) -> None:
    moves = counts - np.diag(np.diag(counts))
    entered, left = moves.sum(0), moves.sum(1)
    rare = entered + left < MIN_FLOW
    z = np.where(rare, 0.0, (entered - left) / np.sqrt(np.maximum(entered + left, 1.0)))
    total = _stuart_maxwell(moves, rare)
    worst = int(np.abs(z).argmax())
    if abs(z[worst]) >= bound or total >= bound:
        raise AssertionError(
            f"the target is not invariant: z = {total:.1f} over all strings, and"
            f" {_show(strings, worst)} was entered by"
            f" {entered[worst]:.0f} chains and left by {left[worst]:.0f} (z = {z[worst]:.1f}); at"
            f" most {bound} passes"
        )


def _stuart_maxwell(moves: np.ndarray, rare: np.ndarray) -> float:
    """z-score of the joint net flow, with all rare strings as one."""
    groups = np.concatenate([np.eye(len(rare))[~rare], rare[None].astype(float)])
    moves = groups @ moves @ groups.T
    np.fill_diagonal(moves, 0.0)
    flow = moves.sum(0) - moves.sum(1)
    covariance = np.diag(moves.sum(0) + moves.sum(1)) - moves - moves.T
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-9 * max(values[-1], 1.0)
    freedom = int(kept.sum())
    if freedom == 0:
        return 0.0
    ratio = float(((vectors[:, kept].T @ flow) ** 2 / values[kept]).sum()) / freedom
    # Wilson and Hilferty: the cube root of chi^2 / df is close to normal already for few degrees of
    # freedom.
    spread = 2.0 / (9.0 * freedom)
    return (ratio ** (1 / 3) - (1.0 - spread)) / spread**0.5


def _show(strings: Sequences, index: int | np.integer) -> str:
    tokens = np.asarray(strings.tokens[index])[: int(strings.length[index])].tolist()
    return f"{tokens}" + ("" if len(tokens) == strings.tokens.shape[1] else " EOS")
