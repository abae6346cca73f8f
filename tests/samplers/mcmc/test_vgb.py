"""VGB leaves gamma on the leaves invariant whatever the values: the walk enumerated, and the jitted
walkers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.exact import enumerate_strings, optimal_twist, strings
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target
from ppl.twists import Twisted, twisted
from samplers.mcmc import vgb
from samplers.strings import growing
from samplers.testing import check_kernel
from tests.helpers import EOS, MAX_TOKENS, PROMPT, assert_z, markov
from tests.samplers.chains import chi_square_z
from tests.samplers.problems import plain, score_arrays, target_of


def logits_at(target: Target, state: vgb.State) -> Any:
    """The next token's logits where the walkers are."""
    return growing.forward(target, vgb._at_nodes(target, state))[1]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def random_values(target: Target, terminal: bool = True) -> Target:
    """Values of prefixes that have nothing to do with what follows."""
    exact = optimal_twist(target, terminal=terminal)
    noise = 1.2 * jax.random.normal(jax.random.key(8), (2, *exact.log_twist.shape))
    # The last row is all that is longer than the horizon; where the density is zero the value may
    # be, too.
    log_twist = jnp.where(jnp.isneginf(exact.log_twist), -jnp.inf, noise[0]).at[0].set(0.0)
    log_final = jnp.where(jnp.isneginf(exact.log_final), -jnp.inf, noise[1])
    return twisted(
        target,
        dataclasses.replace(exact, log_twist=log_twist, log_final=log_final),
        terminal=terminal,
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Judging(Twisted):
    """It reads three tokens for every token, and five for the end."""

    def judged(self, state: Any, token: Any, ends: Any) -> Any:
        return 3 * (token != EOS) + 5 * ends


def exact_values(target: Target, terminal: bool = True) -> Target:
    return twisted(target, optimal_twist(target, terminal=terminal), terminal=terminal)


@dataclasses.dataclass(frozen=True)
class Tree:
    """The walk over all 2 M nodes: M strings as prefixes, then as leaves.  pi [2 M] by edges, not
    normalised.
    """

    x: Sequences
    matrix: np.ndarray
    pi: np.ndarray

    @property
    def reached(self) -> np.ndarray:
        """Nodes of positive mass: a walk from the root never gets to the others."""
        return self.pi > 0

    @property
    def leaf_law(self) -> np.ndarray:
        leaves = self.stationary[len(self.pi) // 2 :]
        return leaves / leaves.sum()

    @property
    def stationary(self) -> np.ndarray:
        """The law that the matrix leaves invariant, by linear algebra."""
        kept = np.flatnonzero(self.reached)
        matrix = self.matrix[np.ix_(kept, kept)]
        system = np.vstack([matrix.T - np.eye(len(kept)), np.ones(len(kept))])
        law = np.zeros(len(self.pi))
        law[kept] = np.linalg.lstsq(system, np.append(np.zeros(len(kept)), 1.0), rcond=None)[0]
        return law

    @property
    def watched(self) -> np.ndarray:
        """The walk watched at leaves [M, M]."""
        m = len(self.pi) // 2
        inside, kept = self.matrix[:m, :m], self.reached[:m]
        out = np.zeros((m, m))
        out[kept] = np.linalg.solve(
            np.eye(kept.sum()) - inside[np.ix_(kept, kept)], self.matrix[:m, m:][kept]
        )
        return self.matrix[m:, :m] @ out


@functools.partial(jax.jit, static_argnums=0)
def _log_edges(log_edges: Any, target: Target, x: Sequences) -> Any:
    state = vgb.at(target, x, jnp.zeros(x.length.shape, bool))
    return log_edges(target, state, logits_at(target, state))[0]


def tree(target: Target) -> Tree:
    """From the walk's own weights of edges, in float64."""
    x = strings(target.lm.vocab_size, target.max_tokens, target.lm.eos)
    rows = [
        tuple(t[:n])
        for t, n in zip(np.asarray(x.tokens).tolist(), np.asarray(x.length), strict=True)
    ]
    index, m = {row: i for i, row in enumerate(rows)}, len(rows)

    weights = np.exp(np.asarray(_log_edges(vgb.log_edges, target, x), np.float64))
    matrix, mass, pi = np.zeros((2 * m, 2 * m)), np.zeros(m), np.zeros(2 * m)
    mass[0] = 1.0
    for i, row in enumerate(rows):  # shorter ones first
        for token, weight in enumerate(weights[i, :-1]):
            if token == target.lm.eos:
                matrix[i, m + i], pi[m + i] = weight, mass[i] * weight
            elif len(row) < target.max_tokens:
                j = index[(*row, token)]
                matrix[i, j], mass[j] = weight, mass[i] * weight
        if row:
            matrix[i, index[row[:-1]]] = weights[i, -1]
        matrix[m + i, i] = 1.0
        pi[i] = mass[i] * weights[i].sum()
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-300)
    return Tree(x, matrix, pi)


# The walk on the tree.


@pytest.mark.parametrize(
    ("model", "problem", "values"),
    [
        ("table", "reward", random_values),
        slow("hmm", "plain", lambda target: target),
        slow("table", "reward", exact_values),
        slow("hmm", "banned", random_values),
        slow("markov", "every_1", lambda target: random_values(target, terminal=False)),
        slow("table", "every_2", random_values),
        slow("hmm", "second_lm", lambda target: target),
        slow("markov", "regex", lambda target: target),
    ],
)
def test_the_walk_leaves_gamma_on_the_leaves_invariant(model: str, problem: str, values: Any):
    """|pi K - pi| <= 1e-12 and detailed balance, pi given by the edges; its leaves have the law
    gamma / Z.
    """
    target = target_of(model, problem)
    walk = tree(values(target))
    pi = walk.pi / walk.pi.sum()
    flow = (pi[:, None] * walk.matrix)[np.ix_(walk.reached, walk.reached)]
    assert np.abs(pi @ walk.matrix - pi).max() <= 1e-12 and np.abs(flow - flow.T).max() <= 1e-12
    np.testing.assert_allclose(walk.matrix[walk.reached].sum(1), 1)
    np.testing.assert_allclose(walk.stationary, pi, atol=1e-9)
    np.testing.assert_allclose(walk.leaf_law, enumerate_strings(target).probs, atol=2e-6)


@pytest.mark.slow
def test_exact_values_make_leaves_as_frequent_as_they_can_be():
    """1 / 2H of the time, H = T + 1, if all strings have T tokens; wrong values less."""
    endless = jnp.where(
        jnp.arange(3) == 1,
        -jnp.inf,
        jax.random.normal(jax.random.key(4), (tabular.num_prefixes(3, 4), 3)),
    )
    target = tabular.table(endless, eos=1).given([0], max_tokens=3) ** 1.6 * ppl.reward(
        score_arrays
    )
    walk, wrong = tree(exact_values(target)), tree(random_values(target))
    leaves = [w.pi[len(w.pi) // 2 :].sum() / w.pi.sum() for w in (walk, wrong)]
    np.testing.assert_allclose(leaves[0], 1 / 8, rtol=1e-5)
    assert leaves[1] != pytest.approx(1 / 8, rel=1e-2)
    np.testing.assert_allclose(wrong.leaf_law, enumerate_strings(target).probs, atol=2e-6)


EDGES = vgb.log_edges


def no_debt(target: Any, state: Any, logits: Any) -> Any:
    return EDGES(target, dataclasses.replace(state, owed=0 * state.owed), logits)


def guessed_end(target: Any, state: Any, logits: Any) -> Any:
    """The end of a string by the look-ahead, which is the twist's guess."""
    weights, invalid = EDGES(target, state, logits)
    eos, here = target.lm.eos, vgb._top(state)
    guess = (
        target.log_prob_factor(jax.nn.log_softmax(logits))[:, eos]
        + target.potential.lookahead(here)[:, eos]
    )
    inside = ~state.ended & (state.sequences.length < target.max_tokens)
    return weights.at[:, eos].set(jnp.where(inside, guess, weights[:, eos])), invalid


def hard_to_leave(target: Any, state: Any, logits: Any) -> Any:
    """The way back weighs p(u) V(u) relative to the parent, as if weights were not those
    of edges.
    """
    weights, invalid = EDGES(target, state, logits)
    return weights.at[:, -1].add(-0.3 * (state.sequences.length > 1)), invalid


@pytest.mark.parametrize("wrong", [no_debt, slow(guessed_end), slow(hard_to_leave)])
def test_a_fault_is_not_invariant(wrong: Any, monkeypatch: pytest.MonkeyPatch):
    target = target_of("table", "every_1")
    build = (
        (lambda: random_values(target, terminal=False))
        if wrong is no_debt
        else (lambda: random_values(target))
    )
    right = np.abs(tree(build()).leaf_law - enumerate_strings(target).probs).max()
    monkeypatch.setattr(vgb, "log_edges", wrong)
    assert (
        right < 2e-6
        and np.abs(tree(build()).leaf_law - enumerate_strings(target).probs).max() > 1e-3
    )


# The jitted walkers.


def test_walkers_take_the_steps_of_the_matrix():
    """One step from every node, many times; and back-tracking finds what was there."""
    target = random_values(target_of("table", "every_1"), terminal=False)
    parts = vars(target.potential)
    target = dataclasses.replace(target, potential=Judging(**parts))
    walk = tree(target)
    m, copies = len(walk.x.length), 200
    nodes = np.flatnonzero(walk.reached).repeat(copies)
    x, ended = take_rows(walk.x, jnp.asarray(nodes % m)), jnp.asarray(nodes >= m)
    state = vgb.at(target, x, ended)
    step, everyone = jax.jit(vgb.step), jnp.ones(len(nodes), bool)
    after, invalid, cost = step(jax.random.key(3), target, state, everyone)
    exact = enumerate_strings(target)
    to = exact.index(after.sequences.tokens) + m * np.asarray(after.ended)
    counts = np.zeros_like(walk.matrix)
    np.add.at(counts, (nodes, to), 1)
    assert abs(chi_square_z(counts, walk.matrix)) < 5 and not invalid.any()
    fresh = vgb.at(target, after.sequences, after.ended)
    np.testing.assert_allclose(after.owed, fresh.owed, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, vgb._top(after), vgb._top(fresh))
    np.testing.assert_array_equal(logits_at(target, after), logits_at(target, fresh))
    # The end of a string is a way on from every prefix, and its factor is asked for.
    down = int((after.sequences.length > x.length).sum())
    assert int(cost.judge_tokens) == 3 * down + 5 * int((~ended).sum())
    # Those that are not to move stay, leaves at their ends.
    still = step(jax.random.key(4), target, after, ~everyone)[0]
    for name in ("sequences", "ended", "owed"):
        jax.tree.map(np.testing.assert_array_equal, getattr(still, name), getattr(after, name))


@pytest.mark.parametrize(
    ("model", "problem", "values"),
    [
        slow("table", "every_1", exact_values),
    ],
)
def test_the_chain_over_strings(model: str, problem: str, values: Any):
    target = target_of(model, problem)
    counts = check_kernel(
        vgb.kernel(values(target)), target, key=jax.random.key(0), num_chains=8000
    )
    assert abs(chi_square_z(counts, tree(values(target)).watched)) < 5


def forgetful(target: Any, state: Any, x: Any, token: Any, rows: Any) -> Any:
    """What the potential was in is kept for one depth only."""
    new, invalid = DESCEND(target, state, x, token, rows)
    top = vgb._top(new)
    stack = jax.tree.map(
        lambda all, one: jnp.where(rows.reshape(-1, 1, *[1] * (one.ndim - 1)), one[:, None], all),
        new.potential,
        top,
    )
    return dataclasses.replace(new, potential=stack), invalid


DESCEND = vgb._descend


@pytest.mark.slow
def test_a_walk_that_forgets_is_found_out(monkeypatch: pytest.MonkeyPatch):
    p = plain("table") * ppl.step_factors(
        lambda x, n: score_arrays(x, n), ppl.Steps(every=1)
    )  # traced anew
    monkeypatch.setattr(vgb, "_descend", forgetful)
    with pytest.raises(AssertionError, match="not invariant"):
        check_kernel(vgb.kernel(random_values(p, terminal=False)), p, key=jax.random.key(0))


@pytest.mark.slow
def test_a_run_visits_what_the_matrix_says():
    """Every leaf as often, on average over walkers, as sum_t K^t from the root says; the law tends
    to gamma / Z.
    """
    target = random_values(target_of("hmm", "reward"))
    walk, num, steps = tree(target), 3000, 40
    m = len(walk.x.length)
    out = vgb.run(jax.random.key(1), target, num_chains=num, num_steps=steps)
    law, visits, leaf = np.eye(2 * m)[0], np.zeros(2 * m), np.asarray(out.draws["log_weights"]) == 0
    for _ in range(steps):
        law = law @ walk.matrix
        visits += law
    exact = enumerate_strings(target)
    found = np.zeros((num, m))
    np.add.at(
        found,
        (
            np.nonzero(leaf)[1],
            exact.index(np.asarray(out.draws["sequences"].tokens)[leaf]),
        ),
        1,
    )
    for i in np.argsort(-visits[m:])[:12]:
        assert_z(found[:, i], visits[m + i], resolution=0.1 * visits[m + i] + 0.01)
    assert_z(found.sum(1), visits[m:].sum(), resolution=0.05)
    assert not out.info.invalid.any() and out.cost is not None
    assert int(out.cost.forwards) == 1 + steps and int(out.cost.tokens) == num * steps
    for _ in range(4000):
        law = law @ walk.matrix
        visits += law
    leaves = visits[m:] / visits[m:].sum()
    np.testing.assert_allclose(leaves, exact.probs, atol=3e-3)


@pytest.mark.slow
def test_walkers_do_not_depend_on_how_many_there_are():
    target = exact_values(target_of("table", "reward"))
    few, many = (vgb.run(jax.random.key(1), target, num_chains=n, num_steps=30) for n in (2, 5))
    first = jax.tree.map(lambda leaf: leaf[:, :2], many.draws)
    jax.tree.map(np.testing.assert_array_equal, few.draws, first)


@pytest.mark.bad_input
def test_bad_input():
    p, key = markov().given(PROMPT, max_tokens=MAX_TOKENS), jax.random.key(0)
    with pytest.raises(ValueError, match="expected a potential with a look-ahead"):
        vgb.run(key, p * ppl.reward(score_arrays))
    for alpha in (0.0, -2.0, math.nan):
        with pytest.raises(ValueError, match="alpha above 0"):
            vgb.kernel(dataclasses.replace(p, alpha=jnp.float32(alpha)))
    for name in ("num_chains", "num_steps"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number of at least 1"):
            vgb.run(key, p, **options)
    x = Sequences(jnp.asarray([[0, 2, EOS, EOS]]), jnp.asarray([2]))
    with pytest.raises(
        ValueError, match="in the support of the target, got log gamma = -inf for row 0"
    ):
        vgb.kernel(p * ppl.banned([2])).init(x)
    with pytest.raises(ValueError, match=r"expected strings with tokens \[C, 4\]"):
        vgb.kernel(p).init(Sequences(x.tokens[:, :3], x.length))
