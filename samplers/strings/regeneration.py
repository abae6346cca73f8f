"""Drawing the rest of strings anew, each from its own cut: what suffix moves do to a batch of
chains.  The engine is `growing`; here strings keep the pieces of their density.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.lm import Cache
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, greatest, take_rows, where_rows
from ppl.sequences import Sequences, empty
from ppl.target import SCORED_LOGITS, Target

from . import growing
from .growing import Follow, Growing, token
from .pieces import Pieces
from .proposals import Powered, Proposal

LARGE_ROW = 2**16
"""Bytes of a chain's cache from which on it pays to copy single rows."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C strings, scored.

    sequences: the strings.  log_p, log_q, log_phi [C, T]: of every token (EOS included, 0 after it)
    its log-probabilities under the model and under the proposal, and the potential's log-factor.
    cache: the model's, of at least all tokens but the last.  log_norms: as in `Powered`, if its
    ladder has K rungs.
    """

    sequences: Sequences
    log_p: Float[Array, "C T"]
    log_q: Float[Array, "C T"]
    log_phi: Float[Array, "C T"]
    cache: Cache
    log_norms: Float[Array, "C T K"] | None = None

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p(x | prompt) of every string: what diagnostics look at, and all that swaps need."""
        return self.log_p.sum(1)


def at_rung(target: Target, x: State, rung: Int[Array, " C"]) -> State:
    """Strings of `Powered`, whose alpha has become the ladder's at `rung`, which is the target's
    alpha [C].
    """
    assert x.log_norms is not None
    log_norm = jnp.take_along_axis(x.log_norms, rung[:, None, None], axis=2)[:, :, 0]
    log_q = jnp.where(jnp.isneginf(x.log_p), -jnp.inf, target.log_prob_factor(x.log_p) - log_norm)
    return dataclasses.replace(x, log_q=log_q)


def no_strings(target: Target, proposal: Proposal, num: int) -> State:
    """`num` strings without a token."""
    zeros = jnp.zeros((num, target.max_tokens), jnp.float32)
    ladder = proposal.ladder if isinstance(proposal, Powered) else None
    return State(
        empty(num, target.max_tokens, target.lm.eos),
        *(zeros, zeros, zeros),
        cache=target.lm.init(target.prefix, num, target.max_tokens),
        log_norms=None if ladder is None else jnp.zeros((*zeros.shape, len(ladder)), jnp.float32),
    )


def truncated(target: Target, x: State, length: Int[Array, " C"]) -> State:
    """The first `length` tokens of every string; a string that has fewer is whole."""
    kept = jnp.arange(target.max_tokens) < length[:, None]
    length = jnp.minimum(length, x.sequences.length)
    return State(
        Sequences(jnp.where(kept, x.sequences.tokens, target.lm.eos), length),
        *(jnp.where(kept, pieces, 0.0) for pieces in (x.log_p, x.log_q, x.log_phi)),
        cache=target.lm.truncate(x.cache, jnp.maximum(length - 1, 0)),
        log_norms=None if x.log_norms is None else jnp.where(kept[..., None], x.log_norms, 0.0),
    )


def without_cache(x: State) -> State:
    """The pieces of strings only, which are small."""
    return dataclasses.replace(x, cache=None)


def with_cache(x: State, cache: Cache) -> State:
    """The pieces of strings, and their cache."""
    return dataclasses.replace(x, cache=cache)


def settled(
    caches: tuple[Cache, Cache], accepted: Bool[Array, " C"], rows: Bool[Array, " C"]
) -> tuple[Cache, Cache]:
    """Caches (x, y) of strings and of those drawn for them, equal in the rows `rows`: y's where
    accepted, else x's.
    """
    num, leaves = rows.shape[0], jax.tree.leaves(caches[0])
    if sum(leaf.nbytes for leaf in leaves) < LARGE_ROW * num:
        new = where_rows(accepted, caches[1], caches[0])
        return where_rows(rows, new, caches[0]), where_rows(rows, new, caches[1])

    def body(i: Array, caches: tuple) -> tuple:
        row = order[i]
        # The second is written from the first, not both from one value of both: that would read the
        # one after the other was written, and XLA would copy a whole cache to keep what was there.
        taken = accepted[row] & rows[row]
        x = jax.tree.map(lambda x, y: x.at[row].set(jnp.where(taken, y[row], x[row])), *caches)
        y = jax.tree.map(
            lambda y, x: y.at[row].set(jnp.where(rows[row], x[row], y[row])), caches[1], x
        )
        return x, y

    # Row by row: few strings end at a time.
    order = jnp.argsort(~rows)
    return jax.lax.fori_loop(0, greatest(rows.sum(dtype=jnp.int32)), body, caches)


def rows_of(target: Target, x: State, rows: Int[Array, " N"]) -> State:
    """Rows `rows` of strings."""
    return with_cache(take_rows(without_cache(x), rows), target.lm.reorder(x.cache, rows))


def each_times(target: Target, num: int) -> Target:
    """The target of a batch in which every chain has `num` rows, one after another: alpha [C]
    becomes [C * num].
    """
    alpha = target.alpha
    return (
        target
        if alpha is None or alpha.ndim == 0
        else dataclasses.replace(target, alpha=jnp.repeat(alpha, num))
    )


