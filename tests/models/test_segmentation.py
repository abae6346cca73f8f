"""A tokenizer's own segmentation: exactly the strings x with encode(decode(x)) = x."""

from __future__ import annotations

import functools
import itertools
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tokenizers

import ppl
from experiments.canonical import otherwise
from models import gguf_tokenizer, segmentation
from models.patterns import Pattern
from models.pieces import byte_alphabet
from models.tokenizer import Tokenizer
from ppl import merges
from ppl.segmentation import CUT, FREE, Segmentation

from .fixtures_io import builders
from .test_gguf_tokenizer import PIECES, SENTENCEPIECE, tokenizer

# Merges that meet across words, spaces, digits and contractions; "th e" comes before "h e" stands.
PAIRS = [
    ("h", "e"), ("t", "h"), ("Ġ", "Ġ"), ("Ġ", "t"), ("th", "e"), ("Ġt", "he"), ("'", "s"),
    ("1", "2"), ("s", "s"), ("s", "t"), ("e", "r"), ("er", "e"), ("Ġ", "'"), ("Ã", "©"),
    ("ĠĠ", "ĠĠ"), ("Ċ", "Ċ"), ("r", "e"), ("'", "re"), ("e", "s"), ("Ã", "ł"), (".", "."),
]  # fmt: skip


def byte_level(words: str, pairs: Any = PAIRS) -> Tokenizer:
    """A byte-level tokenizer of all bytes and some merges, with one of the pre-tokenizers."""
    tokens = ["</s>", *sorted(byte_alphabet())]
    tokens += [union for union in map("".join, pairs) if union not in tokens]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(pairs)))
    backend.pre_tokenizer = gguf_tokenizer._WORDS[words]()
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    return Tokenizer(backend, eos=0)


def accepts(own: Segmentation, pairs: merges.Pairs, string: list[int]) -> bool:
    """Whether the tables let a string through: the definition, one symbol at a time."""
    starts = np.concatenate([[0], np.cumsum(np.maximum(own.lengths, 0))])
    state = 0
    for last, token in pairwise([-1, *string]):
        if own.lengths[token] < 0:
            return False
        if last >= 0:
            mark = FREE if beside(pairs, last, token) else CUT
            state = own.automaton.transitions[state, mark]
        for symbol in own.symbols[starts[token] : starts[token + 1]]:
            state = own.automaton.transitions[state, symbol]
    return bool(own.automaton.accepting[state])


def random_strings(tok: Tokenizer, texts: list[str], num: int, seed: int) -> list[list[int]]:
    """Random tokens, and of random texts the encoding, that with a stretch written otherwise, and
    any segmentation.
    """
    rng = np.random.default_rng(seed)
    names = {value: token for token, value in enumerate(tok.token_bytes) if value is not None}
    tokens, found = list(names.values()), []
    while len(found) < num:
        text = "".join(rng.choice(texts, rng.integers(1, 7)))
        x = tok.encode(text, add_special_tokens=False)
        kind = rng.integers(4)
        if kind == 0:
            x = rng.choice(tokens, rng.integers(1, 5)).tolist()
        elif kind == 1:
            x = otherwise(text.encode(), names, rng)
        elif kind == 2 and x:
            cut = rng.integers(len(x))
            parts = [tok.token_bytes[token] or b"" for token in x[cut : cut + 3]]
            x[cut : cut + 3] = otherwise(b"".join(parts), names, rng)
        found.append(x)
    return found


TEXTS = [
    *"abehrst 12.'!é\n\t", "  ", "the", "'s", "'re", "there", "\r\n", "12", "\xa0", "à", "中", "½",
    "'S", "   ", " the", "</s>", "..", "😀",
]  # fmt: skip


def mistakes(tok: Tokenizer, texts: list[str], num: int, seed: int = 0) -> tuple[int, int, int]:
    """Of random strings: how many are canonical, how many wrongly let through, wrongly refused."""
    own = tok.segmentation
    pairs = merges.pairs(own.merges, np.flatnonzero(own.lengths > 0))
    counts = np.zeros((2, 2), int)
    for x in random_strings(tok, texts, num, seed):
        text = tok.decode(x, skip_special_tokens=False)
        right = tok.encode(text, add_special_tokens=False) == x
        right &= all(tok.token_bytes[token] is not None for token in x)
        counts[int(right), int(accepts(own, pairs, x))] += 1
    return int(counts[1].sum()), int(counts[0, 1]), int(counts[1, 0])


