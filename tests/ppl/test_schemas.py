"""JSON schemas: what random walks through the automaton write is valid, and what is refused is
refused for a reason.
"""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl import automata
from ppl.automata import TokenAutomaton
from ppl.space import Space

from .test_automata import FORBIDDEN, FakeTokenizer

# Every ASCII character and some pieces of JSON, so that random walks reach all corners of a schema.
JSON_TOKENS = FakeTokenizer(
    (
        None,
        *(bytes([byte]) for byte in range(128)),
        b"\xc3",
        b"\xa9",
        b'{"',
        b'": ',
        b'", "',
        b'"}',
        b"tr",
        b"null",
    ),
    eos=0,
)
SCHEMAS = {
    "object": {
        "type": "object",
        "title": "annotations say nothing",
        "properties": {
            "name": {"type": "string", "maxLength": 5, "description": "any"},
            "age": {"type": "integer"},
            "mood": {"enum": ["up", 'do"wn', 1.5, None]},
            "at": {
                "type": "object",
                "properties": {"zip": {"type": "string", "pattern": "^([0-9]{3}|x+)$"}},
            },
            "tags": {
                "type": "array",
                "items": {"type": ["boolean", "null"]},
                "minItems": 1,
                "maxItems": 2,
            },
        },
        "required": ["name", "mood", "tags"],
    },
    "number": {"type": "number"},
    "date": {"type": "string", "format": "date"},
    "choice": {
        "anyOf": [{"const": {"a": [1, "b"]}}, {"$ref": "#/$defs/flag"}],
        "$defs": {"flag": {"type": "boolean"}},
    },
    "escaped name": {
        "type": "object",
        "properties": {'a"\n': {"type": "null"}},
        "required": ['a"\n'],
    },
    "two items": {
        "type": "array",
        "prefixItems": [
            {"type": "null"},
            {"type": ["object", "null"], "additionalProperties": False},
        ],
        "minItems": 2,
    },
}


def is_object(value) -> bool:
    return (
        {"name", "mood", "tags"} <= value.keys() <= {"name", "age", "mood", "at", "tags"}
        and (isinstance(value["name"], str) and len(value["name"]) <= 5)
        and type(value.get("age", 0)) is int
        and value["mood"] in ["up", 'do"wn', 1.5, None]
        and value.get("at", {}).keys() <= {"zip"}
        and re.fullmatch("[0-9]{3}|x+", value.get("at", {}).get("zip", "x")) is not None
        and (
            1 <= len(value["tags"]) <= 2
            and all(tag in (True, False, None) for tag in value["tags"])
        )
    )


VALID = {
    "object": is_object,
    "number": lambda value: type(value) in (int, float),
    "date": lambda value: re.fullmatch("[0-9]{4}-[01][0-9]-[0-3][0-9]", value) is not None,
    "choice": lambda value: value == {"a": [1, "b"]} or isinstance(value, bool),
    "escaped name": lambda value: value == {'a"\n': None},
    "two items": lambda value: isinstance(value, list) and len(value) == 2,
}
ACCEPTED = {
    "object": [
        '{"name": "J\\"o", "mood":"do\\"wn","tags":[true, null] }',
        '{"name":"ok","age":-3,"mood":1.5,"at":{},"tags":[null]}',
    ],
    "number": ["0", "-12.50e+3"],
    "date": ['"2024-02-29"'],
    "choice": ['{ "a":[1,"b"]}', "true"],
    "escaped name": ['{"a\\"\\n":null}'],
    "two items": ["[null, {}]", "[null,null]"],
}
REJECTED = {
    "object": [
        '{"name": "Jo", "tags": [null]}',
        '{"name":"abcdef","mood":null,"tags":[null]}',
        '{"name":"a","mood":2,"tags":[null]}',
        '{"name":"a","mood":null,"tags":[]}',
    ],
    "number": ["01", "1.", ""],
    "date": ['"2024-13-01"', '"٢٠٢٤-01-01"'],
    "choice": ['{"a":[1]}', "null"],
    "escaped name": ['{"a"\n":null}'],
    "two items": ["[null]", "true", "null,{}]"],
}


