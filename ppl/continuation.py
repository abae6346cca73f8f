"""What follows the string: Phi(x) = p(y | prompt, x), so that p * Phi is the posterior of x given both its ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .lm import LM, Prefix, check_prompt
from .potential import Potential, State
from .pytrees import register_dataclass
from .sequences import Sequences
from .target import Target, log_probs_of


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuation(Potential):
    """Phi(x) = p(y | prompt, x, EOS) for a string that ended, p(y | prompt, x) for one that the horizon cut.

    tokens [L], padded; length [] of them are y.  State = (cache, logits [N, V], tokens so far [N]).
    """

    lm: LM
    prefix: Prefix
    tokens: Int[Array, " L"]
    length: Int[Array, ""]
    max_tokens: int = dataclasses.field(metadata={"static": True})

    def within(self, max_tokens: int, vocab_size: int, eos: int) -> Continuation:
        mine, theirs = (self.lm.vocab_size, self.lm.eos, self.max_tokens), (vocab_size, eos, max_tokens)
        if mine != theirs:
            raise ValueError(
                f"expected a continuation of the target's strings, (vocab_size, eos, max_tokens) = {theirs}, got"
                f" {mine}; make it from the same lm.given(...)"
            )
        return self

    def init(self, num: int) -> State:
        cache = self.lm.init(self.prefix, num, self.max_tokens + 1 + self.tokens.shape[0])
        logits = jnp.broadcast_to(self.prefix.logits, (num, self.lm.vocab_size))
        return cache, logits, jnp.zeros(num, jnp.int32)

    def step(self, state: State, token: Int[Array, " N"]) -> tuple[State, Float[Array, " N"]]:
        cache, _, used = state
        cache, logits = self.lm.step(self.prefix, cache, token)
        return (cache, logits, used + 1), jnp.zeros(token.shape[0], jnp.float32)

    def final(self, state: State) -> Float[Array, " N"]:
        cache, logits, used = state
        num, ended = used.shape[0], used < self.max_tokens
        cache, after_eos = self.lm.step(self.prefix, cache, jnp.full(num, self.lm.eos, jnp.int32))
        cache = self.lm.truncate(cache, used + ended)
        logits = jnp.where(ended[:, None], after_eos, logits)

        def body(carry: tuple, place: tuple) -> tuple[tuple, None]:
            cache, logits, total = carry
            token, exists = place
            total = total + jnp.where(exists, jax.nn.log_softmax(logits)[:, token], 0.0)
            cache, logits = self.lm.step(self.prefix, cache, jnp.full(num, token, jnp.int32))
            return (cache, logits, total), None

        places = (self.tokens, jnp.arange(self.tokens.shape[0]) < self.length)
        return jax.lax.scan(body, (cache, logits, jnp.zeros(num, jnp.float32)), places)[0][2]

    def log_phi(self, x: Sequences) -> Float[Array, " N"]:
        """In one pass over [prompt, x, EOS, y], each row as long as it is."""
        start = x.length + x.ended
        horizon = self.max_tokens + 1 + self.tokens.shape[0]
        place = jnp.arange(horizon) - start[:, None]
        written = jnp.pad(x.tokens, ((0, 0), (0, horizon - self.max_tokens)), constant_values=self.lm.eos)
        rows = jnp.where(place < 0, written, self.tokens[jnp.clip(place, 0, self.tokens.shape[0] - 1)])
        log_probs = log_probs_of(Target(self.lm, self.prefix, horizon), rows)
        return jnp.where((place >= 0) & (place < self.length), log_probs, 0.0).sum(1)


def continuation(p: Target, tokens: Sequence[int] | Int[Array, " L"]) -> Continuation:
    """Phi(x) = p(y | prompt, x), the probability that the model goes on with the tokens y after the string.

    With it p * Phi is the joint law p(x, y | prompt), as a density of x: the posterior of a missing middle, or of a
    rationale between question and answer.  A string's EOS is part of what y follows.

    Args:
        p: the law of the strings, `lm.given(prompt, max_tokens=T)`; its power and potential do not matter.
        tokens: y, [L] ids.

    Raises:
        ValueError: if y is empty or has ids outside the vocabulary, or prompt, string and y exceed the model's context.
    """
    ids = check_prompt(tokens, p.lm.vocab_size, None)
    needed = p.prefix.tokens.shape[0] + p.max_tokens + 1 + len(ids)
    if p.lm.context is not None and needed > p.lm.context:
        raise ValueError(
            f"expected prompt, string and continuation within the model's context of {p.lm.context} tokens, got"
            f" {needed}; shorten one of them"
        )
    return Continuation(p.lm, p.prefix, jnp.asarray(ids, jnp.int32), jnp.int32(len(ids)), p.max_tokens)
