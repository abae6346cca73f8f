"""SMC on canvases: sites are revealed a few at a time, weighed, and resampled.

A round is a pass of the model over all canvases.  Revealing site i of canvas c as v, drawn from r,
adds to the log-weight

    alpha log d_i(v | c) - log r_i(v | c)                   the process law
      + log(1 / masked) - log pi(i | c)                     the order-and-string law, pi the order's

and psi(c) of a twist is multiplied in after every pass and divided out before the next.  At the end
comes Phi(string(x)), in the place of the last psi.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.canvas import CanvasTarget
from ppl.checks import check_counts
from ppl.potential import log_mask, scale
from ppl.pytrees import register_dataclass
from ppl.rows import log_normalised
from ppl.sequences import Sequences, from_tokens

from .. import population
from ..base import Cost, Guarantee, Resampler, particles
from ..population import Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from .orders import LogWeights, Order, as_order, choose, left_out, uniform
from .twists import Plain


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvases:
    """N canvases on their way.

    tokens, masked, rank [N, L]: a site's token, whether it is still MASK, and the round in which it
    was revealed (-1: given).  log_prob [N] log of the product of d over what was revealed.  log_psi
    [N] the last twist.
    """

    tokens: Int[Array, "N L"]
    masked: Bool[Array, "N L"]
    rank: Int[Array, "N L"]
    log_prob: Float[Array, " N"]
    log_psi: Float[Array, " N"]
    eos: int = dataclasses.field(metadata={"static": True})

    @property
    def sequences(self) -> Sequences:
        """The tokens before the first EOS."""
        return from_tokens(self.tokens, self.eos)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class How:
    """What a round goes by; `extended` weighs the order too, for the order-and-string law."""

    order: Order
    twist: Plain
    block: int = dataclasses.field(metadata={"static": True})
    extended: bool = dataclasses.field(metadata={"static": True})

    @property
    def blind(self) -> bool:
        """Whether a round needs the sites that it reveals, and no others."""
        return self.order.blind and type(self.twist) is Plain


@sampler(Guarantee.EXACT, proof="tests/samplers/canvas/test_unmasking.py")
def run(
    key: PRNGKeyArray,
    target: CanvasTarget,
    *,
    num_particles: int = 32,
    order: Order | LogWeights = uniform,
    twist: Plain | None = None,
    threshold: float | Float[Array, ""] = 0.5,
    resampler: Resampler = systematic,
) -> Weighted:
    """SMC for gamma(order, x) = U(order) p_order(x)^alpha Phi(string(x)), a site at a time, in one
    jit.

        unmasking.run(key, lm.canvas(prompt, length=64) * ppl.reward(f))

    The order may be any that gives every site positive weight; what it prefers is weighed.  It
    costs nothing if it is uniform; greedy ones leave orders out (`missing_support` says which
    share, at worst), and are for `process`.

    Args:
        key: typed key.
        target: gamma.
        num_particles: N.
        order: which site is next (`samplers.canvas.orders`).
        twist: of `samplers.canvas.twists`; None is 1.
        threshold: resample when ESS < threshold * N; 0 never, above 1 in every round.
        resampler: how ancestors are drawn (`samplers.resampling`).

    Returns:
        `Weighted` canvases that obey LAW 1, whose `rank` is the order.  A pass costs one forward
        and reads no cache, for no canvas keeps one.

    Raises:
        ValueError: if num_particles < 1, or `order` is no function.
    """
    check_counts(num_particles=num_particles)
    how = How(as_order(order), Plain() if twist is None else twist, 1, True)
    return _run(key, target, how, threshold, num_particles, resampler)


@sampler(Guarantee.EXACT, proof="tests/samplers/canvas/test_unmasking.py")
def process(
    key: PRNGKeyArray,
    target: CanvasTarget,
    *,
    block: int = 1,
    num_particles: int = 32,
    order: Order | LogWeights = uniform,
    twist: Plain | None = None,
    threshold: float | Float[Array, ""] = 0.5,
    resampler: Resampler = systematic,
) -> Weighted:
    """SMC for the law of the process itself, `block` sites in a round, times Phi, in one jit.

        gamma(S_1, S_2, ..; x) = prod_k pi(S_k | c_k) prod_{i in S_k} d_i(x_i | c_k)^alpha  Phi(x)

    The order and the block are part of the target.  With Phi = 1 all weights are 1: what diffusion
    samplers draw.  Its x have the model's joint law if there is one and `block` is 1; L / block
    passes are the price of another law, which is the nearer the fewer sites there are in a block.

    Args:
        block: K, the sites that are revealed in a round, given each other's past only.
        Others as in `run`; any order.

    Returns, raises:
        As `run`; sites of one round have one rank.  ValueError also if block < 1.
    """
    check_counts(num_particles=num_particles, block=block)
    how = How(as_order(order), Plain() if twist is None else twist, block, False)
    return _run(key, target, how, threshold, num_particles, resampler)


def start(target: CanvasTarget, num: int) -> Canvases:
    """N canvases with what is given."""
    tokens, masked = target.start(num)
    zeros = jnp.zeros(num, jnp.float32)
    rank = jnp.full(tokens.shape, -1, jnp.int32)
    return Canvases(tokens, masked, rank, zeros, zeros, target.lm.eos)


@functools.partial(jax.jit, static_argnames=("num", "resampler"))
def _run(
    key: Any, target: CanvasTarget, how: How, threshold: Any, num: int, resampler: Resampler
) -> Weighted:
    how = dataclasses.replace(how, block=min(how.block, target.length))
    count = -(-target.length // how.block)
    run = population.start(particles(start(target, num), num), count, missing=jnp.float32(0))
    one = functools.partial(round_of, target, how, threshold, resampler)
    run = population.rounds(
        jax.random.split(key, count), run, one, lambda run: run.particles.state.masked.any()
    )
    x = run.particles.state
    run = population.weigh(run, target.log_potential(x.tokens) - x.log_psi)
    if target.tilted:
        run = population.spend(run, Cost(potential_calls=jnp.int32(num)))
    out = population.result(run, x, log_prob=x.log_prob)
    return dataclasses.replace(out, missing_support=run.rows["missing"].max())


def round_of(
    target: CanvasTarget,
    how: How,
    threshold: Any,
    resampler: Resampler,
    key: PRNGKeyArray,
    run: Run,
) -> Run:
    """A pass, a selection, and K sites of every canvas."""
    select_key, *draw_keys = jax.random.split(key, 3)
    x, laws = run.particles.state, None
    if not how.blind:
        laws = site_laws(target, x, target.denoise(x.tokens, x.masked))
        log_psi = how.twist.log_psi(laws[0])
        after = dataclasses.replace(x, log_psi=log_psi)
        run = population.moved(run, (after, laws), log_psi - x.log_psi)
    else:
        run = population.moved(run, (x, None))
    run = population.select(select_key, run, resampler, threshold)
    x, laws = run.particles.state
    y, dw, missing = reveal(tuple(draw_keys), target, how, x, laws, run.rounds)
    run = population.record(population.moved(run, y, dw))
    run = population.note(run, missing=missing.max())
    tokens = (x.masked & ~y.masked).sum(dtype=jnp.int32)
    return population.end(run, Cost(tokens=tokens, forwards=jnp.int32(1), depth=jnp.int32(1)))


Looked = tuple[Float[Array, "N L V"], Float[Array, "N L"], Float[Array, "N L V"]]
"""Of every site the law d^alpha / norm, a point mass where it is open; log norm; log d."""


def site_laws(target: CanvasTarget, x: Canvases, log_d: Float[Array, "N L V"]) -> Looked:
    """What a pass over the whole canvas tells."""
    laws, log_norm = powered(target, log_d)
    ids = jnp.arange(target.lm.vocab_size)
    points = log_mask(ids == x.tokens[:, :, None])
    return jnp.where(x.masked[:, :, None], laws, points), log_norm, log_d


def powered(
    target: CanvasTarget, log_d: Float[Array, "N K V"]
) -> tuple[Float[Array, "N K V"], Float[Array, "N K"]]:
    """d^alpha normalised, and the log of its norm."""
    if target.alpha is None:
        return log_d, jnp.zeros(log_d.shape[:2], jnp.float32)
    log_mass = scale(target.alpha, log_d)
    return log_normalised(log_mass), jax.nn.logsumexp(log_mass, axis=2)


def reveal(
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    target: CanvasTarget,
    how: How,
    x: Canvases,
    looked: Looked | None,
    now: Int[Array, ""],
) -> tuple[Canvases, Float[Array, " N"], Float[Array, " N"]]:
    """Choose K masked sites, draw their tokens, and weigh them; and the share of orders that could
    not be taken.  Keys are of the sites and of the tokens.  Without `looked` the model is asked for
    these sites only.
    """
    num = x.tokens.shape[0]
    site_keys, token_keys = (jax.random.split(key, num) for key in keys)
    seen = None if looked is None else looked[2]
    log_weights = how.order.log_weights(seen, x.masked)
    at, sites, log_pi = choose(site_keys, log_weights, x.masked, how.block)
    if looked is None:
        log_d = target.denoise(x.tokens, x.masked, at)
        laws, log_norm = powered(target, log_d)
        every = jnp.broadcast_to(jnp.arange(how.block, dtype=jnp.int32), at.shape)
        token = how.twist.draw(token_keys, laws, every)
    else:
        token = how.twist.draw(token_keys, looked[0], at)
        log_norm, log_d = (
            jnp.take_along_axis(looked[1], at, axis=1),
            jnp.take_along_axis(looked[2], at[:, :, None], axis=1),
        )
    log_prob = jnp.take_along_axis(log_d, token[:, :, None], axis=2)[:, :, 0]
    y = _written(x, at, sites, token, now)
    dw = jnp.where(sites, log_norm, 0.0).sum(1)
    if looked is not None and how.twist.guides:
        points = log_mask(jnp.arange(target.lm.vocab_size) == y.tokens[:, :, None])
        dw = dw + x.log_psi - how.twist.log_psi(jnp.where(y.masked[:, :, None], looked[0], points))
    missing = jnp.zeros(num, jnp.float32)
    if how.extended:
        dw = dw - jnp.log(jnp.maximum(x.masked.sum(1), 1).astype(jnp.float32)) - log_pi
        missing = left_out(log_weights, x.masked)
    more = jnp.where(sites, log_prob, 0.0).sum(1)
    return dataclasses.replace(y, log_prob=x.log_prob + more), dw, missing


def _written(
    x: Canvases, at: Int[Array, "N K"], sites: Bool[Array, "N K"], token: Array, now: Array
) -> Canvases:
    rows = jnp.arange(at.shape[0])[:, None]
    at = jnp.where(sites, at, x.tokens.shape[1])  # out of range: not written
    return dataclasses.replace(
        x,
        tokens=x.tokens.at[rows, at].set(token, mode="drop"),
        masked=x.masked.at[rows, at].set(False, mode="drop"),
        rank=x.rank.at[rows, at].set(now.astype(jnp.int32), mode="drop"),
    )
