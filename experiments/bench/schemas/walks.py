"""Texts that a schema's constraint lets through: whether it does so with given ones, and random
ones, token by token.  No model is asked.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from ppl import byte_dfa, token_tables
from ppl.context_free import WORD, _parsers
from ppl.schemas import Plan

PIECES = [b'{"', b'": ', b'", "', b'"}', b"tr", b"null", b"[[", b"]]", "é".encode(), b"00"]
TOKENS: list[bytes | None] = [None, *(bytes([byte]) for byte in range(256)), *PIECES]
EOS, CLOSING = 0, (b'"', b"}", b"]", b'"}', b"]]")
VOCABULARY = token_tables.vocabulary(TOKENS, EOS)
MOST = 500
"""Tokens of a walk; one that does not end by then, or meets a name twice, is given up."""


class Constraint(Protocol):
    """Which tokens may follow strings."""

    def allowed(
        self, tokens: Int[np.ndarray, "N T"], used: int, going: Bool[np.ndarray, " N"]
    ) -> Bool[np.ndarray, "N V"]: ...


class Tables:
    def __init__(self, pattern: str) -> None:
        self.tables = token_tables.build(byte_dfa.compile_regex(pattern), VOCABULARY)

    def allowed(self, tokens: Any, used: int, going: Any) -> Any:
        classes, transitions, distance = self.tables
        state = np.zeros(len(tokens), int)
        for place in range(used):
            state = transitions[state, classes[tokens[:, place]]]
        after = transitions[state][:, classes]
        found = distance[after] < token_tables.UNREACHABLE
        found[:, EOS] = distance[state] == 0
        if used > MOST // 4:
            # Towards the end.
            nearer = (distance[after] < distance[state][:, None]) & found
            nearer[:, EOS] = found[:, EOS]
            found = nearer
        return found & going[:, None]


class Parser:
    def __init__(self, plan: Plan) -> None:
        self.parsers = _parsers(plan.grammar(), VOCABULARY, plan.counts_names())

    def allowed(self, tokens: Any, used: int, going: Any) -> Any:
        words, gave_up = self.parsers.follow(tokens, np.full(len(tokens), used), going)
        if gave_up.any():
            raise RuntimeError("expected a parser within its limits, got one that gave up")
        bits = words[:, :, None] >> np.arange(WORD, dtype=np.uint32) & 1
        return bits.reshape(len(tokens), -1)[:, : len(TOKENS)] > 0


def constraint(plan: Plan) -> Constraint:
    return Parser(plan) if plan.pattern is None else Tables(plan.pattern)


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether a text has mass, in tokens of one byte."""
    ids = np.array([[byte + 1 for byte in text.encode()]], np.int32)
    going, place = np.ones(1, bool), ids.shape[1]
    follows = [*ids[0].tolist(), EOS]
    if isinstance(constraint, Tables):
        classes, transitions, distance = constraint.tables
        state = 0
        for token in ids[0]:
            state = int(transitions[state, classes[token]])
        return bool(distance[state] == 0)
    # A parser is asked only for what it let through before.
    return all(constraint.allowed(ids, used, going)[0, follows[used]] for used in range(place + 1))


def walks(constraint: Constraint, num: int, seed: int) -> tuple[list[str], int]:
    """The texts of random walks, and how many did not end."""
    random = np.random.default_rng(seed)
    tokens, going = np.zeros((num, MOST), np.int32), np.ones(num, bool)
    ended = np.zeros(num, bool)
    weights = np.array([1.0 if t and max(t) < 128 and min(t) > 31 else 0.1 for t in TOKENS])
    closing = np.array([token in CLOSING for token in TOKENS])
    for used in range(MOST):
        allowed = constraint.allowed(tokens, used, going)
        going &= allowed.any(1)
        if not going.any():
            break
        # Ever more towards an end, so that strings and lists stay short.
        growth = np.where(closing, 10.0 * 1.1 ** min(used, 200), weights)
        growth[EOS] = growth.max()
        noise = random.gumbel(size=allowed.shape) + np.log(growth)
        drawn = np.where(allowed, noise, -np.inf).argmax(1)
        ended |= going & (drawn == EOS)
        going &= drawn != EOS
        tokens[going, used] = drawn[going]
    texts = [b"".join(TOKENS[t] or b"" for t in row).decode() for row in tokens[ended].tolist()]
    return texts, int((~ended).sum())
