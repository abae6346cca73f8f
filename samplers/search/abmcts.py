"""Adaptive branching Monte Carlo tree search (AB-MCTS, form A, arXiv 2503.04412): at every node
draws from posteriors decide between a new answer (wider) and one that refines a child (deeper).

Each node keeps three sets of scores

    new       of the children that were generated there
    deeper    of all that was generated below these
    whole     its own, and of all below it

and a search goes down from the root: it draws the mean score of `new` and of `deeper` from their
posteriors, generates a child here if the first is at least the second, and else goes on to the
child whose `whole` draws the greatest.  A node without children generates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts, check_function
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import take_rows
from ppl.scorers import check_of_strings
from ppl.target import Target, check_plain

from ..base import Cost, Guarantee, X, spent
from ..registry import sampler
from ..results import Choice
from ..strings import costs, cuts, growing, regeneration
from ..strings.proposals import as_proposal, bootstrap

PROPOSAL = as_proposal(bootstrap)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What is known of sets of scores: how many [*K], their mean, their squared deviations from it,
    added up.
    """

    num: Float[Array, "*K"]
    mean: Float[Array, "*K"]
    spread: Float[Array, "*K"]


Posterior = Callable[[PRNGKeyArray, Scores], Float[Array, "*K"]]
"""(key, scores [*K]) -> a draw of the mean of each set [*K]."""

Generate = Callable[[PRNGKeyArray, X], tuple[X, Cost]]
"""(key, parents with B rows) -> a child of each, and what that took."""


def gaussian(key: PRNGKeyArray, scores: Scores) -> Float[Array, "*K"]:
    """The mean of normal scores whose mean and variance are unknown.

    The prior is normal-inverse-gamma, m = 0, kappa = 1, nu = 1, tau^2 = 0.1, as published; with n
    scores of mean x and squared deviations S

        s^2 ~ InvGamma(nu_n / 2, (nu tau^2 + S + n kappa (x - m)^2 / kappa_n) / 2)
        mu  ~ N((kappa m + n x) / kappa_n, s^2 / kappa_n),   kappa_n = kappa + n, nu_n = nu + n
    """
    gamma_key, normal_key = jax.random.split(key)
    n, count = scores.num, scores.num + 1.0
    scale = 0.1 + scores.spread + n * scores.mean**2 / count
    variance = scale / 2 / jax.random.gamma(gamma_key, count / 2, dtype=jnp.float32)
    noise = jax.random.normal(normal_key, n.shape, jnp.float32)
    return n * scores.mean / count + jnp.sqrt(variance / count) * noise


def beta(key: PRNGKeyArray, scores: Scores) -> Float[Array, "*K"]:
    """The success rate of scores in [0, 1], each a share of a success: Beta(1/2 + sum of scores,
    1/2 + the rest).
    """
    mean = jnp.clip(scores.mean, 0.0, 1.0)
    a, b = 0.5 + scores.num * mean, 0.5 + scores.num * (1.0 - mean)
    return jax.random.beta(key, a, b, dtype=jnp.float32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """K nodes, the root first; rows [K, ...], parent [K] (-1: none, or not in the tree), score [K],
    the number of nodes so far [], and the scores of each node (see the module).
    """

    rows: X
    parent: Int[Array, " K"]
    score: Float[Array, " K"]
    size: Int[Array, ""]
    new: Scores
    deeper: Scores
    whole: Scores


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_abmcts.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    *,
    num_calls: int = 32,
    batch_size: int = 1,
    posterior: Posterior = gaussian,
) -> Choice:
    """AB-MCTS over strings: a new answer is drawn from p, a refined one is its parent up to a
    random cut and drawn anew from there.

    There is no target: it looks for the greatest reward.  A language model's own way to refine, as
    by a prompt that shows the parent, is a `generate` of `search`.

    Args:
        key: typed key.
        p: a language model.
        reward: (tokens [N, T], length [N]) -> [N], or `ppl.python(f)`; in [0, 1] for `beta`.
        num_calls: strings drawn and judged, a multiple of `batch_size`.
        batch_size: descents that go together, each with its own draws.
        posterior: `gaussian`, `beta`, or one of yours.

    Returns:
        `Choice`, as of `search`; `samples` are the strings.

    Raises:
        ValueError: as `search`, and if p has a power or a potential.
    """
    check_plain(
        p, ", which a search does not weigh; give the potential as the reward, or use smc.run"
    )
    root = regeneration.no_strings(p, PROPOSAL, 1)
    out = search(
        key,
        root,
        redraw(p),
        judged_by(reward),
        num_calls=num_calls,
        batch_size=batch_size,
        posterior=posterior,
    )
    x = out.samples
    cost = out.cost + costs.prompt(p, PROPOSAL)
    return dataclasses.replace(out, samples=x.sequences, log_prob=x.log_prob, cost=cost)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_abmcts.py")