@pytest.mark.parametrize("words", gguf_tokenizer._WORDS)
def test_byte_level_strings_are_canonical_exactly_if_encoding_gives_them_back(words: str):
    canonical, through, refused = mistakes(byte_level(words), TEXTS, 1500)
    assert (through, refused) == (0, 0) and 300 < canonical < 1200


@functools.cache
def sentencepiece(prefix: bool) -> Tokenizer:
    return tokenizer(SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": prefix})


LICENCE = [
    *PIECES["texts"],
    " the",
    "License",
    "er",
    "a",
    " ",
    "  ",
    "é",
    "中",
    "\n",
    "<turn>",
    "e",
]


def test_sentencepiece_strings_are_canonical_exactly_if_encoding_gives_them_back():
    canonical, through, refused = mistakes(sentencepiece(False), LICENCE, 1500)
    assert (through, refused) == (0, 0) and 300 < canonical < 1200


def test_added_tokens_that_are_written_otherwise_than_read():
    """Of sentencepiece they are made by merges, where there are such; a byte-level one whose bytes
    are not its text is no text's.
    """
    tok = tokenizer(SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": False})
    pieces = ["\u2581the", "\u2581\u2581\u2581\u2581"]
    for piece in pieces:
        tok.backend.add_tokens([tokenizers.AddedToken(piece, normalized=False)])
    tok = Tokenizer(tok.backend, eos=2)
    [the, spaces] = map(tok.backend.token_to_id, pieces)
    assert tok.segmentation.lengths[the] == 4 and tok.segmentation.lengths[spaces] == -1
    canonical, through, refused = mistakes(tok, [*LICENCE, "    ", " the License"], 1500)
    assert (through, refused) == (0, 0) and 300 < canonical < 1200
    tok.backend.add_tokens([tokenizers.AddedToken("\u2581x", normalized=True)])
    with pytest.raises(ValueError, match="expected added tokens that are matched as they are, got"):
        _ = Tokenizer(tok.backend, eos=2).segmentation
    latin = byte_level("gpt-2")
    latin.backend.add_tokens(["<é>"])
    latin = Tokenizer(latin.backend, eos=0)
    canonical, through, refused = mistakes(latin, [*TEXTS, "<é>", "<", ">"], 1500)
    assert (through, refused) == (0, 0) and 300 < canonical < 1200


def test_a_space_in_front_of_a_text_is_left_aside():
    plain, prefixed = (sentencepiece(prefix).segmentation for prefix in (False, True))
    for one, other in zip(plain.automaton, prefixed.automaton, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "fault", ["forget a merge", "ignore the pre-tokenizer", "leave the added tokens out"]
)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch):
    if fault == "forget a merge":
        derive = segmentation.derive
        monkeypatch.setattr(segmentation, "derive", lambda t, *rest: derive(t[1:], *rest))
    elif fault == "ignore the pre-tokenizer":
        monkeypatch.setattr(segmentation, "patterns", lambda _: [])
    else:
        without = segmentation.without
        monkeypatch.setattr(segmentation, "without", lambda words, num: without([], num))
    _, through, refused = mistakes(byte_level("gpt-2"), TEXTS, 1500)
    assert through + refused > 0


def random_merges(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    """A few tokens out of a's, b's and c's, and merges in no sensible order: unions that are made
    in several ways, and of parts that come later.
    """
    tokens = list("abc"[: rng.integers(1, 4)])
    pairs: dict[tuple[str, str], None] = {}
    for _ in range(rng.integers(1, 9)):
        one, other = (str(part) for part in rng.choice(tokens, 2))
        if len(one + other) <= 6:
            pairs[one, other] = None
            tokens = list(dict.fromkeys([*tokens, one + other]))
    order = rng.permutation(len(pairs)) if rng.random() < 0.6 else range(len(pairs))
    return tokens, [list(pairs)[number] for number in order]


def pair_mistakes(seed: int, num: int) -> int:
    """How many strings of two and three tokens the pairs of random merges judge wrongly."""
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(num):
        tokens, pairs = random_merges(rng)
        ids = {token: number for number, token in enumerate(tokens)}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))
        length = np.array([len(token) for token in tokens])
        triples = np.array([[ids[a], ids[b], ids[a + b]] for a, b in pairs], np.int32)
        found = merges.derive(triples, length == 1, length)
        assert [model.encode(token).ids == [ids[token]] for token in tokens] == found.own.tolist()
        own = np.flatnonzero(found.own)
        table = merges.pairs(found, own)
        for x in (rng.choice(own, number).tolist() for number in [2, 2, 3] * 10):
            right = model.encode("".join(tokens[token] for token in x)).ids == x
            wrong += right != all(itertools.starmap(functools.partial(beside, table), pairwise(x)))
    return wrong


