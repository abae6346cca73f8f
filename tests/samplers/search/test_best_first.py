"""Best-first search against a queue in plain Python, with all draws of all expansions enumerated,
or all children expanded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl.sequences import Sequences
from samplers.search import best_first, priorities
from samplers.strings import growing
from tests import helpers
from tests.helpers import EOS, MAX_TOKENS, MODELS, PROMPT, VOCAB_SIZE, String
from tests.samplers.draws.test_ancestral import check_frequencies
from tests.samplers.problems import code, plain
from tests.samplers.search.test_step_search import SCORES, small, tie_free

ONE = ppl.Steps(every=1)
SMALL = 3
KEY = jax.random.key(4)


class Node(NamedTuple):
    """A node, and log p and the score of it; `ended` by EOS or by the horizon."""

    x: String
    ended: bool
    log_p: float
    depth: int
    score: float
    value: float


ROOT = Node((), False, 0.0, 0, 0.0, 0.0)


@functools.cache
def value(x: String) -> float:
    tokens, _ = helpers.as_arrays([x], MAX_TOKENS, EOS)
    return float(SCORES[int(code(np.asarray(tokens))[0])])


def h(v: float) -> float:
    return 1 / (1 + math.exp(v))


ORDERS: dict[str, Callable[[Node, Node], float]] = {
    "greedy": lambda parent, child: child.value,
    "astar": lambda parent, child: (
        parent.score - max(0.0, h(child.value) - (h(parent.value) if parent.depth else 0.0))
    ),
    "levin": lambda parent, child: child.log_p - math.log(child.depth),
}
PRIORITIES = {
    "greedy": priorities.greedy(tie_free),
    "astar": priorities.astar(tie_free),
    "levin": priorities.levin(),
}


def children(parent: Node, law: Callable[[String], Any], order: str) -> Iterator[Node]:
    """All next tokens of a node, scored."""
    for token, log_p in enumerate(law(parent.x)):
        if log_p == -np.inf:
            continue
        x = parent.x if token == EOS else (*parent.x, token)
        ended = token == EOS or len(x) == MAX_TOKENS
        v = 0.0 if order == "levin" else value(x)
        child = Node(x, ended, parent.log_p + log_p, parent.depth + 1, 0.0, v)
        yield child._replace(score=ORDERS[order](parent, child))


def ranked(nodes: Any) -> list[Node]:
    return sorted(nodes, key=lambda node: (-node.score, -node.value))


@functools.cache
def small_laws(x: String) -> np.ndarray:
    return np.asarray(small().lm.params, np.float64)[x[-1] if x else 2]


Laws = Callable[[String], Any]
"""log p of every next token after a prefix."""


@functools.cache
def prefix_laws(model: str) -> Laws:
    """By one pass over the prefix."""
    lm = MODELS[model]()

    @functools.cache
    def law(x: String) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(lm.prefill([*PROMPT, *x]).logits), np.float64)

    return law


# All children.


def exhaustive(laws: Laws, order: str) -> tuple[Node, int]:
    """What a search with all children chooses, and how many nodes it expands."""
    queue, expansions = [ROOT], 0
    while not queue[0].ended:
        first, *rest = queue
        queue = ranked([*rest, *children(first, laws, order)])
        expansions += 1
    return queue[0], expansions


def goals(laws: Laws, order: str) -> list[Node]:
    """Every string that has ended, by walking the whole tree."""
    found, under_way = [], [ROOT]
    while under_way:
        node = under_way.pop()
        (found if node.ended else under_way).extend(
            [node] if node.ended else children(node, laws, order)
        )
    return found


def searched(p: Any, order: Any, **options: Any) -> Any:
    given: dict[str, Any] = {
        "width": VOCAB_SIZE,
        "capacity": 128,
        "max_expansions": 100,
        "children": best_first.likeliest,
    }
    how = PRIORITIES[order] if isinstance(order, str) else order
    return best_first.run(KEY, p, how, ONE, **(given | options))


def check_the_books(out: Any, laws: Laws, order: str) -> None:
    """The search of a queue in plain Python; Levin's expands at most min d / p nodes, and Levin's
    and A* find the best string of all.
    """
    (chosen, expansions), best = exhaustive(laws, order), int(out.best)
    assert helpers.as_strings(out.chosen.tokens, out.chosen.length) == [chosen.x]
    assert int(out.details["expansions"]) == expansions and out.details["found"]
    assert int(out.details["num_scored"]) == VOCAB_SIZE * expansions
    np.testing.assert_allclose(out.scores[best], chosen.score, atol=1e-5)
    np.testing.assert_allclose(out.log_prob[best], chosen.log_p, atol=1e-4)
    assert int(out.details["depth"][best]) == chosen.depth and int(out.details["dropped"]) == 0
    every = goals(laws, order)
    if order == "levin":
        assert expansions <= min(node.depth / math.exp(node.log_p) for node in every)
    if order != "greedy":
        np.testing.assert_allclose(chosen.score, max(node.score for node in every), atol=1e-9)


@pytest.mark.parametrize("order", ["astar", "levin"])
def test_with_all_children_it_is_the_search_of_the_books(order: str):
    """On 40 random trees."""
    spread = 1.5 * jax.random.normal(jax.random.key(1), (40, VOCAB_SIZE, VOCAB_SIZE))
    log_p = jax.nn.log_softmax(spread)

    def one(log_p: Any) -> Any:
        p = tabular.markov(jnp.exp(log_p), eos=EOS).given(PROMPT, max_tokens=MAX_TOKENS)
        return searched(p, order)

    found = jax.jit(jax.vmap(one))(log_p)
    for i, rows in enumerate(np.asarray(log_p, np.float64)):
        out = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        check_the_books(out, lambda x, rows=rows: rows[(*PROMPT, *x)[-1]], order)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", MODELS)
def test_of_every_model(model: str, order: str):
    check_the_books(searched(plain(model), order), prefix_laws(model), order)


@pytest.mark.slow
def test_levins_bound_holds_for_the_goals_that_are_given():
    """Goals of two or three tokens that end in 3."""

    def goal(tokens: Any, length: Any) -> Any:
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], 1)[:, 0]
        return jnp.where((length >= 2) & (length < MAX_TOKENS) & (last == 3), 0.3, -jnp.inf)

    laws = prefix_laws("table")
    sought = [
        node for node in goals(laws, "levin") if 2 <= len(node.x) < MAX_TOKENS and node.x[-1] == 3
    ]
    best = max(sought, key=lambda node: node.score)
    out = searched(plain("table"), priorities.levin(goal))
    assert helpers.as_strings(out.chosen.tokens, out.chosen.length) == [best.x]
    bound = best.depth / math.exp(best.log_p)
    assert exhaustive(laws, "levin")[1] < int(out.details["expansions"]) <= bound
    # Without room it may lose the goal, and says so.
    tight = searched(plain("table"), priorities.levin(goal), capacity=VOCAB_SIZE)
    assert int(tight.details["dropped"]) > 0


# The queue.


def nodes(first: int, scores: np.ndarray, values: np.ndarray) -> Any:
    """Nodes whose strings are numbers."""
    num = len(scores)
    names = jnp.arange(first, first + num, dtype=jnp.int32)[:, None]
    strings = Sequences(names, jnp.ones(num, jnp.int32))
    return priorities.Nodes(
        strings=growing.of(strings, jnp.ones(num, bool), (), ()),
        value=jnp.asarray(values, jnp.float32),
        depth=jnp.zeros(num, jnp.int32),
        score=jnp.asarray(scores, jnp.float32),
    )


def test_a_full_queue_keeps_the_best():
    """Of scores with many ties, and empty slots: the best of all by score and value stay."""
    rng = np.random.default_rng(5)
    push = jax.jit(best_first._push)
    for _ in range(40):
        scores = rng.choice([-np.inf, 0.0, 1.0, 2.0, 3.0], size=13)
        values = rng.permutation(13) / 8  # without ties, so that there is one answer
        held, born = nodes(0, scores[:8], values[:8]), nodes(8, scores[8:], values[8:])
        after, lost = push(held, born)
        order = [i for i in np.lexsort((-values, -scores)) if scores[i] > -np.inf]
        kept = np.asarray(after.score) > -np.inf
        found = np.asarray(after.strings.sequences.tokens)[kept, 0]
        assert sorted(found) == sorted(order[:8]) and int(lost) == max(len(order) - 8, 0)
        np.testing.assert_allclose(after.score[kept], scores[found])


# Sampled children.


def search_law(
    order: str, width: int, num_pop: int, capacity: int, max_expansions: int
) -> dict[String, float]:
    """The law of the choice: queues, and how many nodes have been expanded, with their mass."""
    law: dict[String, float] = defaultdict(float)
    states: dict[tuple[tuple[Node, ...], int], float] = {((ROOT,), 0): 1.0}
    while states:
        after: dict[tuple[tuple[Node, ...], int], float] = defaultdict(float)
        for (queue, spent), mass in states.items():
            if queue[0].ended:
                law[queue[0].x] += mass
            elif spent == max_expansions - 1:
                for x, share in last_law(queue, order, width).items():
                    law[x] += mass * share
            else:
                going = itertools.takewhile(lambda node: not node.ended, queue[:num_pop])
                popped = list(going)[: max_expansions - 1 - spent]
                for born, share in drawn(popped, order, width).items():
                    rest = [node for node in queue if node not in popped]
                    kept = tuple(ranked([*rest, *born])[:capacity])
                    after[kept, spent + len(popped)] += mass * share
        states = after
    return law


def drawn(popped: list[Node], order: str, width: int) -> dict[frozenset[Node], float]:
    """The law of the set of children of some nodes."""
    law: dict[frozenset[Node], float] = {frozenset(): 1.0}
    for node in popped:
        possible = [
            (child, math.exp(child.log_p - node.log_p))
            for child in children(node, small_laws, order)
        ]
        after: dict[frozenset[Node], float] = defaultdict(float)
        for draws in itertools.product(possible, repeat=width):
            mass = math.prod(share for _, share in draws)
            for born, before in law.items():
                after[born | {child for child, _ in draws}] += mass * before
        law = after
    return law


def last_law(queue: tuple[Node, ...], order: str, width: int) -> dict[String, float]:
    """The law of the best end when the best prefix is drawn to its end; something may have ended
    already, and then that is chosen.
    """
    ended = [node.x for node in queue if node.ended]
    if ended:
        return {ended[0]: 1.0}
    ends, under_way = [], [queue[0]]
    while under_way:
        node = under_way.pop()
        for child in children(node, small_laws, order):
            (ends if child.ended else under_way).append(child)
    shares = {e.x: math.exp(e.log_p - queue[0].log_p) for e in ends}
    law: dict[String, float] = defaultdict(float)
    for draws in itertools.product(shares, repeat=width):
        law[max(draws, key=value)] += math.prod(shares[x] for x in draws)
    return law


def choices(order: str, runs: int = 20_000, steps: Any = ONE, **options: Any) -> Any:
    """The strings that many searches choose [runs, T]."""
    p = small()

    def one(key: Any) -> Any:
        out = best_first.run(key, p, PRIORITIES[order], steps, **options)
        return out.sequences.tokens[out.best]

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))


CASES = [
    ("greedy", {"width": 2, "num_pop": 1, "capacity": 3, "max_expansions": 4}),
    pytest.param(
        *("greedy", {"width": 2, "num_pop": 2, "capacity": 4, "max_expansions": 5}),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("greedy", {"width": 2, "num_pop": 1, "capacity": 8, "max_expansions": 1}),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("order", "options"), CASES)
def test_the_choice_has_the_enumerated_law(order: str, options: dict[str, int]):
    expected = search_law(order, **options)
    assert abs(sum(expected.values()) - 1) < 1e-6
    found = choices(order, **options)
    check_frequencies(found, expected)
    # A smaller budget, or a wider search, has another law.
    spent = options["max_expansions"]
    less = {"max_expansions": spent - 1} if spent > 1 else {"width": options["width"] + 1}
    with pytest.raises(AssertionError):
        check_frequencies(found, search_law(order, **(options | less)))


@pytest.mark.slow
def test_a_queue_that_pops_the_worst_fails(monkeypatch: pytest.MonkeyPatch):
    """Planted fault."""
    options = {"width": 2, "num_pop": 1, "capacity": 5, "max_expansions": 4}
    monkeypatch.setattr(
        best_first,
        "_ranked",
        lambda nodes: jnp.lexsort(
            (nodes.value, jnp.where(nodes.score > -jnp.inf, nodes.score, jnp.inf))
        ),
    )
    with pytest.raises(AssertionError):
        check_frequencies(choices("greedy", 5_000, **options), search_law("greedy", **options))


@pytest.mark.slow
def test_what_a_search_returns():
    """Steps of two tokens: prefixes that are left over are no candidates."""
    out = best_first.run(
        KEY,
        plain("table"),
        priorities.greedy(tie_free),
        ppl.Steps(every=2),
        width=4,
        num_pop=2,
        capacity=16,
        max_expansions=6,
    )
    scores, ended = np.asarray(out.scores), np.asarray(out.details["ended"])
    assert ended[out.best] and scores[out.best] == scores.max()
    assert (np.isneginf(scores) == ~ended).all()
    length, held = np.asarray(out.sequences.length), np.asarray(out.details["priority"]) > -np.inf
    assert not length[~held].any() and (length[held & ~ended] == 2).all()
    r = np.asarray(tie_free(out.sequences.tokens, out.sequences.length))
    np.testing.assert_allclose(scores[ended], np.log(r / (1 - r))[ended], atol=1e-4)
    assert int(out.details["num_scored"]) == 4 * int(out.details["expansions"])


@pytest.mark.bad_input
def test_bad_input():
    args = (KEY, plain("hmm"), PRIORITIES["greedy"], ONE)
    with pytest.raises(ValueError, match="a queue of at least num_pop \\* width = 12 nodes, got"):
        best_first.run(*args, width=4, num_pop=3, capacity=11)
    with pytest.raises(ValueError, match="expected max_expansions to be a whole number of at leas"):
        best_first.run(*args, max_expansions=0)
    with pytest.raises(ValueError, match="expected a plain language model"):
        best_first.run(KEY, plain("hmm") ** 2, *args[2:])
    with pytest.raises(ValueError, match="expected a priority, got .*; pass priorities.greedy"):
        best_first.run(*args[:2], tie_free, ONE)
    with pytest.raises(ValueError, match="expected steps of one token and a width of at most 4"):
        best_first.run(*args[:3], ppl.Steps(every=2), children=best_first.likeliest)
    with pytest.raises(ValueError, match="expected children to be a function of key, target"):
        best_first.run(*args, children="sampled")
