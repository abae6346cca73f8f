"""The currency of all samplers: weighted particles, moves that keep them properly weighted,
kernels, costs, guarantees.

For particles x_1..x_N with log-weights w_i and banked evidence log_z:

    LAW 1   E[ exp(log_z) * mean_i( exp(w_i) f(x_i) ) ] = sum_x gamma(x) f(x)   for every f
    LAW 2   if (x, w) obeys LAW 1 for gamma and a move returns (y, dw),
            then (y, w + dw) obeys it for the next gamma'
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_function
from ppl.pytrees import as_pytree, register_dataclass
from ppl.rows import anywhere, take_rows
from ppl.showing import shown

X = Any
"""A population: a pytree whose leaves have the particle axis N first."""


class Guarantee(enum.Enum):
    """What a sampler promises; the tests prove each tag by enumeration on small models."""

    EXACT = "LAW 1 (or invariance) at any budget"
    CONSISTENT = "the target in the limit of a growing budget"
    HEURISTIC = "no target: what it returns is a choice, not a weighted sample"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Particles:
    """A properly weighted population (LAW 1): state with N rows, log_weights [N], banked evidence
    log_z []; float32.
    """

    state: X
    log_weights: Float[Array, " N"]
    log_z: Float[Array, ""]

    def _shown_(self) -> dict[str, Any]:
        return {
            "num": self.log_weights.shape[-1],
            "log_weights": self.log_weights,
            "log_z": self.log_z,
            "state": self.state,
        }


def particles(state: X, num: int) -> Particles:
    """Fresh particles of weight 1 with nothing banked."""
    return Particles(state, jnp.zeros(num, jnp.float32), jnp.float32(0))


def dead(log_weights: Float[Array, " N"]) -> Bool[Array, " N"]:
    """Which particles have weight zero."""
    return jnp.isneginf(log_weights)


def bank(p: Particles) -> Particles:
    """Move the mean weight into `log_z`: then mean_i exp(w_i) = 1 and log_z is the whole log
    evidence estimate.

    If all particles are dead (every weight -inf), log_z is -inf and the weights stay -inf.
    """
    log_mean = jax.nn.logsumexp(p.log_weights) - jnp.log(p.log_weights.shape[0])
    log_weights = jnp.where(dead(p.log_weights), -jnp.inf, p.log_weights - log_mean)
    return Particles(p.state, log_weights, p.log_z + log_mean)


@shown
class Move(NamedTuple):
    """A population move that obeys LAW 2.

    sample(key, x[N]) -> (y[N], dw[N]).  assess(key, x[N], y[N]) -> dw[N] gives the weight of a
    given outcome, drawing only what else the move draws; with it a move can be pinned (conditional
    SMC) or accepted and rejected (MH).
    """

    sample: Callable[[PRNGKeyArray, X], tuple[X, Float[Array, " N"]]]
    assess: Callable[[PRNGKeyArray, X, X], Float[Array, " N"]] | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A batch of Markov chains that leaves its target invariant.

    init(state) -> chain state, from N initial positions; step(key, state) -> (state, info).

    Both are pytrees whose leaves are what they hold (targets, weights, ladders), see `holding`: so
    a kernel is an argument of `jax.jit`, and one made anew from arrays of the same shapes runs the
    program that there is.  A plain function is static data, found again by identity: what it closes
    over becomes constants of the program, copied into it, and another closure is another program.
    Where that matters, hand over `holding(step, target, ...)` in its place.
    """

    init: Callable[[X], X]
    step: Callable[[PRNGKeyArray, X], tuple[X, Any]]

    def __post_init__(self) -> None:
        for name in ("init", "step"):
            object.__setattr__(self, name, as_pytree(getattr(self, name)))

    def __repr__(self) -> str:
        name = getattr(self.step, "function", getattr(self.step, "func", self.step))
        return f"Kernel({getattr(name, '__qualname__', type(name).__name__)})"


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Holding:
    """(key, x) -> function(key, *held, x, **options); see `holding`."""

    function: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    held: tuple
    options: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, key: PRNGKeyArray, x: X) -> Any:
        return self.function(key, *self.held, x, **dict(self.options))


def holding(function: Callable[..., Any], *held: Any, **options: Any) -> Holding:
    """A step, or a move's `sample`, as a pytree: (key, x) -> function(key, *held, x, **options).

    `function` is one of a module, which jit finds again; the leaves of `held` are arguments of
    programs; `options` are static, and hashable.
    """
    return Holding(function, held, tuple(options.items()))


