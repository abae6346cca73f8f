"""Proposals: how the next token of every string is drawn.

A proposal is a function (target, logits[N, V], potential_state) -> unnormalised log-probabilities
[N, V], or a `Proposal` with a state of its own.  Whatever it does, SMC divides by the law that the
token was really drawn from, so any proposal that covers the target's support is exact; one that
does not says how much it misses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from ppl.checks import check_count, check_function
from ppl.draw import categorical
from ppl.potential import State, scale
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import at, take_rows
from ppl.showing import shown
from ppl.target import Target, check_target

Law = Callable[[Target, Float[Array, "N V"], State], Float[Array, "N V"]]
ARGUMENTS = "(target, logits, potential_state)"


@shown
class Draw(NamedTuple):
    """Tokens [N], log q [N], and how often each row asked the potential [N] (None: not at all).

    E[exp(-log_q) f(token)] = sum_v f(v) over the support.
    """

    token: Int[Array, " N"]
    log_q: Float[Array, " N"]
    potential_calls: Int[Array, " N"] | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """Base class of proposals with a state: subclasses, under `ppl.register_dataclass`, define
    `law` (or `draw`).

    Every leaf of a state has the particle axis N first.
    """

    @property
    def guides(self) -> tuple[Target, ...]:
        """Other language models that read every token, each in a pass of its own."""
        return ()

    @property
    def has_law(self) -> bool:
        """Whether it defines `law`; otherwise it can only draw."""
        return type(self).law is not Proposal.law

    @property
    def covers(self) -> bool:
        """Whether its law is positive wherever the target's one-step law is, by what it is.

        Of the others `growing.token` measures how much of the target they leave out.
        """
        return False

    def init(self, target: Target, num: int) -> State:
        """The state of `num` empty strings."""
        return ()

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> Float[Array, "N V"] | None:
        """Unnormalised log-probabilities of every next token; None if they cannot be had (then
        `draw` is defined).
        """
        return None

    def draw(
        self,
        keys: Key[Array, " N"],
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        state: State,
    ) -> Draw:
        """Draw a token for every row."""
        law = self.law(target, logits, potential, state)
        if law is None:
            raise TypeError(
                f"expected {type(self).__name__} to define law or draw, got neither; define one of"
                " them"
            )
        return Draw(*categorical(keys, law))

    def note(
        self,
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        token: Int[Array, " N"],
    ) -> Float[Array, "N K"] | None:
        """What strings are to remember of a token besides its probabilities; None for nothing."""
        return None

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        """The state after `token`; called with EOS for strings that have ended, whose state no
        longer matters.
        """
        return state

    def reorder(self, state: State, ancestors: Int[Array, " N"]) -> State:
        """Rows `ancestors` of the state."""
        return take_rows(state, ancestors)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Stateless(Proposal):
    """A proposal that is only a law, a pytree function."""

    function: Law

    @property
    def covers(self) -> bool:
        return getattr(self.function, "func", None) in COVERING

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        return self.function(target, logits, potential)


def as_proposal(proposal: Proposal | Law) -> Proposal:
    """A `Proposal` from either form, of which functions become static data; raises ValueError."""
    if not isinstance(proposal, Proposal):
        check_function("proposal", proposal, ARGUMENTS, "samplers.strings.proposals.bootstrap")
        return Stateless(as_pytree(proposal))
    return proposal


def bootstrap(target: Target, logits: Float[Array, "N V"], potential: State) -> Float[Array, "N V"]:
    """q = p: draw from the model, pay for alpha and Phi in the weight."""
    return logits


def tempered(temperature: float | int | Float[Array, ""]) -> Law:
    """q proportional to p^(1 / temperature).

    Raises:
        ValueError: unless temperature > 0.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"expected a temperature above 0, got {temperature}; small values are near-greedy"
        )
    return jax.tree_util.Partial(_tempered, temperature)


def _tempered(
    temperature: float | Array, target: Target, logits: Float[Array, "N V"], potential: State
) -> Float[Array, "N V"]:
    return logits / temperature


