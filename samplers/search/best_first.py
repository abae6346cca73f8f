"""Best-first search over steps of text: a queue of prefixes, of which the best are extended first.

What is best is a function of a node and its parent, so one loop is greedy search by a process
reward, A*-decoding (arXiv 2505.13672) and Levin's search, as in MindStar (arXiv 2405.16265).  The
queue is a population of fixed capacity whose rows keep the model's cache: what is popped goes on
where it stopped, and nothing is read twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts, check_function
from ppl.pytrees import register_dataclass
from ppl.rows import at, log_normalised, take_rows, where_rows
from ppl.sequences import empty
from ppl.steps import Steps
from ppl.target import Target, check_plain

from ..base import Cost, Guarantee, spent
from ..registry import sampler
from ..results import Choice
from ..strings import costs, extending, growing
from ..strings.growing import Growing
from ..strings.proposals import Proposal, as_proposal, bootstrap
from .priorities import Nodes, Order, Priority

PROPOSAL: Proposal = as_proposal(bootstrap)


Children = Callable[[PRNGKeyArray, Target, Steps, Growing, int], tuple[Growing, Float[Array, " N"]]]
"""(key, target, steps, x, width) -> the strings x a step longer, and what it adds to log Phi.

Strings come in groups of `width` equal ones, with the logits of their next token.
"""


# Children.


def sampled(
    key: PRNGKeyArray, target: Target, steps: Steps, x: Growing, width: int
) -> tuple[Growing, Float[Array, " N"]]:
    """`width` independent draws of the next step."""
    return extending.extend(target, PROPOSAL, steps).sample(key, x)


def likeliest(
    key: PRNGKeyArray, target: Target, steps: Steps, x: Growing, width: int
) -> tuple[Growing, Float[Array, " N"]]:
    """The `width` likeliest next tokens, for steps of one token; with V of them, all children.

    Raises:
        ValueError: unless `steps` are `Steps(every=1)` and width is at most V.
    """
    if steps.every != 1 or width > target.lm.vocab_size:
        raise ValueError(
            f"expected steps of one token and a width of at most {target.lm.vocab_size} for the"
            f" likeliest children, got {steps} and {width}; pass ppl.Steps(every=1), or"
            " children=best_first.sampled"
        )
    x, logits = growing.forward(target, growing.fresh(x))
    log_p = log_normalised(logits)
    tokens = jax.lax.top_k(log_p[::width], width)[1].ravel()
    moving, log_p = x.active, at(log_p, tokens)
    x, log_phi = growing.take(target, PROPOSAL, x, tokens, moving)
    x = dataclasses.replace(x, log_prob=x.log_prob + jnp.where(moving, log_p, 0.0))
    gain = jnp.where(log_p > -jnp.inf, log_phi, -jnp.inf)
    return x, jnp.where(moving, gain, 0.0)


# The search.


class _How(NamedTuple):
    """What is static in a search."""

    order: Order
    children: Children
    width: int
    num_pop: int
    capacity: int


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """A queue of nodes and what has happened: nodes expanded, how often the reward was asked for,
    nodes dropped from a full queue.
    """

    queue: Nodes
    expansions: Int[Array, ""]
    num_scored: Int[Array, ""]
    dropped: Int[Array, ""]
    cost: Cost


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_best_first.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    priority: Priority,
    steps: Steps,
    *,
    width: int = 4,
    num_pop: int = 1,
    capacity: int = 64,
    max_expansions: int = 64,
    children: Children = sampled,
) -> Choice:
    """Best-first search: pop the best prefixes, queue `width` next steps of each, until the best of
    the queue is a string that has ended; in one jit.

        best_first.run(key, p, priorities.astar(prm), ppl.Steps.by_text("\\n\\n", tok))

    Equal children of a node are one, and of equal scores the greater value goes first.  A full
    queue drops the worst.  If nothing in the queue has ended when all but one of the expansions are
    spent, the last one draws `width` continuations of the best prefix to their ends, so
    `max_expansions=1` is best of `width`.  There is no target: it maximises what `priority` says.

    Args:
        key: typed key.
        p: a language model.
        priority: `greedy(reward)`, `astar(reward)` or `levin(goal)`.
        steps: where steps of text end.
        width: children of a node.
        num_pop: nodes that are extended together, in one batch, if none that has ended is better.
        capacity: nodes in the queue, each with its row of the model's cache.
        max_expansions: nodes that are extended at most.
        children: `sampled` or `likeliest`.

    Returns:
        `Choice` from what is in the queue at the end, best first: `scores` are -inf for prefixes,
        which have not ended.  `details`: `ended` [capacity], `priority` [capacity] the scores of
        prefixes too, `depth` [capacity] steps, `found` [] whether the choice was the best of the
        queue within the budget, `expansions` [], `num_scored` [] children that were weighed,
        `dropped` [] nodes that a full queue lost.

    Raises:
        ValueError: unless all counts are at least 1, the queue holds the children of what is popped
            together, capacity >= num_pop * width, and p has no power and no potential.
    """
    check_counts(width=width, num_pop=num_pop, capacity=capacity, max_expansions=max_expansions)
    check_function("children", children, "key, target, steps, x, width", f"{__name__}.sampled")
    _check(p, priority)
    if capacity < num_pop * width:
        raise ValueError(
            f"expected a queue of at least num_pop * width = {num_pop * width} nodes, got capacity="
            f"{capacity}; pass capacity={num_pop * width} or more"
        )
    target = priority.tilt(p, priority.reward, steps)
    how = _How(priority.order, children, width, num_pop, capacity)
    return _run(key, target, steps.within(p.space), jnp.int32(max_expansions), how)


def _check(p: Target, priority: Priority) -> None:
    check_plain(
        p,
        ", which a search does not weigh; use particle_filtering.run, which does, or say what"
        " strings are sought by priorities.levin(goal)",
    )
    if not isinstance(priority, Priority):
        raise ValueError(f"expected a priority, got {priority!r}; pass priorities.greedy(reward)")


@functools.partial(jax.jit, static_argnames="how")
def _run(
    key: Any, target: Target, steps: Steps, max_expansions: Int[Array, ""], how: _How
) -> Choice:
    def going(s: _Search) -> Bool[Array, ""]:
        best = _ranked(s.queue)[0]
        under_way = s.queue.strings.active[best] & (s.queue.score[best] > -jnp.inf)
        return under_way & (s.expansions < max_expansions - 1)

    def one(s: _Search) -> _Search:
        now = jax.random.fold_in(key, s.expansions)
        return _expand(now, target, steps, s, max_expansions - 1, how)

    def nothing_ended(s: _Search) -> Bool[Array, ""]:
        living = s.queue.score > -jnp.inf
        ended = living & ~s.queue.strings.active
        return living.any() & ~ended.any() & (s.expansions < max_expansions)

    def to_its_end(s: _Search) -> _Search:
        whole = Steps(every=target.max_tokens).within(target.space)
        now = jax.random.fold_in(key, s.expansions)
        return _expand(now, target, whole, s, s.expansions + 1, how._replace(children=sampled))

    s = jax.lax.while_loop(going, one, _start(target, how.capacity))
    best = _ranked(s.queue)[0]
    found = ~s.queue.strings.active[best] & (s.queue.score[best] > -jnp.inf)
    # A loop of at most one turn, for the same reason as in `base.resample`.
    return _choice(target, jax.lax.while_loop(nothing_ended, to_its_end, s), found)


def _start(target: Target, capacity: int) -> _Search:
    """The root in the queue."""
    # Its logits are the prompt's, but later nodes have none; one pass more keeps one program.
    x = dataclasses.replace(growing.start(target, PROPOSAL, capacity), logits=None)
    first = jnp.arange(capacity) == 0
    queue = Nodes(
        strings=dataclasses.replace(x, active=first),
        value=jnp.zeros(capacity, jnp.float32),
        depth=jnp.zeros(capacity, jnp.int32),
        score=jnp.where(first, jnp.float32(0), -jnp.inf),
    )
    none = jnp.int32(0)
    return _Search(queue, none, none, none, costs.prompt(target, PROPOSAL))


def _expand(
    key: PRNGKeyArray,
    target: Target,
    steps: Steps,
    s: _Search,
    limit: Int[Array, ""],
    how: _How,
) -> _Search:
    """The best nodes give way to their children; not those behind one that has ended, nor beyond
    `limit` expansions.
    """
    rows = _ranked(s.queue)[: how.num_pop]
    best = _take(target, s.queue, rows)
    before_an_end = jnp.cumsum(~best.strings.active, dtype=jnp.int32) == 0
    places = jnp.arange(how.num_pop, dtype=jnp.int32)
    popped = before_an_end & (best.score > -jnp.inf) & (places < limit - s.expansions)
    x = growing.fresh(dataclasses.replace(best.strings, active=popped))
    read, _ = growing.forward(target, x)

    group = jnp.repeat(places, how.width)
    parents = _take(target, dataclasses.replace(best, strings=read), group)
    strings, gain = how.children(key, target, steps, parents.strings, how.width)
    born = Nodes(strings, parents.value + gain, parents.depth + 1, parents.score)
    alive = popped[group] & jnp.isfinite(born.value) & ~_repeated(strings, how.width)
    scores = how.order(parents, born)
    scores = jnp.where(alive & ~jnp.isnan(scores), scores, -jnp.inf).astype(jnp.float32)
    left = s.queue.score.at[rows].set(jnp.where(popped, -jnp.inf, best.score))
    queue, lost = _push(
        dataclasses.replace(s.queue, score=left), dataclasses.replace(born, score=scores)
    )
    # The parents' passes first, in one row each.
    more = costs.one_pass(target, PROPOSAL, x) + costs.of_round(target, PROPOSAL, strings)
    return _Search(
        queue=queue,
        expansions=s.expansions + popped.sum(dtype=jnp.int32),
        num_scored=s.num_scored + (strings.drawn > 0).sum(dtype=jnp.int32),
        dropped=s.dropped + lost,
        cost=spent(s.cost, more),
    )


def _take(target: Target, nodes: Nodes, rows: Int[Array, " M"]) -> Nodes:
    strings = growing.reorder(target, PROPOSAL, nodes.strings, rows)
    return Nodes(strings, nodes.value[rows], nodes.depth[rows], nodes.score[rows])


def _repeated(x: Growing, width: int) -> Bool[Array, " N"]:
    """Which strings are in their group of `width` before."""
    said = jnp.column_stack([x.sequences.tokens, x.sequences.length, x.active])
    said = said.reshape(-1, width, said.shape[1])
    same = (said[:, :, None] == said[:, None]).all(-1)
    return jnp.tril(same, -1).any(-1).ravel()


def _ranked(nodes: Nodes) -> Int[Array, " N"]:
    """The nodes, best first; of equal scores the greater value."""
    return jnp.lexsort((-nodes.value, -nodes.score)).astype(jnp.int32)


def _push(queue: Nodes, born: Nodes) -> tuple[Nodes, Int[Array, ""]]:
    """The best of both, where children stand in the places of the worst; and how many were lost."""
    num, capacity = born.score.shape[0], queue.score.shape[0]
    # The best child against the worst of the queue, and so on.
    slots, child = _ranked(queue)[::-1][:num], _ranked(born)
    worst, score = queue.score[slots], born.score[child]
    ahead = (score == worst) & (born.value[child] > queue.value[slots])
    enters = (score > worst) | (ahead & (score > -jnp.inf))
    place = jnp.zeros(num, jnp.int32).at[child].set(jnp.where(enters, slots, capacity))
    after = jax.tree.map(lambda all, new: all.at[place].set(new, mode="drop"), queue, born)
    lost = jnp.where(enters, worst, score) > -jnp.inf
    return after, lost.sum(dtype=jnp.int32)


def _choice(target: Target, s: _Search, found: Bool[Array, ""]) -> Choice:
    """What is in the queue, strings that have ended first."""
    scores = jnp.where(s.queue.strings.active, -jnp.inf, s.queue.score)
    rows = jnp.lexsort((-s.queue.value, -s.queue.score, -scores))
    strings, score = s.queue.strings, s.queue.score[rows]
    held = score > -jnp.inf
    x, log_prob, active, depth = take_rows(
        (strings.sequences, strings.log_prob, strings.active, s.queue.depth), rows
    )
    return Choice(
        samples=where_rows(held, x, empty(held.shape[0], target.max_tokens, target.lm.eos)),
        scores=scores[rows],
        best=jnp.int32(0),
        cost=s.cost,
        log_prob=jnp.where(held, log_prob, -jnp.inf),
        details={
            "ended": held & ~active,
            "priority": score,
            "depth": jnp.where(held, depth, 0),
            "found": found,
            "expansions": s.expansions,
            "num_scored": s.num_scored,
            "dropped": s.dropped,
        },
    )
