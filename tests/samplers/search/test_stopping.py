"""Rules against what they compute in double precision, and against their exact law: on pools, in a
loop on the device, and while a model is sampled.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jaxtyping import Array

from samplers.search import leading, online, pools, reweighted, stopping, votes
from tests.samplers.problems import plain

KEY = jax.random.key(7)
DRAWS = jax.jit(
    lambda keys, pools, rule: jax.vmap(stopping.replay, (0, 0, None))(keys, pools, rule)
)


def pairs(most: int) -> tuple[np.ndarray, np.ndarray]:
    """All counts a >= b up to `most`."""
    a, b = np.meshgrid(np.arange(most + 1), np.arange(most + 1))
    return a[b <= a], b[b <= a]


def test_posteriors_and_evidence_are_exact_to_float32():
    a, b = pairs(200)
    both = jax.jit(
        jax.vmap(lambda a, b: (leading.ahead(a, b, 400), leading.log_evidence(a, b, 400)))
    )
    ahead, log_m = both(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))
    exact = scipy.special.betainc(b + 1, a + 1, 0.5)
    np.testing.assert_allclose(ahead, exact, atol=3e-6)
    log_exact = (a + b + 1) * np.log(2) + scipy.special.betaln(a + 1, b + 1) + np.log(exact)
    np.testing.assert_allclose(log_m, log_exact, atol=5e-5)
    assert (both(jnp.int32([2, 0]), jnp.int32([3, 9]))[1] == -jnp.inf).all()


def test_the_evidence_has_expectation_one_at_a_tie():
    """sum_a Bin(a; n, t) M(a, n - a) = 1 at t = 1/2 for every n, and .236 at .4 after 20 draws."""
    n, a = 20, np.arange(21)
    exact = 2.0 ** (n + 1) * scipy.special.beta(a + 1, n - a + 1)
    exact *= scipy.special.betainc(n - a + 1, a + 1, 0.5)
    means = [scipy.stats.binom.pmf(a, n, share) @ exact for share in (0.5, 0.4)]
    np.testing.assert_allclose(means, [1, 0.236], atol=5e-4)
    found = jax.vmap(lambda a: leading.log_evidence(a, n - a, n))(jnp.arange(10, 21))
    np.testing.assert_allclose(found, np.log(exact[10:]), atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "beta", "dirichlet"),
    [
        ((4, 1, 1, 1, 1, 1), 0.891, 0.666),
        ((5, 3, 3, 1, 1), 0.746, 0.583),
        ((4, 0, 0), 0.969, 0.969),
    ],
)
def test_posteriors_of_the_leader(counts: tuple[int, ...], beta: float, dirichlet: float):
    seen = jnp.asarray(counts, jnp.int32)
    _, first, second = leading.leader(seen)
    assert abs(float(leading.ahead(first, second, 40)) - beta) < 6e-4
    assert abs(float(leading.leads(seen, 40)) - dirichlet) < 6e-4


def test_the_quadrature_is_exact():
    rng = np.random.default_rng(0)
    x = np.linspace(1e-9, 400, 40_001)
    for num in (3, 20, 200):
        counts = rng.multinomial(num, rng.dirichlet(np.full(8, 0.8)))
        first, *rest = np.sort(counts[counts > 0])[::-1]
        cdf = np.prod([scipy.stats.gamma.cdf(x, c + 1) for c in rest or [0]], axis=0)
        exact = np.trapezoid(scipy.stats.gamma.pdf(x, first + 1) * cdf, x)
        found = leading.leads(jnp.asarray(counts, jnp.int32), 256)
        assert abs(float(found) - exact) < 5e-6


def stop_of(rule: stopping.Rule, answers: Any, scores: Any = None) -> int:
    """After how many draws a rule stops on this stream; one more than there are if it does not."""
    seen = rule.init(max(answers) + 1, len(answers))
    for n, answer in enumerate(answers):
        score = 0.0 if scores is None else scores[n]
        seen = rule.step(seen, jnp.int32(answer), jnp.float32(score))
        if rule.decide(seen):
            return n + 1
    return len(answers) + 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (stopping.beta(0.95), 4),
        (stopping.dirichlet(0.95), 4),
        (stopping.evalue(0.05, 2), 7),
        (stopping.evalue(0.05, 3), 8),
        (stopping.evalue(0.05), 9),
        (stopping.window(5), 5),
        (stopping.doubling(0.75), 2),
        (stopping.stable(3), 3),
        (stopping.entropy(0.1, 6), 6),
        (stopping.fixed(8), 8),
    ],
)
def test_where_unanimous_draws_stop(rule: stopping.Rule, expected: int):
    assert stop_of(rule, [0] * 12) == expected


def test_rules_on_streams():
    assert stop_of(stopping.window(2), [0, 1, 1, 0, 1, 1]) == 6  # windows do not overlap
    assert stop_of(stopping.stable(2), [0, 1, 1, 0]) == 3
    assert stop_of(stopping.stable(2), [0, -1, 0, -1, -1, 0]) == 7  # no answer is no answer
    assert stop_of(stopping.window(2), [0, 0, -1, -1][2:] + [0]) == 4
    assert stop_of(stopping.doubling(0.75), [0, 1, 1, 1]) == 4
    assert stop_of(stopping.doubling(0.75), [0, -1, -1, 0]) == 5
    # Miller and Madow: log 2 + 1/16 of four and four, so .7 is too little.
    four = [0, 1] * 4
    assert [stop_of(stopping.entropy(t), four) for t in (0.70, 0.76)] == [9, 8]
    # A tie is no lead, whatever came since the answer was discovered: three have seven each.
    assert stop_of(stopping.evalue(0.99), [1, 2] * 7 + [0] * 9) == 22
    # A third answer, where there were to be two.
    assert stop_of(stopping.evalue(0.05, 2), [1, 2] + [0] * 20) == 23


def open_by_hand(answers: list[int], delta: float) -> int:
    """The rule of open sets, from its definition."""
    found: list[int] = []
    since: dict[int, list[int]] = {}
    for n, answer in enumerate(answers):
        for draws in since.values():
            draws.append(answer)
        if answer not in found:
            found.append(answer)
            since[answer] = []
        counts = {a: answers[: n + 1].count(a) for a in found}
        best = max(found, key=lambda a: counts[a])
        if sum(c == counts[best] for c in counts.values()) > 1:
            continue
        j, a = found.index(best) + 1, since[best].count(best)
        rivals = [since[best].count(r) for r in found if r != best]
        b = max(rivals, default=0)
        evidence = 2.0 ** (a + b + 1) * scipy.special.beta(a + 1, b + 1)
        if evidence * scipy.special.betainc(b + 1, a + 1, 0.5) >= j * (j + 1) / delta:
            return n + 1
    return len(answers) + 1


def test_open_sets_count_from_discovery():
    rng = np.random.default_rng(1)
    streams = rng.choice(4, size=(40, 24), p=[0.1, 0.6, 0.2, 0.1])
    rule = stopping.evalue(0.2)

    @jax.vmap
    def stop(answers: Array) -> Array:
        def step(seen: Any, answer: Array) -> tuple[Any, Array]:
            seen = rule.step(seen, answer, jnp.float32(0))
            return seen, rule.decide(seen)

        decided = jax.lax.scan(step, rule.init(4, 24), answers)[1]
        return jnp.where(decided.any(), jnp.argmax(decided) + 1, 25)

    expected = [open_by_hand(row.tolist(), 0.2) for row in streams]
    np.testing.assert_array_equal(stop(jnp.asarray(streams, jnp.int32)), expected)
    assert len(set(expected)) > 5


# On pools.

N = 8
RULES = {
    "beta": stopping.beta(0.9),
    "dirichlet": stopping.dirichlet(0.9),
    "window": stopping.window(3),
    "doubling": stopping.doubling(0.75),
    "entropy": stopping.entropy(0.6, 3),
    "stable": stopping.stable(3),
    "closed": stopping.evalue(0.3, 2),
    "open": stopping.evalue(0.6),
    "fixed": stopping.fixed(5),
}


def every_pool() -> tuple[Any, np.ndarray]:
    """All 3^N streams of two answers and none, as pools, with the probabilities of their draws."""
    streams = np.array(list(itertools.product((0, 1, -1), repeat=N)), np.int32)
    probs = np.array([0.55, 0.3, 0.15])[streams].prod(1)
    make = jax.jit(jax.vmap(lambda ids, scores: pools.pool(ids, scores=scores)))
    return make(streams, jnp.zeros(streams.shape)), probs


def slowly(names: Any, fast: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slowly(RULES, {"beta", "window", "stable", "open"}))
def test_replay_has_the_law_of_the_lattice(name: str):
    """Over all pools in the same order: the numbers of draws exactly, and of the answers their
    share with ties as the key breaks them.
    """
    streams, probs = every_pool()
    keys = jnp.broadcast_to(KEY, probs.shape)
    out = jax.tree.map(lambda x: np.asarray(x)[:, 0, 0], DRAWS(keys, streams, RULES[name]))
    law = stopping.lattice(RULES[name], [0.55, 0.3], cap=N)
    draws = np.bincount(out.num, probs, N + 1)
    np.testing.assert_allclose(draws, law.draws, atol=1e-6)
    np.testing.assert_allclose(probs @ out.stopped, law.stopped, atol=1e-6)
    # With the other order of chances the ties go to the other answer.
    other = next(k for k in jax.random.split(KEY, 64) if _first_wins(k) != _first_wins(KEY))
    again = np.asarray(DRAWS(jnp.broadcast_to(other, probs.shape), streams, RULES[name]).answer)
    both = [probs @ (x == a) for a in (0, 1) for x in (out.answer, again[:, 0, 0])]
    np.testing.assert_allclose(np.reshape(both, (2, 2)).mean(1), law.answer, atol=1e-6)


def _first_wins(key: Any) -> bool:
    """Whether ties go to the answer 0."""
    tie = pools.pool(jnp.int32([0, 1] + [-1] * (N - 2)))
    return int(stopping.replay(key, tie, stopping.fixed(N)).answer[0, 0]) == 0


def a_pool() -> Any:
    rng = np.random.default_rng(2)
    return pools.pool(
        rng.integers(-1, 3, 16).astype(np.int32),
        scores=rng.normal(-5, 1, 16).astype(np.float32),
        length=rng.integers(2, 9, 16).astype(np.int32),
    )


def test_budgets():
    pool, rule = a_pool(), stopping.fixed(9)
    order = np.asarray(jax.random.permutation(_order_key(), 16))
    spent = np.cumsum(np.asarray(pool.length)[order])
    out = stopping.replay(KEY, pool, rule, draws=[1, 5, 9, 12, 40])
    np.testing.assert_array_equal(out.num[0], [1, 5, 9, 9, 9])
    np.testing.assert_array_equal(out.stopped[0], [False, False, True, True, True])
    np.testing.assert_array_equal(out.tokens[0], spent[[0, 4, 8, 8, 8]])
    # The string that would exceed the budget is not drawn.
    caps = [int(spent[0]) - 1, int(spent[3]), int(spent[4]) - 1]
    paid = stopping.replay(KEY, pool, rule, tokens=caps)
    np.testing.assert_array_equal(paid.num[0], [0, 4, 4])
    assert paid.answer[0, 0] == -1 and paid.tokens[0, 0] == 0
    # Whole rounds are paid, as far as the budget goes.
    rounds = stopping.replay(KEY, pool, rule, draws=[9, 11, 16], batch=4)
    np.testing.assert_array_equal(rounds.drawn[0], [9, 11, 12])
    np.testing.assert_array_equal(rounds.num[0], [9, 9, 9])
    np.testing.assert_array_equal(rounds.tokens[0], spent[[8, 10, 11]])


def _order_key() -> Any:
    return jax.random.split(jax.random.split(KEY, 1)[0], 3)[0]


class _Best(NamedTuple):
    answer: Array


def best(key: Any, pool: Any) -> _Best:
    return _Best(pool.answer[jnp.argmax(pool.scores)])


def test_any_selection():
    """A vote of the pool's own, and the best score, of the draws up to the stop."""
    pool, budgets = a_pool(), [3, 5, 11]
    order = np.asarray(jax.random.permutation(_order_key(), 16))
    ids, scores = np.asarray(pool.answer)[order], np.asarray(pool.scores)[order]
    out = stopping.replay(KEY, pool, stopping.fixed(16), best, draws=budgets)
    expected = [ids[np.argmax(scores[:n])] for n in budgets]
    np.testing.assert_array_equal(out.answer[0], expected)
    voted = stopping.replay(KEY, pool, stopping.fixed(16), votes.majority, draws=budgets)
    for n, own, other in zip(
        budgets,
        voted.answer[0],
        stopping.replay(KEY, pool, stopping.fixed(16), draws=budgets).answer[0],
        strict=True,
    ):
        counts = np.bincount(ids[:n][ids[:n] >= 0], minlength=3)
        assert counts[own] == counts[other] == counts.max()


