r"""Regular expressions of JSON Schema, which are those of ECMA-262, in the syntax of Rust's regex.

A schema's `pattern` is searched for, not matched; \d and \w are ASCII; "." is all but the four line
terminators.  A pattern is read into sets of characters and groups, and written for whole strings:
`value` for the string itself, `text` for what stands between the quotes of its JSON text, and
`python` for Python's re.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

from ..showing import shown

LAST = 0x10FFFF
SPECIAL = [0x22, 0x5C, *range(0x20)]
"""What stands in a JSON string only as an escape."""
SHORT = {0x22: '"', 0x5C: r"\\", 8: "b", 12: "f", 10: "n", 13: "r", 9: "t"}
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u00[01][0-9a-fA-F]))'
"""A character in the text of a JSON string."""

Ranges = tuple[tuple[int, int], ...]
"""A set of characters: code points from, to, in increasing order."""
Write = Callable[[Ranges], str]


class Unreadable(ValueError):
    """A pattern that is no regular expression of ECMA-262, or none of an automaton; its text says
    what and where.
    """


@shown
@dataclasses.dataclass(frozen=True)
class Item:
    """A set, an anchor ("^" or "$") or the alternatives of a group, and how often."""

    what: Ranges | str | Group
    times: str = ""


@shown
@dataclasses.dataclass(frozen=True)
class Group:
    alternatives: tuple[tuple[Item, ...], ...]


@shown
@dataclasses.dataclass(frozen=True)
class Pattern:
    """A schema's pattern, written for whole strings."""

    group: Group

    @functools.cached_property
    def value(self) -> str:
        return _written(self.group, _class)

    @functools.cached_property
    def text(self) -> str:
        return _written(self.group, _class_of_text)

    def matches(self, string: str) -> bool:
        return re.fullmatch(self._python, string) is not None

    @functools.cached_property
    def _python(self) -> re.Pattern[str]:
        return re.compile(_written(self.group, _class_of_python))


@functools.lru_cache(maxsize=1024)
def read(source: str) -> Pattern:
    """The pattern of an ECMA-262 regular expression.

    Raises:
        Unreadable: for look-around, back-references, word boundaries, flags, anchors inside, or
            what is no regular expression.
    """
    reader = _Reader(source)
    group = _unanchored(_unanchored(reader.group(), "^"), "$")
    if reader.at < len(source):
        raise reader.error("an unmatched )")
    if place := _anchor(group):
        raise Unreadable(f"an anchor ({place}) in the middle of {source!r}")
    return Pattern(group)


