"""The table of delimiters against a search in the bytes of every short string."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ppl import delimiters

# Tokens inside of, across and around the delimiters; one without bytes, and one that is empty.
TOKENS = (None, b"a", b"b", b"ab", b"ba", b"aab", b"bb", b"")


def ends_by_search(found: list[bytes], parts: list[bytes | None]) -> list[bool]:
    """Whether some delimiter is completed inside of each part."""
    text, ends = b"", []
    for part in parts:
        before = len(text)
        text = text + part if part else b""
        places = range(before + 1, len(text) + 1) if part else ()
        ends.append(any(text[:place].endswith(d) for place in places for d in found))
    return ends


@pytest.mark.parametrize("found", [[b"ab"], [b"aba", b"bb"], [b"aab", b"ab", b"b"], [b"abab"]])
def test_the_table_finds_what_a_search_finds(found: list[bytes]):
    table = delimiters.table(found, TOKENS)
    for string in itertools.product(range(len(TOKENS)), repeat=4):
        state, ends = 0, []
        for token in string:
            state, end = divmod(int(table[state, token]), 2)
            ends.append(bool(end))
        assert ends == ends_by_search(found, [TOKENS[token] for token in string]), string


def test_a_delimiter_that_no_tokens_write_never_ends():
    for text, possible in ((b"ab", True), (b"bab", True), (b"c", False), (b"abc", False)):
        assert delimiters.ever_ends(delimiters.table([text], TOKENS)) == possible
    only = (None, b"aa")
    assert delimiters.ever_ends(delimiters.table([b"aaa"], only))
    assert not delimiters.ever_ends(np.zeros((1, 3), np.int32))
