"""Thoughts about a context before its questions come, shared by all of them (sleep-time compute,
arXiv 2504.13171).

    outs = sleeping.run(key, lm.given(context, max_tokens=64), questions, guide=guide)

A thought c' about a context c is a latent that all questions q share.  It is drawn from any law g,
such as the model after another prompt, and weighed for the model's own:

    c'_j ~ g(c' | c),  a_jk ~ p(a | c, c'_j, q),    log w_j = log p(c'_j | c) - log g(c'_j | c)

so that for every question the answers a_jk with log-weights log w_j obey LAW 1 for

    gamma(a) = sum_c' p(c' | c) p(a | c, c', q)

As published there are no weights: that is the law of g's thoughts.  Context and thought are
read once for all questions, a question once for all its answers.  Costs in tokens:

    sleep / m + test        per question, of m that share what sleep took
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_counts, check_ids
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.showing import shown
from ppl.target import Target, check_plain

from .. import population
from ..base import Cost, Guarantee, Particles
from ..diagnostics import log_z_std_error
from ..draws import ancestral
from ..registry import sampler
from ..results import Draws, Weighted
from ..strings import costs, growing
from ..strings.proposals import as_proposal, bootstrap

PROPOSAL = as_proposal(bootstrap)


@shown
class Questions(NamedTuple):
    """Q questions: tokens [Q, K], and how many of them they have [Q]."""

    tokens: Int[Array, "Q K"]
    length: Int[Array, " Q"]


@shown
class Answers(NamedTuple):
    """Of one thought: m answers to each of Q questions, log p of each [Q, m], and the costs [Q]."""

    sequences: Sequences
    log_prob: Float[Array, "Q m"]
    answering: Cost


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_sleeping.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    questions: Sequence[Sequence[int]],
    *,
    guide: Target | None = None,
    num_thoughts: int = 8,
    num_samples: int = 4,
    max_tokens: int = 64,
) -> list[Weighted]:
    """Answers to every question after thoughts that all of them share, in one jit.

    Args:
        key: typed key.
        p: thoughts about the context, `lm.given(context, max_tokens=...)`; one that is cut by the
            horizon is read as it is.
        questions: Q, token ids of each, as they follow a thought.
        guide: what thoughts are drawn from, a language model over the same strings, which can say
            whatever p can; by default p.
        num_thoughts, num_samples: J, and m answers to each question after each.
        max_tokens: of an answer.

    Returns:
        For each question a `Weighted` of J m answers, those after one thought together; its
        standard error is that of J thoughts.  `cost` is what its answers took, `details` has
        `sleeping`, what all questions share, and the `thoughts`, as `Draws` [J].

    Raises:
        ValueError: if p or guide has a power or a potential or they are over different strings, a
            count is below 1, a question is empty or has an id that is none or is EOS, or the
            model's context has no room.
    """
    check_counts(num_thoughts=num_thoughts, num_samples=num_samples, max_tokens=max_tokens)
    drawn_from = p if guide is None else guide
    for one in (p, drawn_from):
        check_plain(one, "; thoughts are drawn, and not tilted")
    p.space.check_same(drawn_from.space, "a guide", "give it the same max_tokens")
    asked = _read(p, questions)
    _check_room(p, asked.tokens.shape[1] + max_tokens)
    found, thoughts, log_weights, sleeping = _run(
        key, p, drawn_from, asked, (num_thoughts, num_samples, max_tokens)
    )
    return [
        _result(jax.tree.map(lambda leaf, i=i: leaf[:, i], found), thoughts, log_weights, sleeping)
        for i in range(len(questions))
    ]


def per_question(sleep: float | int, test: float | int, num: int) -> float:
    """Tokens (or what they cost) for each of `num` questions that share what sleep took.

    Raises:
        ValueError: if num < 1.
    """
    check_count("num", num)
    return sleep / num + test


def break_even(sleep: float | int, saved: float | int) -> float | int:
    """The fewest questions from which on sleep pays, where each then saves `saved` at test time;
    infinite where it saves nothing.
    """
    return math.ceil(sleep / saved) if saved > 0 else math.inf


def _read(p: Target, questions: Sequence[Sequence[int]]) -> Questions:
    check_count("the number of questions", len(questions))
    rows = [np.asarray(question) for question in questions]
    for row in rows:
        check_count("the number of tokens of a question", row.size)
        with jax.ensure_compile_time_eval():  # inside of jit too
            check_ids(jnp.asarray(row, jnp.int32), p.lm.vocab_size, p.lm.eos, "question")
    tokens = np.full((len(rows), max(map(len, rows))), p.lm.eos, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return Questions(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


def _check_room(p: Target, more: int) -> None:
    context, length = p.lm.context, p.prefix.length
    if context is None or isinstance(length, Tracer):
        return
    needed = int(length) + p.max_tokens + more
    if needed > context:
        raise ValueError(
            f"expected context, thought, question and answer within the model's {context} tokens,"
            f" got up to {needed}; lower max_tokens"
        )


@functools.partial(jax.jit, static_argnames="sizes")
def _run(
    key: PRNGKeyArray, p: Target, guide: Target, asked: Questions, sizes: tuple[int, int, int]
) -> tuple[Answers, Draws, Float[Array, " J"], Cost]:
    num, each, max_tokens = sizes
    think_key, answer_key = jax.random.split(key)
    thoughts = ancestral.run(think_key, guide, num_samples=num)
    x: Sequences = thoughts.samples
    log_weights = p.log_density(x.tokens, x.length) - thoughts.log_prob

    def after(one: tuple[Array, Array, Array]) -> Answers:
        key, tokens, length = one
        return _answers(key, _prompted(p, tokens, length), asked, each, max_tokens)

    # One thought at a time: its key-values are shared by the rows of all its answers.
    found = jax.lax.map(after, (jax.random.split(answer_key, num), x.tokens, x.length))
    reading = Cost(
        forwards=jnp.int32(num),
        depth=jnp.int32(num),
        kv_read=(p.prefix.length + x.length).sum().astype(jnp.float32),
    )
    return found, thoughts, log_weights, thoughts.cost + reading


def _prompted(p: Target, thought: Int[Array, " S"], length: Int[Array, ""]) -> Target:
    """The model after the context and a thought."""
    context, start = p.prefix.tokens, p.prefix.length
    place = jnp.arange(context.shape[0] + thought.shape[0], dtype=jnp.int32)
    before = jnp.pad(context, (0, thought.shape[0]))
    inside = (place >= start) & (place < start + length)
    later = thought[jnp.clip(place - start, 0, thought.shape[0] - 1)]
    prefix = p.lm.read(jnp.where(inside, later, before), start + length)
    return dataclasses.replace(p, prefix=prefix)


def _answers(key: PRNGKeyArray, p: Target, asked: Questions, each: int, max_tokens: int) -> Answers:
    num, size = asked.tokens.shape
    target = dataclasses.replace(p, max_tokens=size + max_tokens)
    x = _asked(target, asked, each)
    length = x.sequences.length
    keys = jax.random.split(key, target.max_tokens)

    def keys_of(x: growing.Growing) -> Array:
        # Question by question, so that more of them keep the answers of the first.
        own = jax.random.split(keys[x.drawn.max()], num)
        return jax.vmap(lambda key: jax.random.split(key, each))(own).ravel()

    y = growing.complete(keys_of, target, PROPOSAL, x, length + max_tokens)
    place = length[:, None] + jnp.arange(max_tokens, dtype=jnp.int32)
    answer = jnp.take_along_axis(y.sequences.tokens, place, axis=1)
    answers = Sequences(answer, y.sequences.length - length)
    small = dataclasses.replace(y, cache=None, potential=(), proposal=())
    parted = jax.tree.map(lambda leaf: leaf.reshape(num, each, *leaf.shape[1:]), small)
    asking = Cost(
        forwards=jnp.ones(num, jnp.int32),
        depth=jnp.ones(num, jnp.int32),
        kv_read=(target.prefix.length + asked.length).astype(jnp.float32),
        **{
            name: jnp.zeros(num, jnp.int32)
            for name in ("tokens", "potential_calls", "judge_tokens")
        },
    )
    answering = asking + jax.vmap(lambda x: costs.of_round(target, PROPOSAL, x))(parted)
    shaped = jax.tree.map(lambda leaf: leaf.reshape(num, each, *leaf.shape[1:]), answers)
    return Answers(shaped, y.log_prob.reshape(num, each), answering)


def _asked(target: Target, asked: Questions, each: int) -> growing.Growing:
    """Every question `each` times, which is read once."""
    num, size = asked.tokens.shape
    cache = target.lm.init(target.prefix, num, target.max_tokens)
    cache, _ = target.lm.advance(target.prefix, cache, asked.tokens)
    rows = jnp.repeat(jnp.arange(num, dtype=jnp.int32), each)
    cache = target.lm.reorder(target.lm.truncate(cache, asked.length - 1), rows)
    room = ((0, 0), (0, target.max_tokens - size))
    tokens = jnp.pad(asked.tokens, room, constant_values=target.lm.eos)
    x = take_rows(Sequences(tokens, asked.length), rows)
    active = jnp.ones(num * each, bool)
    return growing.of(x, active, cache, target.potential.init(num * each))


def _result(
    found: Answers, thoughts: Draws, log_weights: Float[Array, " J"], sleeping: Cost
) -> Weighted:
    """The answers to one question [J, m], as a population."""
    num, each = found.log_prob.shape
    x = jax.tree.map(lambda leaf: leaf.reshape(num * each, *leaf.shape[2:]), found.sequences)
    weights = jnp.repeat(log_weights, each)
    run = population.start(Particles(x, weights, jnp.float32(0)), 1)
    roots = jnp.repeat(jnp.arange(num, dtype=jnp.int32), each)
    run = population.record(dataclasses.replace(run, roots=roots))
    cost = jax.tree.map(lambda count: count.sum(0, dtype=count.dtype), found.answering)
    out = population.result(
        population.end(run, cost),
        x,
        log_prob=found.log_prob.ravel(),
        details={"sleeping": sleeping, "thoughts": thoughts},
    )
    # Answers after one thought weigh alike, and add nothing to what is known of Z.
    error = log_z_std_error(log_weights, jnp.arange(num, dtype=jnp.int32))
    return dataclasses.replace(out, log_z_std_error=error)
