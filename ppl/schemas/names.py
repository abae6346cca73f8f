"""Names that an object has twice, which a grammar cannot see."""

from __future__ import annotations

import json
import re

_SYMBOL = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],]', re.DOTALL)


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
            name = json.loads(symbol)
            if name in names:
                return True
            names.add(name)
            named = True
    return False
