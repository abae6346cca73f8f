"""Token automata against Python's re on every short string over a small vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl import automata, token_tables
from ppl.automata import TokenAutomaton
from ppl.pytrees import register_dataclass
from ppl.space import Space
from ppl.testing import check_potential, check_tokenizer

HORIZON = 4
FORBIDDEN = float("-inf")


@dataclasses.dataclass(frozen=True)
class FakeTokenizer:
    token_bytes: tuple[bytes | None, ...]
    eos: int

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)


# Tokens that are prefixes of each other ("a", "ab", "aba"), two names of one text ("b"), a
# character whole and split over two tokens, a token that ends inside a character, a digit, a
# control token.
TOKENS = FakeTokenizer(
    (None, b"a", b"b", b"ab", b"aba", b"b", b"\xc3", b"\xa9", b"\xc3\xa9", b"1", None, b"a\xc3"),
    eos=0,
)
PATTERNS = [
    "a|ab", "ab|a", "(a|ab)(b|ba)?", "a*?", "", "(ab)*", "a{2,3}b?", ".", ".*", ".{2}",
    "é+", "[^a]*", "a.b",
    "[é1]{1,3}", r"\d+|a", r"(a|b)*a(a|b)", "aba|abab", "(?i)AB", r"\w{1,2}",
    "^ab$", "b{4}", "(aé|b1)*", "^a|b$",
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
            return (
                None
                if None in parts
                else b"".join(part for part in parts if part is not None).decode()
            )
        except UnicodeDecodeError:
            return None

    return [text(x) for x in strings(tokenizer, horizon)]


@functools.partial(jax.jit, static_argnames="horizon")
def increments(automaton: TokenAutomaton, tokens, horizon: int):
    """Of N strings, after 0..T tokens: the sum of `step`s so far, `final`, and the factor of token
    t by `lookahead`.
    """
    state, total = automaton.init(tokens.shape[0]), jnp.zeros(tokens.shape[0])
    rows, totals, finals, ahead, eos = (
        jnp.arange(tokens.shape[0]),
        [total],
        [automaton.final(state)],
        [],
        [],
    )
    for t in range(horizon):
        lookahead = automaton.lookahead(state)
        eos.append(lookahead[:, automaton.eos])
        ahead.append(lookahead[rows, tokens[:, t]])
        state, factor = automaton.step(state, tokens[:, t])
        total = total + factor
        totals.append(total)
        finals.append(automaton.final(state))
    return jnp.stack(totals), jnp.stack(finals), jnp.stack(ahead), jnp.stack(eos)


def check_exhaustively(
    automaton: TokenAutomaton, pattern: str, tokenizer: FakeTokenizer, horizon: int
) -> None:
    """Increments are 0 iff the string matches; lookahead is step and final; nothing allowed is
    without completion.
    """
    every = strings(tokenizer, horizon)
    longest = every[-((tokenizer.vocab_size - 1) ** horizon) :]
    totals, finals, ahead, eos = (
        np.asarray(part) for part in increments(automaton, jnp.array(longest), horizon)
    )
    expected = np.where(totals[:-1] == 0, totals[:-1] + ahead, totals[1:])
    np.testing.assert_array_equal(expected, totals[1:], "lookahead is not step")
    np.testing.assert_array_equal(eos, finals[:-1], "EOS column of lookahead is not final")

    # Every shorter string is a prefix of one of the longest.
    stride = {len(x): len(longest) // (tokenizer.vocab_size - 1) ** len(x) for x in every}
    compiled = re.compile(pattern)
    matched = [
        text is not None and compiled.fullmatch(text) is not None
        for text in texts(tokenizer, horizon)
    ]
    good = np.split(
        np.array(matched),
        np.cumsum([(tokenizer.vocab_size - 1) ** length for length in range(horizon)]),
    )
    assert any(matched), "nothing is tested by a pattern without matches"
    completes = np.zeros(len(longest), bool)
    for length in range(horizon, -1, -1):
        total = totals[length] + finals[length]
        expected = np.repeat(good[length], stride[length])
        np.testing.assert_array_equal(
            total, np.where(expected, 0.0, -np.inf), "increments are not the match"
        )
        shortened = completes.reshape(-1, stride[length]).any(1)
        completes = np.repeat(shortened | good[length], stride[length])
        np.testing.assert_array_equal(
            totals[length] == 0, completes, "allowed without completion, or the reverse"
        )


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def build(
    pattern: str, tokenizer: FakeTokenizer = TOKENS, horizon: int = HORIZON
) -> TokenAutomaton:
    return automata.regex(pattern, tokenizer).within(
        Space(tokenizer.vocab_size, tokenizer.eos, horizon)
    )


@pytest.mark.parametrize(
    "pattern", [some if i % 3 == 0 else slow(some) for i, some in enumerate(PATTERNS)]
)
def test_agrees_with_re_on_every_string(pattern):
    check_exhaustively(build(pattern), pattern.removeprefix("^").removesuffix("$"), TOKENS, HORIZON)


def test_leftmost_first_automaton_fails_the_check():
    # What a search would build of "a|ab": "a" wins, and "ab" is never reached.
    with pytest.raises(AssertionError, match="increments are not the match"):
        check_exhaustively(build("a"), "a|ab", TOKENS, HORIZON)


def test_forgotten_horizon_fails_the_check():
    fault = dataclasses.replace(build("a{3}[ab]"), space=Space(TOKENS.vocab_size, TOKENS.eos, 100))
    with pytest.raises(AssertionError, match="allowed without completion"):
        check_exhaustively(fault, "a{3}[ab]", TOKENS, 3)


def test_look_ahead_without_eos_fails_the_check():
    @register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Faulty(TokenAutomaton):
        def lookahead(self, state):
            return super().lookahead(state).at[:, self.eos].set(-jnp.inf)

    good = build("a*")
    fault = Faulty(good.classes, good.transitions, good.distance, good.eos, good.space)
    with pytest.raises(AssertionError, match="EOS column"):
        check_exhaustively(fault, "a*", TOKENS, HORIZON)


def test_wrong_class_of_one_token_fails_the_check():
    good = build("[ab]*1?")
    fault = dataclasses.replace(good, classes=good.classes.at[1].set(good.classes[9]))
    with pytest.raises(AssertionError, match="increments are not the match"):
        check_exhaustively(fault, "[ab]*1?", TOKENS, HORIZON)


LEAVES = st.sampled_from(["a", "b", "1", "é", ".", "[ab]", "[^a]", "ab", r"\d", ""])
REGEXES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
            lambda pair: "(?:{}){}".format(*pair)
        ),
    ),
    max_leaves=6,
)


@pytest.mark.slow
@hypothesis.given(REGEXES)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_agrees_with_re_on_generated_patterns(pattern):
    horizon = 3
    if any(text is not None and re.fullmatch(pattern, text) for text in texts(TOKENS, horizon)):
        check_exhaustively(build(pattern, horizon=horizon), pattern, TOKENS, horizon)
    else:
        with pytest.raises(ValueError, match="expected max_tokens of at least"):
            build(pattern, horizon=horizon)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "unclosed group at position 0"),
        ("a)(b", r"unmatched \)"),
        ("[b", "unclosed character class at position 0"),
        ("*", "missing expression at position 0"),
        ("a(?=b)", "look-around at position 1"),
        ("(?<!a)b", "look-around at position 0"),
        (r"(a)\1", "back-reference"),
        (r"\ba", "word boundary"),
        ("(a$|b)c", r"anchor \(\$\) in the middle at position 2"),
        ("(?>a)", "atomic group"),
        (r"a|b[^\s\S]", "can never match"),
        ("z", "which none does"),
    ],
)
def test_unusable_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=f"(?s)expected .*got .*{message}"):
        automata.regex(pattern, TOKENS)


def test_automaton_with_too_many_states_is_refused(monkeypatch):
    monkeypatch.setattr("ppl.byte_dfa.MAX_BYTE_STATES", 100)
    with pytest.raises(ValueError, match="automaton is small, got .* of at most 100"):
        automata.regex("(a|b)*a(a|b){6}", TOKENS)


def test_pattern_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("ppl.byte_dfa.SECONDS", 0.001)  # no Python starts so soon
    with pytest.raises(ValueError, match="automaton is small"):
        automata.regex("a*ba", TOKENS)


def test_oversized_tables_are_refused(monkeypatch):
    monkeypatch.setattr("ppl.token_tables.MAX_ENTRIES", 100)
    with pytest.raises(ValueError, match="at most 100 entries"):
        automata.regex("(ab){20}", TOKENS)


def test_horizon_and_vocabulary_must_fit():
    automaton = automata.regex("a{5}", FakeTokenizer((b"a", None, b"aa"), eos=1))
    with pytest.raises(
        ValueError, match="expected max_tokens of at least 3.* got 2; raise max_tokens"
    ):
        automaton.within(Space(3, 1, 2))
    with pytest.raises(ValueError, match="at most 2 tokens, EOS 1.*got one with 3 tokens"):
        automaton.within(Space(2, 1, 9))
    with pytest.raises(ValueError, match="EOS 0.*EOS 1"):
        automaton.within(Space(3, 0, 9))
    wider = automaton.within(Space(5, 1, 3))
    np.testing.assert_array_equal(
        wider.lookahead(wider.init(1)), [[0, -np.inf, 0, -np.inf, -np.inf]]
    )


def test_it_is_multiplied_under_a_trace():
    """As a target is that a training step makes; too short a horizon is refused there too."""
    automaton, long = ppl.regex("aba", TOKENS), ppl.regex("b1b", TOKENS)
    p = tabular.random_hmm(jax.random.key(0), 3, 12, eos=0)

    def first(prompt: Any, horizon: int) -> Any:
        potential = (p.given(prompt, max_tokens=horizon) * automaton).potential
        return potential.lookahead(potential.init(1))[0]

    known = jax.jit(first, static_argnums=1)(jnp.asarray([1]), 3)
    np.testing.assert_array_equal(np.flatnonzero(known == 0), [1, 3, 4])
    with pytest.raises(ValueError, match="expected max_tokens of at least 3"):
        jax.jit(lambda prompt: p.given(prompt, max_tokens=2) * long)(jnp.asarray([1]))


def test_string_of_exactly_max_tokens_needs_no_eos():
    automaton = build("a{3}", horizon=3)
    state = automaton.init(1)
    for _ in range(3):
        state, factor = automaton.step(state, jnp.array([1]))
        assert factor[0] == 0
    assert automaton.final(state)[0] == 0


@jax.jit
def two_look_aheads(automaton: TokenAutomaton, tokens):
    """After the tokens [T, N]: `lookahead`, and the same by `step` of every token and `final`."""
    num, vocab_size = tokens.shape[1], automaton.classes.shape[0]
    state = automaton.init(num)
    for token in tokens:
        state, _ = automaton.step(state, token)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, vocab_size), state)
    _, factor = automaton.step(repeated, jnp.tile(jnp.arange(vocab_size), num))
    factors = factor.reshape(num, vocab_size).at[:, automaton.eos].set(automaton.final(state))
    return automaton.lookahead(state), factors


@pytest.mark.parametrize("num", [1, 31, 32, 33, 70])
def test_look_ahead_of_any_number_of_particles(num):
    tokens = jax.random.randint(jax.random.key(1), (2, num), 1, TOKENS.vocab_size)
    seen, expected = two_look_aheads(build("(ab|é)*1?"), tokens)
    np.testing.assert_array_equal(seen, expected)
    assert num == 1 or 0 < (np.asarray(expected) == 0).mean() < 0.5


def test_conformance_kit():
    key = jax.random.key(0)
    check_potential(
        automata.regex("(ab|é)*1?", TOKENS), vocab_size=12, eos=0, max_tokens=HORIZON, key=key
    )


def test_second_build_is_cached_and_shared_by_equal_vocabularies(monkeypatch):
    first = automata.regex("ab(ab)*é", TOKENS)
    monkeypatch.setattr("ppl.byte_dfa.compile_regex", None)
    again = automata.regex("ab(ab)*é", FakeTokenizer(TOKENS.token_bytes, TOKENS.eos))
    assert (first.transitions == again.transitions).all()


def test_tables_of_equal_shapes_compile_once():
    traces = []

    @jax.jit
    def ahead(automaton, state):
        traces.append(None)
        return automaton.lookahead(state)

    for pattern in ["ab", "(a|b)*1", "é{2}"]:
        automaton = build(pattern)
        ahead(automaton, automaton.init(3))
    assert len(traces) == 1


def test_built_under_a_trace_does_not_leak():
    def ahead():
        automaton = automata.regex("a1*b", TOKENS)
        automaton = automaton.within(Space(TOKENS.vocab_size, TOKENS.eos, 9))
        return automaton.lookahead(automaton.init(1))

    np.testing.assert_array_equal(jax.jit(ahead)(), ahead())


def test_equal_columns_share_a_class():
    tables = token_tables.build(
        automata.byte_dfa.compile_regex("[^1]*"),
        token_tables.vocabulary(TOKENS.token_bytes, TOKENS.eos),
    )
    a, b, ab = tables.classes[[1, 2, 3]]
    assert (
        a == b == ab
        and tables.classes[9] == token_tables.FORBIDDEN
        and tables.classes[0] == token_tables.EOS_CLASS
    )


@pytest.mark.bad_input
def test_a_language_model_is_no_tokenizer():
    lm: Any = tabular.random_markov(jax.random.key(0), 4, eos=1)
    for build in (
        lambda: ppl.regex("a", lm),
        lambda: ppl.json_schema({"type": "integer"}, lm),
        lambda: ppl.grammar('start: "a"', lm),
        lambda: ppl.Steps.by_text("a", lm),
        lambda: check_tokenizer(lm, key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match="expected a tokenizer .* got LM; pass the second"):
            build()
