"""Particle filters for state-space models written with NumPyro distributions.

    x_0 ~ initial,   x_t ~ transition(t, x_{t-1}),   y_t ~ observation(t, x_t)

A round selects first, then moves and weighs: with x_t drawn from q and ancestors from A, a
particle's weight is

    w_t = (W_a / A_a) p(x_t | x_{t-1}) p(y_t | x_t) / q(x_t | x_{t-1}, y_t)

so that E[exp(log_z)] = p(y_0..y_{T-1}) for any proposal, look-ahead, resampler and trigger, at any
number of particles. Bootstrap filter: q is the transition (Gordon, Salmond and Smith 1993).  Guided
filter: any other q.  Auxiliary filter: A looks ahead (Pitt and Shephard 1999).  One jit, one scan
over time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import as_pytree
from ppl.showing import shown

from .. import population
from ..base import Cost, Guarantee, Move, Resampler, X, bank, particles
from ..diagnostics import normalise
from ..population import Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from .laws import Law, batched, draw, is_law, log_prob_of

Proposal = Callable[[Array, X, Any], Law]
"""(t, x_{t-1}, y_t) -> the law that x_t is drawn from; it must be positive where transition times
observation is.
"""

Lookahead = Callable[[Array, X, Any], Float[Array, " N"]]
"""(t, x_t, y_{t+1}) -> log eta [N]: ancestors are drawn in proportion to W eta, and eta is divided
out again.