@pytest.mark.parametrize("name", ["best", "unique"])
def test_a_selection_knows_how_many_were_drawn(name: str):
    """At a stop after n draws, the best of k of these n (of all, where k is more), and inclusion in
    n draws: not those of a pool of N.
    """
    which = np.asarray([0, 1, 0, 2, 1, 0, 0, 1, 2, 0])
    log_q = np.log([0.5, 0.3, 0.2])[which].astype(np.float32)
    known = {"scores": np.arange(10) % 7, "log_prob": log_q, "log_q": log_q}
    pool = pools.pool(which, samples=which[:, None], **known)
    order = np.asarray(jax.random.permutation(_order_key(), 10))

    def vote(key: Any, pool: Any) -> votes.Vote:
        if name == "unique":
            return reweighted.horvitz_thompson(key, pool)
        return votes.majority_of_bests(key, pool, 3)

    def seen(key: Any, pool: Any) -> _Best:
        return _Best((1e6 * vote(key, pool).mass[0]).astype(jnp.int32))

    out = stopping.replay(KEY, pool, stopping.fixed(10), seen, draws=[2, 5])
    for n, found in zip([2, 5], np.asarray(out.answer[0]), strict=True):
        first = order[:n]
        if name == "unique":
            exact = 0.5 / (1 - 0.5**n) * (which[first] == 0).any()
        else:
            sets = list(itertools.combinations(first, min(3, n)))
            exact = np.mean([which[max(s, key=lambda i: i % 7)] == 0 for s in sets])
        assert abs(found - 1e6 * exact) < 5


