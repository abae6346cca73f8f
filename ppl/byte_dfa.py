"""Regular expressions as deterministic automata over bytes, determinised by outlines-core in a
bounded process.

outlines-core matches leftmost-first, as a search does: its automaton of "a|ab" stops after "a".
Whether a whole string matches does not depend on which alternative is tried first, so the automaton
is built of START (pattern) SENTINEL: a string x matches exactly if START x SENTINEL does, and
nothing can stop before the sentinel is read.  START is there for speed alone: outlines-core
determinises the unanchored search as well, which takes hundreds of times longer if the pattern may
begin anew at every character.

Determinising can take time and memory exponential in the pattern (".*a.{30}") and cannot be
interrupted in process, so this file runs itself as a child process with limits on both.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from array import array
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

STARTS = ("\n", "\0", "\x7f", "\x85")  # ASCII and Latin-1 characters that few patterns allow
SENTINEL = "\U0010ffff"  # a noncharacter: no text may contain it, so reserving it costs nothing
SECONDS = 30
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
    body = strip_anchors(pattern)
    problem = find_problem(body)
    if problem:
        raise ValueError(_invalid(pattern, problem))
    start = _start(body)
    transitions, accepting = _read(_determinise(pattern, body, start), start)
    if len(accepting) > MAX_BYTE_STATES:
        raise TooLarge(_too_large(pattern, f"{len(accepting)} states of at most {MAX_BYTE_STATES}"))
    return _prune(transitions, accepting)


def strip_anchors(pattern: str) -> str:
    """`pattern` without ^ in front and $ at the end: they say what holds anyway, that the whole
    string must match.
    """
    pattern = pattern.removeprefix("^")
    escapes = len(pattern[:-1]) - len(pattern[:-1].rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and escapes % 2 == 0 else pattern


def find_problem(pattern: str) -> str | None:
    """What keeps `pattern` from being used, or None: features that a whole-string automaton lacks,
    stray parentheses.

    An anchor inside the pattern would silently never match once the sentinel follows it, and "a)(b"
    would become valid by being put in a group, so both have to be found before.
    """
    depth, brackets, i = 0, 0, 0
    while i < len(pattern):
        char, rest = pattern[i], pattern[i + 1 : i + 4]
        if char == "\\":
            if not brackets and rest[:1] in ("b", "B", "A", "z", "Z", "<", ">"):
                return f"an anchor or word boundary (\\{rest[:1]}) at position {i}"
            if not brackets and rest[:1].isdigit():
                return f"a back-reference (\\{rest[:1]}) at position {i}"
            i += 2
            continue
        if char == "[":
            brackets += 1
            i += rest.startswith("^")
            i += pattern[i + 1 : i + 2] == "]"  # a bracket that opens a class is a member of it
        elif char == "]":
            brackets = max(brackets - 1, 0)
        elif not brackets and char in "^$":
            return f"an anchor ({char}) at position {i}, though the whole string must match anyway"
        elif not brackets and char == "(":
            depth += 1
            if rest.startswith(("?=", "?!", "?<=", "?<!")):
                return f"look-around at position {i}"
            if rest.startswith("?>"):
                return f"an atomic group at position {i}"
        elif not brackets and char == ")":
            depth -= 1
            if depth < 0:
                return f"an unmatched ) at position {i}"
        i += 1
    return None


def _invalid(pattern: str, problem: str) -> str:
    return (
        "expected a regular expression in the syntax of Rust's regex crate (no look-around,"
        " back-references, word"
        f" boundaries, or anchors but ^ in front and $ at the end), got {pattern!r}: {problem};"
        " rewrite that part"
    )


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
    try:
        # -P: a module of the caller's working directory must not shadow the standard library's.
        child = subprocess.run(
            [sys.executable, "-P", __file__, str(BYTES)],
            input=f"{start}(?:{body}){SENTINEL}".encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TooLarge(_too_large(pattern, f"one that takes over {SECONDS} s to build")) from None
    if child.returncode == 2:
        raise ValueError(_invalid(pattern, _reason(pattern, child.stderr.decode())))
    if child.returncode == 3 or child.returncode < 0:
        raise TooLarge(_too_large(pattern, f"one that takes over {BYTES >> 30} GB to build"))
    if child.returncode:
        raise RuntimeError(
            f"building the automaton of {pattern!r} failed:\n{child.stderr.decode()}"
        )
    return child.stdout


def _reason(pattern: str, message: str) -> str:
    """Why `pattern` is invalid: in the words of Python's re, which says where, if that refuses it
    too.
    """
    if "Found no transitions" in message:
        return "a part of it, such as [^\\s\\S], can never match"
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        return str(error)
    return message.strip()


def _too_large(pattern: str, got: str) -> str:
    shown = pattern if len(pattern) < 200 else pattern[:200] + "..."
    return (
        f"expected a pattern whose automaton is small, got {got}, from {shown!r}; use smaller"
        " counted repetitions"
        " ({m,n}), and none after a part that can match at many positions (as in '.*a.{30}')"
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


def _child() -> None:
    """Read a pattern, write initial state, counts, final states and edges (sources, bytes, targets)
    as int32.

    Exit status 2 says that the pattern is invalid, 3 that memory ran out.
    """
    from outlines_core import Index, Vocabulary

    if sys.platform == "linux":  # elsewhere only the time is limited
        import resource

        limit, (_, hard) = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(
            resource.RLIMIT_AS,
            (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard),
        )
    pattern = sys.stdin.buffer.read().decode()
    eos = 256
    try:
        index = Index(pattern, Vocabulary(eos, {bytes([byte]): [byte] for byte in range(256)}))
        final = index.get_final_states()
        source, byte, target = array("i"), array("i"), array("i")
        for state, row in index.get_transitions().items():
            row.pop(eos, None)
            source.extend([state] * len(row))
            byte.extend(row.keys())
            target.extend(row.values())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        sys.exit(3)
    head = array("i", [index.get_initial_state(), len(final), len(source), *final])
    sys.stdout.buffer.write(b"".join(part.tobytes() for part in (head, source, byte, target)))


if __name__ == "__main__":
    _child()
