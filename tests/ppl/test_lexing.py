"""What the lexer makes of grammars, against regular expressions of the same language."""

from __future__ import annotations

import itertools
import re

import pytest

import ppl
from ppl import context_free, grammar_rules, lexing, token_tables
from tests.ppl.test_automata import TOKENS

CHARACTERS = 'ab1.," \nI'
VOCABULARY = token_tables.vocabulary(tuple(char.encode() for char in CHARACTERS) + (None,), 9)
NUM = "\nNUM: /1+(\\.1+)?/"

GRAMMARS = {
    'start: "I" NUM "."' + NUM: r"I1+(\.1+)?\.",
    'start: "I" num "."\nnum: ONES ["." ONES]\nONES: /1+/': r"I1+(\.1+)?\.",
    'start: NUM DOT\nDOT: "."' + NUM: r"1+(\.1+)?\.",
    "start: x* DOT\nx: NUM GAP\nGAP: / */\nDOT: /[.]/" + NUM: r"(1+(\.1+)? *)*\.",
    'start: (NUM " "?) ("," | ".")' + NUM: r"1+(\.1+)? ?[,.]",
    'start: (NUM | ".")+' + NUM: r"(1+(\.1+)?|\.)+",
    'start: NUM GAP "."\nGAP: / */' + NUM: r"1+(\.1+)? *\.",
    'start: NUM ("," NUM)*' + NUM: r"1+(\.1+)?(,1+(\.1+)?)*",
    "start: NUM+" + NUM: r"(1+(\.1+)?)+",
    'start: A "b"\nA: "a" | "ab"': "(a|ab)b",
    'start: A "b"\nA: "a" | "a" "b"+': "ab*b",
    'start: A "B"i\nA: /a[b]?/': "(a|ab)[bB]",
    'start: A "ab"\nA: /(ab)+/': "(ab)+ab",
    'start: A "a."\nA: /(ab)+/': r"(ab)+a\.",
    'start: A "ba"\nA: /(ab)+/': "(ab)+ba",
    'start: (/[ab]+/ ",")* "."': r"([ab]+,)*\.",
    'start: /[^,]+/ ("," /[^,]+/)*': r"[^,]+(,[^,]+)*",
    'start: x ","\nx[lazy]: /a+,/': "a+,,",
    'start: "\\"" /[^"]*/ "\\""': r'"[^"]*"',
    '%import common.INT\nstart: INT "."': r"1+\.",
    '%import common.INT\nstart: INT "1"': "1+1",
    'start: "a" | "b"\n%ignore " "': " *[ab] *",
    'start: "a" start? "b"\n%ignore / +/': " *a *(a *b *)?b *",
    'start: ["a"] "."?\n%ignore " " | /\\n/ // spaces': r"[ \n]*(a[ \n]*)?(\.[ \n]*)?",
    'start: "a"\n%import common.WS_INLINE\n%ignore WS_INLINE\n%ignore /,/': "[ ,]*a[ ,]*",
    '%llguidance {"ignore_once": true}\n%ignore / {1,2}/\nstart: "a" "b"': " {,2}a {,2}b {,2}",
    'start: NUM "."\n%ignore " "' + NUM: r" *1+(\.1+)? *\. *",
}
READ_ON = {
    'start: "I" NUM "."' + NUM: 'NUM, which can read on where "." may follow',
    'start: NUM DOT\nDOT: "."' + NUM: 'NUM, which .*"[.]"',
    'start: (NUM " "?) ("," | ".")' + NUM: 'NUM, which .* where "[.]" may',
    'start: (NUM | ".")+' + NUM: 'NUM, which .*"[.]"',
    'start: NUM GAP "."\nGAP: / */' + NUM: 'NUM, which .*"[.]"',
    'start: A "b"\nA: "a" | "ab"': 'A, which .*"b"',
    'start: A "b"\nA: "a" | "a" "b"+': 'A, which .*"b"',
    'start: A "B"i\nA: /a[b]?/': 'A, which .*"B"i',
    'start: A "ab"\nA: /(ab)+/': 'A, which .*"ab"',
    'start: A "a."\nA: /(ab)+/': 'A, which .*"a."',
    '%import common.INT\nstart: INT "1"': 'INT, which .*"1"',
    'start: NUM "."\n%ignore " "' + NUM: 'NUM, which .*"[.]"',
}
UNSAID = {"start: x* DOT\nx: NUM GAP\nGAP: / */\nDOT: /[.]/" + NUM}
"""What follows is not a string."""


def derives(lark: str, text: str) -> bool:
    parser = context_free._parsers(lark, VOCABULARY).root.deep_copy()
    tokens = [CHARACTERS.index(char) for char in text]
    return parser.try_consume_tokens(tokens) == len(tokens) and parser.is_accepting()


@pytest.mark.parametrize("lark", GRAMMARS)
def test_a_warning_is_given_where_a_text_is_refused(lark):
    compiled = re.compile(GRAMMARS[lark])
    used = [char for char in CHARACTERS if char in lark + GRAMMARS[lark]]
    texts = ["".join(text) for n in range(5) for text in itertools.product(used, repeat=n)]
    matched = {text for text in texts if compiled.fullmatch(text)}
    derived = {text for text in texts if derives(lark, text)}
    assert matched and derived <= matched
    assert (derived < matched) == (lark in READ_ON or lark in UNSAID)
    warnings = lexing.greedy(lark)
    assert len(warnings) == (lark in READ_ON)
    assert all(re.search(READ_ON[lark], warning) for warning in warnings)


def test_words_that_are_parted_by_what_is_ignored_need_no_warning():
    lark = 'start: "let" NAME "in" NAME\nNAME: /[a-z]+/'
    assert lexing.greedy(lark) and not lexing.greedy(lark + "\n%ignore / +/")


def test_the_grammar_of_the_docstring_warns_and_its_remedy_does_not():
    with pytest.warns(UserWarning, match=r"^expected terminals that end .* NUM, which .*; make it"):
        ppl.grammar('start: "a" NUM "."\nNUM: /[0-9]+(\\.[0-9]+)?/', TOKENS)
    mended = 'start: "a" num "."\nnum: DIGITS ["." DIGITS]\nDIGITS: /[0-9]+/'
    ppl.grammar(mended, TOKENS)
    assert not lexing.greedy(mended)


def test_names_of_the_grammar_are_left_alone():
    lark = 'start: text IGNORED start?\ntext: "a"\nIGNORED: "b"\n%ignore " "'
    read = grammar_rules.read(lexing.prepared(lark))
    assert read.alternatives.keys() == {"start", "text_t", "text", "IGNORED", "IGNORED_I"} | {
        name for name in read.alternatives if name.startswith("(")
    }
    assert [derives(lark, text) for text in ("ab", " a b ab ", "a")] == [True, True, False]
