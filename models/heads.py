"""Other outputs on a frozen decoder: scores of every next token, or one number for every prefix.

A head takes the place of the output matrix: [W, D], or of low rank {"left" [W, r], "right" [r, D]}.
W = V scores next tokens (a twist, or a policy of its own); W = 1 is a value of every prefix, such
as log Z.  The decoder's functions run it; its `extend` and `read` then give [N, T, W] and [W].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppl.checks import check_count
from ppl.lm import LM, Prefix

from .config import DecoderConfig

Head = Float[Array, "W D"] | dict[str, Array]


def zeros(lm: LM, width: int | None = None) -> Float[Array, "W D"]:
    """A head that is zero for every prefix; W = V unless `width` says otherwise.

    Raises:
        ValueError: if the model is not a decoder.
    """
    return jnp.zeros(
        (lm.vocab_size if width is None else width, decoder_config(lm).hidden_size), jnp.float32
    )


def low_rank(key: PRNGKeyArray, lm: LM, rank: int, width: int | None = None) -> dict[str, Array]:
    """A head L R of low rank that is zero for every prefix: L starts at zero, R normal with
    variance 1 / D.

    Raises:
        ValueError: if the model is not a decoder, or the rank is not at least 1.
    """
    check_count("rank", rank)
    size = decoder_config(lm).hidden_size
    right = jax.random.normal(key, (rank, size), jnp.float32) / jnp.sqrt(size)
    return {
        "left": jnp.zeros((lm.vocab_size if width is None else width, rank), jnp.float32),
        "right": right,
    }


def own(lm: LM) -> Float[Array, "V D"]:
    """The decoder's own output matrix.

    Raises:
        ValueError: if the model is not a decoder.
    """
    return lm.params["embed"] if decoder_config(lm).tied else lm.params["head"]


def attach(head: Head, lm: LM) -> LM:
    """The decoder with another head, sharing all other weights; differentiable in the head.

    Scores of tokens keep the model's cap on its logits, other outputs have none.

    Raises:
        ValueError: if the model is not a decoder, or the head does not fit its hidden size.
    """
    config = decoder_config(lm)
    width, size = (
        (head["left"].shape[0], head["right"].shape[1]) if isinstance(head, dict) else head.shape
    )
    if size != config.hidden_size:
        raise ValueError(
            f"expected a head for hidden size {config.hidden_size}, got one for {size}; make it"
            " anew"
        )
    cap = config.final_softcap if width == config.vocab_size else None
    static = dataclasses.replace(config, tied=False, final_softcap=cap)
    return dataclasses.replace(lm, params=lm.params | {"head": head}, static=static)


def values(lm: LM, prefix: Prefix, tokens: Int[Array, "N T"]) -> Float[Array, "N L"]:
    """What a head with one output says of every prefix: [N, T + 1], the prompt alone first.

    `prefix` is read by this model, for the prompt's own value is in it.
    """
    first = jnp.broadcast_to(prefix.logits, (tokens.shape[0], 1, 1))
    return jnp.concatenate([first, lm.extend(prefix, tokens)], axis=1)[:, :, 0]


def decoder_config(lm: LM) -> DecoderConfig:
    """What a decoder is.

    Raises:
        ValueError: if the model is not a decoder.
    """
    if not isinstance(lm.static, DecoderConfig):
        raise ValueError(
            "expected a decoder of models.transformer, got a model whose static part is"
            f" {type(lm.static).__name__};"
            " for a small model use a table (models.tabular)"
        )
    return lm.static
