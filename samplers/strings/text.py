"""Populations of growing strings, and the moves that extend them: what SMC and its
relatives share.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.lm import Cache
from ppl.potential import State
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences, append, empty
from ppl.steps import Steps
from ppl.target import Target

from ..base import Cost, Move
from .proposals import Proposal


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TextState:
    """A population of growing strings; every leaf has N first.

    `cache` holds all tokens but the last.  `logits`, if there, are the model's for the next token:
    its forward pass has been made, and the cache holds all tokens.  `log_prob` is log p of the
    string so far, its EOS included, without the target's alpha.  The others describe the last
    round: `drawn` counts the tokens of a row, `invalid` marks rows with a factor that was NaN or
    +inf, `missing` is the greatest share of the target's one-step law that a row's proposal could
    not draw, `calls` counts how often the proposal asked the potential.
    """

    sequences: Sequences
    active: Bool[Array, " N"]
    log_prob: Float[Array, " N"]
    drawn: Int[Array, " N"]
    invalid: Bool[Array, " N"]
    missing: Float[Array, " N"]
    calls: Int[Array, " N"]
    cache: Cache
    potential: State
    proposal: State
    logits: Float[Array, "N V"] | None = None


def start(target: Target, proposal: Proposal, num: int) -> TextState:
    """`num` empty strings."""
    return TextState(
        sequences=empty(num, target.max_tokens, target.lm.eos),
        active=jnp.ones(num, bool),
        log_prob=jnp.zeros(num, jnp.float32),
        drawn=jnp.zeros(num, jnp.int32),
        invalid=jnp.zeros(num, bool),
        missing=jnp.zeros(num, jnp.float32),
        calls=jnp.zeros(num, jnp.int32),
        cache=target.lm.init(target.prefix, num, target.max_tokens),
        potential=target.potential.init(num),
        proposal=proposal.init(target, num),
    )


def forward(
    target: Target, x: TextState, *, first: bool = False
) -> tuple[TextState, Float[Array, "N V"]]:
    """The logits of the next token, and the population after that pass; on the `first` token they
    are the prompt's.
    """
    if x.logits is not None:
        return x, x.logits
    lm, num = target.lm, x.active.shape[0]
    if first:
        return x, jnp.broadcast_to(target.prefix.logits, (num, lm.vocab_size))
    last = jnp.take_along_axis(
        x.sequences.tokens, jnp.maximum(x.sequences.length - 1, 0)[:, None], axis=1
    )[:, 0]
    cache, logits = lm.step(target.prefix, x.cache, last)
    return dataclasses.replace(x, cache=cache), logits


def reorder(
    target: Target, proposal: Proposal, x: TextState, ancestors: Int[Array, " N"]
) -> TextState:
    """Rows `ancestors` of a population."""
    cache = target.lm.reorder(x.cache, ancestors)
    guide = proposal.reorder(x.proposal, ancestors)
    rest = take_rows(dataclasses.replace(x, cache=None, proposal=None), ancestors)
    return dataclasses.replace(rest, cache=cache, proposal=guide)


def cost(target: Target, proposal: Proposal, x: TextState, *, first: bool = False) -> Cost:
    """What the last round of a population took."""
    ticks = x.drawn.max()
    asked = x.calls.sum() + (x.drawn.sum() if target.tilted else 0)
    return Cost(
        tokens=x.drawn.sum(),
        forwards=ticks * (1 + proposal.forwards) - first,
        potential_calls=asked,
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Pinned:
    """Rows that do not draw but follow given strings: rows [N] says which, sequences [N,
    T] what.
    """

    rows: Bool[Array, " N"]
    sequences: Sequences


def token(
    keys: Key[Array, " N"],
    target: Target,
    proposal: Proposal,
    x: TextState,
    moving: Bool[Array, " N"],
    pinned: Pinned | None,
    *,
    first: bool,
    waits: bool,
) -> tuple[TextState, Float[Array, " N"]]:
    """One more token for the rows `moving`, weighed for gamma_t / gamma_{t-1}; the others do not
    change, but step.

    `waits`: rows that do not move may go on later, so that a proposal must be told not to work for
    them.
    """
    x, logits = forward(target, x, first=first)
    length = x.sequences.length
    offered = jnp.where(moving[:, None], logits, -jnp.inf) if waits else logits
    drawn, log_q, calls = proposal.draw(keys, target, offered, x.potential, x.proposal)
    if pinned is not None:
        position = jnp.minimum(length, target.max_tokens - 1)[:, None]
        given = jnp.take_along_axis(pinned.sequences.tokens, position, axis=1)[:, 0]
        drawn = jnp.where(pinned.rows, given, drawn)
        log_q = jnp.where(pinned.rows, _log_prob(proposal, target, logits, x, drawn), log_q)
    missing = proposal.missing(target, logits, x.potential, x.proposal)
    # Strings that do not move are not continued with what was drawn: a Python potential would be
    # asked about it.
    drawn = jnp.where(moving, drawn, target.lm.eos)
    log_p = jnp.take_along_axis(logits, drawn[:, None], axis=1)[:, 0] - jax.nn.logsumexp(
        logits, axis=1
    )
    state, log_factor, invalid = target.factor(
        x.potential, drawn, moving, length == target.max_tokens - 1
    )
    # No mass to draw from is weight 0, not -inf + inf; so is a law that is NaN, and a model whose
    # logits are.
    dw = jnp.where(log_q > -jnp.inf, target.log_prob_factor(log_p) - log_q + log_factor, -jnp.inf)
    invalid = invalid | (moving & (jnp.isnan(log_p) | jnp.isnan(dw)))
    dw = jnp.where(moving, jnp.where(jnp.isnan(dw), -jnp.inf, dw), 0.0)
    sequences, active = append(x.sequences, drawn, moving, target.lm.eos)
    moved = TextState(
        sequences=sequences,
        active=jnp.where(moving, active & ~jnp.isneginf(dw), x.active),
        log_prob=x.log_prob + jnp.where(moving & ~jnp.isnan(log_p), log_p, 0.0),
        drawn=x.drawn + moving,
        invalid=x.invalid | invalid,
        missing=x.missing
        if missing is None
        else jnp.maximum(x.missing, jnp.where(moving, missing, 0.0)),
        calls=x.calls if calls is None else x.calls + jnp.where(moving, calls, 0),
        cache=x.cache,
        potential=state,
        proposal=proposal.update(target, x.proposal, drawn),
    )
    return moved, dw


def _log_prob(
    proposal: Proposal,
    target: Target,
    logits: Float[Array, "N V"],
    x: TextState,
    drawn: Int[Array, " N"],
) -> Float[Array, " N"]:
    law = proposal.law(target, logits, x.potential, x.proposal)
    if law is None:
        raise ValueError(
            "expected a proposal with a law, to score a given string, got"
            f" {type(proposal).__name__}, which can only"
            " draw; condition with samplers.strings.proposals.locally_optimal"
        )
    chosen = jnp.take_along_axis(law, drawn[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isneginf(chosen), -jnp.inf, chosen - jax.nn.logsumexp(law, axis=1))


def _token_in_blocks(
    block_size: int,
    keys: Key[Array, " N"],
    target: Target,
    proposal: Proposal,
    x: TextState,
    moving: Bool[Array, " N"],
    pinned: Pinned | None,
    **static: bool,
) -> tuple[TextState, Float[Array, " N"]]:
    """`token`, for `block_size` rows at a time: of what has a row per particle and token of the
    vocabulary, only one block exists at once."""
    given = (keys, x.logits, moving, pinned)

    def body(b: Array, carry: tuple) -> tuple:
        x, dw = carry
        at = b * block_size
        rows, (keys, logits, moving, pinned) = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, block_size), (x, given)
        )
        done = token(
            keys,
            target,
            proposal,
            dataclasses.replace(rows, logits=logits),
            moving,
            pinned,
            **static,
        )
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis=0),
            (x, dw),
            done,
        )

    num = moving.shape[0]
    carry = (dataclasses.replace(x, logits=None), jnp.zeros(num, jnp.float32))
    return jax.lax.fori_loop(0, num // block_size, body, carry)


def extend(
    target: Target,
    proposal: Proposal,
    steps: Steps | None = None,
    *,
    first: bool = False,
    pinned: Pinned | None = None,
    block_size: int | None = None,
) -> Move:
    """The move that extends every string by a token drawn from `proposal`, or by a step of text,
    with its weight.

    With `steps`, rows whose step is over wait for the others.  `block_size` rows go through the
    model at a time.
    """
    # With steps of one size all rows arrive together, and nobody waits.
    waits = steps is not None and steps.delimiters is not None

    def one(
        key: PRNGKeyArray, x: TextState, moving: Array, *, first: bool = False
    ) -> tuple[TextState, Array]:
        num = x.active.shape[0]
        step = (
            token
            if block_size is None or block_size >= num
            else functools.partial(_token_in_blocks, block_size)
        )
        return step(
            jax.random.split(key, num),
            target,
            proposal,
            x,
            moving,
            pinned,
            first=first,
            waits=waits,
        )

    def fresh(x: TextState) -> TextState:
        """Nothing has happened yet in this round."""
        zero = {
            name: jnp.zeros_like(getattr(x, name))
            for name in ("drawn", "invalid", "missing", "calls")
        }
        return dataclasses.replace(x, **zero)

    def sample(key: PRNGKeyArray, x: TextState) -> tuple[TextState, Float[Array, " N"]]:
        if steps is None:
            return one(key, fresh(x), x.active, first=first)
        is_boundary = steps

        def going(before: Array, x: TextState) -> Bool[Array, " N"]:
            last = jnp.take_along_axis(
                x.sequences.tokens, jnp.maximum(x.sequences.length - 1, 0)[:, None], axis=1
            )
            return before & x.active & ~is_boundary(last[:, 0], x.sequences.length)

        def body(carry: tuple) -> tuple:
            tick, x, dw, moving = carry
            y, more = one(jax.random.fold_in(key, tick), x, moving)
            y = _wait(target, x, y, moving) if waits else y
            return tick + 1, y, dw + more, going(moving, y)

        moving = x.active
        y, dw = one(jax.random.fold_in(key, 0), fresh(x), moving, first=first)
        y = _wait(target, x, y, moving) if waits else y
        return jax.lax.while_loop(
            lambda c: c[3].any(), body, (jnp.int32(1), y, dw, going(moving, y))
        )[1:3]

    return Move(sample)


def _wait(
    target: Target, before: TextState, after: TextState, moving: Bool[Array, " N"]
) -> TextState:
    """Rows that did not move keep their states; their caches forget the pass that was made with the
    others.
    """

    def keep(old: Array, new: Array) -> Array:
        return jnp.where(moving.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return dataclasses.replace(
        after,
        cache=target.lm.truncate(after.cache, jnp.maximum(after.sequences.length - 1, 0)),
        potential=jax.tree.map(keep, before.potential, after.potential),
        proposal=jax.tree.map(keep, before.proposal, after.proposal),
    )
