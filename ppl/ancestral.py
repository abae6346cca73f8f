"""Exact draws from a language model, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from .draw import categorical
from .rows import valid
from .sequences import Sequences, append, empty
from .target import Target


def ancestral(key: PRNGKeyArray, target: Target, num: int) -> Sequences:
    """`num` independent exact draws from the language model of `target` (its power and potential
    are ignored).

    Stops as soon as every string has ended.  A longer horizon keeps the prefix of every draw, and a
    larger `num` keeps the old draws.
    """
    lm, prefix, horizon = target.lm, target.prefix, target.max_tokens
    keys = jax.random.split(key, horizon)

    def draw(
        x: Sequences, t: Array, logits: Array, active: Array
    ) -> tuple[Sequences, Bool[Array, " N"]]:
        token, _ = categorical(jax.random.split(keys[t], num), valid(logits)[0])
        return append(x, token, active, lm.eos)

    def body(carry: tuple) -> tuple:
        t, cache, x, active = carry
        cache, logits = lm.step(prefix, cache, x.tokens[:, t - 1])
        return t + 1, cache, *draw(x, t, logits, active)

    first = jnp.broadcast_to(prefix.logits, (num, lm.vocab_size))
    start = draw(empty(num, horizon, lm.eos), jnp.int32(0), first, jnp.ones(num, bool))
    carry = (jnp.int32(1), lm.init(prefix, num, horizon), *start)
    return jax.lax.while_loop(lambda c: (c[0] < horizon) & c[3].any(), body, carry)[2]