Finite wherever y_{t+1} is possible; log p(y_{t+1} | x_t) or an approximation of it is a good
choice.
"""


@shown
class StateSpace(NamedTuple):
    """A state-space model; t is an int32 scalar, x a population [N, ...].

    initial() -> law of x_0; transition(t, x_{t-1}) -> law of x_t, t >= 1; observation(t, x_t) ->
    law of y_t.  To vary parameters without compiling anew, or to differentiate by them, bind them
    with `jax.tree_util.Partial`.
    """

    initial: Callable[[], Law]
    transition: Callable[[Array, X], Law]
    observation: Callable[[Array, X], Law]


def begin(
    model: StateSpace, y: Any, num: int, proposal: Callable[[Any], Law] | None = None
) -> Move:
    """The move to x_0, whatever state it is given, and its weight: p(x_0) p(y_0 | x_0) / q(x_0),
    or p(y_0 | x_0) without q.

    With `assess`, so it can be pinned.
    """

    def laws() -> tuple[Law, Law | None]:
        law = batched("initial", model.initial(), num)
        return law, None if proposal is None else batched("initial_proposal", proposal(y), num)

    def sample(key: PRNGKeyArray, x: Any) -> tuple[X, Float[Array, " N"]]:
        law, guided = laws()
        new = _propose(key, law, guided, y)
        return new, _increment(model, jnp.int32(0), law, guided, new, y)

    def assess(key: PRNGKeyArray, x: Any, new: X) -> Float[Array, " N"]:
        return _increment(model, jnp.int32(0), *laws(), new, y)

    return Move(sample, assess)


def propagate(
    model: StateSpace, t: Int[Array, ""], y: Any, proposal: Proposal | None = None
) -> Move:
    """The move from x_{t-1} to x_t and its weight: p(x_t | x_{t-1}) p(y_t | x_t) / q(x_t), or p(y_t
    | x_t) without q.

    A missing y_t (a NaN in it) has factor 1, and then the transition proposes.  With `assess`, so
    it can be pinned.
    """

    def laws(x: X) -> tuple[Law, Law | None]:
        num = _size(x)
        law = batched("transition", model.transition(t, x), num)
        return law, None if proposal is None else batched("proposal", proposal(t, x, y), num)

    def sample(key: PRNGKeyArray, x: X) -> tuple[X, Float[Array, " N"]]:
        law, guided = laws(x)
        new = _propose(key, law, guided, y)
        _check_alike("the transition's draws", new, "the states it was given", x)
        return new, _increment(model, t, law, guided, new, y)

    def assess(key: PRNGKeyArray, x: X, new: X) -> Float[Array, " N"]:
        return _increment(model, t, *laws(x), new, y)

    return Move(sample, assess)


def init(
    key: PRNGKeyArray,
    model: StateSpace,
    y: Any,
    *,
    num_particles: int,
    initial_proposal: Callable[[Any], Law] | None = None,
    num_rounds: int = 0,
) -> Run:
    """The first round: x_0 and its weight given y_0.  Arguments as in `run`.

    With `num_rounds` they, and the genealogy, are written down (`population.start`).
    """
    run = population.start(particles((), num_particles), num_rounds, genealogy=num_rounds > 0)
    return settle(population.advance(key, run, begin(model, y, num_particles, initial_proposal)), y)


def step(
    key: PRNGKeyArray,
    model: StateSpace,
    run: Run,
    y: Any,
    *,
    proposal: Proposal | None = None,
    lookahead: Lookahead | None = None,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
) -> Run:
    """Round t >= 1: draw ancestors if the ESS of what they are drawn from is below `threshold` * N,
    move and weigh.

    Raises:
        ValueError: when traced, unless `lookahead` gives one number per particle.
    """
    select_key, move_key = jax.random.split(key)
    run = population.select(
        select_key, run, resampler, threshold, log_selection=log_selection(lookahead, run, y)
    )
    return settle(population.advance(move_key, run, propagate(model, run.rounds, y, proposal)), y)


def log_selection(lookahead: Lookahead | None, run: Run, y: Any) -> Float[Array, " N"] | None:
    """log W eta, what ancestors of round t are drawn from; None without a look-ahead."""
    if lookahead is None:
        return None
    p = run.particles
    log_eta = lookahead(run.rounds - 1, p.state, y)
    if jnp.shape(log_eta) != p.log_weights.shape:
        raise ValueError(
            f"expected lookahead to give log eta of shape {p.log_weights.shape}, got"
            f" {jnp.shape(log_eta)}; return one number per particle"
        )
    # Where it says nothing (a missing observation makes it NaN) there is no look-ahead; any eta is
    # exact.
    return p.log_weights + jnp.where(missing(y) | ~(log_eta < jnp.inf), 0.0, log_eta)


def settle(run: Run, y: Any) -> Run:
    """The round is over; its evidence is banked, so that long runs without resampling keep
    digits.
    """
    run = population.record(dataclasses.replace(run, particles=bank(run.particles)))
    num, one = jnp.int32(run.particles.log_weights.shape[0]), jnp.int32(1)
    asked = jnp.where(missing(y), 0, num)
    return population.end(run, Cost(tokens=num, forwards=one, depth=one, potential_calls=asked))


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_filtering.py")
def run(
    key: PRNGKeyArray,
    model: StateSpace,
    observations: Any,
    *,
    num_particles: int = 1000,
    proposal: Proposal | None = None,
    initial_proposal: Callable[[Any], Law] | None = None,
    lookahead: Lookahead | None = None,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
) -> Weighted:
    """Filter `observations` with N particles: LAW 1 for p(x_0..x_t, y_0..y_t) at every t, in one
    jit.

    Args:
        key: typed key.
        model: its functions get populations [N, ...] and return NumPyro distributions.
        observations: [T, ...], or a pytree of such for an `observation` that returns a pytree of
            laws.  A time whose observation holds a NaN is missing: its factor is 1.
        num_particles: N.
        proposal: (t, x_{t-1}, y_t) -> law of x_t: guided filter; default the transition: bootstrap
            filter.
        initial_proposal: (y_0) -> law of x_0; default `model.initial`.
        lookahead: (t, x_t, y_{t+1}) -> log eta [N]: auxiliary filter.
        resampler: how ancestors are drawn (`samplers.resampling`).
        threshold: select when the ESS of the selection probabilities is below threshold * N; 0
            never, above 1 always.

    Returns:
        `Weighted`: the states of the last round; the history holds those of every round t,
            [T, N, ...], with weights for p(x_t | y_0..y_t), and trace.log_z the estimates of
            log p(y_0..y_t).  Tokens of the cost are states drawn, forwards and depth are
            rounds, and potential_calls are observation densities evaluated.  See `moments`, and
            `samplers.latent.smoothing` for p(x_t | y_0..y_{T-1}).

    Raises:
        ValueError: if the observations have no common leading axis T >= 1, a law's batch shape is
            neither (N,) nor (), an observation is not shaped like its law's event, or a proposal
            draws states of another shape.
    """
    check_count("num_particles", num_particles)
    observations, _ = record(observations)
    options = {
        "proposal": as_pytree(proposal),
        "lookahead": as_pytree(lookahead),
        "threshold": threshold,
    }
    model, initial = StateSpace(*map(as_pytree, model)), as_pytree(initial_proposal)
    return _run(key, model, observations, initial, options, num_particles, resampler)


def record(observations: Any) -> tuple[Any, int]:
    """Observations [T, ...] as arrays, and T.

    Raises:
        ValueError: if they have no common leading axis T >= 1.
    """
    observations = jax.tree.map(jnp.asarray, observations)
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(observations)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        shapes = [leaf.shape for leaf in jax.tree.leaves(observations)]
        raise ValueError(
            "expected observations [T, ...] with one leading time axis T >= 1, got shapes"
            f" {shapes}; put time first"
            " (jnp.moveaxis), and fill times without an observation with NaN"
        )
    return observations, jax.tree.leaves(observations)[0].shape[0]


@functools.partial(jax.jit, static_argnums=(5, 6))
def _run(
    key: Any,
    model: StateSpace,
    observations: Any,
    initial_proposal: Any,
    options: dict[str, Any],
    num_particles: int,
    resampler: Resampler,
) -> Weighted:
    """`options` are those of `step` that are traced."""
    times = jax.tree.leaves(observations)[0].shape[0]
    keys = jax.random.split(key, times)

    def one(key: PRNGKeyArray, run: Run) -> Run:
        y = at_time(observations, run.rounds)
        return step(key, model, run, y, resampler=resampler, **options)

    first = init(
        keys[0],
        model,
        at_time(observations, 0),
        num_particles=num_particles,
        initial_proposal=initial_proposal,
        num_rounds=times,
    )
    return every_round(keys[1:], first, one)


def every_round(keys: Key[Array, " R"], first: Run, one: population.Round) -> Weighted:
    """The filter's result after its first round and one for every key."""
    run, later = population.every_round(keys, first, one, lambda run: run.particles.state)
    states = jax.tree.map(
        lambda x, xs: jnp.concatenate([x[None], xs]), first.particles.state, later
    )
    return population.result(run, run.particles.state, drawn=states)


