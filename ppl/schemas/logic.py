"""Values of forms: whether one is of a form, whether two forms share any, and the form of all
others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from ..showing import shown
from . import patterns
from .forms import (
    ALL,
    AllOf,
    AnyOf,
    Form,
    Not,
    OneOf,
    Ref,
    Shape,
    Values,
    all_of,
    any_of,
    refused,
    same,
)
from .ranges import Bounds

DEEPEST = 40


class Unknown(Exception):
    """No form says it."""


def kind(value: Any) -> str:
    """The type of a JSON value; of an integer "integer"."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "number"
    return {str: "string", list: "array", dict: "object"}[type(value)]


@shown
@dataclasses.dataclass(frozen=True)
class Logic:
    """What follows from forms, whose references are among `definitions`."""

    definitions: Mapping[str, Form]

    # Whether a value is of a form.

    def holds(self, form: Form, value: Any) -> bool:
        match form:
            case bool():
                return form
            case Values(values):
                return any(same(value, one) for one in values)
            case AllOf(forms):
                return all(self.holds(one, value) for one in forms)
            case AnyOf(forms):
                return any(self.holds(one, value) for one in forms)
            case OneOf(forms):
                return sum(self.holds(one, value) for one in forms) == 1
            case Not(inner):
                return not self.holds(inner, value)
            case Ref(name):
                return self.holds(self.definitions[name], value)
            case Shape():
                return self._fits(form, value)

    def _fits(self, shape: Shape, value: Any) -> bool:
        name = kind(value)
        if name not in shape.types and not (name == "integer" and "number" in shape.types):
            return False
        if name in ("integer", "number"):
            number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
            steps = all(number % step == 0 for step in shape.multiples)
            return steps and shape.bounds.holds(number)
        if name == "string":
            most = len(value) if shape.max_length is None else shape.max_length
            matched = all(patterns.read(one).matches(value) for one in shape.patterns)
            return shape.min_length <= len(value) <= most and matched
        if name == "array":
            most = len(value) if shape.max_items is None else shape.max_items
            twins = any(same(a, b) for i, a in enumerate(value) for b in value[:i])
            return (
                shape.min_items <= len(value) <= most
                and not (shape.distinct and twins)
                and all(self.holds(self.item(shape, i), one) for i, one in enumerate(value))
            )
        if name == "object":
            most = len(value) if shape.max_properties is None else shape.max_properties
            return (
                shape.min_properties <= len(value) <= most
                and all(one in value for one in shape.required)
                and all(self.holds(self.property(shape, key), one) for key, one in value.items())
            )
        return True

    def item(self, shape: Shape, place: int) -> Form:
        rest = True if shape.rest is None else shape.rest
        return shape.first[place] if place < len(shape.first) else rest

    def property(self, shape: Shape, name: str) -> Form:
        """What a shape says of the property of a name."""
        found = [f for key, f in shape.by_pattern.items() if patterns.read(key).matches(name)]
        found += [shape.properties[name]] if name in shape.properties else []
        rest = True if shape.additional is None else shape.additional
        return all_of(found) if found else rest

    # Whether two forms share no value.

    def apart(self, one: Form, other: Form, depth: int = 0) -> bool:
        """Whether it is certain that no value is of both."""
        if depth > DEEPEST:
            return False
        again = depth + 1
        for a, b in ((one, other), (other, one)):
            match a:
                case False:
                    return True
                case Values(values):
                    return not any(self.holds(b, value) for value in values)
        for a, b in ((one, other), (other, one)):
            match a:
                case Ref(name):
                    return self.apart(self.definitions[name], b, again)
                case AnyOf(forms) | OneOf(forms):
                    return all(self.apart(f, b, again) for f in forms)
                case AllOf(forms):
                    return any(self.apart(f, b, again) for f in forms)
                case Not(inner):
                    return inner == b
        if isinstance(one, Shape) and isinstance(other, Shape):
            return all(self._apart(one, other, name, again) for name in _common(one, other))
        return False

    def _apart(self, one: Shape, other: Shape, name: str, depth: int) -> bool:
        if name in ("integer", "number"):
            return one.bounds.both(other.bounds).empty()
        if name == "string":
            return _beyond(one.min_length, other.max_length, other.min_length, one.max_length)
        if name == "array":
            least = max(one.min_items, other.min_items)
            return _beyond(one.min_items, other.max_items, other.min_items, one.max_items) or any(
                self.apart(self.item(one, i), self.item(other, i), depth) for i in range(least)
            )
        if name == "object":
            return _beyond(
                one.min_properties, other.max_properties, other.min_properties, one.max_properties
            ) or any(
                self.apart(self.property(one, key), self.property(other, key), depth)
                for key in {*one.required, *other.required}
            )
        return False

    # The form of all other values.

    def negated(self, form: Form, depth: int = 0) -> Form:
        """All values that are not of a form.

        Raises:
            Unknown: if no form is known.
        """
        if depth > DEEPEST:
            raise Unknown("a schema that refers to itself")
        match form:
            case bool():
                return not form
            case Values(values):
                return all_of([self._not_value(value) for value in values])
            case AllOf(forms):
                return any_of([self.negated(one, depth + 1) for one in forms])
            case AnyOf(forms):
                return all_of([self.negated(one, depth + 1) for one in forms])
            case Not(inner):
                return inner
            case Ref(name):
                return self.negated(self.definitions[name], depth + 1)
            case Shape():
                return self._not_shape(form, depth + 1)
            case OneOf():
                raise Unknown("oneOf")

    def _not_value(self, value: Any) -> Form:
        name = kind(value)
        if name in ("integer", "number"):
            number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
            sides = Bounds(high=number, below=True), Bounds(low=number, above=True)
            rest = Shape(types=ALL - {"number"})
            return AnyOf((rest, *(Shape(types=frozenset(["number"]), bounds=b) for b in sides)))
        if name == "string":
            strings = Shape(types=frozenset(["string"]), patterns=(patterns.others([value]),))
            return AnyOf((Shape(types=ALL - {"string"}), strings))
        if name == "boolean":
            return AnyOf((Shape(types=ALL - {"boolean"}), Values((not value,))))
        if name == "null":
            return Shape(types=ALL - {"null"})
        if not value:
            return Shape(min_items=1) if name == "array" else Shape(min_properties=1)
        raise Unknown(f"a constant {name}")

    def _not_shape(self, shape: Shape, depth: int) -> Form:
        """Of other types, or beyond one of its limits."""
        if "integer" in shape.types:
            raise Unknown("integers")
        found: list[Form] = []
        if rest := ALL - shape.types:
            found.append(Shape(types=rest))
        for name in sorted(shape.types):
            for limit in self._limits(shape, name, depth):
                alone = frozenset([name])
                found.append(all_of([Shape(types=alone), limit]))
        return any_of(found)

    def _limits(self, shape: Shape, name: str, depth: int) -> Iterator[Form]:
        """For each limit on values of a type, the values beyond it."""
        unsayable = {"multiples", "patterns", "first", "rest", "distinct"}
        unsayable |= {"by_pattern", "additional"}
        says = shape.says(name)
        if left := sorted(unsayable.intersection(says)):
            raise Unknown(LIMIT_NAMES[left[0]])
        if "bounds" in says:
            yield from _outside(shape.bounds)
        for least, most in (
            ("min_length", "max_length"),
            ("min_items", "max_items"),
            ("min_properties", "max_properties"),
        ):
            if least in says:
                yield dataclasses.replace(Shape(), **{most: getattr(shape, least) - 1})
            if most in says:
                yield dataclasses.replace(Shape(), **{least: getattr(shape, most) + 1})
        if "required" in says:
            for key in shape.required:
                yield Shape(properties={key: False})
        if "properties" in says:
            for key, form in shape.properties.items():
                other = self.negated(form, depth)
                if other is not False:
                    yield Shape(properties={key: other}, required=(key,))


