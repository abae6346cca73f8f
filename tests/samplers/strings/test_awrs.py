"""AWRS is properly weighted: its law by enumeration of all its random choices, then SMC with it on
whole targets.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.potential import Potential, State
from ppl.pytrees import register_dataclass
from samplers import smc
from samplers.strings import awrs
from tests import helpers
from tests.samplers import problems
from tests.samplers.problems import check_law, gamma, smc_masses

P = np.array([0.3, 0.05, 0.0, 0.62, 0.18])  # asymmetric, unnormalised, and one token without mass
PEAKED = np.array([0.1, 1.7, 0.3, 0.0, 0.05])
MASKS = np.array(list(itertools.product([False, True], repeat=5)))
SOME_MASKS = ([1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1], [0, 0, 1, 0, 0])
FORMS: dict[str, Callable[..., awrs.Weighted]] = {
    "recursive": awrs.recursive,
    "recursive, 2 tests": functools.partial(awrs.recursive, max_rejects=2),
    "recursive, 3 tests": functools.partial(awrs.recursive, max_rejects=3),
    "geometric": awrs.geometric,
    "geometric, 3 accepts": functools.partial(awrs.geometric, max_accepts=3),
    "geometric, 1 reject": functools.partial(awrs.geometric, max_rejects=1),
    "geometric, 3 accepts, 2 rejects": functools.partial(
        awrs.geometric, max_accepts=3, max_rejects=2
    ),
    "adaptive": awrs.adaptive,
    "adaptive, 2 rejects": functools.partial(awrs.adaptive, max_rejects=2),
}


def log(p: Any) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(p), jnp.float32)


def run(form: Callable[..., awrs.Weighted], seed: int, p: Any, ok: Any, num: int) -> awrs.Weighted:
    """`num` rows; p [V] or [num, V], ok likewise."""
    shape = num, np.shape(p)[-1]
    rows, masks = jnp.broadcast_to(log(p), shape), jnp.broadcast_to(jnp.asarray(ok, bool), shape)
    return _run(jax.random.split(jax.random.key(seed), num), rows, masks, form=form)


@functools.partial(jax.jit, static_argnames="form")
def _run(keys: Any, rows: Any, masks: Any, *, form: Any) -> Any:
    return form(
        keys, rows, lambda token, needed: jnp.take_along_axis(masks, token[:, None], axis=1)[:, 0]
    )


# The recursive form itself, under every visiting order.


def orders(p: Any) -> tuple[np.ndarray, np.ndarray]:
    """Every order of the tokens with mass, filled up with the others, and its Plackett-Luce
    probability.
    """
    alive, rows, probs = np.flatnonzero(p), [], []
    for order in itertools.permutations(alive.tolist()):
        rows.append([*order, *(v for v in range(len(p)) if v not in order)])
        left = [sum(p[list(order[i:])]) for i in range(len(order))]
        probs.append(np.prod([p[v] / rest for v, rest in zip(order, left, strict=True)]))
    return np.array(rows), np.array(probs)


def visit(patch: pytest.MonkeyPatch, order: Any, *modules: Any) -> None:
    """Row i's draws without replacement follow order[i]."""

    def pick(keys: Any, rest: Any) -> Any:
        alive = rest.log_probs.reshape(len(order), -1)[:, : order.shape[1]] > -jnp.inf
        place = jnp.argmax(jnp.take_along_axis(alive, order, axis=1), axis=1)
        return jnp.take_along_axis(order, place[:, None], axis=1)[:, 0]

    for module in modules:
        patch.setattr(module, "pick", pick)


def check_orders(patch: pytest.MonkeyPatch, module: Any, max_rejects: int | None) -> None:
    """sum over orders of probability x weight x 1{token = v} is p(v) ok(v), for every mask."""
    order, prob = orders(P)
    assert math.isclose(prob.sum(), 1)
    rows, masks = jnp.asarray(np.tile(order, (len(MASKS), 1))), np.repeat(MASKS, len(order), axis=0)
    visit(patch, rows, module)
    found = run(
        functools.partial(module.recursive, max_rejects=max_rejects), 0, P, masks, len(rows)
    )
    mass = np.tile(prob, len(MASKS)) * np.exp(np.asarray(found.log_weight, np.float64))
    law = np.zeros(MASKS.shape)
    np.add.at(law, (np.repeat(np.arange(len(MASKS)), len(order)), np.asarray(found.token)), mass)
    np.testing.assert_allclose(law, P * MASKS, atol=2e-6)
    assert found.tests.max() == min(max_rejects or 4, 4)


