"""Search over steps of text with a process reward: beam search and diverse verifier tree search
(DVTS).

Both keep the steps that score highest and draw the next ones from the model: no target, and no
weights.  They are rounds over the same populations as SMC, with the choice of the best in place of
resampling.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppl.checks import check_counts
from ppl.pytrees import register_dataclass
from ppl.rows import take_rows
from ppl.sequences import Sequences, empty
from ppl.steps import Steps
from ppl.target import Target, check_plain

from .. import population
from ..base import Guarantee, Particles, particles
from ..population import Run
from ..registry import sampler
from ..results import Choice
from ..smc.particle_filtering import rewarded
from ..strings import costs, extending, growing
from ..strings.proposals import Proposal, as_proposal, bootstrap


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """n growing strings, a population whose log-weights are the scores, with what the method keeps
    of finished ones.
    """

    x: growing.Growing
    kept: Any
    num_scored: Int[Array, ""]


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_step_search.py")
def beam(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_beams: int = 16,
    width: int = 4,
    max_steps: int = 40,
) -> Choice:
    """Beam search over steps: of n strings keep the n / m best that still grow, and draw m next
    steps for each.

    Strings that end leave the beam for a pool that keeps the n best of them; the places are filled
    by the others, in turn from the best down.  The last of `max_steps` rounds runs to the string's
    end.  There is no target.  The published form is that of search-and-learn, with completed beams
    sorted by score.  Compare arXiv 2408.03314.

    Args:
        key: typed key.
        p: a language model.
        reward: as in `particle_filtering.run`.
        steps: where steps of text end.
        num_beams: n, a multiple of m.
        width: m, continuations for each string that is kept.
        max_steps: rounds.

    Returns:
        `Choice` of n strings, whose `scores` are the log-odds of their rewards; -inf in slots that
        were never filled, and for rewards that were no probability.  `details`: `ended` [n] whether
        the string was finished, by EOS or by the horizon, `rounds` [] steps of text until the last
        string ended, `num_scored` [] how often the process reward was asked for.

    Raises:
        ValueError: unless width divides num_beams and all are at least 1, or p has a power or a
            potential.
    """
    target, bound = check(p, reward, steps, num_beams, width, max_steps)
    return _beam(
        key, target, bound, num_beams, width, min(max_steps, bound.max_rounds(p.max_tokens))
    )


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/search/test_step_search.py")
def dvts(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_beams: int = 16,
    width: int = 4,
    max_steps: int = 40,
) -> Choice:
    """Diverse verifier tree search: n / m independent greedy searches, each keeps the best of m
    next steps.

    A search is over when the step that it keeps ends the string; its last m candidates are
    returned, of which the others may be unfinished (`ended`).  The last of `max_steps`
    rounds runs to the string's end. There is no target.  The published form is that of
    search-and-learn.

    Arguments, result and errors as in `beam`.
    """
    target, bound = check(p, reward, steps, num_beams, width, max_steps)
    return _dvts(
        key, target, bound, num_beams, width, min(max_steps, bound.max_rounds(p.max_tokens))
    )


def check(
    p: Target, reward: Callable[..., Any], steps: Steps, num_beams: int, width: int, max_steps: int
) -> tuple[Target, Steps]:
    check_counts(num_beams=num_beams, width=width, max_steps=max_steps)
    if num_beams % width:
        raise ValueError(
            f"expected width to divide num_beams, got {width} and {num_beams}; pass num_beams="
            f"{-(-num_beams // width) * width}"
        )
    check_plain(p, ", which a search does not weigh; use particle_filtering.run, which does")
    return rewarded(p, reward, steps), steps.within(p.space)


PROPOSAL: Proposal = as_proposal(bootstrap)


def loop(
    key: PRNGKeyArray,
    target: Target,
    steps: Steps,
    kept: Any,
    sizes: tuple[int, int],
    choose: Callable[[Search, Float[Array, " n"]], tuple[Search, Float[Array, " n"]]],
) -> Run:
    """Rounds of a step and a choice; the last one runs to the end of the strings."""
    num, max_steps = sizes
    keys = jax.random.split(key, max_steps)
    to_the_end = Steps(every=target.max_tokens).within(target.space)

    def one(key: PRNGKeyArray, run: Run, steps: Steps) -> Run:
        s = run.particles.state
        x, gain = extending.extend(target, PROPOSAL, steps).sample(key, s.x)
        num_scored = s.num_scored + (x.drawn > 0).sum(dtype=jnp.int32)
        p = population.moved(run, Search(x, s.kept, num_scored), gain).particles
        chosen = Particles(*choose(p.state, p.log_weights), p.log_z)
        run = dataclasses.replace(run, particles=chosen)
        return population.end(run, costs.of_round(target, PROPOSAL, x))

    def going(run: Run) -> Bool[Array, ""]:
        return run.particles.state.x.active.any()

    start = particles(Search(growing.start(target, PROPOSAL, num), kept, jnp.int32(0)), num)
    run = population.spend(population.start(start), costs.prompt(target, PROPOSAL))
    run = population.rounds(
        keys,
        one(keys[0], run, steps if max_steps > 1 else to_the_end),
        lambda key, run: one(key, run, steps),
        lambda run: going(run) & (run.rounds < max_steps - 1),
    )
    # A loop of at most one turn, for the same reason as in `base.resample`.
    return jax.lax.while_loop(going, lambda run: one(keys[-1], run, to_the_end), run)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _beam(key: Any, target: Target, steps: Steps, num: int, width: int, max_steps: int) -> Choice:
    def choose(s: Search, scores: Array) -> tuple[Search, Array]:
        going, (pool, pool_scores) = s.x.active, s.kept
        ended_scores = jnp.where(going | (s.x.drawn == 0), -jnp.inf, scores)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pool, s.x.sequences)
        pool_scores, best = jax.lax.top_k(jnp.concatenate([pool_scores, ended_scores]), num)
        order = jnp.argsort(jnp.where(going, -scores, jnp.inf))
        places = jnp.clip(going.sum(dtype=jnp.int32), 1, num // width)
        ancestors = order[jnp.arange(num, dtype=jnp.int32) % places]
        x = growing.reorder(target, PROPOSAL, s.x, ancestors)
        kept = take_rows(both, best), pool_scores
        return dataclasses.replace(s, x=x, kept=kept), scores[ancestors]

    nothing = empty(num, target.max_tokens, target.lm.eos), jnp.full(num, -jnp.inf, jnp.float32)
    run = loop(key, target, steps, nothing, (num, max_steps), choose)
    pool, scores = run.particles.state.kept
    return choice(run, pool, scores, scores > -jnp.inf)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _dvts(key: Any, target: Target, steps: Steps, num: int, width: int, max_steps: int) -> Choice:
    slots = jnp.arange(num, dtype=jnp.int32)

    def choose(s: Search, scores: Array) -> tuple[Search, Array]:
        first = jnp.argmax(scores.reshape(-1, width), axis=1)
        best = slots // width * width + first.repeat(width)
        over = ~s.x.active[best]
        # In the round in which a search ends, all its candidates are new.
        ended = jnp.where(over & (s.x.drawn > 0), ~s.x.active, s.kept)
        ancestors = jnp.where(over, slots, best)
        x = growing.reorder(target, PROPOSAL, s.x, ancestors)
        x = dataclasses.replace(x, active=x.active & ~over)
        return dataclasses.replace(s, x=x, kept=ended), scores[ancestors]

    run = loop(key, target, steps, jnp.zeros(num, bool), (num, max_steps), choose)
    s = run.particles.state
    return choice(run, s.x.sequences, run.particles.log_weights, s.kept)


def choice(
    run: Run, pool: Sequences, scores: Float[Array, " n"], ended: Bool[Array, " n"]
) -> Choice:
    return Choice(
        samples=pool,
        scores=scores,
        best=jnp.argmax(scores).astype(jnp.int32),
        cost=run.cost,
        details={
            "ended": ended,
            "rounds": run.rounds,
            "num_scored": run.particles.state.num_scored,
        },
    )
