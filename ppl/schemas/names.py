"""Names that an object has twice, which a grammar cannot see."""

from __future__ import annotations

import json
import re

_SYMBOL = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\],]', re.DOTALL)
"""A string, which may be begun only, or a symbol."""


def twice(text: bytes) -> bool:
    """Whether an object in the beginning of a JSON text has a name twice."""
    # Of each object that is open its names, of each array None.
    inside: list[set[str] | None] = []
    named = False
    for match in _SYMBOL.finditer(text):
        symbol = match.group()
        if symbol in b"{[":
            inside.append(set() if symbol == b"{" else None)
            named = False
        elif symbol in b"}]":
            inside.pop()
            named = True
        elif symbol == b",":
            named = False
        elif inside and (names := inside[-1]) is not None and not named:
            if match.end() == len(text) and not _ended(symbol):
                return False
            name = json.loads(symbol)
            if name in names:
                return True
            names.add(name)
            named = True
    return False


def _ended(string: bytes) -> bool:
    """Whether a string has its closing quote."""
    return re.fullmatch(rb'"(?:[^"\\]|\\.)*"', string, re.DOTALL) is not None
