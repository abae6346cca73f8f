"""AB-MCTS: posteriors against integrals, what a tree learns against its definition, and the law of
the first trees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from samplers.base import Cost
from samplers.search import abmcts
from tests import helpers
from tests.helpers import MAX_TOKENS
from tests.samplers.problems import plain, score_arrays

KEY = jax.random.key(8)
RUNS = 20_000
SETS = [(), (0.9,), (0.2, 0.7, 0.4), (1.0, 1.0, 0.8, 0.9, 1.0)]


def known(sets: Any) -> abmcts.Scores:
    sets = [np.asarray(one, np.float64) for one in sets]
    mean = [one.mean() if one.size else 0.0 for one in sets]
    spread = [((one - m) ** 2).sum() for one, m in zip(sets, mean, strict=True)]
    numbers = (jnp.asarray(x, jnp.float32) for x in ([one.size for one in sets], mean, spread))
    return abmcts.Scores(*numbers)


def gaussian_cdf(scores: Any, at: np.ndarray) -> np.ndarray:
    """P(mu <= at | scores), by integrating prior times likelihood over a grid of (mu, log s)."""
    mu = np.linspace(-8, 8, 8001)[:, None]
    s = np.exp(np.linspace(-5, 5, 401))[None]
    # p(s^2) is inverse gamma; in log s it has the density p(s^2) 2 s^2.
    log_p = stats.invgamma.logpdf(s**2, 0.5, scale=0.05) + 2 * np.log(s)
    log_p = log_p + stats.norm.logpdf(mu, 0.0, s)
    log_p = log_p + sum(stats.norm.logpdf(y, mu, s) for y in scores)
    mass = np.exp(log_p - log_p.max()).sum(1)
    below = np.interp(at, mu[:, 0], np.cumsum(mass) / mass.sum())
    # Beyond the grid the prior has heavy tails, which matter for no scores only.
    return below


def beta_cdf(scores: Any, at: np.ndarray) -> np.ndarray:
    return stats.beta.cdf(at, 0.5 + sum(scores), 0.5 + len(scores) - sum(scores))


@pytest.mark.parametrize("name", ["gaussian", "beta"])
def test_posteriors_are_the_integrals(name: str):
    sets = SETS[1:] if name == "gaussian" else SETS
    at = np.array([0.15, 0.45, 0.7, 0.95])
    keys = jax.random.split(KEY, RUNS)
    draws = jax.jit(jax.vmap(lambda key: getattr(abmcts, name)(key, known(sets))))(keys)
    cdf = {"gaussian": gaussian_cdf, "beta": beta_cdf}[name]
    for one, found in zip(sets, np.asarray(draws).T, strict=True):
        for point, truth in zip(at, cdf(one, at), strict=True):
            se = np.sqrt(truth * (1 - truth) / RUNS) + 1e-4
            assert abs((found <= point).mean() - truth) < 5 * se, (name, one, point, truth)


def test_the_gaussian_prior_is_student_t():
    """Without scores mu / sqrt(tau^2 / kappa) has Student's t law of nu = 1."""
    nothing = known([()])
    draws = jax.vmap(lambda key: abmcts.gaussian(key, nothing)[0])(jax.random.split(KEY, RUNS))
    for point in (-0.5, 0.1, 1.0):
        truth = stats.t.cdf(point / np.sqrt(0.1), 1)
        helpers.assert_z(np.asarray(draws) <= point, truth, resolution=0.01)


# Trees of scripted children: a row is the depth, and the score a function of it.

BY_DEPTH = np.array([0.0, 0.9, -0.4, 0.6, 0.35, 0.5])


def deeper(key: Any, parents: Any) -> Any:
    return parents + 1, Cost(tokens=jnp.int32(parents.shape[0]))


def by_depth(rows: Any) -> Any:
    return jnp.asarray(BY_DEPTH, jnp.float32)[jnp.minimum(rows, 5)]


ROOT = jnp.zeros(1, jnp.int32)


