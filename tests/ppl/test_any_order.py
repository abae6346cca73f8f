"""Any-order models and their three laws, against enumeration of all orders and canvases."""

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
from ppl.any_order import AnyOrderFunctions, AnyOrderLM
from ppl.exact import enumerate_strings
from ppl.target import check_target
from ppl.testing import check_any_order, check_lm

KEY = jax.random.key(0)
L, V = 3, 2
NAMES = ("joint", "table")


@functools.cache
def canvas(name: str, length: int = L, size: int = V, eos: int | None = None) -> ppl.CanvasTarget:
    make = {"joint": tabular.random_joint, "table": tabular.random_table}[name]
    return make(jax.random.key(7), length, size, eos=eos).canvas()


def laws(target: ppl.CanvasTarget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All canvases [X, L], all orders' ranks [O, L], and log gamma [O, X]."""
    size = target.lm.vocab_size - 1
    xs = np.array(list(itertools.product(range(size), repeat=target.length)), np.int32)
    count = int(target.open.sum())
    ranks = np.full((math.factorial(count), target.length), -1, np.int32)
    ranks[:, np.asarray(target.open)] = list(itertools.permutations(range(count)))
    pairs = np.repeat(ranks, len(xs), 0), np.tile(xs, (len(ranks), 1))
    log_gamma = target.log_density(jnp.asarray(pairs[1]), jnp.asarray(pairs[0]))
    return xs, ranks, np.asarray(log_gamma, np.float64).reshape(len(ranks), len(xs))


def conditionals(target: ppl.CanvasTarget) -> dict[tuple[int, ...], np.ndarray]:
    """log d [L, V] of every canvas, MASK being V, in float64."""
    size = target.lm.vocab_size - 1
    all_c = list(itertools.product(range(size + 1), repeat=target.length))
    tokens = np.array(all_c, np.int32)
    found = target.denoise(jnp.asarray(tokens), jnp.asarray(tokens == size))
    log_d = np.asarray(found, np.float64)[:, :, :size]
    log_d -= np.log(np.exp(log_d).sum(2, keepdims=True))
    return dict(zip(all_c, log_d, strict=True))


def along(d: dict, x: tuple[int, ...], order: tuple[int, ...]) -> float:
    """log p_order(x), site by site."""
    c, total = [max(max(c) for c in d)] * len(x), 0.0
    for site in order:
        total += d[tuple(c)][site, x[site]]
        c[site] = x[site]
    return total


@pytest.mark.parametrize("name", NAMES)
def test_the_referee_is_the_product_along_the_order(name: str):
    target = canvas(name)
    d, (xs, ranks, log_gamma) = conditionals(target), laws(target)
    for rank, row in zip(ranks, log_gamma, strict=True):
        order = tuple(np.argsort(rank).tolist())
        expected = [along(d, tuple(x), order) - math.log(6) for x in xs.tolist()]
        np.testing.assert_allclose(row, expected, atol=2e-6)
    assert np.exp(log_gamma).sum() == pytest.approx(1, abs=1e-5)


def test_orders_agree_where_the_conditionals_come_from_a_joint_law():
    """And in general the left-to-right law is far from the mean over orders."""
    far = {}
    for name in NAMES:
        _, ranks, log_gamma = laws(canvas(name))
        p = np.exp(log_gamma) * len(ranks)
        left = int((ranks == np.arange(L)).all(1).argmax())
        far[name] = 0.5 * np.abs(p[left] - p.mean(0)).sum()
    assert far["joint"] < 1e-6 and far["table"] > 0.1


def test_the_three_forms_of_the_bound_agree():
    """E_order log p_order, sums over sets by their size, and the integral over times."""
    length, size = 4, 3
    d = conditionals(canvas("table", length, size))
    x, sites = (1, 0, 2, 2), range(length)
    orders = list(itertools.permutations(sites))
    by_order = np.array([along(d, x, order) for order in orders])

    def inside(masked: tuple[int, ...]) -> float:
        c = tuple(size if i in masked else x[i] for i in sites)
        return sum(d[c][i, x[i]] for i in masked)

    by_size = [
        np.mean([inside(s) / k for s in itertools.combinations(sites, k)]) for k in range(1, 5)
    ]
    # int_0^1 t^(k - 1) (1 - t)^(L - k) dt = (k - 1)! (L - k)! / L!
    by_time = sum(
        inside(s) * math.factorial(k - 1) * math.factorial(length - k) / math.factorial(length)
        for k in range(1, length + 1)
        for s in itertools.combinations(sites, k)
    )
    bound = by_order.mean()
    np.testing.assert_allclose([length * np.mean(by_size), by_time], bound, atol=1e-12)
    log_pbar = np.log(np.exp(by_order).mean())
    two = np.mean([np.logaddexp(a, b) - math.log(2) for a in by_order for b in by_order])
    assert bound < two < log_pbar
    total = sum(
        np.mean([np.exp(along(d, y, order)) for order in orders])
        for y in itertools.product(range(size), repeat=length)
    )
    assert total == pytest.approx(1, abs=1e-12)


def test_powers_tilts_and_givens():
    """gamma = U(order) p_order^alpha Phi; given sites are no part of the order."""
    reward = ppl.reward(lambda tokens, length: 0.3 * length - 0.5 * (tokens[:, 0] == 1))
    lm = canvas("table", eos=1).lm
    plain = lm.canvas(given={1: 0})
    target = plain**2 * reward
    xs, ranks, log_gamma = laws(target)
    log_p = laws(plain)[2] + math.log(len(ranks))
    x = target.strings(jnp.asarray(xs))
    log_phi = 0.3 * np.asarray(x.length) - 0.5 * (np.asarray(x.tokens[:, 0]) == 1)
    np.testing.assert_allclose(log_gamma, 2 * log_p - math.log(2) + log_phi, atol=1e-5)
    assert np.isneginf(log_gamma[:, xs[:, 1] == 1]).all()
    assert np.exp(log_p).sum() == pytest.approx(2, abs=1e-5)
    np.testing.assert_allclose(laws(plain**3)[2], laws((plain**1.5) ** 2)[2], atol=1e-5)


def test_what_is_no_order_has_density_zero():
    target = canvas("joint")
    xs = jnp.zeros((5, L), jnp.int32).at[4, 0].set(2)
    ranks = jnp.array([[0, 1, 2], [0, 0, 1], [1, 2, 3], [-1, 0, 1], [0, 1, 2]], jnp.int32)
    found = np.isneginf(np.asarray(target.log_density(xs, ranks)))
    np.testing.assert_array_equal(found, [False, True, True, True, True])
    blocks = target.log_prob(xs[:1], jnp.zeros((1, L), jnp.int32))[0]
    d = conditionals(target)[(V,) * L]
    assert float(blocks) == pytest.approx(d[:, 0].sum(), abs=1e-5)


@pytest.mark.parametrize("given", [pytest.param((), marks=pytest.mark.slow), {1: 0}])
def test_left_to_right_is_a_language_model(given: Any):
    """p_id of the canvases that begin with a string, and all samplers' contract."""
    base = canvas("table", length=4, eos=1).lm.canvas(given=given)
    target = base.left_to_right()
    exact = enumerate_strings(target)
    d = conditionals(canvas("table", length=4, eos=1))
    open_ = [i for i in range(4) if i not in dict(given)]
    expected: dict[tuple[int, ...], float] = {}
    for free in itertools.product(range(V), repeat=len(open_)):
        x = list(dict(given).get(i, 0) for i in range(4))
        c = [dict(given).get(i, V) for i in range(4)]
        log_p = 0.0
        for i, token in zip(open_, free, strict=True):
            log_p += d[tuple(c)][i, token]
            x[i] = c[i] = token
        string = tuple(x[: x.index(1)] if 1 in x else x)
        expected[string] = expected.get(string, 0.0) + math.exp(log_p)
    for tokens, length, prob in zip(
        np.asarray(exact.sequences.tokens),
        np.asarray(exact.sequences.length),
        exact.probs,
        strict=True,
    ):
        assert expected.get(tuple(tokens[:length].tolist()), 0.0) == pytest.approx(prob, abs=1e-5)
    assert exact.log_z == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_left_to_right_passes_the_kit():
    check_lm(canvas("table", length=4, eos=1).left_to_right().lm, [0], key=KEY, max_tokens=3)


def test_the_canvas_of_a_markov_chain():
    """Conditionals by sums along the chain are those of the table of its joint law."""
    initial = np.array([0.5, 0.2, 0.3])
    transition = np.array([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    joint = np.log(initial)[:, None, None] + np.log(transition)[:, :, None] + np.log(transition)
    chain = tabular.markov(initial, transition).canvas(length=3)
    whole = tabular.joint(joint).canvas()
    c = jnp.array(list(itertools.product(range(4), repeat=3)), jnp.int32)
    masked = c == 3
    found, expected = chain.denoise(c, masked), whole.denoise(c, masked)
    np.testing.assert_allclose(np.asarray(found)[masked], np.asarray(expected)[masked], atol=1e-5)


def test_the_grids():
    grids = tabular.sudokus()
    assert grids.shape == (tabular.GRIDS, 16) and len({tuple(g) for g in grids.tolist()}) == 288
    target = tabular.latin4().canvas(given={0: 0, 1: 1, 2: 2})
    tokens, masked = target.start(1)
    law = np.exp(np.asarray(target.denoise(tokens, masked)))[0]
    assert law[3].tolist() == pytest.approx([0, 0, 0, 1, 0], abs=1e-6)
    assert law[4].tolist() == pytest.approx([0, 0, 0.5, 0.5, 0], abs=1e-6)


# The kit.


def _rows_together(static: Any, params: Any, prompt: Any, tokens: Any, masked: Any, at: Any) -> Any:
    logits = jnp.zeros((*tokens.shape, 3)) + params * tokens.mean()
    return tabular.sites_at(logits.at[:, :, 0].add(tokens.sum() * 0.1), at)


def _forgets_at(static: Any, params: Any, prompt: Any, tokens: Any, masked: Any, at: Any) -> Any:
    logits = jnp.zeros((*tokens.shape, 3)).at[:, :, 0].add(0.3 * jnp.arange(tokens.shape[1]))
    return logits if at is None else logits[:, : at.shape[1]]


def _reads_padding(static: Any, params: Any, prompt: Any, tokens: Any, masked: Any, at: Any) -> Any:
    logits = jnp.zeros((*tokens.shape, 3)).at[:, :, 0].add(0.1 * prompt.tokens.sum())
    return tabular.sites_at(logits, at)


def _not_finite(static: Any, params: Any, prompt: Any, tokens: Any, masked: Any, at: Any) -> Any:
    return tabular.sites_at(jnp.full((*tokens.shape, 3), jnp.nan), at)


@pytest.mark.parametrize(
    ("denoise", "message"),
    [
        (_rows_together, "rows must be independent|a row alone"),
        (_forgets_at, "`at` must give"),
        (_reads_padding, "behind the prompt"),
        (_not_finite, "must have a law"),
    ],
)
def test_the_kit_finds_planted_faults(denoise: Any, message: str):
    functions = AnyOrderFunctions(ppl.any_order.no_data, denoise)
    lm = AnyOrderLM(jnp.float32(1), None, functions, 3, 2, 1)
    with pytest.raises(AssertionError, match=message):
        check_any_order(lm, [0, 1], key=KEY, length=3, num=3)


def test_the_kit_tells_the_spread_of_orders():
    spread = {name: check_any_order(canvas(name).lm, key=KEY, num=64) for name in NAMES}
    _, ranks, log_gamma = laws(canvas("table"))
    log_p = log_gamma + math.log(len(ranks))
    apart = np.abs(log_p[:, None] - log_p[None])
    expected = (np.exp(log_p)[:, None] * apart).sum() / len(ranks) ** 2
    assert spread["joint"] < 1e-5
    assert spread["table"] == pytest.approx(expected, rel=0.3)


BAD = {
    "twice": (lambda lm: lm.canvas(given=[(0, 1), (0, 0)]), "site 0 twice"),
    "outside": (lambda lm: lm.canvas(given={3: 0}), r"sites in \[0, 3\), got 3"),
    "mask": (lambda lm: lm.canvas(given={1: 2}), r"other than MASK \(2\), got MASK"),
    "token": (lambda lm: lm.canvas(given={1: 9}), r"\[0, 3\).*got 9"),
    "full": (lambda lm: lm.canvas(given={0: 0, 1: 0, 2: 0}), "leave one to be drawn"),
    "length": (lambda lm: lm.canvas(length=4), "expected length=3"),
    "none": (lambda lm: dataclasses.replace(lm, length=None).canvas(), "length to be a whole"),
    "context": (
        lambda lm: dataclasses.replace(lm, context=4).canvas([0, 1]),
        "context of 4 tokens, got 2 and 3",
    ),
    "prompt": (lambda lm: lm.canvas([7]), "got 7"),
    "power": (lambda lm: lm.canvas() ** float("inf"), "a finite power"),
    "product": (lambda lm: lm.canvas() * len, "ppl.reward"),
    "shape": (
        lambda lm: lm.canvas().log_density(jnp.zeros((2, 3), int), jnp.zeros((2, 4), int)),
        r"\[N, 3\], got \(2, 3\) and \(2, 4\)",
    ),
    "axes": (lambda lm: tabular.joint(np.zeros((2, 3))), "an axis for each site"),
    "rows": (lambda lm: tabular.table(np.zeros((8, 3, 2))), "= 27 rows"),
    "laws": (lambda lm: tabular.markov([1.0, 0.0], [[1.0, 1.0], [0.0, 1.0]]), "normalise"),
    "eos": (lambda lm: tabular.joint(np.zeros((2, 2)), eos=5), "expected eos"),
    "strings": (lambda lm: check_target(lm.canvas()), r"its left_to_right\(\)"),
    "rows of the kit": (lambda lm: check_any_order(lm, key=KEY, num=1), "num of at least 2"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make(canvas("joint").lm)
