"""JSON schemas as regular expressions.

outlines-core writes the expression.  It leaves out, or gets wrong, a number of keywords without
saying so; a schema with one of them is refused here, since a potential that is not what its schema
says gives wrong answers without a sign.
"""

from __future__ import annotations

import json
from typing import Any

from outlines_core.json_schema import build_regex_from_schema  # pyright: ignore[reportMissingImports]

from .byte_dfa import compile_regex, strip_anchors

ANNOTATIONS = frozenset(
    "title description default examples $schema $comment deprecated readOnly writeOnly".split()
)  # they say nothing about which values are valid
CHOICES = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")
SHAPES = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "integer": (),
    "number": (),
    "boolean": (),
    "null": (),
}
BOUNDS = {key for keys in SHAPES.values() for key in keys if key.startswith(("min", "max"))}
# Each keyword here is left out without a word if one of the others is there.
EXCLUSIVE = [
    (("pattern",), ("minLength", "maxLength", "format")),
    (("format",), ("minLength", "maxLength")),
    (("minProperties", "maxProperties"), ("properties",)),
    (("prefixItems",), ("minItems", "maxItems")),
]
DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# Narrower than the standards where those allow characters that JSON has to escape.
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{OCTET}(\.{OCTET}){{3}}",
    "email": (
        r"[A-Za-z0-9_%+-]+(\.[A-Za-z0-9_%+-]+)*"
        r"@([A-Za-z0-9]+(-+[A-Za-z0-9]+)*\.)+[A-Za-z]{2,}"
    ),
}


def schema_regex(schema: str | dict[str, Any]) -> str:
    """The regular expression of JSON texts that are valid under `schema`; see
    `automata.json_schema`.

    Raises:
        ValueError: if the schema is invalid or has a keyword that the regular expression could not
            enforce.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"expected a JSON schema, got text that is not JSON: {error}; correct it there"
            ) from None
    prepared = _prepare(schema, "#")
    try:
        return build_regex_from_schema(json.dumps(prepared))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a JSON schema, got one that cannot be used: {str(error).splitlines()[0]}"
        ) from None


def _prepare(schema: Any, path: str) -> dict[str, Any]:
    """`schema` without annotations and with formats as patterns, after checks of it and of all
    schemas inside it.
    """
    if not isinstance(schema, dict):
        raise _refusal(path, "a schema as an object", repr(schema), "write {} for any value")
    schema = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
    known = {
        *CHOICES,
        "type",
        "$defs",
        "definitions",
        "$id",
        *(key for keys in SHAPES.values() for key in keys),
    }
    if unknown := sorted(schema.keys() - known):
        raise _refusal(
            path,
            "keywords that a regular expression can enforce",
            ", ".join(unknown),
            "remove them",
        )
    _check_combination(schema, path)
    if not schema:
        # Any value: outlines-core's own expression for {} lacks the parentheses around its
        # alternatives.
        return {"anyOf": [{"type": name} for name in SHAPES]}
    _prepare_inner(schema, path)
    if "required" in schema:
        schema["required"] = [_escaped(name) for name in schema["required"]]
    if "format" in schema:
        name = schema.pop("format")
        if name not in FORMATS:
            raise _refusal(
                path, f"a format among {', '.join(FORMATS)}", repr(name), "write it as a pattern"
            )
        schema["pattern"] = FORMATS[name]
    if "pattern" in schema:
        schema["pattern"] = f"(?:{_checked_pattern(schema['pattern'], path)})"
    return schema


def _prepare_inner(schema: dict[str, Any], path: str) -> None:
    """Prepare all schemas inside of `schema`, in place."""
    for key in ("$defs", "definitions", "properties"):
        if key in schema:
            inner = schema[key]
            if not isinstance(inner, dict):
                raise _refusal(
                    f"{path}/{key}",
                    "an object of schemas",
                    repr(inner),
                    "map each name to its schema",
                )
            write = _escaped if key == "properties" else str
            schema[key] = {
                write(name): _prepare(value, f"{path}/{key}/{name}")
                for name, value in inner.items()
            }
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if key in schema:
            values = _filled(schema[key], path, key)
            schema[key] = [_prepare(value, f"{path}/{key}/{i}") for i, value in enumerate(values)]
    for key in ("items", "additionalProperties"):
        if key in schema and not (key == "additionalProperties" and isinstance(schema[key], bool)):
            schema[key] = _prepare(schema[key], f"{path}/{key}")


def _escaped(name: str) -> str:
    """A property's name as it stands between its quotes, which outlines-core leaves as it is."""
    return json.dumps(name, ensure_ascii=False)[1:-1]


