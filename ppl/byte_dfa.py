"""Regular expressions as deterministic automata over bytes, determinised by outlines-core in a
bounded process.

outlines-core matches leftmost-first, as a search does: its automaton of "a|ab" stops after "a".
Whether a whole string matches does not depend on which alternative is tried first, so the automaton
is built of START (pattern) SENTINEL: a string x matches exactly if START x SENTINEL does, and
nothing can stop before the sentinel is read.  START is there for speed alone: outlines-core
determinises the unanchored search as well, which takes hundreds of times longer if the pattern may
begin anew at every character.

Determinising can take time and memory exponential in the pattern (".*a.{30}") and cannot be
interrupted in process, so it is done in a child process (`determinise`) with limits on both.
"""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from . import determinise, regex_syntax
from .regex_syntax import Unusable

STARTS = ("\n", "\0", "\x7f", "\x85")  # ASCII and Latin-1 characters that few patterns allow
SENTINEL = "\U0010ffff"  # a noncharacter: no text may contain it, so reserving it costs nothing
SECONDS = 10
"""Of the processor; by the clock, on a machine that is busy, it may be thrice as much."""
BYTES = 4 << 30
MAX_BYTE_STATES = 1 << 17


class TooLarge(ValueError):
    """An automaton, or its tables, would exceed a limit."""


class ByteDFA(NamedTuple):
    """A complete automaton over bytes; state 0 is the start and the last state is dead.

    transitions [Q, 256] int32; accepting [Q] bool.  Every state but the dead one can
    reach an accepting one.
    """

    transitions: Int[np.ndarray, "Q 256"]
    accepting: Bool[np.ndarray, " Q"]

    def __repr__(self) -> str:
        return f"ByteDFA({len(self.accepting)} states)"


def compile_regex(pattern: str) -> ByteDFA:
    """The automaton of the strings (UTF-8) that match all of `pattern`.

    Raises:
        ValueError: if the pattern is no regular expression, uses an unsupported feature, or its
            automaton is too large.
    """
    try:
        body = regex_syntax.read(pattern).body
    except Unusable as error:
        raise ValueError(_invalid(pattern, error)) from None
    start = _start(body)
    transitions, accepting = _read(_determinise(pattern, body, start), start)
    if len(accepting) > MAX_BYTE_STATES:
        raise TooLarge(_too_large(pattern, f"{len(accepting)} states of at most {MAX_BYTE_STATES}"))
    return _prune(transitions, accepting)


def _invalid(pattern: str, problem: object) -> str:
    return (
        "expected a regular expression in the syntax of Rust's regex crate (no look-around,"
        f" back-references, word boundaries, or anchors in the middle), got {_shown(pattern)!r}:"
        f" {problem}"
    )


def _shown(pattern: str) -> str:
    return pattern if len(pattern) < 200 else pattern[:200] + "..."


def _start(pattern: str) -> str:
    """A character that `pattern` seems not to match anywhere; "" if none is found.  A wrong guess
    costs only time.
    """
    flags = re.DOTALL if re.search(r"\(\?[a-zA-Z]*s", pattern) else 0
    atoms = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.", pattern, re.DOTALL)
    with warnings.catch_warnings(action="ignore"):
        return next(
            (
                start
                for start in STARTS
                if not any(_matches(atom, start, flags) for atom in set(atoms))
            ),
            "",
        )


def _matches(atom: str, text: str, flags: int) -> bool:
    try:
        return re.fullmatch(atom, text, flags) is not None
    except re.error:
        return False


def _determinise(pattern: str, body: str, start: str) -> bytes:
    # As long as the user's, so that places in it are the user's; Rust has no \Z.
    rust = re.sub(r"\\(.)", lambda pair: pair[0].replace("Z", "z"), pattern, flags=re.DOTALL)
    try:
        # -P: a module of the caller's working directory must not shadow the standard library's.
        child = subprocess.run(
            [sys.executable, "-P", determinise.__file__, str(BYTES), str(math.ceil(SECONDS))],
            input=json.dumps([f"{start}(?:{body}){SENTINEL}", rust]).encode(),
            capture_output=True,
            timeout=3 * SECONDS,
            check=False,
        )
        slow = hasattr(signal, "SIGXCPU") and child.returncode == -signal.SIGXCPU
    except subprocess.TimeoutExpired:
        slow = True
    if slow:
        raise TooLarge(_too_large(pattern, f"one that takes over {SECONDS} s to build"))
    if child.returncode == 2:
        raise ValueError(_invalid(pattern, _reason(pattern, child.stderr.decode())))
    if child.returncode == 3 or child.returncode < 0:
        raise TooLarge(_too_large(pattern, f"one that takes over {BYTES >> 30} GB to build"))
    if child.returncode:
        raise RuntimeError(
            f"building the automaton of {pattern!r} failed:\n{child.stderr.decode()}"
        )
    return child.stdout


def _reason(pattern: str, messages: str) -> str:
    """Why outlines-core refused `pattern`, in Rust's words if it has some."""
    message, rust = json.loads(messages)
    if found := regex_syntax.refusal(pattern, rust):
        return str(found)
    if "Found no transitions" in message:
        return "a part of it, such as [^\\s\\S], can never match; leave it out"
    return f"{message.strip()}; rewrite it"


def _too_large(pattern: str, got: str) -> str:
    return (
        f"expected a pattern whose automaton is small, got {got}, from {_shown(pattern)!r};"
        " use smaller counted repetitions ({m,n}), and none after a part that can match at"
        " many positions (as in '.*a.{30}')"
    )


def _read(data: bytes, start: str) -> tuple[Int[np.ndarray, "Q 256"], Bool[np.ndarray, " Q"]]:
    """Transitions and accepting states, start first and dead last, with the sentinel resolved."""
    numbers = np.frombuffer(data, np.int32)
    initial, num_final, num_edges = numbers[:3]
    final, (source, byte, target) = (
        numbers[3 : 3 + num_final],
        numbers[3 + num_final :].reshape(3, num_edges),
    )
    for value in start.encode():
        initial = target[(source == initial) & (byte == value)][0]
    names = np.unique(np.concatenate([[initial], final, source, target]))
    dead = len(names)
    order = np.argsort(names != initial, kind="stable")
    number = np.empty(dead, np.int32)
    number[order] = np.arange(dead)

    def index(values: np.ndarray) -> np.ndarray:
        return number[np.searchsorted(names, values)]

    transitions = np.full((dead + 1, 256), dead, np.int32)
    transitions[index(source), byte] = index(target)
    state = np.arange(dead + 1)
    for value in SENTINEL.encode():
        state = transitions[state, value]
    return transitions, np.isin(state, index(final))


def _prune(transitions: Int[np.ndarray, "Q 256"], accepting: Bool[np.ndarray, " Q"]) -> ByteDFA:
    """Drop what the start does not reach; make one dead state of all that accept nothing any more
    (sentinel's path).
    """
    dead = len(transitions) - 1
    reached, frontier = np.zeros(len(transitions), bool), np.array([0])
    while frontier.size:
        reached[frontier] = True
        following = np.unique(transitions[frontier])
        frontier = following[~reached[following]]
    alive = accepting.copy()
    source, byte = np.nonzero(transitions != dead)
    target = transitions[source, byte]
    while True:
        grown = alive.copy()
        grown[source[alive[target]]] = True
        if (grown == alive).all():
            break
        alive = grown
    alive &= reached
    alive[[0, dead]] = True
    number = np.where(alive, np.cumsum(alive) - 1, alive.sum() - 1).astype(np.int32)
    return ByteDFA(number[transitions[alive]], accepting[alive])