def literal(text: str) -> str:
    """An ECMA-262 expression of one text."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\u{{{ord(c):x}}}" for c in text)


def others(names: list[str]) -> str:
    """An ECMA-262 expression of all strings but `names`, for whole strings."""
    return f"^{_others(sorted(set(names)))}$"


def _others(names: list[str]) -> str:
    heads = sorted({name[0] for name in names if name})
    alternatives = [] if "" in names else [""]
    if heads:
        alternatives.append(f"[^{''.join(map(literal, heads))}][^]*")
        for head in heads:
            rest = _others([name[1:] for name in names if name[:1] == head])
            alternatives.append(literal(head) + rest)
    else:
        alternatives.append("[^]+")
    return f"(?:{'|'.join(alternatives)})"


# Sets of characters.


def union(*sets: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in sets for pair in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for low, high in ranges:
        if low > start:
            found.append((start, low - 1))
        start = high + 1
    return tuple(found) + (((start, LAST),) if start <= LAST else ())


def _chars(text: str) -> Ranges:
    return union(tuple((ord(c), ord(c)) for c in text))


ANY: Ranges = ((0, LAST),)
DIGIT: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE = union(
    _chars("\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"), ((0x2000, 0x200A),)
)
CLASSES = {
    "d": DIGIT,
    "w": WORD,
    "s": SPACE,
    "D": complement(DIGIT),
    "W": complement(WORD),
    "S": complement(SPACE),
}
DOT = complement(_chars("\n\r\u2028\u2029"))
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}


def _class(ranges: Ranges, point: Callable[[int], str] | None = None) -> str:
    point = point or (lambda code: f"\\x{{{code:x}}}")
    written = [_pair(low, high, point) for low, high in _without_surrogates(ranges)]
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return written[0]
    return f"[{''.join(written)}]"


def _class_of_python(ranges: Ranges) -> str:
    return _class(ranges, lambda code: f"\\U{code:08x}")


def _pair(low: int, high: int, point: Callable[[int], str]) -> str:
    ends = [chr(c) if chr(c).isalnum() and c < 128 else point(c) for c in (low, high)]
    return ends[0] if low == high else "-".join(ends)


def _without_surrogates(ranges: Ranges) -> Ranges:
    apart = []
    for low, high in ranges:
        parts = (low, min(high, 0xD7FF)), (max(low, 0xE000), high)
        apart += [part for part in parts if part[0] <= part[1]]
    return tuple(apart)


def _class_of_text(ranges: Ranges) -> str:
    plain = complement(union(complement(ranges), _chars("".join(map(chr, SPECIAL)))))
    escaped = [code for code in SPECIAL if _has(ranges, code)]
    if not escaped and not _has(ranges, 0x2F):
        return _class(ranges)
    found = [_class(plain)] if plain else []
    if ranges == ANY:
        return CHARACTER
    if len(escaped) == len(SPECIAL):
        found.append(r'\\(?:["\\bfnrt]|u00[01][0-9a-fA-F])')
    else:
        found += [_escape(code) for code in escaped]
    found += [r"\\/"] if _has(ranges, 0x2F) else []
    return f"(?:{'|'.join(found)})"


def _escape(code: int) -> str:
    if code in SHORT:
        return "\\\\" + SHORT[code]
    digit = f"{code & 15:x}"
    return rf"\\u00{code >> 4}[{digit}{digit.upper()}]"


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


# Writing.


def _written(group: Group, write: Write) -> str:
    alternatives = [
        "".join(_item(item, write) for item in alternative) for alternative in group.alternatives
    ]
    return f"(?:{'|'.join(alternatives)})"


def _item(item: Item, write: Write) -> str:
    what = item.what
    assert not isinstance(what, str)
    return (_written(what, write) if isinstance(what, Group) else write(what)) + item.times


def _unanchored(group: Group, anchor: str) -> Group:
    """The group with what may stand before it (anchor "^") or after it ("$") written out."""
    return Group(tuple(_edge(alternative, anchor) for alternative in group.alternatives))


def _edge(items: tuple[Item, ...], anchor: str) -> tuple[Item, ...]:
    place = 0 if anchor == "^" else -1
    edge = items[place] if items else None
    rest = items[1:] if place == 0 else items[:-1]
    if edge and edge.what == anchor and not edge.times:
        while rest and rest[place] == edge:
            rest = rest[1:] if place == 0 else rest[:-1]
        return rest
    inner = edge.what if edge and not edge.times else None
    if isinstance(inner, Group) and _edges(inner, anchor):
        new, old = Item(_unanchored(inner, anchor)), rest
    else:
        new, old = Item(ANY, "*"), items
    return (new, *old) if place == 0 else (*old, new)


def _edges(group: Group, anchor: str) -> bool:
    """Whether an alternative has the anchor at its edge."""
    edges = [items[0 if anchor == "^" else -1] for items in group.alternatives if items]
    return any(
        edge.what == anchor or (isinstance(edge.what, Group) and _edges(edge.what, anchor))
        for edge in edges
    )


def _anchor(group: Group) -> str | None:
    """An anchor that is left."""
    for item in (item for items in group.alternatives for item in items):
        what = item.what
        left = what if isinstance(what, str) else None
        left = _anchor(what) if isinstance(what, Group) else left
        if left:
            return left
    return None


# Reading.


class _Reader:
    def __init__(self, source: str) -> None:
        self.source, self.at = source, 0

    def error(self, what: str) -> Unreadable:
        return Unreadable(f"{what} at position {self.at} of {self.source!r}")

    def peek(self, text: str) -> bool:
        return self.source.startswith(text, self.at)

    def match(self, pattern: str) -> re.Match[str] | None:
        found = re.compile(pattern).match(self.source, self.at)
        self.at = found.end() if found else self.at
        return found

    def group(self) -> Group:
        alternatives: list[list[Item]] = [[]]
        while self.at < len(self.source) and not self.peek(")"):
            if self.match(r"\|"):
                alternatives.append([])
            else:
                alternatives[-1].append(self.item())
        return Group(tuple(map(tuple, alternatives)))

    def item(self) -> Item:
        start = self.at
        if self.match(r"[*+?]|\{\d+(,\d*)?\}"):
            self.at = start
            raise self.error("nothing to repeat")
        what = self.atom()
        times = self.match(r"([*+?]|\{\d+(?:,\d*)?\})\??")
        if times and isinstance(what, str):
            raise self.error("a repeated anchor")
        return Item(what, times[1] if times else "")

    def atom(self) -> Ranges | str | Group:
        char = self.source[self.at]
        if char == "(":
            return self.parenthesis()
        if char == "[":
            return self.bracket()
        if char == "\\":
            return self.escape()
        self.at += 1
        return char if char in "^$" else DOT if char == "." else _chars(char)

    def parenthesis(self) -> Group:
        if self.match(r"\(\?(?:<?[=!])"):
            raise self.error("look-around")
        if not self.match(r"\(\?:|\(\?<[A-Za-z_$][\w$]*>|\((?!\?)"):
            raise self.error("a group that ECMA-262 does not have, (?...")
        group = self.group()
        if not self.match(r"\)"):
            raise self.error("an unclosed (")
        return group

    def bracket(self) -> Ranges:
        negated = self.match(r"\[\^?")[0] == "[^"  # pyright: ignore[reportOptionalSubscript]
        found: list[Ranges] = []
        while not self.match(r"\]"):
            if self.at >= len(self.source):
                raise self.error("an unclosed [")
            low = self.member()
            if self.match(r"-(?!\])"):
                high = self.member()
                if low[0][0] != low[-1][1] or high[0][0] != high[-1][1] or low > high:
                    raise self.error("a range that is none")
                low = ((low[0][0], high[0][0]),)
            found.append(low)
        ranges = complement(union(*found)) if negated else union(*found)
        if not ranges:
            raise self.error("a class without members")
        return ranges

    def member(self) -> Ranges:
        if self.at >= len(self.source):
            raise self.error("an unclosed [")
        if self.match(r"\\b"):
            return ((8, 8),)
        if self.peek("\\"):
            return self.escape()
        self.at += 1
        return _chars(self.source[self.at - 1])

    def escape(self) -> Ranges:
        pair = self.match(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
        if pair:
            high, low = (int(half, 16) for half in pair.groups())
            code = 0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00
            return ((code, code),)
        number = self.match(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]+)\})")
        if number:
            code = int(number[number.lastindex or 0], 16)
            if code > LAST or 0xD800 <= code < 0xE000:
                raise self.error("a number of no character")
            return ((code, code),)
        if control := self.match(r"\\c([A-Za-z])"):
            return _chars(chr(ord(control[1]) % 32))
        if known := self.match(r"\\([dwsDWS])"):
            return CLASSES[known[1]]
        if known := self.match(r"\\(?:([tnvfr])|(0)(?!\d))"):
            return _chars(chr(CONTROLS[known[1] or known[2]]))
        if itself := self.match(r"\\([^A-Za-z0-9])"):
            return _chars(itself[1])
        what = self.source[self.at : self.at + 2]
        names = {"\\b": "a word boundary", "\\B": "a word boundary"}
        known_by = "a back-reference" if what[1:].isdigit() else "an escape ECMA-262 does not have"
        raise self.error(f"{names.get(what, known_by)} ({what})")
