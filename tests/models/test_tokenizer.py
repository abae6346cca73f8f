"""Encoding, token bytes, chat templates in their sandbox, and the choice of EOS."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from models import chat_template
from models.pieces import byte_alphabet
from models.tokenizer import Tokenizer
from ppl import testing
from ppl.sequences import Sequences

from .fixtures_io import builders

FALLBACK = decoders.ByteFallback()
VOCABULARY = {token: index for index, token in enumerate(builders.TOKENS)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return builders.directory(tmp_path / "model", "smollm2")


def test_encode_and_decode():
    tok = Tokenizer(builders.backend(), eos=2)
    ids = tok.encode("in the</s>")
    assert ids == [VOCABULARY["in"], VOCABULARY["Ġthe"], 2]
    assert (
        tok.decode(ids) == "in the" and tok.decode(ids, skip_special_tokens=False) == "in the</s>"
    )
    assert tok.decode(jnp.array(ids, jnp.int32)) == "in the"
    assert tok.decode([]) == ""


def test_sequences_are_decoded_each_to_its_own_end():
    tok = Tokenizer(builders.backend(), eos=2)
    one, the = VOCABULARY["in"], VOCABULARY["Ġthe"]
    # What stands behind the end of a string is not read.
    tokens = jnp.array([[one, the, the], [the, one, the], [one, one, one]], jnp.int32)
    x = Sequences(tokens, jnp.array([2, 1, 0], jnp.int32))
    assert tok.decode(x) == ["in the", " the", ""]
    with pytest.raises(ValueError, match=r"expected sequences with tokens \[N, T\], got \(1, 3, 3"):
        tok.decode(Sequences(tokens[None], x.length[None]))


@pytest.mark.bad_input
def test_an_array_of_strings_does_not_say_where_they_end():
    with pytest.raises(
        ValueError, match=r"token ids of one text \[T\], got shape \(2, 3\); pass Seq"
    ):
        Tokenizer(builders.backend(), eos=2).decode(jnp.zeros((2, 3), jnp.int32))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tok: tok.decode([-1]), r"expected token ids in \[0, 52\), got -1; decode ids of"),
        (lambda tok: tok.decode([3, 52]), r"expected token ids in \[0, 52\), got 52"),
        (lambda tok: tok.decode([1.5]), "expected token ids as whole numbers, got float64"),
        (
            lambda tok: tok.decode(Sequences(jnp.array([[1, 52]]), jnp.array([2]))),
            r"expected token ids in \[0, 52\), got 52",
        ),
        (
            lambda tok: tok.encode("ab\ud800"),
            r"a lone surrogate '\\ud800' at position 2, which UTF",
        ),
        (lambda tok: tok.encode(b"ab"), "expected a text, got bytes"),
    ],
)
def test_what_is_neither_ids_nor_text_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(Tokenizer(builders.backend(), eos=2))


def test_padding_rows_stand_for_no_text():
    tok = Tokenizer(builders.backend(), eos=2, vocab_size=60)
    assert tok.vocab_size == 60 and len(tok.token_bytes) == 60
    assert tok.token_bytes[52:] == [None] * 8
    assert tok.decode([59, VOCABULARY["in"]]) == "in"


def test_token_bytes_of_a_byte_level_vocabulary():
    table = Tokenizer(builders.backend(), eos=2).token_bytes
    assert table[:4] == [None] * 4
    assert table[VOCABULARY["Ġthe"]] == b" the" and table[VOCABULARY["Ċ"]] == b"\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    # The byte-level decoder reads "<é>" in its alphabet, in which é is the byte E9.
    [("<turn>", b"<turn>"), ("<é>", b"<\xe9>"), ("a b", b"a b"), ("東", "東".encode())],
)
def test_the_bytes_of_added_tokens_are_what_the_decoder_writes(text: str, expected: bytes):
    backend = builders.backend()
    backend.add_tokens([text])
    tok = Tokenizer(backend, eos=2)
    assert tok.token_bytes[52] == expected
    assert tok.decode([52]) == expected.decode(errors="replace")


PIECES = ["<unk>", "\u2581", "a", "\u2581\u2581", "<0x41>", "\u2581a"]
DECODERS = {
    "llama": (
        [decoders.Replace("\u2581", " "), FALLBACK, decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        [b" ", b"a", b"  ", b"A", b" a"],
    ),
    "gemma": (
        [decoders.Replace("\u2581", " "), FALLBACK, decoders.Fuse()],
        [b" ", b"a", b"  ", b"A", b" a"],
    ),
    "metaspace": ([decoders.Metaspace()], [b" ", b"a", b"  ", b"<0x41>", b" a"]),
    "bytes alone": (
        [FALLBACK],
        ["\u2581".encode(), b"a", "\u2581\u2581".encode(), b"A", "\u2581a".encode()],
    ),
}


def with_decoder(parts: list[Any]) -> Tokenizer:
    vocabulary = {piece: token for token, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(backend, eos=0)


@pytest.mark.parametrize("name", DECODERS)
def test_bytes_of_pieces_are_what_the_decoder_writes(name: str):
    """Two of the kinds have byte pieces, one writes them out, one keeps the spaces' characters."""
    parts, expected = DECODERS[name]
    tok = with_decoder(parts)
    assert tok.token_bytes == [None, *expected]
    testing.check_tokenizer(tok, key=jax.random.key(0))


