"""What a JSON schema says, in few words: shapes of values, and their combinations.

A reader (`reading`) makes these of a schema; two writers (`tables`, `grammars`) say them as a
regular expression or to llguidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..showing import shown
from .ranges import Bounds

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ALL = frozenset(TYPES) - {"integer"}
"""Numbers include integers."""


class Refused(ValueError):
    """A schema that is invalid, or that no constraint can enforce."""


def refused(path: str, expected: str, got: str, remedy: str) -> Refused:
    return Refused(f"expected {expected} at {path} of the JSON schema, got {got}; {remedy}")


@shown
@dataclasses.dataclass(frozen=True)
class Shape:
    """Values of some types, each within limits that concern values of its type alone.

    patterns: expressions of ECMA-262, all of which a string has; additional: of the properties that
    are neither named nor match a pattern (None: nothing is said); rest: of items beyond `first`.
    """

    types: frozenset[str] = ALL
    bounds: Bounds = Bounds()
    multiples: tuple[Any, ...] = ()
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()
    min_items: int = 0
    max_items: int | None = None
    first: tuple[Form, ...] = ()
    rest: Form | None = None
    distinct: bool = False
    properties: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    by_pattern: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    additional: Form | None = None
    required: tuple[str, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None
    path: str = dataclasses.field(default="#", compare=False)

    def says(self, name: str) -> list[str]:
        """The fields in which it says something of values of a type."""
        plain = Shape()
        return [f for f in FIELDS.get(name, ()) if getattr(self, f) != getattr(plain, f)]


FIELDS = {
    "integer": ("bounds", "multiples"),
    "number": ("bounds", "multiples"),
    "string": ("min_length", "max_length", "patterns"),
    "array": ("min_items", "max_items", "first", "rest", "distinct"),
    "object": (
        "properties",
        "by_pattern",
        "additional",
        "required",
        "min_properties",
        "max_properties",
    ),
}


@shown
@dataclasses.dataclass(frozen=True)
class Values:
    """The listed values alone."""

    values: tuple[Any, ...]


@shown
@dataclasses.dataclass(frozen=True)
class AllOf:
    forms: tuple[Form, ...]
    closed: bool = False
    """Whether properties that none of the forms names are forbidden (unevaluatedProperties)."""


@shown
@dataclasses.dataclass(frozen=True)
class AnyOf:
    forms: tuple[Form, ...]


@shown
@dataclasses.dataclass(frozen=True)
class OneOf:
    forms: tuple[Form, ...]
    path: str


@shown
@dataclasses.dataclass(frozen=True)
class Not:
    form: Form
    path: str


@shown
@dataclasses.dataclass(frozen=True)
class Ref:
    """The form of this name among the definitions."""

    name: str


Form = bool | Shape | Values | AllOf | AnyOf | OneOf | Not | Ref


def all_of(forms: list[Form], closed: bool = False) -> Form:
    """The forms together; simpler if there are none, or one."""
    forms = [form for form in forms if form is not True]
    if any(form is False for form in forms):
        return False
    if len(forms) == 1 and not closed:
        return forms[0]
    return AllOf(tuple(forms), closed) if forms else True


def any_of(forms: list[Form]) -> Form:
    """One of the forms at least."""
    forms = [form for form in forms if form is not False]
    if any(form is True for form in forms):
        return True
    return forms[0] if len(forms) == 1 else AnyOf(tuple(forms)) if forms else False


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other
