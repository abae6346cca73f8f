"""The one engine that extends strings: every sampler that adds a token to strings calls `token`.

A token of a row is drawn from the proposal's law q, or follows a given string, and then

    log w_t = alpha log p(x_t | x_<t) - log q(x_t | x_<t) + log phi_t(x_1:t)

is what it adds to the row's log-weight.  Rows have their own lengths; those that are not moving
stay as they are.  What chooses tokens in ways of its own (beams, walks on the tree, look-aheads)
reads the next token's logits by `forward` and adds the tokens chosen by `take`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.lm import Cache
from ppl.potential import State
from ppl.pytrees import register_dataclass
from ppl.rows import anywhere, at, take_rows, valid, where_rows
from ppl.sequences import Sequences, append, empty
from ppl.target import Target

from .foresight import locally_optimal
from .laws import Draw, Proposal
from .pieces import Pieces, Token


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Growing:
    """N strings that are being extended; every leaf has N first.

    Attributes:
        sequences: the strings so far.
        active: which go on.
        log_prob: log p of what has been added, EOS included, without the target's alpha.
        log_q: log q of it, of the law that it was really drawn from; -inf where nothing could be
            drawn.
        log_density: alpha log p + log Phi of it: of strings that have ended, log gamma.
        drawn: tokens added; of a round or a trial, as are the next six.
        passes: passes of the model that were made for them; none where their logits were there.
        read: key-value positions that these, and the proposal's own passes, read; a pass for the
            first token reads none, for its logits are the prompt's.
        judged: tokens that judges in the potential read.
        invalid: some factor, logit or probability of a law was NaN or +inf.  That counts as -inf:
            the string is dead only if it was its own token's.
        missing: the greatest share of the target's one-step law that the proposal could not draw.
        calls: how often the proposal asked the potential.
        cache: the model's, of all tokens but the last; or of all, where `logits` are; None where
            logits come from elsewhere.
        potential, proposal: the states of these.
        logits: the next token's, where the pass for it has been made.
        pieces: of the strings, where they are kept.
    """

    sequences: Sequences
    active: Bool[Array, " N"]
    log_prob: Float[Array, " N"]
    log_q: Float[Array, " N"]
    log_density: Float[Array, " N"]
    drawn: Int[Array, " N"]
    passes: Int[Array, " N"]
    read: Int[Array, " N"]
    judged: Int[Array, " N"]
    invalid: Bool[Array, " N"]
    missing: Float[Array, " N"]
    calls: Int[Array, " N"]
    cache: Cache
    potential: State
    proposal: State
    logits: Float[Array, "N V"] | None = None
    pieces: Pieces | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Follow:
    """Rows that do not draw but follow: rows [N] says which, sequences [N, T] what they follow."""

    rows: Bool[Array, " N"]
    sequences: Sequences


def of(
    x: Sequences,
    active: Bool[Array, " N"],
    cache: Cache,
    potential: State,
    proposal: State = (),
    pieces: Pieces | None = None,
) -> Growing:
    """Strings to be extended, of which nothing has been counted yet."""
    counts, zeros = jnp.zeros(active.shape, jnp.int32), jnp.zeros(active.shape, jnp.float32)
    return Growing(
        sequences=x,
        active=active,
        log_prob=zeros,
        log_q=zeros,
        log_density=zeros,
        drawn=counts,
        passes=counts,
        read=counts,
        judged=counts,
        invalid=jnp.zeros(active.shape, bool),
        missing=zeros,
        calls=counts,
        cache=cache,
        potential=potential,
        proposal=proposal,
        pieces=pieces,
    )


def start(target: Target, proposal: Proposal, num: int) -> Growing:
    """`num` empty strings, whose first token takes no pass but the prompt's (`costs.prompt`)."""
    lm = target.lm
    x = of(
        empty(num, target.max_tokens, lm.eos),
        jnp.ones(num, bool),
        lm.init(target.prefix, num, target.max_tokens),
        target.potential.init(num),
        proposal.init(target, num),
    )
    return dataclasses.replace(
        x, logits=jnp.broadcast_to(target.prefix.logits, (num, lm.vocab_size))
    )


def fresh(x: Growing) -> Growing:
    """Nothing has happened yet in this round or trial."""
    names = ("drawn", "passes", "read", "judged", "invalid", "missing", "calls")
    return dataclasses.replace(x, **{name: jnp.zeros_like(getattr(x, name)) for name in names})


def reorder(target: Target, proposal: Proposal, x: Growing, ancestors: Int[Array, " M"]) -> Growing:
    """Rows `ancestors` of the strings."""
    cache = target.lm.reorder(x.cache, ancestors)
    guide = proposal.reorder(x.proposal, ancestors)
    rest = take_rows(dataclasses.replace(x, cache=None, proposal=None), ancestors)
    return dataclasses.replace(rest, cache=cache, proposal=guide)