@pytest.mark.parametrize("max_rejects", [None, 1, 2, 3])
def test_the_recursive_form_is_proper_by_enumeration(
    max_rejects: int | None, monkeypatch: pytest.MonkeyPatch
):
    check_orders(monkeypatch, awrs, max_rejects)


# Both forms, against laws of (token, weight) computed in plain Python from the paper's formulas.

Outcomes = dict[tuple[int, float, int], float]
"""Probability of (token, weight, tests); token -1 where nothing passed."""


def recursive_outcomes(p: np.ndarray, ok: np.ndarray, limit: float) -> Outcomes:
    """All visiting orders of the paper's recursive algorithm, p normalised: M = prod (1 - q), rej =
    sum p(rejected).
    """
    out: Outcomes = collections.Counter()

    def visit(rejected: tuple[int, ...], prob: float, m: float, rej: float) -> None:
        rest = [v for v in np.flatnonzero(p).tolist() if v not in rejected]
        tests = len(rejected)
        if not rest or tests >= limit:
            out[-1, 0.0, tests] += prob
            return
        for v in rest:
            q = 1.0 if len(rest) == 1 else p[v] / (1 - rej)
            if not ok[v]:
                visit((*rejected, v), prob * q, m * (1 - q), rej + p[v])
            elif len(rest) == 1 or tests + 1 >= limit:
                out[v, m, tests + 1] += prob * q
            else:
                for u in rest:
                    if u != v:
                        out[v, m if ok[u] else m * q, tests + 2] += (
                            prob * q * p[u] / (1 - rej - p[v])
                        )

    visit((), 1.0, 1.0, 0.0)
    return out


def geometric_outcomes(p: np.ndarray, ok: np.ndarray, max_accepts: int, limit: float) -> Outcomes:
    """Rejection sampling with replacement, every draw made: its weight, and the distinct tokens it
    had to test.
    """
    out: Outcomes = collections.Counter()
    alive = np.flatnonzero(p).tolist()
    # state: (first token, accepts, rejects, tested tokens); a rejected token is drawn in vain, an
    # accepted one is known
    states = {(-1, 0, 0, frozenset()): 1.0}
    while sum(states.values()) > 1e-13:
        after: dict[Any, float] = collections.Counter()
        for (first, accepts, rejects, tested), prob in states.items():
            if accepts == max_accepts or rejects >= limit:
                w = min(max_accepts - 1, accepts) / (accepts + rejects - 1) if accepts else 0.0
                out[first, w, len(tested)] += prob
                continue
            for v in alive:
                kept = v if ok[v] and accepts == 0 else first
                after[kept, accepts + bool(ok[v]), rejects + (not ok[v]), tested | {v}] += (
                    prob * p[v]
                )
        states = after
    return out


def outcomes(form: str, p: np.ndarray, ok: np.ndarray) -> Outcomes:
    options = getattr(FORMS[form], "keywords", {})
    limit = options.get("max_rejects") or math.inf
    if form.startswith("recursive"):
        return recursive_outcomes(p, ok, limit)
    return geometric_outcomes(p, ok, options.get("max_accepts", 2), limit)


CASES = [(form, ok) for form in FORMS if not form.startswith("adaptive") for ok in SOME_MASKS[:2]]


@pytest.mark.parametrize(("form", "mask"), CASES)
def test_the_papers_formulas_are_proper(form: str, mask: list[int]):
    p, ok = P / P.sum(), np.array(mask, bool)
    law = outcomes(form, p, ok)
    assert math.isclose(sum(law.values()), 1, rel_tol=1e-9)
    for v in range(len(p)):
        mean = sum(prob * weight for (token, weight, _), prob in law.items() if token == v)
        assert math.isclose(mean, p[v] * ok[v], abs_tol=1e-9)


