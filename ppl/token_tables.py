"""Token automata: an automaton over bytes, read by a vocabulary of tokens, as small dense tables.

Tokens that do the same in every state share a class, so the tables are [states, classes] and not
[states, V]: a JSON schema of some hundred states has some hundred classes over 49152 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from .byte_dfa import ByteDFA, TooLarge
from .showing import shown

FORBIDDEN, EOS_CLASS = 0, 1
UNREACHABLE = 1 << 30
MAX_ENTRIES = 1 << 26


@shown
class Vocabulary(NamedTuple):
    """The bytes of every token in one buffer; hashable, so equal vocabularies share what is built
    for them.

    lengths holds V int32 as bytes, -1 for a token without bytes (a control token, EOS).
    """

    data: bytes
    lengths: bytes
    eos: int

    def tokens(self) -> list[bytes]:
        """The bytes of every token, none for one without."""
        ends = np.cumsum(np.maximum(np.frombuffer(self.lengths, np.int32), 0)).tolist()
        return [self.data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@shown
class TokenTables(NamedTuple):
    """A token automaton: state 0 is the start, the last state is dead.

    classes [V] int32, the class of a token; transitions [S, C] int16 (int32 from 2^15 states on);
    distance [S] int32, the least number of tokens from a state to an accepting one, `UNREACHABLE`
    if there is none.  Class `FORBIDDEN` leads to the dead state, and so does `EOS_CLASS`: EOS is no
    step.  S and C are padded to powers of two (with dead states and forbidden classes), so that
    another pattern of similar size has the same shapes and compiles nothing.
    """

    classes: Integer[np.ndarray, " V"]
    transitions: Integer[np.ndarray, "S C"]
    distance: Integer[np.ndarray, " S"]


def vocabulary(token_bytes: Sequence[bytes | None], eos: int) -> Vocabulary:
    """The vocabulary of a tokenizer; EOS has no bytes whatever the tokenizer says."""
    tokens = [None if token == eos else value for token, value in enumerate(token_bytes)]
    lengths = np.fromiter(
        (-1 if value is None else len(value) for value in tokens), np.int32, len(tokens)
    )
    return Vocabulary(b"".join(value for value in tokens if value), lengths.tobytes(), eos)


def build(dfa: ByteDFA, vocab: Vocabulary) -> TokenTables:
    """The token automaton of `dfa` over `vocab`, without states that no string of tokens reaches or
    survives.

    Raises:
        TooLarge: if the tables would exceed `MAX_ENTRIES` entries.
    """
    functions, function_of = token_functions(
        dfa.transitions,
        np.arange(len(dfa.transitions)),
        np.frombuffer(vocab.data, np.uint8),
        np.frombuffer(vocab.lengths, np.int32),
    )
    used, columns = np.unique(function_of, return_inverse=True)
    # [Q, C]: what each distinct token does to each state.
    transitions = np.ascontiguousarray(functions[used].T)
    distance = _distances(transitions, dfa.accepting)
    keep = _reachable(transitions, distance < UNREACHABLE)
    keep[[0, -1]] = True
    number = np.where(keep, np.cumsum(keep) - 1, keep.sum() - 1)
    transitions, distance = number[transitions[keep]], distance[keep]

    # Columns that differed only in states that are gone now agree; class FORBIDDEN is the column of
    # dead states.
    dead = len(distance) - 1
    transitions[distance[transitions] == UNREACHABLE] = dead
    columns_of, merged = distinct_rows(np.ascontiguousarray(transitions.T))
    empty = (columns_of == dead).all(1)
    class_of_column = np.where(empty, FORBIDDEN, EOS_CLASS + np.cumsum(~empty))
    num_states, num_classes = bucket(len(distance)), bucket(EOS_CLASS + 1 + int((~empty).sum()))
    padded = np.full(
        (num_states, num_classes), num_states - 1, np.int16 if num_states <= 1 << 15 else np.int32
    )
    inner = np.where(transitions == dead, num_states - 1, transitions)
    padded[:dead, class_of_column[merged]] = inner[:dead]
    padded[:, [FORBIDDEN, EOS_CLASS]] = num_states - 1
    distances = np.full(num_states, UNREACHABLE, np.int32)
    distances[:dead] = distance[:dead]
    classes = class_of_column[merged][columns].astype(np.int32)
    classes[vocab.eos] = EOS_CLASS
    return TokenTables(classes, padded, distances)


def token_functions(
    transitions: Integer[np.ndarray, "Q K"],
    start: Integer[np.ndarray, " R"],
    symbols: Integer[np.ndarray, " B"],
    lengths: Integer[np.ndarray, " V"],
) -> tuple[Integer[np.ndarray, "F R"], Integer[np.ndarray, " V"]]:
    """What every token does to the states `start` of an automaton over symbols: distinct functions
    [F, R] (to a state) and the function of each token.

    `symbols` are those of all tokens in turn, `lengths` how many each has, -1 for a token that may
    not occur.  All tokens are read in parallel, one symbol at a time.  Two prefixes that do the
    same to all states are one function from there on, so the work is proportional to the number of
    distinct functions and not of tokens.

    Raises:
        TooLarge: if there are more than `MAX_ENTRIES` entries.
    """
    symbols_of, symbol_class = distinct_rows(np.ascontiguousarray(transitions.T))
    dead = np.full(len(start), len(transitions) - 1, np.int32)
    identity = start.astype(np.int32)
    functions, ids = [dead, identity], {dead.tobytes(): 0}
    ids.setdefault(identity.tobytes(), 1)
    known: dict[int, int] = {}

    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])[:-1]
    flat, width = symbol_class[symbols], len(symbols_of)
    function_of = np.where(lengths < 0, 0, 1)
    for depth in range(int(lengths.max(initial=0))):
        active = np.flatnonzero((lengths > depth) & (function_of > 0))
        if not active.size:
            break
        pairs, inverse = np.unique(
            function_of[active] * width + flat[starts[active] + depth], return_inverse=True
        )
        for pair in pairs.tolist():
            if pair not in known:
                column = symbols_of[pair % width][functions[pair // width]]
                known[pair] = ids.setdefault(column.tobytes(), len(functions))
                if known[pair] == len(functions):
                    functions.append(column)
                    if len(start) * len(functions) > MAX_ENTRIES:
                        raise TooLarge(
                            f"expected token tables of at most {MAX_ENTRIES} entries, got"
                            f" {len(start)} states with over"
                            f" {len(functions)} classes of tokens; use smaller counted repetitions"
                            " or a smaller schema"
                        )
        function_of[active] = np.array([known[pair] for pair in pairs.tolist()])[inverse]
    return np.stack(functions), function_of


def distinct_rows(
    rows: Integer[np.ndarray, "K Q"],
) -> tuple[Integer[np.ndarray, "R Q"], Integer[np.ndarray, " K"]]:
    """The distinct rows in order of appearance, and which of them each row is."""
    ids: dict[bytes, int] = {}
    inverse = np.array([ids.setdefault(row.tobytes(), len(ids)) for row in rows])
    first = np.unique(inverse, return_index=True)[1]
    return rows[first], inverse


def _distances(
    transitions: Integer[np.ndarray, "Q C"], accepting: Bool[np.ndarray, " Q"]
) -> Integer[np.ndarray, " Q"]:
    """Least number of tokens from each state to an accepting one, breadth first against
    the arrows.
    """
    source, target = _edges(transitions)
    distance = np.where(accepting, 0, UNREACHABLE).astype(np.int64)
    level = 0
    while True:
        found = source[(distance[target] == level) & (distance[source] == UNREACHABLE)]
        if not found.size:
            return distance
        level += 1
        distance[found] = level
        rest = distance[source] == UNREACHABLE
        source, target = source[rest], target[rest]


def _reachable(
    transitions: Integer[np.ndarray, "Q C"], alive: Bool[np.ndarray, " Q"]
) -> Bool[np.ndarray, " Q"]:
    """Which states a string of tokens reaches from state 0 by way of `alive` states only."""
    reached = np.zeros(len(alive), bool)
    frontier = np.array([0])
    while frontier.size:
        reached[frontier] = True
        following = np.unique(transitions[frontier])
        frontier = following[alive[following] & ~reached[following]]
    return reached


def _edges(
    transitions: Integer[np.ndarray, "Q C"],
) -> tuple[Integer[np.ndarray, " E"], Integer[np.ndarray, " E"]]:
    """The distinct pairs (state, next state), without those into the dead state."""
    num_states = len(transitions)
    source, column = np.nonzero(transitions != num_states - 1)
    pairs = np.unique(source * num_states + transitions[source, column])
    return pairs // num_states, pairs % num_states


def bucket(count: int, least: int = 64) -> int:
    """The least power of two >= count and >= `least`."""
    return 1 << (max(count, least) - 1).bit_length()
