"""Text to token ids and back, the bytes of every token, and the model's own chat template.

The algorithm is the `tokenizers` package's; the files come from a Hugging Face directory or,
through `gguf_tokenizer`, from GGUF metadata.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Array, Int

from ppl.segmentation import Segmentation
from ppl.showing import shown

from . import chat_template
from .chat_template import Message
from .segmentation import segmentation

_SPACE = "\u2581"  # sentencepiece writes a space as this character


@shown
class Tokenizer:
    """A tokenizer that belongs to one model.

    Attributes:
        vocab_size: V of the model; ids from the tokenizer's own size up to V are padding rows that
            stand for no text.
        eos: id of the token that ends a string (for chat models, of the token that ends the
            assistant's turn).
        bos: id of the token that begins a text, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos: int,
        bos: int | None = None,
        vocab_size: int | None = None,
        template: str | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: the algorithm and its vocabulary.
            eos: id of the token that ends a string.
            bos: id of the token that begins a text, or None.
            vocab_size: V of the model; by default the tokenizer's own size.
            template: the chat template's jinja source.

        Raises:
            ValueError: if the vocabulary does not fit a model of `vocab_size` tokens.
        """
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = size if vocab_size is None else vocab_size
        if size > self.vocab_size:
            raise ValueError(
                f"expected a tokenizer of at most {self.vocab_size} tokens (the model's embedding"
                f" rows), got {size};"
                " use the tokenizer that came with the model"
            )
        for name, token in (("eos", eos), ("bos", bos)):
            if token is not None and not 0 <= token < size:
                raise ValueError(
                    f"expected the {name} token's id in [0, {size}), got {token};"
                    " use the tokenizer and configuration that came with the model"
                )
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.eos, self.bos, self.template = backend, eos, bos, template

    def _shown_(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "eos": self.eos,
            "bos": self.bos,
            "chat": self.template is not None,
        }

    @classmethod
    def from_directory(cls, directory: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of a directory in the Hugging Face layout.

        Reads tokenizer.json, and where present tokenizer_config.json, chat_template.jinja,
        generation_config.json and config.json.  EOS is the first of generation_config's, config's
        or the tokenizer's own; where there are several and a chat template, the one that the
        template writes after an assistant's message.

        Raises:
            FileNotFoundError: if there is no tokenizer.json.
            ValueError: if a file is damaged, no EOS is named, or the vocabulary does not fit
                `vocab_size`.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {path}, which does not exist; save the tokenizer in the fast"
                " (tokenizer.json) format"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(
                f"{path}: expected a tokenizer in JSON, got {error}; fetch the file again"
            ) from error
        settings = read_json(directory / "tokenizer_config.json", missing={})
        template = _directory_template(directory, settings)
        bos = _token_text(settings.get("bos_token"))
        eos = _eos_candidates(directory, settings, backend)
        if not eos:
            raise ValueError(
                f"{directory}: expected an eos token id in generation_config.json, config.json or"
                " tokenizer_config.json, got none; add eos_token_id to generation_config.json"
            )
        return cls(
            backend,
            eos=end_of_turn(backend, eos, template, bos),
            bos=None if bos is None else backend.token_to_id(bos),
            vocab_size=vocab_size,
            template=template,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the model expects around a text (such as BOS) unless told
        not to.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        ids: Sequence[SupportsInt] | Int[Array | np.ndarray, " T"],
        skip_special_tokens: bool = True,
    ) -> str:
        """The text of token ids (a list or an array [T]), by default without special tokens."""
        return self.backend.decode(
            np.asarray(ids, int).tolist(), skip_special_tokens=skip_special_tokens
        )

    @property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes [V] that each token contributes to a text; None for special tokens and padding
        rows.

        The bytes of a string of tokens, joined, are its text; sentencepiece tokenizers drop one
        leading space of a whole text when they decode it, which the bytes keep.

        Raises:
            ValueError: if the vocabulary is neither byte-level BPE nor sentencepiece-style.
        """
        return self._token_bytes

    @functools.cached_property
    def _token_bytes(self) -> list[bytes | None]:
        to_bytes = _piece_reader(json.loads(self.backend.to_str()))
        added = self.backend.get_added_tokens_decoder()
        table: list[bytes | None] = [None] * self.vocab_size
        for piece, token in self.backend.get_vocab(with_added_tokens=True).items():
            if token not in added:
                table[token] = to_bytes(piece)
            elif not added[token].special:
                table[token] = added[token].content.encode()
        return table

    @functools.cached_property
    def segmentation(self) -> Segmentation:
        """How this tokenizer segments a text (for `ppl.canonical`, which see).

        Raises:
            ValueError: naming why that is not known, such as a tokenizer without merges.
        """
        return segmentation(self.backend, self.token_bytes)

    def chat(self, messages: str | Sequence[Message], system: str | None = None) -> list[int]:
        """Prompt token ids of a conversation, by the model's own template, up to where the
        assistant's answer begins.

        Args:
            messages: the user's text, or messages {"role": ..., "content": ...}.
            system: the system message; by default what the template itself says.

        Raises:
            ValueError: if the model has no template, or the template refuses these messages.
        """
        if self.template is None:
            raise ValueError(
                "expected a model with a chat template, got one without (a base model); use"
                " encode(text) for the prompt"
            )
        conversation = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        )
        if system is not None:
            conversation = [{"role": "system", "content": system}, *conversation]
        text = chat_template.render(
            self.template,
            conversation,
            bos_token="" if self.bos is None else self.backend.id_to_token(self.bos) or "",
            eos_token=self.backend.id_to_token(self.eos) or "",
        )
        return self.encode(text, add_special_tokens=False)


