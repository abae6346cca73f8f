"""A tokenizer's own segmentation, read from its description: byte-level and sentencepiece-like
byte-pair encodings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from ppl.merges import Merges, derive
from ppl.segmentation import BYTE, FREE, Automaton, Segmentation, Unsegmented, product, without
from ppl.showing import shown

from .patterns import Pattern
from .pretokenizer import CODE_POINTS, NUMERIC, SURROGATES, Splitter, automaton, utf8

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "\u2581"  # what sentencepiece writes for a space
MOST_STATES = 1 << 16


def refusal(expected: str, got: str) -> Unsegmented:
    return Unsegmented(f"expected {expected}, got {got}; leave ppl.canonical away")


def patterns(description: Mapping[str, Any] | None) -> list[Pattern]:
    """The expressions of a pre-tokenizer, in the order in which they split.

    Raises:
        ValueError: naming what is not understood.
    """
    if description is None:
        return []
    kind = description["type"]
    if kind == "Sequence":
        return [p for part in description["pretokenizers"] for p in patterns(part)]
    if kind == "ByteLevel":
        return [Pattern(GPT2)] if description.get("use_regex", True) else []
    if kind == "Digits":
        repeated = "" if description["individual_digits"] else "+"
        return [Pattern(f"{NUMERIC}{repeated}|{NUMERIC.replace('p', 'P', 1)}+")]
    if kind == "Split":
        way = description["behavior"], description["invert"]
        if way in (("Isolated", False), ("Removed", True)) and "Regex" in description["pattern"]:
            return [Pattern(description["pattern"]["Regex"])]
        raise refusal("a pre-tokenizer that isolates an expression", f"Split with {way}")
    raise refusal("a pre-tokenizer of ByteLevel, Digits and Split", kind)


@shown
class Described(NamedTuple):
    """A tokenizer's description, taken apart: the whole, the model's pieces and their tokens, the
    added tokens, and the bytes of all tokens.
    """

    whole: Mapping[str, Any]
    pieces: dict[str, int]
    added: list[Mapping[str, Any]]
    token_bytes: Sequence[bytes | None]


def segmentation(
    backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes | None]
) -> Segmentation:
    """How a tokenizer segments, given the bytes of its tokens.

    Raises:
        ValueError: naming why it is not known: no byte-pair merges, an unknown pre-tokenizer or
            normalizer.
    """
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model.get("type") != "BPE":
        raise refusal("a tokenizer with byte-pair merges", f"one of kind {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refusal("a tokenizer of byte-pair merges alone", f"one with {key}={model[key]!r}")
    added = whole["added_tokens"]
    decoder = whole.get("decoder") or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    bytewise = "ByteLevel" in kinds
    ids = {e["id"] for e in added if bytewise or not _spaced(e, token_bytes)}
    pieces = {piece: token for piece, token in model["vocab"].items() if token not in ids}
    described = Described(whole, pieces, added, token_bytes)
    return _byte_level(described) if bytewise else _sentencepiece(described)


def _spaced(entry: Mapping[str, Any], token_bytes: Sequence[bytes | None]) -> bool:
    """Whether an added token of sentencepiece is written otherwise than it is read, as SPACE is: it
    is matched in texts that hold this character, and of spaces it is made by merges alone.
    """
    if not _misread(entry, token_bytes):
        return False
    if entry["normalized"]:
        raise refusal("added tokens that are matched as they are", repr(entry["content"]))
    return True


def _misread(entry: Mapping[str, Any], token_bytes: Sequence[bytes | None]) -> bool:
    """Whether an added token's text is not the one that it is matched in."""
    return token_bytes[entry["id"]] not in (None, entry["content"].encode())


def _byte_level(described: Described) -> Segmentation:
    """Pieces of the pre-tokenizer, in each of which bytes are joined."""
    splitter = Splitter(patterns(described.whole["pre_tokenizer"]))
    normalizer = described.whole["normalizer"]
    relaxed = ""
    if normalizer is not None and normalizer["type"] == "NFC":
        relaxed = "texts that are not in Unicode's normal form C are let through"
    elif normalizer is not None:
        raise refusal("a tokenizer without a normalizer, or NFC", normalizer["type"])
    spelled = {
        token: list(described.token_bytes[token] or b"") for token in described.pieces.values()
    }
    single = {token for token, symbols in spelled.items() if len(symbols) == 1}
    return _assembled(described, spelled, single, automaton(splitter), relaxed)


def _sentencepiece(described: Described) -> Segmentation:
    """The whole text is one piece, in which characters are joined; those without a token are
    spelled in bytes.
    """
    _check_spaces(described.whole)
    bytewise = {f"<0x{byte:02X}>": byte for byte in range(256)}
    fallback = described.whole["model"].get("byte_fallback")
    spelled, single = {}, set()
    for piece, token in described.pieces.items():
        if fallback and piece in bytewise:
            spelled[token] = [BYTE + bytewise[piece]]
        else:
            spelled[token] = list(described.token_bytes[token] or b"")
        if len(piece) == 1 or (fallback and piece in bytewise):
            single.add(token)
    known = np.zeros(CODE_POINTS, np.int64)
    known[[ord(piece) for piece in described.pieces if len(piece) == 1]] = 1
    known[ord(" ")] = known[ord(SPACE)]
    known[SURROGATES] = -1
    return _assembled(described, spelled, single, _characters(known))


