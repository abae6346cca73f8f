"""Where a pre-tokenizer splits a text, as an automaton over bytes and the ends of tokens.

A pre-tokenizer cuts a text into pieces by regular expressions, and each piece is encoded by itself.
A string of tokens is the tokenizer's own only if every cut falls between two tokens; that is
followed here while the tokens are read.  Whether there is a cut may depend on what comes later (a
run of spaces leaves its last one to the word behind it, if there is one), so a state is the set of
all guesses that nothing has disproved yet: where the last cut is, which alternatives of the
expression are still open, and which must not match any more because a cut was made before they
ended.  Of these guesses at most one is true in the end.

The expressions are matched as their engine does it, leftmost-first, by lists of threads in order of
priority.  Which characters are letters, digits or spaces is asked of the engine itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Regex, pre_tokenizers

from ppl.segmentation import BYTE, CUT, FREE, Automaton, minimal, started

from .patterns import Pattern

CODE_POINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)
END = -1

Threads = tuple[int, ...]
Guess = tuple[tuple[Threads, frozenset[Threads]], ...]
"""Of each level: the threads of the piece begun, and those of pieces before that may not match."""

NUMERIC = r"\p{numeric}"
"""The set that `pre_tokenizers.Digits` cuts at, perhaps not quite the engine's \\p{N}."""


EMPTY_PLANES = [range(0x40000, 0xE0000), range(0xF0000, 0x110000)]
"""Planes without characters, and of private ones: the first of each stands for all."""
PART = r"\\[pP]\{[^}]*\}|[^\\]-[^\\]|\\.|."
"""What a set in brackets is made of: properties, ranges, escapes, characters."""
BLOCK = 4096
"""Characters asked about at a time: an engine takes more than proportionally long for more."""


@functools.cache
def _text() -> tuple[str, Int[np.ndarray, " C"]]:
    """Characters in one text, and their code points."""
    left_out = [np.arange(plane[1], plane[-1] + 1) for plane in EMPTY_PLANES]
    surrogates = np.arange(SURROGATES.start, SURROGATES.stop)
    points = np.delete(np.arange(CODE_POINTS), np.concatenate([*left_out, surrogates]))
    return points.astype("<u4").tobytes().decode("utf-32-le"), points


def _asked(spans_of: Callable[[str], Sequence[tuple[int, int]]]) -> Bool[np.ndarray, " P"]:
    """The code points of which a text has them within its spans."""
    text, points = _text()
    found = np.zeros(CODE_POINTS, bool)
    for start in range(0, len(text), BLOCK):
        for first, last in spans_of(text[start : start + BLOCK]):
            found[points[start + first : start + last]] = True
    for plane in EMPTY_PLANES:
        found[plane[1] : plane[-1] + 1] = found[plane[0]]
    return found


def _others(name: str, text: str) -> list[tuple[int, int]]:
    """The spans without characters of a set."""
    splitter = pre_tokenizers.Split(Regex(f"(?:{name})+"), behavior="removed")
    return [span for _, span in splitter.pre_tokenize_str(text)]


def _numbers(text: str) -> list[tuple[int, int]]:
    """The spans that `Digits` takes for numbers: every second one behind a 0."""
    spans = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str("0" + text)
    return [(max(first - 1, 0), last - 1) for _, (first, last) in spans[::2]]


@functools.cache
def _members(name: str) -> Bool[np.ndarray, " P"]:
    """Which code points [0x110000] are in a set, by the engine that will split."""
    found = np.zeros(CODE_POINTS, bool)
    if name.startswith("[") and len(name) > 1:
        inner = name[2:-1] if name[1] == "^" else name[1:-1]
        for part in re.findall(PART, inner, re.DOTALL):
            if len(part) > 2 and part[1] == "-":
                found[ord(part[0]) : ord(part[2]) + 1] = True
            else:
                found |= _members(part)
        return found ^ (name[1] == "^")
    if len(name) == 1:
        found[ord(name)] = True
        return found
    if name.startswith(r"\P"):
        return ~_members(name.replace("P", "p", 1))
    if name == NUMERIC:
        return _asked(_numbers)
    found = ~_asked(functools.partial(_others, name))
    found[SURROGATES] = False
    return found


