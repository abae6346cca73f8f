"""NumPyro distributions over populations: one law per particle, several components at once,
supports respected.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints

Law = Any
"""A NumPyro distribution, or a pytree of them (independent given what came before): its draws are
pytrees alike.

Batch shape (N,): one law per particle, built from states [N, ...]; or (): the same law for all.
"""


def is_law(node: Any) -> bool:
    return isinstance(node, Distribution)


def batched(name: str, law: Law, num: int) -> Law:
    """The law with batch shape (num,)."""

    def check(one: Any) -> Distribution:
        if not is_law(one) or one.batch_shape not in ((), (num,)):
            got = (
                f"batch shape {one.batch_shape}, event shape {one.event_shape}"
                if is_law(one)
                else repr(type(one))
            )
            raise ValueError(
                f"expected {name} to return NumPyro distributions of batch shape ({num},), one per"
                " particle (or ()),"
                f" got {got}; build them from states [N, ...], and declare the axes of one state by"
                " .to_event(k)"
            )
        return one if one.batch_shape == (num,) else one.expand((num,))

    return jax.tree.map(check, law, is_leaf=is_law)


def draw(key: PRNGKeyArray, law: Law) -> Any:
    laws, structure = jax.tree.flatten(law, is_leaf=is_law)
    return structure.unflatten(
        [one.sample(k) for one, k in zip(laws, jax.random.split(key, len(laws)), strict=True)]
    )


def log_prob_of(law: Law, value: Any) -> Float[Array, " N"]:
    """[N], summed over the components of a pytree; -inf outside the support."""

    def one(law: Distribution, value: Array) -> Array:
        log_prob = jnp.asarray(law.log_prob(value))
        support: Any = law.support
        innermost = (
            support.base_constraint if isinstance(support, constraints.independent) else support
        )
        # Simplices and the like are checked to a tolerance that float32 draws may miss.
        if innermost is None or innermost.event_dim > 0:
            return log_prob
        # NumPyro continues densities past their support: Exponential(1) has log_prob(-1) = 1.
        return jnp.where(support(value) | jnp.isnan(log_prob), log_prob, -jnp.inf)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(one, law, value, is_leaf=is_law)))
