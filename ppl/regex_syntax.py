r"""How a regular expression of Rust's regex crate is built, as far as it takes to match whole
strings with it.

In a full match ^ and $ at the edges of an alternative say what holds anyway, so they are left out;
anywhere else an anchor would change the language in silence, since the automaton knows no edges
(`byte_dfa`).  So would "a)(b", which becomes valid by being put in a group.  What Python's re reads
in another way than Rust is refused, or, where Rust's way is of use (`[a-z&&[^aeiou]]`), told.
"""

from __future__ import annotations

import dataclasses
import re
import string
import warnings
from collections.abc import Sequence

from .showing import shown

MAX_DEPTH = 250
"""Of groups, Rust's own limit."""

_EDGES = {"^": "^", "$": "$", "\\A": "^", "\\z": "$", "\\Z": "$"}
_WORDS = {"\\b", "\\B", "\\<", "\\>"}
_ESCAPE = re.compile(r"\\(?:[xuUpP]\{[^}]*\}|.)", re.DOTALL)
_FLAGS = re.compile(r"\(\?([a-zA-Z]*)(?:-([a-zA-Z]*))?([:)])")
_GROUP = re.compile(r"\((?:\?(?:P?<\w[^>]*>|[a-zA-Z-]*:))?")
_TIMES = re.compile(r"[*+?]\??|\{\s*\d+\s*(?:,\s*\d*\s*)?\}\??")
_POSIX = re.compile(r"\[:\^?[a-z]+:\]")
_REFUSED = (
    (r"\(\?<?[=!]", "look-around", ""),
    (r"\(\?>", "an atomic group", "write (?:...)"),
    (r"\(\?P=", "a back-reference ({})", "write out what it stands for"),
    (r"\(\?\(", "a condition ({})", "write out both cases as alternatives"),
    (r"\(\?#", "a comment in a group ({})", "leave it out, or write (?x) and # comments"),
)
_REMEDIES = {
    "repetition operator missing expression": r"write \{, \*, \+ or \? for the character itself",
    "repetition quantifier expects a valid decimal": r"write {0,n} for at most n, \{ for a brace",
    "unclosed counted repetition": r"write \{ for a brace",
    "unclosed character class": r"write \[ for a bracket inside of [...]",
    "invalid escape sequence found in character class": r"write \x08 for a backspace",
    "unrecognized flag": "Rust's flags are i, m, s, R, U, u, x; (?-u:...) has ASCII classes",
    "unrecognized escape sequence": r"write the character itself, or \x{...}",
}


class Unusable(ValueError):
    """A pattern of which no automaton can be made; its text says what, where, and the remedy."""


@dataclasses.dataclass
class _Piece:
    """What a repetition repeats: an anchor ("^" or "$"), a group, or anything else ("")."""

    start: int
    end: int
    what: str | _Group = ""
    times: str = ""


@dataclasses.dataclass
class _Group:
    """Alternatives, and whether spaces are left out where they end (flag x)."""

    verbose: bool
    alternatives: list[list[_Piece]] = dataclasses.field(default_factory=lambda: [[]])


@shown
@dataclasses.dataclass(frozen=True)
class Syntax:
    """A pattern read.

    Attributes:
        body: the pattern without anchors at its edges and without comments, which would hide what
            is put behind them.
        doubtful: what Rust reads in one way and Python's re in another, and where.
    """

    body: str
    doubtful: tuple[str, ...]


def read(pattern: str) -> Syntax:
    """The pattern, ready to be put in a group.

    Raises:
        Unusable: for look-around, back-references, word boundaries, anchors in the middle, and what
            Python's re and Rust read in two ways; not for all that Rust refuses.
    """
    return _Reader(pattern).read()


def problem(pattern: str, at: int, what: str, remedy: str = "") -> Unusable:
    """What is wrong at a position, with what stands there."""
    rest = pattern[at : at + 12]
    shown = rest + "..." * (at + 12 < len(pattern))
    remedy = remedy or _REMEDIES.get(what) or "rewrite that part"
    return Unusable(f"{what} at position {at}, at {shown!r}; {remedy}")


