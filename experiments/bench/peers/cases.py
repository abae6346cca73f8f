"""The forty constraints of `constraints`, and what both libraries read differently by design."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: "regex", "schema" or "grammar"; tokens: in Latin-1, a character for a byte; strings,
    weights: why the libraries do not agree on which strings have mass, or on log-weights, if so.
    """

    kind: str
    source: Any
    tokens: tuple[str, ...]
    strings: str = ""
    weights: str = ""

    @property
    def shown(self) -> str:
        text = self.source if isinstance(self.source, str) else json.dumps(self.source)
        text = text.replace("\n", " / ")
        return text if len(text) <= 60 else f"{text[:57]}..."


def _regex(source: str, tokens: str) -> Case:
    return Case("regex", source, tuple(tokens.split(" ")))


def _schema(source: Any, tokens: str, strings: str = "", weights: str = "") -> Case:
    return Case("schema", source, tuple(tokens.split("~")), strings, weights)


def _grammar(source: str, tokens: str, strings: str = "", weights: str = "") -> Case:
    return Case("grammar", source, tuple(tokens.split("~")), strings, weights)


E = "\xc3 \xa9 \xc3\xa9"  # a character split, and whole

SPACE = "any white space there, also around the value; here one space or none, and inside"
ORDER = "names in any order there; here in the schema's"
POINTLESS = "1e1 is an integer there; here integers have digits alone"
GREEDY = "terminals take the longest match here; there any match"
IGNORED = "there one ignored terminal, in front of each; here any number, at both ends as well"
LEFT = "other strings, so another mass is left at each step"
LATE = "there a prefix may be one of no document (1e1e1, [n, {...},), so more mass is left"

CASES = [
    _regex("a|ab|abc", "a b c ab bc"),
    _regex("(ab)*", "a b ab ba aba"),
    _regex("(a|b)*abb", "a b ab bb abb"),
    _regex("a{2,5}", "a aa aaa b"),
    _regex("[0-9]{3}-[0-9]{4}", "12 3 -4 567 - 8 1"),
    _regex(r"[+-]?\d+(\.\d+)?", "+ - 1 . 2.5 .0 12"),
    _regex("(yes|no|maybe)[.!]?", "yes no may be ye s . !"),
    _regex("(?i:ok)", "o K ok OK k"),
    _regex("caf[e\xe9]", f"ca f e {E} \xa9f"),
    _regex("[a-c]*[x-z]", "a bc x yz c z"),
    _regex("(0|[1-9][0-9]?)(,(0|[1-9][0-9]?))*", "0 1 10 , 9, ,5"),
    _regex("#[0-9a-f]{6}", "# #a 0f 9 ab c12 f"),
    _regex("(a*b)*a*", "a b aab bb"),
    _regex("((a|b)(c|d)){1,2}", "a b c d ac db"),
    _regex("x=.+;", "x = x= 1 ; y;"),
    _regex("[^ab]*", "c d cd a 1"),
    _regex("(Mon|Tue|Wed)(day|sday|nesday)?", "Mon Tue W ed day s nes"),
    _regex("a?", "a b"),
    _regex("(ha){3,}", "h a ha haha ah"),
    _regex("a?b?c?d?", "a b c d ab cd bc"),
    _schema({"type": "boolean"}, "true~false~t~rue~fal~se~null"),
    _schema({"type": "integer"}, "0~1~-~12~.5~e", POINTLESS, LATE),
    _schema({"type": "number"}, "0~1~-~.5~.~e1~E+2", "", LATE),
    _schema({"type": "string", "maxLength": 3}, '"~a~ab"~bc~"a~\\n', "", LATE),
    _schema({"enum": ["red", "green", 3]}, '"~red~gre~en~3~"red"', "", LATE),
    _schema({"const": None}, "null~nu~ll~l~true"),
    _schema(
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        '{~"a"~:~true~}~ ~{"a":~ false',
        SPACE,
        LATE,
    ),
    _schema(
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1},
        "[~]~true~,~ ~false]",
        SPACE,
        LATE,
    ),
    _schema(
        {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
        '{"x":~1~,"y":~2}~{"y":~,"x":~ ',
        ORDER,
        LATE,
    ),
    _schema(
        {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]},
        "null~[~]~[]~nu~ll",
        "",
        LATE,
    ),
    _grammar('start: "(" start ")" | "x"', "(~)~x~((~))~x)"),
    _grammar('start: "a" start "b" |', "a~b~ab~aa~bb"),
    _grammar('start: item ("," item)*\nitem: "x" | "[" start "]"', "x~,~[~]~x,~]]"),
    _grammar('start: sum\nsum: sum "+" term | term\nterm: NUM\nNUM: /[0-9]+/', "1~+~12~2+~+1"),
    _grammar(
        'start: "I have " NUM "."\nNUM: /[0-9]+(\\.[0-9]+)?/',
        "I have ~3~.~.5~5.~I~ have ",
        GREEDY,
        LEFT,
    ),
    _grammar(
        'start: "if " C " then " s\ns: "go" | start\nC: /[pq]/', "if ~p~ then ~go~q then go~q"
    ),
    _grammar('start: p\np: "1" p "1" | "0" p "0" | "1" | "0"', "0~1~01~10~11"),
    _grammar('start: WORD (" " WORD)* "."\nWORD: /[a-c]+/', "a~bc~ ~.~a b~c."),
    _grammar('start: "a" "b" | "ab" "c"', "a~b~c~ab~bc", GREEDY, LEFT),
    _grammar('start: "x" ("," "x")*\n%ignore " "', "x~,~ ~x,~, x", IGNORED, LEFT),
]
