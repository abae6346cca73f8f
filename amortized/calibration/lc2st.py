"""Local classifier tests: is the sampler right for this observation?

A network is trained to tell (theta, x) of the joint law from (draw, x), one draw of the sampler for
each simulation.  If q(. | x_o) is the posterior, nothing can be told at x_o, and

    T(x_o) = mean over draws of (d(draw, x_o) - 1/2)^2,    d the probability of the one class

is as small as chance lets it be.  How small that is, other networks say: trained in the same way
after truth and draw have changed places in every simulation with probability 1/2, which changes
nothing if the sampler is right for all x.  So p-values are exact then, at any number of nulls.

Linhart, Gramfort and Rodrigues (arXiv 2306.03580), who permute all labels; within simulations the
null is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from ppl.checks import check_count, check_key
from ppl.showing import shown

from . import classifier
from .joint import Joint, coordinates, flattened, standardised


@shown
@dataclasses.dataclass(frozen=True)
class Local:
    """Statistics of B observations beside those of the nulls.

    Attributes:
        statistic: [B] T.
        nulls: [B, num_nulls] those of networks that were trained where there is nothing to tell.
        p_values: [B] (1 + #{nulls >= T}) / (1 + num_nulls).
    """

    statistic: Float[np.ndarray, " B"]
    nulls: Float[np.ndarray, "B K"]
    p_values: Float[np.ndarray, " B"]


def run(
    key: PRNGKeyArray, joint: Joint, x: PyTree, draws: PyTree, *, num_nulls: int = 100
) -> Local:
    """Test a sampler at given observations.

    Args:
        key: typed key.
        joint: simulations with a draw for each; of more draws the first is taken.
        x: B observations, like `joint.x`, leaves [B, ...].
        draws: S draws of the sampler for each, like `joint.draws`, leaves [B, S, ...].
        num_nulls: networks for the null; the least p-value is 1 / (1 + num_nulls).

    Raises:
        ValueError: if observations and draws do not fit each other and the simulations.
    """
    check_key(key)
    check_count("num_nulls", num_nulls)
    asked = _asked(joint, x, draws)
    of, seen = coordinates(joint), flattened(joint.x)
    x_rows = standardised(seen, seen).astype(np.float32)
    pair = np.stack([of.truth, of.draws[:, 0]], axis=1)
    theta = standardised(pair, of.truth).astype(np.float32)
    observed = standardised(flattened(asked.x), seen).astype(np.float32)
    their = standardised(coordinates(asked).draws, of.truth).astype(np.float32)
    values = np.asarray(_statistics(key, theta, x_rows, their, observed, num_nulls), np.float64)
    statistic, nulls = values[:, 0], values[:, 1:]
    # The first network stands among the others as any of them does, if the sampler is right.
    p_values = (1 + (nulls >= statistic[:, None]).sum(axis=1)) / (1 + num_nulls)
    return Local(statistic, nulls, p_values)


def _asked(joint: Joint, x: PyTree, draws: PyTree) -> Joint:
    """The observations with their draws, checked."""

    def shapes(tree: PyTree, skip: int) -> list[tuple[int, ...]]:
        return [np.shape(leaf)[skip:] for leaf in jax.tree.leaves(tree)]

    one = jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], draws)
    fits = shapes(x, 1) == shapes(joint.x, 1) and shapes(draws, 2) == shapes(joint.draws, 2)
    if not fits:
        raise ValueError(
            "expected B observations like the simulated ones, leaves [B, ...], and draws [B, S,"
            f" ...], got shapes {shapes(x, 0)} and {shapes(draws, 0)} beside simulations"
            f" {shapes(joint.x, 0)} and draws {shapes(joint.draws, 0)}; put [None] before one"
            " observation"
        )
    return Joint(one, x, draws)


@functools.partial(jax.jit, static_argnames="num_nulls")
def _statistics(
    key: Any, theta: Any, x: Any, draws: Any, observed: Any, num_nulls: int
) -> Float[jax.Array, "B K"]:
    """T of the network of the labels as they are, and of those of the nulls."""
    num, dim = theta.shape[0], theta.shape[-1]
    swap_key, order_key, init_key = jax.random.split(key, 3)
    swapped = jax.random.bernoulli(swap_key, 0.5, (num_nulls, num))
    true_first = ~jnp.concatenate([jnp.zeros((1, num), bool), swapped])
    trained = classifier.train(
        order_key,
        jax.random.split(init_key, num_nulls + 1),
        jnp.concatenate([jnp.tile(x, (2, 1)), theta.swapaxes(0, 1).reshape(2 * num, dim)], axis=1),
        jnp.concatenate([true_first, ~true_first], axis=1),
        jnp.ones(2 * num, jnp.float32),
        width=classifier.WIDTH * dim,
    )

    def one(row: Any) -> Any:
        own, x_o = row
        rows = jnp.concatenate([jnp.broadcast_to(x_o, (len(own), len(x_o))), own], axis=1)
        found = jax.vmap(classifier.logits, in_axes=(0, None))(trained.layers, rows)
        return jnp.mean((jax.nn.sigmoid(found) - 0.5) ** 2, axis=1)

    return jax.lax.map(one, (draws, observed))
