"""The few shapes of what samplers give back: the same field is the same thing in all of them.

| shape | what it is | `samples` |
| --- | --- | --- |
| `Weighted` | a properly weighted population (LAW 1) | N rows with `log_weights` |
| `Draws` | independent draws of a law that is known, or at least named | N rows of equal weight |
| `Chains` | Markov chains and what they passed through | [S, C, ...] in `draws` |
| `Choice` | one string picked from a pool; no weighted sample | the pool, with `scores` |

`MoveInfo` says what a step of a kernel did, the same for all kernels.

Rows are anything with the axis N first: `Sequences`, latents by name, states.  Where they are, or
have, strings, `sequences` gives these.  What only one sampler has to say is in `details`, a dict by
name.  A field that is None was not asked for, or the sampler cannot know it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.showing import Words
from ppl.table import Row, texts

from .base import Cost, X, no_number
from .health import Health, health

Details = dict[str, Any]
"""What only one sampler has to say, by name."""

READ = 1024
"""The most particles that are read where only a repr is asked for."""


def sequences_in(rows: X) -> Sequences:
    """The strings that rows are, or that they have as `sequences` or as one named site.

    Raises:
        AttributeError: if there are none, or several; so `hasattr(result, "sequences")` asks.
    """
    if isinstance(rows, Sequences):
        return rows
    found = (
        [site for site in rows.values() if isinstance(site, Sequences)]
        if isinstance(rows, dict)
        else [rows.sequences]
    )
    if len(found) != 1:
        raise AttributeError(
            f"expected rows with one site of strings, got {len(found)}; take the site by its name"
        )
    return found[0]


class _Reported:
    """What is common to all shapes: their repr shows what was reported."""

    def _shown_(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in values.items() if value is not None}


class _Rows(_Reported):
    """What is common to the shapes with `samples`."""

    samples: X

    @property
    def sequences(self) -> Sequences:
        """The strings among `samples` (`sequences_in`)."""
        return sequences_in(self.samples)

    def texts(self, tokenizer: Any) -> list[Row]:
        """Every row's (text, weight), aligned with `samples`; of a choice (text, score).

            for text, weight in out.texts(tok): ...

        `ppl.table` shows them with duplicates merged.  Raises as `ppl.table.texts`.
        """
        return texts(self, tokenizer)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace(_Reported):
    """What happened in each of R rounds: tokens, steps of text, temperatures, observations.

    Rounds that were not run hold 0 and False.

    Attributes:
        ess: [R] effective sample size after weighing, before the next selection.
        log_z: [R] the running estimate of log Z after the round.
        resampled: [R] whether ancestors were drawn before (of stages: after) weighing.
        active: [R] strings still growing after the round.
        acceptance: [R] mean acceptance of the rejuvenation; 0 where nothing moved.
        beta: [R] the inverse temperature that the round went to.
    """

    ess: Float[Array, "*R"]
    log_z: Float[Array, "*R"]
    resampled: Bool[Array, "*R"]
    active: Int[Array, "*R"] | None = None
    acceptance: Float[Array, "*R"] | None = None
    beta: Float[Array, "*R"] | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The genealogy of R rounds.

    Slot i of round r continues slot ancestors[r, i] of round r - 1, draws drawn[r, i] and then
    weighs log_weights[r, i].

    Attributes:
        drawn: what was drawn, leaves [R, N, ...]: at most K tokens [R, N, K], -1 where none was
            drawn, or the states of a filter.
        log_weights: [R, N], -inf is dead.
        ancestors: [R, N]; 0..N-1 where none were drawn.
    """

    drawn: X
    log_weights: Float[Array, "R N"]
    ancestors: Int[Array, "R N"]


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(_Rows):
    """A properly weighted population (LAW 1) and what it took.

    Attributes:
        samples: N rows.
        log_weights: [N], scaled so that mean_i exp(w_i) = 1; -inf is dead.
        log_z: [] log of the unbiased estimate of Z; -inf if all particles are dead.
        log_z_std_error: [] its standard error from this run (`diagnostics.log_z_std_error`);
            infinite where the run does not tell.
        num_roots: [] from how many particles of the first generation what lives descends.
        num_invalid: [] how often, over rounds and particles, a factor, a look-ahead, a logit or a
            proposal's law was NaN or +inf, or a Python function raised.  That counts as -inf, and
            a particle dies if it is of the token that it drew.
        missing_support: [] the greatest share of the target's one-step law that the proposal could
            not draw, over rows and tokens; above 0 the run has a truncated target.
        rounds: [] rounds that were run.
        cost: what the run spent.
        trace: what happened in each round; a sampler without rounds has one.
        history: the genealogy, if asked for.
        log_prob: [N] log p(x | prompt).
        log_q: [N] log-probability of each row under the law it was really drawn from.
        log_density: [N] log gamma of each row; of strings that still grow, of what is there.
        details: what only this sampler has to say.
    """

    samples: X
    log_weights: Float[Array, " N"]
    log_z: Float[Array, ""]
    log_z_std_error: Float[Array, ""]
    num_roots: Int[Array, ""] | None = None
    num_invalid: Int[Array, ""]
    missing_support: Float[Array, ""] = dataclasses.field(default_factory=no_number)
    rounds: Int[Array, ""]
    cost: Cost
    trace: Trace
    history: History | None = None
    log_prob: Float[Array, " N"] | None = None
    log_q: Float[Array, " N"] | None = None
    log_density: Float[Array, " N"] | None = None
    details: Details | None = None

    @property
    def all_dead(self) -> Bool[Array, ""]:
        """Whether no particle has positive weight."""
        return jnp.isneginf(self.log_z)

    @property
    def health(self) -> Health:
        """What speaks against it (`diagnostics.health`)."""
        return health(self)

    def _shown_(self) -> dict[str, Any]:
        """All that was reported, and what speaks against it; of one population on this host."""
        read = self.log_weights, self.log_z
        known = all(
            isinstance(x, np.ndarray | np.generic)
            or (isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.is_deleted())
            for x in read
        )
        if not known or self.log_weights.ndim != 1 or self.log_weights.size > READ:
            return super()._shown_()
        return {"health": Words(str(self.health))} | super()._shown_()


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws(_Rows):
    """N independent draws of equal weight and what they took.

    Attributes:
        samples: N rows.
        log_prob: [N] log p(x | prompt).
        log_q: [N] log-probability under the law they were really drawn from.
        cost: what all of them spent.
        details: what only this sampler has to say.
    """

    samples: X
    log_prob: Float[Array, " N"]
    log_q: Float[Array, " N"] | None = None
    cost: Cost
    details: Details | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(_Rows):
    """One of n strings, picked by its score; a choice, not a weighted sample.

    Attributes:
        samples: the pool, n rows; slots that were never filled are empty strings.
        scores: [n] what they are compared by; -inf is out of the question.
        best: [] the row of the highest score, the first of equals.
        cost: what the search spent, scoring included.
        log_prob: [n] log p(x | prompt).
        details: what only this search has to say.
    """

    samples: X
    scores: Float[Array, " n"]
    best: Int[Array, ""]
    cost: Cost
    log_prob: Float[Array, " n"] | None = None
    details: Details | None = None

    @property
    def chosen(self) -> X:
        """The row that was picked, with its axis: [1, ...]."""
        return take_rows(self.samples, self.best[None])


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains(_Reported):
    """S draws of C chains, and what is needed to go on.

    Attributes:
        draws: what was kept of the state at each draw, by name: `sequences`, `log_prob`,
            `position`, ...; leaves [S, C, ...].
        info: what the steps of each draw did, leaves [S, thin, C, ...], as a rule of a `MoveInfo`;
            without costs, which are added up.
        state: the chains after the last draw, which their kernel takes on from here.
        cost: of all chains and steps, warm-up included; None if the kernel does not report it.
        key: of the run, where it can be continued; of a run of P kernels [P].
        steps: how many steps every chain made, warm-up included.
        thin: steps for each draw.
        warmup: steps before the first draw.
        interrupted: the run was stopped before it had all its draws.
    """

    draws: dict[str, Any]
    info: Any
    state: X
    cost: Cost | None
    key: Key[Array, "*P"] | None = None
    steps: int = dataclasses.field(metadata={"static": True})
    thin: int = dataclasses.field(default=1, metadata={"static": True})
    warmup: int = dataclasses.field(default=0, metadata={"static": True})
    interrupted: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_samples(self) -> int:
        """S."""
        return max(self.steps - self.warmup, 0) // self.thin

    @property
    def sequences(self) -> Sequences:
        """The C strings where the chains are now (`sequences_in`); those of all draws are in
        `draws`.
        """
        return sequences_in(self.state)

    @property
    def log_prob(self) -> Float[Array, " C"]:
        """log p(x | prompt) where the chains are now."""
        return self.state.log_prob

    def texts(self, tokenizer: Any) -> list[Row]:
        """The (text, weight) of all S C draws, chain after chain within each draw; where the chains
        are now is `tokenizer.decode(out.sequences)`.
        """
        return texts(self, tokenizer)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoveInfo(_Reported):
    """What a step of a kernel did, for each chain [*C]; made by `moved`.

    Kernels that make several moves in a step have a further axis of moves in all but `cost`.

    Attributes:
        accepted: what was proposed was taken; a kernel that cannot reject has True.
        proposed: something was proposed; False where a cut lay beyond the end of the string.  Only
            these steps count towards `acceptance`.
        changed: the chain is at another place than before.
        log_ratio: log of the Hastings ratio, or an upper bound of it where that decided; 0 where
            nothing was proposed or nothing can be rejected.
        tokens: tokens drawn.
        invalid: a factor, a look-ahead, a logit or a proposal's law was NaN or +inf, which counts
            as -inf.
        missing_support: the greatest share of the target's one-step law that the proposal could not
            draw; above 0 the chain may not reach all of the target's strings.
        outside_support: the chain, after the step, still has density zero.
        cost: what all chains together spent [].
        details: what only this kernel has to say: where it cut, what it swapped; leaves [*C, ...].
    """

    accepted: Bool[Array, "*C"]
    proposed: Bool[Array, "*C"]
    changed: Bool[Array, "*C"]
    log_ratio: Float[Array, "*C"]
    tokens: Int[Array, "*C"]
    invalid: Bool[Array, "*C"]
    missing_support: Float[Array, "*C"]
    outside_support: Bool[Array, "*C"]
    cost: Cost
    details: Details | None = None

    @property
    def acceptance(self) -> Float[Array, ""]:
        """The share of what was proposed that was taken, over all steps and chains; 0 without
        proposals.
        """
        count = jnp.maximum(jnp.sum(self.proposed, dtype=jnp.int32), 1)
        taken = jnp.sum(self.accepted & self.proposed, dtype=jnp.int32)
        return taken.astype(jnp.float32) / count.astype(jnp.float32)


