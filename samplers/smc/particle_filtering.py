"""Particle filtering with process rewards (arXiv 2502.01618): SMC whose rounds are steps of text.

`run` is exact for p(x) odds(r(x)), odds(r) = r / (1 - r): the increment of a step is the ratio of
successive odds, and resampling sets weights back.  `published` is what public code does: it
resamples from absolute scores again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppl.rewards import step_scores
from ppl.scorers import log_odds
from ppl.steps import Steps
from ppl.target import Target, check_plain

from ..base import Guarantee, Resampler
from ..population import ALWAYS
from ..registry import sampler
from ..resampling import multinomial
from ..results import Choice, Weighted
from ..strings.proposals import bootstrap
from ..strings.selection import Selection, by_weight
from . import sequential as smc


def rewarded(p: Target, reward: Callable[..., Any], steps: Steps) -> Target:
    """p(x) odds(r(x)), paid out step by step: the target of the exact forms."""
    return p * step_scores(log_odds(reward), steps)


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_particle_filtering.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_particles: int = 32,
    history: bool = False,
    **options: Unpack[smc.RoundOptions],
) -> Weighted:
    """Particle filtering in its exact form: SMC for p(x) odds(r(x)), one round for each step of
    text.

    A string x_1:t at a boundary has been paid odds(r(x_1:t)), so the next step adds log odds(r_t')
    - log odds(r_t); a string that has ended keeps its weight.  E[exp(log_z)] = sum_x p(x)
      odds(r(x)) at any number of particles.

    Args:
        key: typed key.
        p: what is tilted; a language model or any other target.
        reward: (tokens [N, T], length [N]) -> [N] in (0, 1), a pytree callable, or `ppl.python(f)`;
            as in `ppl.log_odds`, which clips it to [1e-7, 1 - 1e-7].
        steps: where steps of text end.
        num_particles, history: as in `smc.run`.
        options: as in `smc.run`; by default systematic resampling when ESS < N / 2.

    Raises:
        ValueError: as `smc.run`, and when traced if the reward does not return one number per
            string.
    """
    counts = {"num_particles": num_particles, "history": history}
    return smc.run(key, rewarded(p, reward, steps), steps=steps, **counts, **options)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/smc/test_particle_filtering.py")
def published(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_particles: int = 32,
    history: bool = False,
) -> Choice:
    """Particle filtering as published: after every step multinomial draws from softmax of the
    absolute log-odds.

    Weights are never set back, and strings that have ended are drawn again with their last score
    while others run: it has no target that one would choose.  For N to infinity the population with
    its `log_weights` (or what the last resampling makes of it) has the law

        p(x) prod_{t = 1..T} odds(r(x_1:min(t, |x|)))

    with T the steps of the longest run and x_1:t the first t steps,

    which differs from p(x) odds(r(x)) and favours strings that end early with a high score.  `best`
    is the highest score among the survivors of one more resampling.

    Args:
        p: a language model; the rest as in `run`.
        history: record the genealogy.

    Raises:
        ValueError: if p has a power or a potential, or as `run`.
    """
    options = {"num_particles": num_particles, "history": history}
    return run_published(key, p, reward, steps, by_weight, multinomial, **options)


def run_published(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    selection: Selection,
    scheme: Resampler,
    *,
    num_particles: int,
    history: bool,
) -> Choice:
    """The common part of the published presets: SMC that keeps all weights when it resamples, which
    it always does.

    Returns:
        `Choice` from the population as it was before its last resampling, which is not drawn out
        of it: strings that did not survive that have score -inf.  details: "log_weights" [N], all
        final scores, log-odds of the reward, -inf for rewards that were no probability;
        "num_invalid" [], how many these were; "rounds" [], steps of text until the last string
        ended; "history", if asked for.
    """
    check_plain(p, ", which the published form does not weigh; use `run`, which does")
    target = rewarded(p, reward, steps)
    how = smc.method(
        target,
        num_particles=num_particles,
        proposal=bootstrap,
        resampler=keeping_weights(scheme),
        threshold=ALWAYS,
        selection=selection,
        steps=steps,
    )
    return _run(key, target, how, num_particles, history)


@functools.cache  # equal schemes give one function, so that nothing is compiled twice
def keeping_weights(scheme: Resampler) -> Resampler:
    """`scheme`, but its draws keep the weights that they had: w_j = W_a (N A_a) / (N A_a).

    This is no unbiased scheme.  With it log-weight + log_z of a particle is the sum of its
    increments since the empty string, which is its absolute score.
    """

    def resampler(key: PRNGKeyArray, log_probs: Float[Array, " N"], num: int) -> tuple:
        ancestors = scheme(key, log_probs, num)
        return ancestors, (jax.nn.log_softmax(log_probs) + jnp.log(num))[ancestors]

    return resampler


@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(key: Any, target: Target, how: smc.Method, num: int, history: bool) -> Choice:
    run_key, last_key = jax.random.split(key)
    run = smc.loop(run_key, target, how, num, history=history)
    p, out = run.particles, smc.result(run)
    scores = p.log_weights + p.log_z
    survivors, _ = how.resampler(last_key, jnp.where(jnp.isneginf(scores).all(), 0.0, scores), num)
    left = jnp.full(num, -jnp.inf, jnp.float32).at[survivors].set(scores[survivors])
    return Choice(
        samples=out.samples,
        scores=left,
        best=jnp.argmax(left).astype(jnp.int32),
        cost=out.cost,
        log_prob=out.log_prob,
        details={
            "log_weights": scores,
            "num_invalid": out.num_invalid,
            "rounds": out.rounds,
            "history": out.history,
        },
    )
