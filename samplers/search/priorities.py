"""What a best-first search pops first: functions of a node of the tree of steps and its parent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppl.pytrees import register_dataclass
from ppl.rewards import reward as at_the_end
from ppl.scorers import LogScore
from ppl.steps import Steps
from ppl.target import Target

from ..smc.particle_filtering import rewarded
from ..strings.growing import Growing


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Nodes:
    """N nodes of the tree of steps; every leaf has N first.

    Attributes:
        strings: prefixes, which are active, and strings that have ended.
        value: log Phi of them, the log-odds of the reward after the last step; 0 at the root.
        depth: steps from the root.
        score: the greatest is popped first; -inf in slots that hold nothing.
    """

    strings: Growing
    value: Float[Array, " N"]
    depth: Int[Array, " N"]
    score: Float[Array, " N"]


Order = Callable[[Nodes, Nodes], Float[Array, " N"]]
"""(parents, children) -> the scores of the children, which still have those of their parents."""


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Priority:
    """What a search pops first; made by `greedy`, `astar` and `levin`.

    Attributes:
        order: an `Order`, a function of some module.
        tilt: (p, reward, steps) -> the target whose log Phi is the value of nodes.
        reward: what `tilt` is given.
    """

    order: Order = dataclasses.field(metadata={"static": True})
    tilt: Callable[[Target, Any, Steps], Target] = dataclasses.field(metadata={"static": True})
    reward: Any = None


def greedy(reward: Callable[..., Any]) -> Priority:
    """The greatest process reward first; `reward` as in `particle_filtering.run`."""
    return Priority(order=_by_value, tilt=rewarded, reward=reward)


def astar(reward: Callable[..., Any]) -> Priority:
    """A*-decoding: the least f = g + h first, with h = 1 - r, r the process reward.

    The cost of a step from s to s' is max(0, h(s) - h(s')), which makes h consistent: f never falls
    along a path, f(x_1:t) = sum_s max(0, h_s - h_s-1) with h = 0 for the empty string, of which a
    reward says nothing.  So with all children (`likeliest`) and a queue that drops nothing the
    string chosen has the least f of all.  The other reading of the paper, max(0, h(s') - h(s)), has
    no such bound.  arXiv 2505.13672.

    Args:
        reward: as in `particle_filtering.run`.
    """
    return Priority(order=_by_least_cost, tilt=rewarded, reward=reward)


def levin(goal: LogScore | None = None) -> Priority:
    """Levin's search: the least depth / p(prefix) first, depth in steps.

    With all children (`likeliest`), one popped at a time and a queue that drops nothing, at most

        min_x depth(x) / p(x)      over goals x

    nodes are expanded, and the string chosen attains the minimum.  Sampled children lose that.
    Orseau et al. (2018); the process reward of arXiv 2405.16265 does not enter.

    Args:
        goal: a log-score, as in `ppl.reward`, that is -inf for strings that are no goal; what else
            it says does not matter.  By default every string is one.
    """
    return Priority(order=_by_depth_over_probability, tilt=_ending_in, reward=goal)


def _by_value(parents: Nodes, children: Nodes) -> Float[Array, " N"]:
    return children.value


def _by_least_cost(parents: Nodes, children: Nodes) -> Float[Array, " N"]:
    before = jnp.where(parents.depth > 0, jax.nn.sigmoid(-parents.value), 0.0)
    return parents.score - jnp.maximum(0.0, jax.nn.sigmoid(-children.value) - before)


def _by_depth_over_probability(parents: Nodes, children: Nodes) -> Float[Array, " N"]:
    return children.strings.log_prob - jnp.log(children.depth.astype(jnp.float32))


def _ending_in(p: Target, goal: LogScore | None, steps: Steps) -> Target:
    return p if goal is None else p * at_the_end(goal)