def start(target: Target, proposal: Proposal, y: State, active: Bool[Array, " C"]) -> Growing:
    """Ready to continue the strings `y` in the rows `active`; what is drawn is counted from here.

    A potential has no way back to a cut but to be stepped there again; so has a proposal's state.
    `costs.replay` says what that takes.
    """
    num, length = active.shape[0], jnp.where(active, y.sequences.length, 0)
    states = target.potential.init(num), proposal.init(target, num)
    judged = jnp.zeros(num, jnp.int32)
    # Known when traced: without states there is nothing to step.
    if target.tilted or jax.tree.leaves(states[1]):

        def body(t: Array, carry: tuple) -> tuple:
            (potential, guide), judged = carry
            within = t < length
            token = jnp.where(within, y.sequences.tokens[:, t], target.lm.eos)
            stepped = (
                target.potential.step(potential, token)[0],
                proposal.update(target, guide, token),
            )
            read = target.judged(potential, token, within, jnp.bool_(False))
            return where_rows(within, stepped, carry[0]), judged + read

        states, judged = jax.lax.fori_loop(0, greatest(length), body, (states, judged))
    pieces = Pieces(y.log_p, y.log_q, y.log_phi, y.log_norms)
    g = growing.of(y.sequences, active, y.cache, states[0], states[1], pieces)
    return dataclasses.replace(g, judged=judged)


def drawn(g: Growing) -> State:
    """The strings of `start`, as far as they have been drawn."""
    assert g.pieces is not None
    return State(
        sequences=g.sequences,
        log_p=g.pieces.log_p,
        log_q=g.pieces.log_q,
        log_phi=g.pieces.log_phi,
        cache=g.cache,
        log_norms=g.pieces.log_norms,
    )


def grow(
    keys: Key[Array, " C"] | None,
    target: Target,
    proposal: Proposal,
    g: Growing,
    follow: Follow | None = None,
) -> Growing:
    """`growing.token` for every active string."""
    return token(keys, target, proposal, g, g.active, follow)[0]


def keys_at(keys: Key[Array, " C"]) -> Callable[[Growing], Key[Array, " C"]]:
    """The keys of strings' next tokens, from one key for each string.

    The token at position t has the key fold_in(key, t), so that a string is the same however it
    came to its cut.
    """
    return lambda g: jax.vmap(jax.random.fold_in)(keys, g.sequences.length)


@jax.jit
def score(target: Target, proposal: Proposal, x: Sequences) -> State:
    """Given strings with their pieces: the model reads many tokens in one pass, as many as its
    logits have room in memory (`SCORED_LOGITS`).
    """
    lm, (num, horizon) = target.lm, x.tokens.shape
    size = min(max(SCORED_LOGITS // (num * lm.vocab_size), 1), max(horizon - 1, 1))
    everyone, empty = jnp.ones(num, bool), no_strings(target, proposal, num)
    follow = Follow(everyone, x)

    def one(g: Growing, logits: Float[Array, "C V"]) -> Growing:
        return grow(None, target, proposal, dataclasses.replace(g, logits=logits), follow)

    def chunk(carry: tuple[Array, Cache, Growing]) -> tuple[Array, Cache, Growing]:
        t, cache, g = carry
        # The last chunk reads some tokens again, for there is no room beyond the horizon.
        first = jnp.minimum(t - 1, horizon - size)
        cache = lm.truncate(cache, jnp.full(num, first, jnp.int32))
        tokens = jax.lax.dynamic_slice_in_dim(x.tokens, first, size, axis=1)
        cache, logits = lm.advance(target.prefix, cache, tokens)
        after = jax.lax.fori_loop(
            t, first + size + 1, lambda s, g: one(g, logits[:, s - 1 - first]), g
        )
        return first + size + 1, cache, after

    prompt = jnp.broadcast_to(target.prefix.logits, (num, lm.vocab_size))
    # The strings themselves need no cache to be followed: it is made beside them.
    bare = dataclasses.replace(start(target, proposal, empty, everyone), cache=None)
    carry = jnp.int32(1), empty.cache, one(bare, prompt)
    _, cache, g = jax.lax.while_loop(
        lambda carry: (carry[0] < horizon) & anywhere(carry[2].active), chunk, carry
    )
    length = jnp.maximum(g.sequences.length - 1, 0)
    return with_cache(drawn(g), lm.truncate(cache, length))


def init(target: Target, proposal: Proposal, x: Sequences) -> State:
    """Chains at the strings `x`, scored.

    Raises:
        ValueError: if they are not strings of the target, or one has density zero; traced values
            pass.
    """
    target.space.check(x)
    state = score(target, proposal, x)
    check_support(log_density(target, state))
    return state


def check_support(density: Float[Array, " C"]) -> None:
    """Raise ValueError if some chain's string has log density -inf; traced values cannot be read,
    and pass.
    """
    if not isinstance(density, Tracer) and np.isneginf(density).any():
        row = int(np.isneginf(density).argmax())
        raise ValueError(
            f"expected strings in the support of the target, got log gamma = -inf for row {row};"
            " start from draws of the target's own constraint, e.g. by smc.run or importance.run"
        )


def log_density(target: Target, state: State) -> Float[Array, " C"]:
    """log gamma of every string, from its pieces."""
    return (target.log_prob_factor(state.log_p) + state.log_phi).sum(1)


def increments(target: Target, state: State) -> Float[Array, "C T"]:
    """log w_t of every token; +inf for one that the proposal cannot draw, which is why it cannot be
    left either.
    """
    return target.log_prob_factor(state.log_p) - state.log_q + state.log_phi