NUM = 20_000
FAST = ("geometric", "adaptive")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mask"), CASES)
def test_outcomes_have_the_papers_law(form: str, mask: list[int]):
    """Token, weight and number of tests together: every common outcome by a z-test."""
    p, ok = P / P.sum(), np.array(mask, bool)
    found, law = run(FORMS[form], 1, P, ok, NUM), outcomes(form, p, ok)
    weight = np.exp(np.asarray(found.log_weight, np.float64)) / P.sum()
    token = np.where(weight > 0, found.token, -1)
    seen = collections.Counter(
        zip(token.tolist(), np.round(weight, 5).tolist(), found.tests.tolist(), strict=True)
    )
    expected: dict[Any, float] = collections.Counter()
    for (v, w, tests), prob in law.items():
        expected[v, round(w, 5), tests] += prob
    common = {x for x, prob in expected.items() if prob * NUM > 60}
    assert (
        sum(seen[x] for x in seen if x not in expected) <= 5e-4 * NUM
    )  # weights on the edge of rounding
    for x in common:
        z = (seen[x] / NUM - expected[x]) / math.sqrt(expected[x] * (1 - expected[x]) / NUM + 1e-12)
        assert abs(z) < 5, (
            f"z = {z:.2f} of outcome {x}: {seen[x] / NUM:.5f}, truth {expected[x]:.5f}"
        )


def check_proper(form: Callable[..., awrs.Weighted], p: np.ndarray, ok: Any, seed: int = 2) -> None:
    """E[w 1{v}] = p(v) ok(v) for every token, and E[w], by z-tests."""
    ok = np.array(ok, bool)
    found = run(form, seed, p, ok, NUM)
    weight = np.exp(np.asarray(found.log_weight, np.float64))
    helpers.assert_z(weight, (p * ok).sum(), resolution=0.007 * p.sum())
    for v in range(len(p)):
        helpers.assert_z(
            weight * (np.asarray(found.token) == v), p[v] * ok[v], resolution=0.007 * p.sum()
        )
    assert found.tests.max() <= (p > 0).sum()


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FORMS]
)
def test_every_form_is_proper(form: str):
    """On all masks of two laws, one flat and one with max p >= 2/3 (where `adaptive` goes
    geometric).
    """
    for i, (p, ok) in enumerate(itertools.product((P, PEAKED), SOME_MASKS)):
        check_proper(FORMS[form], p, ok, seed=i)


def test_adaptive_chooses_by_row():
    which = np.arange(NUM) % 2
    rows = np.where(which[:, None] == 0, P, PEAKED)
    adaptive, *forms = (
        run(FORMS[form], 3, rows, SOME_MASKS[0], NUM)
        for form in ("adaptive", "recursive", "geometric")
    )
    for a, r, g in zip(adaptive, *forms, strict=True):
        np.testing.assert_array_equal(a, np.where(which == 0, r, g))


# A vocabulary of several blocks, float32's edges, rows.


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recursive", "geometric"])
def test_a_vocabulary_of_several_blocks(form: str):
    p = np.array(jax.nn.softmax(2 * jax.random.normal(jax.random.key(4), (700,))), np.float64)
    ok = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.3, (700,)))
    found = run(FORMS[form], 6, p, ok, 1500)
    weight = np.exp(np.asarray(found.log_weight, np.float64))
    helpers.assert_z(weight, (p * ok).sum(), resolution=0.014)
    assert ok[np.asarray(found.token)[weight > 0]].all()
    for part in np.array_split(np.arange(700), 7):
        inside = np.isin(np.asarray(found.token), part)
        helpers.assert_z(weight * inside, (p * ok)[part].sum(), resolution=0.008)
    assert found.tests.mean() < 12  # about 1 / 0.3, twice