no_count, no_number = functools.partial(jnp.int32, 0), functools.partial(jnp.float32, 0)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run spent: counts [], int32.  `a + b` is one after the other, `a | b` side by side.

    tokens: tokens drawn for strings that had not ended.  forwards: passes of language models over
    a batch, the prompt's and the proposal's included; of a chain, whose start has read the prompt,
    without it.  potential_calls: particle-tokens on which a potential was evaluated.  depth: the
    longest chain of passes each of which waits for the one before; the only count that side by
    side is the larger one and not the sum.  judge_tokens: tokens that judges read after the texts
    that stand before all strings (`ppl.judge`, `samplers.mcmc.judges`).  kv_read: key-value
    positions that attention read, over passes and rows that needed them; float32, for they are
    more than int32 holds.
    """

    tokens: Int[Array, ""] = dataclasses.field(default_factory=no_count)
    forwards: Int[Array, ""] = dataclasses.field(default_factory=no_count)
    potential_calls: Int[Array, ""] = dataclasses.field(default_factory=no_count)
    depth: Int[Array, ""] = dataclasses.field(default_factory=no_count)
    judge_tokens: Int[Array, ""] = dataclasses.field(default_factory=no_count)
    kv_read: Float[Array, ""] = dataclasses.field(default_factory=no_number)

    def __add__(self, other: Cost) -> Cost:
        return jax.tree.map(jnp.add, self, other)

    def _shown_(self) -> dict[str, Any]:
        """What was spent at all."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        spent = {name: n for name, n in counts.items() if isinstance(n, Tracer) or np.any(n)}
        return spent or {"tokens": self.tokens}

    def __or__(self, other: Cost) -> Cost:
        return dataclasses.replace(self + other, depth=jnp.maximum(self.depth, other.depth))

    def total(self) -> Cost:
        """One cost of several side by side, whose counts are arrays, as `jax.vmap` gives them."""
        summed = jax.tree.map(lambda count: count.sum(0, dtype=count.dtype), self)
        return dataclasses.replace(summed, depth=self.depth.max(0))


def spent(cost: Cost, more: Cost) -> Cost:
    """Both, one after the other, in the types of the first: what a loop carries, where sums would
    be wider under x64.
    """
    return jax.tree.map(lambda old, new: old + jnp.asarray(new, old.dtype), cost, more)


def each(sample_one: Callable[[PRNGKeyArray, X], tuple[X, Float[Array, ""]]]) -> Move:
    """Lift (key, x) -> (y, dw) of one particle to a population move, one key per particle."""

    def sample(key: PRNGKeyArray, x: X) -> tuple[X, Float[Array, " N"]]:
        return jax.vmap(sample_one)(jax.random.split(key, jax.tree.leaves(x)[0].shape[0]), x)

    return Move(sample)


def sequence(*moves: Move) -> Move:
    """The moves one after another; weights add up."""

    def sample(key: PRNGKeyArray, x: X) -> tuple[X, Float[Array, " N"]]:
        total = jnp.float32(0)
        for move_key, move in zip(jax.random.split(key, len(moves)), moves, strict=True):
            x, dw = move.sample(move_key, x)
            total = total + dw
        return x, total

    return Move(sample)


Resampler = Callable[
    [PRNGKeyArray, Float[Array, " N"], int],
    Int[Array, " M"] | tuple[Int[Array, " M"], Float[Array, " M"]],
]
"""(key, log_probs[N], num) -> ancestors[num], and log-weights [num] from schemes whose draws do not
weigh the same:

    E[ mean_j( exp(v_j) f(a_j) ) ] = sum_i A_i f(i),   A = softmax(log_probs), v = 0 if not returned
"""


def check_resampler(resampler: Any) -> None:
    """Raise ValueError unless it is a function of a key, log-probabilities and a number."""
    check_function(
        "resampler", resampler, "(key, log_probs, num)", "samplers.resampling.systematic"
    )


def check_threshold(threshold: Any) -> None:
    """Raise ValueError unless it is a number, traced or not, and not NaN."""
    if isinstance(threshold, Tracer):
        return
    kind = getattr(np.asarray(threshold), "dtype", np.dtype(object)).kind
    if kind not in "biuf" or np.ndim(threshold) or np.isnan(threshold):
        raise ValueError(
            f"expected threshold to be a number, got {threshold!r}; pass 0.5, or 0 (never)"
        )


