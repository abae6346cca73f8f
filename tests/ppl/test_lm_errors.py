"""Bad prompts, horizons and counts: each error says what was expected, what came, and
what to do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl import lm as lm_module
from tests.helpers import MODELS

pytestmark = pytest.mark.bad_input

TABLE_CONTEXT = 7  # helpers.table: depth 6 and the token that stands for BOS


def test_the_oracles_context():
    assert MODELS["table"]().context == TABLE_CONTEXT


CASES: dict[str, tuple[Any, Any, str]] = {
    "empty prompt": (
        [],
        3,
        "expected a prompt of at least one token, got none; start it with the model's BOS token",
    ),
    "id above the vocabulary": (
        [0, 4],
        3,
        "expected token ids in [0, 4), got 4; encode the prompt with this model's own tokenizer",
    ),
    "negative id": (
        [0, -1, 7],
        3,
        "expected token ids in [0, 4), got -1; encode the prompt with this model's own tokenizer",
    ),
    "prompt longer than the context": (
        [0] * 8,
        3,
        "expected a prompt of at most 7 tokens (the model's context), got 8; shorten it",
    ),
    "prompt and continuation longer than the context": (
        [0] * 5,
        3,
        "expected prompt and continuation within the model's context of 7 tokens, got a prompt of 5"
        " tokens with"
        " max_tokens=3; shorten the prompt or lower max_tokens to 2",
    ),
    "text instead of ids": (
        "hello",
        3,
        "expected prompt token ids as a flat list of integers, got shape () and dtype <U5; encode"
        " text with"
        " tokenizer.encode or tokenizer.chat",
    ),
    "floats": (
        [0.0, 1.0],
        3,
        "expected prompt token ids as a flat list of integers, got shape (2,) and dtype float64;"
        " encode text with"
        " tokenizer.encode or tokenizer.chat",
    ),
    "nested": (
        [[0, 1]],
        3,
        "expected prompt token ids as a flat list of integers, got shape (1, 2) and dtype int64;"
        " encode text with"
        " tokenizer.encode or tokenizer.chat",
    ),
    "no tokens": (
        [0],
        0,
        "expected max_tokens to be a whole number of at least 1, got 0; pass e.g. max_tokens=32",
    ),
    "negative max_tokens": (
        [0],
        -2,
        "expected max_tokens to be a whole number of at least 1, got -2; pass e.g. max_tokens=32",
    ),
    "half a token": (
        [0],
        2.5,
        "expected max_tokens to be a whole number of at least 1, got 2.5; pass e.g. max_tokens=32",
    ),
    "max_tokens is a truth value": (
        [0],
        True,
        "expected max_tokens to be a whole number of at least 1, got True; pass e.g. max_tokens=32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_given_refuses(name: str):
    prompt, max_tokens, message = CASES[name]
    with pytest.raises(ValueError) as error:
        MODELS["table"]().given(prompt, max_tokens=max_tokens)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name", ["empty prompt", "id above the vocabulary", "prompt longer than the context"]
)
def test_prefill_refuses_the_same(name: str):
    prompt, _, message = CASES[name]
    for ids in (prompt, np.asarray(prompt, np.int32), jnp.asarray(prompt, jnp.int32)):
        with pytest.raises(ValueError) as error:
            MODELS["table"]().prefill(ids)
        assert str(error.value) == message


@pytest.mark.parametrize("pad_to", [1, 8])
def test_padding_holds_the_prompt_and_fits_the_context(pad_to: int):
    message = (
        r"expected pad_to between the prompt's 2 tokens and the model's context \(7\), got"
        f" {pad_to}; leave it out"
    )
    with pytest.raises(ValueError, match=message):
        MODELS["table"]().prefill([0, 3], pad_to=pad_to)


def test_a_traced_prompt_is_checked_for_its_shape():
    lm = MODELS["table"]()
    with pytest.raises(ValueError, match="expected a prompt of at most 7 tokens"):
        jax.eval_shape(lm.prefill, jnp.zeros(8, jnp.int32))
    assert jax.eval_shape(lm.prefill, jnp.zeros(3, jnp.int32)).logits.shape == (4,)


def test_the_longest_prompt_and_horizon_are_accepted():
    lm = MODELS["table"]()
    assert lm.given([0, 3], max_tokens=5).max_tokens == 5
    assert lm.given(np.array([0, 3]), max_tokens=np.int64(5)).prefix.length == 2


@pytest.mark.parametrize(
    ("length", "context", "size"),
    [(1, None, 16), (16, None, 16), (17, None, 32), (5, 6, 6), (33, 40, 40), (40, 40, 40)],
)
def test_buckets(length: int, context: int | None, size: int):
    assert lm_module.bucket(length, context) == size
