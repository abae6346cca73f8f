"""Sequential Monte Carlo over strings: extend every particle by a token, weigh, resample when the weights degenerate.

With gamma_t(x_1:t) = p(x_1:t)^alpha Phi_t(x_1:t), a token drawn from q adds

    log gamma_t(x_1:t) - log gamma_{t-1}(x_1:t-1) - log q(x_t | x_1:t-1)

to a particle's log-weight; strings that have ended keep theirs and stay in the pool.  E[exp(log_z)] = Z at any number
of particles.  One jit, one prefill; the loop ends when every string has ended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.ancestral import append
from ppl.draw import categorical
from ppl.lm import Cache, check_count, take_rows
from ppl.potential import Product, State
from ppl.sequences import Sequences, empty
from ppl.target import Target

from .base import Cost, Guarantee, Move, Particles, Resampler, apply, bank, no_cost, particles, resample
from .diagnostics import ess, log_z_std_error
from .proposals import Proposal, locally_optimal
from .registry import sampler
from .resampling import systematic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextState:
    """A population of growing strings; every leaf has N first.

    `cache` holds all tokens but the last.  `invalid` marks rows whose last potential factor was NaN or +inf.
    """

    sequences: Sequences
    active: Bool[Array, " N"]
    invalid: Bool[Array, " N"]
    cache: Cache
    potential: State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened at each token position [T]; positions after the run's last step hold 0 and False.

    ess, log_z (the running estimate), resampled, and active (strings still growing after the step).
    """

    ess: Float[Array, " T"]
    log_z: Float[Array, " T"]
    resampled: Bool[Array, " T"]
    active: Int[Array, " T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The genealogy: at step t slot i drew tokens[t, i] and weighed log_weights[t, i]; then it became a copy of slot
    ancestors[t, i]."""

    tokens: Int[Array, "T N"]
    log_weights: Float[Array, "T N"]
    ancestors: Int[Array, "T N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """A weighted population of strings (LAW 1) and what it took.

    Attributes:
        sequences: N strings.
        log_weights: [N], scaled so that mean_i exp(w_i) = 1; -inf is dead.
        log_z: [] log of the unbiased estimate of Z; -inf if all particles are dead.
        log_z_std_error: [] its standard error from this run (`diagnostics.log_z_std_error`).
        steps: [] token positions that were run.
        num_invalid: [] particles killed because a potential gave NaN or +inf, its Python function raised, or the
            model's logits were NaN.
        cost: what the run spent.
        trace: per-step diagnostics.
        history: the genealogy, if asked for.
    """

    sequences: Sequences
    log_weights: Float[Array, " N"]
    log_z: Float[Array, ""]
    log_z_std_error: Float[Array, ""]
    steps: Int[Array, ""]
    num_invalid: Int[Array, ""]
    cost: Cost
    trace: Trace
    history: History | None

    @property
    def all_dead(self) -> Bool[Array, ""]:
        """Whether no particle has positive weight."""
        return jnp.isneginf(self.log_z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """A run between two steps; `roots` [N] are the particles' ancestors in the first generation."""

    particles: Particles
    roots: Int[Array, " N"]
    steps: Int[Array, ""]
    num_invalid: Int[Array, ""]
    cost: Cost
    trace: Trace
    history: History | None


def extend(target: Target, proposal: Proposal, t: Int[Array, ""], *, first: bool = False) -> Move:
    """The move that draws token t of every string from `proposal`, weighed for gamma_t / gamma_{t-1}."""
    lm, prefix = target.lm, target.prefix

    def sample(key: PRNGKeyArray, x: TextState) -> tuple[TextState, Float[Array, " N"]]:
        num = x.active.shape[0]
        if first:
            cache, logits = x.cache, jnp.broadcast_to(prefix.logits, (num, lm.vocab_size))
        else:
            cache, logits = lm.step(prefix, x.cache, x.sequences.tokens[:, t - 1])
        log_q = proposal(target, logits, x.potential)
        token, log_q = categorical(jax.random.split(key, num), log_q)
        # Strings that have ended are not continued with what was drawn: a Python potential would be asked about it.
        token = jnp.where(x.active, token, lm.eos)
        log_p = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        state, log_factor, invalid = target.factor(x.potential, token, x.active, t == target.max_tokens - 1)
        # No mass to draw from is weight 0, not -inf + inf; so is a law that is NaN, and a model whose logits are.
        dw = jnp.where(log_q > -jnp.inf, target.log_prob_factor(log_p) - log_q + log_factor, -jnp.inf)
        invalid = invalid | (x.active & (jnp.isnan(log_p) | jnp.isnan(dw)))
        dw = jnp.where(x.active, jnp.where(jnp.isnan(dw), -jnp.inf, dw), 0.0)
        sequences, active = append(x.sequences, t, token, x.active, lm.eos)
        return TextState(sequences, active & ~jnp.isneginf(dw), invalid, cache, state), dw

    return Move(sample)


def init(target: Target, num_particles: int, *, history: bool = False) -> Carry:
    """A population of empty strings.  Arguments as in `run`."""
    n, horizon = num_particles, target.max_tokens
    state = TextState(
        sequences=empty(n, horizon, target.lm.eos),
        active=jnp.ones(n, bool),
        invalid=jnp.zeros(n, bool),
        cache=target.lm.init(target.prefix, n, horizon),
        potential=target.potential.init(n),
    )
    zeros = jnp.zeros(horizon, jnp.float32)
    trace = Trace(zeros, zeros, jnp.zeros(horizon, bool), jnp.zeros(horizon, jnp.int32))
    genealogy = History(
        jnp.full((horizon, n), target.lm.eos, jnp.int32),
        jnp.zeros((horizon, n), jnp.float32),
        jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (horizon, n)),
    )
    zero = jnp.int32(0)
    cost = dataclasses.replace(no_cost(), forwards=jnp.int32(1))  # the prompt
    roots = jnp.arange(n, dtype=jnp.int32)
    return Carry(particles(state, n), roots, zero, zero, cost, trace, genealogy if history else None)


