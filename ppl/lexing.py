r"""What llguidance's lexer makes of a grammar: ignored text at both ends, and terminals that go on.

The lexer reads the longest match and never goes back.  After "3" in `"I have " NUM "."`, with NUM:
/[0-9]+(\.[0-9]+)?/, a "." is taken to be NUM's own, so "I have 3." is refused.  A terminal T can
read the first character c of what may follow it, after a whole match, if T & (T c .*) has a text;
llguidance decides that itself.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Sequence

import llguidance

from . import grammar_rules
from .grammar_rules import Item, Rules

# Otherwise text that the grammar forces would be allowed in one tokenization only.
_EVERY_TOKENIZATION = '\n%llguidance {"no_forcing": true}\n'
_FIRST = re.compile(r'"(\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\.|[^"\\])')

_CHECKED = {"terminal", "regex"}
END = 256

Symbol = tuple[str, str]
"""A terminal, string or regular expression: its kind, and its name or source."""


def prepared(lark: str) -> str:
    """The grammar as llguidance is to be told it: any tokenization, and ignored text at both ends.

    llguidance refuses what is ignored where the text begins, and is at its end where start is.
    """
    rules = grammar_rules.read(lark)
    if rules.ignored:
        body, around = _fresh(lark, "text"), _fresh(lark, "IGNORED")
        for start, end in sorted(set(rules.starts), reverse=True):
            lark = lark[:start] + body + lark[end:]
        ignored = " | ".join(f"({source})" for source in rules.ignored)
        times = "?" if re.search(r'"ignore_once"\s*:\s*true', lark) else "*"
        lark += f"\nstart: {around}{times} {body} {around}{times}\n{around}: {ignored}"
    return lark + _EVERY_TOKENIZATION


def _fresh(lark: str, name: str) -> str:
    while name in lark:
        name += "_" + name[0]
    return name


@functools.lru_cache(maxsize=32)
def greedy(lark: str) -> tuple[str, ...]:
    """What is to be said of terminals that read on where a string may follow, a text each.

    Where text is ignored, words are parted by it from words, as in most languages; they are not
    spoken of.
    """
    rules = grammar_rules.read(lark)
    found = []
    for symbol, after in _Follows(rules).after.items():
        strings = [text for kind, text in sorted(after) if kind == "string"]
        if rules.ignored:
            strings = [text for text in strings if not re.match(r'"\w', text)]
        if symbol[0] not in _CHECKED or not _reads(rules, symbol, strings):
            continue
        if read := [text for text in strings if _reads(rules, symbol, [text])]:
            found.append(
                f"expected terminals that end where others begin, got {symbol[1]}, which can read"
                f" on where {', '.join(read)} may follow, and then does, so that a text in which it"
                " ends there is refused; make it a rule of its parts, such as"
                ' num: DIGITS ["." DIGITS]'
            )
    return tuple(found)


def _reads(rules: Rules, symbol: Symbol, strings: Sequence[str]) -> bool:
    """Whether after a whole match a terminal can read the first character of one of the strings."""
    firsts = [
        f'{first[0]}"{"i" * text.endswith("i")}'
        for text in strings
        if (first := _FIRST.match(text))
    ]
    if not firsts:
        return False
    whole, following = f"({symbol[1]})", " | ".join(firsts)
    return _Terminal(rules, f"{whole} & ({whole} ({following}) /(?s:.*)/)").has_text


class _Terminal:
    """A terminal over a grammar's own: whether it has a text, and whether the empty one."""

    def __init__(self, rules: Rules, source: str) -> None:
        lines = [f"%import {source}" for source in rules.imports]
        lines += [f"{name}: {body}" for name, body in rules.sources.items() if name.isupper()]
        lark = "\n".join(["start: CHECKED__", f"CHECKED__: {source}", *lines]) + _EVERY_TOKENIZATION
        parser = llguidance.LLMatcher(_bytes(), lark, log_level=0)
        self.has_nothing = not parser.is_error() and parser.is_accepting()
        bits = b"" if parser.is_error() else parser.compute_bitmask()
        self.has_text = any(bits[: END // 8])


class _Bytes:
    """A tokenizer whose tokens are the bytes; 255 is never part of UTF-8."""

    bos_token_id, eos_token_id = None, END
    tokens = [*(bytes([byte]) for byte in range(255)), b"", b"</s>"]

    def __call__(self, text: bytes) -> list[int]:
        return []


@functools.cache
def _bytes() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


class _Follows:
    """What may follow each symbol in the rules that start reaches: their FOLLOW sets.

    first, after: of rules and terminals, which terminals they may begin with, and which may come
    after them; empty: those that may be empty.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.first: dict[Symbol, set[Symbol]] = defaultdict(set)
        self.after: dict[Symbol, set[Symbol]] = defaultdict(set)
        self.empty: set[Symbol] = set()
        names = dict.fromkeys(["start"])
        alternatives = [("start", items) for items in rules.alternatives.get("start", [])]
        for _, items in alternatives:
            for item in items:
                if item.kind == "rule" and item.text not in names:
                    names[item.text] = None
                    more = rules.alternatives.get(item.text, [])
                    alternatives += [(item.text, items) for items in more]
                elif item.kind != "rule":
                    self._add(self._symbol(item))
        size = -1
        while size != (size := self._size()):
            for name, items in alternatives:
                self._grow(name, items)

    def _size(self) -> int:
        return sum(map(len, [self.empty, *self.first.values(), *self.after.values()]))

    def _symbol(self, item: Item) -> Symbol:
        """A terminal that is one string is that string."""
        if item.kind == "terminal":
            parts = [part for items in self.rules.alternatives.get(item.text, []) for part in items]
            if len(parts) == 1 and parts[0] == Item("string", parts[0].text):
                return "string", parts[0].text
        return item.kind, item.text

    def _add(self, symbol: Symbol) -> None:
        self.first[symbol].add(symbol)
        if symbol[0] == "string":
            nothing = symbol[1].startswith('""')
        else:
            nothing = symbol[0] in _CHECKED and _Terminal(self.rules, symbol[1]).has_nothing
        if nothing:
            self.empty.add(symbol)

    def _grow(self, name: str, items: Sequence[Item]) -> None:
        rule = "rule", name
        behind, head, empty = set(self.after[rule]), set[Symbol](), True
        for item in reversed(items):
            symbol = self._symbol(item)
            own = self.first[symbol]
            if name not in self.rules.lazy:
                self.after[symbol] |= behind | (own if item.again else set())
            if item.absent or symbol in self.empty:
                behind, head = behind | own, head | own
            else:
                behind, head, empty = set(own), set(own), False
        self.first[rule] |= head
        if empty:
            self.empty.add(rule)
