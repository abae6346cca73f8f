"""Patterns that Python's re takes: the same language on every short string, or a refusal that says
what and where."""

from __future__ import annotations

import itertools
import re
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest

import ppl
from ppl import byte_dfa, determinise, regex_syntax
from tests.ppl.test_automata import TOKENS

SAME = {
    "(?x) a b  # comment": "ab #c",
    "(?x)a [b]{2} # x\n | \\# # y": "ab#\n",
    "(?x: a # (\n ) b": "ab #",
    "(?i)^yes$": "yesY",
    "^a$|^b$": "ab^$",
    r"\Aa\Z": "abAZ",
    "(?m)^a$": "a\n",
    "(?m)^a\n?b$": "ab\n",
    "(^a|b)c": "abc",
    "a(b$|c)": "abc",
    "(^|a)b($|c)": "abc",
    "(?:^a$)?": "ab",
    "^$": "a",
    "": "a",
    r"\^a\$": "^a$\\",
    r"[$^]*\\$": "^$\\a",
    "[]a]+": "]a[",
    "[^]a]+": "]a[",
    "[-a]+": "-ab",
    "[a-]+": "-ab",
    r"[\]\[]+": "[]a",
    "a{2,3}?b": "ab",
    "a{0}b": "ab",
    "a}b": "ab}",
    "(?:)a||b": "ab",
    "(?P<name>a)b": "ab",
    "(?s).": "a\n",
    ".": "a\n\r",
    "(?s:.)b": "ab\n",
    "(?i:a)b": "abAB",
    "(?i:a(?-i:b))": "abAB",
    r"\d\D": "1a٣",
    r"[\w.]+": "a_.é ",
    r"\s\S": "a \t\x85",
    r"\x41\u00e9": "Aé",
    r"\t\n\r\f\v\a": "\t\n",
    r"\"\'\/\-\ \%": '"',
    r"(a|b)*?a": "ab",
    "((a)(b))+": "ab",
    "[é-ü]|ß": "éëßa",
    r"\{a\}": "{a}",
}
"""Patterns, and the characters of which texts are made."""

REFUSED = {
    r'{"a": \d+}': r"missing expression at position 0, .*write \\\{",
    "a{,3}": r"valid decimal at position 2, .*\{0,n\}",
    "ab{": r"repetition.* at position 2, .*\\\{",
    "(?a)a": "unrecognized flag at position 2, .*ASCII",
    r"a[\b]": r"escape sequence .* at position 2, .*\\x08",
    "(?P<q>a)(?P=q)": "back-reference .* at position 8",
    r"(a)\1": r"back-reference \(\\1\) at position 3",
    r"\[[^[\]]*\]": r"unclosed character class at position 2, .*\\\[",
    r"a/b\/{1,2}[^[]]": "unclosed .* at position 10",
    "é\n{,3}": "valid decimal at position 3",
    "(?=a)a": "look-around at position 0",
    "a(?<!b)": "look-around at position 1",
    "(?>a)": r"atomic group at position 0.*\(\?:",
    "(a)(?(1)b|c)": "a condition .* at position 3",
    "a(?#b)": "a comment .* at position 1",
    "a*+a": "possessive repetition at position 1",
    "ab{1,2}+": "possessive repetition at position 2",
    "a?+": "possessive",
    "a{2, 3}": "spaces in a repetition at position 1",
    r"\bab\b": "word boundary .* at position 0",
    r"a\Bb": "word boundary .* at position 1",
    r"\<a": "word boundary",
    r"a\07": "octal number at position 1",
    r"[\07]": r"at position 1",
    r"\N{DIGIT ONE}": "unrecognized escape .* at position 0",
    r"a\é": "unrecognized escape .* at position 1",
    "a$b": r"anchor \(\$\) in the middle at position 1",
    "a|b^": r"anchor \(\^\) in the middle at position 3",
    "(^a|b)*": r"anchor .* at position 1",
    "a*^b": r"anchor .* at position 2",
    r"(a\Z|b)c": r"anchor \(\\Z\) in the middle at position 2",
    "(?m)a$\n^b": "anchor .* at position 5",
    "\ud800": "surrogate pair at position 0",
}

