"""The bytes that each token contributes to a text, read off a tokenizer's decoder."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tokenizers

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(
    backend: tokenizers.Tokenizer, description: Mapping[str, Any], vocab_size: int
) -> list[bytes | None]:
    """The bytes [V] of every token as the decoder writes it, added tokens included; None for
    special tokens and ids without a token.

    Raises:
        ValueError: if the decoder is neither byte-level nor sentencepiece-style.
    """
    to_bytes = reader(description)
    added = backend.get_added_tokens_decoder()
    table: list[bytes | None] = [None] * vocab_size
    for piece, token in backend.get_vocab(with_added_tokens=True).items():
        if token not in added:
            table[token] = to_bytes(piece)
        elif not added[token].special:
            # Of a token that is matched in normalised text the decoder reads the normal form.
            table[token] = to_bytes(backend.id_to_token(token) or piece)
    return table


def reader(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the decoder of a tokenizer's description turns a piece into bytes.

    What it does to a whole text, such as dropping spaces in front, is left aside.

    Raises:
        ValueError: as `token_bytes` does.
    """
    decoder = description.get("decoder") or {}
    parts = decoder.get("decoders", [decoder] if decoder else [])
    kinds = [part["type"] for part in parts]
    replaced, fallback = [], False
    for number, part in enumerate(parts):
        kind = part["type"]
        if kind == "ByteLevel" and kinds == ["ByteLevel"]:
            return _byte_level
        if kind == "Metaspace":
            replaced.append((part["replacement"], " "))
        elif kind == "Replace" and "String" in part["pattern"] and not fallback:
            replaced.append((part["pattern"]["String"], part["content"]))
        elif kind == "ByteFallback":
            fallback = True
        elif kind != "Fuse" and not _of_the_whole_text(part, kinds[:number]):
            raise _refusal(kinds)
    if not replaced and not fallback:
        raise _refusal(kinds)
    return functools.partial(_sentencepiece, tuple(replaced), fallback)


def _of_the_whole_text(part: Mapping[str, Any], before: list[str]) -> bool:
    """Whether this part strips spaces from the text's ends alone, once all pieces are one."""
    return part["type"] == "Strip" and "Fuse" in before and part["content"] == " "


def _refusal(kinds: list[str]) -> ValueError:
    return ValueError(
        "expected a tokenizer with a byte-level or sentencepiece decoder (ByteLevel; or"
        " ByteFallback, Metaspace, Replace, Fuse and a Strip behind it), got"
        f" {', '.join(kinds) or 'none'}; token bytes exist only for those"
    )


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted.

    Printable Latin-1 bytes stand for themselves; the others, in order, take the characters from 256
    on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = np.setdiff1d(np.arange(256), printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): int(byte) for rank, byte in enumerate(others)
    }


def _byte_level(piece: str) -> bytes:
    alphabet = byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _sentencepiece(replaced: tuple[tuple[str, str], ...], fallback: bool, piece: str) -> bytes:
    for old, new in replaced:
        piece = piece.replace(old, new)
    if fallback and (byte := _BYTE.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    return piece.encode()


def lost(backend: tokenizers.Tokenizer, text: str, encoded: tokenizers.Encoding) -> str:
    """The characters of a text, without blanks, that its tokens do not tell."""
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is None:  # They leave nothing behind, not even their places.
        characters = [character for character in set(text) if not _written(backend, character)]
        return "".join(sorted(characters, key=text.index))
    spans = zip(encoded.tokens, encoded.offsets, strict=True)
    pieces = [text[start:end] for token, (start, end) in spans if token == unknown]
    return "".join(dict.fromkeys("".join(pieces)))


@functools.lru_cache(maxsize=4096)
def _written(backend: tokenizers.Tokenizer, character: str) -> bool:
    return character.isspace() or bool(backend.encode(character, add_special_tokens=False).ids)
