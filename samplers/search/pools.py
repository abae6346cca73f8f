"""A pool: strings that were drawn once, with what votes and rules read of them.

    pool = pools.draw(key, p, num=256, answer=answers.last_number(tok))
    votes.majority(key, pool)

What a string answers is an id, equal for equal answers; a string that answers nothing has -1 and
votes for nothing.  All else is arrays [N], so that whatever reads a pool is one program.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_function
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows, valid, weighted_rows
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee, X
from ..draws import ancestral
from ..registry import sampler
from ..results import Chains, Draws, Weighted, sequences_in
from .answers import ids_of

log = logging.getLogger(__name__)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """N strings of one prompt; of P prompts all leaves have P first.

    Attributes:
        samples: N rows, the strings or anything else with the axis N first.
        answer: [N] ids 0..N-1 of equal answers, in the order in which they first came; -1 is none.
        scores: [N] what the strings are judged by, the greater the better; -inf is rejected.
        log_weights: [N] of properly weighted strings, the evidence included (LAW 1 with log_z 0);
            0 of independent draws, -inf of what was not drawn.
        log_prob: [N] log p(x | prompt); NaN where it is not known.
        log_q: [N] log-probability of the law that they were really drawn from; NaN likewise, -inf
            of what was not drawn.
        length: [N] tokens that were drawn for each, EOS included.
        cost: what drawing and judging them took.
    """

    samples: X
    answer: Int[Array, "*P N"]
    scores: Float[Array, "*P N"]
    log_weights: Float[Array, "*P N"]
    log_prob: Float[Array, "*P N"]
    log_q: Float[Array, "*P N"]
    length: Int[Array, "*P N"]
    cost: Cost

    @property
    def num(self) -> int:
        """N."""
        return self.answer.shape[-1]

    @property
    def num_unparsed(self) -> Int[Array, "*P"]:
        """How many strings answer nothing."""
        return (self.answer < 0).sum(-1, dtype=jnp.int32)


def pool(answer: Any, *, samples: X = None, cost: Cost | None = None, **known: Any) -> Pool:
    """A pool of whose fields some are known: draws from p of score 0 and one token each, whose
    probabilities were not asked for (NaN).

    Values are checked where they are concrete, shapes also where they are traced.

    Raises:
        ValueError: for an empty pool, ids that are no integers in -1..N-1, another number of
            anything, or scores and weights that are NaN or +inf.
        TypeError: for a field that a pool does not have.
    """
    answer = _checked_ids(answer)
    zeros, unknown = jnp.zeros(answer.shape, jnp.float32), jnp.full(answer.shape, jnp.nan)
    fields: dict[str, Any] = {
        "scores": zeros,
        "log_weights": zeros,
        "log_prob": unknown.astype(jnp.float32),
        "log_q": unknown.astype(jnp.float32),
        "length": jnp.ones(answer.shape, jnp.int32),
    }
    strange = sorted(known.keys() - fields.keys())
    if strange:
        raise TypeError(
            f"expected fields of a pool, {', '.join(fields)}, samples and cost, got"
            f" {', '.join(strange)}"
        )
    given = {name: jnp.asarray(x, fields[name].dtype) for name, x in known.items()}
    rows = _counted(answer) if samples is None else jax.tree.map(jnp.asarray, samples)
    _check_sizes(answer, given | {"samples": rows})
    for name in ("scores", "log_weights"):
        _check_numbers(name, given.get(name, zeros))
    return Pool(
        samples=rows,
        answer=answer,
        cost=Cost() if cost is None else cost,
        **(fields | given),
    )


def _counted(answer: Int[Array, "*P N"]) -> Int[Array, "*P N"]:
    return jnp.broadcast_to(jnp.arange(answer.shape[-1], dtype=jnp.int32), answer.shape)


def _checked_ids(answer: Any) -> Int[Array, "*P N"]:
    ids = answer if isinstance(answer, Tracer) else np.asarray(answer)
    if not ids.ndim or not ids.size:
        raise ValueError(
            f"expected the answer ids [N] of at least one string, got shape {ids.shape}; an empty"
            " pool has no vote: draw some strings"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"expected answer ids as integers, got {ids.dtype}; answers.ids_of makes them"
        )
    if not isinstance(ids, Tracer) and (ids.min() < -1 or ids.max() >= ids.shape[-1]):
        wrong = ids[(ids < -1) | (ids >= ids.shape[-1])][0]
        raise ValueError(
            f"expected answer ids in -1..{ids.shape[-1] - 1}, got {wrong}; number the answers in"
            " the order in which they first come, as answers.ids_of does"
        )
    return jnp.asarray(ids, jnp.int32)


def _check_sizes(answer: Int[Array, "*P N"], given: dict[str, Any]) -> None:
    for name, value in given.items():
        for leaf in jax.tree.leaves(value):
            shape = leaf.shape[: answer.ndim] if name == "samples" else leaf.shape
            if shape != answer.shape:
                raise ValueError(
                    f"expected {name} for each of the strings {list(answer.shape)} that the answers"
                    f" are of, got shape {list(leaf.shape)}; give one of each string"
                )


def _check_numbers(name: str, values: Float[Array, "*P N"]) -> None:
    if isinstance(values, Tracer):
        return
    wrong = np.flatnonzero(~(np.asarray(values) < np.inf))
    if wrong.size:
        raise ValueError(
            f"expected {name} below +inf, got NaN or +inf in {wrong.size} of {values.size}, first"
            f" in row {wrong[0]}; a string that is rejected has -inf"
        )


@sampler(Guarantee.EXACT, proof="tests/samplers/search/test_pools.py")
def draw(
    key: PRNGKeyArray,
    p: Target | Sequence[Target],
    *,
    num: int = 256,
    answer: Callable[[Any], Any],
    score: Any = None,
    batch_size: int | None = None,
) -> Pool:
    """A pool of independent draws from a plain language model (`ancestral.run`).

    Args:
        key: typed key.
        p: the model after a prompt, or a list of P of them over one model: then all leaves have P
            first, `jax.vmap` votes on each, and `prompts.apart` takes them apart.
        num: N, of each.
        answer: what a string answers, as in `of`.
        score: as in `of`.
        batch_size: of a list, rows that go through the model at a time.

    Raises:
        ValueError: as `ancestral.run` and `of`.
    """
    check_count("num", num)
    check_function("answer", answer, "(ids)", "samplers.search.answers.last_number(tok)")
    out = ancestral.run(key, p, num_samples=num, batch_size=batch_size)
    return of(out, answer=answer, score=score)


def of(
    result: Draws | Weighted | Chains, *, answer: Callable[[Any], Any], score: Any = None
) -> Pool:
    """The pool of what a sampler gave back, with its weights.

    `Draws` weigh the same, whatever law they are of; `Weighted` keep their log-weights, with log_z
    in them, so that votes estimate the target's answers; of `Chains` all S C draws count the same,
    and are not independent.

    Args:
        result: of one prompt, or draws whose leaves have prompts first; with strings among its
            rows.
        answer: from the token ids of one string (a list of int), or from its text if a tokenizer
            was given (`answers`), to anything hashable, or None for no answer.  It is called on the
            host, once for each row.  Where it raises, the string votes for nothing; how often that
            was is said once (a warning of this module's logger).
        score: [N], or a jax function (tokens [N, T], length [N]) -> [N], or `ppl.python(f, tok)`,
            whose NaN and +inf count as -inf, and are said once; by default 0.

    Raises:
        ValueError: for another number of scores, or given ones that are NaN or +inf; if `answer` is
            no function; of a `Choice`, which is no sample.
    """
    check_function("answer", answer, "(ids)", "samplers.search.answers.last_number(tok)")
    if isinstance(result, Draws):
        samples, log_weights = result.samples, None
    else:
        samples, log_weights = weighted_rows(result)
        if isinstance(result, Weighted):
            log_weights = log_weights + jnp.asarray(result.log_z)[..., None]
    x = sequences_in(samples)
    rows = x.length.shape
    known: dict[str, Any] = {"length": x.length + (x.length < x.tokens.shape[-1])}
    if log_weights is not None:
        known["log_weights"] = log_weights
    for name in ("log_prob", "log_q"):
        found = _found(result, name)
        if found is not None:
            known[name] = jnp.reshape(found, rows)
    cost = Cost() if result.cost is None else result.cost
    if callable(score):
        known["scores"] = _judged(score, x)
        calls = known["length"].sum(-1, dtype=jnp.int32)
        cost = dataclasses.replace(cost, potential_calls=cost.potential_calls + calls)
    elif score is not None:
        known["scores"] = score
    return pool(_answered(answer, x), samples=samples, cost=cost, **known)


def _found(result: Any, name: str) -> Any:
    """A field of every row; of chains that of the draws, not of where they are now."""
    return result.draws.get(name) if isinstance(result, Chains) else getattr(result, name, None)


def _flat(x: Sequences) -> Sequences:
    """The strings of all prompts."""
    return Sequences(x.tokens.reshape(-1, x.tokens.shape[-1]), x.length.reshape(-1))


def _judged(score: Callable[..., Any], x: Sequences) -> Float[Array, "*P N"]:
    flat = _flat(x)
    scores = jnp.asarray(score(flat.tokens, flat.length), jnp.float32)
    if scores.shape != flat.length.shape:
        raise ValueError(
            f"expected a score of each of {flat.length.shape[0]} strings, got shape"
            f" {list(scores.shape)}; pass a function (tokens [N, T], length [N]) -> [N]"
        )
    scores, wrong = valid(scores[:, None])
    if wrong.any():
        log.warning(
            "%d of %d strings are rejected, because their score was NaN or +inf",
            int(wrong.sum()),
            wrong.size,
        )
    return scores[:, 0].reshape(x.length.shape)


def _answered(answer: Callable[[Any], Any], x: Sequences) -> Int[np.ndarray, "*P N"]:
    """The ids of what each string answers, for each prompt by itself; failures are said once."""
    tokens, length = np.asarray(x.tokens), np.asarray(x.length)
    rows = tokens.reshape(-1, *tokens.shape[-2:])
    found, failed, first = [], 0, ""
    for own, sizes in zip(rows, length.reshape(-1, length.shape[-1]), strict=True):
        strings = [row[:size].tolist() for row, size in zip(own, sizes, strict=True)]
        ids, wrong = ids_of(strings, answer)
        found.append(ids)
        failed, first = failed + len(wrong), first or next(iter(wrong), "")
    ids = np.stack(found).reshape(length.shape)
    if failed:
        log.warning(
            "the answer function raised on %d of %d strings, which vote for nothing; the first"
            " time %s",
            failed,
            ids.size,
            first,
        )
    if ids.size and (ids < 0).all():
        log.warning(
            "none of %d strings has an answer, so that no vote can be counted; look at some of"
            " them, and at what the answer function makes of them",
            ids.size,
        )
    return ids


def take(pool: Pool, rows: Int[Array, " M"]) -> Pool:
    """M strings of a pool, each as often as its row is named, as a pool: a part, an order, a
    bootstrap sample.

    The answers are numbered anew, in the order in which they first come.  `cost` stays what it took
    to draw them all.

    Raises:
        ValueError: for pools of several prompts.
    """
    check_one(pool)
    names = ("scores", "log_weights", "log_prob", "log_q", "length")
    rest = {name: getattr(pool, name) for name in names}
    samples, answer, rest = take_rows((pool.samples, pool.answer, rest), rows)
    num = rows.shape[0]
    slots = jnp.arange(num, dtype=jnp.int32)
    # When each id first comes; ids that do not come at all come last.
    first = jnp.full(pool.num, num, jnp.int32)
    first = first.at[jnp.where(answer < 0, pool.num, answer)].min(slots, mode="drop")
    began = jnp.zeros(num, jnp.int32).at[first].set(1, mode="drop")
    rank = jnp.cumsum(began, dtype=jnp.int32) - 1
    anew = jnp.where(answer < 0, -1, rank[jnp.minimum(first[answer], num - 1)])
    return Pool(samples=samples, answer=anew.astype(jnp.int32), cost=pool.cost, **rest)


def check_one(pool: Pool) -> None:
    """Raise ValueError unless it is the pool of one prompt."""
    if not isinstance(pool, Pool):
        raise ValueError(
            f"expected a pool, got {type(pool).__name__}; make one by pools.draw, by pools.of a"
            " sampler's result, or by pools.pool of answer ids"
        )
    if pool.answer.ndim != 1:
        raise ValueError(
            f"expected the pool of one prompt, got answers of shape {list(pool.answer.shape)}; use"
            " jax.vmap for several, or prompts.apart"
        )


def check_independent(pool: Pool) -> None:
    """Raise ValueError if it is not that of one prompt, or weights are concrete and not all equal
    or -inf.
    """
    check_one(pool)
    if isinstance(pool.log_weights, Tracer):
        return
    weights = np.asarray(pool.log_weights)
    weights = weights[~np.isneginf(weights)]
    if weights.size and np.ptp(weights) > 1e-4:
        raise ValueError(
            "expected independent draws of equal weight, of which the best of k is known, and where"
            " to stop, got strings whose weights differ; draw the pool with pools.draw, or take"
            " votes.vote or votes.soft_best_of, which honour weights"
        )
