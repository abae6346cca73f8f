"""Log rewards of prefixes: log gamma of the string that stops after i tokens, for the losses that
balance prefixes.

    at_every_prefix       exact everywhere: one step of the potential per token, and its `final` at
                          every prefix
    interpolated(every)   log Phi exact at every so many tokens and at the ends, linear in between
                          (arXiv 2510.23925)
    at_the_end            of the whole string alone, for the losses that balance nothing else

Which one is a matter of cost: where `final` is a pass of a model, it is most of a training step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppl.checks import check_count
from ppl.potential import State
from ppl.rows import valid
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.strings.proposals import locally_optimal

Rewards = Callable[[Target, Sequences], Float[Array, "N L"]]
"""(target, strings) -> log gamma [N, T + 1] of stopping after i tokens; -inf where not known, and
beyond the length.
"""


@jax.jit
def at_every_prefix(target: Target, x: Sequences) -> Float[Array, "N L"]:
    """log gamma of the string that stops after i tokens, for every i up to `length`; -inf beyond.

        alpha (sum_{t<i} log p(x_t) + log p(EOS)) + log Phi(x_<i),    without EOS at i = T

    One parallel pass of the model, one step of the potential per token and its `final` at every
    prefix.
    """
    num, horizon = x.tokens.shape
    plain = Target(target.lm, target.prefix, target.max_tokens)
    token, stop = (target.log_prob_factor(part) for part in log_probs(plain, x.tokens))
    token = jnp.where(jnp.arange(horizon) < x.length[:, None], token, 0.0)
    so_far = jnp.pad(jnp.cumsum(token, axis=1), ((0, 0), (1, 0)))
    stops = jnp.arange(horizon + 1) <= x.length[:, None]

    def body(carry: tuple[State, Array], t: Array) -> tuple[tuple[State, Array], Array]:
        state, log_phi = carry
        whole = log_phi + _valid(target.potential.final_where(state, t <= x.length))
        state, log_factor = target.potential.step(state, x.tokens[:, jnp.minimum(t, horizon - 1)])
        return (state, log_phi + _valid(log_factor)), whole

    start = target.potential.init(num), jnp.zeros(num, jnp.float32)
    if not target.tilted:
        log_phi = jnp.zeros((num, horizon + 1), jnp.float32)
    else:
        log_phi = jax.lax.scan(body, start, jnp.arange(horizon + 1, dtype=jnp.int32))[1].T
    return jnp.where(stops, so_far + jnp.pad(stop, ((0, 0), (0, 1))) + log_phi, -jnp.inf)


def _valid(log_factor: Float[Array, " N"]) -> Float[Array, " N"]:
    """NaN and +inf count as -inf, as in `Target.factor`."""
    return jnp.where(jnp.isnan(log_factor) | jnp.isposinf(log_factor), -jnp.inf, log_factor)


@jax.jit
def at_the_end(target: Target, x: Sequences) -> Float[Array, "N L"]:
    """log gamma of the whole strings, in the column of their length."""
    own = jnp.arange(target.max_tokens + 1) == x.length[:, None]
    return jnp.where(own, target.log_density(x.tokens, x.length)[:, None], -jnp.inf)


@functools.cache
def interpolated(every: int) -> Rewards:
    """log p exact at every prefix; log Phi at multiples of `every` and at the string's end, linear
    in between.

    Exact where log Phi is linear between these anchors, and for every = 1.  (LaCoT, arXiv
    2510.23925, interpolates all of log R; the model's part costs nothing here.)  Next to an anchor
    where Phi = 0 nothing is known: -inf.

    Raises:
        ValueError: if `every` < 1.
    """
    check_count("every", every)
    return functools.partial(_interpolated, every)


@functools.partial(jax.jit, static_argnums=0)
def _interpolated(every: int, target: Target, x: Sequences) -> Float[Array, "N L"]:
    num, horizon = x.tokens.shape
    plain = Target(target.lm, target.prefix, target.max_tokens, target.alpha)
    log_p, length = at_every_prefix(plain, x), x.length[:, None]
    places = jnp.arange(horizon + 1, dtype=jnp.int32)
    anchors = jnp.minimum(jnp.arange(0, horizon + every, every, dtype=jnp.int32), length)
    cut = jnp.where(jnp.arange(horizon) < anchors[..., None], x.tokens[:, None], target.lm.eos)
    log_phi = target.log_potential(cut.reshape(-1, horizon), anchors.reshape(-1)).reshape(num, -1)
    before = places // every
    low, high = log_phi[:, before], log_phi[:, jnp.minimum(before + 1, anchors.shape[1] - 1)]
    start = before * every
    share = (places - start) / jnp.maximum(jnp.minimum(start + every, length) - start, 1)
    between = jnp.where(
        share == 0, low, jnp.where(share == 1, high, (1 - share) * low + share * high)
    )
    return jnp.where(places <= length, log_p + between, -jnp.inf)


def log_probs(
    q: Target, tokens: Int[Array, "N T"]
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """log q of the tokens and of EOS, after 0..T-1 tokens."""
    num, horizon = tokens.shape
    logits = jnp.broadcast_to(q.prefix.logits, (num, 1, q.lm.vocab_size))
    if horizon > 1:
        logits = jnp.concatenate([logits, q.lm.extend(q.prefix, tokens[:, :-1])], axis=1)

    logits, _ = valid(logits)

    def at(law: Array, token: Array) -> tuple[Array, Array]:
        # Where all is forbidden the law has no norm, and a gradient through it would be NaN.
        living = (law > -jnp.inf).any(axis=-1)
        norm = jax.nn.logsumexp(jnp.where(living[..., None], law, 0.0), axis=-1)
        own = jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0]
        return own - norm, law[..., q.lm.eos] - norm

    if not q.tilted:
        return at(logits, tokens)

    def body(state: State, now: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        logits, token = now
        return q.potential.step(state, token)[0], at(locally_optimal(q, logits, state), token)

    found = jax.lax.scan(body, q.potential.init(num), (jnp.swapaxes(logits, 0, 1), tokens.T))[1]
    return found[0].T, found[1].T