def _filled(values: Any, path: str, key: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise _refusal(
            f"{path}/{key}", "a list with at least one entry", repr(values), "list what is allowed"
        )
    return values


def _check_combination(schema: dict[str, Any], path: str) -> None:
    """Refuse keywords of which outlines-core would enforce only some, and what contradicts
    itself.
    """
    _check_choices(schema, path)
    _check_values(schema, path)
    _check_bounds(schema, path)
    _check_exclusive(schema, path)
    named = schema.get("properties", {})
    if missing := [name for name in schema.get("required", ()) if name not in named]:
        raise _refusal(
            path,
            "required names among the properties",
            repr(missing[0]),
            "add its schema to properties",
        )


def _check_choices(schema: dict[str, Any], path: str) -> None:
    """One keyword decides which values there are."""
    choices = [key for key in CHOICES if key in schema]
    shapes = [key for keys in SHAPES.values() for key in keys if key in schema]
    valued = choices in (["enum"], ["const"])
    if len(choices) > 1 or (choices and shapes) or (choices and "type" in schema and not valued):
        got = ", ".join([*choices, *shapes, *(["type"] if "type" in schema else [])])
        raise _refusal(
            path, "one keyword that decides", got, "write out the alternatives in one anyOf"
        )
    if len(schema.get("allOf", ())) > 1:
        raise _refusal(
            path,
            "allOf of a single schema",
            f"{len(schema['allOf'])}",
            "merge them into one schema",
        )


def _check_values(schema: dict[str, Any], path: str) -> None:
    """Types are known, and values are of one of them."""
    types = schema.get("type", list(SHAPES))
    types = _filled(types, path, "type") if isinstance(types, list) else [types]
    if wrong := [name for name in types if name not in SHAPES]:
        raise _refusal(path, f"a type among {', '.join(SHAPES)}", repr(wrong[0]), "correct it")
    values = [schema["const"]] if "const" in schema else []
    values = _filled(schema["enum"], path, "enum") if "enum" in schema else values
    if bad := [value for value in values if not any(_is_of(value, name) for name in types)]:
        raise _refusal(
            path, f"values of type {'/'.join(types)}", repr(bad[0]), "correct the value or the type"
        )


def _check_bounds(schema: dict[str, Any], path: str) -> None:
    """Bounds are whole numbers, the least at most the greatest."""
    for key in BOUNDS & schema.keys():
        if isinstance(schema[key], bool) or not isinstance(schema[key], int) or schema[key] < 0:
            raise _refusal(
                f"{path}/{key}", "a whole number of at least 0", repr(schema[key]), "correct it"
            )
    for least in BOUNDS & schema.keys():
        most = least.replace("min", "max", 1)
        if schema[least] > schema.get(most, schema[least]):
            raise _refusal(
                path, f"{least} <= {most}", f"{schema[least]} > {schema[most]}", "correct them"
            )


def _check_exclusive(schema: dict[str, Any], path: str) -> None:
    """No keyword makes another be left out."""
    for keys, others in EXCLUSIVE:
        one, other = (
            [key for key in keys if key in schema],
            [key for key in others if key in schema],
        )
        if one and other:
            raise _refusal(
                path, f"{one[0]} alone", f"{one[0]} with {', '.join(other)}", "keep one of them"
            )


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    kinds = {"string": str, "array": list, "object": dict, "integer": int, "number": (int, float)}
    return name in kinds and isinstance(value, kinds[name])


def _checked_pattern(pattern: Any, path: str) -> str:
    """`pattern` without its anchors, if whatever matches it can stand between the quotes of a JSON
    string as it is.
    """
    if not isinstance(pattern, str):
        raise _refusal(path, "a pattern as a string", repr(pattern), "write it in quotes")
    body = strip_anchors(pattern)
    dfa = compile_regex(pattern)
    special = [0x22, 0x5C, *range(0x20)]
    live = dfa.transitions[:, special] != len(dfa.transitions) - 1
    if live.any():
        char = chr(special[int(live.any(0).argmax())])
        expected, got = (
            "a pattern without characters that JSON has to escape",
            f"{pattern!r}, which allows {char!r}",
        )
        raise _refusal(
            path, expected, got, r'exclude them, e.g. by [^"\\\x00-\x1f] in place of "."'
        )
    return body


def _refusal(path: str, expected: str, got: str, remedy: str) -> ValueError:
    return ValueError(f"expected {expected} at {path} of the JSON schema, got {got}; {remedy}")
