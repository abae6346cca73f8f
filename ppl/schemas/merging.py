"""What two shapes say together, as one."""

from __future__ import annotations

from typing import Any

from .forms import Form, Shape, all_of
from .logic import Logic


def both(logic: Logic, one: Shape, other: Shape) -> Shape | None:
    """The shape of the values of both; None if their patternProperties may overlap."""
    types = one.types & other.types
    if {"integer", "number"} <= one.types | other.types:
        types |= {"integer"}
    lengths = [one.max_length, other.max_length]
    fields = _arrays(logic, one, other) if "array" in types else {}
    if "object" in types:
        objects = _objects(logic, one, other)
        if objects is None:
            return None
        fields |= objects
    return Shape(
        types=types,
        bounds=one.bounds.both(other.bounds),
        multiples=tuple(dict.fromkeys(one.multiples + other.multiples)),
        min_length=max(one.min_length, other.min_length),
        max_length=_least(*lengths),
        patterns=tuple(dict.fromkeys(one.patterns + other.patterns)),
        path=other.path,
        **fields,
    )


def _arrays(logic: Logic, one: Shape, other: Shape) -> dict[str, Any]:
    places = range(max(len(one.first), len(other.first)))
    return {
        "first": tuple(all_of([logic.item(one, i), logic.item(other, i)]) for i in places),
        "rest": _together(one.rest, other.rest),
        "min_items": max(one.min_items, other.min_items),
        "max_items": _least(one.max_items, other.max_items),
        "distinct": one.distinct or other.distinct,
    }


def _objects(logic: Logic, one: Shape, other: Shape) -> dict[str, Any] | None:
    if one.by_pattern and other.by_pattern and one.by_pattern.keys() != other.by_pattern.keys():
        return None
    names = dict.fromkeys([*one.properties, *other.properties])
    keys: dict[str, Form] = {}
    for key in {**one.by_pattern, **other.by_pattern}:
        said = (shape.by_pattern.get(key, shape.additional) for shape in (one, other))
        keys[key] = all_of([form for form in said if form is not None])
    return {
        "properties": {
            n: all_of([logic.property(one, n), logic.property(other, n)]) for n in names
        },
        "by_pattern": keys,
        "additional": _together(one.additional, other.additional),
        "required": tuple(dict.fromkeys(one.required + other.required)),
        "min_properties": max(one.min_properties, other.min_properties),
        "max_properties": _least(one.max_properties, other.max_properties),
    }


def _together(one: Form | None, other: Form | None) -> Form | None:
    said = [form for form in (one, other) if form is not None]
    return all_of(said) if said else None


def _least(one: int | None, other: int | None) -> int | None:
    return min((count for count in (one, other) if count is not None), default=None)