def locally_optimal(
    target: Target, logits: Float[Array, "N V"], potential: State
) -> Float[Array, "N V"]:
    """q proportional to p^alpha times the factors that the potential knows in advance (its
    `lookahead`).

    If all are known, the weight is the normaliser and does not depend on the token drawn: the least
    variance that one step allows.
    """
    log_q = target.log_prob_factor(logits)
    known = target.potential.lookahead(potential)
    return log_q if known is None else log_q + known


COVERING = (bootstrap, _tempered, locally_optimal)
"""Laws that are positive wherever the one-step law of any target is."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Powered(Proposal):
    """q proportional to p^alpha, alpha the target's; then log w_t is log sum_v p(v)^alpha, and the
    potential's factor.

    With `lookahead` q is also proportional to the factors that the potential knows in advance, e.g.
    which tokens a constraint allows.

    With a `ladder` of powers alpha_k, strings remember alpha_k log p - log q at all of them
    (without a look-ahead the norm log sum_v p(v | x_<t)^alpha_k), so that they may change from one
    rung to another without a pass of the model (`regeneration.at_rung`).
    """

    ladder: Float[Array, " K"] | None = None
    lookahead: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def covers(self) -> bool:
        return True

    def looks_ahead(self, target: Target, potential: State) -> bool:
        """Whether there is anything to see."""
        return self.lookahead and target.potential.lookahead(potential) is not None

    def law(self, target: Target, logits: Array, potential: State, state: State) -> Array:
        if self.lookahead:
            return locally_optimal(target, logits, potential)
        return target.log_prob_factor(logits)

    def note(
        self,
        target: Target,
        logits: Float[Array, "N V"],
        potential: State,
        token: Int[Array, " N"],
    ) -> Float[Array, "N K"] | None:
        if self.ladder is None:
            return None
        log_p = jax.nn.log_softmax(logits)
        known = target.potential.lookahead(potential) if self.lookahead else None
        known = jnp.zeros((1, 1), jnp.float32) if known is None else known
        own = known[:, 0] if known.shape[1] == 1 else at(known, token)
        # Rung by rung: all at once would write out [N, K, V].
        norms = [jax.nn.logsumexp(scale(alpha, log_p) + known, axis=1) for alpha in self.ladder]
        reached = [jnp.where(jnp.isneginf(own), jnp.inf, norm - own) for norm in norms]
        return jnp.stack(reached, axis=1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Proposal):
    """q = sum_k shares_k q_k, each law normalised; see `mixture`.  State = its parts' states."""

    log_shares: Float[Array, " K"]
    parts: tuple[Proposal, ...]

    @property
    def covers(self) -> bool:
        return any(part.covers for part in self.parts)

    @property
    def guides(self) -> tuple[Target, ...]:
        return tuple(guide for part in self.parts for guide in part.guides)

    def init(self, target: Target, num: int) -> State:
        return tuple(part.init(target, num) for part in self.parts)

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        laws = [
            part.law(target, logits, potential, s)
            for part, s in zip(self.parts, state, strict=True)
        ]
        scores = [
            jax.nn.log_softmax(law) + self.log_shares[k]
            for k, law in enumerate(laws)
            if law is not None
        ]
        return jax.nn.logsumexp(jnp.stack(scores), axis=0)

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        return tuple(
            part.update(target, s, token) for part, s in zip(self.parts, state, strict=True)
        )

    def reorder(self, state: State, ancestors: Int[Array, " N"]) -> State:
        return tuple(part.reorder(s, ancestors) for part, s in zip(self.parts, state, strict=True))


