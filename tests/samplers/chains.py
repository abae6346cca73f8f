"""Transition matrices of suffix moves, enumerated over all cuts and all strings from the kernel's
own functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import tabular
from ppl.exact import strings
from ppl.lm import LM
from ppl.target import Target
from samplers.mcmc import suffix
from samplers.strings import regeneration
from samplers.strings.regeneration import State
from tests.helpers import EOS


def wordy(vocab_size: int = 50, p_eos: float = 0.03) -> LM:
    """A Markov chain whose strings are long."""
    logits = 1.5 * jax.random.normal(jax.random.key(21), (vocab_size, vocab_size))
    others = jax.nn.softmax(jnp.where(jnp.arange(vocab_size) == EOS, -jnp.inf, logits))
    return tabular.markov(
        jnp.where(jnp.arange(vocab_size) == EOS, p_eos, (1 - p_eos) * others), eos=EOS
    )


def eight_strings() -> Target:
    """p^2.5 over strings of exactly three tokens out of two, every conditional law another one."""
    logits = 1.2 * jax.random.normal(jax.random.key(22), (40, 3))
    lm = tabular.table(logits.at[:, EOS].set(-jnp.inf), eos=EOS)
    return lm.given((2, 0), max_tokens=3) ** 2.5


def first_cut(cut: Any, length: Any, horizon: Any) -> Any:
    """A law of the cut: always 0."""
    cut, *_ = jnp.broadcast_arrays(cut, length, horizon)
    return jnp.where(cut == 0, 0.0, -1e9)


def second_eigenvalue(chain: Chain) -> float:
    """The second greatest |eigenvalue| of K, on the support: how slowly the chain forgets."""
    inside = chain.pi > 0
    return float(np.sort(np.abs(np.linalg.eigvals(chain.matrix[np.ix_(inside, inside)])))[-2])


@dataclasses.dataclass(frozen=True)
class Chain:
    """A kernel over all M strings of a target, in float64.

    pieces: their state.  log_pi [M], the law.  matrix [M, M].
    """

    pieces: State
    log_pi: np.ndarray
    matrix: np.ndarray

    @property
    def pi(self) -> np.ndarray:
        return np.exp(self.log_pi)

    @property
    def bias(self) -> float:
        """|pi K - pi|."""
        return float(np.abs(self.pi @ self.matrix - self.pi).max())

    @property
    def imbalance(self) -> float:
        """How far K is from reversible: the greatest |pi_x K_xy - pi_y K_yx|."""
        flow = self.pi[:, None] * self.matrix
        return float(np.abs(flow - flow.T).max())


def pieces_of(target: Target, how: suffix.Method) -> State:
    """All strings as the kernel scores them, in float64; strings that begin alike share pieces to
    the last bit.
    """
    x = strings(target.lm.vocab_size, target.max_tokens, target.lm.eos)
    state = regeneration.score(target, how.proposal, x)
    tokens, seen = np.asarray(x.tokens), {}
    found = [
        np.asarray(leaf, np.float64).copy() for leaf in (state.log_p, state.log_q, state.log_phi)
    ]
    for row, string in enumerate(tokens.tolist()):
        for t in range(min(int(x.length[row]) + 1, target.max_tokens)):
            first = seen.setdefault(tuple(string[: t + 1]), (row, t))
            for leaf in found:
                leaf[row, t] = leaf[first]
    return State(x, *(jnp.asarray(leaf) for leaf in found), cache=())


def suffix_chain(target: Target, **options: Any) -> Chain:
    """K of `suffix.kernel`: its law of the cut, its proposal's log q, and its acceptance."""
    return chain_of(target, suffix.method(target, **options))


def chain_of(
    target: Target,
    how: suffix.Method,
    accept: Callable[[np.ndarray], np.ndarray] = lambda log_ratio: np.exp(np.minimum(log_ratio, 0)),
    log_tilt: np.ndarray | float = 0.0,
) -> Chain:
    """K of suffix moves: the law of the cut, log q, and `accept` of all log-ratios [M, M], rows
    present, columns new.

    pi is gamma e^log_tilt, if what is accepted depends on more than gamma.
    """
    with jax.enable_x64(True):
        x = pieces_of(target, how)
        length, num = np.asarray(x.sequences.length), len(x.sequences.length)
        log_gamma = np.asarray(regeneration.log_density(target, x), np.float64) + log_tilt
        log_pi = log_gamma - np.logaddexp.reduce(log_gamma)
        matrix = np.zeros((num, num))
        rows, columns = (
            index.ravel() for index in np.meshgrid(np.arange(num), np.arange(num), indexing="ij")
        )

        def take(index: np.ndarray) -> State:
            return jax.tree.map(lambda leaf: leaf[index], x)

        @jax.jit
        def at(r: Any, present: State, new: State) -> tuple[Any, Any]:
            law = how.cut(jnp.full(num, r), jnp.asarray(length), jnp.full(num, target.max_tokens))
            horizon = jnp.full(len(rows), target.max_tokens)
            return law, suffix.log_ratio(
                target, how.cut, present, new, jnp.full(len(rows), r), horizon
            )

        present, new = take(rows), take(columns)
        for r in range(target.max_tokens):
            law, ratio = at(jnp.int32(r), present, new)
            chance = np.exp(np.asarray(law, np.float64))[:, None]
            taken = accept(np.asarray(ratio, np.float64).reshape(num, num))
            draw = np.exp(np.asarray(x.log_q)[:, r:].sum(1))
            # What is never drawn has no ratio.
            matrix += chance * np.where(reachable(x, r) & (draw > 0), draw * taken, 0.0)
    matrix[np.isneginf(log_pi)] = 0.0  # chains do not start outside of the support
    np.fill_diagonal(matrix, 0.0)
    return Chain(x, log_pi, matrix + np.diag(1 - matrix.sum(1)))


