"""The regular expressions of pre-tokenizers as programs, matched leftmost-first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ppl.showing import shown


@shown
class Op(NamedTuple):
    """An instruction: "set" and "unless" (the next character is none of a set) with the set's
    name, "split" to two places, the first preferred, "jump", "match".
    """

    kind: str
    name: str = ""
    to: tuple[int, ...] = ()


class Pattern:
    """A regular expression as a program.

    Raises:
        ValueError: if it uses what is not understood here.
    """

    def __init__(self, pattern: str) -> None:
        self.text, self.at, self.fold = pattern, 0, False
        self.ops: list[Op] = []
        self._alternatives()
        if self.at < len(pattern):
            raise self._refusal("an unmatched )")
        self.ops.append(Op("match"))

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            "expected a pre-tokenizer's expression of sets, groups, repetitions and negative"
            f" look-ahead of one character, got {what} at position {self.at} of {self.text!r}; pass"
            " canonical=False"
        )

    def _peek(self, *options: str) -> str:
        """The option that comes next, taken; "" if none does."""
        for option in options:
            if self.text.startswith(option, self.at):
                self.at += len(option)
                return option
        return ""

    def _alternatives(self) -> None:
        start, ends = len(self.ops), []
        self._sequence()
        while self._peek("|"):
            # A split in front of what has been written so far, which moves by one.
            self._insert(start)
            ends.append(len(self.ops))
            self.ops.append(Op("jump"))
            self.ops[start] = Op("split", to=(start + 1, len(self.ops)))
            start = len(self.ops)
            self._sequence()
        for end in ends:
            self.ops[end] = Op("jump", to=(len(self.ops),))

    def _insert(self, place: int) -> None:
        """Room for an instruction; what comes behind is relocated."""
        moved = [
            op._replace(to=tuple(to + (to >= place) for to in op.to)) for op in self.ops[place:]
        ]
        self.ops[place:] = [Op("jump"), *moved]

    def _sequence(self) -> None:
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start = len(self.ops)
            self._atom()
            self._repetition(start)

    def _repetition(self, start: int) -> None:
        least, most = self._bounds()
        if (least, most) == (1, 1):
            return
        lazy = bool(self._peek("?"))
        if self._peek("+"):
            raise self._refusal("a possessive repetition")
        body = self.ops[start:]
        del self.ops[start:]
        for _ in range(least):
            self._append(body, start)
        if most is None:
            place = len(self.ops)
            self.ops.append(Op("jump"))
            self._append(body, start)
            self.ops.append(Op("jump", to=(place,)))
            self._split(place, lazy)
            return
        places = []
        for _ in range(most - least):
            places.append(len(self.ops))
            self.ops.append(Op("jump"))
            self._append(body, start)
        for place in places:
            self._split(place, lazy)

    def _split(self, place: int, lazy: bool) -> None:
        inner, outer = place + 1, len(self.ops)
        self.ops[place] = Op("split", to=(outer, inner) if lazy else (inner, outer))

    def _append(self, body: Sequence[Op], start: int) -> None:
        shift = len(self.ops) - start
        self.ops += [op._replace(to=tuple(to + shift for to in op.to)) for op in body]

    def _bounds(self) -> tuple[int, int | None]:
        if mark := self._peek("?", "*", "+"):
            return {"?": (0, 1), "*": (0, None), "+": (1, None)}[mark]
        if not self._peek("{"):
            return 1, 1
        end = self.text.index("}", self.at)
        low, comma, high = self.text[self.at : end].partition(",")
        self.at = end + 1
        least = int(low or 0)
        return least, (int(high) if high else None) if comma else least

    def _atom(self) -> None:
        start = self.at
        if self._peek("(?!"):
            self.ops.append(Op("unless", self._set()))
            if not self._peek(")"):
                raise self._refusal("look-ahead of more than one character")
        elif self._peek("(?i:", "(?:", "("):
            fold, self.fold = self.fold, self.text[start : start + 4] == "(?i:" or self.fold
            if self.text.startswith("?", self.at):
                raise self._refusal("a group of an unknown kind")
            self._alternatives()
            if not self._peek(")"):
                raise self._refusal("an unclosed group")
            self.fold = fold
        else:
            self.ops.append(Op("set", self._set()))

    def _set(self) -> str:
        """The name of a set of characters: the expression that matches just one of them."""
        start, head = self.at, self.text[self.at]
        if head == "\\":
            self.at += 2
            if self.text[start + 1] in "pP":
                self.at = self.text.index("}", self.at) + 1
            elif self.text[start + 1] not in "sSdDrnt" and self.text[start + 1].isalnum():
                raise self._refusal("an escape of an unknown kind")
        elif head == "[":
            self.at += 1
            while self.text[self.at] != "]":
                if self.text[self.at] == "[" or self.text.startswith("&&", self.at):
                    raise self._refusal("a set of sets")
                self.at += 2 if self.text[self.at] == "\\" else 1
            self.at += 1
        elif head in "^$*+?{":
            raise self._refusal(repr(head))
        else:
            self.at += 1
        found = self.text[start : self.at]
        return f"(?i:{found})" if self.fold else found
