"""Who descends from whom in a run of SMC, and what they say: what every picture of a run is drawn
from.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of the heaviest strings (Okabe and Ito), which tell the colour-blind apart what they tell
others.
"""

Key = TypeVar("Key", bound=Hashable)


def merged(keys: Iterable[Key], weights: Iterable[float]) -> list[tuple[Key, float]]:
    """Distinct keys of positive weight with their total weight, heaviest first."""
    total: dict[Key, float] = {}
    for key, weight in zip(keys, weights, strict=True):
        if weight > 0:
            total[key] = total.get(key, 0.0) + float(weight)
    return sorted(total.items(), key=lambda row: -row[1])


def descendant_weights(
    ancestors: Int[np.ndarray, "R N"], weights: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "R N"]:
    """[r, i]: the total final weight of the descendants of slot i of round r."""
    total = np.zeros(ancestors.shape)
    total[-1] = weights
    for r in range(len(total) - 1, 0, -1):
        np.add.at(total[r - 1], ancestors[r], total[r])
    return total


def survivors(
    ancestors: Int[np.ndarray, "R N"], alive: Bool[np.ndarray, " N"]
) -> Bool[np.ndarray, "R N"]:
    """[r, i]: whether slot i of round r has a living descendant at the end."""
    return descendant_weights(ancestors, alive.astype(float)) > 0


def ancestry(ancestors: Int[np.ndarray, "R N"]) -> Int[np.ndarray, "R N"]:
    """[r, i]: the slot in round r of the ancestor of slot i of the last round."""
    slots = np.empty_like(ancestors)
    slots[-1] = np.arange(ancestors.shape[1])
    for r in range(len(slots) - 1, 0, -1):
        slots[r - 1] = ancestors[r][slots[r]]
    return slots


def ranks(
    ancestors: Int[np.ndarray, "R N"],
    texts: Sequence[str],
    weights: Float[np.ndarray, " N"],
    most: int,
) -> Int[np.ndarray, "R N"]:
    """[r, i]: which of the `most` heaviest strings has most of the weight that descends from slot i
    of round r.

    `most` itself stands for all other strings, and -1 for no living descendant.
    """
    named = [text for text, _ in merged(texts, weights)[:most]]
    of = np.array([named.index(text) if text in named else most for text in texts])
    shares = np.array(
        [descendant_weights(ancestors, np.where(of == k, weights, 0.0)) for k in range(most + 1)]
    )
    return np.where(shares.sum(axis=0) > 0, shares.argmax(axis=0), -1)


def pieces(tokens: Int[np.ndarray, "R N K"], tokenizer: Any) -> list[list[str]]:
    """[r][i]: the text that slot i drew in round r, empty if it drew none."""
    known: dict[tuple[int, ...], str] = {(): ""}
    rows = [[tuple(int(t) for t in drawn[drawn >= 0]) for drawn in of_round] for of_round in tokens]
    for ids in {ids for row in rows for ids in row} - known.keys():
        known[ids] = tokenizer.decode(list(ids))
    return [[known[ids] for ids in row] for row in rows]


def runs(
    ancestors: Int[np.ndarray, "R N"], said: list[list[str]], kept: Bool[np.ndarray, "R N"]
) -> Iterator[tuple[int, int, int]]:
    """(round, first slot, last slot) for every run of neighbouring slots with one string so far and
    one fate.
    """
    num = ancestors.shape[1]
    strings: list[tuple[str, ...]] = [()] * num
    for r, row in enumerate(said):
        strings = [(*strings[ancestors[r, i]], row[i]) for i in range(num)]
        first = 0
        for i in range(1, num + 1):
            if i == num or (strings[i], kept[r, i]) != (strings[first], kept[r, first]):
                yield r, first, i - 1
                first = i


def label(piece: str, most: int) -> str:
    """The text of a round as a label: the spaces of a single word show, and at most `most`
    characters.
    """
    return abridged(piece.replace(" ", "·") if " " not in piece.strip() else piece.strip(" "), most)


def abridged(text: str, most: int) -> str:
    """Text in one line of at most `most` characters: its beginning and its end, where strings of
    one run differ.
    """
    text, tail = text.replace("\n", "↵"), (most - 3) * 2 // 3
    if len(text) <= most:
        return text
    return (
        f"{text[: max(most - 1, 0)]}…"
        if most < 12
        else f"{text[: most - 3 - tail]} … {text[-tail:]}"
    )
