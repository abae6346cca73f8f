"""Ways to draw answers from p^alpha at one budget of tokens: what `power_sampling` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Cost
from samplers.draws import low_temperature
from samplers.mcmc import parallel_tempering, power
from samplers.smc import power_smc
from samplers.strings import cuts, ladders

NUM, FACTOR = 4, 8
"""Answers that every method gives at least, and how many times their tokens it may draw."""
BLOCK = 8
CUT = cuts.uniform_in_length
RUNGS = 3


class Outcome(NamedTuple):
    """n strings [n, T] with log-weights [n] and log p(x | prompt) [n], and what they cost."""

    sequences: Sequences
    log_weights: Float[Array, " n"]
    log_prob: Float[Array, " n"]
    cost: Cost


def moves_per_block(max_tokens: int, factor: float) -> int:
    """Moves after each block with which a chain draws `factor` times its tokens; a move draws half
    of them anew.

    (So it does on average if cuts are uniform in the string and not in the horizon.)
    """
    horizons = [min(end, max_tokens) for end in range(BLOCK, max_tokens + BLOCK, BLOCK)]
    return max(1, round((factor - 1) * max_tokens / (sum(horizons) / 2)))


def _low_temperature(key: PRNGKeyArray, target: Target) -> dict[str, Outcome]:
    out = low_temperature.run(key, target, num_samples=NUM * FACTOR)
    equal = jnp.zeros(NUM * FACTOR)
    found = {"low temperature": Outcome(out.sequences, equal, out.log_prob, out.cost)}
    # The likeliest of every group.
    chosen = out.log_prob.reshape(NUM, FACTOR).argmax(1) + FACTOR * jnp.arange(NUM)
    best = jax.tree.map(lambda leaf: leaf[chosen], out.sequences)
    found[f"likeliest of {FACTOR}"] = Outcome(best, jnp.zeros(NUM), out.log_prob[chosen], out.cost)
    return found


def _power_mh(key: PRNGKeyArray, target: Target) -> dict[str, Outcome]:
    moves = moves_per_block(target.max_tokens, FACTOR)
    out = power.run(key, target, num_chains=NUM, block_size=BLOCK, moves_per_block=moves, cut=CUT)
    assert out.cost is not None
    return {"power MH": Outcome(out.sequences, jnp.zeros(NUM), out.log_prob, out.cost)}


def _power_smc(key: PRNGKeyArray, target: Target) -> dict[str, Outcome]:
    out = power_smc.run(key, target, num_particles=NUM * FACTOR, ramp=target.max_tokens / 2)
    log_prob = target.token_log_probs(out.sequences.tokens, out.sequences.length).sum(1)
    return {"Power-SMC": Outcome(out.sequences, out.log_weights, log_prob, out.cost)}


def _tempering(key: PRNGKeyArray, target: Target) -> dict[str, Outcome]:
    assert target.alpha is not None
    ladder = ladders.geometric(1, float(target.alpha), RUNGS)
    sweeps = 1 + moves_per_block(target.max_tokens, FACTOR / RUNGS)
    out = parallel_tempering.run(
        key,
        target,
        ladder,
        num_chains=NUM,
        block_size=BLOCK,
        sweeps_per_block=sweeps,
        moves_per_sweep=1,
        cut=CUT,
    )
    assert out.cost is not None
    return {"tempering": Outcome(out.sequences, jnp.zeros(NUM), out.log_prob, out.cost)}


FAMILIES: dict[str, Callable[[PRNGKeyArray, Target], dict[str, Outcome]]] = {
    "low temperature": _low_temperature,
    "power MH": _power_mh,
    "Power-SMC": _power_smc,
    "tempering": _tempering,
}
