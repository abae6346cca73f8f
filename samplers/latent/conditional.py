"""Conditional particle filters and particle Gibbs for state-space models.

A particle filter whose last particle follows a given path, the reference x': it is weighed like
everybody else, the others may choose it when they resample, and it stays.  With x' from the
smoothing law p(x_0..x_{T-1} | y_0..y_{T-1}), a path drawn from the final weights has that law
again: a Markov kernel over paths, exact at any number of particles.  Andrieu, Doucet and Holenstein
(2010).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import as_pytree, register_dataclass

from .. import kernels, population
from ..base import Guarantee, Kernel, Move, X, holding, particles
from ..population import Run
from ..registry import sampler
from ..resampling import multinomial, pinned_multinomial
from ..results import Weighted
from . import filtering, smoothing
from .filtering import Lookahead, Proposal, StateSpace, at_time
from .laws import Law, batched, draw, log_prob_of


class Options(TypedDict, total=False):
    """What `filtering.run` takes but for the resampler; conditional filters have their own."""

    proposal: Proposal | None
    initial_proposal: Callable[[Any], Law] | None
    lookahead: Lookahead | None
    threshold: float | Float[Array, ""]


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_conditional.py")
def run(
    key: PRNGKeyArray,
    model: StateSpace,
    observations: Any,
    reference: X,
    *,
    num_particles: int = 32,
    ancestor_sampling: bool = False,
    **options: Unpack[Options],
) -> Weighted:
    """A particle filter in which the last of N particles follows `reference`.

    For a reference from the smoothing law pi, E[ sum_i W_i f(path_i) ] = E_pi[f] and
    E[log Z-hat] >= log p(y_0..y_{T-1}).

    With ancestor sampling the reference's past is drawn anew whenever the others resample, before
    time t from

        w_i p(x'_t | x^i_{t-1}),

    N transition densities more a round, and chains that mix at early times too (Lindsten, Jordan
    and Schon 2014, arXiv 1401.0604).

    Args:
        key: typed key.
        model, observations: as in `filtering.run`.
        reference: a path [T, ...], of positive density; states are pytrees alike.
        num_particles: N, the reference included.
        ancestor_sampling: draw the reference's ancestors anew.  It needs a transition with a
            density.
        options: as in `filtering.run`, but for `resampler`: it is conditional multinomial here.  A
            proposal that cannot draw the reference gives it weight 0; its slot then goes on from a
            living particle.

    Returns:
        `Weighted`, as of `filtering.run`: paths are `smoothing.trajectories(out.history)`, weighted
        by `out.log_weights`; the last is the reference, unless its ancestor was drawn anew.

    Raises:
        ValueError: if the reference is not one state for each of T times, shaped as the model
            draws it, or as in `filtering.run`.
    """
    how = _method(model, observations, num_particles, options)
    return _run(key, how, _paths_of(how, reference, ()), num_particles, ancestor_sampling)


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_conditional.py")
def kernel(
    model: StateSpace,
    observations: Any,
    *,
    num_particles: int = 32,
    ancestor_sampling: bool = False,
    batch_size: int = 1,
    **options: Unpack[Options],
) -> Kernel:
    """Particle Gibbs: chains over paths [C, T, ...] that leave p(x_0..x_{T-1} | y_0..y_{T-1})
    invariant at any N >= 1.

    `kernels.conditional` of conditional SMC: a sweep runs it on the chain's path and draws the next
    one from the final weights; N = 1 stays, and so does a chain whose population is all dead.
    Paths to start from are a filter's: `smoothing.backward_sample(key, model, out.history, C)`
    with time moved behind chains.  Where the model has parameters to be inferred too, a step draws
    them given the path, and the path by `run` given them.

    Args:
        model, observations, num_particles, ancestor_sampling, options: as in `run`.
        batch_size: chains that run at a time; the others wait.

    Raises:
        ValueError: as in `run`.
    """
    how = _method(model, observations, num_particles, options)
    around = holding(_around, how, num_particles=num_particles, ancestor_sampling=ancestor_sampling)
    sweep = kernels.conditional(around, batch_size=batch_size)
    return Kernel(Partial(_checked, how), sweep.step)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Method:
    """What the particles are moved by."""

    model: StateSpace
    observations: Any
    initial_proposal: Any
    proposal: Any
    lookahead: Any
    threshold: float | Float[Array, ""]


def _method(model: StateSpace, observations: Any, num_particles: int, options: Options) -> _Method:
    check_count("num_particles", num_particles)
    return _Method(
        model=StateSpace(*map(as_pytree, model)),
        observations=filtering.record(observations)[0],
        initial_proposal=as_pytree(options.get("initial_proposal")),
        proposal=as_pytree(options.get("proposal")),
        lookahead=as_pytree(options.get("lookahead")),
        threshold=options.get("threshold", 0.5),
    )


def _checked(how: _Method, paths: X) -> X:
    """C paths [C, T, ...] of the model, as `_paths_of`."""
    return _paths_of(how, paths, jnp.shape(jax.tree.leaves(paths)[0])[:1])


def _paths_of(how: _Method, paths: X, num: tuple[int, ...]) -> X:
    """Paths [*num, T, ...] in the types that the model draws; raises ValueError if they have other
    shapes, or are of another kind, integers in the place of reals say.
    """
    _, times = filtering.record(how.observations)
    law = batched("initial", how.model.initial(), 1)
    one = jax.eval_shape(lambda key: draw(key, law), jax.random.key(0))

    def said(x: Any, *lead: int) -> str:
        return f"{jnp.result_type(x)}{[*lead, *jnp.shape(x)[1 if lead else 0 :]]}"

    def alike(state: Any, x: Any) -> bool:
        kinds = {np.dtype(jnp.result_type(leaf)).kind for leaf in (state, x)}
        return len(kinds) == 1 and jnp.shape(x) == (*num, times, *state.shape[1:])

    same = jax.tree.structure(one) == jax.tree.structure(paths)
    if not same or not all(jax.tree.leaves(jax.tree.map(alike, one, paths))):
        expected = jax.tree.map(lambda state: said(state, *num, times), one)
        raise ValueError(
            f"expected a state for each of {times} times, {expected}, as the model draws it, got"
            f" {jax.tree.map(said, paths)}; a filter's paths are"
            " smoothing.trajectories(out.history) [T, N, ...], of which [:, i] is one"
        )
    return jax.tree.map(lambda state, x: jnp.asarray(x, state.dtype), one, paths)


def _around(key: PRNGKeyArray, how: _Method, path: X, **options: Any) -> Weighted:
    """Conditional SMC on one path [T, ...], whose particles are paths [N, T, ...]."""
    out = _filter(key, how, path, **options)
    assert out.history is not None
    paths = smoothing.trajectories(out.history)
    return dataclasses.replace(out, samples=jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), paths))


def _filter(
    key: PRNGKeyArray, how: _Method, path: X, num_particles: int, ancestor_sampling: bool
) -> Weighted:
    times = jax.tree.leaves(path)[0].shape[0]
    keys = jax.random.split(key, times)

    def one(key: PRNGKeyArray, run: Run) -> Run:
        select_key, move_key = jax.random.split(key)
        y, here = at_time(how.observations, run.rounds), at_time(path, run.rounds)
        resampler = pinned_multinomial
        if ancestor_sampling:
            resampler = functools.partial(_adopt, how.model, run, here)
        selection = filtering.log_selection(how.lookahead, run, y)
        run = population.select(select_key, run, resampler, how.threshold, log_selection=selection)
        move = _pinned(filtering.propagate(how.model, run.rounds, y, how.proposal), here)
        return filtering.settle(population.advance(move_key, run, move), y)

    y, here = at_time(how.observations, 0), at_time(path, 0)
    run = population.start(particles((), num_particles), times, genealogy=True)
    move = _pinned(filtering.begin(how.model, y, num_particles, how.initial_proposal), here)
    first = filtering.settle(population.advance(keys[0], run, move), y)
    return filtering.every_round(keys[1:], first, one)


_run = functools.partial(jax.jit, static_argnums=(3, 4))(_filter)


def _pinned(move: Move, state: X) -> Move:
    """The move whose last particle comes to `state`, and is weighed as if it had been drawn."""

    def sample(key: PRNGKeyArray, x: X) -> tuple[X, Float[Array, " N"]]:
        draw_key, assess_key = jax.random.split(key)
        drawn, _ = move.sample(draw_key, x)
        y = jax.tree.map(lambda rows, row: rows.at[-1].set(row), drawn, state)
        assert move.assess is not None
        return y, move.assess(assess_key, x, y)

    return Move(sample)


def _adopt(
    model: StateSpace, run: Run, here: X, key: PRNGKeyArray, log_probs: Float[Array, " N"], num: int
) -> Int[Array, " N"]:
    """Conditional multinomial resampling in which the reference draws its ancestor too.

    By the weights, even where the others are drawn from other probabilities: the carried ratio
    makes up for it.
    """
    others_key, own_key = jax.random.split(key)
    ancestors = pinned_multinomial(others_key, log_probs, num)
    p = run.particles
    law = batched("transition", model.transition(run.rounds, p.state), num)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), here)
    log_weights = p.log_weights + log_prob_of(law, rows)
    own = multinomial(own_key, log_weights, 1)[0]
    return jnp.where(jnp.isneginf(log_weights).all(), ancestors, ancestors.at[-1].set(own))
