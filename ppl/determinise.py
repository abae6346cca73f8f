"""The child process of `byte_dfa`: a file of its own, run by its path, so that it imports little.

Read the limits of memory and of processor time from the arguments and, as JSON, a regular
expression and the user's own that it was made of; write initial state, counts, final states and
edges (sources, bytes, targets) as int32.  Exit status 2 says that the expression is invalid, with
why as JSON, 3 that memory ran out.
"""

from __future__ import annotations

import json
import sys
from array import array


def main() -> None:
    from outlines_core import Index, Vocabulary

    if sys.platform == "linux":  # elsewhere only the time by the clock is limited
        import resource

        limits = (resource.RLIMIT_AS, resource.RLIMIT_CPU)
        for kind, limit in zip(limits, map(int, sys.argv[1:]), strict=True):
            _, hard = resource.getrlimit(kind)
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (soft, hard))
    expression, pattern = json.loads(sys.stdin.buffer.read())
    eos = 256
    try:
        index = Index(expression, Vocabulary(eos, {bytes([byte]): [byte] for byte in range(256)}))
        final = index.get_final_states()
        source, byte, target = array("i"), array("i"), array("i")
        for state, row in index.get_transitions().items():
            row.pop(eos, None)
            source.extend([state] * len(row))
            byte.extend(row.keys())
            target.extend(row.values())
    except ValueError as error:
        json.dump([str(error), why(pattern)], sys.stderr)
        sys.exit(2)
    except MemoryError:
        sys.exit(3)
    head = array("i", [index.get_initial_state(), len(final), len(source), *final])
    sys.stdout.buffer.write(b"".join(part.tobytes() for part in (head, source, byte, target)))


def why(pattern: str) -> str:
    """Rust's message with its line of carets, which outlines-core drops and llguidance, over the
    same parser, keeps; "" if it finds no fault.
    """
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_regex(pattern)
    return "\n".join(LLMatcher.validate_grammar_with_warnings(grammar)[1])


if __name__ == "__main__":
    main()
