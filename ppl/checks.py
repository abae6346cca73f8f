"""Checks of arguments: each raises ValueError with what was expected, what came, and the remedy."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1; `name` is an argument, or a
    phrase.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        remedy = f"pass e.g. {name}=32" if name.isidentifier() else "give at least one"
        raise ValueError(
            f"expected {name} to be a whole number of at least 1, got {value!r}; {remedy}"
        )


def check_counts(**counts: int) -> None:
    """`check_count` of several arguments by their names."""
    for name, value in counts.items():
        check_count(name, value)


def check_key(key: Any) -> None:
    """Raise ValueError unless `key` is one of JAX's, or an array of them."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise ValueError(
            f"expected a key of JAX for the random draws, got {key!r}; pass jax.random.key(0), with"
            " a number of your own"
        )


def check_function(name: str, value: Any, arguments: str, example: str) -> None:
    """Raise ValueError unless `value` is a function of these arguments, "(key, x)"; `example` is
    one, by its full name, whose module has others.
    """
    module, _, _ = example.rpartition(".")
    if isinstance(value, str) and callable(getattr(sys.modules.get(module), value, None)):
        example = f"{module}.{value}"
    got = repr(value)
    if callable(value):
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # of some built-in functions nothing is known
            return
        with contextlib.suppress(TypeError):
            signature.bind(*arguments.split(","))
            return
        got = f"{getattr(value, '__qualname__', type(value).__name__)}{signature}"
    raise ValueError(
        f"expected {name} to be a function of {arguments}, got {got}; pass e.g. {example} itself,"
        " or call what makes such functions"
    )


def check_prompt(tokens: Any, vocab_size: int, context: int | None) -> Any:
    """The prompt as a 1-d integer array; raises ValueError if it is empty, too long, or has ids
    outside [0, V).

    Values of a traced prompt cannot be read, so there only its shape is checked.
    """
    traced = isinstance(tokens, Tracer)
    ids = tokens if traced else np.asarray(tokens)
    if ids.size == 0:
        raise ValueError(
            "expected a prompt of at least one token, got none; start it with the model's BOS token"
        )
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"expected prompt token ids as a flat list of integers, got shape {ids.shape} and dtype"
            f" {ids.dtype};"
            " encode text with tokenizer.encode or tokenizer.chat"
        )
    if context is not None and ids.shape[0] > context:
        raise ValueError(
            f"expected a prompt of at most {context} tokens (the model's context), got"
            f" {ids.shape[0]}; shorten it"
        )
    if not traced and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"expected token ids in [0, {vocab_size}), got {bad}; encode the prompt with this"
            " model's own tokenizer"
        )
    return ids


def check_ids(ids: Int[Array, " K"], vocab_size: int, eos: int, name: str) -> None:
    """Raise ValueError if an id is outside [0, vocab_size) or is EOS."""
    values = np.asarray(ids)
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"expected {name} token ids in [0, {vocab_size}), got {outside[0]}; encode with this"
            " model's own tokenizer"
        )
    if (values == eos).any():
        raise ValueError(
            f"expected {name} tokens other than EOS ({eos}); constrain the end with ppl.min_tokens"
            " or ppl.must_end"
        )


def numbers(name: str, values: Any) -> Float[np.ndarray, " X"]:
    """A row of numbers in float64; raises ValueError if it is empty, no row, or has NaN."""
    row = np.asarray(values, np.float64)
    if row.ndim != 1 or row.size == 0 or np.isnan(row).any():
        got = "NaN among them" if row.ndim == 1 and row.size else f"shape {list(row.shape)}"
        raise ValueError(
            f"expected {name} to be a row of at least one number, got {got}; pass a list or a 1-d"
            " array without NaN"
        )
    return row


def shares(name: str, values: Any) -> Float[np.ndarray, " X"]:
    """`numbers` that are all between 0 and 1."""
    row = numbers(name, values)
    if (row < 0).any() or (row > 1).any():
        bad = row[(row < 0) | (row > 1)][0]
        raise ValueError(
            f"expected {name} between 0 and 1, got {bad:g}; pass probabilities, not percentages or"
            " logits"
        )
    return row


def probabilities(name: str, values: Any) -> Float[np.ndarray, " X"]:
    """`shares` that sum to one, as far as float32 can tell; made to do so exactly."""
    row = shares(name, values)
    if abs(row.sum() - 1) > 1e-4:
        raise ValueError(
            f"expected {name} to sum to 1, got {row.sum():g}; divide by their sum, if nothing is"
            " missing"
        )
    return row / row.sum()
