"""Every kind of schema that was once cut, widened or refused, with its right values: by tables
where they are small, by the parser where they are not, and by the parser in the place of tables.
"""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ppl import automata, byte_dfa, schemas
from ppl.context_free import _Parsers, _parsers
from ppl.schemas import tables
from ppl.space import Space
from ppl.token_tables import vocabulary

from .test_automata import FakeTokenizer

BYTES = FakeTokenizer((None, *(bytes([byte]) for byte in range(256))), eos=0)
VOCABULARY = vocabulary(BYTES.token_bytes, BYTES.eos)


def by_tables(plan: schemas.Plan, texts: list[str]) -> list[bool]:
    dfa, found = byte_dfa.compile_regex(plan.pattern or ""), []
    for text in texts:
        state = 0
        for byte in text.encode():
            state = dfa.transitions[state, byte]
        found.append(bool(dfa.accepting[state]))
    return found


def by_parser(plan: schemas.Plan, texts: list[str]) -> list[bool]:
    """What the host's side of a grammar says, without a program."""
    parsers = _parsers(plan.grammar("asked"), VOCABULARY, plan.counts_names())
    return [_derives(parsers, text) for text in texts]


def _derives(parsers: _Parsers, text: str) -> bool:
    """Whether every byte, and EOS after them, is allowed where it comes."""
    ids = [byte + 1 for byte in text.encode()]
    for used, token in enumerate([*ids, BYTES.eos]):
        begun = np.array([[*ids, 0]], np.int32)
        words, gave_up = parsers.follow(begun, np.array([used]), np.array([True]))
        assert not gave_up.any()
        if not words[0, token // 32] >> np.uint32(token % 32) & 1:
            return False
    return True


def chain(*names: str) -> dict[str, Any]:
    """Definitions A, B, ..., each with a property that is the next one."""
    inner = {
        name.upper(): {
            "type": "object",
            "properties": {after: {"$ref": f"#/$defs/{after.upper()}"}},
            "required": [after],
        }
        for name, after in zip(names, names[1:], strict=False)
    }
    inner[names[-1].upper()] = {"type": "integer"}
    return {"$ref": f"#/$defs/{names[0].upper()}", "$defs": inner}


MAP = {"type": "object", "additionalProperties": {"type": "integer"}}
TAGGED = {
    "oneOf": [
        {"type": "object", "properties": {"k": {"const": k}, k: {}}, "required": ["k"]}
        for k in ("a", "b")
    ]
}
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "references": (
        chain("a", "b", "c", "d", "e"),
        ['{"b": {"c": {"d": {"e": 1}}}}'],
        ['{"b": {"c": {"d": {}}}}', "{}"],
    ),
    "six references": (chain(*"abcdefg"), ['{"b":{"c":{"d":{"e":{"f":{"g":1}}}}}}'], ["1"]),
    "recursion": (
        {"type": "object", "properties": {"c": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        ['{"c":{"c":{"c":{"c":null}}}}', "{}"],
        ['{"c":{"c":1}}', "null"],
    ),
    "maxProperties": (MAP | {"maxProperties": 1}, ['{"a": 1}', "{}"], ['{"a": 1, "b": 2}']),
    "minProperties": (
        MAP | {"minProperties": 2},
        ['{"a": 1, "b": 2}', '{"a":1,"b":2,"\\u0001":3}'],
        ['{"a": 1}', "{}", '{"a":1,"a":2}', '{"a":1,"b":2,"a":3}'],
    ),
    "several types": (
        {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}},
        ["null", '{"a": 1}', "{}"],
        ['{"a": null}', "1", '{"b": 1}'],
    ),
    "date": (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2000-02-29"', '"2023-12-31"'],
        ['"2023-02-30"', '"2023-02-29"', '"1900-02-29"', '"2023-04-31"', '"0000-01-01"'],
    ),
    "date-time": (
        {"type": "string", "format": "date-time"},
        ['"2024-02-29T23:59:59.5+01:00"', '"2023-01-01t00:00:00z"'],
        ['"2023-02-30T00:00:00Z"', '"2023-02-03 00:00:00Z"', '"2023-02-03T24:00:00Z"'],
    ),
    "numbers": (
        {"type": "number"},
        ["1e5", "1E5", "1.0e2", "1e+5", "-0", "0.5E-07"],
        ["01", "1.", ".5", "+1", "1e", "--1"],
    ),
    "controls": (
        {"type": "string"},
        ['"\x80\x9f"', '"\\u0000"', '"\\n"', '"\U0001f600"', '"/"'],
        ['"\n"', '"\x1f"', '"\\u0041"', '"\\x"', '"'],
    ),
    "a pattern is searched for": (
        {"type": "string", "pattern": "\\d-"},
        ['"x1-y"', '"\\"1-\\n"'],
        ['"\u0661-"', '"1"'],
    ),
    "anchors in alternatives": (
        {"type": "string", "pattern": "^a$|^(b|c$)"},
        ['"a"', '"c"', '"bx"'],
        ['"ab"', '"cx"', '"xb"'],
    ),
    "Literal": (
        {"const": "a", "enum": ["a"], "type": "string"},
        ['"a"'],
        ['"b"', "null"],
    ),
    "tuple": (
        {"prefixItems": [{"type": "integer"}, {}], "type": "array", "minItems": 2, "maxItems": 2},
        ['[1,{"a":[]}]'],
        ["[1]", "[1,2,3]", '["a",1]'],
    ),
    "prefixItems alone": (
        {"prefixItems": [{"type": "integer"}, {"type": "string"}], "type": "array"},
        ["[]", "[ 1 ]", '[1,"a"]'],
        ['["a"]', '[1,"a",2]'],
    ),
    "minimum and maximum": (
        {"type": "integer", "minimum": -12, "exclusiveMaximum": 105},
        ["-12", "0", "104", "99", "9"],
        ["-13", "105", "1e1", "1.0"],
    ),
    "bounds of numbers": (
        {"type": "number", "minimum": -1.5, "maximum": 4.86},
        ["-1.5", "4.8", "4.86", "4.859", "0.0", "-0.25"],
        ["-1.51", "4.87", "4.861", "5", "1e0"],
    ),
    "multipleOf": (
        {"type": "number", "multipleOf": 0.01, "minimum": 0},
        ["19.99", "3", "0.07"],
        ["1.234", "-1"],
    ),
    "uniqueItems": (
        {"type": "array", "items": {"enum": ["a", 1, True]}, "uniqueItems": True},
        ["[]", '["a",1,true]', '[true,"a"]'],
        ['["a","a"]', "[1,1]"],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}},
        ["{}", '{"x-a":1,"x-b":2}'],
        ['{"x-a":"b"}', '{"a":1}'],
    ),
    "properties of all three kinds": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "patternProperties": {"^x": {"type": "integer"}},
            "additionalProperties": {"type": "string"},
        },
        ['{"a":null,"x1":1,"y":"s"}', '{"y":"x"}'],
        ['{"x":"s"}', '{"a":"s"}', '{"\\u0061":"s"}', '{"y":1}'],
    ),
    "free names beside named ones": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": True},
        ['{"a":null,"b":[1]}', '{"ab":1}'],
        ['{"a":1}', '{"\\u0061":1}'],
    ),
    "annotations": (
        {"type": "null", "title": "t", "deprecated": True, "x-order": 1, "contentEncoding": "x"},
        ["null"],
        ["1"],
    ),
    "boolean subschemas": (
        {"type": "object", "properties": {"a": True, "b": False}},
        ['{"a":[{}]}', "{}"],
        ['{"b":1}'],
    ),
    "no properties": (
        {"type": "object", "additionalProperties": False},
        ["{}", "{ }"],
        ['{"a":1}'],
    ),
    "escaped paths": (
        {"$ref": "#/$defs/a~1b%20~0", "$defs": {"a/b ~": {"type": "null"}}},
        ["null"],
        ["1"],
    ),
    "anchors and ids": (
        {
            "$id": "https://example.org/root",
            "anyOf": [{"$ref": "#here"}, {"$ref": "inner#/$defs/n"}, {"$ref": "inner"}],
            "$defs": {
                "a": {"$anchor": "here", "type": "null"},
                "b": {
                    "$id": "inner",
                    "$ref": "#/$defs/n",
                    "$defs": {"n": {"const": 1}},
                },
            },
        },
        ["null", "1"],
        ["2"],
    ),
    "any value": ({}, ['{"a":[1,{"b":[[]]}]}', "null", '"x"'], ["", "[", "nul"]),
    "without a type": (
        {"properties": {"a": {"type": "integer"}}},
        ["5", '{"a":1}', "[{}]"],
        ['{"a":"x"}', '{"b":1}'],
    ),
    "inheritance": (
        {
            "allOf": [
                {"$ref": "#/$defs/base"},
                {"properties": {"y": {"minimum": 2}}, "required": ["y"]},
            ],
            "properties": {"z": {"type": "null"}},
            "$defs": {
                "base": {
                    "type": "object",
                    "properties": {"x": {"type": "string"}, "y": {"type": "integer"}},
                }
            },
        },
        ['{"x":"a","y":2}', '{"y":3,"z":null}'],
        ['{"x":"a"}', '{"y":1}', '{"y":2,"w":1}'],
    ),
    "oneOf by a tag": (TAGGED, ['{"k":"a","a":1}', '{"k":"b"}'], ['{"k":"c"}', '{"k":"b","a":1}']),
    "oneOf that overlaps": (
        {"oneOf": [{"type": "number", "minimum": 0}, {"type": "number", "maximum": 5}]},
        ["-1", "5.5"],
        ["0", "5", "3"],
    ),
    "if": (
        {
            "type": "object",
            "properties": {"t": {"enum": ["a", "b"]}, "x": {"type": "integer"}},
            "required": ["t"],
            "if": {"properties": {"t": {"const": "a"}}},
            "then": {"required": ["x"]},
        },
        ['{"t":"b"}', '{"t":"a","x":1}', '{"t":"b","x":1}'],
        ['{"t":"a"}'],
    ),
    "dependentRequired": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
            "dependentRequired": {"a": ["b"]},
        },
        ["{}", '{"b":null}', '{"a":null,"b":null}'],
        ['{"a":null}'],
    ),
    "propertyNames": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": MAP},
        ['{"ab":{"1":2}}', "{}"],
        ['{"A":{}}', '{"a":1}'],
    ),
    "not": (
        {"type": "string", "not": {"enum": ["a", "bc"]}},
        ['"b"', '"bcd"', '""'],
        ['"a"', '"bc"', "1"],
    ),
    "a long string": ({"type": "string", "maxLength": 10**9}, ['"abc"'], ['"']),
    "unevaluatedProperties": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "allOf": [{"properties": {"b": {"type": "null"}}}],
            "unevaluatedProperties": False,
        },
        ['{"a":null,"b":null}', '{"b":null}'],
        ['{"c":null}'],
    ),
    "draft 4": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "array",
            "items": [{"type": "integer", "minimum": 1, "exclusiveMinimum": True}],
            "additionalItems": {"type": "null"},
        },
        ["[2]", "[2,null]", "[]"],
        ["[1]", "[2,3]"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_say_what_is_valid(name):
    schema, valid, invalid = CASES[name]
    plan, texts = schemas.plan(schema), [*valid, *invalid]
    right = [True] * len(valid) + [False] * len(invalid)
    assert by_parser(plan, texts) == right
    if plan.pattern is not None:
        assert by_tables(plan, texts) == right


TABLES_ONLY: dict[str, tuple[Any, list[str], list[str]]] = {
    "large integers": (
        {"enum": [2**64 + 1, -(2**70)]},
        [str(2**64 + 1), str(-(2**70))],
        [str(2**64), str(2**64 + 2)],
    ),
    "large bounds": (
        {"type": "integer", "minimum": 2**53 + 1},
        [str(2**53 + 1), str(10**20)],
        [str(2**53)],
    ),
    "a bound that the parser forgets": (
        {"type": "number", "exclusiveMinimum": 1, "maximum": 1.5},
        ["1.2", "1.5"],
        ["1", "1.0", "1.51"],
    ),
    "texts of one value": ({"const": [1.0, "a/"]}, ['[1.0,"a/"]', '[1,"a/"]'], ['[1e0,"a/"]']),
    "delete": ({"type": "string"}, ['"\x7f"', '"\\/"'], []),
}


@pytest.mark.parametrize("name", TABLES_ONLY)
def test_tables_alone(name):
    schema, valid, invalid = TABLES_ONLY[name]
    plan = schemas.plan(schema)
    right = [True] * len(valid) + [False] * len(invalid)
    assert by_tables(plan, [*valid, *invalid]) == right


@pytest.mark.parametrize("name", list(TABLES_ONLY)[:3])
def test_what_the_parser_would_get_wrong_is_refused_there(name):
    inside = {"type": "array", "items": [TABLES_ONLY[name][0], {}]}
    inside["$schema"] = "http://json-schema.org/draft-07/schema#"
    with pytest.raises(ValueError, match=r"expected what tables or llguidance can enforce.*\d"):
        schemas.plan(inside).grammar()


def test_the_result_says_its_way():
    tables = automata.json_schema({"type": "null"}, BYTES)
    assert tables.way == "tables" and tables.segmentation.startswith("all")
    parser = automata.json_schema({"type": "array"}, BYTES)
    assert parser.way == "parser: any value, which nests without end"
    assert parser.segmentation.startswith("all: a grammar reads text")
    with pytest.raises(ValueError, match="does not know a tokenizer's own segmentation"):
        automata.json_schema({"type": "array"}, BYTES, canonical=True)


def test_tables_that_are_too_large_are_a_parser(monkeypatch):
    monkeypatch.setattr(byte_dfa, "MAX_BYTE_STATES", 5)
    parser = automata.json_schema({"const": "only here"}, BYTES)
    assert parser.way.startswith("parser: tables that are small")


def test_the_size_of_counted_repetitions():
    assert tables.expanded(r"a(?:b[c\]d]{2,3}\x{2f}){4}e{2,}") == 1 + 4 * (2 + 1 + 3 + 1) + 2


def test_large_repetitions_go_to_the_parser():
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(4):
        nested = {"type": "array", "items": nested, "maxItems": 50}
    for schema in (nested, {"type": "string", "minLength": 10**6}):
        plan = schemas.plan(schema)
        assert plan.pattern is None and plan.why.startswith("repetitions of")


def test_a_potential_with_the_parsers_values():
    schema, valid, invalid = CASES["minProperties"]
    potential = automata.json_schema(schema, BYTES).within(Space(257, BYTES.eos, 20))
    for text in (valid[0], invalid[2]):
        state, total = potential.init(1), 0.0
        for byte in text.encode():
            state, factor = potential.step(state, jnp.array([byte + 1]))
            total += float(factor[0])
        total += float(potential.final(state)[0])
        assert total == (0.0 if text in valid else -np.inf)


def test_valid_texts_are_json():
    for _, valid, _ in (*CASES.values(), *TABLES_ONLY.values()):
        for text in valid:
            json.loads(text)