def end_of_turn(
    backend: tokenizers.Tokenizer, candidates: Sequence[int], template: str | None, bos: str | None
) -> int:
    """Of several EOS candidates the one that the template writes first after an assistant's
    message, else the first.

    Configurations of chat models often list the end of the document before the end of the turn.
    """
    if template is None or len(candidates) < 2:
        return candidates[0]
    answer = "an answer"
    conversation = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": answer},
    ]
    try:
        text = chat_template.render(
            template,
            conversation,
            bos_token=bos or "",
            eos_token=backend.id_to_token(candidates[0]) or "",
            add_generation_prompt=False,
        )
    except ValueError:
        return candidates[0]
    written = backend.encode(text.rpartition(answer)[2], add_special_tokens=False).ids
    return next((token for token in written if token in candidates), candidates[0])


def read_json(path: Path, *, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file, or `missing` if there is no such file; raises ValueError if it is
    not an object.
    """
    if missing is not None and not path.is_file():
        return dict(missing)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, got {error}; fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(value).__name__}; fetch the file again"
        )
    return value


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _directory_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next(
            (entry["template"] for entry in template if entry["name"] == "default"), None
        )
    return template


def _eos_candidates(
    directory: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        eos = read_json(directory / name, missing={}).get("eos_token_id")
        if eos is not None:
            return list(eos) if isinstance(eos, list) else [eos]
    text = _token_text(settings.get("eos_token"))
    token = None if text is None else backend.token_to_id(text)
    return [] if token is None else [token]


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


def _piece_reader(description: Mapping[str, Any]) -> Any:
    """How this tokenizer's pieces turn into bytes, judged by its decoder."""
    decoder = description.get("decoder") or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in kinds:
        return _byte_level_piece
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_piece
    raise ValueError(
        "expected a tokenizer with a byte-level or sentencepiece decoder (ByteLevel, ByteFallback,"
        " Metaspace), got"
        f" {sorted(kinds) or 'none'}; token bytes exist only for those"
    )


def _byte_level_piece(piece: str) -> bytes:
    alphabet = byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _sentencepiece_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()
