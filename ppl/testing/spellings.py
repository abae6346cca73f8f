"""Are a tokenizer's bytes its text?  Joined bytes against decoded text, on random strings."""

from __future__ import annotations

from typing import Any

from jaxtyping import PRNGKeyArray

from .laws import generator, require

LEAST = 0.1
"""The share of the strings that must be UTF-8 for the check to say something."""


def check_tokenizer(
    tokenizer: Any, *, key: PRNGKeyArray, num: int = 400, max_tokens: int = 6
) -> None:
    """Assert that the bytes of a string's tokens, joined, are its decoded text.

    That is what constraints read: a regular expression holds for the bytes.  Half of the strings
    are of tokens that are text by themselves; of the others those that are no UTF-8 are left out,
    for decoders write different things then.  Spaces in front of the text may be missing in what is
    decoded, as sentencepiece has it.

    Args:
        tokenizer: of any kind, with `token_bytes` and `decode`.
        key: the random strings come from it.
        num: of strings.
        max_tokens: the most that a string has.

    Raises:
        AssertionError: naming a string whose bytes are not its text.
    """
    rng, table = generator(key), tokenizer.token_bytes
    tokens = [token for token, value in enumerate(table) if value is not None]
    whole = [token for token in tokens if _text(table[token] or b"") is not None]
    require(bool(whole), "some token must be text by itself, none of this vocabulary's is")
    compared = 0
    for number in range(num):
        ids = rng.choice(whole if number % 2 else tokens, rng.integers(1, max_tokens + 1)).tolist()
        joined = b"".join(table[token] or b"" for token in ids)
        text, decoded = _text(joined), tokenizer.decode(ids)
        if text is None:
            continue
        compared += 1
        spaces = text[: len(text) - len(decoded)]
        require(
            text.endswith(decoded) and not spaces.strip(" "),
            f"the bytes of a string, joined, must be its text: tokens {ids} have the bytes"
            f" {joined!r} and decode to {decoded!r}",
        )
    require(compared >= LEAST * num, f"only {compared} of {num} random strings were UTF-8")


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