@pytest.mark.parametrize("form", ["recursive", "geometric", "adaptive"])
def test_degenerate_rows(form: str):
    """No mass; one living token, good and bad; all rejected; a law that is NaN or infinite."""
    rows = log(
        np.array([[0, 0, 0], [0, 2, 0], [0, 2, 0], [1, 2, 3], [1, np.nan, 3], [1, np.inf, 3]])
    )
    ok = jnp.array([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    found = _run(jax.random.split(jax.random.key(7), 6), rows, ok, form=FORMS[form])
    np.testing.assert_allclose(found.log_weight, [-np.inf, np.log(2), *[-np.inf] * 4], rtol=1e-6)
    np.testing.assert_array_equal(found.token, [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.tests, [0, 1, 1, 3, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recursive", "geometric"])
def test_float32_holds_when_nearly_all_mass_is_rejected(form: str):
    """Only the last token passes, e^-9 to e^-250 below the first: 1 - rejected is 0 in float32."""
    for gaps in (
        [0.0, -3.0, -9.0],
        [0.0, -12.0, -30.0],
        [0.0, -60.0, -250.0],
        [-300.0, -310.0, -390.0],
    ):
        keys, masks = (
            jax.random.split(jax.random.key(8), NUM),
            jnp.tile(jnp.array([False, False, True]), (NUM, 1)),
        )
        found = _run(keys, jnp.tile(jnp.array(gaps), (NUM, 1)), masks, form=FORMS[form])
        assert (found.token == 2).all()
        if form == "recursive":
            np.testing.assert_allclose(found.log_weight, gaps[2], rtol=1e-6)
        # 1 / (1 + F) has mean s for F negative binomial: the relative spread is about sqrt(log(1 /
        # s)).
        elif gaps[0] - gaps[2] < 100:
            relative = np.exp(np.asarray(found.log_weight, np.float64) - gaps[2])
            helpers.assert_z(relative, 1.0, resolution=0.1)
        else:
            assert (np.abs(found.log_weight - gaps[2]) < 15).all()


@pytest.mark.slow
def test_rows_do_not_depend_on_their_number():
    keys, ok = jax.random.split(jax.random.key(9), NUM), jnp.array([True, False, True, False, True])
    rows = log(np.where(np.arange(NUM)[:, None] % 2 == 0, P, PEAKED))
    few, many = (
        _run(keys[:n], rows[:n], jnp.tile(ok, (n, 1)), form=awrs.adaptive) for n in (7, NUM)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:7], rtol=1e-5), few, many)


@pytest.mark.parametrize("form", ["recursive", "geometric"])
def test_only_candidates_are_tested(form: str):
    """Each row asks about a token once, and not again when it is done."""
    asked: list[tuple[int, int]] = []

    def test(token: Any, needed: Any) -> Any:
        asked.extend((int(i), int(token[i])) for i in np.flatnonzero(needed))
        return np.array([True, False, True, False, False])[token]

    def accepts(token: Any, needed: Any) -> Any:
        return jax.pure_callback(test, jax.ShapeDtypeStruct(token.shape, bool), token, needed)

    rows = jnp.broadcast_to(log(P), (30, 5))
    found = jax.jit(FORMS[form], static_argnums=2)(
        jax.random.split(jax.random.key(10), 30), rows, accepts
    )
    jax.block_until_ready(found)
    assert len(asked) == len(set(asked)) == int(found.tests.sum())
    assert (P[[token for _, token in asked]] > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: awrs.AWRS.geometric(max_accepts=1), "max_accepts of at least 2"),
        (lambda: awrs.AWRS.geometric(max_rejects=0), "max_rejects"),
        (lambda: awrs.AWRS.recursive(max_rejects=0), "max_rejects"),
        (
            lambda: run(functools.partial(awrs.adaptive, max_accepts=1), 0, P, P > 0, 2),
            "max_accepts of at least 2",
        ),
    ],
)
def test_bad_limits_raise(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


# Planted faults: the module with one line changed.

MUTANTS = {
    "recursive: the second test is ignored": (
        "miss & (x.passed > 0), log_v",
        "miss & (x.passed > 0), log_rest",
    ),
    "recursive: rejected mass is forgotten": (
        "jnp.where(first, log_rest,",
        "jnp.where(first, rules.log_total,",
    ),
    "recursive: an accepted token is drawn again": ("going & (recursively | miss))", "miss)"),
    "geometric: no phantoms": ("x.failed + phantoms", "x.failed"),
    "geometric: biased share": (
        "jnp.minimum(max_accepts - 1, x.passed)",
        "jnp.minimum(max_accepts, x.passed)",
    ),
    "geometric: what passed is not drawn again": ("going & (recursively | miss))", "going)"),
}


FAST_MUTANTS = {"recursive: the second test is ignored", "geometric: no phantoms"}


def mutant(patch: pytest.MonkeyPatch, name: str) -> Any:
    old, new = MUTANTS[name]
    source = inspect.getsource(awrs)
    assert source.count(old) == 1, f"the line to change is not there: {old!r}"
    module = types.ModuleType("samplers.mutant")
    module.__dict__["__package__"] = "samplers.strings"
    patch.setitem(sys.modules, "samplers.mutant", module)
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


LANES = [
    pytest.param(name, marks=() if name in FAST_MUTANTS else pytest.mark.slow) for name in MUTANTS
]


@pytest.mark.parametrize("name", LANES)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    module = mutant(monkeypatch, name)
    with pytest.raises(AssertionError, match="z = "):
        check_proper(getattr(module, name.split(":")[0]), P, SOME_MASKS[0])
    if name.startswith("recursive"):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_orders(monkeypatch, module, None)


# SMC.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden(Potential):
    """Another potential whose factors are not known in advance."""

    inner: Potential

    def within(self, *strings: int) -> Potential:
        return Hidden(self.inner.within(*strings))

    def init(self, num: int) -> State:
        return self.inner.init(num)

    def step(self, state: State, token: Any) -> tuple[State, Any]:
        return self.inner.step(state, token)

    def final(self, state: State) -> Any:
        return self.inner.final(state)


def hidden(problem: str) -> ppl.Target:
    target = problems.target_of("table", problem)
    return dataclasses.replace(target, potential=Hidden(target.potential))


PROPOSALS = {
    "adaptive": awrs.AWRS(),
    "geometric": awrs.AWRS.geometric(max_accepts=3),
}
LAWS = [
    ("adaptive", "product"),
    ("geometric", "every_2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("proposal", "problem"), LAWS)
def test_law_1(proposal: str, problem: str):
    """Hard and soft factors, EOS and the horizon, with nothing known in advance."""
    for found in smc_masses(
        jax.random.key(11), hidden(problem), 4000, proposal=PROPOSALS[proposal]
    ).values():
        check_law(found, gamma("table", problem), resolution=0.04)


def test_known_factors_are_not_tested():
    """`product` = known constraints times a score that is not known in advance."""
    target = problems.target_of("table", "product")
    phi, _ = awrs._unknown(target.potential, target.potential.init(2), 2)
    assert [type(f).__name__ for f in phi.factors] == ["Score"]
    powered = (target**0.5).potential
    phi, _ = awrs._unknown(powered, powered.init(2), 2)
    assert [type(f.potential).__name__ for f in phi.factors] == ["Score"]
    known = problems.target_of("table", "must_end").potential
    phi, _ = awrs._unknown(known, known.init(2), 2)
    assert phi.factors == ()


@pytest.mark.slow
def test_law_1_where_a_part_is_known():
    runs = smc_masses(
        jax.random.key(12),
        problems.target_of("table", "product"),
        3000,
        (0.5,),
        proposal=awrs.AWRS(),
    )
    check_law(runs[0.5], gamma("table", "product"), resolution=0.035)


def test_a_python_constraint_is_asked_about_few_tokens():
    """V = 200: the calls are the tests and the tokens drawn, a small part of what masking would
    need.
    """
    asked: list[list[int]] = []

    def allowed(ids: list[int]) -> bool:
        return all(a % 3 <= b % 5 for a, b in itertools.pairwise(ids))

    def log_score(ids: list[int]) -> float:
        asked.append(ids)
        return 0.0 if allowed(ids) else -math.inf

    lm = tabular.random_markov(jax.random.key(13), 200, eos=7)
    target = lm.given((3,), max_tokens=6) * ppl.step_scores(
        ppl.python(log_score), ppl.Steps(every=1)
    )
    out = jax.block_until_ready(
        smc.run(jax.random.key(14), target, num_particles=8, proposal=awrs.AWRS())
    )
    assert np.isfinite(out.log_z)
    assert all(
        allowed(list(x)) for x in helpers.as_strings(out.sequences.tokens, out.sequences.length)
    )
    assert len(asked) == int(out.cost.potential_calls) and any(len(ids) == 6 for ids in asked)
    assert len(asked) < 6 * int(out.cost.tokens)


def test_ended_rows_are_not_tested():
    """A row that has ended takes EOS without a test; so does, from then on, one in which nothing
    passes: it may draw 0 and 2, and 3 is forced.
    """
    target, proposal, num = hidden("forced"), awrs.AWRS(), 4
    state = proposal.update(
        target, proposal.init(target, num), jnp.array([0, helpers.EOS, 2, helpers.EOS])
    )
    logits = log(np.array([[0.5, 0.0, 0.5, 0.0], *np.full((3, 4), 0.25)]))
    drawn = proposal.draw(
        jax.random.split(jax.random.key(15), num), target, logits, target.potential.init(num), state
    )
    calls = np.asarray(drawn.potential_calls)
    assert calls[[0, 1, 3]].tolist() == [2, 0, 0] and calls[2] > 0
    assert drawn.token.tolist() == [helpers.EOS, helpers.EOS, 3, helpers.EOS]
    left = proposal.update(target, state, drawn.token)
    assert left.tolist() == [0, 0, helpers.MAX_TOKENS - 2, 0]