@functools.partial(jax.jit, static_argnames=("num", "max_tokens"))
def random_walks(key, automaton: TokenAutomaton, num: int, max_tokens: int):
    """Strings of tokens drawn uniformly from what `lookahead` allows; EOS from the first one on."""

    def body(carry, step_key):
        state, ended = carry
        drawn = jax.random.categorical(step_key, automaton.lookahead(state))
        token = jnp.where(ended, automaton.eos, drawn)
        ended = token == automaton.eos
        after, _ = automaton.step(state, token)
        state = jax.tree.map(lambda old, new: jnp.where(ended, old, new), state, after)
        return (state, ended), token

    carry = automaton.init(num), jnp.zeros(num, bool)
    (state, _), tokens = jax.lax.scan(body, carry, jax.random.split(key, max_tokens))
    return tokens.T, automaton.final(state)


def log_phi(automaton: TokenAutomaton, text: str) -> float:
    state, total = automaton.init(1), 0.0
    names = {value: token for token, value in enumerate(JSON_TOKENS.token_bytes)}
    for byte in text.encode():
        if bytes([byte]) not in names:
            return FORBIDDEN
        state, factor = automaton.step(state, jnp.array([names[bytes([byte])]]))
        total += float(factor[0])
    return total + float(automaton.final(state)[0])


@pytest.mark.parametrize(
    "name", [n if i < 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(SCHEMAS)]
)
def test_json_schema(name):
    free = automata.json_schema(SCHEMAS[name], JSON_TOKENS)
    automaton = free.within(Space(JSON_TOKENS.vocab_size, JSON_TOKENS.eos, 1000))
    assert [log_phi(automaton, text) for text in ACCEPTED[name]] == [0.0] * len(ACCEPTED[name])
    assert [log_phi(automaton, text) for text in REJECTED[name]] == [FORBIDDEN] * len(
        REJECTED[name]
    )

    horizon = 70
    automaton = free.within(Space(JSON_TOKENS.vocab_size, JSON_TOKENS.eos, horizon))
    tokens, final = random_walks(jax.random.key(0), automaton, num=200, max_tokens=horizon)
    assert (final == 0).all()
    drawn = [
        b"".join(JSON_TOKENS.token_bytes[t] or b"" for t in row).decode()
        for row in np.asarray(tokens).tolist()
    ]
    assert all(VALID[name](json.loads(text)) for text in drawn)


def test_json_schema_as_text_is_the_same():
    one = automata.json_schema(SCHEMAS["object"], JSON_TOKENS)
    other = automata.json_schema(json.dumps(SCHEMAS["object"]), JSON_TOKENS)
    assert all(
        (a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not JSON"),
        ("[1]", r"a schema as an object at #"),
        ({"type": "text"}, "a type among null"),
        ({"type": "integer", "nullable": True}, "got nullable; remove"),
        ({"type": "array", "contains": {}}, r"at # .* got contains"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "iri"}, r"a format among date.* at #/format"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around at position"),
        ({"type": "string", "pattern": "a)(b"}, r"unmatched \)"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength <= maxLength"),
        ({"type": "string", "minLength": "3"}, "whole number"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "some value fits"),
        ({"type": "integer", "enum": ["a"]}, "some value fits"),
        (False, "some value fits"),
        ({"enum": []}, "at least one entry"),
        ({"properties": [1]}, "an object of schemas"),
        ({"$ref": "#/$defs/none"}, "a reference to what is there"),
        ({"$ref": "other.json"}, "a reference to a place in this schema"),
        ({"$ref": "#"}, "references that lead somewhere"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "finite"),
        ({"oneOf": [{"type": "string"}, {"pattern": "a"}]}, "alternatives of which no value"),
        ({"not": {"type": "string", "pattern": "a"}}, "whose opposite can be enforced"),
        ({"$schema": "http://json-schema.org/draft-03/schema"}, "a draft among"),
        ({"items": [{}]}, "one schema"),
        ({"dependencies": {}}, r"dependencies, which says nothing"),
        ('{"type": "null", "type": "string"}', "twice"),
    ],
)
def test_unusable_schemas_are_refused(schema, message):
    with pytest.raises(ValueError, match=f"(?s)expected.*{message}"):
        automata.json_schema(schema, JSON_TOKENS)
