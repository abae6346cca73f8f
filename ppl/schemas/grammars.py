"""Forms as schemas for llguidance's JSON compiler, in those keywords which it enforces exactly.

It is told nothing that it ignores or reads otherwise: no formats, draft-dependent keywords, numbers
that a double does not hold, or properties that it would let escape by writing their names with \\u.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import llguidance

from . import patterns
from .closing import Ready
from .forms import ALL, TYPES, AllOf, AnyOf, Form, Ref, Shape, Values, refused

EXACT = 2**53
SPACES = {"whitespace_pattern": " "}


def write(ready: Ready, why: str) -> str:
    """A grammar in llguidance's Lark syntax of the texts of a form.

    Raises:
        Refused: if llguidance cannot enforce it either; `why` says what keeps it from being a
            regular expression.
    """
    try:
        schema = _object(_schema(ready.form))
        if ready.definitions:
            schema["$defs"] = {name: _schema(one) for name, one in ready.definitions.items()}
    except _TooMuch as error:
        raise _refused(str(error), why) from None
    # \u is allowed where no name of a property could be written with it.
    escapes = 'nrbtf\\"' + ("" if any(map(_mixed, ready.all())) else "u")
    schema["x-guidance"] = SPACES | {"json_allowed_escapes": escapes}
    lark = f"start: %json {json.dumps(schema)}\n"
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(lark)
    if is_error or messages:
        raise _refused(_first(messages[0]), why)
    return lark


def _refused(what: str, why: str) -> ValueError:
    return refused(
        "#",
        "what tables or llguidance can enforce",
        f"{why}, which tables cannot hold, and for llguidance: {what}",
        "simplify one of them",
    )


def _first(message: str) -> str:
    line = message.partition("\n")[0]
    return line.rpartition("failed to compile JSON schema: ")[2].rstrip(". ")


class _TooMuch(Exception):
    """What llguidance would not do as it is meant."""


def _mixed(form: Form) -> bool:
    if isinstance(form, AllOf):
        return True
    return isinstance(form, Shape) and bool(form.by_pattern) and form.additional is not False


def _object(schema: Any) -> dict[str, Any]:
    return {} if schema is True else dict(schema)


def _schema(form: Form) -> Any:
    match form:
        case bool():
            return form
        case Values(values):
            for value in values:
                _check(value)
            return {"enum": list(values)}
        case AllOf(forms):
            return {"allOf": [_schema(one) for one in forms]}
        case AnyOf(forms):
            return {"anyOf": [_schema(one) for one in forms]}
        case Ref(name):
            return {"$ref": f"#/$defs/{name}"}
        case Shape():
            return _shape(form)
    raise TypeError(form)


def _check(value: Any) -> None:
    """Refuse values with numbers that llguidance would round."""
    if isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            _check(one)
    elif isinstance(value, int) and abs(value) > EXACT:
        raise _TooMuch(f"the number {value} among values, which a double does not hold")


def _shape(shape: Shape) -> dict[str, Any]:
    found: dict[str, Any] = {}
    types = shape.types
    if types != ALL:
        names = [name for name in TYPES if name in types]
        found["type"] = names[0] if len(names) == 1 else names
    extra = [] if not types & {"integer", "number"} else _numbers(shape, found)
    if "string" in types:
        found |= _given(minLength=shape.min_length or None, maxLength=shape.max_length)
        for key in shape.patterns:
            extra.append({"pattern": f"^{patterns.read(key).value}$"})
    if "array" in types:
        found |= _given(
            minItems=shape.min_items or None,
            maxItems=shape.max_items,
            prefixItems=[_schema(one) for one in shape.first] or None,
            items=None if shape.rest is None else _schema(shape.rest),
        )
    if "object" in types:
        found |= _properties(shape)
    if "number" in types and (forgotten := _forgotten(shape)):
        found = {"anyOf": [found, {"enum": forgotten}]}
    if len(extra) == 1 and not extra[0].keys() & found.keys() and "anyOf" not in found:
        return found | extra[0]
    return {"allOf": [found, *extra]} if extra else found


def _forgotten(shape: Shape) -> list[float]:
    """What llguidance leaves out below a bound of several decimals: 4.8 of those below 4.86."""
    low, high, *_ = shape.bounds
    found = []
    for bound in [*([high] if high and high > 0 else []), *([low] if low and low < 0 else [])]:
        whole, _, digits = f"{bound:f}".partition(".")
        found += [Decimal(f"{whole}.{digits[:i]}") for i in range(1, len(digits.rstrip("0")))]
    return [float(number) for number in found if shape.bounds.holds(number)]


def _given(**keywords: Any) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if value is not None}


def _numbers(shape: Shape, found: dict[str, Any]) -> list[dict[str, Any]]:
    low, high, above, below = shape.bounds
    for bound in (low, high):
        if bound is not None and (abs(bound) > EXACT or len(f"{bound:f}".partition(".")[2]) > 15):
            raise _TooMuch(f"the bound {bound}, which a double does not hold")
    if low is not None and high is not None and "number" in shape.types:
        nearest, strict = (low, above) if low >= 0 else (-high, below)
        if strict and nearest >= 0 and nearest == nearest // 1 and int(low) == int(high):
            raise _TooMuch(f"numbers between {low} and {high}, where it forgets exclusive")
    if low is not None:
        found["exclusiveMinimum" if above else "minimum"] = _double(low)
    if high is not None:
        found["exclusiveMaximum" if below else "maximum"] = _double(high)
    if len(shape.multiples) > 1 or any(step > EXACT for step in shape.multiples):
        raise _TooMuch("several multipleOf, or one that is large")
    return [{"multipleOf": _double(step)} for step in shape.multiples]


def _double(number: Decimal) -> int | float:
    return int(number) if number == number // 1 else float(number)


def _properties(shape: Shape) -> dict[str, Any]:
    keys = {f"^{patterns.read(key).value}$": one for key, one in shape.by_pattern.items()}
    more = shape.additional
    names = list(dict.fromkeys([*shape.properties, *shape.required]))
    if more not in (None, False) and names and not keys:
        # llguidance would let the others be written with \u, and so be any.
        keys = {f"^{patterns.read(patterns.others(names)).value}$": more}
        more = False
    return _given(
        properties={name: _schema(one) for name, one in shape.properties.items()} or None,
        patternProperties={key: _schema(one) for key, one in keys.items()} or None,
        additionalProperties=None if more is None else _schema(more),
        required=list(shape.required) or None,
        minProperties=shape.min_properties or None,
        maxProperties=shape.max_properties,
    )
