"""Stopping: what a rule would have answered on a pool, and the same rule while strings are drawn.

    rule = stopping.evalue(delta=0.05)
    stopping.replay(key, pool, rule, draws=[8, 16, 32])        # one pool, every rule and budget
    stopping.lattice(rule, [0.5, 0.3, 0.2], cap=40)            # the exact law
    stopping.run(key, p, rule, answer=answers.last_number(tok))

A rule reads the draws one at a time, so on the first draws of an exchangeable pool it does what it
does online.  Rules are in `rules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray

from ppl.checks import check_counts, check_function, check_key
from ppl.pytrees import as_pytree
from ppl.rows import take_rows

from .lattice import lattice
from .online import Read, Stop, chance, check_rule, online, read_draw, run, start
from .pools import Pool, check_independent
from .rules import (
    Rule,
    beta,
    dirichlet,
    doubling,
    entropy,
    evalue,
    fixed,
    secretary,
    stable,
    window,
)

__all__ = [
    "Rule",
    "Stop",
    "beta",
    "dirichlet",
    "doubling",
    "entropy",
    "evalue",
    "fixed",
    "lattice",
    "online",
    "replay",
    "run",
    "secretary",
    "stable",
    "window",
]

MOST = np.iinfo(np.int32).max


def replay(
    key: PRNGKeyArray,
    pool: Pool,
    rule: Rule,
    select: Callable[..., Any] | None = None,
    *,
    draws: Any = None,
    tokens: Any = None,
    batch: int = 1,
    num_orders: int = 1,
) -> Stop:
    """What a rule would have answered under each of J budgets, on a pool in random order.

    Of a pool of N independent draws this has exactly the law of drawing them one by one, up to N:
    in any order they are as good.  The orders of one pool are not independent of each other; their
    mean is the estimate that the pool allows.  `jax.vmap` over keys and pools takes many prompts,
    over a rule made from an array of thresholds many rules, in one program.

    Args:
        key: typed key.
        pool: N draws of one prompt, of equal weight.
        rule: when to stop.
        select: (key, pool) -> anything with an `answer`, such as `votes.majority`, asked of the
            draws up to the stop; the others have no answer, and score, log-weight and log_q -inf,
            so that votes do not count them.  What it knows of strings must be in the pool, whose
            rows come in random order.  By default the majority, ties by the key.
        draws: [J] at most so many strings.
        tokens: [J] at most so many tokens; the string that would exceed it is not drawn.
        batch: strings are drawn in rounds of so many; those of the last round that the rule did not
            read are paid too.
        num_orders: O, random orders.

    Returns:
        `Stop` with leaves [O, J]; J is 1 without budgets.

    Raises:
        ValueError: if `rule` is no rule, budgets are not [J] counts of at least 1 or differ in
            number, not even the shortest string fits into one, the pool is of several prompts or
            its weights differ, or `batch` or `num_orders` < 1.
    """
    check_key(key)
    check_rule(rule)
    check_counts(batch=batch, num_orders=num_orders)
    if select is not None:
        check_function("select", select, "(key, pool)", "samplers.search.votes.majority")
    check_independent(pool)
    budgets = _budgets(pool, draws, tokens)
    chosen = None if select is None else as_pytree(select)
    # Two programs: the one that shuffles takes longer to compile, and serves every rule.
    shuffled = _shuffle(key, pool.num, num_orders)
    return _replay(shuffled, pool, rule, chosen, budgets, batch)


def _budgets(pool: Pool, draws: Any, tokens: Any) -> tuple[Array, Array]:
    given = {"draws": draws, "tokens": tokens}
    found = {
        name: np.full(1, MOST) if x is None else x if isinstance(x, Tracer) else np.asarray(x)
        for name, x in given.items()
    }
    for name, x in found.items():
        known = not isinstance(x, Tracer)
        if x.ndim != 1 or not x.size or (known and (x.dtype.kind not in "iu" or x.min() < 1)):
            raise ValueError(
                f"expected {name} as a list of budgets, whole numbers of at least 1, got"
                f" {given[name]!r}; pass e.g. {name}=[64, 128]"
            )
    if draws is not None and tokens is not None and len(found["draws"]) != len(found["tokens"]):
        raise ValueError(
            f"expected as many budgets of draws as of tokens, got {len(found['draws'])} and"
            f" {len(found['tokens'])}; give one of them"
        )
    if not isinstance(found["tokens"], Tracer) and not isinstance(pool.length, Tracer):
        least, shortest = int(found["tokens"].min()), int(np.min(pool.length))
        if least < shortest:
            raise ValueError(
                f"expected budgets that hold at least one string, got {least} tokens where the"
                f" shortest string has {shortest}; pass more"
            )
    draws, tokens = (jnp.asarray(x, jnp.int32) for x in found.values())
    size = max(draws.size, tokens.size)
    return jnp.broadcast_to(draws, size), jnp.broadcast_to(tokens, size)


@partial(jax.jit, static_argnums=(1, 2))
def _shuffle(key: PRNGKeyArray, num: int, num_orders: int) -> tuple[Array, Array, Array]:
    """Keys [O], random orders [O, N], and what breaks ties [O, N]."""

    def one(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        order_key, tie_key, select_key = jax.random.split(key, 3)
        return select_key, jax.random.permutation(order_key, num), chance(tie_key, num)

    return jax.vmap(one)(jax.random.split(key, num_orders))


@partial(jax.jit, static_argnums=5)
def _replay(
    shuffled: tuple[Array, Array, Array],
    pool: Pool,
    rule: Rule,
    select: Any,
    budgets: tuple[Int[Array, " J"], Int[Array, " J"]],
    batch: int,
) -> Stop:
    draws, tokens = budgets
    num = pool.num

    def step(read: Read, x: tuple[Array, Array]) -> tuple[Read, tuple[Array, Array]]:
        read = read_draw(rule, read, *x)
        return read, (read.best, read.stopped)

    def one(key: PRNGKeyArray, order: Array, tie: Array) -> Stop:
        ours = _in_order(pool, order)
        before = start(tie, rule, num)
        _, (best, stopped) = jax.lax.scan(step, before, (ours.answer, ours.scores))
        spent = jnp.cumsum(ours.length, dtype=jnp.int32)
        paid = (spent <= tokens[:, None]).sum(1, dtype=jnp.int32)
        most = jnp.minimum(jnp.minimum(draws, paid), num)
        first = jnp.where(stopped.any(), jnp.argmax(stopped).astype(jnp.int32) + 1, num + 1)
        used = jnp.minimum(first, most)
        drawn = jnp.minimum(-(-used // batch) * batch, most)
        if select is None:
            answer = jnp.where(used > 0, best[used - 1], -1)
        else:
            each = jax.random.split(key, used.shape[0])
            answer = jax.vmap(lambda key, n: select(key, _first(ours, n)).answer)(each, used)
        return Stop(
            answer=answer,
            num=used,
            drawn=drawn,
            tokens=jnp.where(drawn > 0, spent[drawn - 1], 0),
            stopped=first <= most,
        )

    return jax.vmap(one)(*shuffled)


def _in_order(pool: Pool, order: Int[Array, " N"]) -> Pool:
    rows = {f.name: getattr(pool, f.name) for f in dataclasses.fields(pool) if f.name != "cost"}
    return dataclasses.replace(pool, **take_rows(rows, order))


def _first(pool: Pool, num: Int[Array, ""]) -> Pool:
    """The first draws of a pool, the others as strings that have no say."""
    there = jnp.arange(pool.num, dtype=jnp.int32) < num
    return dataclasses.replace(
        pool,
        answer=jnp.where(there, pool.answer, -1),
        scores=jnp.where(there, pool.scores, -jnp.inf),
        log_weights=jnp.where(there, pool.log_weights, -jnp.inf),
        log_q=jnp.where(there, pool.log_q, -jnp.inf),
    )