def moved(
    accepted: Bool[Array, "*C"],
    *,
    changed: Bool[Array, "*C"],
    cost: Cost | None = None,
    **known: Any,
) -> MoveInfo:
    """A `MoveInfo` of which a kernel knows some fields: all chains proposed something, and of the
    others there is nothing to report, zeros and False.

    Raises:
        TypeError: if a field is none of `MoveInfo`'s.
    """
    flags, numbers = jnp.zeros(accepted.shape, bool), jnp.zeros(accepted.shape, jnp.float32)
    nothing: dict[str, Any] = {
        "proposed": jnp.ones(accepted.shape, bool),
        "log_ratio": numbers,
        "tokens": jnp.zeros(accepted.shape, jnp.int32),
        "invalid": flags,
        "missing_support": numbers,
        "outside_support": flags,
    }
    spent = Cost() if cost is None else cost
    return MoveInfo(accepted=accepted, changed=changed, cost=spent, **(nothing | known))


def changed_rows(before: X, after: X) -> Bool[Array, " C"]:
    """Which rows of two populations differ in some leaf; of chains give what a chain is, its
    strings or its position, not its caches.
    """

    def differs(a: Array, b: Array) -> Bool[Array, " C"]:
        return (a != b).reshape(a.shape[0], -1).any(axis=1)

    parts = jax.tree.leaves(jax.tree.map(differs, before, after))
    return functools.reduce(jnp.logical_or, parts)