def test_decoders_that_read_a_token_by_its_neighbours_have_no_bytes():
    for parts in ([decoders.Strip(" ", 1, 0), FALLBACK], [decoders.WordPiece()], [decoders.CTC()]):
        with pytest.raises(ValueError, match="expected a tokenizer with a byte-level or sentence"):
            _ = with_decoder(parts).token_bytes


def test_the_conformance_check_finds_a_wrong_byte():
    tok = Tokenizer(builders.backend(), eos=2)
    testing.check_tokenizer(tok, key=jax.random.key(0))
    tok.token_bytes[VOCABULARY["Ġthe"]] = b"the"
    with pytest.raises(AssertionError, match="the bytes of a string, joined, must be its text"):
        testing.check_tokenizer(tok, key=jax.random.key(0))


def test_the_byte_alphabet_is_that_of_the_tokenizers_package():
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\x00 \x7f", "é\u00ad\u20ac\U0001f389"):
        [(piece, _)] = split.pre_tokenize_str(text)
        assert bytes(byte_alphabet()[character] for character in piece) == text.encode()


def byte_level(tokens: list[str]) -> Tokenizer:
    return Tokenizer(
        builders.backend([*builders.SPECIAL, *tokens, "th", "the", "Ġthe", "in", "Ġin"]), eos=2
    )


EVERY_BYTE = byte_level(sorted(byte_alphabet()))


@given(st.text().filter(lambda text: not any(token in text for token in builders.SPECIAL)))
def test_the_bytes_of_a_texts_tokens_are_the_text(text: str):
    ids = EVERY_BYTE.encode(text)
    assert b"".join(EVERY_BYTE.token_bytes[token] or b"" for token in ids) == text.encode()
    assert EVERY_BYTE.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "lost"),
    [("the cat", ""), ("the € cät €", "€ä"), ("", ""), ("\n\t the", "")],
)
def test_characters_that_the_vocabulary_lacks_are_named(text: str, lost: str, caplog: Any):
    dropping = byte_level([c for c in sorted(byte_alphabet()) if c.isascii() or c in "ĠĊĉ"])
    dropping.encode(text)
    EVERY_BYTE.encode(text)
    assert [record.getMessage() for record in caplog.records] == (
        [f"the vocabulary lacks {lost} of {text!r}: the model does not read them"] if lost else []
    )


def test_characters_that_become_the_unknown_token_are_named(caplog: Any):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert Tokenizer(backend, eos=0).encode("a xyz b") == [1, 0, 2]
    assert "lacks xyz of 'a xyz b'" in caplog.text


def test_a_vocabulary_of_another_kind_has_no_bytes():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(
        ValueError,
        match="expected a tokenizer with a byte-level or sentencepiece decoder .*, got none",
    ):
        _ = Tokenizer(backend, eos=0).token_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"eos": 2, "vocab_size": 51},
            r"at most 51 tokens \(the model's embedding rows\), got 52; use the tokenizer",
        ),
        (
            {"eos": 52},
            r"expected the eos token's id in \[0, 52\), got 52; use the tokenizer and"
            " configuration",
        ),
        ({"eos": -1}, r"expected the eos token's id in \[0, 52\), got -1"),
        (
            {"eos": 2, "bos": 70, "vocab_size": 96},
            r"expected the bos token's id in \[0, 52\), got 70",
        ),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Tokenizer(builders.backend(), **arguments)


