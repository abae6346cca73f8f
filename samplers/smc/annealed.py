"""Annealed SMC and annealed importance sampling over whole strings, from p to its power and tilt.

Along beta_0 = 0 < beta_1 < ... < beta_S = 1 strings drawn from p are weighed and moved for

    gamma_beta(x) = p(x)^(1 - beta) gamma(x)^beta = p(x)^(1 + beta (alpha - 1)) Phi(x)^beta

where stage k adds (beta_k - beta_{k-1}) ((alpha - 1) log p(x) + log Phi(x)) to the log-weights;
resamples if they have degenerated (Del Moral, Doucet and Jasra 2006), or never (annealed importance
sampling: Neal 2001); and makes M suffix moves, which leave gamma_beta invariant.  Strings know log
p, and the norms of all rungs (`proposals.Powered`), so what is between the moves takes no pass
of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.potential import scale
from ppl.pytrees import as_pytree
from ppl.target import Target

from .. import population
from ..base import Guarantee, Resampler
from ..mcmc import suffix
from ..population import Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from ..strings.cuts import Cut, uniform, whole
from ..strings.ladders import Ladder, check_betas
from ..strings.proposals import Powered
from ..strings.regeneration import State, at_rung
from .resample_move import extended, init, refresh, result


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_annealed.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    ladder: Ladder,
    *,
    num_particles: int = 32,
    num_moves: int = 2,
    threshold: float | Float[Array, ""] = 0.5,
    resampler: Resampler = systematic,
    cut: Cut = uniform,
    log_phi_max: float | Float[Array, ""] | None = None,
) -> Weighted:
    """Annealed SMC for gamma(x) = p(x)^alpha Phi(x), in one jit; with `threshold=0` annealed
    importance sampling.

        annealed.run(key, p**4, jnp.linspace(0, 1, 17)[1:])

    Args:
        key: typed key.
        target: gamma.
        ladder: beta_1 < ... < beta_S = 1.  If the target has a power, every token drawn costs S
            sums over the vocabulary, which are small beside a pass of a large model until S is in
            the tens.
        num_particles: N.
        num_moves: M, suffix moves of every particle at each rung, the last included.
        threshold: resample when ESS < threshold * N; 0 never, above 1 at every rung.
        resampler: how ancestors are drawn (`samplers.resampling`).
        cut, log_phi_max: of the moves, as in `suffix.method`.

    Returns:
        `Weighted`: strings that obey LAW 1.

    Raises:
        ValueError: if the ladder does not increase strictly from above 0 to exactly 1, a count is
            not positive, or unless alpha > 0.
    """
    betas = check_betas(ladder)
    check_counts(num_particles=num_particles, num_moves=num_moves)
    suffix.method(target)  # checks alpha, which is traced below
    moves = as_pytree(cut), log_phi_max
    return _run(key, target, betas, threshold, moves, (num_particles, num_moves), resampler)


def at_beta(target: Target, beta: Float[Array, ""]) -> Target:
    """gamma_beta."""
    plain = not target.tilted
    return dataclasses.replace(
        target,
        alpha=None if target.alpha is None else 1 + beta * (target.alpha - 1),
        potential=target.potential if plain else target.potential**beta,
    )


def log_slope(target: Target, x: State) -> Float[Array, " N"]:
    """(alpha - 1) log p + log Phi, of strings whose log_phi is that of Phi itself."""
    log_phi = x.log_phi.sum(1)
    return log_phi if target.alpha is None else scale(target.alpha - 1, x.log_prob) + log_phi


def tempered(target: Target, x: State, stage: Int[Array, ""], beta: Float[Array, ""]) -> State:
    """The strings as those of gamma_beta, the target given: their proposal's alpha, and
    Phi^beta.
    """
    x = dataclasses.replace(x, log_phi=scale(beta, x.log_phi))
    return (
        x
        if x.log_norms is None
        else at_rung(target, x, jnp.full(x.log_p.shape[0], stage, jnp.int32))
    )


@functools.partial(jax.jit, static_argnums=(5, 6))
def _run(
    key: Any,
    target: Target,
    betas: Array,
    threshold: Any,
    moves: tuple[Cut, Any],
    sizes: tuple[int, int],
    resampler: Resampler,
) -> Weighted:
    (cut, log_phi_max), (num_particles, num_moves) = moves, sizes
    draw_key, stages_key = jax.random.split(key)
    proposal = Powered(None if target.alpha is None else 1 + betas * (target.alpha - 1))
    plan, deltas = whole(target, num_moves), jnp.diff(betas, prepend=0.0)

    def stage(key: PRNGKeyArray, run: Run) -> Run:
        k, x = run.rounds, run.particles.state
        beta = betas[k]
        here = at_beta(target, beta)
        bound = None if log_phi_max is None else beta * log_phi_max
        how = suffix.method(here, proposal=proposal, cut=cut, log_phi_max=bound)
        dw = scale(deltas[k], log_slope(target, x))
        run = population.moved(run, tempered(here, x, k, beta), dw)
        run = refresh(key, here, how, plan, run, resampler, threshold)
        x = run.particles.state
        return population.moved(run, dataclasses.replace(x, log_phi=x.log_phi / beta))

    # With alpha = 1 the proposal is p, and the strings have weight 1.
    p = dataclasses.replace(target, alpha=None if target.alpha is None else jnp.float32(1))
    keys = jax.random.split(stages_key, betas.shape[0])
    run = init(p, proposal, num_particles, betas.shape[0])
    run = extended(draw_key, p, proposal, run, 0, target.max_tokens)
    out = result(population.every_round(keys, run, stage)[0])
    return dataclasses.replace(out, trace=dataclasses.replace(out.trace, beta=betas))
