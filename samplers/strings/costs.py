"""What it takes to extend strings: passes, tokens, what potentials were asked and judges read.

A pass reads every key and value of a row once, however many tokens it takes in; rows that have
ended, or wait, read nothing.  The prompt is one row.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ppl.target import Target

from ..base import Cost
from .growing import Follow, Growing, guides_read, reads
from .proposals import Proposal, as_proposal, bootstrap


def prompt(target: Target, proposal: Proposal) -> Cost:
    """The pass over the prompt, by the model and by the proposal's guides."""
    read = target.prefix.length + sum(guide.prefix.length for guide in proposal.guides)
    return Cost(
        forwards=jnp.int32(1 + len(proposal.guides)),
        depth=jnp.int32(1),
        kv_read=read.astype(jnp.float32),
    )


def one_pass(target: Target, proposal: Proposal, x: Growing) -> Cost:
    """The pass for the next token of the active strings, if there are any, and the guides' after
    it.
    """
    made = x.active.any().astype(jnp.int32)
    read = reads(target, x.sequences) + guides_read(proposal, x.sequences)
    return Cost(
        forwards=(1 + len(proposal.guides)) * made,
        depth=made,
        kv_read=jnp.where(x.active, read, 0).sum(dtype=jnp.float32),
    )


def of_round(target: Target, proposal: Proposal, x: Growing, follow: Follow | None = None) -> Cost:
    """All that the last round took; tokens of rows that followed were not drawn."""
    passes, ticks = x.passes.max(), x.drawn.max()
    drawn = x.drawn if follow is None else jnp.where(follow.rows, 0, x.drawn)
    asked = x.calls + x.drawn * target.tilted
    return Cost(
        tokens=drawn.sum(dtype=jnp.int32),
        forwards=passes + ticks * len(proposal.guides),
        potential_calls=asked.sum(dtype=jnp.int32),
        # The guides' passes and the model's do not wait for each other.
        depth=ticks if proposal.guides else passes,
        judge_tokens=x.judged.sum(dtype=jnp.int32),
        kv_read=x.read.sum(dtype=jnp.float32),
    )


def of_choice(target: Target, before: Growing, after: Growing, grows: Bool[Array, " N"]) -> Cost:
    """The pass over the strings `before`, if it was made, and the tokens chosen for rows `grows`;
    without guides.
    """
    made = before.logits is None
    drawn = grows.sum(dtype=jnp.int32)
    return dataclasses.replace(
        one_pass(target, as_proposal(bootstrap), before) if made else Cost(),
        tokens=drawn,
        potential_calls=drawn * target.tilted,
        judge_tokens=after.judged.sum(dtype=jnp.int32),
    )


def replay(target: Target, proposal: Proposal, x: Growing) -> Cost:
    """`regeneration.start`, which made `x`: the states of potential and guides are stepped there
    again.  What judges read is in x.judged, and so in `of_round`.
    """
    length = jnp.where(x.active, x.sequences.length, 0)
    passes, asked = length.max(), length.sum(dtype=jnp.int32)
    read = jnp.float32(0)
    for guide in proposal.guides:
        read += (length * guide.prefix.length + length * (length + 1) // 2).sum(dtype=jnp.float32)
    return Cost(
        forwards=passes * len(proposal.guides),
        depth=passes if proposal.guides else jnp.int32(0),
        potential_calls=asked * target.tilted,
        kv_read=read,
    )
