"""Chains over order and string: pi K = pi by the whole transition matrix, and the moves beside
it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import any_order_tabular as tabular
from ppl.canvas import CanvasTarget
from samplers import kernels
from samplers.canvas import tails, unmasking
from samplers.mcmc import chains

from .enumeration import conditionals

KEY = jax.random.key(6)
L, V = 3, 2
STATES = [
    (rank, x)
    for rank in itertools.permutations(range(L))
    for x in itertools.product(range(V), repeat=L)
]


def score(tokens: Any, length: Any) -> Any:
    return 0.4 * length - 0.7 * (tokens[:, 0] == 0)


@functools.cache
def plain(name: str = "table") -> CanvasTarget:
    make = {"table": tabular.random_table, "joint": tabular.random_joint}[name]
    return make(jax.random.key(4), L, V, eos=1).canvas()


TARGETS = {
    "plain": (lambda: plain(), 1.0),
    "tilted": (lambda: plain() * ppl.reward(score), 1.0),
    "powered": (lambda: plain() ** 2.5 * ppl.reward(score), 2.5),
}


@dataclasses.dataclass(frozen=True)
class Exact:
    """In float64: log d and log Z [S, L] by rank, log Phi [S], and pi [S]."""

    log_d: np.ndarray
    log_norm: np.ndarray
    log_phi: np.ndarray
    alpha: float

    @property
    def pi(self) -> np.ndarray:
        w = np.exp(self.alpha * self.log_d.sum(1) + self.log_phi)
        return w / w.sum()


@functools.cache
def exact(name: str) -> Exact:
    target, alpha = TARGETS[name][0](), TARGETS[name][1]
    d = conditionals(target)
    log_d, log_norm = np.zeros((2, len(STATES), L))
    for s, (rank, x) in enumerate(STATES):
        for k in range(L):
            i = rank.index(k)
            law = d[tuple(v if r < k else V for v, r in zip(x, rank, strict=True))][i]
            log_d[s, k], log_norm[s, k] = math.log(law[x[i]]), math.log((law**alpha).sum())
    xs = jnp.asarray([x for _, x in STATES], jnp.int32)
    log_phi = np.asarray(target.log_potential(xs), np.float64)
    return Exact(log_d, log_norm, log_phi, alpha)


def tail_matrix(name: str) -> np.ndarray:
    """K of a tail, cut uniform over 0..L-1."""
    e, K = exact(name), np.zeros((len(STATES), len(STATES)))
    for (s, (rank, x)), (t, (new_rank, y)) in itertools.product(enumerate(STATES), repeat=2):
        for r in range(L):
            kept = all(
                rank[i] == new_rank[i] and x[i] == y[i]
                for i in range(L)
                if rank[i] < r or new_rank[i] < r
            )
            if kept:
                q = math.exp((e.alpha * e.log_d[t, r:] - e.log_norm[t, r:]).sum())
                ratio = (e.log_norm[t, r:] - e.log_norm[s, r:]).sum() + e.log_phi[t] - e.log_phi[s]
                K[s, t] += q / math.factorial(L - r) / L * min(1, math.exp(ratio))
    return K + np.diag(1 - K.sum(1))


def order_matrix(name: str) -> np.ndarray:
    e, K = exact(name), np.zeros((len(STATES), len(STATES)))
    for (s, (_, x)), (t, (_, y)) in itertools.product(enumerate(STATES), repeat=2):
        if x == y:
            ratio = e.alpha * (e.log_d[t].sum() - e.log_d[s].sum())
            K[s, t] = min(1, math.exp(ratio)) / math.factorial(L)
    return K + np.diag(1 - K.sum(1))


def states() -> Any:
    ranks, xs = (jnp.asarray(part, jnp.int32) for part in zip(*STATES, strict=True))
    canvases = unmasking.start(plain(), len(STATES))
    return dataclasses.replace(canvases, tokens=xs, rank=ranks)


@pytest.mark.parametrize("name", TARGETS)
def test_the_matrices_leave_the_target_invariant(name: str):
    """And are those of detailed balance; new orders make short work of what tails mix slowly."""
    e = exact(name)
    second = {}
    both = tail_matrix(name) @ order_matrix(name)
    for what, K in (("tail", tail_matrix(name)), ("order", order_matrix(name)), ("both", both)):
        assert np.abs(e.pi @ K - e.pi).max() < 1e-12
        assert K.min() >= -1e-15
        second[what] = np.sort(np.abs(np.linalg.eigvals(K)))[-2]
    assert second["both"] < second["tail"] < 1 - 1e-6 < second["order"]
    if name == "plain":
        assert second["tail"] == pytest.approx(2 / 3, abs=1e-9)


@pytest.mark.parametrize("name", ["powered"])
def test_the_moves_are_those_of_the_matrices(name: str):
    """The states' parts are exact; steps from every state have the matrix's rows."""
    target, e = TARGETS[name][0](), exact(name)
    state = tails.init(target, states())
    np.testing.assert_allclose(state.log_d, e.log_d, atol=2e-5)
    np.testing.assert_allclose(state.log_norm, e.log_norm, atol=2e-5)
    np.testing.assert_allclose(state.log_phi, e.log_phi, atol=2e-5)
    index = {s: i for i, s in enumerate(STATES)}
    copies = 1000
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), state)
    for make, K in ((tails.kernel, tail_matrix(name)), (tails.reorder, order_matrix(name))):
        after, info = make(target).step(KEY, many)
        ranks, xs = np.asarray(after.rank).tolist(), np.asarray(after.tokens).tolist()
        to = [index[tuple(r), tuple(x)] for r, x in zip(ranks, xs, strict=True)]
        counts = np.zeros(K.shape)
        np.add.at(counts, (np.repeat(np.arange(len(K)), copies), to), 1)
        assert counts[K < 1e-15].sum() == 0
        likely = (K * copies > 5) & (K < 1 - 1e-9)
        z = (counts - copies * K)[likely] / np.sqrt(copies * K * (1 - K))[likely]
        assert np.abs(z).max() < 5.5
        again = tails.init(target, after)
        np.testing.assert_allclose(after.log_d, again.log_d, atol=2e-5)
        np.testing.assert_allclose(after.log_norm, again.log_norm, atol=2e-5)
        np.testing.assert_allclose(after.log_phi, again.log_phi, atol=2e-5)
        assert float(info.acceptance) == pytest.approx(
            float(np.mean(np.asarray(info.accepted))), abs=1e-6
        )


@pytest.mark.slow
def test_a_run_of_both():
    """With a given site, and from what SMC drew."""
    target = plain().lm.canvas(given={1: 0}) ** 2 * ppl.reward(score)
    start = unmasking.run(KEY, target, num_particles=200).samples
    kernel = kernels.cycle(tails.kernel(target), tails.reorder(target))
    keep = lambda state: {"tokens": state.tokens, "rank": state.rank}  # noqa: E731
    out = chains.run(KEY, kernel, start, num_samples=200, collect=keep)
    tokens = np.asarray(out.draws["tokens"])[20:].reshape(-1, L)
    assert (tokens[:, 1] == 0).all()
    expected = np.zeros((V, V))
    for a, b in itertools.product(range(V), repeat=2):
        for rank in ((0, -1, 1), (1, -1, 0)):
            x = jnp.asarray([[a, 0, b]], jnp.int32), jnp.asarray([rank], jnp.int32)
            expected[a, b] += math.exp(float(target.log_density(*x)[0]))
    expected /= expected.sum()
    found = np.bincount(tokens[:, 0] * V + tokens[:, 2], minlength=V * V) / len(tokens)
    np.testing.assert_allclose(found, expected.ravel(), atol=0.02)


def gibbs(name: str, count: int) -> np.ndarray:
    """K over strings: mask a uniform set of `count` sites, fill it in a uniform order."""
    d, xs = conditionals(plain(name)), list(itertools.product(range(V), repeat=L))
    K = np.zeros((len(xs), len(xs)))
    orders = list(itertools.permutations(range(L), count))
    for (s, x), order in itertools.product(enumerate(xs), orders):
        c = tuple(V if i in order else v for i, v in enumerate(x))
        for t, y in enumerate(xs):
            if all(y[i] == x[i] for i in range(L) if i not in order):
                p, now = 1.0, list(c)
                for i in order:
                    p *= d[tuple(now)][i, y[i]]
                    now[i] = y[i]
                K[s, t] += p / len(orders)
    return K


def test_masking_again_is_right_for_a_joint_law_only():
    """Gibbs by re-masking: invariant where d is consistent, and elsewhere for no law with a name,
    unless all is masked; which is why it is no kernel here.
    """
    for count in (1, 2, 3):
        p = np.exp(np.asarray(plain("joint").lm.params, np.float64)).ravel()
        p /= p.sum()
        assert np.abs(p @ gibbs("joint", count) - p).max() < 1e-6
    e = exact("plain")
    pbar = np.zeros((V,) * L)
    for (_, x), pi in zip(STATES, e.pi, strict=True):
        pbar[x] += pi
    far = [0.5 * np.abs(pbar.ravel() @ gibbs("table", n) - pbar.ravel()).sum() for n in (1, 2, 3)]
    assert far[0] > 0.02 and far[1] > 0.02 and far[2] < 1e-6


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="a target over canvases"):
        tails.kernel(plain().left_to_right())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected canvases and ranks \[N, 3\]"):
        tails.init(plain(), unmasking.start(tabular.random_table(KEY, 2, 2).canvas(), 4))