def reads(target: Target, x: Sequences) -> Int[Array, " N"]:
    """The key-value positions that the model's pass for the next token reads."""
    return jnp.where(x.length > 0, target.prefix.length + x.length, 0)


def guides_read(proposal: Proposal, x: Sequences) -> Int[Array, " N"]:
    """Those that the passes of the proposal's guides read after the next token."""
    read = jnp.zeros(x.length.shape, jnp.int32)
    for guide in proposal.guides:
        read += guide.prefix.length + x.length + 1
    return read


# One token.


def forward(
    target: Target, x: Growing, moving: Bool[Array, " N"] | None = None
) -> tuple[Growing, Float[Array, "N V"]]:
    """The next token's logits, in which NaN and +inf are -inf, and the strings after that pass.

    These hold the logits as they came; where some were invalid, active strings say so.  The pass is
    counted for the rows `moving`, by default all that are active.
    """
    if x.logits is None:
        made = x.active if moving is None else moving
        position = x.sequences.length
        last = at(x.sequences.tokens, jnp.maximum(position - 1, 0))
        cache, logits = target.lm.step(target.prefix, x.cache, last)
        logits = jnp.where((position == 0)[:, None], target.prefix.logits, logits)
        x = dataclasses.replace(
            x,
            cache=cache,
            logits=logits,
            passes=x.passes + made,
            read=x.read + jnp.where(made, reads(target, x.sequences), 0),
        )
    assert x.logits is not None
    logits, wrong = valid(x.logits)
    return dataclasses.replace(x, invalid=x.invalid | (wrong & x.active)), logits


def take(
    target: Target,
    proposal: Proposal,
    x: Growing,
    drawn: Int[Array, " N"],
    moving: Bool[Array, " N"],
    *,
    cut: bool = True,
) -> tuple[Growing, Float[Array, " N"]]:
    """The strings with the tokens `drawn` at the end of the rows `moving`, and log phi of these.

    The model's pass for the token (`forward`) has been made.  States of rows that are not moving
    mean nothing afterwards, except that their caches are as before.  Without `cut` the potential's
    last factor is not paid at the horizon, but left to the caller.
    """
    # Strings that do not move take EOS: a Python potential would be asked about anything else.
    drawn = jnp.where(moving, drawn, target.lm.eos)
    last = (x.sequences.length == target.max_tokens - 1) & cut
    state, log_phi, invalid = target.factor(x.potential, drawn, moving, last)
    sequences, going = append(x.sequences, drawn, moving, target.lm.eos)
    read = jnp.maximum(sequences.length - 1, 0)
    longer = dataclasses.replace(
        x,
        sequences=sequences,
        active=jnp.where(moving, going, x.active),
        drawn=x.drawn + moving,
        read=x.read + jnp.where(moving, guides_read(proposal, x.sequences), 0),
        judged=x.judged + target.judged(x.potential, drawn, moving, last),
        invalid=x.invalid | invalid,
        # Rows that stay, or have ended, made the pass with the others and forget it.
        cache=None if x.cache is None else target.lm.truncate(x.cache, read),
        potential=state,
        proposal=proposal.update(target, x.proposal, drawn),
        logits=None,
    )
    return longer, log_phi


def token(
    keys: Key[Array, " N"] | None,
    target: Target,
    proposal: Proposal,
    x: Growing,
    moving: Bool[Array, " N"],
    follow: Follow | None = None,
) -> tuple[Growing, Token]:
    """One more token for the rows `moving`: drawn with the row's key, or followed.

    Without keys all rows follow.  The result's `Token` says what was added, 0 elsewhere.

    Raises:
        ValueError: when traced, if rows follow and the proposal can only draw.
    """
    before = x.invalid
    x, logits = forward(target, x, moving)
    choice = _choose(keys, target, proposal, x, logits, moving, follow)
    missing = _missing(target, proposal, x, logits)
    follows = jnp.zeros(moving.shape, bool) if follow is None else follow.rows
    drawn, log_q, calls = jnp.where(moving, choice.token, target.lm.eos), *choice[1:3]
    log_p = at(logits, drawn) - jax.nn.logsumexp(logits, axis=1)
    longer, log_phi = take(target, proposal, x, drawn, moving)

    # A model without any mass is as invalid as a law that was; rows that wait have seen nothing.
    invalid = jnp.isnan(log_p) | jnp.isnan(log_q)
    invalid = invalid if choice.invalid is None else invalid | choice.invalid
    log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
    possible = log_q > -jnp.inf
    # Where the law has no mass nothing was drawn: weight 0, not -inf + inf.
    log_phi = jnp.where(possible | follows, log_phi, -jnp.inf)
    log_q = jnp.where(possible, log_q, jnp.where(follows, -jnp.inf, 0.0))
    one = where_rows(moving, Token(drawn, log_p, log_q, log_phi), _nothing(drawn))
    longer = dataclasses.replace(
        longer,
        log_prob=x.log_prob + one.log_p,
        log_q=x.log_q + jnp.where(moving & possible, one.log_q, jnp.where(moving, -jnp.inf, 0.0)),
        log_density=x.log_density + target.log_prob_factor(one.log_p) + one.log_phi,
        invalid=jnp.where(moving, longer.invalid | invalid, before),
        missing=jnp.maximum(x.missing, jnp.where(moving, missing, 0.0)),
        calls=x.calls if calls is None else x.calls + jnp.where(moving, calls, 0),
        pieces=_written(target, proposal, x, logits, one, moving),
    )
    return longer, one


