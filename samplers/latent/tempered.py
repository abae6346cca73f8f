"""Tempered SMC: from the prior to the posterior of any NumPyro model along pi_beta ~ prior *
likelihood^beta.

A stage raises beta to beta', weighs, selects, and rejuvenates with a Markov kernel that leaves
pi_beta' invariant:

    dw = (beta' - beta) log likelihood(x)
    then ancestors in proportion to w,  then x ~ K_beta'(. | ancestor)

so that exp(log_z) estimates the evidence, the integral of prior * likelihood (Del Moral, Doucet and
Jasra 2006). Waste-free (Dau and Chopin 2022, arXiv 2011.02328): fewer ancestors, and all states of
their chains go on.

Everything happens on the unconstrained space R^D, where kernels are `blackjax` algorithms over one
position [D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count, check_counts
from ppl.pytrees import as_pytree

from .. import population
from ..base import Cost, Guarantee, Kernel, Move, Particles, Resampler, particles, sequence
from ..population import ALWAYS, Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from ..strings.ladders import check_betas
from . import rejuvenation
from .plans import Adaptive, Fixed
from .posterior import Density, LogDensity, density, join_static, split_static
from .rejuvenation import (
    AdaptiveKernel,
    FixedKernel,
    Population,
    chains,
    copies,
    random_walk,
    rejuvenate,
    validity,
)


class Options(TypedDict, total=False):
    """How `run` and `adaptive` may differ.

    num_particles: N; 1000 by default.
    num_steps: kernel steps in every stage; 5 by default.
    waste_free: draw N / (num_steps + 1) ancestors in every stage, and keep them and all states of
        their chains.
    resampler: how ancestors are drawn (`samplers.resampling`); systematic by default.
    model_kwargs: more arguments of the model.
    """

    num_particles: int
    num_steps: int
    waste_free: bool
    resampler: Resampler
    model_kwargs: dict[str, Any] | None


def reweigh(delta: Float[Array, ""]) -> Move:
    """The move that stays, weighed from pi_beta to pi_(beta + delta)."""
    return Move(lambda key, x: (x, jnp.where(delta > 0, delta * x.log_likelihood, 0.0)))


def tempering(ladder: Float[Array, " K"], kernel: Callable[[Float[Array, ""]], Move]) -> Move:
    """The move from prior to posterior by reweigh(beta_k - beta_(k-1)) and kernel(beta_k) in turn,
    without selecting.

    This is annealed importance sampling (Neal 2001); `run` is the same with selection in between.
    `ladder` ends at 1; kernel(beta) is a move over `Population` that leaves pi_beta invariant.
    """

    def sample(key: PRNGKeyArray, x: Population) -> tuple[Population, Float[Array, " N"]]:
        def stage(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            x, total = carry
            stage_key, beta, delta = inputs
            x, dw = sequence(reweigh(delta), kernel(beta)).sample(stage_key, x)
            return (x, (total + dw).astype(total.dtype)), None

        inputs = (jax.random.split(key, ladder.shape[0]), ladder, jnp.diff(ladder, prepend=0.0))
        return jax.lax.scan(stage, (x, jnp.zeros_like(x.log_likelihood)), inputs)[0]

    return Move(sample)


def init(key: PRNGKeyArray, of: Density, num_particles: int) -> Particles:
    """N draws from the prior, of weight 1."""
    position = jax.vmap(of.sample_prior)(jax.random.split(key, num_particles))
    x = Population(
        position,
        jax.vmap(of.log_likelihood)(position).astype(jnp.float32),
        acceptance=jnp.zeros(num_particles, jnp.float32),
        evaluations=jnp.ones(num_particles, jnp.int32),
    )
    return particles(x, num_particles)


def step(
    key: PRNGKeyArray,
    run: Run,
    move: Move,
    *,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
) -> Run:
    """Select from a population weighed for pi_beta, and rejuvenate it by a move that leaves pi_beta
    invariant: `rejuvenation.rejuvenate`, or `waste_free` for a resampler of `copies`.
    """
    select_key, move_key = jax.random.split(key)
    run = population.select(select_key, run, resampler, threshold)
    return population.advance(move_key, run, move)


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_tempered.py")
def run(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *model_args: Any,
    ladder: Sequence[float | int] | Float[Any, " S"],
    kernel: FixedKernel,
    threshold: float | Float[Array, ""] = 0.5,
    **options: Unpack[Options],
) -> Weighted:
    """Tempered SMC on a fixed ladder with a fixed kernel: E[exp(log_z)] is the evidence at any
    number of particles.

    That holds because neither ladder nor kernel looks at the particles; `adaptive` gives it up for
    less tuning.

    Args:
        key: typed key.
        model, model_args: a NumPyro model; its observed sites are the likelihood.  Arrays among the
            arguments may change without compiling anew.
        ladder: beta_1 < ... < beta_S = 1.
        kernel: (log density, beta) -> blackjax algorithm, e.g. lambda f, beta: blackjax.hmc(f, 0.1,
            jnp.ones(D), 10).
        threshold: select when ESS < threshold * N; a waste-free run always selects.
        options: see `Options`.

    Returns:
        `Weighted`: every latent and deterministic site by name, [N, ...], on its constrained space.
            Rounds are stages, and trace.beta is the ladder.  Invalid are positions whose log
            likelihood was NaN or +inf.  Forwards and depth of the cost are kernel steps one after
            another, potential_calls are evaluations of the likelihood or its gradient over all
            particles.

    Raises:
        ValueError: if the ladder does not increase strictly from above 0 to exactly 1, a count is
            not positive, N is not a multiple of num_steps + 1 in a waste-free run, or for a model
            that `density` cannot split.
    """
    betas = check_betas(ladder)
    plan = Fixed(betas, as_pytree(kernel))
    return _checked(key, model, model_args, plan, threshold, betas.shape[0], **options)


@sampler(Guarantee.CONSISTENT, proof="tests/samplers/latent/test_tempered.py")
def adaptive(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    *model_args: Any,
    kernel: AdaptiveKernel | None = None,
    ess_fraction: float = 0.5,
    max_stages: int = 100,
    **options: Unpack[Options],
) -> Weighted:
    """Tempered SMC whose ladder, and kernel, are tuned to the particles of the moment.

    Every stage goes as far as an ESS of `ess_fraction` * N allows (`next_beta`), the last to
    exactly 1; all select. Tuning by the particles that are then weighed and moved biases exp(log_z)
    by O(1/N) (Beskos, Jasra, Kantas and Thiery 2016, arXiv 1306.6462): consistent, not unbiased.
    For an unbiased estimate, pass the betas found here to `run`, with a fresh key.

    Args:
        kernel: (log density, weighted population) -> blackjax algorithm; default `random_walk()`.
        ess_fraction: in (0, 1).
        max_stages: S; should they not suffice, the last jumps to 1 below the wanted ESS, and the
            result says so in details["cut"].
        Others as in `run`.

    Returns, raises:
        As `run`; ValueError also for an `ess_fraction` outside (0, 1).
    """
    check_count("max_stages", max_stages)
    if not 0 < ess_fraction < 1:
        raise ValueError(
            f"expected ess_fraction in (0, 1), got {ess_fraction}; 0.5 is usual, 0.9 takes more"
            " stages"
        )
    tuned = as_pytree(random_walk() if kernel is None else kernel)
    plan = Adaptive(jnp.float32(ess_fraction), tuned)
    return _checked(key, model, model_args, plan, ALWAYS, max_stages, **options)


def _checked(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    model_args: tuple,
    plan: Fixed | Adaptive,
    threshold: float | Float[Array, ""],
    max_stages: int,
    *,
    num_particles: int = 1000,
    num_steps: int = 5,
    waste_free: bool = False,
    resampler: Resampler = systematic,
    model_kwargs: dict[str, Any] | None = None,
) -> Weighted:
    check_counts(num_particles=num_particles, num_steps=num_steps)
    move, length = rejuvenate, num_steps + 1
    if waste_free:
        if num_particles % length:
            raise ValueError(
                f"expected num_particles to be a multiple of num_steps + 1 = {length} in a"
                f" waste-free run, got {num_particles}; pass e.g."
                f" num_particles={(num_particles // length + 1) * length}"
            )
        move, resampler, threshold = rejuvenation.waste_free, copies(resampler, length), ALWAYS
    sizes = num_particles, max_stages, num_steps
    arguments = split_static((model_args, model_kwargs or {}))
    return _run(key, model, *arguments, plan, threshold, sizes, move=move, resampler=resampler)


@functools.partial(jax.jit, static_argnames=("model", "static", "sizes", "move", "resampler"))
def _run(
    key: Any,
    model: Any,
    arrays: Any,
    static: Any,
    plan: Fixed | Adaptive,
    threshold: Any,
    sizes: tuple[int, int, int],
    *,
    move: Callable[[Kernel, LogDensity, int], Move],
    resampler: Resampler,
) -> Weighted:
    args, kwargs = join_static(arrays, static)
    of = density(model, *args, **kwargs)
    num_particles, max_stages, num_steps = sizes
    prior_key, stages_key = jax.random.split(key)

    def one(key: PRNGKeyArray, run: Run) -> Run:
        before, k = _beta(run), run.rounds
        reachable = plan.reachable(run.particles, before, k)
        beta = jnp.where(k == max_stages - 1, 1.0, reachable)
        run = population.advance(key, run, reweigh(beta - before))
        run = population.record(run)
        kernel = chains(plan.algorithm(of.at(beta), beta, run.particles))
        # To weigh has drawn nothing: the key is still to be used.
        moving = move(kernel, of.log_likelihood, num_steps)
        run = step(key, run, moving, resampler=resampler, threshold=threshold)
        x = run.particles.state
        run = population.note(run, beta=beta, cut=beta > reachable, acceptance=x.acceptance.mean())
        return population.end(run, _cost(num_steps, x))

    fresh = init(prior_key, of, num_particles)
    run = population.start(
        fresh,
        max_stages,
        beta=jnp.float32(0),
        cut=jnp.bool_(False),
        acceptance=jnp.float32(0),
    )
    run = population.moved(run, fresh.state, validity(fresh.state))
    run = population.spend(run, _cost(0, fresh.state))
    run = population.rounds(
        jax.random.split(stages_key, max_stages), run, one, lambda run: _beta(run) < 1
    )
    return _result(of, run)


def _beta(run: Run) -> Float[Array, ""]:
    """Where the population is."""
    return jnp.where(run.rounds > 0, run.rows["beta"][run.rounds - 1], 0.0)


def _cost(num_steps: int, x: Population) -> Cost:
    steps, asked = jnp.int32(num_steps), x.evaluations.sum(dtype=jnp.int32)
    return Cost(forwards=steps, depth=steps, potential_calls=asked)


def _result(of: Density, run: Run) -> Weighted:
    samples = jax.vmap(of.constrain)(run.particles.state.position)
    return population.result(run, samples, details={"cut": run.rows["cut"].any()})
