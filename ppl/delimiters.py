"""Where delimiters end in the bytes of growing strings, as a table over tokens (Aho and Corasick
1975).

A state is the longest end of the text so far that begins a delimiter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Integer


def table(
    delimiters: Sequence[bytes], token_bytes: Sequence[bytes | None]
) -> Int[np.ndarray, "Q V"]:
    """For every state and token twice the state after it, plus 1 if a delimiter ends inside of it.

    State 0 is that of the empty text, and of one that a token without bytes has interrupted.
    """
    moves, ends = _automaton(delimiters)
    lengths = np.array([len(value or b"") for value in token_bytes])
    texts = np.zeros((len(lengths), lengths.max(initial=1)), np.uint8)
    for token, value in enumerate(token_bytes):
        texts[token, : lengths[token]] = np.frombuffer(value or b"", np.uint8)
    found = np.zeros((len(moves), len(lengths)), np.int32)
    for start in range(len(moves)):
        state, met = np.full(len(lengths), start), np.zeros(len(lengths), bool)
        for place in range(texts.shape[1]):
            going = np.flatnonzero(lengths > place)
            state[going] = moves[state[going], texts[going, place]]
            met[going] |= ends[state[going]]
        found[start] = np.where(lengths > 0, 2 * state + met, 0)
    return found


def ever_ends(table: Int[np.ndarray, "Q V"]) -> bool:
    """Whether some string of tokens has a delimiter."""
    reached, fresh = np.zeros(len(table), bool), np.array([0])
    while fresh.size:
        reached[fresh] = True
        following = np.unique(table[fresh] // 2)
        fresh = following[~reached[following]]
    return bool((table[reached] % 2).any())


def _automaton(
    delimiters: Sequence[bytes],
) -> tuple[Integer[np.ndarray, "Q 256"], Bool[np.ndarray, " Q"]]:
    """The state after every byte, and whether a delimiter ends there."""
    prefixes = sorted({d[:size] for d in delimiters for size in range(len(d) + 1)}, key=len)
    states = {prefix: number for number, prefix in enumerate(prefixes)}
    moves = np.zeros((len(prefixes), 256), np.int64)
    for prefix, state in states.items():
        # What the longest shorter end of the text would do, but for the bytes that go on here.
        shorter = next((prefix[i:] for i in range(1, len(prefix) + 1) if prefix[i:] in states), b"")
        moves[state] = moves[states[shorter]] if prefix else 0
        for byte in range(256):
            longer = states.get(prefix + bytes([byte]))
            moves[state, byte] = moves[state, byte] if longer is None else longer
    ends = np.array([any(prefix.endswith(d) for d in delimiters) for prefix in prefixes])
    return moves, ends