def mixture(shares: Sequence[float | int], parts: Sequence[Proposal | Law]) -> Mixture:
    """q = sum_k shares_k q_k of the K parts, each law normalised, token by token: a little of
    `bootstrap` gives any other law full support.

    Args: K positive shares, normalised here, and K proposals with a law.

    Raises:
        ValueError: if the numbers of shares and parts differ, a share is not positive, or a part
            can only draw.
    """
    if len(shares) != len(parts) or not parts or not all(share > 0 for share in shares):
        raise ValueError(
            f"expected one positive share per part, got shares {list(shares)} for {len(parts)}"
            " parts; drop the others"
        )
    proposals = tuple(as_proposal(part) for part in parts)
    for part in proposals:
        if not part.has_law:
            raise ValueError(
                f"expected parts that have a law, got {type(part).__name__}, which can only draw"
            )
    return Mixture(jnp.log(jnp.asarray(shares, jnp.float32) / sum(shares)), proposals)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Truncated(Proposal):
    """The heaviest tokens of another law (see `top_k` and `top_p`).

    What it never draws is lost to the sampler, which then has the truncated target:
    `Weighted.missing_support` says how much of the target's one-step law that is.  Mixed with p
    (`mixture`) nothing is lost; and a law that is meant to be truncated is a potential, not a
    proposal.
    """

    base: Law
    k: int | None = dataclasses.field(default=None, metadata={"static": True})
    p: float | Float[Array, ""] = 1.0

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        return truncate(self.base(target, logits, potential), self.k, self.p)


def truncate(
    log_q: Float[Array, "N V"], k: int | None, p: float | Float[Array, ""]
) -> Float[Array, "N V"]:
    """-inf outside of the `k` heaviest tokens, or else of the fewest tokens that hold the share
    `p`; ties are kept.
    """
    if k is not None:
        cut = jax.lax.top_k(log_q, k)[0][:, -1:]
    else:
        falling = -jnp.sort(-log_q, axis=1)
        shares = jax.nn.softmax(falling)
        # The first token is always kept; another one, if those before it hold less than p.
        kept = (jnp.cumsum(shares, axis=1) - shares < p).at[:, 0].set(True)
        cut = jnp.min(jnp.where(kept, falling, jnp.inf), axis=1, keepdims=True)
    return jnp.where(log_q >= cut, log_q, -jnp.inf)


def top_k(k: int, law: Law = bootstrap) -> Truncated:
    """The `k` heaviest tokens of `law`; reports what it misses (`Truncated`).

    Raises:
        ValueError: unless k >= 1.
    """
    check_count("k", k)
    return Truncated(as_pytree(law), k=k)


def top_p(p: float | Float[Array, ""], law: Law = bootstrap) -> Truncated:
    """The fewest tokens of `law` that hold the share `p` (nucleus); reports what it misses
    (`Truncated`).

    Raises:
        ValueError: unless 0 < p <= 1.
    """
    if not isinstance(p, Tracer) and not 0 < p <= 1:
        raise ValueError(f"expected a share p in (0, 1], got {p}; 0.9 is usual")
    return Truncated(as_pytree(law), p=p)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageModel(Proposal):
    """Draw from another language model: q = p'^alpha' times what its own potential knows in
    advance; a learned guide in a mixture, for what it never draws no ESS and no log Z shows:

        mixture([0.9, 0.1], [LanguageModel(target.under(guide)), locally_optimal])

    A `Target`, so it may carry a power and the constraint of the target it serves.
    State = (cache, next-token logits [N, V], potential state) of the other model.
    """

    guide: Target

    @property
    def guides(self) -> tuple[Target, ...]:
        return (self.guide,)

    def init(self, target: Target, num: int) -> State:
        check_target(guide := self.guide)
        target.space.check_same(guide.space, "a guide")
        cache = guide.lm.init(guide.prefix, num, guide.max_tokens)
        logits = jnp.broadcast_to(guide.prefix.logits, (num, guide.lm.vocab_size))
        return cache, logits, guide.potential.init(num)

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        return locally_optimal(self.guide, state[1], state[2])

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        cache, _, potential = state
        cache, logits = self.guide.lm.step(self.guide.prefix, cache, token)
        return cache, logits, self.guide.potential.step(potential, token)[0]

    def reorder(self, state: State, ancestors: Int[Array, " N"]) -> State:
        cache, *rest = state
        return self.guide.lm.reorder(cache, ancestors), *take_rows(tuple(rest), ancestors)