def test_more_orders_keep_the_first():
    few = stopping.replay(KEY, a_pool(), RULES["beta"], num_orders=2)
    many = stopping.replay(KEY, a_pool(), RULES["beta"], num_orders=5)
    np.testing.assert_array_equal(few.num, many.num[:2])
    assert many.num.shape == (5, 1)


def test_thresholds_share_a_program():
    replayed: Any = stopping._replay
    before = replayed._cache_size()
    for threshold in (0.8, 0.85, 0.99):
        stopping.replay(KEY, a_pool(), stopping.beta(threshold), draws=[4, 8])
    assert replayed._cache_size() == before + 1
    several = jax.vmap(lambda rule: stopping.replay(KEY, a_pool(), rule))(
        stopping.beta([0.8, 0.99])
    )
    each = [stopping.replay(KEY, a_pool(), stopping.beta(t)).num for t in (0.8, 0.99)]
    np.testing.assert_array_equal(several.num, each)


def test_the_secretary_stops_at_the_best_as_often_as_it_should():
    """P(best) = r / n sum_{i > r} 1 / (i - 1) with r = floor(n / e), over all orders."""
    n, r = 6, 2
    scores = np.array(list(itertools.permutations(range(n))), np.float32)
    ids = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), scores.shape)
    many = jax.vmap(lambda ids, s: pools.pool(ids, scores=s))(ids, jnp.asarray(scores))
    out = jax.vmap(lambda p: stopping.replay(KEY, p, stopping.secretary(n), best))(many)
    chosen = np.take_along_axis(scores, np.asarray(out.answer[:, 0]), 1)[:, 0]
    found = np.mean((chosen == n - 1) & np.asarray(out.stopped[:, 0, 0]))
    assert found == pytest.approx(r / n * sum(1 / (i - 1) for i in range(r + 1, n + 1)))