def checked_ancestors(drawn: Any, num: int) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """What a `Resampler` gave, as ancestors [M] and log-weights [M], M = `num`.

    Raises:
        ValueError: if it is not that; also where it is traced.
    """
    given = drawn if isinstance(drawn, tuple) else (drawn,)
    ancestors, log_weights = given if len(given) == 2 else (given[0], jnp.zeros(num, jnp.float32))
    whole = hasattr(ancestors, "dtype") and jnp.issubdtype(ancestors.dtype, jnp.integer)
    real = hasattr(log_weights, "dtype") and jnp.issubdtype(log_weights.dtype, jnp.floating)
    alike = whole and real and ancestors.shape == log_weights.shape == (num,)
    if not alike or len(given) > 2:
        got = [
            f"{getattr(x, 'dtype', type(x).__name__)}{list(getattr(x, 'shape', ()))}" for x in given
        ]
        raise ValueError(
            f"expected a resampler to give ancestors int32[{num}], or with log-weights"
            f" (int32[{num}], float32[{num}]), got {', '.join(got)}; check it with"
            " samplers.testing.check_resampler"
        )
    return jnp.asarray(ancestors, jnp.int32), log_weights


def resample(
    key: PRNGKeyArray,
    p: Particles,
    ancestors_of: Resampler,
    when: Bool[Array, ""],
    reorder: Callable[[X, Int[Array, " N"]], X] = take_rows,
    log_selection: Float[Array, " N"] | None = None,
) -> tuple[Particles, Int[Array, " N"]]:
    """Where `when` [] holds, draw ancestors, take their rows and bank the evidence.

    `log_selection` [N] (unnormalised) is what ancestors are drawn from; by default the weights, and
    then all weights become 1.  Otherwise the ratio is carried, w_j = W_a / A_a, which keeps LAW 1
    for any A that is positive wherever W is.  Never resamples a population in which nothing can be
    drawn.  Rows move only if it happens.  Returns the particles and the ancestors [N] (0..N-1 if
    nothing was resampled; -1 where the resampler named no particle, which is one of weight 0 then).

    Raises:
        ValueError: when traced, if `ancestors_of` is no function, or does not give N ancestors as
            integers (and N log-weights).
    """
    check_resampler(ancestors_of)
    num = p.log_weights.shape[0]
    banked = bank(p)
    log_probs = (
        p.log_weights
        if log_selection is None
        else jnp.where(dead(p.log_weights), -jnp.inf, log_selection)
    )
    when = when & ~dead(log_probs).all()

    def move_rows(carry: tuple) -> tuple:
        _, state, *kept = carry
        ancestors, log_weights = checked_ancestors(ancestors_of(key, log_probs, num), num)
        # Out of range there is nobody to take the place of.
        nobody = (ancestors < 0) | (ancestors >= num)
        ancestors = jnp.where(nobody, 0, ancestors)
        if log_selection is not None:
            log_share = log_probs - jax.nn.logsumexp(log_probs)
            log_weights = log_weights + (banked.log_weights - jnp.log(num) - log_share)[ancestors]
        log_weights = jnp.where(nobody, -jnp.inf, log_weights).astype(jnp.float32)
        # Where other prompts made the loop turn, this one keeps what it has.
        new = (log_weights, banked.log_z, jnp.where(nobody, -1, ancestors))
        new = jax.tree.map(functools.partial(jnp.where, when), new, tuple(kept))
        return jnp.bool_(False), reorder(state, jnp.maximum(new[2], 0)), *new

    # A loop of at most one turn, not a `cond`: XLA updates a loop's carry in place, while the
    # branch of a `cond` that does nothing would still copy the whole cache.
    carry = (anywhere(when), p.state, p.log_weights, p.log_z, jnp.arange(num, dtype=jnp.int32))
    _, state, log_weights, log_z, ancestors = jax.lax.while_loop(lambda c: c[0], move_rows, carry)
    return Particles(state, log_weights, log_z), ancestors


def each_chain(one: Any, chains: Any, batch_size: int) -> Any:
    """`one` for every chain, `batch_size` of them vectorised at a time."""
    return jax.lax.map(one, chains, batch_size=None if batch_size == 1 else batch_size)
