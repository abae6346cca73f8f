"""The keywords of a schema that limit values of one type, read into a `Shape`."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from . import formats, patterns
from .forms import ALL, TYPES, Form, Shape, Values, refused
from .ranges import Bounds

SHAPE_KEYWORDS = frozenset(
    "type minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"
    " minLength maxLength pattern format"
    " items additionalItems prefixItems minItems maxItems uniqueItems unevaluatedItems contains"
    " minContains maxContains"
    " properties patternProperties additionalProperties unevaluatedProperties required"
    " minProperties maxProperties propertyNames".split()
)
Read = Callable[[Any, str], Form]


def shape(schema: dict[str, Any], path: str, form: Read, draft: int) -> Shape:
    """The shape of all those keywords together; `form` reads a schema inside.

    Raises:
        Refused: if one has no value of its kind, or cannot be enforced.
    """
    fields: dict[str, Any] = {"path": path, "types": _types(schema.get("type", sorted(ALL)), path)}
    fields |= _numbers(schema, path, draft, fields["types"])
    fields |= _strings(schema, path, fields["types"])
    fields |= _items(schema, path, form, draft)
    fields |= _properties(schema, path, form)
    found = Shape(**fields)
    for what in ("Length", "Items", "Properties"):
        least, most = (getattr(found, f"{end}_{what.lower()}") for end in ("min", "max"))
        if most is not None and least > most:
            got = f"{least} > {most}"
            raise refused(path, f"min{what} <= max{what}", got, "correct them")
    return found


def whole(schema: dict[str, Any], key: str, path: str) -> int | None:
    """A count."""
    value = schema.get(key)
    if value is None and key not in schema:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 >= 0:
        raise refused(f"{path}/{key}", "a whole number of at least 0", repr(value), "correct it")
    return int(value)


def _types(value: Any, path: str) -> frozenset[str]:
    names = value if isinstance(value, list) else [value]
    wrong = [name for name in names if name not in TYPES]
    if wrong or not names:
        got = repr(wrong[0]) if wrong else "none"
        raise refused(f"{path}/type", f"a type among {', '.join(TYPES)}", got, "correct it")
    return frozenset(names) - ({"integer"} if "number" in names else set())


# Numbers.


def _number(schema: dict[str, Any], key: str, path: str) -> Decimal | None:
    value = schema.get(key)
    if value is None and key not in schema:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refused(f"{path}/{key}", "a number", repr(value), "correct it")
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def _numbers(
    schema: dict[str, Any], path: str, draft: int, types: frozenset[str]
) -> dict[str, Any]:
    low, high = (_number(schema, key, path) for key in ("minimum", "maximum"))
    above = below = False
    if draft == 4:
        flags = [schema.get(key, False) for key in ("exclusiveMinimum", "exclusiveMaximum")]
        if not all(isinstance(flag, bool) for flag in flags):
            got = f"{flags[0]!r} and {flags[1]!r}"
            raise refused(path, "exclusive bounds that are true or false", got, "name draft 6")
        above, below = flags
    else:
        least, most = (
            _number(schema, key, path) for key in ("exclusiveMinimum", "exclusiveMaximum")
        )
        if least is not None and (low is None or least >= low):
            low, above = least, True
        if most is not None and (high is None or most <= high):
            high, below = most, True
    step = _number(schema, "multipleOf", path)
    if step is not None and step <= 0:
        raise refused(f"{path}/multipleOf", "a number above 0", f"{step}", "correct it")
    bounds, name = Bounds(low, high, above, below), schema.get("format")
    if name in formats.NUMBERS and types & {"integer", "number"}:
        bounds = bounds.both(formats.NUMBERS[name])
    return {"bounds": bounds, "multiples": () if step is None else (step,)}


# Strings.


def _strings(schema: dict[str, Any], path: str, types: frozenset[str]) -> dict[str, Any]:
    found, most = [], whole(schema, "maxLength", path)
    if "format" in schema:
        name = schema["format"]
        if name in formats.STRINGS:
            found.append(f"^(?:{formats.STRINGS[name]})$")
            longest = formats.LONGEST.get(name)
            most = longest if most is None else min(most, longest or most)
        elif name not in formats.NUMBERS:
            known = ", ".join([*formats.STRINGS, *formats.NUMBERS])
            remedy = "write it as a pattern, or remove it"
            raise refused(f"{path}/format", f"a format among {known}", repr(name), remedy)
    if "pattern" in schema:
        found.append(source(schema["pattern"], f"{path}/pattern"))
    least = whole(schema, "minLength", path) or 0
    return {"patterns": tuple(found), "min_length": least, "max_length": most}


def source(pattern: Any, path: str) -> str:
    """A pattern that can be read."""
    if not isinstance(pattern, str):
        raise refused(path, "a pattern as a string", repr(pattern), "write it in quotes")
    try:
        patterns.read(pattern)
    except patterns.Unreadable as error:
        expected = "a regular expression of ECMA-262 without look-around and the like"
        raise refused(path, expected, str(error), "rewrite that part") from None
    return pattern


# Arrays.


def _items(schema: dict[str, Any], path: str, form: Read, draft: int) -> dict[str, Any]:
    first, rest = schema.get("prefixItems"), schema.get("items")
    first_key, rest_key = "prefixItems", "items"
    if isinstance(rest, list) and draft < 2020:
        first, rest = rest, schema.get("additionalItems")
        first_key, rest_key = "items", "additionalItems"
    elif isinstance(rest, list):
        remedy = 'write prefixItems, or name an older draft by "$schema"'
        raise refused(f"{path}/items", "one schema", "a list of them", remedy)
    rest = schema.get("unevaluatedItems") if rest is None else rest
    if "unevaluatedItems" in schema and schema.keys() & {"allOf", "anyOf", "oneOf", "$ref", "if"}:
        got = "unevaluatedItems beside what may say more of items"
        raise refused(path, "unevaluatedItems alone", got, "use items")
    if not isinstance(first, list | None):
        raise refused(f"{path}/{first_key}", "a list of schemas", repr(first), "list them")
    _contains(schema, path)
    distinct = schema.get("uniqueItems", False)
    if not isinstance(distinct, bool):
        raise refused(f"{path}/uniqueItems", "true or false", repr(distinct), "correct it")
    return {
        "first": tuple(form(s, f"{path}/{first_key}/{i}") for i, s in enumerate(first or ())),
        "rest": None if rest is None else form(rest, f"{path}/{rest_key}"),
        "min_items": whole(schema, "minItems", path) or 0,
        "max_items": whole(schema, "maxItems", path),
        "distinct": distinct,
    }


def _contains(schema: dict[str, Any], path: str) -> None:
    if "contains" in schema and (schema.get("minContains") != 0 or "maxContains" in schema):
        remedy = "say by prefixItems where such an item is, or what all items are by items"
        raise refused(path, "keywords that can be enforced", "contains", remedy)


# Objects.


def _properties(schema: dict[str, Any], path: str, form: Read) -> dict[str, Any]:
    maps = {}
    for key in ("properties", "patternProperties"):
        inner = schema.get(key, {})
        if not isinstance(inner, dict):
            remedy = "map each name to its schema"
            raise refused(f"{path}/{key}", "an object of schemas", repr(inner), remedy)
        maps[key] = {name: form(value, f"{path}/{key}/{name}") for name, value in inner.items()}
    by_pattern = {
        source(key, f"{path}/patternProperties/{key}"): value
        for key, value in maps["patternProperties"].items()
    }
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise refused(f"{path}/required", "a list of names", repr(required), "correct it")
    rest, key = schema.get("additionalProperties"), "additionalProperties"
    if rest is None and "unevaluatedProperties" in schema:
        # What several schemas say together is closed by the reader.
        apart = schema.keys().isdisjoint({"allOf", "anyOf", "oneOf", "$ref", "if"})
        rest, key = schema["unevaluatedProperties"] if apart else None, "unevaluatedProperties"
        if not apart and not isinstance(schema[key], bool):
            got = f"{schema[key]!r} beside what may name more properties"
            raise refused(f"{path}/{key}", "true or false", got, "use additionalProperties")
    fields = {
        "properties": maps["properties"],
        "by_pattern": by_pattern,
        "additional": None if rest is None else form(rest, f"{path}/{key}"),
        "required": tuple(dict.fromkeys(required)),
        "min_properties": whole(schema, "minProperties", path) or 0,
        "max_properties": whole(schema, "maxProperties", path),
    }
    if "propertyNames" in schema:
        fields |= _named(form(schema["propertyNames"], f"{path}/propertyNames"), fields, path)
    return fields


def _named(names: Form, fields: dict[str, Any], path: str) -> dict[str, Any]:
    """propertyNames, said by the other keywords."""
    properties, rest = fields["properties"], fields["additional"]
    if names is True:
        return {}
    if names is False:
        return {
            "properties": dict.fromkeys(properties, False),
            "by_pattern": {},
            "additional": False,
        }
    if isinstance(names, Values) and not fields["by_pattern"]:
        allowed = [name for name in names.values if isinstance(name, str)]
        other = True if rest is None else rest
        inside = {name: value for name, value in properties.items() if name in allowed}
        more = {name: other for name in allowed if name not in properties}
        gone = {name: False for name in properties if name not in allowed}
        return {"properties": inside | more | gone, "additional": False}
    found = _name_patterns(names) if isinstance(names, Shape) else None
    if found == []:
        return {}
    plain = not fields["by_pattern"] and (rest in (None, True) or not properties)
    if found and len(found) == 1 and plain:
        matches = patterns.read(found[0]).matches
        kept = {name: matches(name) and value for name, value in properties.items()}
        other = True if rest is None else rest
        return {"properties": kept, "by_pattern": {found[0]: other}, "additional": False}
    remedy = "use patternProperties with additionalProperties: false"
    expected = "propertyNames of one pattern or a list of names, beside plain properties"
    raise refused(f"{path}/propertyNames", expected, "another", remedy)


def _name_patterns(names: Shape) -> list[str] | None:
    """The patterns that names have, one for their length included; None if no name is allowed."""
    if "string" not in names.types:
        return None
    found = list(names.patterns)
    if names.min_length or names.max_length is not None:
        most = "" if names.max_length is None else names.max_length
        found.append(f"^[^]{{{names.min_length},{most}}}$")
    return found