# In rounds.


def draw(key: Any, num: int) -> tuple[Array, Array, Array]:
    answers = jax.random.categorical(key, jnp.log(jnp.array([0.55, 0.3, 0.15])), shape=(num,))
    return answers.astype(jnp.int32), jnp.zeros(num), jnp.full(num, 3, jnp.int32)


def test_rounds_on_the_device_have_the_law_of_the_lattice():
    rule = stopping.beta(0.9)
    runs = jax.vmap(
        lambda key: stopping.online(key, draw, rule, num_answers=3, max_draws=12, batch=4)
    )(jax.random.split(KEY, 4000))
    law = stopping.lattice(rule, [0.55, 0.3, 0.15], cap=12)
    for found, exact in (
        *((runs.num == n, law.draws[n]) for n in range(13)),
        *((runs.answer == a, law.answer[a]) for a in range(3)),
        (runs.stopped, law.stopped),
    ):
        assert abs(float(found.mean()) - exact) < 5 * (exact * (1 - exact) / 4000) ** 0.5 + 1e-6
    # Those of the last round that were not read are paid.
    np.testing.assert_array_equal(runs.drawn, np.ceil(np.asarray(runs.num) / 4) * 4)
    np.testing.assert_array_equal(runs.tokens, 3 * runs.drawn)


