"""Entropic particle filtering (arXiv 2510.05825): particle filtering that resamples from a hotter
law at first.

`run` carries the ratio of weights and selection, so it is exact; `published` does not, as public
code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from jaxtyping import PRNGKeyArray

from ppl.steps import Steps
from ppl.target import Target

from ..base import Guarantee
from ..population import ALWAYS
from ..registry import sampler
from ..resampling import systematic
from ..results import Choice, Weighted
from ..strings.selection import compose, entropic, next_step
from . import particle_filtering
from . import sequential as smc
from .particle_filtering import run_published


@sampler(Guarantee.EXACT, proof="tests/samplers/smc/test_entropic.py")
def run(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_particles: int = 32,
    history: bool = False,
    max_steps: int | None = None,
    lookahead: bool = False,
    **options: Unpack[smc.RoundOptions],
) -> Weighted:
    """Entropic particle filtering in its exact form: SMC for p(x) odds(r(x)), resampled from A
    proportional to W^(1/T).

        T = max(1, (N / ESS) (1 - t / max_steps))  while ESS < N / 2 and t < max_steps / 2,  else 1

    after t steps.  A draw of particle a carries W_a / A_a, so E[exp(log_z)] = sum_x p(x) odds(r(x))
    as in `particle_filtering.run`; annealing only keeps more lineages while the process reward is
    least to be trusted.

    Args:
        max_steps: when T has come down to 1, twice; by default the most steps that a string can
            have, which for delimiters is its tokens: pass the number that is usual.
        lookahead: look-ahead modulation: anneal not W but W e^eta, eta the log-weight of one drawn
            successor (`selection.next_step`); costs as many tokens again.
        options: as in `smc.run`; by default systematic resampling after every step, for A is nearly
            even by design and its ESS no trigger.

    The others, and what it raises, as in `particle_filtering.run`.
    """
    annealing = entropic(_count(p, steps, max_steps))
    selection = compose(next_step(steps), annealing) if lookahead else annealing
    options = smc.RoundOptions(threshold=ALWAYS, selection=selection) | options
    counts = {"num_particles": num_particles, "history": history}
    return particle_filtering.run(key, p, reward, steps, **counts, **options)


@sampler(Guarantee.HEURISTIC, proof="tests/samplers/smc/test_entropic.py")
def published(
    key: PRNGKeyArray,
    p: Target,
    reward: Callable[..., Any],
    steps: Steps,
    *,
    num_particles: int = 32,
    max_steps: int | None = None,
    history: bool = False,
) -> Choice:
    """Entropic particle filtering as published (ESS preset): systematic draws from softmax(l / T),
    l absolute log-odds.

    As in `particle_filtering.published` weights are never set back and ended strings are drawn
    again: it has no target. For N to infinity the population with its `log_weights` has the law

        p(x) odds(r(x)) prod_{t < R} odds(r(x_1:min(t, |x|)))^(1 / T_t)

    with R the steps of the longest run, and where the temperatures follow, one after another, from
    the laws mu_t of the population after t steps:

        rho_t = (E odds)^2 / E odds^2 under mu_t
        T_t   = max(1, (1 - t / max_steps) / rho_t)  while rho_t < 1/2 and t < max_steps / 2, else 1
        mu_t+1(x) proportional to mu_t(x_1:t) odds(r(x_1:t))^(1 / T_t) p(x_t+1 | x_1:t)

    `best` is the highest score, which systematic draws do not lose.

    Arguments and errors as in `run` and `particle_filtering.published`.
    """
    selection = entropic(_count(p, steps, max_steps))
    options = {"num_particles": num_particles, "history": history}
    return run_published(key, p, reward, steps, selection, systematic, **options)


def _count(p: Target, steps: Steps, max_steps: int | None) -> int:
    return steps.max_rounds(p.max_tokens) if max_steps is None else max_steps
