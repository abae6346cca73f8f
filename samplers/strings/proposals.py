"""Proposals: how the next token of every string is drawn.

A proposal is a function (target, logits[N, V], potential_state) -> unnormalised log-probabilities
[N, V], or a `Proposal` with a state of its own.  Whatever it does, SMC divides by the law that the
token was really drawn from, so any proposal that covers the target's support is exact; one that
does not says how much it misses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ppl.checks import check_count, check_function
from ppl.potential import State, scale
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import at, log_normalised, take_rows, valid
from ppl.target import Target, check_target

from .foresight import followed, locally_optimal
from .laws import Draw as Draw
from .laws import Law, Proposal

ARGUMENTS = "(target, logits, potential_state)"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Stateless(Proposal):
    """A proposal that is only a law, a pytree function."""

    function: Law

    @property
    def covers(self) -> bool:
        return getattr(self.function, "func", None) in COVERING

    @property
    def blind(self) -> bool:
        return getattr(self.function, "func", None) in (bootstrap, _tempered)

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        return self.function(target, logits, potential)

    def checked(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> tuple[Float[Array, "N V"], Bool[Array, " N"]]:
        if not self.covers:
            law, invalid = super().checked(target, logits, potential, state)
            assert law is not None
            return law, invalid
        # Of these laws what they are made of has been looked at, and they are not looked at again.
        ahead = None if self.blind else target.lookahead(potential)
        law = self.law(target, logits, potential, state)
        return law, jnp.zeros(logits.shape[0], bool) if ahead is None else ahead.invalid


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

    @property
    def blind(self) -> bool:
        return not self.lookahead

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
        log_p, looks_ahead = log_normalised(logits), self.looks_ahead(target, potential)

        def reached(alpha: Array) -> Array:
            law = scale(alpha, log_p)
            if not looks_ahead:
                return jax.nn.logsumexp(law, axis=1)
            known, _ = followed(target, law, potential)
            assert known is not None
            own = at(known, token)
            norm = jax.nn.logsumexp(law + known, axis=1)
            return jnp.where(jnp.isneginf(own), jnp.inf, norm - own)

        # Rung by rung: all at once would write out [N, K, V].
        return jnp.stack([reached(alpha) for alpha in self.ladder], axis=1)


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
        return self.checked(target, logits, potential, state)[0]

    def checked(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> tuple[Float[Array, "N V"], Bool[Array, " N"]]:
        # A part's NaN is none of the others'.
        found = [
            part.checked(target, logits, potential, s)
            for part, s in zip(self.parts, state, strict=True)
        ]
        scores = [
            log_normalised(law) + self.log_shares[k]
            for k, (law, _) in enumerate(found)
            if law is not None
        ]
        invalid = functools.reduce(jnp.logical_or, [wrong for _, wrong in found])
        return jax.nn.logsumexp(jnp.stack(scores), axis=0), invalid

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

    @property
    def blind(self) -> bool:
        return Stateless(self.base).blind

    def law(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> Float[Array, "N V"]:
        law = self.base(target, logits, potential)
        # What is no number is not among the heaviest, and stays what it is, to be counted.
        return jnp.where(law < jnp.inf, truncate(valid(law)[0], self.k, self.p), law)


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

    def checked(
        self, target: Target, logits: Array, potential: State, state: State
    ) -> tuple[Float[Array, "N V"], Bool[Array, " N"]]:
        ahead, (_, wrong) = self.guide.lookahead(state[2]), valid(state[1])
        law = self.law(target, logits, potential, state)
        return law, wrong if ahead is None else wrong | ahead.invalid

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        cache, _, potential = state
        cache, logits = self.guide.lm.step(self.guide.prefix, cache, token)
        return cache, logits, self.guide.potential.step(potential, token)[0]

    def reorder(self, state: State, ancestors: Int[Array, " N"]) -> State:
        cache, *rest = state
        return self.guide.lm.reorder(cache, ancestors), *take_rows(tuple(rest), ancestors)
