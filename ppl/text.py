"""The NumPyro bridge: a target over strings as a distribution, for models that mix text and other
variables.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.distributions import Distribution, constraints

from .ancestral import ancestral
from .sequences import from_tokens
from .target import SCORED_LOGITS, Target, check_target


class Text(Distribution):
    """A target as a `numpyro` distribution over token arrays [T] (EOS from the string's end on).

    `log_prob` is log gamma, which is normalised exactly if the target is a language model (no
    power, no potential); a tilted target acts like `numpyro.factor`.  Works under `seed`, `trace`,
    `condition`, `log_density` and in plates, inside jit; in a guide, `TraceGraph_ELBO` trains it.

        def model():
            topic = numpyro.sample("topic", dist.Categorical(logits=jnp.zeros(3)))
            numpyro.sample("text", ppl.Text(p))
            numpyro.factor("tilt", ...)

    A prefix whose leaves have batch axes in front makes a batch of texts, which share model,
    horizon, power and potential.  So a site may choose the prompt, an enumerated one too:

        each = lm.given_each(prompts, max_tokens=T)
        prefixes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.prefix for p in each))

        def model():
            topic = numpyro.sample("topic", ..., infer={"enumerate": "parallel"})
            chosen = jax.tree.map(lambda leaf: leaf[topic], prefixes)
            numpyro.sample("text", ppl.Text(dataclasses.replace(each[0], prefix=chosen)))

    Pass the target to a jitted function as an argument: closed over, the model's weights become
    constants of the program, which then takes long to compile and keeps a copy of them.

    Args:
        target: a language model `lm.given(...)`, or any target.
        sampler: (key, target=...) -> tokens [T], how `sample` draws.  Not needed for a language
            model, which is drawn token by token; a tilted target has no exact draw, so there the
            choice is yours (say, one draw from SMC).
    """

    support = constraints.independent(constraints.nonnegative_integer, 1)  # pyright: ignore[reportAssignmentType]
    # NumPyro's own answer compares two sets that are empty here, and would be yes: then a guide
    # would train without the score function, on a wrong gradient.
    has_rsample = False  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("target",)
    pytree_aux_fields = ("sampler",)

    def __init__(
        self, target: Target, sampler: Callable[..., Int[Array, " T"]] | None = None
    ) -> None:
        check_target(target)
        self.target = target
        self.sampler = sampler
        super().__init__(
            batch_shape=jnp.shape(target.prefix.length),
            event_shape=(target.max_tokens,),
            validate_args=False,
        )

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Int[Array, "*shape T"]:
        """Draws [*sample_shape, *batch_shape, T].

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
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # as NumPyro's Predictive gives it
            key = jax.random.wrap_key_data(key)
        num = math.prod(sample_shape)
        if not self.batch_shape:
            return self._draws(key, self.target, num).reshape(*sample_shape, -1)
        keys = jax.random.split(key, math.prod(self.batch_shape))
        tokens = self._each(lambda target, key: self._draws(key, target, num), keys, num)
        tokens = tokens.reshape(*self.batch_shape, *sample_shape, -1)
        batch = range(len(self.batch_shape))
        return jnp.moveaxis(tokens, batch, [len(sample_shape) + axis for axis in batch])

    def _draws(self, key: Any, target: Target, num: int) -> Int[Array, "N T"]:
        if self.sampler is None:
            return ancestral(key, target, num).tokens
        one = functools.partial(self.sampler, target=target)
        return jax.lax.map(one, jax.random.split(key, num))

    def log_prob(
        self, value: Int[Array, "*shape T"], intermediates: Any = None
    ) -> Float[Array, " *broadcast"]:
        """log gamma of token arrays, in which the first EOS ends a string: [*broadcast], the shape
        that batch and value have together.

        An array with an id outside the vocabulary has density zero: -inf inside jit, where it
        cannot be read, and elsewhere an error.
        """
        x = from_tokens(value.reshape(-1, self.target.max_tokens), self.target.lm.eos)
        if not self.batch_shape:
            return self.target.log_density(x.tokens, x.length).reshape(value.shape[:-1])
        self.target.space.strings(x.tokens, x.length)  # for its errors
        shape = jnp.broadcast_shapes(self.batch_shape, value.shape[:-1])
        # Texts go to the prompt that is theirs: what has one prompt is scored together.
        batch = (1,) * (len(shape) - len(self.batch_shape)) + self.batch_shape
        order = sorted(range(len(shape)), key=lambda axis: batch[axis] == 1)
        rows = jnp.broadcast_to(value, (*shape, value.shape[-1]))
        rows = jnp.moveaxis(rows, order, range(len(order)))
        split = rows.reshape(math.prod(batch), -1, value.shape[-1])

        def scored(target: Target, tokens: Int[Array, "N T"]) -> Float[Array, " N"]:
            x = from_tokens(tokens, target.lm.eos)
            return target.log_density(x.tokens, x.length)

        found = self._each(scored, split, split.shape[1]).reshape(rows.shape[:-1])
        return jnp.moveaxis(found, range(len(order)), order)

    def _each(self, f: Callable[[Target, Any], Array], args: Any, num: int) -> Array:
        """f(target, arguments) for every prompt [P, ...], as many of which run at a time as the
        logits of their `num` strings have room for.
        """
        target, axes = self.target, len(self.batch_shape)
        prefixes = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[axes:]), self.target.prefix
        )
        logits = max(num, 1) * target.max_tokens * target.lm.vocab_size
        together = min(max(SCORED_LOGITS // logits, 1), math.prod(self.batch_shape))

        def one(row: tuple) -> Array:
            return f(dataclasses.replace(target, prefix=row[0]), row[1])

        return jax.lax.map(one, (prefixes, args), batch_size=together)
