"""Which rules derive a finite string, on grammars whose answer is known by hand."""

from __future__ import annotations

import llguidance
import pytest

from ppl import grammar_rules

GRAMMARS = {
    'start: "a" start': ["start"],
    'start: "a" start | "b"': [],
    'start: "a" start?': [],
    'start: "a" start*': [],
    'start: "a" start+': ["start"],
    'start: "a" [start]': [],
    'start: "a" (start)': ["start"],
    'start: "a" (start | "b")': [],
    'start: "a" (start "b")?': [],
    'start: "a" start{0,3}': [],
    'start: "a" start{,3}': [],
    'start: "a" start{1,3}': ["start"],
    'start: "a" start~0..2': [],
    'start: "a" start~2': ["start"],
    'start: left | right\nleft: "(" right\nright: left ")"': ["start", "left", "right"],
    'start: "b" | bad\nbad: "a" bad': ["bad"],
    'start: a b\na: "x"\nb: b "y"\n': ["start", "b"],
    'start: a\n     | "x"  // start\n# bad: bad\n?a: /[#:]\\/ b: b/ a': ["a"],
    'start: "\\"start: start" TERM\nTERM: /a/ | OTHER "b"\nOTHER: "c"': [],
    "start[capture]: inner\ninner[lazy]: /a*b/": [],
    'start: %json {"type": "object", "start": ["{"]} tail\ntail: "x" tail': ["start", "tail"],
    'start: "a" -> first\n     | start "b" -> second': [],
    '%import common.INT\n%ignore / +/\nstart: INT | "(" start ")"': [],
    'start: p::0x0\np::_: "" %if is_ones([0:3])\n | "a" p::set_bit(0) %if bit_clear(0)': [],
    'start: p::0x0\np::_: "a" p::set_bit(0) %if bit_clear(0)': ["start", "p"],
    "start: ": [],
}


@pytest.mark.parametrize("lark", GRAMMARS)
def test_rules_that_never_end_are_found(lark):
    assert llguidance.LLMatcher.validate_grammar(lark) == "", "the example itself is not a grammar"
    assert grammar_rules.read(lark).unproductive() == GRAMMARS[lark]


def test_what_speaks_of_tokens_is_found():
    rules = grammar_rules.read(
        'start: x <|im_end|> <[5]> "<b>" /<c>/ y\nx[stop="b", capture]: /a*/\ny: "a"'
    )
    assert rules.controls == ("<|im_end|>", "<[5]>")
    assert rules.attributes == {"stop", "capture"}


def test_text_that_is_no_grammar_is_read_to_its_end():
    for text in [
        "",
        "start",
        "start:",
        'start: "a',
        "start: (",
        "start[",
        ":::",
        "%json {",
        "start: a ) b",
        "( | ->",
    ]:
        rules = grammar_rules.read(text)
        assert set(rules.unproductive()) <= rules.alternatives.keys(), text