class Splitter:
    """Patterns in turn, each of which splits the pieces of the one before, over characters in
    classes that no pattern tells apart.

    class_of [0x110000] int64, -1 for surrogates, which no text has.

    Raises:
        ValueError: if some text is not covered by matches.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = patterns
        names = sorted({op.name for pattern in patterns for op in pattern.ops if op.name})
        codes = np.zeros(CODE_POINTS, np.int64)
        for bit, name in enumerate(names):
            codes |= _members(name).astype(np.int64) << bit
        codes[SURROGATES] = -1
        kinds, class_of = np.unique(codes, return_inverse=True)
        self.class_of = class_of - 1
        self.num_classes = len(kinds) - 1
        self.members = {
            name: frozenset(np.flatnonzero(kinds[1:] >> bit & 1).tolist())
            for bit, name in enumerate(names)
        }
        self.advance = functools.cache(self._advance)

    def start(self) -> Guess:
        """Before a text."""
        return tuple(((0,), frozenset()) for _ in self.patterns)

    def _advance(self, level: int, threads: Threads, char: int) -> tuple[bool, Threads]:
        """Whether a match ends before this character, and the threads after it that would have
        been preferred to that match.
        """
        ops, seen, after = self.patterns[level].ops, set[int](), []
        stack = list(reversed(threads))
        while stack:
            place = stack.pop()
            if place in seen:
                continue
            seen.add(place)
            op = ops[place]
            if op.kind == "match":
                return True, tuple(after)
            inside = char in self.members.get(op.name, ())
            if op.kind == "set" and inside:
                after.append(place + 1)
            elif op.kind == "unless" and not inside:
                stack.append(place + 1)
            stack += reversed(op.to)
        return False, tuple(after)

    def _open(self, level: int, before: frozenset[Threads], char: int) -> frozenset[Threads] | None:
        """What may not match from here on; None if it just has."""
        moved = [self.advance(level, threads, char) for threads in before]
        return None if any(matched for matched, _ in moved) else frozenset(t for _, t in moved if t)

    def _ends(self, guess: Guess, level: int) -> bool:
        """Whether the text of this and all further levels may end here."""
        return all(
            self.advance(number, threads, END)[0] and self._open(number, before, END) is not None
            for number, (threads, before) in enumerate(guess)
            if number >= level
        )

    def accepts(self, guess: Guess) -> bool:
        """Whether a guess is true if the text ends here."""
        return guess == self.start() or self._ends(guess, 0)

    def read(self, guess: Guess, char: int) -> tuple[list[Guess], list[Guess]]:
        """The guesses after a character in front of which there is no cut, and a cut."""
        levels, cuts = [], []
        for level, (threads, before) in enumerate(guess):
            pending = self._open(level, before, char)
            if pending is None:
                return [], cuts
            matched, after = self.advance(level, threads, char)
            fresh = [
                (self.advance(number, (0,), char)[1], frozenset[Threads]())
                for number in range(level, len(guess))
            ]
            if matched and self._ends(guess, level + 1):
                kept = pending | {after} if after else pending
                cuts.append((*levels, (fresh[0][0], kept), *fresh[1:]))
            if not after:
                return [], cuts
            levels.append((after, pending))
        return [tuple(levels)], cuts


INSIDE, ANY, ONLY = range(3)
"""What may be in front of the next character: no cut, a cut or not, a cut."""


def automaton(splitter: Splitter) -> Automaton:
    """The segmentations of texts (UTF-8) into tokens that do not run across a cut.

    A state is: the bytes of a character that have been read, what may be in front of it, and a set
    of guesses.
    """
    sets, nodes = _sets(splitter), utf8(splitter.class_of, splitter.num_classes)
    num_sets, num_classes = len(sets.accepting), splitter.num_classes
    dead = len(nodes) * 3 * num_sets
    node, mode, group = (
        part.reshape(-1) for part in np.indices((len(nodes), 3, num_sets), dtype=np.int32)
    )

    def index(node: np.ndarray, mode: np.ndarray, group: np.ndarray) -> np.ndarray:
        return np.where(group == num_sets - 1, dead, (node * 3 + mode) * num_sets + group)

    transitions = np.full((dead + 1, BYTE), dead, np.int32)
    for byte in range(256):
        child = nodes[node, byte]
        whole = sets.transitions[group, mode * num_classes + np.clip(child, 0, num_classes - 1)]
        after = np.where(
            child < num_classes,
            index(np.zeros_like(node), np.full_like(mode, INSIDE), whole),
            index(np.maximum(child - num_classes, 0), mode, group),
        )
        transitions[:dead, byte] = np.where(child < 0, dead, after)
    fresh = (node == 0) & (mode == INSIDE)
    transitions[:dead, FREE] = index(node, np.where(fresh, ANY, mode), group)
    cut = index(node, np.where(fresh, ONLY, mode), group)
    transitions[:dead, CUT] = np.where(node == 0, cut, dead)
    ends = np.append(sets.accepting[group] & (node == 0), False)
    return minimal(started(Automaton(transitions, ends), ANY * num_sets))


def _sets(splitter: Splitter) -> Automaton:
    """The sets of guesses as an automaton over what may be in front of a character, and its class
    (mode * C + class).
    """
    ids: dict[frozenset[Guess], int] = {frozenset(): 0, frozenset([splitter.start()]): 1}
    table: list[list[list[int]]] = []
    groups = list(ids)
    while len(table) < len(groups):
        rows: list[list[int]] = [[], [], []]
        for char in range(splitter.num_classes):
            read = [splitter.read(guess, char) for guess in groups[len(table)]]
            inside = frozenset(g for stays, _ in read for g in stays)
            cut = frozenset(g for _, cuts in read for g in cuts)
            for mode, found in enumerate((inside, inside | cut, cut)):
                if found not in ids:
                    ids[found] = len(ids)
                    groups.append(found)
                rows[mode].append(ids[found])
        table.append(rows)
    accepting = np.array([any(splitter.accepts(g) for g in group) for group in groups])
    sets = np.array(table, np.int32)
    reached, found = {1}, [1]
    while found:
        found = [g for g in set(sets[found, ANY].flatten().tolist()) if g not in reached]
        reached |= set(found)
    if 0 in reached or not accepting[list(reached)].all():
        raise ValueError(
            "expected a pre-tokenizer whose matches cover every text, got one that leaves gaps;"
            " pass canonical=False"
        )
    # Set 0 is empty and goes last, 1 is the start.
    sets = np.roll(sets.reshape(len(sets), -1), -1, axis=0) - 1
    sets[sets < 0] = len(sets) - 1
    return minimal(Automaton(sets, np.roll(accepting, -1)))


def utf8(class_of: Int[np.ndarray, " P"], num_classes: int) -> Int[np.ndarray, "M 256"]:
    """Characters by their bytes: for a node (0 is the root) and a byte the class of the character
    that is complete, or C + the next node, or -1.
    """
    nodes = [np.full(256, -1)]

    def joined(rows: np.ndarray) -> np.ndarray:
        """Nodes of rows [R, 64], by the last six bits of a byte; -1 for rows without characters."""
        kinds, inverse = np.unique(rows, axis=0, return_inverse=True)
        numbers = np.full(len(kinds), -1)
        for kind, row in enumerate(kinds):
            if (row >= 0).any():
                numbers[kind] = num_classes + len(nodes)
                nodes.append(np.full(256, -1))
                nodes[-1][0x80:0xC0] = row
        return numbers[inverse.reshape(-1)]

    last = joined(class_of.reshape(-1, 64))
    short = last[: 16 * 64].copy()
    short[:32] = -1  # characters of two bytes may not be written in three
    second = joined(short.reshape(-1, 64))
    third = joined(last.reshape(-1, 64))
    third = np.concatenate([third, np.full(5 * 64 - len(third), -1)])
    third[:16] = -1
    nodes[0][:0x80] = class_of[:0x80]
    nodes[0][0xC2:0xE0] = last[2:32]
    nodes[0][0xE0:0xF0] = second
    nodes[0][0xF0:0xF5] = joined(third.reshape(-1, 64))
    return np.stack(nodes)
