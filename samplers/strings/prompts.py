"""Several prompts at once: a sampler of one target, mapped over targets so that their rows go
through the model in one batch.

    out = run_each(key, one, targets, num_rows=32)         # one(key, target) for each, side by side

Every prompt keeps its own prefix, key, resampling and evidence, so each of them draws what it draws
alone.  Loops and conditions that ask `ppl.rows.anywhere` stay loops and conditions under the map.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ppl.checks import check_count
from ppl.pytrees import register_dataclass
from ppl.rows import PROMPTS
from ppl.target import SCORED_LOGITS, Target

from ..base import Holding


def run_each(
    key: PRNGKeyArray,
    one: Holding,
    target: Target | Sequence[Target],
    *,
    num_rows: int,
    batch_size: int | None = None,
) -> Any:
    """one(key, target); or of each of P targets over one model, in one jit, and then leaves of the
    result have P first.

    Prompt number i has key number i of split(key, P).  As many prompts run side by side as have
    `batch_size` rows, at least one, and the others after them, in groups of one size; the loops of
    a group turn until its last prompt is done.

    Args:
        key: typed key.
        one: a sampler of one target, as `base.holding` makes it.
        target: a target, or P of them.
        num_rows: N, the rows of one prompt.
        batch_size: rows that go through the model at a time; by default `rows_together`.

    Raises:
        ValueError: if `batch_size` < 1, there is no target, or they differ in model, horizon,
            padded prompt length, or kind of power and potential.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if isinstance(target, Target):
        return one(key, target)
    first_of(target)
    num = len(target)
    most = rows_together(target[0]) if batch_size is None else batch_size
    groups = -(-num // max(most // num_rows, 1))
    return _together(jax.random.split(key, num), one, stack(target), groups)


def rows_together(target: Target) -> int:
    """How many rows go through the model at a time if nobody says otherwise: their logits have room
    in memory (`SCORED_LOGITS` numbers).
    """
    return max(SCORED_LOGITS // target.lm.vocab_size, 1)


def first_of(targets: Target | Sequence[Target]) -> Target:
    """The target, or the first of several.

    Raises:
        ValueError: if there is none, or something else stands in the list.
    """
    if isinstance(targets, Target):
        return targets
    check_count("the number of targets", len(targets))
    for target in targets:
        if not isinstance(target, Target):
            raise ValueError(
                f"expected targets, got a list with a {type(target).__name__}; make them with"
                " lm.given_each(prompts, max_tokens=...)"
            )
    return targets[0]


@functools.partial(jax.jit, static_argnames="groups")
def _together(keys: Any, one: Any, targets: Stacked, groups: int) -> Any:
    def alone(key: PRNGKeyArray, varying: list) -> Any:
        return one(key, targets.one(varying))

    def group(args: tuple) -> Any:
        return jax.vmap(alone, axis_name=PROMPTS)(*args)

    rows = (keys, targets.varying)
    if groups == 1:
        return group(rows)
    num = keys.shape[0]
    # The last group is filled up with a prompt that it has.
    index = np.minimum(np.arange(groups * -(-num // groups)), num - 1)
    split = jax.tree.map(lambda leaf: leaf[index].reshape(groups, -1, *leaf.shape[1:]), rows)
    found = jax.lax.map(group, split)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], found)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """P pytrees of one structure: leaves that all share (the weights) as they are, the others
    [P, ...].
    """

    shared: list
    varying: list
    structure: Any = dataclasses.field(metadata={"static": True})

    def one(self, varying: list) -> Any:
        """One of them, from its rows of the leaves that vary."""
        leaves = [
            own if leaf is None else leaf for leaf, own in zip(self.shared, varying, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def stack(trees: Sequence[Any], what: str = "targets") -> Stacked:
    """Pytrees of one structure and shapes, stacked.

    Raises:
        ValueError: if there is none, or they differ in what is static or in shapes: of targets, in
            model, horizon, padded prompt length, or kind of power and potential.
    """
    check_count(f"the number of {what}", len(trees))
    flat = [jax.tree.flatten(tree) for tree in trees]
    leaves, structure = [leaf for leaf, _ in flat], flat[0][1]
    shapes = [[jnp.shape(leaf) for leaf in row] for row in leaves]
    if any(s != structure for _, s in flat) or any(s != shapes[0] for s in shapes):
        raise ValueError(
            f"expected {what} with one model, horizon, padded prompt length and kind of power and"
            f" potential, got {what} that differ{_lengths(trees)}; make targets with lm.given_each,"
            " and give all a power and the same potentials, or none"
        )
    columns = list(zip(*leaves, strict=True))
    same = [all(leaf is column[0] for leaf in column) for column in columns]
    shared = [column[0] if s else None for column, s in zip(columns, same, strict=True)]
    varying = [None if s else jnp.stack(column) for column, s in zip(columns, same, strict=True)]
    return Stacked(shared, varying, structure)


def _lengths(trees: Sequence[Any]) -> str:
    if not all(isinstance(tree, Target) for tree in trees):
        return ""
    sizes = [target.prefix.tokens.shape[0] for target in trees]
    horizons = [target.max_tokens for target in trees]
    return f" (padded prompts {sizes}, max_tokens {horizons})"


def apart(out: Any) -> list:
    """The result for each prompt, out of one whose leaves have prompts first."""
    num = jax.tree.leaves(out)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(num)]
