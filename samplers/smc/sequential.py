"""Sequential Monte Carlo over strings: resample where the weights have degenerated, extend every
particle, weigh.

With gamma_t(x_1:t) = p(x_1:t)^alpha Phi_t(x_1:t), a token drawn from q adds

    log gamma_t(x_1:t) - log gamma_{t-1}(x_1:t-1) - log q(x_t | x_1:t-1)

to a particle's log-weight; strings that have ended keep theirs and stay in the pool.  E[exp(log_z)]
= Z at any number of particles.  One jit, one prefill; the loop ends when every string has ended.  A
round is a token, or a step of text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count, check_function
from ppl.pytrees import as_pytree, register_dataclass
from ppl.steps import Steps
from ppl.target import Target

from .. import population
from ..base import Guarantee, Particles, Resampler, check_resampler, holding, particles
from ..calling import heeding, public
from ..population import Run
from ..registry import sampler
from ..resampling import systematic
from ..results import Weighted
from ..strings import costs, extending, growing
from ..strings.prompts import first_of, run_each
from ..strings.proposals import Law, Proposal, as_proposal, locally_optimal
from ..strings.selection import Selection, by_weight
from . import distinct

SELECTION = "(key, target, particles, round)"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """How a run draws, selects and resamples: the options of `run` (see there), as one pytree."""

    proposal: Proposal
    selection: Selection
    threshold: float | Float[Array, ""]
    steps: Steps | None
    resampler: Resampler = dataclasses.field(metadata={"static": True})
    block_size: int | None = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})

    def max_rounds(self, target: Target) -> int:
        """R, the most rounds that a run can take."""
        return target.max_tokens if self.steps is None else self.steps.max_rounds(target.max_tokens)

    def width(self, target: Target) -> int:
        """K, the most tokens that a round can draw for a string."""
        return 1 if self.steps is None else self.steps.max_step_tokens(target.max_tokens)


class RoundOptions(TypedDict, total=False):
    """How the rounds of `run` and of the samplers over it may differ: see `run`, which says what
    each is.  LAW 1 holds for all.
    """

    proposal: Proposal | Law
    resampler: Resampler
    threshold: float | Float[Array, ""]
    selection: Selection
    block_size: int | None
    mesh: Mesh | None


class Options(RoundOptions, total=False):
    """Those, and what a round is."""

    steps: Steps | None


def method(
    target: Target,
    *,
    num_particles: int = 32,
    proposal: Proposal | Law = locally_optimal,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
    selection: Selection = by_weight,
    steps: Steps | None = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
) -> Method:
    """Check and bind the options of `run` to a target's strings."""
    check_count("num_particles", num_particles)
    check_resampler(resampler)
    check_function("selection", selection, SELECTION, "samplers.strings.selection.by_weight")
    if not (mesh is None or isinstance(mesh, Mesh)):
        raise ValueError(
            f"expected a jax.sharding.Mesh, got {mesh!r}; pass"
            " Mesh(jax.devices(), ('particles',)), whose axes may have any names"
        )
    if block_size is None or block_size < num_particles:
        _check_divides("block_size", block_size, num_particles)
    _check_divides("the size of the mesh", None if mesh is None else mesh.size, num_particles)
    bound = None if steps is None else steps.within(target.space)
    return Method(
        as_proposal(proposal), as_pytree(selection), threshold, bound, resampler, block_size, mesh
    )


