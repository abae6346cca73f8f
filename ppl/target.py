"""Targets: unnormalised densities gamma(x) = p(x | prompt)^alpha * Phi(x) over strings of at most T
tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .lm import LM, Prefix
from .potential import Potential, Product, State, Trusted, scale
from .pytrees import register_dataclass
from .rows import anywhere, log_normalised, valid
from .sequences import Sequences
from .showing import Words, shown
from .space import Space

SCORED_LOGITS = 2**25
"""Logits that are in memory at a time where whole strings are scored."""


@shown
class Ahead(NamedTuple):
    """What a potential knows of the factors of every next token (`Target.lookahead`).

    known [N, V]: the log-factors of all parts together, -inf or finite.  doubtful: those [N, V] of
    each part whose look-ahead is not `trusted`, 0 where `known` is -inf.  invalid [N]: which rows
    had NaN or +inf, which is -inf here.
    """

    known: Float[Array, "N V"]
    doubtful: tuple[Float[Array, "N V"], ...]
    invalid: Bool[Array, " N"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Target:
    """gamma(x) = p(x | prompt)^alpha * Phi(x), x a string of at most `max_tokens` tokens.

    EOS is absorbing; a string cut by the horizon has no EOS factor and is a legal outcome.
    `lm.given(prompt, max_tokens=T)` makes one with alpha = 1 and Phi = 1; then

        target ** 4            powers everything: p^4 Phi^4
        target * potential     tilts
        p * q                  two conditioned language models with the same vocabulary and horizon

    Attributes:
        lm: the model p.
        prefix: its prompt, processed once.
        max_tokens: T, the horizon; part of the target.
        alpha: [] float32, the power of p; None is 1.  Populations whose rows have targets of their
            own, as in parallel tempering, have alpha [N].
        potential: Phi; the empty product is 1.
    """

    lm: LM
    prefix: Prefix
    max_tokens: int = dataclasses.field(metadata={"static": True})
    alpha: Float[Array, " *#N"] | None = None
    potential: Potential = Product()

    @property
    def space(self) -> Space:
        """What its strings are."""
        return self.lm.space(self.max_tokens)

    @property
    def tilted(self) -> bool:
        """Whether there is a potential: Phi is not the empty product."""
        return self.potential != Product()

    @property
    def power(self) -> Float[Array, " *#N"]:
        """alpha, also where it was left at 1."""
        return jnp.float32(1) if self.alpha is None else self.alpha

    def _shown_(self) -> dict[str, Any]:
        return {
            "model": self.lm,
            "prompt_length": self.prefix.length,
            "max_tokens": self.max_tokens,
            "alpha": 1 if self.alpha is None else self.alpha,
            "potentials": [Words(type(part).__name__) for part in self.potential.parts],
        }

    @property
    def is_language_model(self) -> bool:
        """Whether gamma is just p: alpha = 1 (known to be, not traced) and no potential."""
        plain = self.alpha is None or (
            not isinstance(self.alpha, Tracer) and bool((np.asarray(self.alpha) == 1).all())
        )
        return plain and not self.tilted

    def __mul__(self, other: Potential | Target) -> Target:
        if isinstance(other, Target):
            # Its potential is bound already, to the space that its model's check finds the same.
            other = lm_potential(other).within(self.space) * other.potential
        elif isinstance(other, Potential):
            other = other.within(self.space)
        elif callable(other):
            raise ValueError(
                "expected a potential or a target to multiply with, got the function"
                f" {getattr(other, '__qualname__', type(other).__name__)}; write ppl.reward(f) for"
                " a jax function of (tokens, length), ppl.reward(ppl.python(f, tokenizer)) for a"
                " Python function of the text"
            )
        else:
            return NotImplemented
        return dataclasses.replace(self, potential=self.potential * other)

    __rmul__ = __mul__

    def __pow__(self, power: float | int | Float[Array, ""]) -> Target:
        if not isinstance(power, Tracer) and not np.isfinite(power):
            raise ValueError(
                f"expected a finite power, got {power}; large finite ones approach the most"
                " probable string"
            )
        power = jnp.asarray(power, jnp.float32)
        alpha = power if self.alpha is None else self.alpha * power
        potential = self.potential**power if self.tilted else self.potential
        return dataclasses.replace(self, alpha=alpha, potential=potential)

    def under(self, lm: LM) -> Target:
        """The plain law of another model over the same prompt and strings: no power, no potential.

        The prompt is read again by that model, so the law is a differentiable function of its
        weights, inside jit too.

        Raises:
            ValueError: if the model has another vocabulary or EOS, or a context too short for
                prompt and strings; a traced length is not checked (see `LM.read`).
        """
        self.space.check_same(lm.space(self.max_tokens), "a model")
        length = self.prefix.length
        needed = 0 if isinstance(length, Tracer) else int(length) + self.max_tokens
        if lm.context is not None and needed > lm.context:
            raise ValueError(
                f"expected a model whose context holds the prompt and the strings, {needed}"
                f" positions, got a context of {lm.context}; shorten the prompt, or lower"
                " max_tokens"
            )
        return Target(lm, lm.read(self.prefix.tokens, length), self.max_tokens)

    # One token of the potential, with the rules for EOS and the horizon in one place.

    def factor(
        self,
        state: State,
        token: Int[Array, " N"],
        active: Bool[Array, " N"],
        last: Bool[Array, " *#N"],
    ) -> tuple[State, Float[Array, " N"], Bool[Array, " N"]]:
        """The potential's log-factor of the next token.

        EOS takes `final`; another token takes `step`, and `final` too in rows where it is the
        `last` one before the horizon.  Rows that are not `active` have ended: their factor is 1.
        NaN and +inf count as -inf.

        Returns: the new state, log_factor [N], and which rows were NaN or +inf [N].
        """
        is_eos = token == self.lm.eos
        zeros = jnp.zeros(token.shape[0], jnp.float32)
        # `final` may be a reward model or a parser: it runs only when some string ends, and only on
        # whole strings.
        ends = is_eos & active
        at_eos = jax.lax.cond(
            anywhere(ends), lambda: self.potential.final_where(state, ends), lambda: zeros
        )
        state, log_factor = self.potential.step(state, token)
        cut = ~is_eos & active & last
        at_end = jax.lax.cond(
            anywhere(cut), lambda: self.potential.final_where(state, cut), lambda: zeros
        )
        log_factor = jnp.where(is_eos, at_eos, jnp.where(cut, log_factor + at_end, log_factor))
        invalid = active & (jnp.isnan(log_factor) | jnp.isposinf(log_factor))
        log_factor = jnp.where(invalid, -jnp.inf, jnp.where(active, log_factor, 0.0))
        return state, log_factor, invalid

    def judged(
        self,
        state: State,
        token: Int[Array, " N"],
        active: Bool[Array, " N"],
        last: Bool[Array, " *#N"],
    ) -> Int[Array, " N"]:
        """How many tokens judges read for the log-factor of the next token; arguments as in
        `factor`.
        """
        ends = active & ((token == self.lm.eos) | last)
        return jnp.where(active, self.potential.judged(state, token, ends), 0).astype(jnp.int32)

    def lookahead(self, state: State) -> Ahead | None:
        """The factors of every next token, as far as they are known in advance, with `factor`'s
        rule for NaN and +inf; None if none is known.
        """
        pairs = zip(self.potential.parts, self.potential.part_states(state), strict=True)
        ahead = [(part.trusted, part.lookahead(s)) for part, s in pairs]
        trusted = [known for sure, known in ahead if sure and known is not None]
        others = [known for sure, known in ahead if not sure and known is not None]
        if not trusted + others:
            return None
        known, invalid = valid(functools.reduce(jnp.add, trusted + others))
        doubtful = tuple(jnp.where(known > -jnp.inf, part, 0.0) for part in others)
        return Ahead(known, doubtful, invalid)

    def log_prob_factor(self, log_prob: Float[Array, " *N"]) -> Float[Array, " *N"]:
        """alpha * log p, where -inf stays -inf."""
        return log_prob if self.alpha is None else scale(self.alpha, log_prob)

    # The referee.

    def log_density(
        self, tokens: Int[Array, "N T"], length: Int[Array, " N"]
    ) -> Float[Array, " N"]:
        """log gamma of N strings, computed from scratch: the referee of every sampler.

        Args:
            tokens: [N, T] with T = max_tokens; positions from `length` on are ignored.
            length: [N] tokens before EOS; below T, EOS follows; T means that the horizon cut the
                string.

        A row that is no string of the target, because an id or its length is out of range or EOS
        stands inside of it, has density zero: -inf where the values are traced, and elsewhere an
        error, for ids are wrong because another tokenizer made them.

        Raises:
            ValueError: if `tokens` is not [N, max_tokens], or a row that can be read is no string.
        """
        log_p = self.log_prob_factor(self.token_log_probs(tokens, length))
        return log_p.sum(1) + self.log_potential(tokens, length)

    def token_log_probs(
        self, tokens: Int[Array, "N T"], length: Int[Array, " N"]
    ) -> Float[Array, "N T"]:
        """log p(x_t | prompt, x_<t) of every token, the EOS at position `length` included; 0 after
        it.

        Arguments and errors as in `log_density`.
        """
        x, good = self.space.strings(tokens, length)
        log_probs = jnp.where(good[:, None], log_probs_of(self, x.tokens), -jnp.inf)
        return jnp.where(jnp.arange(self.max_tokens) <= x.length[:, None], log_probs, 0.0)

    def log_potential(
        self, tokens: Int[Array, "N T"], length: Int[Array, " N"]
    ) -> Float[Array, " N"]:
        """log Phi of N strings, from scratch.  Arguments and errors as in `log_density`."""
        x, good = self.space.strings(tokens, length)
        return jnp.where(good, log_potential_of(self, x)[0], -jnp.inf)


def check_target(x: Any) -> None:
    """Raise ValueError unless `x` is a target, or a list of them."""
    if isinstance(x, Target):
        return
    if isinstance(x, list | tuple):
        for one in x:
            check_target(one)
        return
    given = "lm.given(prompt, max_tokens=64)"
    if isinstance(x, LM):
        got, remedy = "an LM, which has no prompt and no horizon", f"pass {given}"
    elif isinstance(x, Potential):
        got = f"{type(x).__name__}, a potential"
        remedy = f"multiply it onto a language model, {given} * potential"
    elif hasattr(x, "left_to_right"):
        got, remedy = "one over canvases", "pass its left_to_right(), or take samplers.canvas"
    else:
        got, remedy = type(x).__name__, f"pass {given}, or that times potentials"
    raise ValueError(f"expected a target, got {got}; {remedy}")


def check_plain(target: Target, remedy: str) -> None:
    """Raise ValueError unless the target is a language model, without power and potential; `remedy`
    says what to do with another one.
    """
    if not target.is_language_model:
        raise ValueError(
            "expected a plain language model, got a target with a power or a potential" + remedy
        )


@jax.jit
def log_probs_of(target: Target, tokens: Int[Array, "N T"]) -> Float[Array, "N T"]:
    """log p of every token of N rows as they are, EOS being a token like any other."""
    lm, prefix = target.lm, target.prefix
    num, horizon = tokens.shape

    def at(logits: Array, tokens: Array) -> Array:
        return jnp.take_along_axis(log_normalised(logits), tokens[:, :, None], axis=2)[:, :, 0]

    def score(tokens: Array) -> Array:
        first = at(
            jnp.broadcast_to(prefix.logits, (tokens.shape[0], 1, lm.vocab_size)), tokens[:, :1]
        )
        if horizon == 1:
            return first
        return jnp.concatenate(
            [first, at(lm.extend(prefix, tokens[:, :-1]), tokens[:, 1:])], axis=1
        )

    rows = max(SCORED_LOGITS // (horizon * lm.vocab_size), 1)
    if num <= rows:
        return score(tokens)
    # The logits of all strings at once may not fit memory: many strings are scored a block at a
    # time.
    blocks = jnp.pad(tokens, ((0, -num % rows), (0, 0))).reshape(-1, rows, horizon)
    return jax.lax.map(score, blocks).reshape(-1, horizon)[:num]


@jax.jit
def log_potential_of(target: Target, x: Sequences) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """log Phi of strings, and how many tokens judges read for it."""
    parts = target.potential.parts
    quick = [part.log_phi(x) for part in parts]
    slow = tuple(part for part, known in zip(parts, quick, strict=True) if known is None)
    total, judged = _token_by_token(dataclasses.replace(target, potential=Product(slow)), x)
    for log_phi in quick:
        if log_phi is not None:
            total = total + jnp.where(jnp.isnan(log_phi) | jnp.isposinf(log_phi), -jnp.inf, log_phi)
    return total, judged


def _token_by_token(target: Target, x: Sequences) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    num, horizon = x.tokens.shape

    def body(state: State, t: Array) -> tuple[State, tuple[Array, Array]]:
        given = state, x.tokens[:, t], t <= x.length, t == horizon - 1
        state, log_factor, _ = target.factor(*given)
        return state, (log_factor, target.judged(*given))

    positions = jnp.arange(horizon, dtype=jnp.int32)
    _, (log_factors, judged) = jax.lax.scan(body, target.potential.init(num), positions)
    return log_factors.sum(0), judged.sum(0, dtype=jnp.int32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LMPotential(Trusted):
    """Phi(x) = q(x | prompt), a second language model; state = (cache, log-probabilities [N, V],
    tokens so far [N]).
    """

    lm: LM
    prefix: Prefix
    space: Space = dataclasses.field(metadata={"static": True})

    def within(self, space: Space) -> LMPotential:
        space.check_same(self.space, "a second language model")
        return self

    def init(self, num: int) -> State:
        cache = self.lm.init(self.prefix, num, self.space.max_tokens)
        log_probs = jnp.broadcast_to(_law(self.prefix.logits), (num, self.lm.vocab_size))
        return cache, log_probs, jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        cache, log_probs, used = state
        log_factor = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        cache, logits = self.lm.step(self.prefix, cache, token)
        return (cache, _law(logits), used + 1), log_factor

    def final(self, state: State) -> Float[Array, " N"]:
        _, log_probs, used = state
        return jnp.where(used < self.space.max_tokens, log_probs[:, self.space.eos], 0.0)

    def lookahead(self, state: State) -> Float[Array, "N V"]:
        return state[1]

    @property
    def constraint(self) -> None:
        return None


def _law(logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """Log-probabilities; NaN where a logit is NaN or +inf, for that is to be counted."""
    return jnp.where(logits < jnp.inf, log_normalised(logits), jnp.nan)


def lm_potential(target: Target) -> Potential:
    """The language-model part p^alpha of a target, as a potential for another target (`p * q` uses
    it).
    """
    potential = LMPotential(target.lm, target.prefix, target.space)
    return potential if target.alpha is None else potential**target.alpha
