"""A rule at work: it reads draws one at a time, while strings are drawn in rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_counts, check_function, check_key
from ppl.pytrees import as_pytree, register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Guarantee
from ..draws import ancestral
from ..registry import sampler
from ..results import Choice, Draws
from . import pools
from .answers import ids_of
from .rules import Rule, Seen, check_scoreless


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """Where a rule stopped; of many orders and budgets [O, J].

    Attributes:
        answer: what the draws up to there answer; -1 if they answer nothing, or not one was paid.
        num: n, the draws that were read.
        drawn: the draws that were paid: whole rounds.
        tokens: of all that were drawn.
        stopped: the rule said so; else the budget, or the pool, was at its end.
    """

    answer: Int[Array, "*O"]
    num: Int[Array, "*O"]
    drawn: Int[Array, "*O"]
    tokens: Int[Array, "*O"]
    stopped: Bool[Array, "*O"]


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """What a rule has seen, and the majority so far.

    Of equal counts the one of the greatest `chance` [K] wins, which are random numbers.  Only the
    answer that has just come can take the lead.
    """

    seen: Seen
    chance: Float[Array, " K"]
    best: Int[Array, ""]
    stopped: Bool[Array, ""]


def chance(key: PRNGKeyArray, num_answers: int) -> Float[Array, " K"]:
    return jax.random.uniform(key, (num_answers,), jnp.float32)


def start(chance: Float[Array, " K"], rule: Rule, max_draws: int) -> Read:
    return Read(
        seen=rule.init(chance.shape[0], max_draws),
        chance=chance,
        best=jnp.int32(-1),
        stopped=jnp.bool_(False),
    )


def read_draw(rule: Rule, read: Read, answer: Array, score: Array) -> Read:
    """One more draw."""
    seen = rule.step(read.seen, answer, score)
    counts, chance = seen.counts, read.chance
    ties = (counts[answer] == counts[read.best]) & (chance[answer] >= chance[read.best])
    leads = (read.best < 0) | (counts[answer] > counts[read.best]) | ties
    best = jnp.where((answer >= 0) & leads, answer, read.best)
    return Read(seen=seen, chance=chance, best=best, stopped=rule.decide(seen))


def online(
    key: PRNGKeyArray,
    draw: Callable[..., Any],
    rule: Rule,
    *,
    num_answers: int,
    max_draws: int = 64,
    batch: int = 8,
) -> Stop:
    """Draw in rounds until the rule stops: one program, for answers that are known on the device.

    Args:
        key: typed key.
        draw: (key, num) -> (answers, scores, lengths) [num] of independent strings, with ids below
            `num_answers`, -1 for none.
        rule: when to stop.
        num_answers: K, ids that there may be.
        max_draws: draws at most, a multiple of `batch`.
        batch: draws in a round.  The rule reads them one by one, and does not read those after its
            stop; they are paid.

    Returns:
        `Stop` with leaves [].

    Raises:
        ValueError: unless `batch` divides `max_draws`, and if `rule` is no rule.
    """
    check_key(key)
    check_rule(rule)
    check_function("draw", draw, "(key, num)", "jax.random.split")
    check_count("num_answers", num_answers)
    _check_rounds(max_draws, batch)
    return _online(key, as_pytree(draw), rule, num_answers, max_draws, batch)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _online(
    key: PRNGKeyArray, draw: Any, rule: Rule, num_answers: int, max_draws: int, batch: int
) -> Stop:
    tie_key, draw_key = jax.random.split(key)
    keys = jax.random.split(draw_key, max_draws // batch)

    def one(carry: tuple[Read, Array, Array]) -> tuple[Read, Array, Array]:
        read, rounds, tokens = carry
        answers, scores, lengths = draw(keys[rounds], batch)
        read = _round(rule, read, answers.astype(jnp.int32), scores.astype(jnp.float32))
        return read, rounds + 1, tokens + lengths.sum(dtype=jnp.int32)

    def going(carry: tuple[Read, Array, Array]) -> Array:
        return ~carry[0].stopped & (carry[1] < keys.shape[0])

    nothing = start(chance(tie_key, num_answers), rule, max_draws), jnp.int32(0), jnp.int32(0)
    read, rounds, tokens = jax.lax.while_loop(going, one, nothing)
    return Stop(
        answer=read.best,
        num=read.seen.num,
        drawn=rounds * batch,
        tokens=tokens,
        stopped=read.stopped,
    )


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_stopping.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    rule: Rule,
    *,
    answer: Callable[[Any], Any],
    max_draws: int = 64,
    batch: int = 8,
) -> Choice:
    """Draw strings in rounds until the rule stops, and answer what most of them do.

    There is no target; `lattice` has the law of the answer.  Answers are read on the host after
    every round.

    Args:
        key: typed key.
        p: a language model.
        rule: when to stop, by answers.
        answer: from the token ids of one string to what it answers, as in `pools.of`.
        max_draws: strings at most, a multiple of `batch`.
        batch: strings in a round.  The rule reads them one by one, and does not read those after
            its stop; they are paid, and returned.

    Returns:
        `Choice` of all that were drawn: `scores` are the votes that a string's answer has, -inf for
        none, and for what the rule did not read; `best` is the first string of the majority, ties
        by the key.  `details`: the `stop`, and the `answer` ids of the strings.

    Raises:
        ValueError: unless `batch` divides `max_draws`, and if `rule` is no rule or reads scores, or
            p not one language model.
    """
    check_rule(rule)
    check_scoreless(rule)
    check_function("answer", answer, "(ids)", "samplers.search.answers.last_number(tok)")
    _check_rounds(max_draws, batch)
    if not isinstance(p, Target):
        raise ValueError(f"expected the target of one prompt, got {p!r}; use stopping.run on each")
    tie_key, draw_key = jax.random.split(key)
    read = start(chance(tie_key, max_draws), rule, max_draws)
    once, rounds, strings = _Once(answer), [], []
    for round_key in jax.random.split(draw_key, max_draws // batch):
        rounds.append(ancestral.run(round_key, p, num_samples=batch))
        strings += _ids(rounds[-1].sequences)
        # All are numbered together, for an answer may be that of an earlier round.
        new = jnp.asarray(ids_of(strings, once)[0][-batch:])
        read = _round(rule, read, new, jnp.zeros(batch, jnp.float32))
        if read.stopped:
            break
    return _choice(rounds, once, read)


@dataclasses.dataclass(frozen=True)
class _Once:
    """An answer function that is asked once for each string, also where it raises."""

    answer: Callable[[Any], Any]
    known: dict[Hashable, tuple[Any, Exception | None]] = dataclasses.field(default_factory=dict)

    def __call__(self, ids: list[int]) -> Any:
        if tuple(ids) not in self.known:
            try:
                self.known[tuple(ids)] = self.answer(ids), None
            except Exception as raised:  # said by the pool
                self.known[tuple(ids)] = None, raised
        value, raised = self.known[tuple(ids)]
        if raised is not None:
            raise raised
        return value

    def __getattr__(self, name: str) -> Any:
        """What else it has: `equal`, `tokenizer`."""
        return getattr(self.answer, name)


def _ids(x: Sequences) -> list[list[int]]:
    tokens, length = np.asarray(x.tokens), np.asarray(x.length)
    return [row[:size].tolist() for row, size in zip(tokens, length, strict=True)]


def _choice(rounds: list[Draws], once: _Once, read: Read) -> Choice:
    costs = [out.cost for out in rounds]
    drawn = Draws(
        samples=jax.tree.map(lambda *x: jnp.concatenate(x), *(out.samples for out in rounds)),
        log_prob=jnp.concatenate([out.log_prob for out in rounds]),
        cost=sum(costs[1:], start=costs[0]),
    )
    pool = pools.of(drawn, answer=once)
    voted = (pool.answer >= 0) & (jnp.arange(pool.num, dtype=jnp.int32) < read.seen.num)
    votes = jnp.where(voted, read.seen.counts[pool.answer].astype(jnp.float32), -jnp.inf)
    stop = Stop(
        answer=read.best,
        num=read.seen.num,
        drawn=jnp.int32(pool.num),
        tokens=pool.length.sum(dtype=jnp.int32),
        stopped=read.stopped,
    )
    return Choice(
        samples=drawn.samples,
        scores=votes,
        best=jnp.argmax(voted & (pool.answer == read.best)).astype(jnp.int32),
        cost=drawn.cost,
        log_prob=drawn.log_prob,
        details={"stop": stop, "answer": pool.answer},
    )


@jax.jit
def _round(rule: Rule, read: Read, answers: Int[Array, " B"], scores: Array) -> Read:
    """A round of draws, of which the rule reads none after its stop."""

    def step(read: Read, x: tuple[Array, Array]) -> tuple[Read, None]:
        after = read_draw(rule, read, *x)
        return jax.tree.map(lambda a, b: jnp.where(read.stopped, a, b), read, after), None

    return jax.lax.scan(step, read, (answers, scores))[0]


def _check_rounds(max_draws: int, batch: int) -> None:
    check_counts(max_draws=max_draws, batch=batch)
    if max_draws % batch:
        raise ValueError(
            f"expected batch to divide max_draws, got {batch} and {max_draws}; pass max_draws="
            f"{-(-max_draws // batch) * batch}"
        )


def check_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise ValueError(f"expected a rule, got {rule!r}; pass e.g. stopping.beta(0.95)")
