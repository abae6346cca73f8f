"""The rules of a grammar in Lark syntax, as far as it takes to see which of them derive a finite
string.

llguidance parses the grammar and says what is wrong with its syntax; it does not say that a rule
never ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from .showing import shown

Alternatives = Sequence[frozenset[str]]
"""What each alternative of a rule needs: the rules that must derive a string for the alternative to
derive one.
"""

_LEXEME = re.compile(
    r"""
      (?P<skip>(?:\#|//)[^\n]*|\s+)
    | (?P<string>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    | (?P<control><[^<>\s]+>)
    | (?P<directive>%[a-z]+)
    | (?P<rule>!?[_?]?[a-z][_a-z0-9-]*)
    | (?P<terminal>_?[A-Z][_A-Z0-9-]*)
    | (?P<number>0[xX][0-9a-fA-F]+|[0-9]+)
    | (?P<symbol>->|\.\.|::|.)
    """,
    re.VERBOSE,
)
_STATEMENTS = {"%ignore", "%import", "%override", "%declare", "%llguidance"}
_BRACED = {"%json", "%regex", "%lark", "%llguidance"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@shown
@dataclasses.dataclass(frozen=True)
class Rules:
    """A grammar's rules with their alternatives, and what it uses that is about tokens instead of
    text.

    attributes: names in the square brackets of rules; controls: control tokens such as <|im_end|>
    or <[5]>.
    """

    alternatives: Mapping[str, Alternatives]
    attributes: frozenset[str]
    controls: tuple[str, ...]

    def unproductive(self) -> list[str]:
        """The rules that derive no finite string, in the order of their definition.

        A rule is productive if all that one of its alternatives needs is productive: the least
        fixed point of this.
        """
        productive: set[str] = set()
        while True:
            found = {
                name
                for name, alternatives in self.alternatives.items()
                if any(needs <= productive for needs in alternatives)
            }
            if found == productive:
                return [
                    name
                    for name in self.alternatives
                    if name not in found and not name.startswith("(")
                ]
            productive = found


def read(lark: str) -> Rules:
    """The rules of a grammar that llguidance accepts; of any other text, something
    without meaning.
    """
    return _Reader(lark).read()


class _Reader:
    """Reads lexemes from left to right; groups become rules of their own, named "(1", "(2", ..."""

    def __init__(self, lark: str) -> None:
        lexemes = [(match.lastgroup, match.group()) for match in _LEXEME.finditer(lark)]
        self.lexemes = [(kind or "", text) for kind, text in lexemes if kind != "skip"]
        self.at = 0
        self.rules: dict[str, Alternatives] = {}
        self.attributes: set[str] = set()
        self.groups = (f"({number}" for number in itertools.count(1))

    def read(self) -> Rules:
        while self.at < len(self.lexemes):
            body = self._body_of_definition()
            if body is None:
                self._skip_one()
                continue
            name, self.at = self._name(), body
            self.rules[name] = self._alternatives()
        known = {name: self._known(alternatives) for name, alternatives in self.rules.items()}
        controls = tuple(text for kind, text in self.lexemes if kind == "control")
        return Rules(known, frozenset(self.attributes), controls)

    def _known(self, alternatives: Alternatives) -> Alternatives:
        """Without the rules that are not defined here: imported ones are taken to be productive."""
        return [needs.intersection(self.rules) for needs in alternatives]

    def _text(self, at: int) -> str:
        return self.lexemes[at][1] if at < len(self.lexemes) else ""

    def _name(self) -> str:
        """The name at this position, without Lark's marks for trees."""
        return self._text(self.at).lstrip("!?")

    def _balanced(self, at: int) -> int:
        """The position after the bracket that closes the one at `at`."""
        opening, depth = self._text(at), 0
        while at < len(self.lexemes):
            depth += (self._text(at) == opening) - (self._text(at) == _CLOSING[opening])
            at += 1
            if not depth:
                break
        return at

    def _skip_one(self) -> None:
        braced = self._text(self.at) in _BRACED
        self.at += 1
        if braced and self._text(self.at) == "{":
            self.at = self._balanced(self.at)

    def _body_of_definition(self) -> int | None:
        """Where the alternatives start of the definition that starts here; None if none does."""
        if self.at >= len(self.lexemes) or self.lexemes[self.at][0] not in ("rule", "terminal"):
            return None
        at = self.at + 1
        if self._text(at) == "::":
            at += 2
        if self._text(at) == ".":
            at += 2
        attributes = range(at, at)
        if self._text(at) == "[":
            attributes, at = range(at, self._balanced(at)), self._balanced(at)
        if self._text(at) != ":":
            return None
        self.attributes |= {self._text(i) for i in attributes if self.lexemes[i][0] == "rule"}
        return at + 1

    def _alternatives(self) -> Alternatives:
        """Up to a closing bracket, a statement, the next definition or the end."""
        found: list[frozenset[str]] = [frozenset()]
        while self.at < len(self.lexemes):
            text = self._text(self.at)
            if text in (")", "]", *_STATEMENTS) or self._body_of_definition() is not None:
                break
            if text == "|":
                self.at += 1
                found.append(frozenset())
            else:
                found[-1] |= self._item()
        return found

    def _item(self) -> frozenset[str]:
        """What the item at this position needs; strings, regular expressions and terminals need
        nothing.
        """
        kind, text = self.lexemes[self.at]
        needs: frozenset[str] = frozenset()
        if text in ("(", "["):
            name = next(self.groups)
            self.at += 1
            self.rules[name] = self._alternatives()
            self.at += 1
            needs = frozenset([name] if text == "(" else [])
        elif text == "->":
            self.at += 2
        elif text == "%if":
            self.at += 2
            self._arguments()
        else:
            if kind == "rule":
                needs = frozenset([self._name()])
            self._skip_one()
            if self._text(self.at) == "::":
                self.at += 2
                self._arguments()
        return frozenset() if self._may_be_absent() else needs

    def _arguments(self) -> None:
        if self._text(self.at) == "(":
            self.at = self._balanced(self.at)

    def _may_be_absent(self) -> bool:
        """Reads a repetition; whether it allows for none."""
        text, following = self._text(self.at), self._text(self.at + 1)
        if text in ("?", "*"):
            self.at += 1
            return True
        if text == "~":
            self.at += 2
            if self._text(self.at) == "..":
                self.at += 2
            return following == "0"
        if text == "{":
            self.at = self._balanced(self.at)
            return following in ("0", ",")
        return False