def search(
    key: PRNGKeyArray,
    root: X,
    generate: Generate,
    score: Callable[[X], Float[Array, " B"]],
    *,
    num_calls: int = 32,
    batch_size: int = 1,
    posterior: Posterior = gaussian,
) -> Choice:
    """AB-MCTS-A over anything: `generate` makes children, `score` judges them, Thompson sampling
    says whose; in one jit.

    There is no target.  A child whose score is not finite is left out of the tree and counted.

    Args:
        key: typed key.
        root: what is there before any answer, a pytree whose leaves have one row.
        generate: (key, parents [B, ...]) -> (children [B, ...], Cost); a jax function.
        score: (children [B, ...]) -> [B].
        num_calls, batch_size, posterior: as in `run`; with batch_size=1 every descent has seen all
            scores, as published.

    Returns:
        `Choice` of the `num_calls` children in the order in which they were made.  `details`:
        `parent` [n] the row of the parent, -1 for the root; `num_invalid` [].

    Raises:
        ValueError: unless the counts are at least 1 and batch_size divides num_calls; for what is
            no function.
    """
    check_counts(num_calls=num_calls, batch_size=batch_size)
    check_function("generate", generate, "key, parents", f"{__name__}.redraw")
    check_function("score", score, "children", f"{__name__}.judged_by")
    check_function("posterior", posterior, "key, scores", f"{__name__}.gaussian")
    if num_calls % batch_size:
        raise ValueError(
            f"expected batch_size to divide num_calls, got {batch_size} and {num_calls}; pass"
            f" num_calls={-(-num_calls // batch_size) * batch_size}"
        )
    how = as_pytree(generate), as_pytree(score), as_pytree(posterior)
    tree, cost = _run(key, root, how, num_calls, batch_size)
    scores, made = tree.score[1:], tree.parent[1:]
    return Choice(
        samples=take_rows(tree.rows, jnp.arange(1, num_calls + 1)),
        scores=scores,
        best=jnp.argmax(scores).astype(jnp.int32),
        cost=cost,
        details={
            "parent": jnp.maximum(made, 0) - 1,
            "num_invalid": (made < 0).sum(dtype=jnp.int32),
        },
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(key: Any, root: X, how: tuple, num_calls: int, size: int) -> tuple[Tree, Cost]:
    generate, score, posterior = how

    def one(carry: tuple[Tree, Cost], key: PRNGKeyArray) -> tuple[tuple[Tree, Cost], None]:
        tree, cost = carry
        down_key, generate_key = jax.random.split(key)
        keys = jax.random.split(down_key, size)
        nodes = jax.vmap(lambda key: descend(key, tree, posterior))(keys)
        children, more = generate(generate_key, take_rows(tree.rows, nodes))
        scores = jnp.asarray(score(children), jnp.float32)
        if scores.shape != (size,):
            raise ValueError(
                f"expected a score for each of {size} children, got shape {scores.shape}; return"
                f" [{size}]"
            )
        cost = spent(cost, more + Cost(potential_calls=jnp.int32(size)))
        return (insert(tree, nodes, children, scores), cost), None

    start = _root(root, num_calls + 1), Cost()
    return jax.lax.scan(one, start, jax.random.split(key, num_calls // size))[0]


def _root(root: X, capacity: int) -> Tree:
    def none() -> Scores:
        zeros = jnp.zeros(capacity, jnp.float32)
        return Scores(zeros, zeros, zeros)

    return Tree(
        rows=jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (capacity, *jnp.shape(leaf)[1:])), root
        ),
        parent=jnp.full(capacity, -1, jnp.int32),
        score=jnp.full(capacity, -jnp.inf, jnp.float32),
        size=jnp.int32(1),
        new=none(),
        deeper=none(),
        whole=none(),
    )


def descend(key: PRNGKeyArray, tree: Tree, posterior: Posterior) -> Int[Array, ""]:
    """The node at which a child is to be generated."""

    def look(depth: Array, node: Array) -> tuple[Array, Array]:
        """Whether it is this node, and the child to go to otherwise."""
        new, deeper, below = jax.random.split(jax.random.fold_in(key, depth), 3)
        here, there = (jax.tree.map(lambda leaf: leaf[node], s) for s in (tree.new, tree.deeper))
        is_child = tree.parent == node
        wider = posterior(new, here) >= posterior(deeper, there)
        drawn = jnp.where(is_child, posterior(below, tree.whole), -jnp.inf)
        return wider | ~is_child.any(), jnp.argmax(drawn).astype(jnp.int32)

    def down(carry: tuple) -> tuple:
        depth, _, (_, node) = carry
        return depth + 1, node, look(depth + 1, node)

    start = jnp.int32(0), jnp.int32(0), look(jnp.int32(0), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: ~carry[2][0], down, start)[1]


def insert(tree: Tree, nodes: Int[Array, " B"], children: X, scores: Float[Array, " B"]) -> Tree:
    """The tree with a child of each of some nodes, one after another."""
    slots = tree.size + jnp.arange(nodes.shape[0], dtype=jnp.int32)
    known = jnp.isfinite(scores)
    tree = dataclasses.replace(
        tree,
        rows=jax.tree.map(lambda all, new: all.at[slots].set(new), tree.rows, children),
        parent=tree.parent.at[slots].set(jnp.where(known, nodes, -1)),
        score=tree.score.at[slots].set(jnp.where(known, scores, -jnp.inf)),
        size=tree.size + nodes.shape[0],
    )

    def learn(i: Array, tree: Tree) -> Tree:
        y, slot, node = scores[i], slots[i], nodes[i]
        tree = dataclasses.replace(
            tree,
            new=_with(tree.new, node, y, known[i]),
            whole=_with(tree.whole, slot, y, known[i]),
        )

        def up(carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
            node, tree = carry
            above = tree.parent[node]
            deeper, whole = _with(tree.deeper, above, y), _with(tree.whole, node, y)
            return above, dataclasses.replace(tree, deeper=deeper, whole=whole)

        first = jnp.where(known[i], node, 0)
        return jax.lax.while_loop(lambda carry: carry[0] > 0, up, (first, tree))[1]

    return jax.lax.fori_loop(0, nodes.shape[0], learn, tree)


def _with(
    scores: Scores, node: Int[Array, ""], y: Float[Array, ""], when: Bool[Array, ""] | bool = True
) -> Scores:
    """One more score of a node."""
    num = scores.num[node] + 1
    gap = jnp.where(when, y - scores.mean[node], 0.0)
    return Scores(
        num=scores.num.at[node].add(jnp.where(when, 1.0, 0.0)),
        mean=scores.mean.at[node].add(gap / num),
        spread=scores.spread.at[node].add(gap * gap * (num - 1) / num),
    )


# Strings, as states of `regeneration` with the model's cache.


def redraw(p: Target) -> Generate:
    """Every parent up to a cut, uniform over its tokens, and drawn from p from there to its end."""
    return jax.tree_util.Partial(_redraw, p)


def judged_by(reward: Callable[..., Any]) -> Callable[[regeneration.State], Float[Array, " B"]]:
    """The reward (tokens, length) -> [B] of such strings."""
    check_of_strings(reward)
    return jax.tree_util.Partial(_judge, as_pytree(reward))


def _redraw(
    p: Target, key: PRNGKeyArray, parents: regeneration.State
) -> tuple[regeneration.State, Cost]:
    num, length = parents.log_p.shape[0], parents.sequences.length
    cut_key, draw_key = jax.random.split(key)
    horizon, keys = jnp.full(num, p.max_tokens, jnp.int32), jax.random.split(cut_key, num)
    cut, _ = cuts.draw(keys, cuts.uniform_in_length, length, horizon, p.max_tokens)
    kept = regeneration.truncated(p, parents, cut)
    g = regeneration.start(p, PROPOSAL, kept, jnp.ones(num, bool))
    keys = regeneration.keys_at(jax.random.split(draw_key, num))
    g = growing.complete(keys, p, PROPOSAL, g)
    return regeneration.drawn(g), costs.of_round(p, PROPOSAL, g)


def _judge(reward: Callable[..., Any], x: regeneration.State) -> Float[Array, " B"]:
    return reward(x.sequences.tokens, x.sequences.length)
