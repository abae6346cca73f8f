"""Conformance kits: run them on your own language model or potential before trusting what a sampler says about it.

    check_lm(lm, prompt, key=jax.random.key(0))
    check_potential(potential, vocab_size=V, eos=eos, max_tokens=T, key=jax.random.key(0))

Both compare an object with its own definition (a step with a full pass, a look-ahead with a step) on random strings and
raise an AssertionError that says which law is broken and where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .lm import LM, Cache, Prefix, bucket, take_rows
from .potential import Potential, State

MIN_TOKENS = 3
"""Two tokens after a truncation to a different length need three."""

MAX_COLUMNS = 256
"""Columns of a look-ahead that are compared with `step`, chosen at random if the vocabulary has more."""


def check_lm(
    lm: LM,
    prompt: Sequence[int] | Int[Array, " S"],
    *,
    key: PRNGKeyArray,
    num: int = 4,
    max_tokens: int = 5,
    atol: float = 1e-3,
) -> None:
    """Assert that `lm` is a language model: its cached steps are its own full passes, whatever was undone or reordered.

    Draws `num` strings of `max_tokens` tokens after `prompt` from full passes (`prefill` of the longer prompt) and
    checks: shapes, dtypes and normalisation; `step` after `step`; `truncate` to different lengths and two steps on;
    `reorder`, before and after a truncation; the same under another padding of the prompt; jit equal to no jit; one
    trace of `step` for all of it.

    Args:
        lm: the model.
        prompt: token ids [S]; S + max_tokens must fit the model's context.
        key: random strings come from it.
        num: N >= 2 rows.
        max_tokens: T >= 3 tokens.
        atol: greatest difference of two log-probabilities that counts as equal; raise it for bfloat16.

    Raises:
        AssertionError: naming the law that does not hold, where, and by how much.
        ValueError: if num < 2, max_tokens < 3, or the prompt is unusable.
    """
    if num < 2 or max_tokens < MIN_TOKENS:
        raise ValueError(
            f"expected num of at least 2 and max_tokens of at least {MIN_TOKENS} (rows of different lengths), got"
            f" num={num} and max_tokens={max_tokens}"
        )
    lm.given(prompt, max_tokens=max_tokens)  # for its errors
    _check_static(lm)
    prefix = lm.prefill(prompt)
    _check_logits(prefix.logits, (lm.vocab_size,), "prefill's logits")
    run = _Run(lm, np.asarray(prompt).tolist(), prefix, max_tokens, atol, _counted(_step), [0])
    string_key, other_key = jax.random.split(key)
    run.strings += [run.draw(row_key) for row_key in jax.random.split(string_key, num)]
    others = run.draw_after(other_key, max_tokens)
    _check_steps(run)
    _check_eager(run)
    _check_truncate(run, others)
    _check_reorder(run, others)
    _check_padding(run)
    _require(
        run.step.count == 1,
        f"step was traced {run.step.count} times for one shape: a cache that comes out of step, truncate or reorder must"
        " have the dtypes (weak types too) of the one that init made, and static data must compare by value",
    )
