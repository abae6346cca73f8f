"""Particle independent Metropolis-Hastings: whole SMC runs as proposals, accepted by their
evidence.

A run proposes one of its strings, drawn by weight, and is accepted with probability min(1, Z-hat' /
Z-hat).  The chain lives on (string, all other variables of the run it came from); it leaves pi(x)
csmc(others | x) invariant, whose marginal is the target, and of the others only Z-hat is needed.
Andrieu, Doucet and Holenstein (2010).
"""

from __future__ import annotations

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.rows import where_rows
from ppl.sequences import Sequences
from ppl.target import Target

from .. import kernels
from ..base import Guarantee, Kernel, holding
from ..registry import sampler
from ..results import MoveInfo, changed_rows
from . import conditional
from . import sequential as smc


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C chains: their strings, and log Z-hat [C] of the runs that these came from; -inf while there
    was none.
    """

    sequences: Sequences
    log_z: Float[Array, " C"]


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_pimh.py")
def kernel(
    target: Target, *, num_particles: int = 32, batch_size: int = 1, **options: Unpack[smc.Options]
) -> Kernel:
    """Particle independent Metropolis-Hastings: chains over strings that leave gamma / Z invariant
    at any N >= 1.

    A string that is given to `init` came from no run.  The first step makes one up, by conditional
    SMC on the string: that draws the run's other variables from their law given the string, so a
    start from pi is a start from the invariant law of the extended space.  (The evidence of an
    unconditional run would be too small on average, and the first acceptance biased.)  The
    resampler is multinomial, because that of conditional SMC is.

    Args:
        target, num_particles, options: as in `smc.run`, except `resampler`.
        batch_size: chains that run at a time.

    Returns:
        `Kernel` with state `State` and info `MoveInfo` [C], whose `details` have `log_z` [C] of the
        proposed runs.

    Raises:
        ValueError: if the start is no set of strings of the target, or a resampler is given.
    """
    check_count("batch_size", batch_size)
    how = conditional.bind(target, num_particles, False, options)
    fresh = conditional.fresh(target, how, num_particles)
    around = conditional.around(target, how, num_particles)
    return Kernel(Partial(_start, target), holding(_step, fresh, around, batch_size=batch_size))


def _start(target: Target, x: Sequences) -> State:
    x = conditional.strings(target, x)
    return State(x, jnp.full(x.length.shape, -jnp.inf, jnp.float32))


def _step(
    key: PRNGKeyArray,
    fresh: kernels.Sampler,
    around: kernels.Sampler,
    x: State,
    *,
    batch_size: int,
) -> tuple[State, MoveInfo]:
    start_key, run_key, accept_key = jax.random.split(key, 3)
    x, before = _evidence_known(start_key, around, x, batch_size)
    strings, log_z, seen = kernels.one_of_each(run_key, fresh, x.sequences, batch_size=batch_size)
    seen = {
        "cost": before["cost"] + seen["cost"],
        "invalid": before["invalid"] | seen["invalid"],
        "missing_support": jnp.maximum(before["missing_support"], seen["missing_support"]),
    }
    # An all-dead run is never accepted, a start of density zero always left.
    ratio = jnp.where(jnp.isneginf(log_z), -jnp.inf, log_z - x.log_z)
    y, made = kernels.accept(accept_key, ratio, x, State(strings, log_z))
    return y, dataclasses.replace(
        made,
        changed=changed_rows(x.sequences, y.sequences),
        details={"log_z": log_z},
        **kernels.reported(seen),
    )


def _evidence_known(
    key: PRNGKeyArray, around: kernels.Sampler, x: State, batch_size: int
) -> tuple[State, kernels.Seen]:
    """The chains with log Z-hat of a run for each string, and what is known of those made up."""
    unknown = jnp.isneginf(x.log_z)

    def made_up() -> tuple[Array, kernels.Seen]:
        return kernels.one_of_each(key, around, x.sequences, batch_size=batch_size)[1:]

    def none() -> tuple[Array, kernels.Seen]:
        shapes = jax.eval_shape(made_up)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # Asked of all chains at once: row by row, chains that run together would all pay at every step.
    log_z, seen = jax.lax.cond(unknown.any(), made_up, none)
    known = State(x.sequences, jnp.where(unknown, log_z, x.log_z))
    return known, where_rows(unknown, seen, jax.tree.map(jnp.zeros_like, seen))
