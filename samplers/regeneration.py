"""Drawing the rest of strings anew, each from its own cut: what suffix moves do to a batch of chains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.ancestral import append
from ppl.draw import categorical
from ppl.lm import Cache
from ppl.potential import Product
from ppl.potential import State as PotentialState
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences, empty
from ppl.target import Target

from .proposals import Proposal, locally_optimal


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C strings, scored.

    sequences: the strings.  log_p, log_q, log_phi [C, T]: of every token (EOS included, 0 after it) its
    log-probabilities under the model and under the proposal, and the potential's log-factor.  cache: the model's, of
    at least all tokens but the last.
    """

    sequences: Sequences
    log_p: Float[Array, "C T"]
    log_q: Float[Array, "C T"]
    log_phi: Float[Array, "C T"]
    cache: Cache

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p(x | prompt) of every string: what diagnostics look at, and all that swaps need."""
        return self.log_p.sum(1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Growth:
    """Strings y that are being drawn; every leaf has C first.

    `y.cache` holds all tokens but the last.  `potential` and `guide` are the states of the potential and the proposal.
    Since the cut: `tokens` drawn, `missing`, the greatest share of the target's one-step law that could not be drawn,
    and `invalid`, whether the potential or the model gave NaN (or +inf).
    """

    y: State
    active: Bool[Array, " C"]
    potential: PotentialState
    guide: PotentialState
    tokens: Int[Array, " C"]
    missing: Float[Array, " C"]
    invalid: Bool[Array, " C"]


def no_strings(target: Target, num: int) -> State:
    """`num` strings without a token."""
    zeros = jnp.zeros((num, target.max_tokens), jnp.float32)
    strings = empty(num, target.max_tokens, target.lm.eos)
    return State(strings, zeros, zeros, zeros, target.lm.init(target.prefix, num, target.max_tokens))


def truncated(target: Target, x: State, length: Int[Array, " C"]) -> State:
    """The first `length` tokens of every string; a string that has fewer is whole."""
    kept = jnp.arange(target.max_tokens) < length[:, None]
    length = jnp.minimum(length, x.sequences.length)
    return State(
        Sequences(jnp.where(kept, x.sequences.tokens, target.lm.eos), length),
        *(jnp.where(kept, pieces, 0.0) for pieces in (x.log_p, x.log_q, x.log_phi)),
        cache=target.lm.truncate(x.cache, jnp.maximum(length - 1, 0)),
    )


def where_rows(rows: Bool[Array, " C"], new: Any, old: Any) -> Any:
    """The rows `rows` of `new`, the others of `old`; for pytrees whose leaves have C first."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def start(target: Target, proposal: Proposal, y: State, active: Bool[Array, " C"]) -> Growth:
    """Ready to continue the strings `y` in the rows `active`.

    A potential has no way back to a cut but to be stepped there again; so has a proposal's state.
    """
    num, length = active.shape[0], jnp.where(active, y.sequences.length, 0)
    states = target.potential.init(num), proposal.init(target, num)
    # Known when traced: without states there is nothing to step.
    if target.potential != Product() or jax.tree.leaves(states[1]):

        def body(t: Array, states: tuple) -> tuple:
            within = t < length
            token = jnp.where(within, y.sequences.tokens[:, t], target.lm.eos)
            stepped = target.potential.step(states[0], token)[0], proposal.update(target, states[1], token)
            return where_rows(within, stepped, states)

        states = jax.lax.fori_loop(0, length.max(), body, states)
    zeros = jnp.zeros(num, jnp.int32)
    return Growth(y, active, states[0], states[1], zeros, jnp.zeros(num, jnp.float32), jnp.zeros(num, bool))


def grow(
    keys: Key[Array, " C"] | None,
    target: Target,
    proposal: Proposal,
    g: Growth,
    horizon: Int[Array, " C"],
    given: Sequences | None = None,
) -> Growth:
    """One more token for every active string, drawn with its key or `given`, until EOS or `horizon` tokens."""
    y, active, position = g.y, g.active, g.y.sequences.length
    last = _at(y.sequences.tokens, jnp.maximum(position - 1, 0))
    cache, logits = target.lm.step(target.prefix, y.cache, last)
    logits = jnp.where((position == 0)[:, None], target.prefix.logits, logits)
    law = proposal.law(target, logits, g.potential, g.guide)
    assert law is not None
    if given is None:
        assert keys is not None
        token, log_q = categorical(keys, law)
    else:
        token = _at(given.tokens, jnp.minimum(position, target.max_tokens - 1))
        log_q = _at(law, token) - jax.nn.logsumexp(law, axis=1)
    token = jnp.where(active, token, target.lm.eos)
    log_p = _at(logits, token) - jax.nn.logsumexp(logits, axis=1)
    potential, log_phi, invalid = target.factor(g.potential, token, active, position == target.max_tokens - 1)
    invalid = (invalid | jnp.isnan(log_p)) & active
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    possible = log_q > -jnp.inf
    if given is None:
        # Where the law has no mass nothing was drawn: the string is dead, and that is not the proposal's fault.
        log_phi, log_q = jnp.where(possible, log_phi, -jnp.inf), jnp.where(possible, log_q, 0.0)
    else:
        log_q = jnp.where(possible, log_q, -jnp.inf)
    wanted = jax.nn.softmax(locally_optimal(target, logits, g.potential))
    lost = jnp.where(active, jnp.where(law > -jnp.inf, 0.0, wanted).sum(1), 0.0)

    here = (jnp.arange(target.max_tokens) == position[:, None]) & active[:, None]
    sequences, going = append(y.sequences, token, active, target.lm.eos)
    longer = State(
        sequences,
        jnp.where(here, log_p[:, None], y.log_p),
        jnp.where(here, log_q[:, None], y.log_q),
        jnp.where(here, log_phi[:, None], y.log_phi),
        # Rows that have ended made the pass too, and forget it.
        target.lm.truncate(cache, jnp.maximum(sequences.length - 1, 0)),
    )
    return Growth(
        y=longer,
        active=going & (sequences.length < horizon),
        potential=potential,
        guide=proposal.update(target, g.guide, token),
        tokens=g.tokens + active,
        missing=jnp.maximum(g.missing, jnp.nan_to_num(lost)),
        invalid=g.invalid | invalid,
    )


@jax.jit
def score(target: Target, proposal: Proposal, x: Sequences) -> State:
    """Given strings with their pieces: one forward pass of the model per token."""
    num = x.length.shape[0]
    horizon = jnp.full(num, target.max_tokens)

    def body(growth: Growth) -> Growth:
        return grow(None, target, proposal, growth, horizon, given=x)

    growth = start(target, proposal, no_strings(target, num), jnp.ones(num, bool))
    return jax.lax.while_loop(lambda growth: growth.active.any(), body, growth).y


def _at(rows: Array, index: Int[Array, " C"]) -> Array:
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]