def step(
    key: PRNGKeyArray,
    target: Target,
    carry: Carry,
    *,
    proposal: Proposal = locally_optimal,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
    first: bool = False,
) -> Carry:
    """One token for every particle, then resampling if the ESS is below `threshold` * N.  `first` is the first step."""
    t, before = carry.steps, carry.particles
    num = before.log_weights.shape[0]
    move_key, resample_key = jax.random.split(key)
    moved = apply(move_key, before, extend(target, proposal, t, first=first))
    size = ess(moved.log_weights)
    # The last population is returned with its weights: resampling it would only add noise.
    goes_on = moved.state.active.any() & (t < target.max_tokens - 1)
    when = goes_on & (size < threshold * num)
    after, ancestors = resample(resample_key, moved, resampler, when, functools.partial(_reorder, target))

    drawn = before.state.active.sum()
    tilted = target.potential != Product()
    cost = Cost(drawn, jnp.int32(0 if first else 1), drawn if tilted else jnp.int32(0))
    trace = carry.trace
    trace = Trace(
        trace.ess.at[t].set(size),
        trace.log_z.at[t].set(bank(moved).log_z),
        trace.resampled.at[t].set(when),
        trace.active.at[t].set(moved.state.active.sum()),
    )
    return Carry(
        after,
        carry.roots[ancestors],
        t + 1,
        carry.num_invalid + moved.state.invalid.sum(),
        carry.cost + cost,
        trace,
        None if carry.history is None else _record(carry.history, t, moved, ancestors),
    )


def _reorder(target: Target, x: TextState, ancestors: Int[Array, " N"]) -> TextState:
    cache = target.lm.reorder(x.cache, ancestors)
    return dataclasses.replace(take_rows(dataclasses.replace(x, cache=None), ancestors), cache=cache)


def _record(history: History, t: Array, moved: Particles, ancestors: Array) -> History:
    return History(
        history.tokens.at[t].set(moved.state.sequences.tokens[:, t]),
        history.log_weights.at[t].set(moved.log_weights),
        history.ancestors.at[t].set(ancestors),
    )


def result(carry: Carry) -> Result:
    """The population of a run (finished or not) with all its evidence banked."""
    p = bank(carry.particles)
    error = log_z_std_error(p.log_weights, carry.roots)
    sequences = p.state.sequences
    return Result(
        sequences, p.log_weights, p.log_z, error, carry.steps, carry.num_invalid, carry.cost, carry.trace, carry.history
    )


@sampler(Guarantee.EXACT, proof="tests/samplers/test_smc.py")
def run(
    key: PRNGKeyArray,
    target: Target | Sequence[Target],
    *,
    num_particles: int = 32,
    proposal: Proposal = locally_optimal,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
    history: bool = False,
) -> Result:
    """Sequential Monte Carlo for gamma(x) = p(x)^alpha Phi(x), in one jit.

    Args:
        key: typed key.
        target: a target, or a list of targets over one model (one per prompt), run one after another in the same jit;
            then every leaf of the result has the list's axis first.
        num_particles: N.
        proposal: how tokens are drawn (`samplers.proposals`).
        resampler: how ancestors are drawn (`samplers.resampling`).
        threshold: resample when ESS < threshold * N; 0 never (importance sampling), above 1 after every token.
        history: record the genealogy.

    Returns:
        `Result`: weighted strings that obey LAW 1, log_z with a standard error, cost and diagnostics.

    Raises:
        ValueError: if `num_particles` < 1, or the targets of a list have different models, horizons or padded prompts.
    """
    check_count("num_particles", num_particles)
    static = {"num_particles": num_particles, "resampler": resampler, "history": history}
    proposal = _as_pytree(proposal)
    if isinstance(target, Target):
        return _run(key, target, proposal, threshold, **static)
    shared, varying, structure = _stack(target)
    keys = jax.random.split(key, len(target))
    return _run_all(keys, shared, varying, proposal, threshold, structure=structure, **static)