def test_a_tree_knows_what_the_method_says():
    """The sets of every node from parents and scores, by their definitions."""
    rising = lambda rows: 0.25 * rows  # noqa: E731
    how = tuple(jax.tree_util.Partial(f) for f in (deeper, rising, abmcts.gaussian))
    tree, cost = abmcts._run(KEY, ROOT, how, 24, 2)
    parent, score = np.asarray(tree.parent), np.asarray(tree.score)
    above = [[] for _ in parent]
    for node in range(1, len(parent)):
        above[node] = [parent[node], *above[parent[node]]]
    new, below, whole = ([[] for _ in parent] for _ in range(3))
    for node in range(1, len(parent)):
        first, *rest = above[node]
        new[first].append(score[node])
        whole[node].append(score[node])
        for ancestor in rest:
            below[ancestor].append(score[node])
        for ancestor in above[node][:-1]:
            whole[ancestor].append(score[node])
    assert max(map(len, above)) > 2 and int(cost.tokens) == int(cost.potential_calls) == 24
    for sets, found in ((new, tree.new), (below, tree.deeper), (whole, tree.whole)):
        for expected, x in zip(jax.tree.leaves(known(sets)), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(x, expected, atol=1e-5)
    np.testing.assert_array_equal(tree.rows, [len(one) for one in above])


def gumbel(key: Any, scores: Any) -> Any:
    """A posterior under which who wins is a softmax of the sums of scores."""
    shape = scores.num.shape
    return scores.num * scores.mean + jax.random.gumbel(key, shape, jnp.float32)


def next_parents(parents: tuple[int, ...]) -> dict[int, float]:
    """The law of the next child's parent, by walking down; node 0 is the root."""
    depth, sets = [0], {0: ([], [], [])}
    for node, parent in enumerate(parents, 1):
        depth.append(depth[parent] + 1)
        y = BY_DEPTH[depth[node]]
        sets[node] = ([], [], [y])
        sets[parent][0].append(y)
        while parent:
            sets[parent][2].append(y)
            parent = parents[parent - 1]
            sets[parent][1].append(y)
    law, reached = {}, {0: 1.0}
    for node in range(len(depth)):  # parents come before their children
        mass = reached.get(node, 0.0)
        below = [c for c, parent in enumerate(parents, 1) if parent == node]
        new, deep = (np.exp(sum(one)) for one in sets[node][:2])
        law[node] = mass * (new / (new + deep) if below else 1.0)
        shares = np.exp([sum(sets[c][2]) for c in below])
        for c, share in zip(below, shares, strict=True):
            reached[c] = (mass - law[node]) * share / shares.sum()
    return law


def shapes_law(num: int) -> dict[tuple[int, ...], float]:
    """The parents of the first `num` children."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num):
        law = {
            (*shape, parent): mass * share
            for shape, mass in law.items()
            for parent, share in next_parents(shape).items()
            if share > 0
        }
    return law


def check_shapes(runs: int) -> None:
    def one(key: Any) -> Any:
        options = {"num_calls": 4, "posterior": gumbel}
        return abmcts.search(key, ROOT, deeper, by_depth, **options).details["parent"] + 1

    found, law = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))), shapes_law(4)
    assert len(law) == 24 and abs(sum(law.values()) - 1) < 1e-9
    for shape, truth in law.items():
        helpers.assert_z((found == shape).all(1), truth, resolution=0.01)


def test_the_first_trees_have_the_enumerated_law():
    check_shapes(RUNS)


@pytest.mark.slow
def test_a_tree_that_learns_the_wrong_way_fails(monkeypatch: pytest.MonkeyPatch):
    """Planted fault: what is below a child is not counted as deeper."""
    insert = abmcts.insert

    def forgets(tree: Any, *args: Any) -> Any:
        after = insert(tree, *args)
        return abmcts.dataclasses.replace(after, deeper=tree.deeper)

    monkeypatch.setattr(abmcts, "insert", forgets)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="z = "):
        check_shapes(RUNS)
    jax.clear_caches()


@pytest.mark.slow
def test_scores_that_are_no_numbers_stay_out():
    out = abmcts.search(
        KEY,
        ROOT,
        deeper,
        lambda rows: jnp.where(rows == 2, jnp.nan, 0.5 * rows),
        num_calls=12,
        batch_size=3,
    )
    depth, details = np.asarray(out.samples), out.details
    assert depth.max() == 2 and int(details["num_invalid"]) == (depth == 2).sum() > 0
    assert np.isneginf(out.scores[depth == 2]).all() and out.scores[out.best] == 0.5


@pytest.mark.slow
def test_strings_are_drawn_anew_from_their_parents():
    p = plain("table")

    def reward(tokens: Any, length: Any) -> Any:
        return jax.nn.sigmoid(score_arrays(tokens, length))

    out = abmcts.run(KEY, p, reward, num_calls=12, batch_size=3)
    x, parent = out.sequences, np.asarray(out.details["parent"])
    np.testing.assert_allclose(out.scores, reward(x.tokens, x.length), atol=1e-6)
    np.testing.assert_allclose(out.log_prob, p.log_density(x.tokens, x.length), atol=1e-4)
    assert out.scores[out.best] == out.scores.max() and (parent >= 0).any()
    assert int(out.cost.potential_calls) == 12 <= int(out.cost.tokens) <= 12 * MAX_TOKENS


@pytest.mark.slow
def test_what_is_drawn_anew_has_the_law_of_a_cut_and_p():
    """From one parent: a uniform cut, and p from there."""
    p, parent = plain("markov"), (3, 0)
    law, _ = helpers.brute_force_law(p.lm, helpers.PROMPT, MAX_TOKENS)
    expected = dict.fromkeys(law, 0.0)
    for cut in range(len(parent) + 1):
        kept = parent[:cut]
        total = sum(q for x, q in law.items() if x[:cut] == kept)
        for x, q in law.items():
            if x[:cut] == kept:
                expected[x] += q / total / (len(parent) + 1)
    start = helpers.as_arrays([parent] * RUNS, MAX_TOKENS, helpers.EOS)
    state = abmcts.regeneration.score(p, abmcts.PROPOSAL, abmcts.regeneration.Sequences(*start))
    children, _ = jax.jit(abmcts.redraw(p))(KEY, state)
    found = helpers.as_strings(children.sequences.tokens, children.sequences.length)
    for x, truth in expected.items():
        if truth * RUNS > 60:
            helpers.assert_z([y == x for y in found], truth, resolution=0.01)


@pytest.mark.bad_input
def test_bad_input():
    with pytest.raises(ValueError, match="batch_size to divide num_calls, got 3 and 8; pass num_c"):
        abmcts.search(KEY, ROOT, deeper, by_depth, num_calls=8, batch_size=3)
    with pytest.raises(ValueError, match="expected generate to be a function of key, parents"):
        abmcts.search(KEY, ROOT, by_depth, by_depth)
    with pytest.raises(ValueError, match="expected a score for each of 2 children, got shape"):
        abmcts.search(KEY, ROOT, deeper, lambda rows: rows.sum(), num_calls=2, batch_size=2)
    with pytest.raises(ValueError, match="expected a plain language model"):
        abmcts.run(KEY, plain("hmm") ** 2, score_arrays)