def complete(
    keys_of: Callable[[Growing], Key[Array, " N"]],
    target: Target,
    proposal: Proposal,
    x: Growing,
    horizon: Int[Array, " N"] | None = None,
) -> Growing:
    """Every active string to its end, or to `horizon` tokens.

    `keys_of` gives the keys of the next tokens, from the strings so far.
    """

    def more(x: Growing) -> Growing:
        longer, _ = token(keys_of(x), target, proposal, x, x.active)
        if horizon is None:
            return longer
        return dataclasses.replace(
            longer, active=longer.active & (longer.sequences.length < horizon)
        )

    # With its logits there, the first token is another program than those that follow.
    x = x if x.logits is None else more(x)
    return jax.lax.while_loop(lambda x: anywhere(x.active), more, x)


def _nothing(drawn: Int[Array, " N"]) -> Token:
    zeros = jnp.zeros(drawn.shape, jnp.float32)
    return Token(drawn, zeros, zeros, zeros)


def _choose(
    keys: Key[Array, " N"] | None,
    target: Target,
    proposal: Proposal,
    x: Growing,
    logits: Float[Array, "N V"],
    moving: Bool[Array, " N"],
    follow: Follow | None,
) -> Draw:
    """The next token of every row, drawn or given."""
    nothing = _nothing(jnp.zeros(moving.shape, jnp.int32))
    found = Draw(nothing.token, nothing.log_q)
    if keys is not None:
        # A proposal that can only draw may work for each row until it is done: not for those that
        # stay.
        offered = logits if proposal.has_law else jnp.where(moving[:, None], logits, -jnp.inf)
        found = proposal.draw(keys, target, offered, x.potential, x.proposal)
    token, log_q, calls, invalid = found
    if follow is not None:
        position = jnp.minimum(x.sequences.length, target.max_tokens - 1)
        token = jnp.where(follow.rows, at(follow.sequences.tokens, position), token)
        given, wrong = _log_q(target, proposal, x, logits, token)
        log_q, wrong = jnp.where(follow.rows, given, log_q), follow.rows & wrong
        invalid = wrong if invalid is None else invalid | wrong
    return Draw(token, log_q, calls, invalid)


def _log_q(
    target: Target,
    proposal: Proposal,
    x: Growing,
    logits: Float[Array, "N V"],
    given: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """log q of given tokens, and which rows of the law were invalid."""
    law, invalid = proposal.checked(target, logits, x.potential, x.proposal)
    if law is None:
        raise ValueError(
            "expected a proposal with a law, to score a given string, got"
            f" {type(proposal).__name__}, which can only draw; condition with"
            " proposals.locally_optimal"
        )
    chosen = at(law, given)
    log_q = jnp.where(jnp.isneginf(chosen), -jnp.inf, chosen - jax.nn.logsumexp(law, axis=1))
    return log_q, invalid


def _missing(
    target: Target, proposal: Proposal, x: Growing, logits: Float[Array, "N V"]
) -> Float[Array, " N"]:
    """The share of the target's one-step law where the proposal's has no mass.

    0 where the target has none either.  Asked of no law that covers the target by what it is.
    """
    none = jnp.zeros(logits.shape[0], jnp.float32)
    if proposal.covers:
        return none
    law, _ = proposal.checked(target, logits, x.potential, x.proposal)
    if law is None:
        return none

    def lost() -> Float[Array, " N"]:
        wanted = jax.nn.softmax(locally_optimal(target, logits, x.potential))
        return jnp.nan_to_num(jnp.where(law > -jnp.inf, 0.0, wanted).sum(1))

    # Most laws have full support, and the softmax is a pass over all of the vocabulary.
    return jax.lax.cond(anywhere(law == -jnp.inf), lost, lambda: none)


def _written(
    target: Target,
    proposal: Proposal,
    x: Growing,
    logits: Float[Array, "N V"],
    one: Token,
    moving: Bool[Array, " N"],
) -> Pieces | None:
    """The pieces with those of a token."""
    if x.pieces is None:
        return None
    place = jnp.arange(target.max_tokens) == x.sequences.length[:, None]
    note = proposal.note(target, logits, x.potential, one.token)
    return x.pieces.written(place & moving[:, None], one, note)
