"""Token automata against Python's re on every short string over a small vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from ppl import automata, token_tables
from ppl.automata import TokenAutomaton

HORIZON = 4
FORBIDDEN = float("-inf")


@dataclasses.dataclass(frozen=True)
class FakeTokenizer:
    token_bytes: tuple[bytes | None, ...]
    eos: int

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)


# Tokens that are prefixes of each other ("a", "ab", "aba"), two names of one text ("b"), a character whole and split over
# two tokens, a token that ends inside a character, a digit, a control token.
TOKENS = FakeTokenizer((None, b"a", b"b", b"ab", b"aba", b"b", b"\xc3", b"\xa9", b"\xc3\xa9", b"1", None, b"a\xc3"), eos=0)
PATTERNS = [
    "a|ab", "ab|a", "(a|ab)(b|ba)?", "a*?", "", "(ab)*", "a{2,3}b?", ".", ".*", ".{2}", "é+", "[^a]*", "a.b",
    "[é1]{1,3}", r"\d+|a", r"(a|b)*a(a|b)", "aba|abab", "(?i)AB", r"\w{1,2}", "^ab$", "b{4}", "(aé|b1)*", "^a|b$",
    "[a-z]+", "a*b*a*", "[]a]*", r"[^\]b]+",
]  # fmt: skip


@functools.cache
def strings(tokenizer: FakeTokenizer, horizon: int) -> list[tuple[int, ...]]:
    """Every string without EOS, shorter ones first."""
    ids = [token for token in range(tokenizer.vocab_size) if token != tokenizer.eos]
    return [x for length in range(horizon + 1) for x in itertools.product(ids, repeat=length)]


@functools.cache
def texts(tokenizer: FakeTokenizer, horizon: int) -> list[str | None]:
    """Their texts; None where a control token or broken UTF-8 leaves none."""

    def text(string: tuple[int, ...]) -> str | None:
        parts = [tokenizer.token_bytes[token] for token in string]
        try:
            return None if None in parts else b"".join(part for part in parts if part is not None).decode()
        except UnicodeDecodeError:
            return None

    return [text(x) for x in strings(tokenizer, horizon)]


@functools.partial(jax.jit, static_argnames="horizon")
def increments(automaton: TokenAutomaton, tokens, horizon: int):
    """Of N strings, after 0..T tokens: the sum of `step`s so far, `final`, and the factor of token t by `lookahead`."""
    state, total = automaton.init(tokens.shape[0]), jnp.zeros(tokens.shape[0])
    rows, totals, finals, ahead, eos = jnp.arange(tokens.shape[0]), [total], [automaton.final(state)], [], []
    for t in range(horizon):
        lookahead = automaton.lookahead(state)
        eos.append(lookahead[:, automaton.eos])
        ahead.append(lookahead[rows, tokens[:, t]])
        state, factor = automaton.step(state, tokens[:, t])
        total = total + factor
        totals.append(total)
        finals.append(automaton.final(state))
    return jnp.stack(totals), jnp.stack(finals), jnp.stack(ahead), jnp.stack(eos)


def check_exhaustively(automaton: TokenAutomaton, pattern: str, tokenizer: FakeTokenizer, horizon: int) -> None:
    """Increments are 0 iff the string matches; lookahead is step and final; nothing allowed is without completion."""
    every = strings(tokenizer, horizon)
    longest = every[-((tokenizer.vocab_size - 1) ** horizon) :]
    totals, finals, ahead, eos = (np.asarray(part) for part in increments(automaton, jnp.array(longest), horizon))
    np.testing.assert_array_equal(np.where(totals[:-1] == 0, totals[:-1] + ahead, totals[1:]), totals[1:], "lookahead is not step")
    np.testing.assert_array_equal(eos, finals[:-1], "EOS column of lookahead is not final")

    # Every shorter string is a prefix of one of the longest.
    stride = {len(x): len(longest) // (tokenizer.vocab_size - 1) ** len(x) for x in every}
    compiled = re.compile(pattern)
    matched = [text is not None and compiled.fullmatch(text) is not None for text in texts(tokenizer, horizon)]
    good = np.split(np.array(matched), np.cumsum([(tokenizer.vocab_size - 1) ** length for length in range(horizon)]))
    assert any(matched), "nothing is tested by a pattern without matches"
    completes = np.zeros(len(longest), bool)
    for length in range(horizon, -1, -1):
        total = totals[length] + finals[length]
        expected = np.repeat(good[length], stride[length])
        np.testing.assert_array_equal(total, np.where(expected, 0.0, -np.inf), "increments are not the match")
        shortened = completes.reshape(-1, stride[length]).any(1)
        completes = np.repeat(shortened | good[length], stride[length])
        np.testing.assert_array_equal(totals[length] == 0, completes, "allowed without completion, or the reverse")


def build(pattern: str, tokenizer: FakeTokenizer = TOKENS, horizon: int = HORIZON) -> TokenAutomaton:
    return automata.regex(pattern, tokenizer).within(horizon, tokenizer.vocab_size, tokenizer.eos)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_re_on_every_string(pattern):
    check_exhaustively(build(pattern), pattern.removeprefix("^").removesuffix("$"), TOKENS, HORIZON)
