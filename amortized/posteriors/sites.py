"""The sites of a model by shape: continuous ones on R^D, and those of finite support."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions.distribution import Independent

from ppl.showing import shown


@shown
class Site(NamedTuple):
    """A site's shape; of a latent on R^D, where it has `size` coordinates."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@shown
class Discrete(NamedTuple):
    """A latent site each of whose entries has one of finitely many values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[int | float, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def codes(self, value: Any) -> Float[Array, "*shape"]:
        """The number of every entry's value; -1 of what is none of them."""
        same = jnp.asarray(value)[..., None] == jnp.asarray(self.values)
        return jnp.where(same.any(-1), same.argmax(-1), -1).astype(jnp.float32)

    def decoded(self, codes: Float[Array, " size"]) -> Array:
        """The site with values of these numbers."""
        return jnp.asarray(self.values, self.dtype)[codes.astype(jnp.int32)].reshape(self.shape)


def support(law: Any) -> tuple[int | float, ...]:
    """The values that every entry of a site may have; none if they are not finite or not known."""
    while isinstance(law, Independent):
        law = law.base_dist
    try:
        with jax.ensure_compile_time_eval():
            values = np.asarray(law.enumerate_support(expand=False))
    except (NotImplementedError, jax.errors.ConcretizationTypeError):
        return ()
    return tuple(values.ravel().tolist()) if values.size == len(values) else ()
