"""Several prompts at once: targets over one model, stacked so that one compiled program runs them
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppl.checks import check_count
from ppl.target import Target


def stack(targets: Sequence[Target]) -> tuple[list, list, Any]:
    """Leaves that all targets share (the weights) as they are, the others stacked along a new first
    axis, structure.

    Raises:
        ValueError: if the targets differ in model, horizon, padded prompt length, or kind of power
            and potential.
    """
    check_count("the number of targets", len(targets))
    flat = [jax.tree.flatten(target) for target in targets]
    leaves, structure = [leaf for leaf, _ in flat], flat[0][1]
    shapes = [[jnp.shape(leaf) for leaf in row] for row in leaves]
    if any(s != structure for _, s in flat) or any(s != shapes[0] for s in shapes):
        sizes = [target.prefix.tokens.shape[0] for target in targets]
        horizons = [target.max_tokens for target in targets]
        raise ValueError(
            "expected targets with one model, horizon, padded prompt length and kind of power and"
            " potential, got"
            f" targets that differ (padded prompts {sizes}, max_tokens {horizons}); make them with"
            " lm.given_each, and"
            " give all targets a power and the same potentials, or none"
        )
    same = [all(leaf is column[0] for leaf in column) for column in zip(*leaves, strict=True)]
    shared = [
        column[0] if s else None for column, s in zip(zip(*leaves, strict=True), same, strict=True)
    ]
    varying = [
        None if s else jnp.stack(column)
        for column, s in zip(zip(*leaves, strict=True), same, strict=True)
    ]
    return shared, varying, structure


def unstack(shared: list, rows: list, structure: Any) -> Target:
    """One of the stacked targets, from its rows of the leaves that vary."""
    leaves = [row if leaf is None else leaf for leaf, row in zip(shared, rows, strict=True)]
    return jax.tree.unflatten(structure, leaves)