DOUBTFUL = {
    "[[a]b]": "a \\[ inside of a class.*position 1",
    "[a-c&&[^b]]": "&& in a class.*position 4",
    "[+--c]": "-- in a class.*position 2",
    "[--c]": "-- in a class.*position 1",
    "[a~~c]": "~~ in a class.*position 2",
    "(?x)[a b]": "spaces and comments in a class.*position 6",
    "(?x)a\xa0b": "beyond ASCII.*position 5",
}


def slow(pattern: str, rank: int):
    return pattern if rank % 6 == 0 else pytest.param(pattern, marks=pytest.mark.slow)


def texts(characters: str, longest: int = 4) -> list[str]:
    return [
        "".join(text)
        for length in range(longest + 1)
        for text in itertools.product(dict.fromkeys(characters), repeat=length)
    ]


@pytest.mark.parametrize("pattern", [slow(pattern, i) for i, pattern in enumerate(SAME)])
def test_the_language_is_that_of_re(pattern):
    dfa = byte_dfa.compile_regex(pattern)
    compiled, matched = re.compile(pattern), 0
    for text in texts(SAME[pattern] + "z"):
        state = 0
        for byte in text.encode():
            state = dfa.transitions[state, byte]
        expected = compiled.fullmatch(text) is not None
        assert dfa.accepting[state] == expected, text
        matched += expected
    assert matched or len(pattern) > 9


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_re_takes_is_refused_with_place_and_remedy(pattern):
    with warnings.catch_warnings(action="ignore"):
        re.compile(pattern)
    with pytest.raises(ValueError, match=f"(?s){REFUSED[pattern]}") as error:
        regex_syntax.read(pattern)
        raise regex_syntax.refusal(pattern, determinise.why(pattern)) or AssertionError
    assert isinstance(error.value, regex_syntax.Unusable)
    assert re.search("; .", str(error.value))


@pytest.mark.parametrize("pattern", ["a{,3}", "a$b", "(" * 300 + ")" * 300, r"a{,3}\Z"])
def test_an_error_of_the_house_says_where(pattern):
    with pytest.raises(ValueError, match=r"^expected .*got '.*at position \d+.*; .") as error:
        ppl.regex(pattern, TOKENS)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("pattern", DOUBTFUL)
def test_what_re_reads_in_another_way_is_told(pattern):
    (first, *_) = regex_syntax.read(pattern).doubtful
    assert re.search(DOUBTFUL[pattern], first)


@pytest.mark.parametrize("pattern", ["[[:alpha:]]+", r"[\[\&\&]", r"[\p{L}&&[^a]]", "(?x) a [b]"])
def test_what_has_one_reading_is_not_doubted(pattern):
    assert not regex_syntax.read(pattern).doubtful


def test_doubt_is_a_warning():
    with pytest.warns(UserWarning, match=r"'\[\[a\]b\]' has a \[ inside .* position 1; Python"):
        ppl.regex("[[a]b]", TOKENS)


ANCHORS = ["^", "$", r"\A", r"\Z", "(?:^)", "($)"]
PIECES = st.sampled_from(["a", "b", "\n", ".", "[ab]", "", *ANCHORS, *ANCHORS])
ANCHORED = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "??"])).map(
            lambda pair: "(?:{}){}".format(*pair)
        ),
    ),
    max_leaves=8,
)
SHORT = texts("ab\n", 3)


@hypothesis.given(st.sampled_from(["", "(?m)", "(?s)"]), ANCHORED)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_what_is_left_out_changes_no_language(flags, pattern):
    pattern = flags + pattern
    try:
        body = regex_syntax.read(pattern).body
    except regex_syntax.Unusable:
        assert re.search(r"[$^]|\\A|\\Z", pattern)
        return
    assert not re.search(r"[$^]|\\A|\\Z", body)
    whole, cut = re.compile(pattern), re.compile(body)
    for text in SHORT:
        assert (whole.fullmatch(text) is None) == (cut.fullmatch(text) is None), text
