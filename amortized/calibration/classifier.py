"""Networks that tell two samples apart, many trained side by side in one compiled loop.

Each is the classifier that two-sample tests are defined by: two hidden layers of ReLU units, the
cross-entropy with a small penalty of the weights, Adam in batches of 200, until the training loss
of an epoch has not fallen by 1e-4 for more than ten epochs (scikit-learn's MLPClassifier).  All
networks see rows in the same shuffled order; one that has ended stays as it is while others go on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppl.showing import shown

WIDTH = 10
"""Hidden units for each dimension of theta."""
BATCH, RATE, PENALTY = 200, 1e-3, 1e-4
TOLERANCE, PATIENCE, MAX_EPOCHS = 1e-4, 10, 10_000

Layer = tuple[Array, Array]


@shown
class Trained(NamedTuple):
    """K networks, and how many epochs each was trained: weights [K, in, out] and biases [K, out] of
    each layer.
    """

    layers: tuple[Layer, ...]
    epochs: Int[Array, " K"]


class _State(NamedTuple):
    """K networks under training, after `epoch` epochs."""

    layers: tuple[Layer, ...]
    adam: Any
    best: Float[Array, " K"]
    stale: Int[Array, " K"]
    epochs: Int[Array, " K"]
    epoch: Int[Array, ""]


def shuffled(key: PRNGKeyArray, size: int) -> Int[Array, " n"]:
    """0..n-1 in random order, by one sort: two numbers of 2^32 that are equal do not matter."""
    return jnp.argsort(jax.random.bits(key, (size,))).astype(jnp.int32)


def logits(layers: tuple[Layer, ...], rows: Float[Array, "n P"]) -> Float[Array, " n"]:
    """Log odds of class 1 by one network."""
    for weights, bias in layers[:-1]:
        rows = jax.nn.relu(rows @ weights + bias)
    weights, bias = layers[-1]
    return (rows @ weights + bias)[:, 0]


def train(
    key: PRNGKeyArray,
    keys: Key[Array, " K"],
    rows: Float[Array, "*K n P"],
    labels: Bool[Array, "K n"],
    weights: Float[Array, "*K n"],
    *,
    width: int,
) -> Trained:
    """Train K networks, to be called inside `jit`.

    Args:
        key: for the order of rows, which all share.
        keys: for the first weights of each network.
        rows: [n, P] of all networks, or [K, n, P].
        labels: [K, n] class 1 or 0.
        weights: 1, or 0 where a row is not there; [n] or [K, n].
        width: units of each of the two hidden layers.
    """
    num, size = labels.shape
    rows, weights = rows.astype(jnp.float32), weights.astype(jnp.float32)
    batch = min(BATCH, size)
    count = -(-size // batch)
    sizes = rows.shape[-1], width, width, 1
    layers = jax.vmap(lambda one: _initial(one, sizes))(keys)
    adam = jax.vmap(optax.adam(RATE).init)(layers)
    shared = tuple(0 if leaf.ndim == many else None for leaf, many in ((rows, 3), (weights, 2)))
    one = jax.vmap(_epoch, in_axes=(0, 0, shared[0], 0, shared[1], None))

    def epoch(s: _State) -> _State:
        order = shuffled(jax.random.fold_in(key, s.epoch), size)
        # What does not fill a batch is filled up by rows of weight 0, at index n.
        order = jnp.append(order, jnp.full(count * batch - size, size, jnp.int32))
        order = order.reshape(count, batch)
        return _after(s, *one(s.layers, s.adam, rows, labels, weights, order))

    zeros = jnp.zeros(num, jnp.int32)
    start = _State(layers, adam, jnp.full(num, jnp.inf, jnp.float32), zeros, zeros, jnp.int32(0))
    end = jax.lax.while_loop(lambda s: _going(s).any() & (s.epoch < MAX_EPOCHS), epoch, start)
    return Trained(end.layers, end.epochs)


def _going(s: _State) -> Bool[Array, " K"]:
    return s.stale <= PATIENCE


def _after(s: _State, layers: tuple[Layer, ...], adam: Any, loss: Float[Array, " K"]) -> _State:
    """The networks after an epoch; those that had ended as they were."""
    stale = jnp.where(loss > s.best - TOLERANCE, s.stale + 1, 0)
    new = layers, adam, jnp.minimum(s.best, loss), stale, s.epochs + 1
    going = _going(s)
    kept = jax.tree.map(
        lambda a, b: jnp.where(going.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, tuple(s)[:-1]
    )
    return _State(*kept, epoch=s.epoch + 1)


def _initial(key: PRNGKeyArray, sizes: tuple[int, ...]) -> tuple[Layer, ...]:
    """Weights and biases of a network, uniform in +- sqrt(6 / (in + out))."""
    pairs = list(zip(sizes, sizes[1:], strict=False))
    total = sum((inside + 1) * outside for inside, outside in pairs)
    # All in one draw, for each is a program of some size.
    u, start, layers = jax.random.uniform(key, (total,), jnp.float32, -1, 1), 0, []
    for inside, outside in pairs:
        size, bound = (inside + 1) * outside, (6 / (inside + outside)) ** 0.5
        both = bound * u[start : start + size].reshape(inside + 1, outside)
        layers.append((both[:-1], both[-1]))
        start += size
    return tuple(layers)


def _epoch(
    layers: tuple[Layer, ...],
    adam: Any,
    rows: Float[Array, "n P"],
    labels: Bool[Array, " n"],
    weights: Float[Array, " n"],
    order: Int[Array, "count batch"],
) -> tuple[tuple[Layer, ...], Any, Float[Array, ""]]:
    """One pass over the rows; the mean loss on the way."""
    signs = jnp.where(labels, -1.0, 1.0).astype(jnp.float32)
    data = tuple(
        jnp.take(leaf, order, axis=0, mode="fill", fill_value=0) for leaf in (rows, signs, weights)
    )

    def step(carry: tuple, batch: tuple) -> tuple[tuple, Array]:
        layers, adam = carry
        loss, gradient = jax.value_and_grad(_loss)(layers, *batch)
        change, adam = optax.adam(RATE).update(gradient, adam)
        return (optax.apply_updates(layers, change), adam), loss * batch[2].sum()

    (layers, adam), losses = jax.lax.scan(step, (layers, adam), data)
    return layers, adam, losses.sum() / weights.sum()


def _loss(
    layers: tuple[Layer, ...],
    rows: Float[Array, "batch P"],
    signs: Float[Array, " batch"],
    weights: Float[Array, " batch"],
) -> Float[Array, ""]:
    """Mean cross-entropy, and a penalty of the weights as large as that of one row."""
    penalty = sum(jnp.sum(w**2) for w, _ in layers)
    total = jnp.sum(weights * jax.nn.softplus(signs * logits(layers, rows)))
    return (total + 0.5 * PENALTY * penalty) / jnp.maximum(weights.sum(), 1.0)