def beside(pairs: merges.Pairs, one: int, other: int) -> bool:
    column = pairs.column[other]
    return bool(pairs.beside[pairs.row[one], column // 32] >> np.uint32(column % 32) & 1)


def test_pairs_of_any_merges_are_those_that_encoding_leaves():
    assert pair_mistakes(seed=0, num=150) == 0


@pytest.mark.parametrize("fault", ["left_until", "right_until", "time"])
def test_forgetting_what_is_taken_when_is_found(fault: str, monkeypatch: pytest.MonkeyPatch):
    pairs = merges.pairs

    def late(found: merges.Merges, tokens: np.ndarray) -> merges.Pairs:
        return pairs(
            found._replace(**{fault: np.where(getattr(found, fault) >= 0, 50, -1)}), tokens
        )

    monkeypatch.setattr(merges, "pairs", late)
    assert pair_mistakes(seed=0, num=150) > 0


def test_tokens_beyond_the_merges_are_whole_pieces():
    pairs = [("t", "h"), ("h", "e"), ("Ġ", "t")]
    tok = byte_level("gpt-2", pairs)
    description = json.loads(tok.backend.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary["the"] = len(vocabulary)
    refused = mistakes(Tokenizer(backend(description), eos=0), ["the", " the", "x", " "], 600)
    assert refused[1:] == (0, 0), "merges never reach it, so it never occurs"
    description["model"]["ignore_merges"] = True
    tok = Tokenizer(backend(description), eos=0)
    assert tok.encode("the x")[0] == vocabulary["the"]
    _, through, refused = mistakes(tok, ["the", " the", "x", " "], 600)
    assert refused == 0 and through > 0
    assert (
        tok.segmentation.relaxed == "the texts of 1 tokens are let through in other tokens as well"
    )


def backend(description: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def changed(**changes: Any) -> Tokenizer:
    description = json.loads(byte_level("gpt-2").backend.to_str())
    model = changes.pop("model", {})
    return Tokenizer(
        backend(description | changes | {"model": description["model"] | model}), eos=0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"dropout": 0.5}}, "merges alone, got one with dropout=0.5"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ByteLevel, Digits and Split, got Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "without a normalizer, or NFC, got Lowercase"),
    ],
)
def test_unknown_segmentations_are_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"expected a .*{message}; leave ppl.canonical away"):
        ppl.canonical(changed(**changes))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"\bx", "an escape of an unknown kind"),
        ("a++", "a possessive repetition"),
        ("(?=a)b", "a group of an unknown kind"),
        ("(?!ab)c", "look-ahead of more than one character"),
        ("a|b$", r"'\$' at position 3"),
        ("(ab", "an unclosed group"),
        ("a)", r"an unmatched \)"),
        ("[a[b]]", "a set of sets"),
    ],
)
def test_expressions_that_are_not_understood_are_refused(pattern: str, message: str):
    with pytest.raises(ValueError, match=f"sets, groups, .*got {message}"):
        Pattern(pattern)


def test_expressions_that_leave_gaps_are_refused():
    split = {
        "type": "Split",
        "pattern": {"Regex": "[0-9]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    with pytest.raises(
        ValueError, match="whose matches cover every text, got one that leaves gaps"
    ):
        ppl.canonical(changed(pre_tokenizer=split))


def test_other_vocabularies_are_refused_by_name():
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("\u2581", -2.0)], 0))
    unigram.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(ValueError, match="byte-pair merges, got one of kind Unigram"):
        ppl.canonical(Tokenizer(unigram, eos=0))


def test_texts_out_of_the_normal_form_are_a_relaxation():
    tok = tokenizer(builders.tokenizer_metadata() | {"tokenizer.ggml.pre": "qwen2"})
    assert "normal form C" in tok.segmentation.relaxed
    assert "normal form C" in ppl.canonical(tok).segmentation
