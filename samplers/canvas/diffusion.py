"""Diffusion samplers of canvases: a random number of sites is revealed in every step, in parallel.

With m_t the probability that a site is still MASK at time t, a masked site is revealed between t
and s < t with probability (m_t - m_s) / m_t, and its token is drawn from d.  In the clock -log m_t
every masked site has the rate 1, whatever the schedule; here m falls from 1 to 0, by as much with
every pass.

All sites of a step are drawn given the same canvas, so the law is the model's only in the limit of
many steps.  At a given number of passes the trapezoid is better far below L, blocks of a fixed size
(`unmasking.process`) near it, and one site at a time is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.canvas import CanvasTarget
from ppl.checks import check_counts
from ppl.draw import categorical
from ppl.potential import log_mask
from ppl.pytrees import register_dataclass
from ppl.showing import shown

from .. import population
from ..base import Cost, Guarantee, particles
from ..population import Run
from ..registry import sampler
from ..results import Draws
from .unmasking import Canvases

Laws = Float[Array, "N L V"]
"""The log-law of every site after a step; MASK stands for staying, or becoming, masked."""


@shown
class Step(NamedTuple):
    """A step: m before and after it, [] each."""

    before: Float[Array, ""]
    after: Float[Array, ""]


@shown
class Site(NamedTuple):
    """What is known of N canvases: tokens, masked, rank [N, L] as in `unmasking.Canvases`; log_d
    [N, L], of every token when it was revealed.
    """

    tokens: Int[Array, "N L"]
    masked: Bool[Array, "N L"]
    rank: Int[Array, "N L"]
    log_d: Float[Array, "N L"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Solver:
    """advance(keys[N], target, x, step, number []) -> (x, passes []): a step of all canvases, in so
    many `passes` but for the last, which takes one.
    """

    advance: Any
    passes: int = dataclasses.field(default=1, metadata={"static": True})


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/canvas/test_diffusion.py")
def run(
    key: PRNGKeyArray,
    target: CanvasTarget,
    *,
    num_samples: int = 32,
    steps: int = 16,
    solver: Solver | None = None,
) -> Draws:
    """Draws by masked diffusion in `steps` steps, in one jit; the model's law in the limit of many.

        diffusion.run(key, lm.canvas(prompt, length=64), steps=16, solver=diffusion.trapezoid())

    Args:
        key: typed key.
        target: a model, without power and potential (`unmasking.process` has these).
        num_samples: N.
        steps: each but the last of `solver.passes` passes.
        solver: `ancestral` by default; `trapezoid()`, `remasking()`.

    Returns:
        `Draws` of canvases; `log_prob` is that of every token when it was revealed, together.

    Raises:
        ValueError: if a count is not positive, or the target has a power or a potential.
    """
    check_counts(num_samples=num_samples, steps=steps)
    if target.alpha is not None or target.tilted:
        raise ValueError(
            "expected a plain model, got a canvas with a power or a potential; use"
            " samplers.canvas.unmasking"
        )
    return _run(key, target, ancestral if solver is None else solver, (num_samples, steps))


@functools.partial(jax.jit, static_argnames="sizes")
def _run(key: Any, target: CanvasTarget, solver: Solver, sizes: tuple[int, int]) -> Draws:
    num, steps = sizes
    shape = num, target.length
    rank, zeros = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)

    def one(key: PRNGKeyArray, run: Run) -> Run:
        k = run.rounds
        share = solver.passes / (solver.passes * (steps - 1) + 1)
        ends = (k + jnp.arange(2)).astype(jnp.float32)
        step = Step(*jnp.maximum(1 - share * ends, 0.0))
        before = run.particles.state
        x, passes = solver.advance(jax.random.split(key, num), target, before, step, k)
        tokens = (before.masked & ~x.masked).sum(dtype=jnp.int32)
        cost = Cost(tokens=tokens, forwards=passes, depth=passes)
        return population.end(population.moved(run, x), cost)

    start = population.start(particles(Site(*target.start(num), rank, zeros), num))
    run, _ = population.every_round(jax.random.split(key, steps), start, one)
    x = run.particles.state
    log_prob = x.log_d.sum(1)
    samples = Canvases(
        x.tokens, x.masked, x.rank, log_prob, jnp.zeros_like(log_prob), target.lm.eos
    )
    return Draws(samples=samples, log_prob=log_prob, cost=run.cost)


def site_laws(log_d: Laws, x: Site, reveal: Any, remask: Any, mask: int) -> Laws:
    """A masked site is revealed with probability `reveal` [] or [N, L], and an open one, unless it
    is given, masked again with probability `remask` [].
    """
    ids = jnp.arange(log_d.shape[2])
    reveal = jnp.broadcast_to(jnp.asarray(reveal, jnp.float32), x.masked.shape)[:, :, None]
    remask = jnp.where(x.rank >= 0, jnp.asarray(remask, jnp.float32), 0.0)[:, :, None]
    masked = jnp.where(ids == mask, jnp.log1p(-reveal), jnp.log(reveal) + log_d)
    kept = jnp.log1p(-remask) + log_mask(ids == x.tokens[:, :, None])
    opened = jnp.where(ids == mask, jnp.log(remask), kept)
    return jnp.where(x.masked[:, :, None], masked, opened)


def trapezoid_laws(
    log_d: Laws, log_d_before: Laws, x: Site, theta: Any, hours: Float[Array, ""], mask: int
) -> Laws:
    """The second half of a trapezoid step: masked sites have the rates (a1 d - a2 d_before)_+ for
    (1 - theta) of the step's `hours`, log(m_t / m_s).
    """
    a1 = 1 / (2 * theta * (1 - theta))
    a2 = ((1 - theta) ** 2 + theta**2) * a1
    rates = jnp.maximum(a1 * jnp.exp(log_d) - a2 * jnp.exp(log_d_before), 0.0)
    total = rates.sum(2)
    log_law = jnp.log(rates) - jnp.log(total)[:, :, None]
    log_law = jnp.where(total[:, :, None] > 0, log_law, log_d)
    return site_laws(log_law, x, -jnp.expm1(-total * (1 - theta) * hours), 0.0, mask)


def drawn(
    keys: Key[Array, " N"], x: Site, laws: Laws, log_d: Laws, number: Int[Array, ""], mask: int
) -> Site:
    """Every site from its law."""
    each = jax.vmap(lambda key: jax.random.split(key, laws.shape[1]))(keys)
    token, _ = categorical(each.reshape(-1), laws.reshape(-1, laws.shape[2]))
    token = token.reshape(x.tokens.shape)
    masked = token == mask
    new = x.masked & ~masked
    found = jnp.take_along_axis(log_d, token[:, :, None], axis=2)[:, :, 0]
    return Site(
        jnp.where(masked, x.tokens, token),
        masked,
        jnp.where(new, number, x.rank).astype(jnp.int32),
        jnp.where(masked, 0.0, jnp.where(new, found, x.log_d)),
    )


def _ancestral(
    eta: Any, keys: Key[Array, " N"], target: CanvasTarget, x: Site, step: Step, number: Array
) -> tuple[Site, Int[Array, ""]]:
    mask, log_d = target.lm.mask, target.denoise(x.tokens, x.masked)
    open_before, open_after = 1 - step.before, 1 - step.after
    most = jnp.where(open_before > 0, step.after / jnp.maximum(open_before, 1e-9), 1.0)
    remask = jnp.minimum(eta, jnp.minimum(most, 1.0))
    reveal = (open_after - (1 - remask) * open_before) / step.before
    # Rounding must not leave sites for a step that does not come.
    reveal = jnp.where(step.after > 0, jnp.clip(reveal, 0.0, 1.0), 1.0)
    laws = site_laws(log_d, x, reveal, remask, mask)
    return drawn(keys, x, laws, log_d, number, mask), jnp.int32(1)


def _trapezoid(
    theta: Any, keys: Key[Array, " N"], target: CanvasTarget, x: Site, step: Step, number: Array
) -> tuple[Site, Int[Array, ""]]:
    mask, log_d = target.lm.mask, target.denoise(x.tokens, x.masked)
    first, second = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 1, 0)
    last = step.after <= 0
    hours = jnp.log(step.before / jnp.where(last, step.before, step.after))
    reveal = jnp.where(last, 1.0, -jnp.expm1(-theta * hours))
    middle = drawn(first, x, site_laws(log_d, x, reveal, 0.0, mask), log_d, 2 * number, mask)

    def rest() -> Site:
        log_d_now = target.denoise(middle.tokens, middle.masked)
        laws = trapezoid_laws(log_d_now, log_d, middle, theta, hours, mask)
        return drawn(second, middle, laws, log_d_now, 2 * number + 1, mask)

    return jax.lax.cond(last, lambda: middle, rest), jnp.where(last, 1, 2).astype(jnp.int32)


ancestral = Solver(Partial(_ancestral, 0.0))
"""MDLM's sampler (arXiv 2406.07524), which for masked models is tau-leaping: a pass for a step."""


def trapezoid(theta: float = 0.4) -> Solver:
    """The theta-trapezoidal method (arXiv 2502.00234): two passes for a step, but one for the last.

        theta of the step with the rates d_0; the rest with (a1 d_mid - a2 d_0)_+,
        a1 = 1 / (2 theta (1 - theta)),  a2 = a1 - 1

    Second order as long as no rate is cut off at 0, and first order with a better constant beyond.

    Raises:
        ValueError: if theta is outside (0, 1).
    """
    _check_share("theta", theta, "0.4")
    return Solver(Partial(_trapezoid, theta), passes=2)


def remasking(eta: float = 0.02) -> Solver:
    """ReMDM's capped remasking (arXiv 2503.00307): open sites become MASK again with probability
    min(eta, (1 - alpha_s) / alpha_t), and as many more are revealed.

    With the right conditionals it mends nothing, and is further from the model than `ancestral` at
    equal passes; its gains are those of a network that errs.

    Raises:
        ValueError: if eta is outside (0, 1).
    """
    _check_share("eta", eta, "0.02")
    return Solver(Partial(_ancestral, eta))


def _check_share(name: str, value: Any, example: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"expected {name} in (0, 1), got {value}; pass e.g. {example}")
