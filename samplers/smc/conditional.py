"""Conditional SMC and particle Gibbs: SMC in which the last particle follows a given string, the
reference.

The reference is weighed like everybody else, by its own prefixes under the law it would have been
drawn from; when the others resample they choose among all N, and it stays.  With a reference drawn
from pi = gamma / Z, the population has SMC's own law tilted by Z-hat / Z, and a particle drawn from
the final weights has law pi again: a Markov kernel over strings, exact at any number of particles.
Andrieu, Doucet and Holenstein (2010).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from ppl.potential import State
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences
from ppl.target import Target

from .. import kernels, population
from ..base import Cost, Guarantee, Kernel, Particles, Resampler, holding
from ..registry import sampler
from ..resampling import multinomial, pinned_multinomial
from ..results import Weighted
from ..strings import costs, extending, growing
from ..strings.proposals import Draw, Proposal
from . import sequential as smc


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_conditional.py")
def run(
    key: PRNGKeyArray,
    target: Target,
    reference: Sequences,
    *,
    num_particles: int = 32,
    ancestor_sampling: bool = False,
    history: bool = False,
    **options: Unpack[smc.Options],
) -> Weighted:
    """SMC in which the last of N particles follows `reference`.

    For a reference from pi, E[ sum_i W_i f(x_i) ] = E_pi[f] and E[log Z-hat] >= log Z.

    With ancestor sampling the reference's past is drawn anew whenever the others resample, at token
    t from

        w_i gamma_T(x^i_1:t x'_t+1:T) / gamma_t(x^i_1:t),

    by scoring the rest of the reference after all N prefixes: T - t more forward passes, and chains
    that mix also at the beginning of the string (Lindsten, Jordan and Schon 2014, arXiv 1401.0604).
    Strings are padded by EOS here, so an unfinished particle may take the reference's EOS, and one
    that has ended fits whatever has nothing else to come.

    Args:
        key: typed key.
        target: gamma.
        reference: one string of positive density; it is the last of the result unless its ancestor
            was drawn anew.
        num_particles: N, the reference included.
        ancestor_sampling: draw the reference's ancestors anew.
        history: record the genealogy.
        options: as in `smc.run`, except `resampler`, which is conditional multinomial.  Proposals
            need a `law`, and one that cannot draw the reference gives it weight 0; its slot then
            goes on from a living particle.

    Returns:
        `Weighted`.  The cost counts ancestor sampling's passes for the whole rest of the
        reference, though they end early if no particle can take it.

    Raises:
        ValueError: if `reference` is not one string of the target, a resampler is given, or
            ancestors are to be sampled at delimiters.
    """
    target.space.check(reference)
    if reference.length.shape != (1,):
        raise ValueError(
            f"expected a reference of one string, got {reference.length.shape[0]}; take rows by"
            " take_rows"
        )
    how = bind(target, num_particles, ancestor_sampling, options)
    return _run(key, target, how, reference, num_particles, ancestor_sampling, history)


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_conditional.py")
def kernel(
    target: Target,
    *,
    num_particles: int = 32,
    ancestor_sampling: bool = False,
    batch_size: int = 1,
    **options: Unpack[smc.Options],
) -> Kernel:
    """Particle Gibbs: chains over strings that leave gamma / Z invariant at any N >= 1.

    `kernels.conditional` of conditional SMC: a sweep runs it on the chain's string and draws the
    next one from the final weights; N = 1 stays.  The state is `Sequences` of C chains, info is
    that of `kernels.conditional`.  A chain whose population is all dead stays where it is.

    Args:
        target, num_particles, ancestor_sampling, options: as in `run`.
        batch_size: chains that run at a time; the others wait.  One at a time moves cache rows only
            if its particles resample.

    Raises:
        ValueError: as in `run`.
    """
    how = bind(target, num_particles, ancestor_sampling, options)
    sweep = kernels.conditional(
        around(target, how, num_particles, ancestor_sampling), batch_size=batch_size
    )
    return Kernel(Partial(strings, target), sweep.step)


def strings(target: Target, x: Sequences) -> Sequences:
    """x; raises ValueError unless they are strings of the target."""
    target.space.check(x)
    return x


def around(
    target: Target, how: smc.Method, num_particles: int, ancestor_sampling: bool = False
) -> kernels.Sampler:
    """Conditional SMC on one string [T], as a sampler for `samplers.kernels`."""
    options = {"num_particles": num_particles, "ancestor_sampling": ancestor_sampling}
    return holding(_around, target, how, **options)


def _around(
    key: PRNGKeyArray, target: Target, how: smc.Method, x: Sequences, **options: Any
) -> Weighted:
    one_row = jax.tree.map(lambda leaf: leaf[None], x)
    return _chained(particles_of(key, target, how, one_row, history=False, **options), target, how)


def fresh(target: Target, how: smc.Method, num_particles: int) -> kernels.Sampler:
    """The same SMC without a reference: the string that it is given does not count."""
    how = dataclasses.replace(how, resampler=multinomial)
    return holding(_fresh, target, how, num_particles=num_particles)


def _fresh(
    key: PRNGKeyArray, target: Target, how: smc.Method, x: Sequences, *, num_particles: int
) -> Weighted:
    return _chained(smc.result(smc.loop(key, target, how, num_particles)), target, how)


def _chained(out: Weighted, target: Target, how: smc.Method) -> Weighted:
    """A run as a part of others, of which none reads the prompt again."""
    prompt = costs.prompt(target, how.proposal)
    return dataclasses.replace(out, cost=jax.tree.map(jnp.subtract, out.cost, prompt))


def bind(
    target: Target, num_particles: int, ancestor_sampling: bool, options: smc.Options
) -> smc.Method:
    """The options of conditional SMC, checked."""
    if "resampler" in options:
        raise ValueError(
            "expected no resampler: conditional SMC is exact with its own,"
            " resampling.pinned_multinomial; leave it out"
        )
    how = smc.method(
        target, num_particles=num_particles, **{**options, "resampler": pinned_multinomial}
    )
    if ancestor_sampling and how.steps is not None and how.steps.every is None:
        raise ValueError(
            "expected particles of equal length where ancestors are sampled, got steps that end at"
            " delimiters; use ppl.Steps(every=...) or rounds of one token, or leave"
            " ancestor_sampling out"
        )
    return how


def particles_of(
    key: PRNGKeyArray,
    target: Target,
    how: smc.Method,
    reference: Sequences,
    num_particles: int,
    ancestor_sampling: bool,
    history: bool,
) -> Weighted:
    """`run` with its options bound, to be traced."""
    slots = jnp.arange(num_particles, dtype=jnp.int32)
    pinned = growing.Follow(slots == num_particles - 1, take_rows(reference, jnp.zeros_like(slots)))
    adopt = (
        functools.partial(_ancestor_sampler, target, how, reference) if ancestor_sampling else None
    )
    run = smc.loop(
        key, target, how, num_particles, history=history, pinned=pinned, ancestors_of=adopt
    )
    if ancestor_sampling:
        run = population.spend(run, _scoring_cost(target, how, run.rows, reference))
    return smc.result(run)


_run = functools.partial(jax.jit, static_argnums=(4, 5, 6))(particles_of)


# Ancestor sampling.


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Follow(Proposal):
    """Writes down `tokens` [T], at no charge: a move weighs it by log gamma_t / gamma_{t-1}.
    State: position [N].
    """

    tokens: Int[Array, " T"]

    def draw(
        self, keys: Key[Array, " N"], target: Target, logits: Array, potential: State, state: State
    ) -> Draw:
        return Draw(
            self.tokens[jnp.minimum(state, self.tokens.shape[0] - 1)],
            jnp.zeros(state.shape, jnp.float32),
        )

    def update(self, target: Target, state: State, token: Int[Array, " N"]) -> State:
        return state + 1


def ancestor_log_weights(
    key: PRNGKeyArray, target: Target, how: smc.Method, reference: Sequences, p: Particles
) -> Float[Array, " N"]:
    """log of w_i gamma_T(x^i x') / gamma_t(x^i), x' what the reference [1, T] holds after t tokens.

    All particles have t tokens or have ended.  `key` is for the move, which draws nothing.
    """
    x = dataclasses.replace(p.state, proposal=p.state.sequences.length)
    follow = extending.extend(target, _Follow(reference.tokens[0]), block_size=how.block_size)
    t = jnp.max(jnp.where(x.active, x.sequences.length, 0))

    def body(carry: tuple) -> tuple:
        x, log_weights = carry
        x, dw = follow.sample(key, x)
        return x, log_weights + dw

    # A particle that has ended is not moved and keeps its weight, but only an end can follow.
    fits = x.active | (reference.length[0] <= t)
    start = body((x, jnp.where(fits, p.log_weights, -jnp.inf)))
    return jax.lax.while_loop(lambda carry: carry[0].active.any(), body, start)[1]


def _ancestor_sampler(
    target: Target, how: smc.Method, reference: Sequences, p: Particles
) -> Resampler:
    """Conditional multinomial resampling of `p` in which the reference draws its ancestor too."""

    def adopt(key: PRNGKeyArray, log_probs: Float[Array, " N"], num: int) -> Int[Array, " N"]:
        others_key, score_key, own_key = jax.random.split(key, 3)
        ancestors = pinned_multinomial(others_key, log_probs, num)
        # By the weights, even where the others are drawn from other probabilities: the carried
        # ratio makes up for it.
        log_weights = ancestor_log_weights(score_key, target, how, reference, p)
        own = multinomial(own_key, log_weights, 1)[0]
        return jnp.where(jnp.isneginf(log_weights).all(), ancestors, ancestors.at[-1].set(own))

    return adopt


def _scoring_cost(
    target: Target, how: smc.Method, rows: dict[str, Array], reference: Sequences
) -> Cost:
    """What scoring the rest of the reference took at all resamplings of a run, if particles could
    take all of it.  (What judges read for it is not known.)
    """
    size = 1 if how.steps is None else how.steps.max_step_tokens(target.max_tokens)
    rounds = jnp.arange(rows["resampled"].shape[0], dtype=jnp.int32)
    length = size * rounds
    rest = jnp.minimum(reference.length[0] + 1, target.max_tokens) - length
    passes = jnp.where(rows["resampled"], jnp.maximum(rest, 1), 0)
    active = jnp.roll(rows["active"], 1)
    # The first of them reads the prompt and `length` tokens, each of the others one more.
    read = passes * (target.prefix.length + length) + passes * (passes - 1) // 2
    made = passes.sum(dtype=jnp.int32)
    return Cost(
        forwards=made,
        depth=made,
        potential_calls=(passes * active).sum(dtype=jnp.int32) * target.tilted,
        kv_read=(read.astype(jnp.float32) * active).sum(),
    )
