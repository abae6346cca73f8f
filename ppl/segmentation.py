"""How a tokenizer segments a text: what `canonical` has to know of it.

A token is spelled in symbols: its bytes, 0 to 255; 258 + b for a byte that stands for itself where
a tokenizer has no token for the character; a symbol of its own for what is matched before all else.
Before every token but the first comes `FREE` if byte-pair encoding leaves it beside the token in
front of it, else `CUT`: such two may only stand in different pieces of the pre-tokenizer.  Of these
symbols an automaton says which sequences are segmentations.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from .merges import Merges
from .showing import shown
from .token_tables import distinct_rows

FREE, CUT, BYTE = 256, 257, 258


class Unsegmented(ValueError):
    """A tokenizer's own segmentation is not known, or its automaton would be too large."""


@shown
class Automaton(NamedTuple):
    """A complete deterministic automaton over symbols; state 0 is the start, the last is dead.

    transitions [Q, K] int32; accepting [Q] bool.
    """

    transitions: Int[np.ndarray, "Q K"]
    accepting: Bool[np.ndarray, " Q"]


@shown
@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """A tokenizer's segmentation.

    Attributes:
        symbols: int16 [B], the spelling of all tokens, one after the other.
        lengths: int32 [V], how many symbols a token has; -1 if no segmentation has it.
        texts: for each symbol the bytes that it stands for; b"" for `FREE` and `CUT`.
        automaton: over these symbols.
        merges: what decides between `FREE` and `CUT`.
        relaxed: "" if all that is exact, else in words what is not.
    """

    symbols: Int[np.ndarray, " B"]
    lengths: Int[np.ndarray, " V"]
    texts: tuple[bytes, ...]
    automaton: Automaton
    merges: Merges
    relaxed: str = ""


def distinct_columns(
    table: Int[np.ndarray, "Q K"],
) -> tuple[Int[np.ndarray, "Q C"], Int[np.ndarray, " K"]]:
    """The distinct columns in order of appearance, and which of them each column is."""
    rows, inverse = distinct_rows(np.ascontiguousarray(table.T))
    return rows.T, inverse


def product(one: Automaton, other: Automaton, most: int) -> Automaton:
    """Both at once, in the states that are reached; raises Unsegmented if they are over `most`."""
    both = np.concatenate([one.transitions, other.transitions])
    both, symbols = distinct_columns(both)
    tables = both[: len(one.accepting)], both[len(one.accepting) :]
    columns = len(other.accepting)
    dead = np.array([len(one.accepting) - 1, columns - 1])
    known = {(0, 0): 0}
    states, rows, at = [(0, 0)], [], 0
    while at < len(states):
        block = np.array(states[at:])
        at = len(states)
        following = np.stack([tables[i][block[:, i]] for i in range(2)], axis=-1)
        following[(following == dead).any(-1)] = dead
        codes = following[..., 0].astype(np.int64) * columns + following[..., 1]
        for code in np.unique(codes).tolist():
            pair = divmod(code, columns)
            if pair not in known:
                known[pair] = len(states)
                states.append(pair)
        rows.append(codes)
        if len(states) > most:
            raise Unsegmented(
                f"expected an automaton of at most {most} states, got over {len(states)}; pass"
                " canonical=False"
            )
    codes = np.concatenate(rows)
    pairs = np.array(states)
    order = pairs @ [columns, 1]
    sort = np.argsort(order)
    transitions = sort[np.searchsorted(order[sort], codes)].astype(np.int32)
    accepting = one.accepting[pairs[:, 0]] & other.accepting[pairs[:, 1]]
    return minimal(Automaton(transitions[:, symbols], accepting))


def minimal(automaton: Automaton) -> Automaton:
    """The smallest automaton of the same language; any order of states but the start first.

    States are told apart by what they accept after ever longer words, of which a sum of random
    numbers is compared.
    """
    transitions, columns_of = distinct_columns(automaton.transitions)
    weights = np.random.default_rng(0).integers(1 << 63, size=transitions.shape[1], dtype=np.uint64)
    numbers = np.random.default_rng(1).integers(1 << 63, size=len(transitions), dtype=np.uint64)
    kind, count = automaton.accepting.astype(np.int64), 0
    while kind.max() + 1 != count:
        count = kind.max() + 1
        marks = numbers[kind]
        sums = marks * np.uint64(2654435761)
        for column, weight in enumerate(weights):
            sums = sums + marks[transitions[:, column]] * weight
        kind = np.unique(sums, return_inverse=True)[1]
    # Start first, dead last; without a dead state one that is never reached.
    _, first = np.unique(kind, return_index=True)
    inner = transitions[first]
    sinks = (kind[inner] == np.arange(count)[:, None]).all(1) & ~automaton.accepting[first]
    order = np.argsort(np.where(sinks, 2, 1) - (np.arange(count) == kind[0]), kind="stable")
    number = np.argsort(order)
    table = number[kind[inner[order]]]
    accepting = automaton.accepting[first[order]]
    if not sinks.any():
        table = np.concatenate([table, np.full((1, table.shape[1]), count)])
        accepting = np.append(accepting, False)
    return Automaton(table[:, columns_of].astype(np.int32), accepting)


def started(automaton: Automaton, start: int) -> Automaton:
    """The automaton from another start on, without states that this one does not reach."""
    reached, frontier = np.zeros(len(automaton.accepting), bool), np.array([start])
    reached[-1] = True
    while frontier.size:
        reached[frontier] = True
        following = np.unique(automaton.transitions[frontier])
        frontier = following[~reached[following]]
    kept = np.flatnonzero(reached)
    order = np.concatenate([[start], kept[kept != start]])
    number = np.zeros(len(reached), np.int32)
    number[order] = np.arange(len(order))
    return Automaton(number[automaton.transitions[order]], automaton.accepting[order])


def without(words: list[bytes], num_symbols: int) -> Automaton:
    """Strings in which none of some words occurs, whatever tokens they are made of."""
    nodes: dict[bytes, int] = {b"": 0}
    for word in words:
        for end in range(1, len(word)):
            nodes.setdefault(word[:end], len(nodes))
    dead = len(nodes)
    transitions = np.zeros((dead + 1, num_symbols), np.int32)
    transitions[dead] = dead
    for prefix, node in nodes.items():
        transitions[node, [FREE, CUT]] = node
        for byte in range(256):
            text = prefix + bytes([byte])
            ends = [text[start:] for start in range(len(text))]
            hit = any(end in words for end in ends)
            after = next((nodes[end] for end in ends if end in nodes), 0)
            transitions[node, byte] = dead if hit else after
    if num_symbols > BYTE:
        transitions[:, BYTE : BYTE + 256] = transitions[:, :256]
    accepting = np.ones(dead + 1, bool)
    accepting[dead] = False
    return minimal(Automaton(transitions, accepting))
