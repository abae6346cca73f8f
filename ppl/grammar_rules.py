"""The rules of a grammar in Lark syntax, as far as it takes to see which of them derive a finite
string, and what may follow what.

llguidance parses the grammar and says what is wrong with its syntax; it does not say that a rule
never ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from .showing import shown


@shown
@dataclasses.dataclass(frozen=True)
class Item:
    """A part of an alternative.

    kind: "rule" (groups included), "terminal", "string", "regex", or what the rest is to the
    reader; text: its name or source; absent, again: whether it may be left out, or follow itself.
    """

    kind: str
    text: str
    absent: bool = False
    again: bool = False


Alternatives = Sequence[Sequence[Item]]

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
_LAZY = {"lazy", "stop", "suffix"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@shown
@dataclasses.dataclass(frozen=True)
class Rules:
    """A grammar's rules with their alternatives, and what it uses that is about tokens instead of
    text.

    alternatives: of rules, groups and terminals; sources: the text of each definition; attributes:
    names in the square brackets of rules; controls: control tokens such as <|im_end|> or <[5]>;
    lazy: rules whose terminal stops as soon as it can; ignored, imports: the text of %ignore and
    %import; starts: where the rule start is named, from and to.
    """

    alternatives: Mapping[str, Alternatives]
    sources: Mapping[str, str]
    attributes: frozenset[str]
    controls: tuple[str, ...]
    lazy: frozenset[str]
    ignored: tuple[str, ...]
    imports: tuple[str, ...]
    starts: tuple[tuple[int, int], ...]

    def unproductive(self) -> list[str]:
        """The rules that derive no finite string, in the order of their definition.

        A rule is productive if all that one of its alternatives needs is productive: the least
        fixed point of this.  Imported rules are taken to be.
        """
        productive: set[str] = set()

        def ends(item: Item) -> bool:
            known = item.kind == "rule" and item.text in self.alternatives
            return item.absent or not known or item.text in productive

        while True:
            found = {
                name
                for name, alternatives in self.alternatives.items()
                if any(all(map(ends, items)) for items in alternatives)
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
        found = [match for match in _LEXEME.finditer(lark) if match.lastgroup != "skip"]
        self.lark, self.spans = lark, [match.span() for match in found]
        self.lexemes = [(match.lastgroup or "", match.group()) for match in found]
        self.at = 0
        self.rules: dict[str, Alternatives] = {}
        self.sources: dict[str, str] = {}
        self.attributes: set[str] = set()
        self.lazy: set[str] = set()
        self.statements: dict[str, list[str]] = {"%ignore": [], "%import": []}
        self.starts: list[tuple[int, int]] = []
        self.groups = (f"({number}" for number in itertools.count(1))

    def read(self) -> Rules:
        while self.at < len(self.lexemes):
            body = self._body_of_definition()
            first, statement = self.at, self._text(self.at)
            if body is not None:
                name = self._name()
                self.at = body
                self.rules[name] = self._alternatives()
                self.sources[name] = self._source(body)
            elif statement in self.statements:
                self._skip_one()
                while self.at < len(self.lexemes) and not self._begins():
                    self._skip_one()
                self.statements[statement].append(self._source(first + 1))
            else:
                self._skip_one()
        return Rules(
            self.rules,
            self.sources,
            frozenset(self.attributes),
            tuple(text for kind, text in self.lexemes if kind == "control"),
            frozenset(self.lazy),
            tuple(self.statements["%ignore"]),
            tuple(self.statements["%import"]),
            tuple(self.starts),
        )

    def _begins(self) -> bool:
        """Whether a statement or a definition begins here."""
        return self._text(self.at) in _STATEMENTS or self._body_of_definition() is not None

    def _source(self, first: int) -> str:
        """The text from a lexeme to the one before this."""
        if first >= self.at:
            return ""
        last = min(self.at, len(self.spans)) - 1
        return self.lark[self.spans[first][0] : self.spans[last][1]]

    def _text(self, at: int) -> str:
        return self.lexemes[at][1] if at < len(self.lexemes) else ""

    def _name(self) -> str:
        """The name at this position, without Lark's marks for trees."""
        name = self._text(self.at).lstrip("!?")
        if name == "start":
            end = self.spans[self.at][1]
            self.starts.append((end - len(name), end))
        return name

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
        named = {self._text(i) for i in attributes if self.lexemes[i][0] == "rule"}
        self.attributes |= named
        if named & _LAZY:
            self.lazy.add(self._text(self.at).lstrip("!?"))
        return at + 1

    def _alternatives(self) -> Alternatives:
        """Up to a closing bracket, a statement, the next definition or the end."""
        found: list[list[Item]] = [[]]
        while self.at < len(self.lexemes):
            text = self._text(self.at)
            if text in (")", "]") or self._begins():
                break
            if text == "|":
                self.at += 1
                found.append([])
            elif text in ("->", "%if"):
                self.at += 2
                if text == "%if":
                    self._arguments()
            else:
                found[-1].append(self._item())
        return found

    def _item(self) -> Item:
        kind, text = self.lexemes[self.at]
        if bracket := text if text in ("(", "[") else "":
            kind, text = "rule", next(self.groups)
            self.at += 1
            self.rules[text] = self._alternatives()
            self.at += 1
        else:
            text = self._name() if kind == "rule" else text
            self._skip_one()
            if self._text(self.at) == "::":
                self.at += 2
                self._arguments()
        absent, again = self._times()
        return Item(kind, text, absent or bracket == "[", again)

    def _arguments(self) -> None:
        if self._text(self.at) == "(":
            self.at = self._balanced(self.at)

    def _times(self) -> tuple[bool, bool]:
        """Reads a repetition: whether it allows for none, and for more than one."""
        first, text = self.at, self._text(self.at)
        if text in ("?", "*", "+"):
            self.at += 1
            return text != "+", text != "?"
        if text == "~":
            self.at += 2
            if self._text(self.at) == "..":
                self.at += 2
        elif text == "{":
            self.at = self._balanced(self.at)
        else:
            return False, False
        inside = [self._text(at) for at in range(first + 1, self.at)]
        inside = [text for text in inside if text != "}"] or [","]
        return inside[0] in ("0", ","), inside[-1] not in ("0", "1")
