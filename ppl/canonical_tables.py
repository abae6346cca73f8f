"""Token automata of texts in a tokenizer's own segmentation, as small dense tables.

Which tokens may come next depends on a state of the text and on the last token, by way of
`merges.Pairs`.  The two are kept apart: their product would have as many states as there are pairs
of them.  What the pair is needed for besides the mask, the number of tokens to the end, splits a
state only where it differs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt32

from . import merges
from .byte_dfa import ByteDFA, compile_regex
from .segmentation import CUT, FREE, Automaton, Segmentation, Unsegmented, product
from .showing import shown
from .token_tables import (
    EOS_CLASS,
    FORBIDDEN,
    MAX_ENTRIES,
    UNREACHABLE,
    bucket,
    distinct_rows,
    token_functions,
)

MOST_STATES = 1 << 15


@shown
class CanonicalTables(NamedTuple):
    """A token automaton: state 0 is the start, the last state is dead.

    classes [V] int32, the class of a token, of which `FORBIDDEN` and `EOS_CLASS` lead to the dead
    state; rows [2, S] int32, the row of a state for a token that is cut off from the last one, and
    for one that may stand beside it; transitions [R, C], the next state by row and class; distance
    [S] int32, the least number of tokens to an accepting state, `UNREACHABLE` if there is none.
    left, right [V] int32: the classes of a token as the last one and as the next one; beside
    [L, W] uint32: bit c of row l is 1 if next tokens of class c may stand beside a last one of
    class l.  All but V are padded to powers of two.
    """

    classes: Int[Any, " V"]
    transitions: Int[Any, "R C"]
    distance: Int[Any, " S"]
    rows: Int[Any, "2 S"]
    left: Int[Any, " V"]
    right: Int[Any, " V"]
    beside: UInt32[Any, "L W"]


@shown
class Walk(NamedTuple):
    """What tokens do, before distances: rows [2, S] (R where dead), table [R + 1, C] of next states
    (S where dead), accepting [S]; the live tokens, their classes, and the pairs that they make.
    """

    rows: Integer[np.ndarray, "2 S"]
    table: Integer[np.ndarray, "R1 C"]
    accepting: Bool[np.ndarray, " S"]
    tokens: Integer[np.ndarray, " K"]
    classes: Integer[np.ndarray, " K"]
    pairs: merges.Pairs


def build(pattern: str | None, segmentation: Segmentation, eos: int) -> CanonicalTables:
    """The tables of the texts that match a pattern (all, without), in their own segmentation.

    Raises:
        ValueError: if the pattern is invalid, or no such text matches it; `Unsegmented` if the
            tables would be too large.
    """
    dfa = None if pattern is None else compile_regex(pattern)
    walk = _walk(dfa, segmentation, eos)
    split = _split(walk)
    if split.start == len(split.of):
        raise ValueError(
            "expected a pattern that some text in the tokenizer's own segmentation matches, got"
            f" {pattern!r}, which none does; loosen the pattern"
        )
    return _tables(walk, split, len(segmentation.lengths), eos)


def _walk(dfa: ByteDFA | None, segmentation: Segmentation, eos: int) -> Walk:
    automaton = segmentation.automaton
    if dfa is not None:
        automaton = product(_reading(dfa, segmentation.texts), automaton, MOST_STATES)
    dead = len(automaton.accepting) - 1
    rows = automaton.transitions[:, [CUT, FREE]].T
    starts = np.unique(rows)
    starts = starts[starts != dead]
    lengths = segmentation.lengths.copy()
    lengths[eos] = -1
    functions, function_of = token_functions(
        automaton.transitions, starts, _without(segmentation, eos), lengths
    )
    # Row R is dead; so is state S.
    rows = np.where(rows == dead, len(starts), np.searchsorted(starts, rows))
    table = np.concatenate([functions.T, np.full((1, len(functions)), dead)])

    states = _reached(table, rows, 0)
    rows, table = _renumbered(table, rows, states)
    columns, column_of = distinct_rows(np.ascontiguousarray(table.T))
    classes = column_of[function_of]
    tokens = np.flatnonzero(np.any(columns < len(states), axis=1)[classes])
    live, classes = np.unique(classes[tokens], return_inverse=True)
    pairs = _pairs(segmentation, tokens.tobytes())
    return Walk(rows, columns[live].T, automaton.accepting[states], tokens, classes, pairs)


def _reached(
    table: Integer[np.ndarray, "R1 C"], rows: Integer[np.ndarray, "2 S1"], start: int
) -> Integer[np.ndarray, " O"]:
    """The states that are reached, the start first, without the last, dead one."""
    reached, frontier = np.zeros(rows.shape[1], bool), np.array([start])
    reached[-1] = True
    while frontier.size:
        reached[frontier] = True
        following = np.unique(table[rows[:, frontier]])
        frontier = following[~reached[following]]
    reached[[start, -1]] = False
    return np.append(start, np.flatnonzero(reached))


def _renumbered(
    table: Integer[np.ndarray, "R1 C"],
    rows: Integer[np.ndarray, "2 S1"],
    states: Integer[np.ndarray, " O"],
) -> tuple[Integer[np.ndarray, "2 O"], Integer[np.ndarray, "Q1 C"]]:
    """Rows and table of some states alone; dead are the next number of a state, and of a row."""
    number = np.full(rows.shape[1], len(states))
    number[states] = np.arange(len(states))
    dead = len(table) - 1
    used = np.unique(rows[:, states])
    used = np.append(used[used < dead], dead)
    return np.searchsorted(used, rows[:, states]), number[table[used]]


@functools.lru_cache(maxsize=4)
def _pairs(segmentation: Segmentation, tokens: bytes) -> merges.Pairs:
    """Kept, as patterns of free text have much the same tokens."""
    return merges.pairs(segmentation.merges, np.frombuffer(tokens, np.int64))


def _without(segmentation: Segmentation, eos: int) -> Integer[np.ndarray, " B"]:
    """The spelling of all tokens but one."""
    lengths = np.maximum(segmentation.lengths, 0)
    start = int(lengths[:eos].sum())
    return np.delete(segmentation.symbols, slice(start, start + int(lengths[eos])))


def _reading(dfa: ByteDFA, texts: tuple[bytes, ...]) -> Automaton:
    """An automaton over bytes as one over the symbols that stand for `texts`."""
    columns = []
    for text in texts:
        state = np.arange(len(dfa.accepting), dtype=np.int32)
        for byte in text:
            state = dfa.transitions[state, byte]
        columns.append(state)
    return Automaton(np.stack(columns, axis=1), dfa.accepting)


class Ends:
    """Least numbers of tokens to an accepting state, by state and class of the last token.

    A state's classes are bits; `settled` [S, B] are those of which the number is known, and
    `levels` says by state at which number which of them were.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk, pairs = walk, walk.pairs
        num_states, num_left = len(walk.accepting), len(pairs.beside)
        self.left, self.right = pairs.row[walk.tokens], pairs.column[walk.tokens]
        self.members = [np.flatnonzero(walk.classes == c) for c in range(walk.table.shape[1])]
        # Which last tokens let a next one of a class stand beside them, [right class, B].
        self.lets = pairs.lefts()
        none = np.zeros((num_states + 1, -(-num_left // 8)), np.uint8)
        self.settled, self.needed = none, self._needed(none.copy())
        self.levels: list[list[tuple[int, np.ndarray]]] = [[] for _ in walk.accepting]
        self.joined: dict[tuple[int, bytes], np.ndarray] = {}
        self.full = np.zeros(num_states + 1, bool)
        self._settle()
        # From some of these last tokens there is no end.
        self.partial = np.append(~self.full[:-1], False)

    def _bits(self, lefts: np.ndarray) -> np.ndarray:
        flags = np.zeros(len(self.walk.pairs.beside), bool)
        flags[lefts] = True
        return np.packbits(flags)

    def _needed(self, needed: np.ndarray) -> np.ndarray:
        """The classes of the last tokens with which a state can be entered."""
        needed[0, 0] |= 128
        for column, tokens in enumerate(self.members):
            bits = self._bits(self.left[tokens])
            needed[np.unique(self.walk.table[:, column])] |= bits
        return needed

    def _settle(self) -> None:
        rows, table = self.walk.rows, self.walk.table
        dead, level = len(self.walk.accepting), 0
        found = {int(s): np.uint8(255) for s in np.flatnonzero(self.walk.accepting)}
        while found:
            for state, bits in found.items():
                new = self.needed[state] & bits & ~self.settled[state]
                self.levels[state].append((level, new))
                self.settled[state] |= new
            changed = np.zeros(dead + 1, bool)
            changed[list(found)] = True
            near = np.any(changed[table], axis=1)
            self.full = ~np.any(self.needed & ~self.settled, axis=1)
            self.full[dead] = False
            rest = ~self.full[:dead]
            level, found = level + 1, {}
            for state in np.flatnonzero(near[rows].any(0) & rest).tolist():
                bits = self._before(state, changed)
                if (bits & self.needed[state] & ~self.settled[state]).any():
                    found[state] = bits

    def _before(self, state: int, changed: np.ndarray) -> np.ndarray:
        """The last tokens with which a state is one token before a pair that is settled."""
        cut, free = self.walk.table[self.walk.rows[:, state]]
        bits = np.zeros(self.settled.shape[1], np.uint8)
        for column in np.flatnonzero(changed[cut]).tolist():
            if self._going(column, int(cut[column])).size:
                return bits | 255
        for column in np.flatnonzero(changed[free]).tolist():
            bits |= self._lets(column, int(free[column]))
        return bits

    def _going(self, column: int, state: int) -> np.ndarray:
        """The tokens of a class that lead to `state` such that its number is known."""
        tokens = self.members[column]
        if self.full[state]:
            return tokens
        left = self.left[tokens]
        return tokens[self.settled[state][left // 8] >> (7 - left % 8) & 1 > 0]

    def _lets(self, column: int, state: int) -> np.ndarray:
        """The last tokens which one of these tokens may stand beside."""
        key = column, b"" if self.full[state] else self._going(column, state).tobytes()
        if key not in self.joined:
            right = np.unique(self.right[self._going(column, state)])
            self.joined[key] = np.bitwise_or.reduce(self.lets[right], axis=0)
        return self.joined[key]


@shown
class Split(NamedTuple):
    """A walk whose states know the number of tokens to the end.

    table [R + 1, C] of next states, S where no end can be reached; the classes of the live tokens;
    of each state, the state of the walk and the number; the start (S if there is no string at all).
    """

    table: Integer[np.ndarray, "R1 C"]
    classes: Integer[np.ndarray, " K"]
    of: Integer[np.ndarray, " S"]
    distance: Integer[np.ndarray, " S"]
    start: int


def _split(walk: Walk) -> Split:
    ends = Ends(walk)
    pairs = [(state, level) for state, found in enumerate(ends.levels) for level, _ in found]
    known = np.array(pairs, np.int64).reshape(-1, 2)
    first = np.searchsorted(known[:, 0], np.arange(len(walk.accepting) + 1))
    columns, classes = [np.full(len(walk.table), len(known))], np.zeros(len(walk.tokens), np.int64)
    for column, tokens in enumerate(ends.members):
        after = walk.table[:, column]
        targets, target_of = np.unique(after, return_inverse=True)
        kinds, which = _choices(ends, first, targets, ends.left[tokens])
        classes[tokens] = len(columns) + which
        columns += list(kinds[:, target_of])
    start = [i for i, (_, new) in enumerate(ends.levels[0]) if new[0] & 128]
    start = start[0] if start else len(known)
    return Split(np.stack(columns, axis=1), classes, known[:, 0], known[:, 1], start)


def _choices(
    ends: Ends, first: np.ndarray, targets: np.ndarray, left: np.ndarray
) -> tuple[Integer[np.ndarray, "K M"], Integer[np.ndarray, " N"]]:
    """The split states that last tokens of a class come to in place of `targets`, by kind, and the
    kind of each token.
    """
    dead = first[-1]
    counts = np.append(np.diff(first), 0)[targets]
    plain = np.where(counts > 0, first[targets], dead)
    several = np.flatnonzero((counts > 1) | ends.partial[targets])
    choice = np.full((len(left), len(several)), dead)
    for place, target in enumerate(targets[several].tolist()):
        for number, (_, new) in enumerate(ends.levels[target]):
            inside = new[left // 8] >> (7 - left % 8) & 1 > 0
            choice[inside, place] = first[target] + number
    kinds, which = distinct_rows(choice)
    moved = np.tile(plain, (len(kinds), 1))
    moved[:, several] = kinds
    return moved, which


def _tables(walk: Walk, split: Split, size: int, eos: int) -> CanonicalTables:
    """What is reached, the start first, padded."""
    end = np.full((2, 1), len(split.table) - 1)
    rows = np.append(walk.rows, end, axis=1)[:, [*split.of, len(walk.accepting)]]
    order = _reached(split.table, rows, split.start)
    rows, table = _renumbered(split.table, rows, order)
    columns, column_of = distinct_rows(np.ascontiguousarray(table[:-1].T))
    empty = (columns == len(order)).all(1)
    class_of = np.where(empty, FORBIDDEN, EOS_CLASS + np.cumsum(~empty))
    num_states, height = bucket(len(order) + 1), bucket(len(table))
    shape = height, bucket(int((~empty).sum()) + EOS_CLASS + 1)
    if shape[0] * shape[1] > MAX_ENTRIES:
        raise Unsegmented(
            f"expected token tables of at most {MAX_ENTRIES} entries, got {shape[0] * shape[1]};"
            " pass canonical=False"
        )
    small = num_states <= 1 << 15
    transitions = np.full(shape, num_states - 1, np.int16 if small else np.int32)
    columns = np.where(columns == len(order), num_states - 1, columns)
    transitions[: len(table) - 1, class_of] = columns.T
    transitions[:, [FORBIDDEN, EOS_CLASS]] = num_states - 1
    distance = np.full(num_states, UNREACHABLE, np.int32)
    distance[: len(order)] = split.distance[order]
    padded = np.full((2, num_states), height - 1, np.int32)
    padded[:, : len(order)] = np.where(rows < len(table) - 1, rows, height - 1)
    spread = np.zeros(size, np.int32)
    spread[walk.tokens] = class_of[column_of][split.classes]
    spread[eos] = EOS_CLASS
    pairs = walk.pairs
    shape = bucket(len(pairs.beside)), bucket(pairs.beside.shape[1], 4)
    beside = np.zeros(shape, np.uint32)
    beside[: pairs.beside.shape[0], : pairs.beside.shape[1]] = pairs.beside
    return CanonicalTables(spread, transitions, distance, padded, pairs.row, pairs.column, beside)