def _check_spaces(whole: Mapping[str, Any]) -> None:
    """Raise ValueError unless all that is done to a text is to write its spaces as SPACE, and
    perhaps one in front.
    """
    before = [whole["normalizer"], whole["pre_tokenizer"]]
    steps = [
        part
        for step in before
        if step is not None
        for part in step.get("normalizers", step.get("pretokenizers", [step]))
    ]
    replaced = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE):
            replaced = True
        elif kind == "Metaspace" and not step["split"] and step["replacement"] == SPACE:
            replaced = True
        elif kind == "Split" and replaced and step["pattern"] == {"String": " "}:
            continue  # there are none any more
        elif kind != "Prepend":
            raise refusal("a tokenizer that writes spaces as \u2581 and does no more", kind)
    if not replaced:
        raise refusal("a tokenizer that writes spaces as \u2581", "one that keeps them")


def _characters(known: np.ndarray) -> Automaton:
    """Bytes of whole characters, or, of characters that are not known (0), `BYTE` symbols."""
    nodes = utf8(known, 2)
    dead = len(nodes)
    transitions = np.full((dead + 1, BYTE + 256), dead, np.int32)
    transitions[0, :256] = 0
    transitions[:dead, FREE] = np.arange(dead)
    spelled = transitions[:dead, BYTE:]
    spelled[nodes == 0] = 0
    spelled[nodes > 1] = nodes[nodes > 1] - 2
    return Automaton(transitions, np.arange(dead + 1) == 0)


def _merges(described: Described, single: set[int]) -> Merges:
    """The merges among the model's own pieces."""
    pieces, size = described.pieces, len(described.token_bytes)
    length, is_single = np.zeros(size, np.int32), np.zeros(size, bool)
    length[list(pieces.values())] = [len(piece) for piece in pieces]
    is_single[list(single)] = True
    merges = described.whole["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    triples = [[pieces.get(a, -1), pieces.get(b, -1), pieces.get(a + b, -1)] for a, b in pairs]
    found = np.array(triples, np.int32).reshape(-1, 3)
    merges = derive(found[(found >= 0).all(1)], is_single, length)
    whole = bool(described.whole["model"].get("ignore_merges"))
    return merges._replace(alone=whole & (length > 0) & ~merges.own)


def _around(cuts: Automaton, words: list[bytes], num_text: int) -> Automaton:
    """Segmentations that `cuts` accepts, around added tokens, of which `num_text` are text and have
    symbols of their own; none may be written in other tokens.
    """
    num_symbols = BYTE + 256 + num_text
    wide = np.full((len(cuts.accepting), num_symbols), len(cuts.accepting) - 1, np.int32)
    wide[:, : cuts.transitions.shape[1]] = cuts.transitions
    wide[cuts.accepting, BYTE + 256 :] = 0
    return product(Automaton(wide, cuts.accepting), without(words, num_symbols), MOST_STATES)


def _assembled(
    described: Described,
    spelled: dict[int, list[int]],
    single: set[int],
    cuts: Automaton,
    relaxed: str = "",
) -> Segmentation:
    """All of it, with the added tokens: those are found in a text before all else."""
    merges = _merges(described, single)
    may = merges.own | merges.alone
    spelled = {token: symbols for token, symbols in spelled.items() if may[token]}
    words = [entry["content"].encode() for entry in described.added]
    text = [
        entry
        for entry in described.added
        if not entry["special"] and not _misread(entry, described.token_bytes)
    ]
    for number, entry in enumerate(text):
        spelled[entry["id"]] = [BYTE + 256 + number]
    texts = [bytes([byte]) for byte in range(256)]
    texts = [*texts, b"", b"", *texts, *(entry["content"].encode() for entry in text)]
    lengths = np.full(len(described.token_bytes), -1, np.int32)
    lengths[list(spelled)] = [len(symbols) for symbols in spelled.values()]
    symbols = [symbol for token in sorted(spelled) for symbol in spelled[token]]
    automaton = _around(cuts, words, len(text))
    told = [relaxed, *_relaxations(described.added, int(merges.alone.sum()))]
    return Segmentation(
        np.array(symbols, np.int16),
        lengths,
        tuple(texts),
        automaton,
        merges,
        "; ".join(part for part in told if part),
    )


def _relaxations(added: Sequence[Mapping[str, Any]], num_alone: int) -> list[str]:
    """In words what is not heeded."""
    told = []
    if num_alone:
        told.append(f"the texts of {num_alone} tokens are let through in other tokens as well")
    text = [entry["content"] for entry in added if not entry["special"]]
    flags = ("lstrip", "rstrip", "single_word")
    if any(entry[flag] for entry in added for flag in flags):
        told.append("that added tokens take spaces with them, or must be words, is not heeded")
    if any(other != one and other.startswith(one) for one in text for other in text):
        told.append("an added token that begins as another may be written as that and a rest")
    return told
