"""In which order the sites of a canvas are revealed.

An order gives log-weights [N, L] to the masked sites; sites are drawn in proportion, without
replacement.  Scores of confidence (arXiv 2502.06768) have the weights exp(sharpness * score): large
ones are greedy, and ties are drawn.

Any order that sees only what is open is right where the conditionals come from one joint law and a
site is revealed at a time.  A score of the token that was *drawn* at a site, by which LLaDA and
Dream rank, is none of these: it changes the law of that token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from ppl.checks import check_count, check_function
from ppl.pytrees import as_pytree, register_dataclass

GREEDY = 1e5
"""A sharpness at which a score that is better by 1e-3 wins."""

LogWeights = Callable[[Float[Array, "N L V"] | None, Bool[Array, "N L"]], Float[Array, "N L"]]
"""(log d, masked) -> log-weights of the sites."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """log_weights(log_d[N, L, V], masked[N, L]) -> [N, L], a pytree; one that is `blind` is given
    None as log_d, which spares the model's output of the other sites.
    """

    log_weights: Any
    blind: bool = dataclasses.field(default=False, metadata={"static": True})


def as_order(order: Order | LogWeights) -> Order:
    """An order of a function (log_d, masked) -> log-weights [N, L].

    Raises:
        ValueError: if it is no such function.
    """
    if isinstance(order, Order):
        return order
    check_function("order", order, "(log_d, masked)", "samplers.canvas.orders.margin")
    return Order(as_pytree(order))


def choose(
    keys: Key[Array, " N"], log_weights: Float[Array, "N L"], masked: Bool[Array, "N L"], count: int
) -> tuple[Int[Array, "N K"], Bool[Array, "N K"], Float[Array, " N"]]:
    """K = `count` masked sites of every row, without replacement; which of them are sites (False
    where fewer were left), and the log-probability of the first [N].
    """
    log_weights = jnp.where(masked, log_weights.astype(jnp.float32), -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, masked.shape[1:], jnp.float32))(keys)
    scores, at = jax.lax.top_k(log_weights + noise, count)
    log_pi = jnp.take_along_axis(jax.nn.log_softmax(log_weights, axis=1), at[:, :1], axis=1)[:, 0]
    return at.astype(jnp.int32), scores > -jnp.inf, log_pi


def left_out(log_weights: Float[Array, "N L"], masked: Bool[Array, "N L"]) -> Float[Array, " N"]:
    """The share of the masked sites [N] that are as good as never next: their probability is 0 in
    float32.
    """
    log_pi = jax.nn.log_softmax(jnp.where(masked, log_weights, -jnp.inf), axis=1)
    never = masked & ~(jnp.exp(log_pi.astype(jnp.float32)) > 0)
    return never.sum(1) / jnp.maximum(masked.sum(1), 1).astype(jnp.float32)


def _uniform(log_d: Any, masked: Bool[Array, "N L"]) -> Float[Array, "N L"]:
    return jnp.zeros(masked.shape, jnp.float32)


def _left_to_right(log_d: Any, masked: Bool[Array, "N L"]) -> Float[Array, "N L"]:
    return -GREEDY * jnp.broadcast_to(jnp.arange(masked.shape[1], dtype=jnp.float32), masked.shape)


uniform = Order(Partial(_uniform), blind=True)
"""Every site alike: with it the process law and the order-and-string law are one."""

left_to_right = Order(Partial(_left_to_right), blind=True)


def margin(sharpness: float = GREEDY) -> Order:
    """Sites whose most probable token is furthest ahead of the second."""
    return Order(Partial(_scored, Partial(_margin), sharpness))


def top_probability(sharpness: float = GREEDY) -> Order:
    """Sites whose most probable token is most probable."""
    return Order(Partial(_scored, Partial(_top), sharpness))


def entropy(sharpness: float = GREEDY) -> Order:
    """Sites of the lowest entropy."""
    return Order(Partial(_scored, Partial(_negentropy), sharpness))


def blocks(size: int, within: Order = uniform) -> Order:
    """Blocks of `size` sites from left to right, and `within` a block another order: semi-
    autoregressive, as LLaDA's `block_length`.

    Raises:
        ValueError: if the size is no count.
    """
    check_count("size", size)
    return Order(Partial(_blocks, within, size), within.blind)


def _scored(score: Any, sharpness: Any, log_d: Array, masked: Array) -> Float[Array, "N L"]:
    return sharpness * score(log_d)


def _margin(log_d: Float[Array, "N L V"]) -> Float[Array, "N L"]:
    first, second = jnp.moveaxis(jnp.exp(jax.lax.top_k(log_d, 2)[0]), 2, 0)
    return first - second


def _top(log_d: Float[Array, "N L V"]) -> Float[Array, "N L"]:
    return jnp.exp(log_d.max(2))


def _negentropy(log_d: Float[Array, "N L V"]) -> Float[Array, "N L"]:
    return jnp.where(log_d > -jnp.inf, jnp.exp(log_d) * log_d, 0.0).sum(2)


def _blocks(
    within: Order, size: Any, log_d: Float[Array, "N L V"] | None, masked: Bool[Array, "N L"]
) -> Float[Array, "N L"]:
    block = jnp.arange(masked.shape[1], dtype=jnp.int32) // size
    first = jnp.where(masked, block, masked.shape[1]).min(1, keepdims=True)
    return jnp.where(block == first, within.log_weights(log_d, masked), -jnp.inf)
