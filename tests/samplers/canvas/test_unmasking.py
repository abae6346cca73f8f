"""SMC on canvases: every path's weight and probability, against enumeration."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import any_order_tabular as tabular
from ppl.canvas import CanvasTarget
from samplers.canvas import orders, twists, unmasking

from . import enumeration
from .enumeration import conditionals, path_of, paths

KEY = jax.random.key(2)
NUM = 20_000
SHARP = 2.0


def letters(vocab_size: int, eos: int) -> Any:
    class Tokenizer(NamedTuple):
        token_bytes: tuple
        eos: int
        vocab_size: int

    known = [b"a", b"b", b"c"][: vocab_size - 1]
    return Tokenizer((*known, None), eos, vocab_size)


def score(tokens: Any, length: Any) -> Any:
    return 0.4 * length - 0.7 * (tokens[:, 0] == 0)


@functools.cache
def base(length: int = 3, size: int = 2, given: tuple = ()) -> CanvasTarget:
    lm = tabular.random_table(jax.random.key(4), length, size, eos=1)
    return lm.canvas(given=given)


def flat(d: np.ndarray) -> np.ndarray:
    return np.zeros(len(d))


def margins(d: np.ndarray) -> np.ndarray:
    first, second = np.sort(d, axis=1)[:, ::-1][:, :2].T
    return SHARP * (first - second)


def entropies(d: np.ndarray) -> np.ndarray:
    return SHARP * (d * np.log(d)).sum(1)


def tops(d: np.ndarray) -> np.ndarray:
    return SHARP * d.max(1)


def process_gamma(target: CanvasTarget, order: Any, block: int, alpha: float) -> dict:
    """The process law: sites by their policy, tokens by d^alpha (not normalised), times Phi."""
    d, found = conditionals(target), {}
    size = target.lm.vocab_size - 1
    for (rank, x), q in paths(target, order, block).items():
        log_p = 0.0
        for now in range(max(rank) + 1):
            c = tuple(v if r < now else size for v, r in zip(x, rank, strict=True))
            log_p += sum(math.log(d[c][i, x[i]]) for i in range(len(x)) if rank[i] == now)
        found[rank, x] = math.log(q) + (alpha - 1) * log_p
    return found


CASES: dict[str, tuple[Callable, Any, Callable, int]] = {
    # sampler, order, the same in numpy, block
    "uniform": (unmasking.run, orders.uniform, flat, 1),
    "margin": (unmasking.run, orders.margin(SHARP), margins, 1),
    "process uniform 2": (unmasking.process, orders.uniform, flat, 2),
    "process entropy": (unmasking.process, orders.entropy(SHARP), entropies, 1),
    "process top 2": (unmasking.process, orders.top_probability(SHARP), tops, 2),
}


FAST = ("margin", "process uniform 2")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_path_is_properly_weighted(name: str):
    """w(path) = gamma(path) / q(path) for every path, and paths are drawn from q: so that
    sum_path q w f = sum gamma f, LAW 1.
    """
    sampler, order, log_weights, block = CASES[name]
    target = base() ** 1.5 * ppl.reward(score)
    q = paths(target, log_weights, block, alpha=1.5)
    assert sum(q.values()) == pytest.approx(1, abs=1e-12)
    more = {} if sampler is unmasking.run else {"block": block}
    out = sampler(KEY, target, num_particles=NUM, order=order, threshold=0.0, **more)
    ranks, xs = (jnp.asarray(part, jnp.int32) for part in zip(*q, strict=True))
    if sampler is unmasking.run:
        log_gamma = np.asarray(target.log_density(xs, ranks))
    else:
        log_p = process_gamma(base(), log_weights, block, 1.5)
        log_gamma = np.array([log_p[path] for path in q]) + np.asarray(target.log_potential(xs))
    found, counts, total = enumeration.log_weights_by_path(out), [], 0.0
    for (path, p), log_g in zip(q.items(), log_gamma.tolist(), strict=True):
        drawn = found.get(path, [])
        counts.append(len(drawn))
        if drawn:
            np.testing.assert_allclose(drawn, log_g - math.log(p), atol=2e-5)
            total += p * math.exp(np.mean(drawn))
    assert set(found) <= set(q)
    probs = np.array(list(q.values()))
    z = (np.array(counts) - NUM * probs) / np.sqrt(NUM * probs * (1 - probs))
    assert np.abs(z[probs * NUM > 5]).max() < 5
    seen = np.array(counts) > 0
    assert total == pytest.approx(np.exp(log_gamma)[seen].sum(), rel=1e-5)
    assert seen.mean() > 0.9


def test_orders_that_are_left_out_are_said():
    """A greedy order takes one of three sites first."""
    target = base()
    greedy = unmasking.run(KEY, target, num_particles=4, order=orders.margin())
    np.testing.assert_allclose(greedy.missing_support, 2 / 3, rtol=1e-5)
    assert "truncated" in repr(greedy)
    soft = unmasking.run(KEY, target, num_particles=4, order=orders.margin(SHARP))
    assert float(soft.missing_support) == 0
    # Of a process the order is part of the law.
    of_process = unmasking.process(KEY, target, num_particles=4, order=orders.margin())
    assert float(of_process.missing_support) == 0


@pytest.mark.slow
def test_resampling_keeps_the_evidence():
    target = base() ** 1.5 * ppl.reward(score)
    xs = jnp.asarray(list(itertools.product(range(2), repeat=3)), jnp.int32)
    ranks = jnp.asarray(list(itertools.permutations(range(3))), jnp.int32)
    pairs = jnp.repeat(ranks, len(xs), axis=0), jnp.tile(xs, (len(ranks), 1))
    z_exact = float(jnp.exp(target.log_density(pairs[1], pairs[0])).sum())
    steer = twists.steering(target, score)

    def one(key: Any, threshold: Any) -> Any:
        out = unmasking.run(key, target, num_particles=4, twist=steer, threshold=threshold)
        return jnp.exp(out.log_z), out.trace.resampled.any()

    keys = jax.random.split(KEY, 4000)
    found, resampled = jax.vmap(lambda key: one(key, 1.1))(keys)
    assert bool(resampled.all())
    error = float(found.std()) / math.sqrt(len(keys))
    assert abs(float(found.mean()) - z_exact) < 5 * error < 0.1 * z_exact


def accepts(x: tuple[int, ...]) -> bool:
    """The strings that (ab)*a? matches: letters in turn, from the first; EOS is 2."""
    text = x[: x.index(2)] if 2 in x else x
    return all(v == i % 2 for i, v in enumerate(text)) and len(text) > 0


@functools.cache
def constrained() -> CanvasTarget:
    plain = tabular.random_table(jax.random.key(6), 4, 3, eos=2).canvas()
    return plain * ppl.regex("a|ab|aba|abab", letters(4, 2), canonical=False)


@pytest.mark.parametrize("block", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_the_twist_of_a_regular_expression(block: int):
    """Sites are drawn as if all were drawn together and accepted; every string is accepted, and the
    evidence is that of the constraint.
    """
    target, num = constrained(), 2000
    out = unmasking.process(
        KEY, target, block=block, num_particles=num, twist=twists.regular(target), threshold=0.0
    )
    p = paths(target.lm.canvas(), flat, block)
    z_exact = sum(q for (_, x), q in p.items() if accepts(x))
    assert all(accepts(x) for _, x in path_of(out))
    raw = np.exp(np.asarray(out.log_weights, np.float64) + float(out.log_z))
    error = raw.std() / math.sqrt(num)
    assert abs(raw.mean() - z_exact) < 5 * error + 1e-6
    law = enumeration.accepted(accepts)
    q = paths(target.lm.canvas(), flat, block, law=law)
    relative = sum(p[path] ** 2 / prob for path, prob in q.items()) / z_exact**2 - 1
    bootstrap = 1 / z_exact - 1
    assert relative < (0.5 * bootstrap if block < 4 else 1e-9)
    for path, ws in enumeration.log_weights_by_path(out).items():
        np.testing.assert_allclose(ws, math.log(p[path]) - math.log(q[path]), atol=5e-5)


def test_steering_and_greedy_orders_change_variances_only():
    """Each weight of the process law is Phi(x), whatever psi was."""
    target = base() * ppl.reward(score)
    out = unmasking.process(
        KEY,
        target,
        num_particles=64,
        order=orders.margin(),
        twist=twists.steering(target, score),
        threshold=0.0,
    )
    raw = np.asarray(out.log_weights) + float(out.log_z)
    np.testing.assert_allclose(raw, target.log_potential(out.samples.tokens), atol=1e-5)
    np.testing.assert_allclose(
        out.log_prob, target.log_prob(out.samples.tokens, out.samples.rank), atol=1e-5
    )
    assert int(out.cost.forwards) == 3 and int(out.cost.tokens) == 64 * 3
    assert int(out.cost.potential_calls) == 64


def test_blocks_from_left_to_right():
    lm = tabular.random_table(jax.random.key(4), 4, 2)
    target = lm.canvas(given={1: 0})
    order = orders.blocks(2, orders.uniform)
    rank = np.asarray(unmasking.process(KEY, target, num_particles=64, order=order).samples.rank)
    assert (rank[:, 0] == 0).all() and (rank[:, 1] == -1).all()
    assert {tuple(row) for row in rank[:, 2:].tolist()} == {(1, 2), (2, 1)}
    left = unmasking.process(KEY, target, num_particles=4, order=orders.left_to_right)
    np.testing.assert_array_equal(left.samples.rank, [[0, -1, 1, 2]] * 4)


def test_a_larger_population_keeps_the_old_draws():
    few, many = (
        unmasking.process(KEY, base(), num_particles=num, threshold=0.0).samples.tokens
        for num in (3, 5)
    )
    np.testing.assert_array_equal(few, many[:3])


BAD = {
    "target": (lambda: unmasking.run(KEY, base().left_to_right()), "a target over canvases"),
    "num": (lambda: unmasking.run(KEY, base(), num_particles=0), "num_particles to be a whole"),
    "block": (lambda: unmasking.process(KEY, base(), block=0), "block to be a whole"),
    "order": (lambda: unmasking.run(KEY, base(), order="margin"), "order to be a function"),
    "size": (lambda: orders.blocks(0), "size to be a whole"),
    "regular": (lambda: twists.regular(base()), "one regular constraint, got 0"),
    "score": (lambda: twists.steering(base(), 3), "score to be a function"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
