"""What moves of chains that go on from a cut have in common: the cuts, rows of strings that keep
what is before them, and the report.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from ppl.target import Target

from ..base import Cost
from ..results import MoveInfo, changed_rows, moved
from ..strings import costs, growing, regeneration
from ..strings.cuts import Cut, draw
from ..strings.growing import Follow, Growing
from ..strings.proposals import Proposal
from ..strings.regeneration import State


def begin(key: PRNGKeyArray, law: Cut, x: State) -> tuple[Int[Array, " C"], Key[Array, "3 C"]]:
    """A cut for every chain, and three more keys of each."""
    num, horizon = x.log_p.shape
    own = jax.vmap(lambda chain: jax.random.split(chain, 4))(jax.random.split(key, num))
    longest = jnp.full(num, horizon, jnp.int32)
    cut, _ = draw(own[:, 0], law, x.sequences.length, longest, horizon)
    return cut, own[:, 1:].T


def rows(
    keys: Key[Array, " C"],
    target: Target,
    proposal: Proposal,
    x: State,
    cut: Int[Array, " C"],
    proposed: Bool[Array, " C"],
    num: int,
) -> tuple[Growing, Key[Array, " CN"], Cost]:
    """`num` rows for every chain of `proposed`, one chain after another, that keep x_<cut; their
    keys, and what it took.
    """
    first = regeneration.start(target, proposal, regeneration.truncated(target, x, cut), proposed)
    own = jax.vmap(lambda chain: jax.random.split(chain, num))(keys).reshape(-1)
    chains = jnp.repeat(jnp.arange(cut.shape[0], dtype=jnp.int32), num)
    judged = Cost(judge_tokens=first.judged.sum(dtype=jnp.int32))
    cost = costs.replay(target, proposal, first) + judged
    return growing.reorder(target, proposal, first, chains), own, cost


def longer(
    own: Key[Array, " CN"], target: Target, proposal: Proposal, g: Growing, follow: Follow | None
) -> tuple[Growing, Cost]:
    """One more token of every row, and what it took; rows that follow draw nothing.

    `own` are the rows' keys, `target` is that of rows (`regeneration.each_times`).
    """
    keys = jax.vmap(jax.random.fold_in)(own, g.sequences.length)
    new = regeneration.grow(keys, target, proposal, g, follow)
    drawn = g.active if follow is None else g.active & ~follow.rows
    spent = dataclasses.replace(
        costs.one_pass(target, proposal, g),
        tokens=drawn.sum(dtype=jnp.int32),
        potential_calls=g.active.sum(dtype=jnp.int32) * target.tilted,
        judge_tokens=(new.judged - g.judged).sum(dtype=jnp.int32),
    )
    return dataclasses.replace(new, drawn=g.drawn + drawn), spent


def report(
    target: Target,
    x: State,
    new: State,
    accepted: Bool[Array, " C"],
    rows: Growing,
    **known: Any,
) -> MoveInfo:
    """What a step did that took chains from x to `new`, and what its rows met."""
    num = accepted.shape[0]
    tokens, missing, invalid = (
        leaf.reshape(num, -1) for leaf in (rows.drawn, rows.missing, rows.invalid)
    )
    seen: dict[str, Any] = {
        "tokens": tokens.sum(1, dtype=jnp.int32),
        "missing_support": missing.max(1),
        "invalid": invalid.any(1),
        "outside_support": jnp.isneginf(regeneration.log_density(target, new)),
    }
    changed = changed_rows(x.sequences, new.sequences)
    return moved(accepted, changed=changed, **(seen | known))