def test_ties_are_uniform_whatever_the_order():
    def draw(key: Any, num: int) -> tuple[Array, Array, Array]:
        answers = jnp.int32([0, 1, 2, 2, 1, 0])
        return answers, jnp.zeros(num), jnp.ones(num, jnp.int32)

    runs = jax.vmap(
        lambda key: stopping.online(
            key, draw, stopping.fixed(6), num_answers=3, max_draws=6, batch=6
        )
    )(jax.random.split(KEY, 3000))
    shares = np.bincount(runs.answer, minlength=3) / 3000
    assert np.abs(shares - 1 / 3).max() < 5 * (2 / 9 / 3000) ** 0.5


def length(ids: list[int]) -> int:
    if len(ids) == 3:
        raise RuntimeError("three")
    return len(ids)


def test_a_run_stops_and_pays_for_its_rounds(caplog: pytest.LogCaptureFixture):
    p, rule = plain("markov"), stopping.stable(2)
    out = online.run(KEY, p, rule, answer=length, max_draws=12, batch=3)
    stop, ids = out.details["stop"], np.asarray(out.details["answer"])  # pyright: ignore[reportOptionalSubscript]
    sizes = np.asarray(out.sequences.length)
    assert ((ids < 0) == (sizes == 3)).all() and len(ids) == int(stop.drawn)
    pairs_equal = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
    expected = int(np.argmax(pairs_equal)) + 2
    assert bool(stop.stopped) and int(stop.num) == expected
    assert int(stop.drawn) == math.ceil(expected / 3) * 3
    assert int(stop.tokens) == int(out.cost.tokens) == int((sizes + out.sequences.ended).sum())
    read = ids[:expected]
    assert ids[out.best] == stop.answer == read[out.best]
    np.testing.assert_array_equal(
        out.scores,
        [(read == a).sum() if a >= 0 and i < expected else -np.inf for i, a in enumerate(ids)],
    )
    assert ("raised" in caplog.text) == bool((sizes == 3).any())


