"""The NumPyro bridge: a target over strings as a distribution, for models that mix text and other
variables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int
from numpyro.distributions import Distribution, constraints

from .ancestral import ancestral
from .sequences import from_tokens
from .target import Target, check_target


class Text(Distribution):
    """A target as a `numpyro` distribution over token arrays [T] (EOS from the string's end on).

    `log_prob` is log gamma, which is normalised exactly if the target is a language model (no
    power, no potential); a tilted target acts like `numpyro.factor`.  Works under `seed`, `trace`,
    `condition` and `log_density`, inside jit.

        def model():
            topic = numpyro.sample("topic", dist.Categorical(logits=jnp.zeros(3)))
            numpyro.sample("text", ppl.Text(p))
            numpyro.factor("tilt", ...)

    Pass the target to a jitted function as an argument: closed over, the model's weights become
    constants of the program, which then takes long to compile and keeps a copy of them.

    Args:
        target: a language model `lm.given(...)`, or any target.
        sampler: (key, target=...) -> tokens [T], how `sample` draws.  Not needed for a language
            model, which is drawn token by token; a tilted target has no exact draw, so there the
            choice is yours (say, one draw from SMC).
    """

    support = constraints.independent(constraints.nonnegative_integer, 1)  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("target",)
    pytree_aux_fields = ("sampler",)

    def __init__(
        self, target: Target, sampler: Callable[..., Int[Array, " T"]] | None = None
    ) -> None:
        check_target(target)
        self.target = target
        self.sampler = sampler
        super().__init__(batch_shape=(), event_shape=(target.max_tokens,), validate_args=False)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Int[Array, "*shape T"]:
        """Draws [*sample_shape, T].

        Raises:
            ValueError: for a target with a power or a potential, if no `sampler` was given.
        """
        if self.sampler is None and not self.target.is_language_model:
            raise ValueError(
                "expected a language model to sample from, got a target with a power or a"
                " potential, which has no exact"
                " draw; pass Text(target, sampler=...), condition the site on a value, or write"
                " Text(p) with the tilt"
                " in numpyro.factor"
            )
        num = math.prod(sample_shape)
        if self.sampler is None:
            tokens = ancestral(key, self.target, num).tokens
        else:
            tokens = jax.lax.map(
                functools.partial(self.sampler, target=self.target), jax.random.split(key, num)
            )
        return tokens.reshape(*sample_shape, self.target.max_tokens)

    def log_prob(
        self, value: Int[Array, "*shape T"], intermediates: Any = None
    ) -> Float[Array, " *shape"]:
        x = from_tokens(value.reshape(-1, self.target.max_tokens), self.target.lm.eos)
        return self.target.log_density(x.tokens, x.length).reshape(value.shape[:-1])