def _check_divides(name: str, size: int | None, num_particles: int) -> None:
    if size is not None and (size < 1 or num_particles % size):
        fits = -(-num_particles // max(size, 1)) * max(size, 1)
        raise ValueError(
            f"expected {name} to divide the number of particles, got {size} and {num_particles};"
            f" pass num_particles={fits}"
        )


def init(target: Target, how: Method, num_particles: int, *, history: bool = False) -> Run:
    """A population of empty strings."""
    none = {"drawn": jnp.full((num_particles, how.width(target)), -1, jnp.int32)}
    run = population.start(
        _spread(how, particles(growing.start(target, how.proposal, num_particles), num_particles)),
        how.max_rounds(target),
        genealogy=history,
        active=jnp.int32(0),
        missing=jnp.float32(0),
        **(none if history else {}),
    )
    return population.spend(run, costs.prompt(target, how.proposal))


def advance(
    key: PRNGKeyArray,
    target: Target,
    run: Run,
    how: Method,
    *,
    pinned: growing.Follow | None = None,
) -> Run:
    """Extend and weigh: what follows the selection, and the whole of the first round."""
    length = run.particles.state.sequences.length
    move = extending.extend(
        target, how.proposal, how.steps, follow=pinned, block_size=how.block_size
    )
    x, dw = move.sample(key, run.particles.state)
    run = population.moved(run, x, dw, x.invalid)
    run = population.record(dataclasses.replace(run, particles=_spread(how, run.particles)))
    run = population.note(
        run,
        active=x.active.sum(dtype=jnp.int32),
        missing=x.missing.max(),
        drawn=_drawn(x, length, how.width(target)),
    )
    spent = costs.of_round(target, how.proposal, x, pinned)
    # Every block of rows takes passes of its own.
    blocks = max(length.shape[0] // (how.block_size or length.shape[0]), 1)
    return population.end(run, dataclasses.replace(spent, forwards=spent.forwards * blocks))


def _drawn(x: growing.Growing, start: Int[Array, " N"], width: int) -> Int[Array, "N K"]:
    """The tokens of this round, from position `start` on; -1 where none was drawn."""
    offset = jnp.arange(width, dtype=jnp.int32)
    place = jnp.minimum(start[:, None] + offset, x.sequences.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(x.sequences.tokens, place, axis=1)
    return jnp.where(offset < x.drawn[:, None], tokens, -1)


def first(
    key: PRNGKeyArray,
    target: Target,
    run: Run,
    how: Method,
    *,
    pinned: growing.Follow | None = None,
) -> Run:
    """The first round, which has nothing to select."""
    return advance(jax.random.split(key, 3)[2], target, run, how, pinned=pinned)


def step(
    key: PRNGKeyArray,
    target: Target,
    run: Run,
    how: Method,
    *,
    pinned: growing.Follow | None = None,
    ancestors_of: Callable[[Particles], Resampler] | None = None,
) -> Run:
    """A round after the first: select by the ESS of what is drawn from, then `advance`.

    `ancestors_of` makes a resampler out of the particles, if it must know more than their weights
    (ancestor sampling).
    """
    select_key, resample_key, move_key = jax.random.split(key, 3)
    p, log_selection, spent = how.selection(select_key, target, run.particles, run.rounds)
    run = population.select(
        resample_key,
        population.spend(dataclasses.replace(run, particles=p), spent),
        how.resampler if ancestors_of is None else ancestors_of(p),
        how.threshold,
        reorder=functools.partial(growing.reorder, target, how.proposal),
        log_selection=log_selection,
    )
    return advance(move_key, target, run, how, pinned=pinned)


def _spread(how: Method, p: Particles) -> Particles:
    """Rows of the state over the devices of a mesh; every device keeps all weights, and so draws
    the same ancestors.
    """
    if how.mesh is None:
        return p
    rows, whole = (
        NamedSharding(how.mesh, PartitionSpec(axes)) for axes in (how.mesh.axis_names, None)
    )
    state = jax.lax.with_sharding_constraint(p.state, rows)
    return Particles(state, jax.lax.with_sharding_constraint(p.log_weights, whole), p.log_z)


def result(run: Run) -> Weighted:
    """The population of a run (finished or not) with all its evidence banked."""
    x, worst = run.particles.state, run.rows["missing"].max()
    return population.result(
        run,
        x.sequences,
        log_prob=x.log_prob,
        log_density=x.log_density,
        missing_support=worst,
    )


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_sequential.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_particles: int = 32,
    history: bool = False,
    **options: Unpack[Options],
) -> Weighted:
    """Sequential Monte Carlo for gamma(x) = p(x)^alpha Phi(x), in one jit.

    Args:
        key: typed key.
        target: a target, or a list of targets over one model (one per prompt, `lm.given_each`),
            whose rows go through the model together, each prompt with its own key (of
            split(key, P)), resampling and log_z: the same strings as alone.  Then every leaf of the
            result has the list's axis first.
        num_particles: N.
        history: record the genealogy.

    Without options, a target with a power (`p ** alpha`) is run by `distinct`, whose particles are
    all different: independent ones then take the same likely tokens, and miss what these cannot
    lead to (see there for what was measured).  All particles are chosen together there, so a mesh
    or a `block_size` below N, which part them, are options that make them independent.

    Options, all of which may differ between calls without breaking LAW 1:
        proposal: how tokens are drawn (`samplers.strings.proposals`); by default locally optimal.
        resampler: how ancestors are drawn (`samplers.resampling`); by default systematic.
        threshold: resample when ESS < threshold * N; 0 never (importance sampling), above 1 before
            every round.
        selection: from which probabilities (`samplers.strings.selection`); by default the weights.
        steps: a `ppl.Steps`: a round is a step of text, and strings wait for each other at its end;
            by default a token.
        block_size: rows that go through the model at a time; bounds memory at some cost of time.
            Of a list, the prompts whose particles fit run together, the others after them; by
            default as many as `prompts.rows_together` says.
        mesh: devices that share the rows, over all its axes, whatever their names; the same strings
            as on one device.

    Returns:
        `Weighted`: strings that obey LAW 1; its history holds tokens [R, N, K].  A missing support
            above 0 is that of a truncated proposal (`proposals.Truncated`).

    Raises:
        ValueError: if `num_particles` < 1 or is no multiple of `block_size` and the size of `mesh`,
            or the targets of a list have different models, horizons or padded prompts.
    """
    if _by_default(first_of(target), num_particles, options):
        counts = {"num_particles": num_particles, "history": history}
        return distinct.run(key, target, batch_size=options.get("block_size"), **counts)
    how = method(first_of(target), num_particles=num_particles, **options)
    one = holding(_run, how, num_particles=num_particles, history=history)
    return run_each(key, one, target, num_rows=num_particles, batch_size=how.block_size)


@public
def iterate(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_particles: int = 32,
    history: bool = False,
    **options: Unpack[Options],
) -> Iterator[Weighted]:
    """`run`, one round at a time: yields the population after every round, for watching a run.

    The last result is that of `run` with the same key.  Arguments as in `run`, for one target.
    """
    if _by_default(target, num_particles, options):
        yield from distinct.iterate(key, target, num_particles=num_particles, history=history)
        return
    how = method(target, num_particles=num_particles, **options)
    run = _init(target, how, num_particles, history)
    for r, round_key in enumerate(jax.random.split(key, how.max_rounds(target))):
        run = heeding(target, _step if r else _first, round_key, target, run, how)
        yield _result(run)
        if not run.particles.state.active.any():
            return


def _by_default(target: Target, num_particles: int, options: Options) -> bool:
    """Whether `run` is `distinct.run`: the target has a power, and nothing says otherwise.  That a
    whole population goes through the model at a time says nothing.
    """
    others = [option for name, option in options.items() if name != "block_size"]
    whole = (options.get("block_size") or num_particles) >= num_particles
    return target.alpha is not None and whole and all(option is None for option in others)


def loop(
    key: PRNGKeyArray,
    target: Target,
    how: Method,
    num_particles: int,
    *,
    history: bool = False,
    pinned: growing.Follow | None = None,
    ancestors_of: Callable[[Particles], Resampler] | None = None,
) -> Run:
    """All rounds of a run, to be traced; `pinned` and `ancestors_of` as in `step`."""
    keys = jax.random.split(key, how.max_rounds(target))
    run = init(target, how, num_particles, history=history)
    return population.rounds(
        keys,
        first(keys[0], target, run, how, pinned=pinned),
        lambda key, run: step(key, target, run, how, pinned=pinned, ancestors_of=ancestors_of),
        lambda run: run.particles.state.active.any(),
    )


@functools.partial(jax.jit, static_argnames=("num_particles", "history"))
def _run(key: Any, how: Method, target: Target, *, num_particles: int, history: bool) -> Weighted:
    return result(loop(key, target, how, num_particles, history=history))


_init = jax.jit(
    lambda target, how, num, history: init(target, how, num, history=history), static_argnums=(2, 3)
)
_result = jax.jit(result)
# The logits of the first round have no place in what comes out of it.
_first = jax.jit(first)
_step = jax.jit(step, donate_argnums=2)