@pytest.mark.bad_input
def test_bad_input():
    pool, rule = a_pool(), stopping.beta(0.95)
    three: Any = 3
    named: Any = "majority"
    for make, message in (
        (lambda: stopping.beta(0.4), "expected threshold between 0.5 and 1, got 0.4"),
        (lambda: stopping.beta([0.9, np.nan]), "expected threshold between"),
        (lambda: stopping.evalue(1.0), "expected delta between 0 and 1"),
        (
            lambda: stopping.evalue(0.1, 1),
            "expected num_answers to be a whole number of at least 2",
        ),
        (lambda: stopping.window(0), "expected width to be a whole number of at least 1"),
        (lambda: stopping.stable(2.5), "expected num to be a whole number"),
        (lambda: rule.init(0, 4), "expected num_answers to be a whole number"),
        (lambda: stopping.replay(KEY, pool, three), "expected a rule, got 3"),
        (lambda: stopping.replay(KEY, pool, rule, best, draws=[0]), "expected draws as a list"),
        (lambda: stopping.replay(KEY, pool, rule, draws=4), "expected draws as a list"),
        (lambda: stopping.replay(KEY, pool, rule, draws=[]), "expected draws as a list"),
        (lambda: stopping.replay(KEY, pool, rule, tokens=[1]), "hold at least one string"),
        (lambda: stopping.replay(KEY, pool, rule, draws=[1], tokens=[9, 9]), "as many budgets"),
        (lambda: stopping.replay(KEY, pool, rule, named), "expected select to be a function"),
        (lambda: stopping.replay(KEY, pool, rule, num_orders=0), "expected num_orders"),
        (lambda: stopping.replay(KEY, every_pool()[0], rule), "expected the pool of one prompt"),
        (
            lambda: stopping.replay(KEY, pools.pool([0, 1], log_weights=[0.0, 1.0]), rule),
            "expected independent draws of equal weight",
        ),
        (
            lambda: stopping.online(KEY, draw, rule, num_answers=3, max_draws=10, batch=4),
            "expected batch to divide max_draws, got 4 and 10; pass max_draws=12",
        ),
        (
            lambda: stopping.run(KEY, plain("markov"), three, answer=length),
            "expected a rule, got 3",
        ),
        (
            lambda: stopping.run(KEY, plain("markov"), rule, answer=three),
            "expected answer to be a fun",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
@pytest.mark.optimised
def test_twelve_rules_and_twenty_budgets_replay_in_seconds():
    """64 pools of 256 draws; compiled before."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (64, 256)).astype(np.int32)
    many = jax.vmap(lambda ids: pools.pool(ids))(jnp.asarray(ids))
    keys, budgets = jax.random.split(KEY, 64), list(range(12, 252, 12))
    twelve = [stopping.beta([0.9, 0.95]), stopping.dirichlet([0.9, 0.95]), stopping.window([3, 5])]
    twelve += [stopping.evalue([0.05, 0.1]), stopping.doubling([0.75]), stopping.stable([4])]
    twelve += [stopping.entropy([0.5], [8]), stopping.fixed([16])]

    def replay(rule: stopping.Rule) -> Any:
        one = lambda rule: jax.vmap(  # noqa: E731
            lambda key, pool: stopping.replay(key, pool, rule, draws=budgets)
        )(keys, many)
        return jax.block_until_ready(jax.vmap(one)(rule))

    for rule in twelve:
        replay(rule)
    start = time.perf_counter()
    shapes = [replay(rule).num.shape for rule in twelve]
    assert sum(shape[0] for shape in shapes) == 12 and shapes[0][1:] == (64, 1, 20)
    assert time.perf_counter() - start < 10
