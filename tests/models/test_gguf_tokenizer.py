"""Tokenizers out of GGUF metadata: sentencepiece's own ids, the pre-tokenizers' splits, refused
files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from tokenizers import AddedToken

from models import gguf_tokenizer
from models.gguf_file import GGUFFile
from models.pieces import byte_alphabet
from models.tokenizer import Tokenizer
from ppl.testing import check_tokenizer

from .fixtures_io import builders

PIECES = json.loads((Path(__file__).parent / "fixtures_io" / "sentencepiece.json").read_text())
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES["tokens"],
    "tokenizer.ggml.scores": PIECES["scores"],
    "tokenizer.ggml.token_type": PIECES["types"],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def tokenizer(metadata: dict[str, Any], vocab_size: int | None = None) -> Tokenizer:
    return gguf_tokenizer.from_gguf(GGUFFile(Path("t.gguf"), metadata, {}), vocab_size=vocab_size)


@pytest.mark.parametrize("index", range(len(PIECES["texts"])))
def test_ids_are_those_of_sentencepiece(index: int):
    tok, text = tokenizer(SENTENCEPIECE), PIECES["texts"][index]
    ids = tok.encode(text, add_special_tokens=False)
    assert ids == PIECES["ids"][index]
    assert tok.decode(ids) == text
    assert (
        b"".join(tok.token_bytes[token] or b"" for token in ids).removeprefix(b" ") == text.encode()
    )


def test_sentencepiece_bytes_and_kinds():
    tok = tokenizer(SENTENCEPIECE, vocab_size=430)
    assert tok.token_bytes[:5] == [None, None, None, b"<turn>", b"\x00"]
    assert tok.token_bytes[4:260] == [bytes([value]) for value in range(256)]
    assert tok.token_bytes[PIECES["tokens"].index("\u2581License")] == b" License"
    assert tok.token_bytes[420:] == [None] * 10 and tok.vocab_size == 430
    assert tok.encode("<turn>") == [1, 3]
    assert tok.decode(tok.encode("the<turn>")) == "the<turn>"


def test_sentencepiece_without_a_space_prefix_keeps_the_text():
    tok = tokenizer(SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": False})
    ids = tok.encode("the License", add_special_tokens=False)
    assert b"".join(tok.token_bytes[token] or b"" for token in ids) == b"the License"
    assert tok.decode(ids) == "the License"


def test_byte_level_ids_are_those_of_the_same_tokenizer_json():
    tok, reference = tokenizer(builders.tokenizer_metadata()), builders.backend()
    for text in ("in the thin", "the end</s>", " the\nin<|im_end|>a", "10 inns, then?", ""):
        assert tok.encode(text) == reference.encode(text).ids
    assert tok.encode("a</s>")[-1] == 2


def test_bos_is_added_where_the_file_says_so():
    metadata = builders.tokenizer_metadata() | {"tokenizer.ggml.add_bos_token": True}
    tok = tokenizer(metadata)
    assert (
        tok.encode("a")[0] == 1 and tok.encode("a", add_special_tokens=False) == tok.encode("a")[1:]
    )


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [(1, "a", [1, 4]), (0, "a", [4]), (True, "a", [1, 4]), (False, "a", [4])],
)
def test_flags_may_be_numbers(flag: int, text: str, expected: list[int]):
    metadata = builders.tokenizer_metadata() | {"tokenizer.ggml.add_bos_token": flag}
    assert tokenizer(metadata).encode(text) == expected
    prefixed = tokenizer(SENTENCEPIECE | {"tokenizer.ggml.add_space_prefix": flag})
    ids = prefixed.encode("the", add_special_tokens=False)
    assert b"".join(prefixed.token_bytes[token] or b"" for token in ids) == b" " * flag + b"the"


def test_llama_3_begins_with_bos_unless_the_file_says_otherwise():
    metadata = builders.tokenizer_metadata() | {"tokenizer.ggml.pre": "llama-v3"}
    del metadata["tokenizer.ggml.add_bos_token"]
    assert tokenizer(metadata).encode("a") == [1, 4]
    assert tokenizer(metadata | {"tokenizer.ggml.pre": "qwen2"}).encode("a") == [4]
    assert tokenizer(metadata | {"tokenizer.ggml.add_bos_token": 0}).encode("a") == [4]


@pytest.mark.parametrize("absent", [0xFFFFFFFF, -1])
def test_a_token_id_of_all_ones_is_no_token(absent: int):
    metadata = builders.tokenizer_metadata()
    tok = tokenizer(metadata | {"tokenizer.ggml.bos_token_id": absent})
    assert tok.bos is None and tok.encode("a") == [4]
    with pytest.raises(ValueError, match=r"expected tokenizer\.ggml\.eos_token_id, got none"):
        tokenizer(metadata | {"tokenizer.ggml.eos_token_id": absent})


@pytest.mark.parametrize(
    "metadata",
    [builders.tokenizer_metadata(), SENTENCEPIECE],
    ids=["byte-level", "sentencepiece"],
)
@pytest.mark.parametrize("added", [[], ["\u2581\u2581", "<turn>x", "a b"]], ids=["", "added"])
def test_bytes_are_the_text(metadata: dict[str, Any], added: list[str]):
    tok = tokenizer(metadata)
    tok.backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    tok.backend.add_tokens(["x y"] if added else [])  # of which the decoder reads the normal form
    tok = Tokenizer(tok.backend, eos=2)
    check_tokenizer(tok, key=jax.random.key(0))
    if added:
        spaces = b"  " if metadata is SENTENCEPIECE else "\u2581\u2581".encode()
        assert tok.token_bytes[tok.backend.token_to_id(added[0])] == spaces


@pytest.mark.parametrize(("name", "alias"), [(n, a) for a, n in gguf_tokenizer._NAMES.items()])
def test_aliases_split_as_what_they_stand_for(name: str, alias: str):
    text = "We're 1234 here'S   x.\n\n"
    assert words(alias, text) == words(name, text)


def words(name: str, text: str) -> list[str]:
    """The words that a pre-tokenizer never joins, read off a vocabulary in which every byte is a
    token.
    """
    alphabet = [*byte_alphabet(), "</s>"]
    tok = tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": alphabet,
            "tokenizer.ggml.token_type": [1] * 256 + [3],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 256,
        }
    )
    assert tok.decode(tok.encode(text)) == text
    pieces = tok.backend.pre_tokenizer.pre_tokenize_str(text)  # pyright: ignore[reportOptionalMemberAccess]
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["We", "'re", " 1234", " here", "'S", "  ", " x", ".\n", "\n"]),
        ("smollm", ["We", "'re", " ", "1", "2", "3", "4", " here", "'S", "  ", " x", ".\n", "\n"]),
        ("llama-bpe", ["We", "'re", " ", "123", "4", " here", "'S", "  ", " x", ".\n\n"]),
        ("qwen2", ["We", "'re", " ", "1", "2", "3", "4", " here", "'S", "  ", " x", ".\n\n"]),
    ],
)
def test_words_of_each_pre_tokenizer(name: str, expected: list[str]):
    got = words(name, "We're 1234 here'S   x.\n\n")
    if name in (
        "gpt-2",
        "smollm",
    ):  # GPT-2 knows only lower-case endings, and splits newlines from punctuation
        expected = [*expected[: expected.index("'S")], "'", "S", "  ", " x", ".", "\n\n"]
    assert got == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.model": "bert"},
            "expected a tokenizer of kind gpt2 or llama, got 'bert' with 52 tokens",
        ),
        (
            {"tokenizer.ggml.tokens": []},
            "expected a tokenizer of kind gpt2 or llama, got 'gpt2' with 0 tokens",
        ),
        (
            {"tokenizer.ggml.tokens": [1, 2]},
            r"expected metadata entry tokenizer\.ggml\.tokens to hold only str",
        ),
        (
            {"tokenizer.ggml.token_type": [1]},
            "expected 52 different tokens and as many token types, got 52 .* 1 types",
        ),
        (
            {"tokenizer.ggml.pre": "klingon"},
            "expected a pre-tokenizer gpt-2, phi-2, .*, got 'klingon'; use the model's",
        ),
        (
            {"tokenizer.ggml.merges": ["zz y"]},
            "expected merges of two tokens of the vocabulary into a third, got 'zz y'",
        ),
        (
            {"tokenizer.ggml.merges": ["zz"]},
            "expected merges of two tokens of the vocabulary into a third, got 'zz '",
        ),
        (
            {"tokenizer.ggml.add_bos_token": 2},
            r"expected metadata entry tokenizer\.ggml\.add_bos_token to be true or false, got 2",
        ),
        (
            {"tokenizer.ggml.eos_token_id": 52},
            r"expected tokenizer\.ggml\.eos_token_id in \[0, 52\), got 52",
        ),
        (
            {"tokenizer.ggml.bos_token_id": 99},
            r"expected tokenizer\.ggml\.bos_token_id in \[0, 52\), got 99",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tokenizer(builders.tokenizer_metadata() | changes)


def test_other_refusals():
    metadata = builders.tokenizer_metadata()
    del metadata["tokenizer.ggml.eos_token_id"]
    with pytest.raises(
        ValueError, match=r"t\.gguf: expected tokenizer\.ggml\.eos_token_id, got none"
    ):
        tokenizer(metadata)
    with pytest.raises(
        ValueError, match=r"at most 40 tokens \(the model's embedding rows\), got 52"
    ):
        tokenizer(builders.tokenizer_metadata(), vocab_size=40)
    with pytest.raises(
        ValueError, match="expected 420 token scores, got 0; convert the model again"
    ):
        tokenizer(
            {key: value for key, value in SENTENCEPIECE.items() if key != "tokenizer.ggml.scores"}
        )


def test_the_end_of_turn_is_chosen_among_the_files_candidates():
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    metadata = builders.tokenizer_metadata() | {"tokenizer.ggml.eot_token_id": 3}
    assert tokenizer(metadata).eos == 2
    assert tokenizer(metadata | {"tokenizer.chat_template": template}).eos == 3
    both = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert tokenizer(metadata | both).tool_template == "b"