def reachable(x: State, r: int) -> np.ndarray:
    """[M, M]: whether the second string begins as the first does, r tokens long, both being at
    least so long.
    """
    tokens, length = np.asarray(x.sequences.tokens), np.asarray(x.sequences.length)
    same = (tokens[:, None, :r] == tokens[None, :, :r]).all(2)
    return same & (length[:, None] >= r) & (length[None] >= r)


def proposal_mass(x: State, r: int) -> np.ndarray:
    """[M]: the total probability of all that may be drawn after x_<r; 1 where the string is that
    long.
    """
    draw = np.exp(np.asarray(x.log_q)[:, r:].sum(1))
    return np.where(np.asarray(x.sequences.length) >= r, (reachable(x, r) * draw).sum(1), 1.0)


def published_bias(target: Target) -> float:
    """|pi K - pi| of power sampling as it is coded in public, over strings that may lack their EOS.

    The cut is uniform in the present length, the proposal is cut at that length, and compared with
    as much of the present string as it is long.
    """
    how = suffix.method(target)
    with jax.enable_x64(True):
        x = pieces_of(target, how)
        log_w = np.asarray(regeneration.increments(target, x))
        log_pi = np.asarray(regeneration.log_density(target, x))
    log_q, pi, horizon = (
        np.asarray(x.log_q),
        np.exp(log_pi - np.logaddexp.reduce(log_pi)),
        target.max_tokens,
    )
    tokens = [tuple(row) for row in np.asarray(x.sequences.tokens).tolist()]
    size = np.minimum(np.asarray(x.sequences.length) + 1, horizon)
    # What can be drawn is a string cut to some length; of those that become equal so, one is
    # enough.
    firsts: dict[int, list[int]] = {}
    for limit in range(1, horizon + 1):
        seen: dict[tuple, int] = {}
        for row in range(len(tokens)):
            seen.setdefault(tokens[row][: min(int(size[row]), limit)], row)
        firsts[limit] = list(seen.values())
    after: dict[tuple, float] = {}
    for i in np.flatnonzero(pi > 0):
        present, stays = tokens[i], 1.0
        for r in range(size[i]):
            for j in firsts[size[i]]:
                end = min(int(size[j]), int(size[i]))
                if end <= r or tokens[j][:r] != present[:r]:
                    continue
                if np.isneginf(log_q[j, r:end]).any():
                    continue
                ratio = log_w[j, r:end].sum() - log_w[i, r:end].sum()
                flow = np.exp(log_q[j, r:end].sum() + min(ratio, 0.0)) / size[i]
                y = tokens[j][:end]
                after[y] = after.get(y, 0.0) + pi[i] * flow
                stays -= flow
        own = present[: size[i]]
        after[own] = after.get(own, 0.0) + pi[i] * stays
    before = {present[:n]: p for present, n, p in zip(tokens, size, pi, strict=True)}
    return max(abs(after.get(y, 0.0) - before.get(y, 0.0)) for y in {*after, *before})


def chi_square_z(counts: np.ndarray, matrix: np.ndarray, least: float = 5.0) -> float:
    """How far counted moves are from the rows of a matrix, as a z-score (Pearson; rare cells of a
    row are pooled).
    """
    total, freedom = 0.0, 0
    for observed, law in zip(counts, matrix, strict=True):
        expected = observed.sum() * law
        common = expected >= least
        cells = [*zip(observed[common], expected[common], strict=True)]
        if (rest := expected[~common].sum()) >= least:
            cells.append((observed[~common].sum(), rest))
        elif not cells or rest < 1e-9:
            assert observed[~common].sum() == 0 or rest > 0, "a move of probability zero was made"
        total += sum((o - e) ** 2 / e for o, e in cells)
        freedom += max(len(cells) - 1, 0)
    ratio, spread = total / freedom, 2.0 / (9.0 * freedom)
    return (ratio ** (1 / 3) - (1.0 - spread)) / spread**0.5
