"""Text to token ids and back, the bytes of every token, and the model's own chat template.

The algorithm is the `tokenizers` package's; the files come from a Hugging Face directory or,
through `gguf_tokenizer`, from GGUF metadata.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt, overload

import numpy as np
import tokenizers
from jaxtyping import Array, Int

from ppl.segmentation import Segmentation
from ppl.sequences import Sequences
from ppl.showing import shown

from . import chat_template, pieces
from .chat_template import Message
from .config import token_ids
from .control_tokens import ControlTokens
from .refusals import reading
from .segmentation import segmentation

log = logging.getLogger(__name__)


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
        tool_template: str | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: the algorithm and its vocabulary.
            eos: id of the token that ends a string.
            bos: id of the token that begins a text, or None.
            vocab_size: V of the model; by default the tokenizer's own size.
            template: the chat template's jinja source.
            tool_template: that of conversations with tools, if there is one of their own.

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
        unpadded(backend)
        backend.decode(backend.encode("A text of 4 words.").ids)  # parts that fail do so here
        self.backend, self.eos, self.bos = backend, eos, bos
        self.template, self.tool_template = template, tool_template

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
        with reading(path, "a tokenizer in JSON"):
            backend = tokenizers.Tokenizer.from_file(str(path))
            unpadded(backend)
        settings = read_json(directory / "tokenizer_config.json", missing={})
        template, tool_template = _directory_templates(directory, settings)
        with reading(directory / "tokenizer_config.json", "the settings of a tokenizer"):
            bos = _token_text(settings, "bos_token")
            eos = _eos_candidates(directory, settings, backend)
        if not eos:
            raise ValueError(
                f"{directory}: expected an eos token id in generation_config.json, config.json or"
                " tokenizer_config.json, got none; add eos_token_id to generation_config.json"
            )
        with reading(path, "a tokenizer in JSON"):
            return cls(
                backend,
                eos=end_of_turn(backend, eos, template, bos),
                bos=None if bos is None else backend.token_to_id(bos),
                vocab_size=vocab_size,
                template=template,
                tool_template=tool_template,
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the model expects around a text (such as BOS) unless told
        not to.

        Characters that the vocabulary lacks are dropped or become its token for the unknown; a
        warning names them.

        Raises:
            ValueError: if it is no text, or holds lone surrogates, which no text has.
        """
        check_text(text)
        encoded = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if lost := pieces.lost(self.backend, text, encoded):
            log.warning("the vocabulary lacks %s of %r: the model does not read them", lost, text)
        return encoded.ids

    @overload
    def decode(self, ids: Sequences, skip_special_tokens: bool = True) -> list[str]: ...

    @overload
    def decode(
        self,
        ids: Sequence[SupportsInt] | Int[Array | np.ndarray, " T"],
        skip_special_tokens: bool = True,
    ) -> str: ...

    def decode(
        self,
        ids: Sequences | Sequence[SupportsInt] | Int[Array | np.ndarray, " T"],
        skip_special_tokens: bool = True,
    ) -> str | list[str]:
        """The text of token ids (a list or an array [T]), or the N texts of `Sequences`; by default
        without special tokens.

        Raises:
            ValueError: if it is an array of several strings, or the sequences are not [N, T]; if
                ids are no whole numbers or outside of the vocabulary.
        """
        if not isinstance(ids, Sequences):
            array = np.asarray(ids)
            array = array if array.size else array.astype(int)  # an empty list has no type
            if array.ndim != 1:
                raise ValueError(
                    f"expected token ids of one text [T], got shape {array.shape}; pass Sequences,"
                    " which know where every string ends: decode(out.sequences)"
                )
            self._check_ids(array)
            return self.backend.decode(array.tolist(), skip_special_tokens=skip_special_tokens)
        tokens, length = np.asarray(ids.tokens), np.asarray(ids.length)
        if tokens.ndim != 2:
            raise ValueError(
                f"expected sequences with tokens [N, T], got {tokens.shape}; take one of their"
                " batches, for example jax.tree.map(lambda leaf: leaf[0], sequences)"
            )
        self._check_ids(tokens[np.arange(tokens.shape[1]) < length[:, None]])
        strings = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
        return self.backend.decode_batch(strings, skip_special_tokens=skip_special_tokens)

    def _check_ids(self, ids: np.ndarray) -> None:
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"expected token ids as whole numbers, got {ids.dtype}; round them, or pass text to"
                " encode"
            )
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"expected token ids in [0, {self.vocab_size}), got {outside[0]}; decode ids of"
                " this model's own vocabulary"
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
        return pieces.token_bytes(self.backend, json.loads(self.backend.to_str()), self.vocab_size)

    @functools.cached_property
    def segmentation(self) -> Segmentation:
        """How this tokenizer segments a text (for `ppl.canonical`, which see).

        Raises:
            ValueError: naming why that is not known, such as a tokenizer without merges.
        """
        return segmentation(self.backend, self.token_bytes)

    @functools.cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.backend)

    def chat(
        self,
        messages: str | Sequence[Message],
        system: str | None = None,
        *,
        continue_final_message: bool = False,
        literal: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Prompt token ids of a conversation, by the model's own template, up to where the
        assistant's answer begins.

        Args:
            messages: the user's text, or messages {"role": ..., "content": ...}.
            system: the system message; by default what the template itself says.
            continue_final_message: whether the answer has begun with the last message, which is
                left open.
            literal: whether control tokens that are written in the messages and variables are text.
                They become control tokens otherwise, which texts of others must not.
            variables: what else the template reads, such as tools, documents, enable_thinking,
                date_string.

        Raises:
            ValueError: if the model has no template, the template refuses these messages or does
                not read a variable, or a text holds lone surrogates.
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
        marks: list[str] = []
        if literal:
            conversation = self._control_tokens.marked(conversation, marks)
            variables = self._control_tokens.marked(variables, marks)
        tools = variables.get("tools") is not None
        text = chat_template.render(
            (self.tool_template if tools else None) or self.template,
            conversation,
            bos_token="" if self.bos is None else self.backend.id_to_token(self.bos) or "",
            eos_token=self.backend.id_to_token(self.eos) or "",
            continue_final_message=continue_final_message,
            variables=variables,
        )
        if not literal:
            return self.encode(text, add_special_tokens=False)
        check_text(text)
        return self._control_tokens.encode(text, marks)


def check_text(text: Any) -> None:
    """Raise ValueError unless this is a text that can be written in UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got {type(text).__name__}; pass a str")
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ValueError(
            f"expected a text, got a lone surrogate {found[0]!r} at position {found.start()}, which"
            " UTF-8 cannot write; decode the bytes it came from with errors='replace'"
        )


def unpadded(backend: tokenizers.Tokenizer) -> None:
    """Switch off padding and truncation, which are for training and change what is encoded."""
    backend.no_truncation()
    backend.no_padding()


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
            variables={"add_generation_prompt": False},
        )
        check_text(text)
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
    with reading(path, "a JSON object"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}: expected a JSON object, got {type(value).__name__}; fetch the file again"
            )
    return value


def _token_text(settings: Mapping[str, Any], name: str) -> str | None:
    token = settings.get(name)
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str | None) or (text is None and token is not None):
        raise ValueError(f"expected {name} to be a token's text, got {token!r}; fetch it again")
    return text


def _directory_templates(
    directory: Path, settings: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """The chat template, and that of conversations with tools; None where there is none."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        with reading(path, "a chat template in UTF-8"):
            return path.read_text(encoding="utf-8"), None
    template, tool_template = settings.get("chat_template"), None
    with reading(directory / "tokenizer_config.json", "a chat template, or a list of named ones"):
        if isinstance(template, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in template}
            template, tool_template = named.get("default"), named.get("tool_use")
        for source in (template, tool_template):
            if not isinstance(source, str | None):
                raise ValueError(
                    f"expected chat_template to be a text, got {type(source).__name__}; fetch the"
                    " file again"
                )
    return template, tool_template


def _eos_candidates(
    directory: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        eos = read_json(directory / name, missing={}).get("eos_token_id")
        if eos is not None:
            return list(token_ids(eos, f"{directory / name}: eos_token_id"))
    text = _token_text(settings, "eos_token")
    token = None if text is None else backend.token_to_id(text)
    return [] if token is None else [token]
