"""The tokenizer's own segmentation in token automata, on every string of a small tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import ppl
from models import tabular
from models.tokenizer import Tokenizer
from ppl import automata, canonical_tables, segmentation
from ppl.canonical import CanonicalAutomaton
from ppl.space import Space
from ppl.testing import check_potential

from .test_automata import FakeTokenizer, increments, strings

HORIZON = 4
# A space belongs to the word behind it, but of two the first stays alone; "ab" is joined before
# "bb"; the two halves of é; a letter that only ends words.
PIECES = ["</s>", *"abĠ1", "Ã", "©", "ab", "bb", "Ã©", "ĠĠ", "Ġa"]
MERGES = [("a", "b"), ("b", "b"), ("Ã", "©"), ("Ġ", "Ġ"), ("Ġ", "a")]


@functools.cache
def small() -> Tokenizer:
    vocabulary = {piece: token for token, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    return Tokenizer(backend, eos=0)


def own(string: tuple[int, ...]) -> bool:
    return small().encode(small().decode(string)) == list(string)


def text_of(string: tuple[int, ...]) -> str | None:
    try:
        return b"".join(small().token_bytes[token] or b"" for token in string).decode()
    except UnicodeDecodeError:
        return None


@functools.cache
def every() -> tuple[list[tuple[int, ...]], list[str | None], np.ndarray]:
    """Every string of up to T tokens, shorter ones first, its text, and whether it is own."""
    tokenizer = FakeTokenizer(tuple(small().token_bytes), 0)
    found = strings(tokenizer, HORIZON)
    return found, [text_of(x) for x in found], np.array([own(x) for x in found])


def bound(automaton: CanonicalAutomaton) -> CanonicalAutomaton:
    return automaton.within(Space(small().vocab_size, 0, HORIZON))


def check_exhaustively(automaton: CanonicalAutomaton, pattern: str | None) -> None:
    """Increments are 0 iff the string matches and is own; lookahead is step and final; a string so
    far is allowed iff it can be completed.
    """
    found, texts, canonical = every()
    compiled = re.compile("(?s:.*)" if pattern is None else pattern)
    good = canonical & [text is not None and bool(compiled.fullmatch(text)) for text in texts]
    assert 0 < good.sum() < canonical.sum() or pattern is None, "nothing is tested"
    base = small().vocab_size - 1
    longest = np.array(found[-(base**HORIZON) :])
    totals, finals, ahead, eos = (
        np.asarray(part) for part in increments(automaton, jnp.array(longest), HORIZON)
    )
    expected = np.where(totals[:-1] == 0, totals[:-1] + ahead, totals[1:])
    np.testing.assert_array_equal(expected, totals[1:], "lookahead is not step")
    np.testing.assert_array_equal(eos, finals[:-1], "EOS column of lookahead is not final")
    counts = [base**length for length in range(HORIZON + 1)]
    by_length = np.split(good, np.cumsum(counts)[:-1])
    completes = np.zeros(len(longest), bool)
    for length in range(HORIZON, -1, -1):
        stride = base ** (HORIZON - length)
        whole = np.repeat(by_length[length], stride)
        np.testing.assert_array_equal(
            totals[length] + finals[length], np.where(whole, 0.0, -np.inf), "not the law"
        )
        completes = np.repeat(completes.reshape(-1, stride).any(1), stride) | whole
        np.testing.assert_array_equal(totals[length] == 0, completes, "a dead end, or too few")


PATTERNS = ["[ab]*", "a?b{1,3}", " *a ?", "(ab|b b)*", "é+", r"[ab1]+ {1,2}[ab1]+", ".b.*"]


def test_every_own_string_and_no_other():
    check_exhaustively(bound(ppl.canonical(small())), None)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_has_its_own_strings_and_no_other(pattern: str):
    automaton = automata.regex(pattern, small())
    assert isinstance(automaton, CanonicalAutomaton) and automaton.segmentation == "own"
    check_exhaustively(bound(automaton), pattern)


def test_without_the_switch_all_segmentations_are_allowed():
    plain = automata.regex("[ab]*", small(), canonical=False)
    assert plain.segmentation == "all, as asked"
    plain = plain.within(Space(small().vocab_size, 0, HORIZON))
    with pytest.raises(AssertionError, match="not the law"):
        check_exhaustively(plain, "[ab]*")  # pyright: ignore[reportArgumentType]


def test_gamma_is_the_plain_automatons_on_own_strings():
    lm = tabular.random_markov(jax.random.key(3), small().vocab_size, eos=0)
    p = lm.given([1], max_tokens=3)
    phi = automata.regex("[ab ]*1?", small())
    plain = automata.regex("[ab ]*1?", small(), canonical=False)
    found = ppl.exact.enumerate_strings(p * phi)
    other = ppl.exact.enumerate_strings(p * plain).log_gamma
    x = found.sequences
    pairs = zip(np.asarray(x.tokens), np.asarray(x.length), strict=True)
    mask = [own(tuple(row[:n].tolist())) for row, n in pairs]
    np.testing.assert_array_equal(found.log_gamma, np.where(mask, other, -np.inf))
    assert 1 < np.isfinite(found.log_gamma).sum() < np.isfinite(other).sum()
    # As a separate factor it is the same law.
    apart = ppl.exact.enumerate_strings(p * plain * ppl.canonical(small()))
    np.testing.assert_array_equal(apart.log_gamma, found.log_gamma)


def faulty(automaton: CanonicalAutomaton, **changes: jax.Array) -> CanonicalAutomaton:
    return bound(dataclasses.replace(automaton, tables=automaton.tables._replace(**changes)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pairs", "not the law"),
        ("cuts", "lookahead is not step"),
        ("last token", "not the law"),
    ],
)
def test_faults_are_found(fault: str, message: str):
    good = automata.regex("a?b{1,3}| *a", small())
    assert isinstance(good, CanonicalAutomaton)
    tables = good.tables
    changes = {
        "pairs": {"beside": jnp.full_like(tables.beside, 0xFFFFFFFF)},
        "cuts": {"rows": tables.rows[::-1]},
        "last token": {"left": jnp.zeros_like(tables.left)},
    }
    with pytest.raises(AssertionError, match=message):
        check_exhaustively(faulty(good, **changes[fault]), "a?b{1,3}| *a")


def test_untrimmed_ends_are_dead(monkeypatch: pytest.MonkeyPatch):
    # The number of tokens to the end without a look at the last token.
    needed = canonical_tables.Ends._before
    monkeypatch.setattr(canonical_tables.Ends, "_before", lambda *args: needed(*args) | 255)
    tables = canonical_tables.build("a?b{1,3}", small().segmentation, 0)
    fault = CanonicalAutomaton(canonical_tables.CanonicalTables(*map(jnp.asarray, tables)), 0)
    with pytest.raises(AssertionError, match="a dead end"):
        check_exhaustively(bound(fault), "a?b{1,3}")


def test_tables_have_room_for_what_they_hold_without_padding(monkeypatch: pytest.MonkeyPatch):
    padded = canonical_tables.build("a?b{1,3}", small().segmentation, 0)
    monkeypatch.setattr(canonical_tables, "bucket", lambda count, least=1: count)
    exact = canonical_tables.build("a?b{1,3}", small().segmentation, 0)
    num_rows, num_classes = exact.transitions.shape
    assert (num_rows, num_classes) == (exact.rows.max() + 1, exact.classes.max() + 1)
    # The last state is dead, and the last row its own.
    own = padded.transitions[: num_rows - 1, :num_classes]
    dead, gone = (len(tables.distance) - 1 for tables in (exact, padded))
    np.testing.assert_array_equal(exact.transitions[:-1], np.where(own == gone, dead, own))
    assert (exact.transitions[-1] == dead).all() and exact.distance[dead] == padded.distance[gone]


@pytest.mark.parametrize("num", [1, 33])
def test_look_ahead_of_any_number_of_particles(num: int):
    automaton = bound(ppl.canonical(small()))
    tokens = jax.random.randint(jax.random.key(1), (2, num), 1, small().vocab_size)
    totals, _, ahead, _ = increments(automaton, tokens.T, 2)
    np.testing.assert_array_equal(
        np.where(totals[:-1] == 0, totals[:-1] + ahead, totals[1:]), totals[1:]
    )


def test_conformance_kit():
    phi = automata.regex("[ab ]*1?", small())
    size = small().vocab_size
    check_potential(phi, vocab_size=size, eos=0, max_tokens=3, key=jax.random.key(0))


def test_a_string_without_any_own_segmentation_is_refused():
    with pytest.raises(ValueError, match="own segmentation matches, got '</s>', which none does"):
        automata.regex("</s>", byte_tokenizer())
    with pytest.raises(ValueError, match="got 'é', which none does"):
        automata.regex("é", byte_tokenizer())


def test_the_empty_string_is_its_own_segmentation():
    automaton = bound(automata.regex("", small()))
    np.testing.assert_array_equal(automaton.lookahead(automaton.init(1))[0, :2], [0, -np.inf])


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """A token for each character of the control token's name."""
    vocabulary = {piece: token for token, piece in enumerate(["</s>", *"</s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    return Tokenizer(backend, eos=0)


def test_tokenizers_without_merges_are_refused_by_name_or_let_be():
    fake = FakeTokenizer((None, b"a", b"b"), 0)
    with pytest.raises(ValueError, match="expected a tokenizer with merges .*got FakeTokenizer"):
        ppl.canonical(fake)
    with pytest.raises(ValueError, match="expected a tokenizer with merges .*got FakeTokenizer"):
        automata.regex("a", fake, canonical=True)
    assert "segmentation='all: FakeTokenizer'" in repr(automata.regex("a", fake))


def test_too_large_an_automaton_falls_back_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canonical_tables, "MOST_STATES", 10)
    pattern = "a b(a|b){9}"
    with pytest.raises(segmentation.Unsegmented, match="at most 10 states, got over"):
        automata.regex(pattern, small(), canonical=True)
    automaton = automata.regex(pattern, small())
    assert re.match("all: over [0-9]+", automaton.segmentation)


def test_wider_models_and_short_horizons():
    automaton = automata.regex("ab ab", small())
    with pytest.raises(ValueError, match="expected max_tokens of at least 3.* got 2"):
        automaton.within(Space(small().vocab_size, 0, 2))
    with pytest.raises(ValueError, match="got one with 12 tokens"):
        automaton.within(Space(5, 0, 9))
    wider = automaton.within(Space(20, 0, 9))
    assert np.isneginf(wider.lookahead(wider.init(2))[:, 12:]).all()
