"""Forms as regular expressions of JSON texts, where they are regular and small.

Between two symbols of an array or object there is one space or none.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from . import patterns, ranges
from .closing import Ready
from .forms import TYPES, AllOf, AnyOf, Form, Ref, Shape, Values

LONGEST = 40_000
"""Characters of an expression; a longer one takes long to determinise."""
LARGEST = 60_000
"""Characters and sets when all counted repetitions are written out."""
SPACE = "[ ]?"
SPECIAL = set(r"\.+*?()|[]{}^$#&-~/ ")


class Beyond(Exception):
    """What no small regular expression says."""


def write(ready: Ready) -> str:
    """The expression of a form.

    Raises:
        Beyond: naming what keeps it from being one.
    """
    found = _Writer(ready.definitions).form(ready.form)
    if (size := expanded(found)) > LARGEST:
        raise Beyond(f"repetitions of {size} characters when written out, of at most {LARGEST}")
    return found


def expanded(expression: str) -> int:
    """The characters of an expression whose counted repetitions are written out; an automaton has
    about a state for every few of them.
    """
    # Of each group that is open its characters so far, and those of the last item in it.
    sizes, last = [0], [0]
    for match in re.finditer(r"\\x\{\w+\}|\\.|\[(?:\\.|[^\]])*\]|\{(\d+)(,?)(\d*)\}|.", expression):
        symbol = match.group()
        if symbol == "(":
            sizes.append(0)
            last.append(0)
        elif symbol == ")":
            size = sizes.pop()
            last.pop()
            sizes[-1], last[-1] = sizes[-1] + size, size
        elif match[1]:
            count = max(int(match[3] or match[1]), 1)
            sizes[-1] += (count - 1) * last[-1]
            last[-1] *= count
        else:
            sizes[-1], last[-1] = sizes[-1] + 1, 1
    return sizes[0]


class _Writer:
    def __init__(self, definitions: dict[str, Form]) -> None:
        self.definitions = definitions
        self.inside: list[str] = []

    def form(self, form: Form) -> str:
        found = self._form(form)
        if len(found) > LONGEST:
            raise Beyond("a schema whose expression is long")
        return found

    def _form(self, form: Form) -> str:
        match form:
            case True:
                raise Beyond("any value, which nests without end")
            case False:
                return ""
            case Values(values):
                return _either([_constant(value) for value in values])
            case AnyOf(forms):
                return _either([self.form(one) for one in forms])
            case Ref(name):
                if name in self.inside:
                    raise Beyond("a schema that refers to itself")
                self.inside.append(name)
                found = self.form(self.definitions[name])
                self.inside.pop()
                return found
            case AllOf():
                raise Beyond("several schemas that must hold together")
            case Shape():
                return _either([self._shape(form, name) for name in TYPES if name in form.types])
        raise TypeError(form)

    def _shape(self, shape: Shape, name: str) -> str:
        if name == "null":
            return "null"
        if name == "boolean":
            return "(?:true|false)"
        if name in ("integer", "number"):
            if shape.multiples:
                raise Beyond("multipleOf")
            return (ranges.integers if name == "integer" else ranges.numbers)(shape.bounds) or ""
        if name == "string":
            return _string(shape)
        return self._array(shape) if name == "array" else self._object(shape)

    def _array(self, shape: Shape) -> str:
        rest = True if shape.rest is None else shape.rest
        most = len(shape.first) if rest is False else shape.max_items
        most = most if shape.max_items is None or most is None else min(most, shape.max_items)
        if most is not None and most < shape.min_items:
            return ""
        first = [self.form(one) for one in shape.first[:most]]
        repeated = most is None or most > len(first)
        item = self.form(rest) if repeated and rest is not False else ""
        if "" in first or (repeated and not item):
            most = first.index("") if "" in first else len(first)
            if most < shape.min_items:
                return ""
            first, repeated = first[:most], False
        least = shape.min_items
        comma, count = f"{SPACE},{SPACE}", len(first)
        tail = ""
        if repeated:
            low, high = max(least - max(count, 1), 0), most and most - max(count, 1)
            tail = _times(f"{comma}{item}", low, high)
        pieces = first or ([item] if repeated else [])
        for place in reversed(range(len(pieces))):
            tail = pieces[place] + tail if place == 0 else f"{comma}{pieces[place]}{tail}"
            if place >= least:
                tail = f"(?:{tail})?"
        return rf"\[{SPACE}{tail}{SPACE}\]" if tail else rf"\[{SPACE}\]"

    def _object(self, shape: Shape) -> str:
        free = self._free(shape)
        counted = shape.min_properties > len(shape.required), shape.max_properties is not None
        if any(counted) and (shape.properties or shape.required):
            raise Beyond("minProperties or maxProperties of named properties")
        if not set(shape.required) <= shape.properties.keys():
            if shape.additional is False:
                return ""
            raise Beyond("required names without a schema")
        pairs = []
        for name, form in shape.properties.items():
            value = self.form(form)
            if not value and name in shape.required:
                return ""
            if value:
                key = _quoted(name) + f"{SPACE}:{SPACE}"
                pairs.append((key + value, name in shape.required))
        if free and shape.max_properties != 0:
            if shape.min_properties > max(len(shape.required), 1):
                raise Beyond("minProperties, which counts different names")
            most = shape.max_properties and shape.max_properties - 1
            more = free + _times(f"{SPACE},{SPACE}{free}", 0, most)
            pairs.append((more, any(counted[:1])))
        elif any(counted[:1]):
            return ""
        found = _ordered(pairs)
        return rf"\{{{SPACE}{found}{SPACE}\}}" if found else rf"\{{{SPACE}\}}"

    def _free(self, shape: Shape) -> str:
        """A pair whose name is not among the properties."""
        rest = True if shape.additional is None else shape.additional
        names = list(shape.properties)
        if not shape.by_pattern:
            value = "" if rest is False else self.form(rest)
            name = patterns.read(patterns.others(names)).text if names else patterns.CHARACTER + "*"
            return f'"{name}"{SPACE}:{SPACE}{value}' if value else ""
        (key, form), *more = shape.by_pattern.items()
        pattern = patterns.read(key)
        if more or rest is not False or any(map(pattern.matches, names)):
            raise Beyond("patternProperties beside others")
        value = self.form(form)
        return f'"{pattern.text}"{SPACE}:{SPACE}{value}' if value else ""


def _ordered(pairs: list[tuple[str, bool]]) -> str:
    """Pairs in their order, of which some may be missing, with commas between."""
    comma = f"{SPACE},{SPACE}"
    needed = next((i for i, (_, required) in enumerate(pairs) if required), None)
    if needed is not None:
        before = "".join(f"(?:{pair}{comma})?" for pair, _ in pairs[:needed])
        return before + pairs[needed][0] + _after(pairs[needed + 1 :])
    found = [pair + _after(pairs[i + 1 :]) for i, (pair, _) in enumerate(pairs)]
    if sum(map(len, found)) > LONGEST:
        raise Beyond("many properties that may all be missing")
    return f"(?:{'|'.join(found)})?" if found else ""


def _after(pairs: list[tuple[str, bool]]) -> str:
    return "".join(
        f"{SPACE},{SPACE}{pair}" if needed else f"(?:{SPACE},{SPACE}{pair})?"
        for pair, needed in pairs
    )


def _string(shape: Shape) -> str:
    least, most = shape.min_length, shape.max_length
    if most is not None and most < least:
        return ""
    bounded = least > 0 or most is not None
    if len(shape.patterns) > 1 or (shape.patterns and bounded):
        raise Beyond("a pattern or format beside other limits")
    if shape.patterns:
        return f'"{patterns.read(shape.patterns[0]).text}"'
    return f'"{_times(patterns.CHARACTER, least, most)}"'


def _times(item: str, least: int, most: int | None) -> str:
    """An expression repeated."""
    if most == 0:
        return ""
    count = "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"
    return f"(?:{item}){count}"


def _either(found: list[str]) -> str:
    some = list(dict.fromkeys(one for one in found if one))
    return some[0] if len(some) == 1 else f"(?:{'|'.join(some)})" if some else ""


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in SPECIAL and c != " " else c for c in text).replace(" ", "[ ]")


def _quoted(text: str) -> str:
    return _literal(json.dumps(text, ensure_ascii=False))


def _constant(value: Any) -> str:
    """The texts of one value."""
    comma = f"{SPACE},{SPACE}"
    if isinstance(value, list):
        items = comma.join(map(_constant, value))
        return rf"\[{SPACE}{items}{SPACE}\]" if items else rf"\[{SPACE}\]"
    if isinstance(value, dict):
        pairs = (f"{_quoted(k)}{SPACE}:{SPACE}{_constant(v)}" for k, v in value.items())
        found = comma.join(pairs)
        return rf"\{{{SPACE}{found}{SPACE}\}}" if found else rf"\{{{SPACE}\}}"
    if isinstance(value, float):
        whole = [str(int(value))] if value == value // 1 else []
        plain = f"{Decimal(repr(value)):f}"
        return _either([_literal(one) for one in (json.dumps(value), plain, *whole)])
    return _literal(json.dumps(value, ensure_ascii=False))
