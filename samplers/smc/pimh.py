"""Particle independent Metropolis-Hastings: whole SMC runs as proposals, accepted by their
evidence.

A run proposes one of its strings, drawn by weight, and is accepted with probability min(1, Z-hat' /
Z-hat).  The chain lives on (string, all other variables of the run it came from); it leaves pi(x)
csmc(others | x) invariant, whose marginal is the target, and of the others only Z-hat is needed.
Andrieu, Doucet and Holenstein (2010).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.sequences import Sequences
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, each_chain, no_cost
from ..registry import sampler
from ..resampling import multinomial
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


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Info:
    """What one step of C chains did: accepted [C], log Z-hat [C] of the proposed runs, cost of each
    chain [C].
    """

    accepted: Bool[Array, " C"]
    log_z: Float[Array, " C"]
    cost: Cost


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
        `Kernel` with state `State` and info `Info`.

    Raises:
        ValueError: if the start is no set of strings of the target, or a resampler is given.
    """
    check_count("batch_size", batch_size)
    how = conditional.bind(target, num_particles, False, options)

    def init(x: Sequences) -> State:
        target.space.check(x)
        return State(x, jnp.full(x.length.shape, -jnp.inf, jnp.float32))

    def step(key: PRNGKeyArray, state: State) -> tuple[State, Info]:
        return _step(key, target, how, state, num_particles, batch_size)

    return Kernel(init, step)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _step(
    key: Any, target: Target, how: smc.Method, state: State, num: int, batch_size: int
) -> tuple[State, Info]:
    refresh_key, move_key = jax.random.split(key)
    num_chains = state.log_z.shape[0]
    unconditional = dataclasses.replace(how, resampler=multinomial)

    def refresh(chain: tuple[Array, Sequences, Array]) -> tuple[Array, Cost]:
        one_key, x, log_z = chain
        reference = jax.tree.map(lambda leaf: leaf[None], x)
        out = conditional.particles_of(one_key, target, how, reference, num, False, False)
        known = ~jnp.isneginf(log_z)
        return jnp.where(known, log_z, out.log_z), jax.tree.map(
            lambda c: jnp.where(known, 0, c), out.cost
        )

    def move(chain: tuple[Array, Sequences, Array]) -> tuple[Sequences, Array, Info]:
        one_key, x, log_z = chain
        run_key, draw_key, accept_key = jax.random.split(one_key, 3)
        out = smc.result(smc.loop(run_key, target, unconditional, num))
        # An all-dead run is never accepted, a start of density zero always left.
        accept = ~out.all_dead & (jnp.log(jax.random.uniform(accept_key)) < out.log_z - log_z)
        new = jax.tree.map(lambda a, b: jnp.where(accept, a, b), conditional.draw(draw_key, out), x)
        return new, jnp.where(accept, out.log_z, log_z), Info(accept, out.log_z, out.cost)

    def all_refreshed() -> tuple[Array, Cost]:
        chains = jax.random.split(refresh_key, num_chains), state.sequences, state.log_z
        return each_chain(refresh, chains, batch_size)

    def none_refreshed() -> tuple[Array, Cost]:
        return state.log_z, jax.tree.map(lambda c: jnp.zeros(num_chains, c.dtype), no_cost())

    # Asked of all chains at once: inside of the map, chains that run together would all pay at
    # every step.
    log_z, spent = jax.lax.cond(jnp.isneginf(state.log_z).any(), all_refreshed, none_refreshed)
    chains = jax.random.split(move_key, num_chains), state.sequences, log_z
    sequences, log_z, info = each_chain(move, chains, batch_size)
    return State(sequences, log_z), dataclasses.replace(info, cost=info.cost + spent)