def _python_reads(pattern: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def refusal(pattern: str, message: str) -> Unusable | None:
    """The fault that Rust found, whose message (llguidance's) has carets below it; None if none.

    The message shows the pattern as one line between slashes, where some characters take two.
    """
    found = re.search(r"\n {4}( *)\^+\nerror: (.*)", message)
    if found is None:
        return None
    column, escaped = len(found[1]), False
    for at, char in enumerate(pattern):
        column -= 2 if char in "/\n\r\t" and not escaped else 1
        escaped = char == "\\" and not escaped
        if column < 0:
            return problem(pattern, at, found[2])
    return problem(pattern, len(pattern), found[2])


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0
        self.groups = [_Group(verbose=False)]
        self.anchors: list[_Piece] = []
        self.cuts: set[tuple[int, int]] = set()
        self.doubtful: list[str] = []

    def read(self) -> Syntax:
        for at, char in enumerate(self.pattern):
            if 0xD800 <= ord(char) < 0xE000:
                raise self.problem(at, "half a surrogate pair", "write the whole character")
        while self.at < len(self.pattern):
            self.next()
        for anchor in ("^", "$"):
            self.strip(self.groups[0], anchor)
        for piece in self.anchors:
            if (piece.start, piece.end) not in self.cuts:
                name = self.pattern[piece.start : piece.end]
                remedy = "move it to an edge of its alternative, where it says nothing, or drop it"
                raise self.problem(piece.start, f"an anchor ({name}) in the middle", remedy)
        kept, last = [], 0
        for start, end in sorted(self.cuts):
            kept.append(self.pattern[last:start])
            last = end
        body = "".join(kept) + self.pattern[last:]
        doubtful = self.doubtful if self.doubtful and _python_reads(self.pattern) else []
        return Syntax(body, tuple(doubtful))

    def problem(self, at: int, what: str, remedy: str = "") -> Unusable:
        return problem(self.pattern, at, what, remedy)

    def next(self) -> None:
        """Read one thing."""
        char, group = self.pattern[self.at], self.groups[-1]
        if group.verbose and (char.isspace() or char == "#"):
            self.space()
        elif char == "|":
            group.alternatives.append([])
            self.at += 1
        elif char == "(":
            self.open()
        elif char == ")":
            self.close()
        elif times := _TIMES.match(self.pattern, self.at):
            self.repeat(times)
        elif char == "\\":
            self.escape()
        elif char == "[":
            self.add(self.bracket())
        else:
            self.add(self.at + 1, _EDGES.get(char, ""))

    def add(self, end: int, what: str | _Group = "") -> None:
        piece = _Piece(self.at, end, what)
        self.groups[-1].alternatives[-1].append(piece)
        if what in ("^", "$"):
            self.anchors.append(piece)
        self.at = end

    def space(self) -> None:
        if (char := self.pattern[self.at]) != "#":
            if char not in string.whitespace:
                self.doubt(self.at, "a space beyond ASCII, which is left out under (?x)")
            self.at += 1
            return
        end = self.pattern.find("\n", self.at)
        end = len(self.pattern) if end < 0 else end
        self.cuts.add((self.at, end))
        self.at = end

    def open(self) -> None:
        for shape, what, remedy in _REFUSED:
            if found := re.compile(shape).match(self.pattern, self.at):
                raise self.problem(self.at, what.format(found[0]), remedy)
        group = self.groups[-1]
        verbose = group.verbose
        flags = _FLAGS.match(self.pattern, self.at)
        if flags:
            verbose = (verbose or "x" in flags[1]) and "x" not in (flags[2] or "")
        if flags and flags[3] == ")":
            group.verbose, self.at = verbose, flags.end()
            return
        if len(self.groups) > MAX_DEPTH:
            raise self.problem(self.at, f"more than {MAX_DEPTH} groups inside of each other")
        inner = _Group(verbose)
        start = _GROUP.match(self.pattern, self.at)
        self.add(start.end() if start else self.at + 1, inner)
        self.groups.append(inner)

    def close(self) -> None:
        if len(self.groups) == 1:
            raise self.problem(self.at, "an unmatched )", r"write \) for the character itself")
        self.groups.pop()
        self.at += 1

    def repeat(self, times: re.Match[str]) -> None:
        if re.search(r"\s", times[0]):
            remedy = "leave them out (Python's re reads this as plain text)"
            raise self.problem(self.at, "spaces in a repetition", remedy)
        pieces = self.groups[-1].alternatives[-1]
        if self.pattern.startswith("+", times.end()) and not times[0].endswith("?", 1):
            remedy = "write the repetition once, as nothing is possessive here"
            raise self.problem(self.at, "a possessive repetition", remedy)
        if pieces and pieces[-1].what in ("^", "$"):
            raise self.problem(pieces[-1].start, "a repeated anchor", "leave it out")
        if pieces:
            pieces[-1].times += times[0]
        self.at = times.end()

    def escape(self) -> None:
        found = _ESCAPE.match(self.pattern, self.at)
        if found is None:
            raise self.problem(self.at, r"a \ at the end", r"write \\ for the character itself")
        name = found[0]
        if name in _WORDS:
            raise self.problem(self.at, f"a word boundary ({name})", "write out what stands there")
        if name == "\\0":
            raise self.problem(self.at, "an octal number", r"write it in hexadecimal, as \x00")
        if name[1:] in "123456789":
            remedy = "write out what it stands for"
            raise self.problem(self.at, f"a back-reference ({name})", remedy)
        self.add(found.end(), _EDGES.get(name, ""))

    def bracket(self) -> int:
        """Where the class ends that starts here; classes may be nested."""
        at, depth = self.at, 0
        while at < len(self.pattern):
            char, posix = self.pattern[at], _POSIX.match(self.pattern, at)
            if char == "\\":
                at += 2
            elif depth and posix:
                at = posix.end()
            elif char == "[":
                if depth:
                    self.doubt(at, "a [ inside of a class, which opens another")
                depth += 1
                at += 1 + self.pattern.startswith("^", at + 1)
                at += self.pattern.startswith("]", at)
            elif char == "]":
                depth, at = depth - 1, at + 1
                if not depth:
                    break
            elif self.groups[-1].verbose and (char.isspace() or char == "#"):
                self.doubt(at, "spaces and comments in a class, which are left out under (?x)")
                end = self.pattern.find("\n", at) if char == "#" else at
                at = len(self.pattern) if end < 0 else end + 1
            else:
                double = self.pattern[at : at + 2]
                if double in ("&&", "--", "~~"):
                    self.doubt(at, f"{double} in a class, an operation on sets")
                at += 1 + (double in ("&&", "--", "~~"))
        return min(at, len(self.pattern))

    def doubt(self, at: int, what: str) -> None:
        self.doubtful.append(f"{what}, at position {at}")

    def strip(self, group: _Group, anchor: str) -> None:
        """Cut an anchor from the edge of every alternative, and of groups that stand there."""
        for pieces in group.alternatives:
            edge = self.edge(pieces, anchor)
            if edge is not None and isinstance(edge.what, _Group) and edge.times in ("", "?", "??"):
                self.strip(edge.what, anchor)

    def edge(self, pieces: Sequence[_Piece], anchor: str) -> _Piece | None:
        """The outermost piece, once the anchors are cut that say nothing there."""
        left = [piece for piece in pieces if (piece.start, piece.end) not in self.cuts]
        for piece in left if anchor == "^" else reversed(left):
            if piece.what != anchor:
                return piece
            self.cuts.add((piece.start, piece.end))
        return None
