"""Which tokens byte-pair encoding leaves side by side.

Byte-pair encoding joins, of all adjacent pairs of symbols, one that has the least rank, the
leftmost of equals, until no pair has a rank.  A string of tokens is the encoding of its own text
exactly if every token is that of its text, and every two neighbours are that of theirs: until a
merge first joins across the end of a token, each token's inside goes its way as if alone, and which
of two neighbours' merges comes first does not depend on what others do in between.  See also Vieira
et al., "Language models over canonical byte-pair encodings" (arXiv 2506.07956).

So it has to be known when two neighbours a, b meet.  A token's time is the greatest rank that was
applied until it stands: merges of lower ranks, if they become possible only then, follow at once.
On the right edge of a stand in turn a's last symbol, what that is joined into, and so on up to a:
each, r say, stands there from time(r) on, until r's merge into the next, p, takes it away at
time(p).  On the left edge of b likewise some l, which is taken into q.  A merge of (r, l), of rank
x, joins across exactly if both ever stand side by side and neither is taken away before it:

    time(l) < time(p),   time(r) <= time(q),   x < until(p),   x <= until(q)

where until is time, or, for what is taken away in the rush in which it came, the rank of that; all
are infinite if r is a itself, or l is b.  (Of equal ranks the leftmost comes first.)
The tokens b that a merge (r, l) forbids behind an a that ends in r are those that begin with l and
the descendants of its later left children, an interval of a suitable order.  So a row of the
relation is a union of few intervals, and many tokens share a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer, UInt8, UInt32

from .showing import shown

NEVER = np.int64(1) << 40
WORD = 32


@shown
class Merges(NamedTuple):
    """The merges of a tokenizer, and how each token comes about by them.

    triples [M, 3] int32: a merge's left token, right token and their union, by rank.  Of each
    token: left, right [V] int32, the last merge's parts; time [V] int64 of that merge, and the
    ranks left_until, right_until [V] int64 below which others are quicker to take those parts (all
    -1 for a single symbol); own [V], whether its text's encoding is itself; alone [V], whether it
    is a whole piece's encoding by decree, though merges do not reach it.
    """

    triples: Integer[np.ndarray, "M 3"]
    left: Integer[np.ndarray, " V"]
    right: Integer[np.ndarray, " V"]
    time: Integer[np.ndarray, " V"]
    left_until: Integer[np.ndarray, " V"]
    right_until: Integer[np.ndarray, " V"]
    own: Bool[np.ndarray, " V"]
    alone: Bool[np.ndarray, " V"]


@shown
class Pairs(NamedTuple):
    """Which tokens may stand side by side, in classes of tokens that agree.

    row [V] int32, the class of a token as the left one, column [V] int32 as the right one; bit
    c % 32 of word beside[r, c // 32] is 1 if a token of row r may stand before one of column c.  In
    row 0 and in column 0 all are.
    """

    row: Integer[np.ndarray, " V"]
    column: Integer[np.ndarray, " V"]
    beside: UInt32[np.ndarray, "R W"]

    def lefts(self) -> UInt8[np.ndarray, "C B"]:
        """The same by right class: bits of the left classes, as of `np.packbits`."""
        parts = [
            np.packbits(np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little"), axis=0)
            for rows in np.split(self.beside, range(1024, len(self.beside), 1024))
        ]
        return np.ascontiguousarray(np.concatenate(parts).T)


def derive(
    triples: Integer[np.ndarray, "M 3"],
    single: Bool[np.ndarray, " V"],
    length: Integer[np.ndarray, " V"],
) -> Merges:
    """How each token comes about.

    Args:
        triples: the merges by rank.
        single: which tokens are single symbols, out of which all is made.
        length: of each token's text, in whatever unit; a part is shorter than the whole.
    """
    left, right = (np.full(len(single), -1, np.int32) for _ in range(2))
    time, left_until, right_until = (np.full(len(single), -1, np.int64) for _ in range(3))
    alone = np.zeros(len(single), bool)
    found = Merges(triples, left, right, time, left_until, right_until, single.copy(), alone)
    ranks = _ranks(triples)
    for rank in np.argsort(length[triples[:, 2]], kind="stable").tolist():
        one, other, union = triples[rank].tolist()
        if found.own[union] or not (found.own[one] and found.own[other]):
            continue
        if not _joined(found, ranks, one, other):
            left[union], right[union], found.own[union] = one, other, True
            now = time[union] = max(rank, time[one], time[other])
            # Of parts that came at the same time the left one was first.
            left_until[union] = now if now > time[one] or now == time[other] else rank
            right_until[union] = now if now > time[other] else rank
    return found


def _ranks(triples: Integer[np.ndarray, "M 3"]) -> dict[tuple[int, int], int]:
    return {(one, other): rank for rank, (one, other, _) in enumerate(triples.tolist())}


def _edge(
    parts: np.ndarray, until: np.ndarray, time: np.ndarray, token: int
) -> Iterator[tuple[int, int, int, int]]:
    """What stands on an edge of a token, the last first: symbol, since when, and until when by
    rank and by time.
    """
    rank = end = int(NEVER)
    while token >= 0:
        yield token, int(time[token]), rank, end
        rank, end, token = int(until[token]), int(time[token]), int(parts[token])


def _joined(merges: Merges, ranks: dict[tuple[int, int], int], one: int, other: int) -> bool:
    """Whether a merge joins across two neighbours before they are joined as they are."""
    right = list(_edge(merges.left, merges.left_until, merges.time, other))
    for r, time_r, until_p, time_p in _edge(merges.right, merges.right_until, merges.time, one):
        for l, time_l, until_q, time_q in right:  # noqa: E741
            x = ranks.get((r, l))
            if x is None or (r, l) == (one, other):
                continue
            if time_l < time_p and time_r <= time_q and x < until_p and x <= until_q:
                return True
    return False


def pairs(merges: Merges, tokens: Integer[np.ndarray, " K"]) -> Pairs:
    """The relation among some tokens; those that are no encodings (`own`) may stand anywhere, those
    that are `alone` beside none.
    """
    alone, tokens = tokens[merges.alone[tokens]], tokens[merges.own[tokens]]
    position, end = _preorder(merges)
    rows = _Rows(merges)
    row_of = np.array([rows.of(token) for token in tokens.tolist()], np.int64)
    order = np.argsort(position[tokens])
    # How many of `tokens` come before a position: intervals of all tokens as intervals of these.
    before = np.zeros(len(position) + 1, np.int64)
    before[position[tokens] + 1] = 1
    before = 1 + before.cumsum()  # column 0 stands for all others
    spans = _Spans(merges, position, end, before)
    used, row_of = np.unique(row_of, return_inverse=True)
    packed = [spans.forbidden(rows.active[row]) for row in used.tolist()]
    packed, row_of = _classes(np.stack([spans.forbidden([]), *packed]), row_of + 1)
    first, column_of = _columns(packed, spans.size)
    row, column = np.zeros(len(position), np.int32), np.zeros(len(position), np.int32)
    row[tokens], column[tokens[order]] = row_of, column_of[spans.cell[1:]]
    words = [_words(np.unpackbits(bits, count=spans.size)[first] == 0) for bits in packed]
    row[alone], column[alone] = len(words), len(first)
    more = int(len(alone) > 0)
    return Pairs(row, column, np.pad(np.stack(words), ((0, more), (0, more))))


def _classes(
    rows: Integer[np.ndarray, "K L"], of: Integer[np.ndarray, " N"]
) -> tuple[Integer[np.ndarray, "R L"], Integer[np.ndarray, " N"]]:
    """The distinct rows in order of appearance, and which of them `of` refers to now."""
    ids: dict[bytes, int] = {}
    number = np.array([ids.setdefault(row.tobytes(), len(ids)) for row in rows], np.int64)
    return rows[np.unique(number, return_index=True)[1]], number[of]


def _columns(
    packed: Integer[np.ndarray, "R B"], count: int
) -> tuple[Integer[np.ndarray, " C"], Integer[np.ndarray, " N"]]:
    """The first of each class of equal columns of a matrix of bits, and every column's class."""
    sums, rng = np.zeros(count, np.uint64), np.random.default_rng(0)
    for row in packed:
        weight = rng.integers(1 << 63, dtype=np.uint64)
        sums += np.unpackbits(row, count=count) * weight
    _, first, column_of = np.unique(sums, return_index=True, return_inverse=True)
    return first, column_of


def _words(bits: Bool[np.ndarray, " C"]) -> UInt32[np.ndarray, " W"]:
    padded = np.zeros(-(-len(bits) // WORD) * WORD, bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def _preorder(merges: Merges) -> tuple[Integer[np.ndarray, " V"], Integer[np.ndarray, " V"]]:
    """The places of tokens in an order in which those that begin with one, its descendants by left
    parts, are the interval [position, end), the children that come latest first.
    """
    size = len(merges.own)
    children: dict[int, list[int]] = {}
    tokens = np.flatnonzero(merges.own)
    for token in tokens[np.argsort(merges.left_until[tokens], kind="stable")].tolist():
        children.setdefault(int(merges.left[token]), []).append(token)
    position, end = np.full(size, size - 1, np.int64), np.full(size, size, np.int64)
    place, stack = 0, [(token, False) for token in children.get(-1, [])]
    while stack:
        token, done = stack.pop()
        if done:
            end[token] = place
            continue
        position[token] = place
        place += 1
        stack.append((token, True))
        # In ascending order, so that the latest is on top.
        stack += [(child, False) for child in children.get(token, [])]
    return position, end


def _is_late(merges: Merges) -> Bool[np.ndarray, " M"]:
    """Merges that may become possible only after their rank: their union can also be made of
    parts that stand earlier.
    """
    times = merges.time[merges.triples[:, :2]].max(1, initial=-1)
    return times >= np.arange(len(merges.triples))


class _Rows:
    """For each token the merges that may join across its end, in classes that share the list."""

    def __init__(self, merges: Merges) -> None:
        self.merges, self.late = merges, _is_late(merges)
        self.active: list[list[np.ndarray]] = [[]]
        self.ids: dict[tuple, int] = {}
        possible = np.flatnonzero(merges.own[merges.triples[:, :2]].all(1))
        order = possible[np.argsort(merges.triples[possible, 0], kind="stable")]
        lefts, starts = np.unique(merges.triples[order, 0], return_index=True)
        groups = np.split(order, starts[1:]) if len(order) else []
        self.by_left = dict(zip(lefts.tolist(), groups, strict=True))
        self.part = functools.cache(self._part)

    def of(self, token: int) -> int:
        """The class of a token as the left neighbour."""
        return self._extend(self.part(token), token, int(NEVER), int(NEVER))

    def _part(self, token: int) -> int:
        """The class of what happens before `token` stands."""
        merges, last = self.merges, int(self.merges.right[token])
        if last < 0:
            return 0
        until, time = int(merges.right_until[token]), int(merges.time[token])
        return self._extend(self.part(last), last, until, time)

    def _extend(self, base: int, symbol: int, until: int, time: int) -> int:
        """`base` and the merges of a symbol until it is taken away."""
        group = self.by_left.get(symbol)
        if group is None:
            return base
        found = group[: np.searchsorted(group, until)]
        found = found[~self.late[found] | (self.merges.time[self.merges.triples[found, 1]] < time)]
        if not found.size:
            return base
        number = self.ids.setdefault((base, symbol, found.tobytes()), len(self.active))
        if number == len(self.active):
            self.active.append([*self.active[base], found])
        return number


class _Spans:
    """What each merge forbids: intervals of the tokens in question, in preorder."""

    def __init__(
        self,
        merges: Merges,
        position: Integer[np.ndarray, " V"],
        end: Integer[np.ndarray, " V"],
        before: Integer[np.ndarray, " P"],
    ) -> None:
        # Children by parent, the latest first, and the last of equals, as in the preorder.
        tokens = np.flatnonzero(merges.own)[::-1]
        keys = merges.left[tokens] * (2 * NEVER) - merges.left_until[tokens]
        order = np.argsort(keys, kind="stable")
        tokens, keys = tokens[order], keys[order]
        right, rank = merges.triples[:, 1].astype(np.int64), np.arange(len(merges.triples))
        first = np.searchsorted(keys, right * (2 * NEVER) - NEVER)
        last = np.searchsorted(keys, right * (2 * NEVER) - rank, side="right")
        stop = np.where(last > first, end[tokens[np.maximum(last, 1) - 1]], position[right] + 1)
        self.begin, self.stop = before[position[right]], before[stop]
        self.more: dict[int, np.ndarray] = {}
        for merge in np.flatnonzero(_is_late(merges)).tolist():
            children = tokens[first[merge] : last[merge]]
            children = children[merges.time[children] >= merges.time[merges.triples[merge, 0]]]
            self.stop[merge] = before[position[right[merge]] + 1]
            self.more[merge] = before[np.stack([position[children], end[children]])]
        # Tokens between two ends of intervals are forbidden together: one cell stands for them.
        ends = [part.reshape(-1) for part in (self.begin, self.stop, *self.more.values())]
        marks = np.unique(np.concatenate([[0, 1], *ends]))
        self.size, self.cell = (
            len(marks),
            np.searchsorted(marks, np.arange(before[-1]), "right") - 1,
        )
        self.begin, self.stop = (
            np.searchsorted(marks, self.begin),
            np.searchsorted(marks, self.stop),
        )
        self.more = {merge: np.searchsorted(marks, spans) for merge, spans in self.more.items()}

    def forbidden(self, active: Iterable[np.ndarray]) -> np.ndarray:
        """A bit for each token in question, whether one of the merges `active` forbids it."""
        merges = np.concatenate([np.zeros(0, np.int64), *active])
        edges = np.zeros(self.size + 1, np.int32)
        np.add.at(edges, self.begin[merges], 1)
        np.add.at(edges, self.stop[merges], -1)
        for merge in merges.tolist() if self.more else ():
            if merge in self.more:
                np.add.at(edges, self.more[merge][0], 1)
                np.add.at(edges, self.more[merge][1], -1)
        return np.packbits(np.cumsum(edges[:-1], dtype=np.int32) > 0)
