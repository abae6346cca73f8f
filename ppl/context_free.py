"""Context-free grammars as potentials: Phi(x) = 1 if a grammar derives the text of x, else 0.

llguidance parses on the host: one callback per step for all particles takes the strings so far and
returns which tokens may follow, a bit per token.  A string determines its parser, so the state is
the string and its bits and nothing else: rows may be copied, cut, replayed or run in another order.
The parsers kept on the host are a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llguidance
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32
from llguidance.numpy import fill_next_token_bitmask_par

from . import grammar_rules, lexing, token_tables
from .potential import Trusted, log_mask
from .pytrees import register_dataclass
from .schemas.names import twice
from .space import Space, bound
from .token_automaton import Tokenizer, check_tokenizer, token_bytes
from .token_tables import Vocabulary

log = logging.getLogger(__name__)

WORD = 32
MAX_PARSERS = 2048
"""Parsers kept per grammar, some 20 kB each; a string whose parser is gone is parsed again from its
first token.
"""

_ABOUT_TOKENS = {"stop", "stop_capture", "max_tokens", "temperature"}

GrammarState = tuple[Int[Array, "N T"], Int[Array, " N"], UInt32[Array, "N W"]]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Grammar(Trusted):
    """Phi(x) = 1 if the grammar derives the text of x, else 0.

    State = (tokens so far [N, T], their number [N], which tokens may follow, 32 to a word [N, W]);
    EOS may follow where the string may end.  `first` [W] is the empty string's word row.

    Attributes:
        names_differ: whether a text is also refused that is JSON with a name twice in one object.
        way: "parser", with words on why it is not tables.
        segmentation: "all", since a parser does not know what a tokenizer would have done.
    """

    first: UInt32[Array, " W"]
    lark: str = dataclasses.field(metadata={"static": True})
    vocab: Vocabulary = dataclasses.field(metadata={"static": True})
    names_differ: bool = dataclasses.field(default=False, metadata={"static": True})
    way: str = dataclasses.field(default="parser", metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def segmentation(self) -> str:
        return "all: a grammar reads text, however it is cut into tokens"

    def within(self, space: Space) -> Grammar:
        """This grammar over the strings of a space; ids that the tokenizer lacks are forbidden.

        Raises:
            ValueError: if the tokenizer does not fit the model.
        """
        known = len(self.vocab.lengths) // np.dtype(np.int32).itemsize
        check_tokenizer(space, known, self.vocab.eos)
        return dataclasses.replace(self, space=space)

    def init(self, num: int) -> GrammarState:
        tokens = jnp.full((num, bound(self.space).max_tokens), self.vocab.eos, jnp.int32)
        return (
            tokens,
            jnp.zeros(num, jnp.int32),
            jnp.broadcast_to(self.first, (num, self.first.shape[0])),
        )

    def step(
        self, state: GrammarState, token: Int[Array, " N"]
    ) -> tuple[GrammarState, Float[Array, " N"]]:
        """The factor is a bit of the words that are there already; NaN where the parser gave up
        (see `grammar`).
        """
        tokens, used, words = state
        allowed = _bit(words, token) & (token != self.vocab.eos)
        tokens = jnp.where(jnp.arange(tokens.shape[1]) == used[:, None], token[:, None], tokens)
        used = used + 1
        shapes = (
            jax.ShapeDtypeStruct(words.shape, words.dtype),
            jax.ShapeDtypeStruct(used.shape, jnp.bool_),
        )
        follow = functools.partial(_follow, self.lark, self.vocab, self.names_differ)
        words, gave_up = jax.pure_callback(
            follow, shapes, tokens, used, allowed, vmap_method="broadcast_all"
        )
        return (tokens, used, words), jnp.where(gave_up, jnp.nan, log_mask(allowed))

    def final(self, state: GrammarState) -> Float[Array, " N"]:
        words = state[2]
        return log_mask(_bit(words, jnp.full(words.shape[0], self.vocab.eos, jnp.int32)))

    def lookahead(self, state: GrammarState) -> Float[Array, "N V"]:
        words = state[2]
        bits = (words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
        vocab_size = bound(self.space).vocab_size
        bits = bits.reshape(words.shape[0], -1)[:, :vocab_size]
        # Ids that the model has and the tokenizer lacks.
        bits = jnp.pad(bits, ((0, 0), (0, vocab_size - bits.shape[1])))
        return log_mask(bits != 0)


def grammar(lark: str, tokenizer: Tokenizer) -> Grammar:
    r"""Strings whose text a context-free grammar in Lark syntax derives from its rule `start`.

    Phi(x) = 1 if the concatenated bytes of x's tokens are UTF-8 that the grammar derives, however
    they are cut into tokens, else 0; so must a string that is cut by the horizon.  Tokens without
    bytes (control tokens) never occur.

        value: STRING | "[" [value ("," value)*] "]"

    The syntax is llguidance's: rules are in lower case, terminals in upper case; terminals are
    regular expressions, those of Rust's regex crate.  `%json` puts a JSON schema in a rule's place.
    What `%ignore` names may stand between any two terminals, and at both ends of the text.

    Terminals take the longest match, as a lexer's do, and never go back: of all that may stand at a
    place, whatever can read on does.  With NUM: /[0-9]+(\.[0-9]+)?/ the rule `NUM "."` derives
    "3.5." and not "3.", since after "3" a "." is taken for NUM's.  Where a terminal can read on at
    a string that may follow it there is a warning; rules of its parts have no such trouble:

        num: DIGITS ["." DIGITS]

    The next token's factors are known in advance, but not whether a string can still be completed
    within the horizon: leave room in max_tokens (a horizon that no string of the grammar meets has
    Z = 0).  Where a string is too hard to parse within llguidance's limits, its particle is killed
    and counted as invalid.

    A grammar is built once per vocabulary and process; parsing runs on the host, one callback per
    step for all particles.

    Args:
        lark: the grammar.
        tokenizer: as in `ppl.regex`.

    Raises:
        ValueError: if the grammar is invalid, has a rule that derives no finite string, speaks of
            tokens instead of text (control tokens, stop, max_tokens, temperature), or starts with
            what no token of the tokenizer spells.

    Warns:
        UserWarning: where a terminal can read on at a string that may follow it.
    """
    potential = parsed(lark, tokenizer)
    for doubt in lexing.greedy(lark):
        warnings.warn(doubt, stacklevel=2)
    return potential


def parsed(
    lark: str, tokenizer: Tokenizer, names_differ: bool = False, way: str = "parser"
) -> Grammar:
    """The strings of a grammar, as `grammar` has them."""
    vocab = token_tables.vocabulary(token_bytes(tokenizer), tokenizer.eos)
    first = _parsers(lark, vocab, names_differ).first
    return Grammar(jnp.asarray(first), lark, vocab, names_differ, way)


def _bit(words: UInt32[Array, "N W"], token: Int[Array, " N"]) -> Bool[Array, " N"]:
    """Whether a token's bit is set; False for ids beyond the words."""
    word = jnp.take_along_axis(words, (token // WORD)[:, None], axis=1, mode="fill", fill_value=0)[
        :, 0
    ]
    return (word >> (token % WORD).astype(jnp.uint32)) & 1 != 0


# The host's side.


def _follow(
    lark: str, vocab: Vocabulary, names_differ: bool, tokens: Any, used: Any, needed: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The words [*batch, W] of strings tokens [*batch, T], and where the parser gave up
    [*batch].
    """
    tokens, used, needed = np.asarray(tokens), np.asarray(used), np.asarray(needed)
    parsers = _parsers(lark, vocab, names_differ)
    words, gave_up = parsers.follow(
        tokens.reshape(-1, tokens.shape[-1]), used.ravel(), needed.ravel()
    )
    return words.reshape(*used.shape, -1), gave_up.reshape(used.shape)


class _Parsers:
    """The parsers of one grammar: a pure function from strings to words, with a cache.

    A string's parser is its parent's, copied and advanced by one token, or the empty string's
    advanced by all.
    """

    def __init__(self, lark: str, vocab: Vocabulary, names_differ: bool) -> None:
        self.eos, self.names_differ = vocab.eos, names_differ
        self.tokens = vocab.tokens() if names_differ else []
        tokenizer, lengths = _tokenizer(vocab), np.frombuffer(vocab.lengths, np.int32)
        self.num_words = -(-len(lengths) // WORD)
        # A token of no bytes changes nothing, so it is allowed wherever the string can go on or
        # end.
        self.empty = lengths == 0
        padded = np.pad(self.empty, (0, self.num_words * WORD - len(lengths)))
        self.empty_words = np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)
        self.root = llguidance.LLMatcher(
            tokenizer, lexing.prepared(lark), log_level=0, limits=_limits()
        )
        self.recent: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        self.lock = threading.Lock()
        self.first = np.zeros(self.num_words, np.uint32)
        if not self.root.is_error():
            self.first = self._words([self.root])[0]

    def follow(
        self,
        tokens: Int[np.ndarray, "N T"],
        used: Int[np.ndarray, " N"],
        needed: Bool[np.ndarray, " N"],
    ) -> tuple[UInt32[np.ndarray, "N W"], Bool[np.ndarray, " N"]]:
        """Of every needed row its words (0 elsewhere), and whether its parser gave up; equal
        strings share a parser.
        """
        words, gave_up = np.zeros((len(used), self.num_words), np.uint32), np.zeros(len(used), bool)
        rows = np.flatnonzero(needed)
        # A parser is changed by asking it, and callbacks of several devices or threads may come at
        # the same time.
        with self.lock:
            strings = {row: tokens[row, : used[row]].astype(np.int32) for row in rows.tolist()}
            found: dict[bytes, llguidance.LLMatcher] = {}
            for string in strings.values():
                if (name := string.tobytes()) not in found:
                    found[name] = self._parser(string)
            if found:
                numbers = {name: number for number, name in enumerate(found)}
                which = [numbers[string.tobytes()] for string in strings.values()]
                answers = self._words(list(found.values()))
                if self.names_differ:
                    answers[[twice(self._text(name)) for name in found]] = 0
                words[rows] = answers[which]
                broken = np.array([_gave_up(parser) for parser in found.values()])
                gave_up[rows] = broken[which]
                for number in np.flatnonzero(broken):
                    error = _message(list(found.values())[number])
                    log.warning(
                        "the grammar's parser gave up (%s); its particle gets weight 0", error
                    )
            self._keep(found)
        return words, gave_up

    def _parser(self, string: Int[np.ndarray, " L"]) -> llguidance.LLMatcher:
        known = self.recent.get(string.tobytes())
        if known is not None:
            return known
        parent = self.recent.get(string[:-1].tobytes())
        parser = (parent or self.root).deep_copy()
        rest = string if parent is None else string[-1:]
        parser.consume_tokens(rest[~self.empty[rest]].tolist())
        return parser

    def _text(self, name: bytes) -> bytes:
        return b"".join(self.tokens[token] for token in np.frombuffer(name, np.int32).tolist())

    def _keep(self, found: dict[bytes, llguidance.LLMatcher]) -> None:
        for name, parser in found.items():
            self.recent[name] = parser
            self.recent.move_to_end(name)
        while len(self.recent) > MAX_PARSERS:
            self.recent.popitem(last=False)

    def _words(self, parsers: Sequence[llguidance.LLMatcher]) -> UInt32[np.ndarray, "P W"]:
        words = np.zeros((len(parsers), self.num_words), np.int32)
        fill_next_token_bitmask_par(
            _executor(), [(parser, i) for i, parser in enumerate(parsers)], words
        )
        words = words.view(np.uint32)
        # A parser that is at its end, gave up or found no token answers EOS: only `is_accepting`
        # knows which.
        word, bit = self.eos // WORD, np.uint32(1 << self.eos % WORD)
        words[:, word] &= ~bit
        accepting = np.array([parser.is_accepting() for parser in parsers])
        words[accepting, word] |= bit
        words[words.any(1)] |= self.empty_words
        return words


@functools.lru_cache(maxsize=32)
def _parsers(lark: str, vocab: Vocabulary, names_differ: bool = False) -> _Parsers:
    """The checked grammar; raises as `grammar` does."""
    rules = grammar_rules.read(lark)
    if rules.controls or rules.attributes & _ABOUT_TOKENS:
        what = rules.controls[0] if rules.controls else sorted(rules.attributes & _ABOUT_TOKENS)[0]
        raise ValueError(
            f"expected a grammar of text, got one that speaks of tokens ({what}); write the text"
            " itself, bound lengths"
            " by {m,n} and by max_tokens, and let rules end by what follows them"
        )
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(lark)
    if is_error:
        raise ValueError(
            "expected a grammar in Lark syntax with a rule start, got one that is invalid:"
            f" {messages[0]}"
        )
    if endless := rules.unproductive():
        raise ValueError(
            f"expected rules that derive finite strings, got {', '.join(endless)}, which never end;"
            " give them an"
            " alternative without themselves"
        )
    parsers = _Parsers(lark, vocab, names_differ)
    if not parsers.first.any():
        raise ValueError(
            "expected a grammar that some string of this tokenizer's tokens starts, got one that"
            " none does:"
            f" {_message(parsers.root)}; check its terminals against the tokenizer's bytes"
        )
    return parsers


class _Bytes:
    """What llguidance asks of a tokenizer; tokens without bytes are unknown to it."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos

    def __call__(self, text: bytes) -> list[int]:
        """Never asked: text is not turned into tokens where no token is forced."""
        return []


@functools.lru_cache(maxsize=8)
def _tokenizer(vocab: Vocabulary) -> llguidance.LLTokenizer:
    tokens = vocab.tokens()
    # 0xff, which is never part of UTF-8, marks control tokens in llguidance.
    tokens = [b"" if token.startswith(b"\xff") else token for token in tokens]
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(tokens, vocab.eos)))


@functools.cache
def _executor() -> llguidance.LLExecutor:
    return llguidance.LLExecutor()


def _limits() -> Any:
    return llguidance.LLParserLimits(verbose_errors=False)


def _gave_up(parser: llguidance.LLMatcher) -> bool:
    """Whether a limit was hit; a text that no token of this vocabulary goes on is an error to
    llguidance as well.
    """
    return parser.is_error() and _message(parser) != "NoExtensionBias"


def _message(parser: llguidance.LLMatcher) -> str:
    """llguidance's error without its stack."""
    return parser.get_error().partition("\n<")[0]