def test_chat_uses_the_models_template(directory: Path):
    tok = Tokenizer.from_directory(directory)
    assert (
        tok.decode(tok.chat("in the end"), skip_special_tokens=False) == "user: in the end</s>a: "
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tok.decode(tok.chat(messages, system="the"), skip_special_tokens=False)
    assert text == "system: the</s>user: a</s>assistant: b</s>a: "
    assert tok.chat("a").count(2) == 1, "special tokens in the rendered text are special"


def test_a_template_file_wins_over_the_configuration(directory: Path):
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert Tokenizer.from_directory(directory).chat("in") == [1, VOCABULARY["in"]]


def test_of_several_named_templates_the_default_or_that_for_tools_is_used(directory: Path):
    named = [
        {"name": "tool_use", "template": "x{% if tools %}{% endif %}"},
        {"name": "default", "template": "y{% if tools %}z{% endif %}"},
    ]
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": named}))
    tok = Tokenizer.from_directory(directory)
    assert tok.chat("in") == tok.chat("in", tools=None) == [VOCABULARY["y"]]
    assert tok.chat("in", tools=[{"name": "f"}]) == [VOCABULARY["x"]]
    settings.write_text(json.dumps({"chat_template": named[1:]}))
    tok = Tokenizer.from_directory(directory)
    assert tok.chat("in", tools=[{"name": "f"}]) == [VOCABULARY["y"], VOCABULARY["z"]]


def test_a_base_model_has_no_chat(directory: Path):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"expected a model with a chat template.*use encode\(text\)"
    ):
        Tokenizer.from_directory(directory).chat("in")


def render(source: str, **message: object) -> str:
    return chat_template.render(
        source, [{"role": "user", "content": "hi", **message}], bos_token="", eos_token=""
    )


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ('%s' | attr('__class__')) }}{{ (''|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update(role='x') %}",
    "{% for i in range(100000000) %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/hostname' %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused(source: str):
    with pytest.raises(
        ValueError, match="expected messages that the model's chat template accepts, got"
    ):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ strftime_now.__code__ }}", "{{ ''.__class__ }}", "{{ messages._x }}"]
)
def test_private_attributes_are_not_there(source: str):
    assert render(source) == ""


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ raise_exception('roles must alternate') }}", "{{ messages[0].a.b }}"]
)
def test_templates_that_fail_say_why(source: str):
    with pytest.raises(
        ValueError,
        match=r"chat template accepts, got (TemplateSyntaxError|TemplateError|UndefinedError): ",
    ):
        render(source)


def test_what_templates_may_use():
    assert (
        render("{{ messages[0] | tojson }}", content="é<&>")
        == '{"role": "user", "content": "é<&>"}'
    )
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert (
        render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert render("  {% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"


def write(directory: Path, name: str, **entries: object) -> None:
    (directory / name).write_text(json.dumps(entries))


def test_generation_config_names_eos_first_then_config_then_the_tokenizer(directory: Path):
    write(directory, "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token="<s>")
    assert Tokenizer.from_directory(directory).eos == 2
    write(directory, "generation_config.json", eos_token_id=1)
    assert Tokenizer.from_directory(directory).eos == 1
    (directory / "generation_config.json").unlink()
    write(directory, "config.json")
    assert Tokenizer.from_directory(directory).eos == 3
    write(directory, "tokenizer_config.json")
    with pytest.raises(
        ValueError, match=r"expected an eos token id in generation_config\.json.*add eos_token_id"
    ):
        Tokenizer.from_directory(directory)


def test_of_several_eos_the_one_that_ends_the_turn(directory: Path):
    turns = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    write(directory, "generation_config.json", eos_token_id=[2, 3])
    write(directory, "tokenizer_config.json", chat_template=turns)
    assert Tokenizer.from_directory(directory).eos == 3
    write(directory, "tokenizer_config.json", chat_template=turns.replace("<|im_end|>", ""))
    assert Tokenizer.from_directory(directory).eos == 2
    write(directory, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    assert Tokenizer.from_directory(directory).eos == 2
    write(directory, "tokenizer_config.json")
    assert Tokenizer.from_directory(directory).eos == 2


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_is_refused(directory: Path, content: str):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"tokenizer\.json: expected a tokenizer in JSON, got .*; fetch the file again",
    ):
        Tokenizer.from_directory(directory)


def test_a_missing_tokenizer_is_named(directory: Path):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"expected .*tokenizer\.json, which does not exist; save the tokenizer",
    ):
        Tokenizer.from_directory(directory)


def test_stored_truncation_and_padding_are_not_applied(directory: Path):
    backend = builders.backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert len(Tokenizer.from_directory(directory).encode("abcd")) == 4
