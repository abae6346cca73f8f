"""A second round of draws that goes by what the best of a first have in common, weighed for the
model (CarBoN, arXiv 2510.15674, as importance sampling).

    out = calibrated.run(key, p, score, num_first=64, num_second=64)
    pool = pools.of(out, answer=answers.last_number(tok), score=score)     # any vote, with weights

The best strings of the first round fit a bias of every token and a temperature,

    q(v | x_<t) = softmax((logits_t + delta) / T)_v
    (delta, T) = argmax  mean_t log q(x_t | x_<t)  -  ridge / 2 (|delta|^2 + (log T)^2)

from which the second is drawn.  Without a price of T a few strings that agree would make it 0, and
weights of all others infinite.  Published, both rounds are pooled as they are, which is a sample of
no law; here the second's strings weigh p / q, so LAW 1 holds for p whatever was fitted, and a vote
over both is for p's answer.  delta = 0, T = 1 is more of the first round.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts, check_function
from ppl.potential import State
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import take_rows, valid
from ppl.sequences import Sequences
from ppl.target import Target, check_plain

from .. import population
from ..base import Cost, Guarantee, Particles
from ..draws import ancestral
from ..registry import sampler
from ..results import Weighted
from ..strings.laws import Proposal
from . import importance

NUM_STEPS = 200
RATE = 0.1
"""Of the fit, by Adam; it falls to zero."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated(Proposal):
    """q proportional to exp((logits + delta) / temperature): delta [V], temperature []."""

    delta: Float[Array, " V"]
    temperature: Float[Array, ""]

    @property
    def covers(self) -> bool:
        return True

    @property
    def blind(self) -> bool:
        return True

    def law(
        self, target: Target, logits: Float[Array, "N V"], potential: State, state: State
    ) -> Float[Array, "N V"]:
        return (logits + self.delta) / self.temperature


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_calibrated.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    score: Callable[[Any, Any], Any],
    *,
    num_first: int = 32,
    num_second: int = 32,
    top: int = 8,
    ridge: float | Float[Array, ""] = 1.0,
) -> Weighted:
    """Two rounds of draws for p, the second by a law fitted to the best of the first, in one jit.

    Args:
        key: typed key.
        p: a language model.
        score: (tokens [N, T], length [N]) -> [N]; NaN is the worst.
        num_first, num_second: draws of each round.
        top: strings of the first that are fitted.
        ridge: how much bias and temperature cost; large values leave the model as it is.

    Returns:
        `Weighted`: first the first round, whose strings have weight 1.  `details`: `delta` [V] and
            `temperature` [].  Reading the best again is one forward.

    Raises:
        ValueError: if p has a power or a potential, a count is below 1, or top > num_first.
    """
    check_counts(num_first=num_first, num_second=num_second, top=top)
    check_plain(p, "; tilt by the score instead, p * ppl.reward(score), with smc.run")
    check_function("score", score, "(tokens, length)", "jax.numpy.minimum")
    if top > num_first:
        raise ValueError(
            f"expected at most {num_first} strings to fit, as many as are drawn first, got {top};"
            f" pass top={max(num_first // 4, 1)}"
        )
    sizes = num_first, num_second, top
    return _run(key, p, as_pytree(score), jnp.float32(ridge), sizes)


@functools.partial(jax.jit, static_argnames="sizes")
def _run(
    key: Any, p: Target, score: Any, ridge: Float[Array, ""], sizes: tuple[int, int, int]
) -> Weighted:
    num_first, num_second, top = sizes
    first_key, second_key = jax.random.split(key)
    first = ancestral.run(first_key, p, num_samples=num_first)
    x: Sequences = first.samples
    scores, _ = valid(jnp.asarray(score(x.tokens, x.length), jnp.float32)[:, None])
    best = take_rows(x, jax.lax.top_k(scores[:, 0], top)[1])
    proposal = fitted(p, best, ridge)
    second = importance.run(second_key, p, num_particles=num_second, proposal=proposal)

    log_w = second.log_weights + second.log_z
    assert second.log_prob is not None
    joined, weights, log_prob, log_q = jax.tree.map(
        lambda one, other: jnp.concatenate([one, other]),
        (x, jnp.zeros(num_first), first.log_prob, first.log_prob),
        (second.samples, log_w, second.log_prob, second.log_prob - log_w),
    )
    run = population.start(Particles(joined, weights.astype(jnp.float32), jnp.float32(0)), 1)
    reading = Cost(forwards=jnp.int32(1), depth=jnp.int32(1), potential_calls=jnp.int32(num_first))
    run = population.end(population.record(run), first.cost + second.cost + reading)
    out = population.result(
        run,
        joined,
        log_prob=log_prob,
        log_q=log_q,
        details={"delta": proposal.delta, "temperature": proposal.temperature},
    )
    return dataclasses.replace(out, num_invalid=second.num_invalid)


def fitted(p: Target, x: Sequences, ridge: float | Float[Array, ""] = 1.0) -> Calibrated:
    """The bias and the temperature of the greatest penalised likelihood of K strings."""
    num, size = x.tokens.shape
    cache = p.lm.init(p.prefix, num, size)
    _, after = p.lm.advance(p.prefix, cache, x.tokens)
    first = jnp.broadcast_to(p.prefix.logits, (num, 1, p.lm.vocab_size))
    logits = jnp.concatenate([first, after[:, :-1]], axis=1)
    # The end is a token too, but where the horizon cuts.
    there = jnp.arange(size) <= x.length[:, None]
    tokens = jnp.where(jnp.arange(size) == x.length[:, None], p.lm.eos, x.tokens)

    def loss(params: tuple[Array, Array]) -> Float[Array, ""]:
        delta, log_temperature = params
        price = 0.5 * ridge * ((delta**2).sum() + log_temperature**2)
        return price - _log_likelihood(logits, tokens, there, delta, log_temperature)

    start = jnp.zeros(p.lm.vocab_size, jnp.float32), jnp.float32(0)
    delta, log_temperature = _minimised(loss, start)
    return Calibrated(delta, jnp.exp(log_temperature))


def _log_likelihood(
    logits: Float[Array, "K T V"],
    tokens: Int[Array, "K T"],
    there: Bool[Array, "K T"],
    delta: Float[Array, " V"],
    log_temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """The mean over tokens."""
    log_q = jax.nn.log_softmax((logits + delta) * jnp.exp(-log_temperature))
    own = jnp.take_along_axis(log_q, tokens[:, :, None], axis=2)[:, :, 0]
    return jnp.where(there, own, 0.0).sum() / there.sum()


def _minimised(loss: Callable[[Any], Array], start: Any) -> Any:
    solver = optax.adam(optax.cosine_decay_schedule(RATE, NUM_STEPS))

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = solver.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, solver.init(start)), None, NUM_STEPS)
    return params