def iterate(
    key: PRNGKeyArray,
    target: Target,
    *,
    num_particles: int = 32,
    proposal: Proposal = locally_optimal,
    resampler: Resampler = systematic,
    threshold: float | Float[Array, ""] = 0.5,
    history: bool = False,
) -> Iterator[Result]:
    """`run`, one token at a time: yields the population after every step, for watching a run.

    The last result is that of `run` with the same key.  Arguments as in `run`, for one target.
    """
    check_count("num_particles", num_particles)
    keys = jax.random.split(key, target.max_tokens)
    carry = _init(target, num_particles, history)
    for t in range(target.max_tokens):
        args = (keys[t], target, carry, _as_pytree(proposal), threshold)
        carry = _step(*args, resampler=resampler, first=t == 0)
        yield _result(carry)
        if not carry.particles.state.active.any():
            return


_static = ("num_particles", "resampler", "history")


@functools.partial(jax.jit, static_argnames=_static)
def _run(
    key: Any, target: Target, proposal: Proposal, threshold: Any, *, num_particles: int, resampler: Any, history: bool
) -> Result:
    keys = jax.random.split(key, target.max_tokens)
    options: dict[str, Any] = {"proposal": proposal, "resampler": resampler, "threshold": threshold}
    carry = step(keys[0], target, init(target, num_particles, history=history), first=True, **options)
    carry = jax.lax.while_loop(
        lambda c: (c.steps < target.max_tokens) & c.particles.state.active.any(),
        lambda c: step(keys[c.steps], target, c, **options),
        carry,
    )
    return result(carry)


@functools.partial(jax.jit, static_argnames=(*_static, "structure"))
def _run_all(
    keys: Any, shared: list, varying: list, proposal: Proposal, threshold: Any, *, structure: Any, **static: Any
) -> Result:
    def one(args: tuple) -> Result:
        one_key, rows = args
        leaves = [row if leaf is None else leaf for leaf, row in zip(shared, rows, strict=True)]
        return _run(one_key, jax.tree.unflatten(structure, leaves), proposal, threshold, **static)

    return jax.lax.map(one, (keys, varying))


_init = jax.jit(lambda target, num, history: init(target, num, history=history), static_argnums=(1, 2))
_result = jax.jit(result)


@functools.partial(jax.jit, static_argnames=("resampler", "first"), donate_argnums=2)
def _step(
    key: Any, target: Target, carry: Carry, proposal: Proposal, threshold: Any, *, resampler: Any, first: bool
) -> Carry:
    return step(key, target, carry, proposal=proposal, resampler=resampler, threshold=threshold, first=first)


def _as_pytree(proposal: Proposal) -> Proposal:
    """Plain functions become static data of a pytree; `tempered(...)` and the like already are pytrees."""
    is_leaf = jax.tree.structure(proposal) == jax.tree.structure(0)
    return jax.tree_util.Partial(proposal) if is_leaf else proposal


def _stack(targets: Sequence[Target]) -> tuple[list, list, Any]:
    """Leaves that all targets share (the weights) as they are; the others stacked along a new first axis."""
    check_count("the number of targets", len(targets))
    flat = [jax.tree.flatten(target) for target in targets]
    leaves, structure = [leaf for leaf, _ in flat], flat[0][1]
    shapes = [[jnp.shape(leaf) for leaf in row] for row in leaves]
    if any(s != structure for _, s in flat) or any(s != shapes[0] for s in shapes):
        sizes = [target.prefix.tokens.shape[0] for target in targets]
        horizons = [target.max_tokens for target in targets]
        raise ValueError(
            "expected targets with one model, horizon, padded prompt length and kind of power and potential, got"
            f" targets that differ (padded prompts {sizes}, max_tokens {horizons}); pass one max_tokens and"
            f" pad_to={max(sizes)} to lm.given, and give all targets a power and the same potentials, or none"
        )
    same = [all(leaf is column[0] for leaf in column) for column in zip(*leaves, strict=True)]
    shared = [column[0] if s else None for column, s in zip(zip(*leaves, strict=True), same, strict=True)]
    varying = [None if s else jnp.stack(column) for column, s in zip(zip(*leaves, strict=True), same, strict=True)]
    return shared, varying, structure
