"""Tokenizers from GGUF metadata: byte-level BPE with its merges, and sentencepiece BPE with its
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .gguf_file import GGUFFile
from .tokenizer import Tokenizer, end_of_turn

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2_words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digit_words() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


def _regex_words(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_WORDS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2_words,
    "smollm": _digit_words,
    "llama-bpe": lambda: _regex_words(_LLAMA3_WORDS),
    "qwen2": lambda: _regex_words(_QWEN2_WORDS),
}
# What files call pre-tokenizers that split alike.
_ALIASES: dict[str, tuple[str, ...]] = {
    "gpt-2": (
        *("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum"),
        *("gigachat", "a.x-4.0", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": (*("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),),
    "qwen2": ("deepseek-r1-qwen", "kormo", "megrez"),
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
_ABSENT = (0xFFFFFFFF, -1)
"""What a token id is where there is none."""


def from_gguf(file: GGUFFile, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer stored in a GGUF file.

    Raises:
        ValueError: if the file holds no tokenizer or one of an unknown kind, or it does not fit
            `vocab_size`.
    """
    tokens, kind = (
        file.entries("tokenizer.ggml.tokens", str),
        file.metadata.get("tokenizer.ggml.model"),
    )
    if not tokens or kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{file.path}: expected a tokenizer of kind gpt2 or llama, got {kind!r} with"
            f" {len(tokens)} tokens;"
            " use the model's Hugging Face directory instead"
        )
    types = file.entries("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{file.path}: expected {len(tokens)} different tokens and as many token types, got"
            f" {len(set(tokens))}"
            f" different tokens and {len(types)} types; convert the model again"
        )
    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    _add_tokens(backend, tokens, types)
    bos = _token_id(file, "bos", tokens)
    begins = kind == "llama" or _pre_tokenizer(file) == "llama-bpe"
    if bos is not None and file.flag("tokenizer.ggml.add_bos_token", begins):
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    template = file.entry("tokenizer.chat_template", str, "") or None
    tool_template = file.entry("tokenizer.chat_template.tool_use", str, "") or None
    ends = [
        token for name in ("eos", "eot") if (token := _token_id(file, name, tokens)) is not None
    ]
    if not ends:
        raise ValueError(
            f"{file.path}: expected tokenizer.ggml.eos_token_id, got none; convert the model again"
        )
    eos = end_of_turn(backend, ends, template, None if bos is None else tokens[bos])
    return Tokenizer(
        backend,
        eos=eos,
        bos=bos,
        vocab_size=vocab_size,
        template=template,
        tool_template=tool_template,
    )


def _token_id(file: GGUFFile, name: str, tokens: Sequence[str]) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if file.metadata.get(key, _ABSENT[0]) in _ABSENT:
        return None
    token = file.entry(key, int)
    if not 0 <= token < len(tokens):
        raise ValueError(
            f"{file.path}: expected {key} in [0, {len(tokens)}), got {token}; fetch or convert the"
            " file again"
        )
    return token


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    special = (UNKNOWN, CONTROL)
    added = [
        AddedToken(token, special=kind in special, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (*special, USER_DEFINED) and token
    ]
    backend.add_tokens(added)


def _pre_tokenizer(file: GGUFFile) -> str:
    name = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in _NAMES:
        raise ValueError(
            f"{file.path}: expected a pre-tokenizer {', '.join(_NAMES)}, got {name!r};"
            " use the model's Hugging Face directory instead"
        )
    return _NAMES[name]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = _pre_tokenizer(file)
    merges = [merge.partition(" ")[::2] for merge in file.entries("tokenizer.ggml.merges", str)]
    vocabulary = _vocabulary(tokens)
    for pair in merges:
        if not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise ValueError(
                f"{file.path}: expected merges of two tokens of the vocabulary into a third, got"
                f" {' '.join(pair)!r};"
                " convert the model again"
            )
    model = models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _WORDS[name]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Sentencepiece BPE: of all adjacent pairs it joins the one whose union has the highest score,
    as merges do.
    """
    scores = file.entries("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ValueError(
            f"{file.path}: expected {len(tokens)} token scores, got {len(scores)}; convert the"
            " model again"
        )
    vocabulary = _vocabulary(tokens)
    ranked = sorted(range(len(tokens)), key=lambda index: -scores[index])
    lengths = {len(token) for token in tokens}
    merges = [
        (tokens[index][:cut], tokens[index][cut:])
        for index in ranked
        for cut in _cuts(tokens[index], vocabulary, lengths)
    ]
    unknown = _token_id(file, "unknown", tokens)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _cuts(token: str, vocabulary: dict[str, int], lengths: set[int]) -> list[int]:
    """Where `token` splits into two tokens, which have some of the `lengths`; pairs of earlier
    tokens first, as the trainer met them.
    """
    size = len(token)
    cuts = [
        cut
        for cut in (range(1, size) if size < len(lengths) else lengths)
        if size - cut in lengths and token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return sorted(cuts, key=lambda cut: (vocabulary[token[:cut]], vocabulary[token[cut:]]))