LIMIT_NAMES = {
    "multiples": "multipleOf",
    "patterns": "a pattern or format",
    "first": "prefixItems",
    "rest": "items",
    "distinct": "uniqueItems",
    "by_pattern": "patternProperties",
    "additional": "additionalProperties",
}


def _outside(bounds: Bounds) -> Iterator[Form]:
    if bounds.low is not None:
        yield Shape(bounds=Bounds(high=bounds.low, below=not bounds.above))
    if bounds.high is not None:
        yield Shape(bounds=Bounds(low=bounds.high, above=not bounds.below))


def _common(one: Shape, other: Shape) -> set[str]:
    """The types that values of both have."""
    names = set(one.types & other.types)
    for a, b in ((one.types, other.types), (other.types, one.types)):
        if "integer" in a and "number" in b:
            names.add("integer")
    return names


def _beyond(least: int, most: int | None, other_least: int, other_most: int | None) -> bool:
    """Whether two ranges of counts do not meet."""
    return (most is not None and least > most) or (
        other_most is not None and other_least > other_most
    )


def positive(logic: Logic, form: Form) -> Form:
    """The form without negations, and with alternatives that may overlap in place of exclusive
    ones; what is inside of properties and items is left.

    Raises:
        Refused: if it cannot be written so.
    """
    match form:
        case Not(inner, path):
            try:
                return positive(logic, logic.negated(inner))
            except Unknown as error:
                remedy = "write out what is allowed instead"
                expected = "a condition whose opposite can be enforced"
                raise refused(path, expected, f"one with {error}", remedy) from None
        case OneOf(forms, path):
            return any_of([_alone(logic, forms, i, path) for i in range(len(forms))])
        case AllOf(forms, closed):
            return all_of([positive(logic, one) for one in forms], closed)
        case AnyOf(forms):
            return any_of([positive(logic, one) for one in forms])
    return form


def _alone(logic: Logic, forms: tuple[Form, ...], place: int, path: str) -> Form:
    """One alternative of a oneOf, without what it shares with others."""
    found = [positive(logic, forms[place])]
    for i, other in enumerate(forms):
        if i != place and not logic.apart(forms[place], other):
            try:
                found.append(positive(logic, logic.negated(other)))
            except Unknown as error:
                raise refused(
                    path,
                    "alternatives of which no value can be of two",
                    f"{place} and {i}, which may share values ({error})",
                    "write anyOf, or give each a required property with another const",
                ) from None
    return all_of(found)
