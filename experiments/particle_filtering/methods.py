"""Ways to answer with a language model and a process reward, at N strings: what
`particle_filtering` compares.

A method runs a sampler and then chooses an answer by votes: every string votes for its answer with
a weight, and the best string alone is a vote too.  Methods that share their strings are one family
and run once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import ppl
from ppl.sequences import Sequences
from ppl.target import Target
from samplers.base import Cost
from samplers.results import Choice, Weighted
from samplers.search import best_of_n, step_search
from samplers.smc import entropic, particle_filtering

WIDTH = 4
"""Continuations per kept string in beam search and DVTS, as published."""


class Outcome(NamedTuple):
    """N strings, the votes [N] (log-weights, -inf is none) of each method, the cost, and calls of
    the reward [].
    """

    sequences: Sequences
    votes: dict[str, Float[Array, " N"]]
    cost: Cost
    reward_calls: Int[Array, ""]


class Measured(NamedTuple):
    """Accuracy with its standard error, and per run: tokens, sequential forward passes, calls of
    the reward.
    """

    accuracy: float
    std_error: float
    tokens: float
    forwards: float
    reward_calls: float


class Task(NamedTuple):
    """One problem: the language model, its process reward, where steps end, and how many there
    usually are.
    """

    p: Target
    reward: Any
    steps: ppl.Steps
    max_steps: int


Family = Callable[[PRNGKeyArray, Task, int], Outcome]


def _best(scores: Float[Array, " N"]) -> Float[Array, " N"]:
    """The vote of the highest score alone."""
    return jnp.where(
        (jnp.arange(scores.shape[0]) == jnp.argmax(scores)) & ~jnp.isneginf(scores), 0.0, -jnp.inf
    )


def _independent(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    out = best_of_n.run(key, task.p * ppl.reward(ppl.log_odds(task.reward)), num_samples=num)
    votes = {
        "best-of-n": _best(out.scores),
        "weighted best-of-n": jax.nn.log_sigmoid(out.scores),
        "majority": jnp.zeros(num),
    }
    return Outcome(out.sequences, votes, _drawing(out.sequences), jnp.int32(num))


def _drawing(x: Sequences) -> Cost:
    """What drawing the strings took, without the passes that score p again: the reward does not
    need them.
    """
    passes = jnp.minimum(x.length.max() + 1, x.tokens.shape[1])
    tokens = (x.length + x.ended).sum(dtype=jnp.int32)
    return Cost(tokens=tokens, forwards=passes, depth=passes)


def _weighted(name: str, task: Task, out: Weighted, *, looked_ahead: bool = False) -> Outcome:
    """The best string of an exact population, and its posterior vote."""
    x, history = out.sequences, out.history
    assert history is not None and out.trace.active is not None
    scores = particle_filtering.rewarded(task.p, task.reward, task.steps).log_potential(
        x.tokens, x.length
    )
    calls = (history.drawn[:, :, 0] >= 0).sum() + (
        out.trace.active[:-1].sum() if looked_ahead else 0
    )
    return Outcome(x, {name: _best(scores), f"{name}, vote": out.log_weights}, out.cost, calls)


def _published(name: str, out: Choice) -> Outcome:
    assert out.details is not None
    calls = (out.details["history"].drawn[:, :, 0] >= 0).sum()
    return Outcome(out.sequences, {name: _best(out.scores)}, out.cost, calls)


def _pf(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    out = particle_filtering.run(
        key, task.p, task.reward, task.steps, num_particles=num, history=True
    )
    return _weighted("PF exact", task, out)


def _pf_each_step(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    """What separates annealing from the trigger: entropic filtering resamples after
    every step too.
    """
    options = {"num_particles": num, "threshold": particle_filtering.ALWAYS, "history": True}
    out = particle_filtering.run(key, task.p, task.reward, task.steps, **options)
    return _weighted("PF exact each step", task, out)


def _pf_published(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    args = (task.p, task.reward, task.steps)
    return _published(
        "PF published", particle_filtering.published(key, *args, num_particles=num, history=True)
    )


def _epf(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    options = {"num_particles": num, "max_steps": task.max_steps, "history": True}
    return _weighted(
        "ePF exact", task, entropic.run(key, task.p, task.reward, task.steps, **options)
    )


def _epf_lookahead(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    options = {
        "num_particles": num,
        "max_steps": task.max_steps,
        "history": True,
        "lookahead": True,
    }
    out = entropic.run(key, task.p, task.reward, task.steps, **options)
    return _weighted("ePF exact + look-ahead", task, out, looked_ahead=True)


def _epf_published(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
    options = {"num_particles": num, "max_steps": task.max_steps, "history": True}
    return _published(
        "ePF published", entropic.published(key, task.p, task.reward, task.steps, **options)
    )


def _search(name: str, search: Callable[..., Choice]) -> Family:
    def run(key: PRNGKeyArray, task: Task, num: int) -> Outcome:
        out = search(key, task.p, task.reward, task.steps, num_beams=num, width=min(WIDTH, num))
        assert out.details is not None
        votes = {name: _best(out.scores)}
        return Outcome(out.sequences, votes, out.cost, out.details["num_scored"])

    return run


FAMILIES: dict[str, Family] = {
    "independent draws": _independent,
    "PF exact": _pf,
    "PF exact each step": _pf_each_step,
    "PF published": _pf_published,
    "ePF exact": _epf,
    "ePF exact + look-ahead": _epf_lookahead,
    "ePF published": _epf_published,
    "beam search": _search("beam search", step_search.beam),
    "DVTS": _search("DVTS", step_search.dvts),
}
