"""Discrete latents beside continuous ones: a categorical head before a flow.

    training = npe.training(
        key, model, latents=["temperature"], discrete=["topic"], observed=["text"], ...
    )
    posterior.sample(key, x_o, 1000)     # {"temperature": [1000], "topic": [1000] int32}

The density is

    q(k, theta | x) = prod_i q(k_i | k_1, ..., k_{i-1}, x)  q(theta | k, x)

over all entries k_i of the sites of finite support, and a flow that is told them.  Its likelihood
is least at the joint posterior, and it may be any: nothing is assumed to be independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, PRNGKeyArray

from .flows import Family

WIDTH, DEPTH = 50, 2
"""Of the hidden layers of a head."""


class Mixed(AbstractDistribution):
    """Numbers of values behind continuous coordinates (`beside`).

    Attributes:
        heads: logits of each discrete coordinate, given the context and those before it.
        flow: of the continuous ones given the context and all discrete ones; None if there are
            none.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)
    num_values: tuple[int, ...] = eqx.field(static=True)
    heads: list[eqx.nn.MLP]
    flow: AbstractDistribution | None

    def read(
        self, x: Float[Array, " D"], context: Float[Array, " C"]
    ) -> tuple[Array, Array, Array]:
        """The continuous coordinates, what the flow is told, and log q of the discrete ones."""
        theta, codes = jnp.split(x, [len(x) - len(self.heads)])
        total = jnp.zeros((), x.dtype)
        for head, num, code in zip(self.heads, self.num_values, codes, strict=True):
            log_probs, inside = jax.nn.log_softmax(head(context)), (code >= 0) & (code < num)
            at = jnp.clip(code, 0, num - 1).astype(jnp.int32)
            total += jnp.where(inside, log_probs[at], -jnp.inf).astype(x.dtype)
            context = _told(context, at, num)
        return theta, context, total

    def _log_prob(self, x: Array, condition: Array | None = None) -> Array:
        assert condition is not None
        theta, told, total = self.read(x, condition)
        return total if self.flow is None else total + self.flow.log_prob(theta, told)

    def _sample(self, key: PRNGKeyArray, condition: Array | None = None) -> Array:
        assert condition is not None
        first, *keys = jax.random.split(key, 1 + len(self.heads))
        codes = []
        for key, head, num in zip(keys, self.heads, self.num_values, strict=True):
            codes.append(jax.random.categorical(key, head(condition)))
            condition = _told(condition, codes[-1], num)
        theta = jnp.zeros(0) if self.flow is None else self.flow.sample(first, (), condition)
        return jnp.concatenate([theta, jnp.stack(codes).astype(theta.dtype)])


def beside(family: Family, num_values: Sequence[int]) -> Family:
    """Densities whose last coordinates are numbers 0, 1, ... of so many values each, and whose
    others have a flow of the family.
    """

    def build(key: PRNGKeyArray, dim: int, context_dim: int) -> Mixed:
        first, *keys = jax.random.split(key, 1 + len(num_values))
        size, heads = context_dim, []
        for key, num in zip(keys, num_values, strict=True):
            heads.append(eqx.nn.MLP(size, num, WIDTH, DEPTH, jax.nn.relu, key=key))
            size += num
        rest = dim - len(num_values)
        flow = family(first, rest, size) if rest else None
        return Mixed((dim,), (context_dim,), tuple(num_values), heads, flow)

    return build


def _told(context: Float[Array, " C"], code: Array, num: int) -> Float[Array, " E"]:
    """The context, and which of `num` values a coordinate has."""
    return jnp.concatenate([context, jax.nn.one_hot(code, num, dtype=context.dtype)])