def at_time(observations: Any, t: int | Int[Array, ""]) -> Any:
    """The observation y_t."""
    return jax.tree.map(lambda leaf: leaf[t], observations)


def moments(states: X, log_weights: Float[Array, "T N"]) -> tuple[X, X]:
    """Weighted means and variances [T, ...] of populations [T, N, ...]: (mean, variance),
    componentwise.

    Of `history.drawn` with `history.log_weights` for the filter p(x_t | y_0..y_t); of
    `smoothing.trajectories(history)` with the last weights at every t for the smoother.  NaN where
    all particles are dead.
    """
    weights = jax.vmap(normalise)(log_weights)
    weights = jnp.where(weights.sum(1, keepdims=True) > 0, weights, jnp.nan)

    def mean(leaf: Array) -> Array:
        return jnp.einsum("tn,tn...->t...", weights, leaf.astype(weights.dtype))

    means = jax.tree.map(mean, states)
    return means, jax.tree.map(lambda leaf, m: mean((leaf - m[:, None]) ** 2), states, means)


def _propose(key: PRNGKeyArray, law: Law, guided: Law | None, y: Any) -> X:
    if guided is None:
        return draw(key, law)
    # A proposal cannot be asked about an observation that is not there.
    drawn, blind = draw(key, guided), draw(key, law)
    _check_alike("the proposal's draws", drawn, "the model's", blind)
    return jax.tree.map(lambda a, b: jnp.where(missing(y), b, a), drawn, blind)


def _increment(
    model: StateSpace, t: Int[Array, ""], law: Law, guided: Law | None, x: X, y: Any
) -> Float[Array, " N"]:
    """log p(x | before) - log q(x) + log p(y | x), without what cancels or is missing."""
    seen = batched("observation", model.observation(t, x), _size(x))
    _check_events(seen, y)
    log_weight = log_prob_of(seen, y)
    if guided is not None:
        log_weight = log_weight + log_prob_of(law, x) - log_prob_of(guided, x)
    return jnp.where(missing(y), 0.0, log_weight).astype(jnp.float32)


def _size(x: X) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def missing(y: Any) -> Bool[Array, ""]:
    leaves = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.isnan(leaf).any() for leaf in leaves), jnp.bool_(False))


def _check_events(law: Law, y: Any) -> None:
    laws, structure = jax.tree.flatten(law, is_leaf=is_law)
    expected = [one.event_shape for one in laws]
    got = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    if structure != jax.tree.structure(y) or expected != got:
        raise ValueError(
            f"expected observations [T, ...] that hold at each time the events {expected} of the"
            " observation law, got"
            f" {got}; put time first, and declare the axes of one observation by .to_event(k)"
        )


def _check_alike(what: str, x: X, expected_of: str, like: X) -> None:
    def describe(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)

    if describe(x) != describe(like):
        raise ValueError(
            f"expected {what} to be shaped like {expected_of}, {describe(like)}, got {describe(x)};"
            " give both laws the"
            " same pytree, event shape and dtype"
        )
