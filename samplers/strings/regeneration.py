"""Drawing the rest of strings anew, each from its own cut: what suffix moves do to a batch of
chains.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.draw import categorical
from ppl.lm import Cache
from ppl.potential import State as PotentialState
from ppl.potential import scale
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows, where_rows
from ppl.sequences import Sequences, append, empty
from ppl.target import Target

from .proposals import Proposal, locally_optimal

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


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Growth:
    """Strings y that are being drawn; every leaf has C first.

    `y.cache` holds all tokens but the last.  `potential` and `guide` are the states of the
    potential and the proposal. Since the cut: `tokens` drawn, `missing`, the greatest share of the
    target's one-step law that could not be drawn, and `invalid`, whether the potential or the model
    gave NaN (or +inf).
    """

    y: State
    active: Bool[Array, " C"]
    potential: PotentialState
    guide: PotentialState
    tokens: Int[Array, " C"]
    missing: Float[Array, " C"]
    invalid: Bool[Array, " C"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Powered(Proposal):
    """q proportional to p^alpha, alpha the target's; then log w_t is log sum_v p(v)^alpha, and the
    potential's factor.

    With `lookahead` q is also proportional to the factors that the potential knows in advance, e.g.
    which tokens a constraint allows.

    With a `ladder` of powers alpha_k, strings remember alpha_k log p - log q at all of them
    (without a look-ahead the norm log sum_v p(v | x_<t)^alpha_k), so that they may change from one
    rung to another without a pass of the model (`at_rung`).
    """

    ladder: Float[Array, " K"] | None = None
    lookahead: bool = dataclasses.field(default=False, metadata={"static": True})

    def looks_ahead(self, target: Target, potential: PotentialState) -> bool:
        """Whether there is anything to see."""
        return self.lookahead and target.potential.lookahead(potential) is not None

    def law(
        self, target: Target, logits: Array, potential: PotentialState, state: PotentialState
    ) -> Array:
        return (
            locally_optimal(target, logits, potential)
            if self.lookahead
            else target.log_prob_factor(logits)
        )

    def log_norms(
        self,
        target: Target,
        logits: Float[Array, "N V"],
        potential: PotentialState,
        token: Int[Array, " N"],
    ) -> Float[Array, "N K"]:
        assert self.ladder is not None
        log_p = jax.nn.log_softmax(logits)
        known = target.potential.lookahead(potential) if self.lookahead else None
        known = jnp.zeros((1, 1)) if known is None else known
        own = known[:, 0] if known.shape[1] == 1 else _at(known, token)
        # Rung by rung: all at once would write out [N, K, V].
        norms = [jax.nn.logsumexp(scale(alpha, log_p) + known, axis=1) for alpha in self.ladder]
        return jnp.stack(
            [jnp.where(jnp.isneginf(own), jnp.inf, norm - own) for norm in norms], axis=1
        )


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
        x = jax.tree.map(
            lambda x, y: x.at[row].set(jnp.where(accepted[row], y[row], x[row])), *caches
        )
        return x, jax.tree.map(lambda y, x: y.at[row].set(x[row]), caches[1], x)

    # Row by row: few strings end at a time.
    order = jnp.argsort(~rows)
    return jax.lax.fori_loop(0, rows.sum(), body, caches)


def rows_of(target: Target, x: State, rows: Int[Array, " N"]) -> State:
    """Rows `rows` of strings."""
    return with_cache(take_rows(without_cache(x), rows), target.lm.reorder(x.cache, rows))


def growth_rows(target: Target, proposal: Proposal, g: Growth, rows: Int[Array, " N"]) -> Growth:
    """Rows `rows` of strings that are being drawn."""
    y, guide = rows_of(target, g.y, rows), proposal.reorder(g.guide, rows)
    rest = take_rows(dataclasses.replace(g, y=None, guide=None), rows)
    return dataclasses.replace(rest, y=y, guide=guide)


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


def start(target: Target, proposal: Proposal, y: State, active: Bool[Array, " C"]) -> Growth:
    """Ready to continue the strings `y` in the rows `active`.

    A potential has no way back to a cut but to be stepped there again; so has a proposal's state.
    """
    num, length = active.shape[0], jnp.where(active, y.sequences.length, 0)
    states = target.potential.init(num), proposal.init(target, num)
    # Known when traced: without states there is nothing to step.
    if target.tilted or jax.tree.leaves(states[1]):

        def body(t: Array, states: tuple) -> tuple:
            within = t < length
            token = jnp.where(within, y.sequences.tokens[:, t], target.lm.eos)
            stepped = (
                target.potential.step(states[0], token)[0],
                proposal.update(target, states[1], token),
            )
            return where_rows(within, stepped, states)

        states = jax.lax.fori_loop(0, length.max(), body, states)
    zeros = jnp.zeros(num, jnp.int32)
    return Growth(
        y, active, states[0], states[1], zeros, jnp.zeros(num, jnp.float32), jnp.zeros(num, bool)
    )


def grow(
    keys: Key[Array, " C"] | None,
    target: Target,
    proposal: Proposal,
    g: Growth,
    horizon: Int[Array, " C"],
    given: Sequences | None = None,
    follows: Bool[Array, " C"] | None = None,
) -> Growth:
    """One more token for every active string, drawn with its key, until EOS or `horizon` tokens.

    The rows that `follows` says (all, without keys) do not draw but take the token of the strings
    `given`.
    """
    y, active, position = g.y, g.active, g.y.sequences.length
    last = _at(y.sequences.tokens, jnp.maximum(position - 1, 0))
    cache, logits = target.lm.step(target.prefix, y.cache, last)
    logits = jnp.where((position == 0)[:, None], target.prefix.logits, logits)
    law = proposal.law(target, logits, g.potential, g.guide)
    assert law is not None
    follows = jnp.broadcast_to(keys is None, active.shape) if follows is None else follows
    token, log_q = jnp.zeros(active.shape, jnp.int32), jnp.zeros(active.shape, jnp.float32)
    if keys is not None:
        token, log_q = categorical(keys, law)
    if given is not None:
        token = jnp.where(
            follows, _at(given.tokens, jnp.minimum(position, target.max_tokens - 1)), token
        )
        log_q = jnp.where(follows, _at(law, token) - jax.nn.logsumexp(law, axis=1), log_q)
    token = jnp.where(active, token, target.lm.eos)
    log_p = _at(logits, token) - jax.nn.logsumexp(logits, axis=1)
    potential, log_phi, invalid = target.factor(
        g.potential, token, active, position == target.max_tokens - 1
    )
    invalid = (invalid | jnp.isnan(log_p)) & active
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    possible = log_q > -jnp.inf
    # Where the law has no mass nothing was drawn: the string is dead, and that is not the
    # proposal's fault.
    log_phi = jnp.where(possible | follows, log_phi, -jnp.inf)
    log_q = jnp.where(possible, log_q, jnp.where(follows, -jnp.inf, 0.0))

    here = (jnp.arange(target.max_tokens) == position[:, None]) & active[:, None]
    log_norms = y.log_norms
    if log_norms is not None and isinstance(proposal, Powered):
        noted = proposal.log_norms(target, logits, g.potential, token)
        log_norms = jnp.where(here[..., None], noted[:, None], log_norms)
    sequences, going = append(y.sequences, token, active, target.lm.eos)
    longer = State(
        sequences,
        jnp.where(here, log_p[:, None], y.log_p),
        jnp.where(here, log_q[:, None], y.log_q),
        jnp.where(here, log_phi[:, None], y.log_phi),
        # Rows that have ended made the pass too, and forget it.
        target.lm.truncate(cache, jnp.maximum(sequences.length - 1, 0)),
        log_norms,
    )
    return Growth(
        y=longer,
        active=going & (sequences.length < horizon),
        potential=potential,
        guide=proposal.update(target, g.guide, token),
        tokens=g.tokens + active,
        missing=jnp.maximum(
            g.missing, jnp.where(active, _missing(target, logits, g.potential, law), 0.0)
        ),
        invalid=g.invalid | invalid,
    )


def _missing(
    target: Target, logits: Array, potential: PotentialState, law: Float[Array, "C V"]
) -> Float[Array, " C"]:
    """The share of the target's one-step law where `law` has no mass; 0 where the target has none
    either.
    """

    def lost() -> Float[Array, " C"]:
        wanted = jax.nn.softmax(locally_optimal(target, logits, potential))
        return jnp.nan_to_num(jnp.where(law > -jnp.inf, 0.0, wanted).sum(1))

    # Most laws have full support, and the softmax is a pass over all of the vocabulary.
    return jax.lax.cond((law > -jnp.inf).all(), lambda: jnp.zeros(law.shape[0], jnp.float32), lost)


def complete(
    keys: Key[Array, " C"],
    target: Target,
    proposal: Proposal,
    growth: Growth,
    horizon: Int[Array, " C"],
) -> tuple[Growth, Int[Array, ""]]:
    """Every active string to its end or to `horizon` tokens, and how many passes that took.

    The token at position t has the key fold_in(key, t), so that a string is the same however it
    came to its cut.
    """

    def body(carry: tuple[Growth, Array]) -> tuple[Growth, Array]:
        growth, passes = carry
        at = jax.vmap(jax.random.fold_in)(keys, growth.y.sequences.length)
        return grow(at, target, proposal, growth, horizon), passes + 1

    return jax.lax.while_loop(lambda carry: carry[0].active.any(), body, (growth, jnp.int32(0)))


@jax.jit
def score(target: Target, proposal: Proposal, x: Sequences) -> State:
    """Given strings with their pieces: one forward pass of the model per token."""
    num = x.length.shape[0]
    horizon = jnp.full(num, target.max_tokens)

    def body(growth: Growth) -> Growth:
        return grow(None, target, proposal, growth, horizon, given=x)

    growth = start(target, proposal, no_strings(target, proposal, num), jnp.ones(num, bool))
    return jax.lax.while_loop(lambda growth: growth.active.any(), body, growth).y


def init(target: Target, proposal: Proposal, x: Sequences) -> State:
    """Chains at the strings `x`, scored.

    Raises:
        ValueError: if they are not strings of the target, or one has density zero; traced values
            pass.
    """
    target.space.check(x)
    state = score(target, proposal, x)
    check_support(target, state)
    return state


def check_support(target: Target, state: State) -> None:
    """Raise ValueError if some chain's string has density zero; traced values cannot be read, and
    pass.
    """
    density = log_density(target, state)
    if not isinstance(density, Tracer) and np.isneginf(density).any():
        row = int(np.isneginf(density).argmax())
        raise ValueError(
            f"expected strings in the support of the target, got log gamma = -inf for row {row};"
            " start from draws of"
            " the target's own constraint, e.g. by smc.run or importance.run"
        )


def log_density(target: Target, state: State) -> Float[Array, " C"]:
    """log gamma of every string, from its pieces."""
    return (target.log_prob_factor(state.log_p) + state.log_phi).sum(1)


def increments(target: Target, state: State) -> Float[Array, "C T"]:
    """log w_t of every token; +inf for one that the proposal cannot draw, which is why it cannot be
    left either.
    """
    return target.log_prob_factor(state.log_p) - state.log_q + state.log_phi


def _at(rows: Array, index: Int[Array, " C"]) -> Array:
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]
